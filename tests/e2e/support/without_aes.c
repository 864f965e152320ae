/* Starts a program on arm64 as if the processor had no AES instructions: without_aes PROGRAM [ARGUMENT]...
   The kernel lists the processor's instructions in the auxiliary vector of a program, AT_HWCAP (getauxval(3)). A tracer clears the bits
   of AES and PMULL there before the program's first instruction, and detaches. The program keeps the process id. */
#include <elf.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/auxv.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

static pid_t program;

static void check(const char *what, int failed) {
    if (!failed) return;
    perror(what);
    kill(program, SIGKILL); /* it must not run with AES */
    _exit(125);
}

static long word(unsigned long address) {
    errno = 0;
    long value = ptrace(PTRACE_PEEKDATA, program, address, 0);
    check("read the stack", errno);
    return value;
}

static void trace(int ready) {
    struct user_regs_struct registers;
    struct iovec area = {&registers, sizeof registers};
    int status = 0;
    check("attach", ptrace(PTRACE_SEIZE, program, 0, PTRACE_O_TRACEEXEC) < 0);
    check("write", write(ready, "", 1) != 1);
    for (;;) {
        check("wait for exec", waitpid(program, &status, __WALL) < 0 || !WIFSTOPPED(status));
        if (status >> 8 == (SIGTRAP | PTRACE_EVENT_EXEC << 8)) break;
        check("continue", ptrace(PTRACE_CONT, program, 0, 0) < 0); /* SIGCHLD, from the child that has forked this tracer */
    }
    check("read the registers", ptrace(PTRACE_GETREGSET, program, NT_PRSTATUS, &area) < 0);
    /* argc, the arguments, a null pointer, the environment, a null pointer, and then pairs of a type and a value. */
    unsigned long at = registers.sp + 8 * (word(registers.sp) + 2);
    while (word(at)) at += 8;
    for (at += 8; word(at) != AT_HWCAP; at += 16) check("find AT_HWCAP", word(at) == AT_NULL);
    check("clear the bits", ptrace(PTRACE_POKEDATA, program, at + 8, word(at + 8) & ~(HWCAP_AES | HWCAP_PMULL)) < 0);
    check("detach", ptrace(PTRACE_DETACH, program, 0, 0) < 0);
}

int main(int argc, char **argv) {
    int ready[2];
    char byte;
    program = getpid();
    if (argc < 2 || pipe(ready)) return 125;
    pid_t child = fork();
    if (!child) {
        if (!fork()) trace(ready[1]); /* a grandchild: the program must not find a child that it did not start */
        _exit(0);
    }
    close(ready[1]);
    if (child < 0 || waitpid(child, 0, 0) != child || read(ready[0], &byte, 1) != 1) return 125;
    close(ready[0]);
    execv(argv[1], argv + 1);
    perror(argv[1]);
    return 125;
}
