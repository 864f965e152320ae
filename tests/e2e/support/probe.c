/* Stands in for the daemon in its own sandbox and tries what the daemon must not be able to do: probe ATTEMPT.
   Exit status: 0 it was denied, 1 it was possible. What the system call filter denies kills the probe with SIGSYS. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static int tried(const char *what, long result) {
    dprintf(2, "%s: %s\n", what, result < 0 ? strerror(errno) : "possible");
    return result >= 0;
}

int main(int argc, char **argv) {
    const char *attempt = argc > 1 ? argv[1] : "";
    if (!strcmp(attempt, "connect"))
        return tried("an IPv4 socket", socket(AF_INET, SOCK_STREAM, 0)) ||
               tried("an IPv6 socket", socket(AF_INET6, SOCK_STREAM, 0)) ||
               tried("a netlink socket", socket(AF_NETLINK, SOCK_RAW, 0));
    if (!strcmp(attempt, "write")) {
        const char *paths[] = {"/x", "/tmp/x", "/var/tmp/x", "/run/x", "/dev/x", "/dev/shm/x", "/etc/key-service/x",
                               "/usr/bin/x", "/usr/bin/key-service", "/proc/self/mem", "/proc/sys/kernel/hostname"};
        int possible = 0;
        for (unsigned i = 0; i < sizeof paths / sizeof *paths; i++)
            possible |= strcmp(paths[i], "/proc/self/mem") && tried(paths[i], open(paths[i], O_WRONLY | O_CREAT, 0600));
        return possible;
    }
    if (!strcmp(attempt, "read"))
        return tried("/etc/shadow", open("/etc/shadow", O_RDONLY)) || tried("/etc/passwd", open("/etc/passwd", O_RDONLY)) ||
               tried("/proc/1/environ", open("/proc/1/environ", O_RDONLY)) || tried("/dev/mem", open("/dev/mem", O_RDONLY));
    if (!strcmp(attempt, "exec")) {
        char *none[] = {0};
        return tried("/bin/sh", execve("/bin/sh", argv, none)) || tried("/etc/key-service/config.toml",
               execve("/etc/key-service/config.toml", argv, none));
    }
    if (!strcmp(attempt, "jit"))
        return mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED;
    if (!strcmp(attempt, "ptrace")) return tried("ptrace", ptrace(PTRACE_TRACEME, 0, 0, 0));
    if (!strcmp(attempt, "fork-server")) return tried("listen", syscall(SYS_listen, 0, 1));
    if (!strcmp(attempt, "memfd")) return tried("memfd_create", syscall(SYS_memfd_create, "x", 0));
    if (!strcmp(attempt, "mount")) return tried("mount", syscall(SYS_mount, "x", "/", "tmpfs", 0, 0));
    if (!strcmp(attempt, "setuid")) return tried("setuid", syscall(SYS_setuid, 0));
    return 2;
}
