/* `just slow` preloads this library into the daemon. It simulates a kernel whose writes to TCP sockets are slow or short.
 * SLOW=delay: each write returns 30 ms after the kernel took the bytes, so that the reader is far ahead of the writer.
 * SLOW=short: writes take some of the bytes, or none (EAGAIN), at random from SLOW_SEED. A write that ends in a short TLS
 * record takes all bytes: the daemon tries only once to write the alert that ends a connection, and the kernel has room for
 * it unless the client reads nothing. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
static struct { int epoll; struct epoll_event event; } registered[32768];
static __thread unsigned state;
/* Returns 'd' or 's', or 0 for unaffected descriptors: those of other programs, files and Unix sockets. */
static int mode(int fd) {
    int domain = 0;
    if (!getenv("SLOW") || strcmp(program_invocation_short_name, "key-service") || fd < 0 || fd >= 32768) return 0;
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &(socklen_t){sizeof domain}) || domain == AF_UNIX) return 0;
    return *getenv("SLOW");
}
static unsigned random_below(unsigned limit) {
    if (!state) state = ((unsigned)strtoul(getenv("SLOW_SEED"), NULL, 10) * 2654435761u ^ (unsigned)gettid()) | 1;
    return (state = state * 1664525u + 1013904223u) / 65536 % limit;
}
/* Records registrations. A simulated EAGAIN must be followed by an edge, or the daemon would not retry (epoll(7)). */
int epoll_ctl(int epoll, int op, int fd, struct epoll_event *event) {
    if (fd >= 0 && fd < 32768 && op != EPOLL_CTL_DEL) registered[fd].epoll = epoll, registered[fd].event = *event;
    return (int)syscall(SYS_epoll_ctl, epoll, op, fd, event);
}
ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    struct msghdr some = *message;
    struct iovec first = some.msg_iovlen ? *some.msg_iov : (struct iovec){0};
    if (mode(fd) == 's' && first.iov_len > 1
        && (*(unsigned char *)first.iov_base - 20u > 3 || some.msg_iov[some.msg_iovlen - 1].iov_len >= 64)) {
        if (registered[fd].epoll && !random_below(3)) {
            syscall(SYS_epoll_ctl, registered[fd].epoll, EPOLL_CTL_MOD, fd, &registered[fd].event);
            return errno = EAGAIN, -1;
        }
        first.iov_len = 1 + random_below(first.iov_len < 4096 ? (unsigned)first.iov_len : 4096);
        some.msg_iov = &first, some.msg_iovlen = 1;
    }
    ssize_t sent = syscall(SYS_sendmsg, fd, &some, flags);
    if (sent > 0 && mode(fd) == 'd') nanosleep(&(struct timespec){0, 30000000}, NULL);
    return sent;
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (!mode(fd)) return syscall(SYS_writev, fd, parts, count);
    return sendmsg(fd, &(struct msghdr){.msg_iov = (struct iovec *)parts, .msg_iovlen = (size_t)count}, 0);
}
ssize_t send(int fd, const void *bytes, size_t length, int flags) {
    if (!mode(fd)) return syscall(SYS_sendto, fd, bytes, length, flags, NULL, 0);
    return sendmsg(fd, &(struct msghdr){.msg_iov = &(struct iovec){(void *)bytes, length}, .msg_iovlen = 1}, flags);
}
ssize_t write(int fd, const void *bytes, size_t length) {
    return mode(fd) ? send(fd, bytes, length, 0) : syscall(SYS_write, fd, bytes, length);
}
