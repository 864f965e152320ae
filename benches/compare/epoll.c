/*
 * The least that this answer can cost on one core: read, find the ends of the heads, write. It understands nothing
 * of HTTP beyond the blank line, and has no bounds and no deadlines: a yardstick, not a server.
 *
 *     epoll constant     the same 32 bytes each time, as nginx and the hyper floor send
 *     epoll getrandom    32 bytes from the kernel each time, as the daemon sends
 *
 * Listens on the socket it inherits as descriptor 3.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <unistd.h>

enum { LISTENER = 3, KEY = 32, DESCRIPTORS = 65536, EVENTS = 256, INPUT = 16384, MOST_ANSWERS = 64 };

static const char HEAD[] = "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: 32\r\n\r\n";

/* How much of the blank line \r\n\r\n each connection has sent so far. */
static unsigned char matched[DESCRIPTORS];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int heads_ended(int fd, const char *input, ssize_t size)
{
    static const char END[] = "\r\n\r\n";
    int heads = 0;
    unsigned char at = matched[fd];
    for (ssize_t i = 0; i < size; i++) {
        at = input[i] == END[at] ? at + 1 : input[i] == '\r';
        if (at == 4) {
            heads++;
            at = 0;
        }
    }
    matched[fd] = at;
    return heads;
}

/* Returns 0 when the connection is to be closed. */
static int serve(int fd, int random)
{
    enum { ANSWER = sizeof HEAD - 1 + KEY };
    static char input[INPUT], output[MOST_ANSWERS * ANSWER];
    ssize_t size = read(fd, input, sizeof input);
    if (size <= 0)
        return 0;
    int heads = heads_ended(fd, input, size);
    if (heads > MOST_ANSWERS)
        return 0;
    for (int i = 0; i < heads; i++) {
        char *answer = output + i * ANSWER;
        memcpy(answer, HEAD, sizeof HEAD - 1);
        if (!random)
            memcpy(answer + sizeof HEAD - 1, "0123456789abcdef0123456789abcdef", KEY);
        else if (getrandom(answer + sizeof HEAD - 1, KEY, 0) != KEY)
            fail("getrandom");
    }
    return heads == 0 || write(fd, output, (size_t)heads * ANSWER) == (ssize_t)heads * ANSWER;
}

int main(int argc, char **argv)
{
    if (argc != 2 || (strcmp(argv[1], "constant") && strcmp(argv[1], "getrandom"))) {
        fprintf(stderr, "usage: epoll constant|getrandom\n");
        return 2;
    }
    int random = !strcmp(argv[1], "getrandom");
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = { .events = EPOLLIN, .data.fd = LISTENER };
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, LISTENER, &event))
        fail("epoll");
    for (;;) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd != LISTENER) {
                if (!serve(fd, random))
                    close(fd);
                continue;
            }
            fd = accept4(LISTENER, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
            if (fd < 0 || fd >= DESCRIPTORS)
                fail("accept4");
            int on = 1;
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
            matched[fd] = 0;
            event = (struct epoll_event){ .events = EPOLLIN, .data.fd = fd };
            if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
                fail("epoll_ctl");
        }
    }
}
