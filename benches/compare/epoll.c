/*
 * The minimum cost of this response on one core: read, find the ends of the requests, write. It understands nothing of
 * HTTP but the blank line, and has no limits and no timeouts. It is a reference for measurements, not a server.
 *
 *     epoll constant     sends the same 32 bytes each time, like nginx and the bare hyper server
 *     epoll getrandom    sends 32 bytes from the kernel each time, like the daemon
 *
 * It listens on the socket that it inherits as descriptor 3.
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

enum { LISTENER = 3, KEY = 32, DESCRIPTORS = 65536, EVENTS = 256, READ_BUFFER = 16384, RESPONSES_MAX = 64 };

static const char HEADERS[] = "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: 32\r\n\r\n";

/* The number of bytes of the blank line \r\n\r\n that each connection has sent so far. */
static unsigned char matched[DESCRIPTORS];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int count_requests(int fd, const char *input, ssize_t size)
{
    static const char END[] = "\r\n\r\n";
    int requests = 0;
    unsigned char at = matched[fd];
    for (ssize_t i = 0; i < size; i++) {
        at = input[i] == END[at] ? at + 1 : input[i] == '\r';
        if (at == 4) {
            requests++;
            at = 0;
        }
    }
    matched[fd] = at;
    return requests;
}

/* Returns 0 if the connection must be closed. */
static int serve(int fd, int random)
{
    enum { RESPONSE = sizeof HEADERS - 1 + KEY };
    static char input[READ_BUFFER], output[RESPONSES_MAX * RESPONSE];
    ssize_t size = read(fd, input, sizeof input);
    if (size <= 0)
        return 0;
    int requests = count_requests(fd, input, size);
    if (requests > RESPONSES_MAX)
        return 0;
    for (int i = 0; i < requests; i++) {
        char *response = output + i * RESPONSE;
        memcpy(response, HEADERS, sizeof HEADERS - 1);
        if (!random)
            memcpy(response + sizeof HEADERS - 1, "0123456789abcdef0123456789abcdef", KEY);
        else if (getrandom(response + sizeof HEADERS - 1, KEY, 0) != KEY)
            fail("getrandom");
    }
    return requests == 0 || write(fd, output, (size_t)requests * RESPONSE) == (ssize_t)requests * RESPONSE;
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
