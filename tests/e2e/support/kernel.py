"""Replaces parts of the kernel for a daemon: system calls that fail or return other bytes, and threads that are stopped."""

import collections
import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import select
import socket
import struct
import threading

LIBC = ctypes.CDLL(None, use_errno=True)


class Getrandom:
    """Answers a daemon's getrandom(2) calls in place of the kernel: a filter passes each call to the test (seccomp_unotify(2)).

    `answer` is called with the length that the caller requests. It returns the bytes to write, a negative errno, or None to let
    the kernel answer. `written` holds all bytes that were written, by thread, because threads may call at the same time."""

    ARCHITECTURES = {"x86_64": (0xC000003E, 318, 317), "aarch64": (0xC00000B7, 278, 277)}  # audit, getrandom, seccomp

    def __init__(self, answer=lambda length: None):
        self.answer, self.written = answer, collections.defaultdict(bytearray)
        self.ours, self.theirs = socket.socketpair()
        audit, self.getrandom, self.seccomp = self.ARCHITECTURES[platform.machine()]
        load, equal, ret = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
        filters = [
            (load, 0, 0, 4),
            (equal, 0, 3, audit),
            (load, 0, 0, 0),
            (equal, 0, 1, self.getrandom),
            (ret, 0, 0, 0x7FC00000),
            (ret, 0, 0, 0x7FFF0000),
        ]  # USER_NOTIF, ALLOW
        self.code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in filters))
        self.program = ctypes.create_string_buffer(struct.pack("@HP", len(filters), ctypes.addressof(self.code)))

    def install(self):
        """Runs in the child, before exec."""
        if LIBC.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
            raise OSError(ctypes.get_errno(), "prctl")
        listener = LIBC.syscall(self.seccomp, 1, 8, self.program)  # SET_MODE_FILTER, FLAG_NEW_LISTENER
        if listener < 0:
            raise OSError(ctypes.get_errno(), "seccomp")
        socket.send_fds(self.theirs, [b"."], [listener])

    def start(self):
        with self.ours, self.theirs:
            _, (listener,), *_ = socket.recv_fds(self.ours, 1, 1)
        threading.Thread(target=self.serve, args=[listener], daemon=True).start()

    def serve(self, listener):
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        while not poll.poll()[0][1] & (select.POLLHUP | select.POLLERR):  # until no process uses the filter any more
            call = bytearray(80)
            with contextlib.suppress(OSError):  # the caller may be killed meanwhile
                fcntl.ioctl(listener, 0xC0502100, call)  # SECCOMP_IOCTL_NOTIF_RECV
                number, thread, _, _, _, _, buffer, length = struct.unpack_from("=QIIiIQQQ", call)
                answer = self.answer(length)
                value = code = flags = 0
                if answer is None:
                    flags = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
                elif isinstance(answer, int):
                    code = answer
                else:
                    with open(f"/proc/{thread}/mem", "r+b", buffering=0) as memory:
                        memory.seek(buffer)
                        memory.write(answer)
                    self.written[thread] += answer
                    value = len(answer)
                fcntl.ioctl(listener, 0xC0182101, struct.pack("=QqiI", number, value, code, flags))  # NOTIF_SEND
        os.close(listener)

    def hooks(self):
        """The options of `Daemon` that install the filter and answer its calls."""
        return {"before": self.install, "after": self.start}


def install_filter(seccomp, filters):
    """Installs a filter that decides by itself. Runs in the child, before exec. `seccomp` is the number of seccomp(2)."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in filters))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(filters), ctypes.addressof(code)))
    if LIBC.prctl(38, 1, 0, 0, 0) or LIBC.syscall(seccomp, 1, 0, program):  # PR_SET_NO_NEW_PRIVS, SET_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp")


class DenySocket(Getrandom):
    """Makes socket(2) fail for some address families: for IPv6 as with the kernel's ipv6.disable=1, for IPv4 as in the unit's sandbox."""

    ARCHITECTURES = {"x86_64": (0xC000003E, 41, 317), "aarch64": (0xC00000B7, 198, 277)}  # audit, socket, seccomp

    def __init__(self, *families, code=errno.EAFNOSUPPORT):
        self.families, self.code = families, code

    def install(self):
        """Runs in the child, before exec."""
        audit, call, seccomp = self.ARCHITECTURES[platform.machine()]
        load, equal, ret = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
        deny, count = 0x00050000 | self.code, len(self.families)  # SECCOMP_RET_ERRNO
        filters = [
            (load, 0, 0, 4),
            (equal, 0, 3 + count, audit),
            (load, 0, 0, 0),
            (equal, 0, 1 + count, call),
            (load, 0, 0, 16),
            *((equal, count - at, 0, family) for at, family in enumerate(self.families)),  # the first argument
            (ret, 0, 0, 0x7FFF0000),
            (ret, 0, 0, deny),
        ]  # ALLOW
        install_filter(seccomp, filters)


class DenyFlag:
    """Makes a system call fail if its argument with this index has a bit set. `numbers` are those of the call, by architecture."""

    def __init__(self, index, bit, code, **numbers):
        self.index, self.bit, self.code, self.numbers = index, bit, code, numbers

    def install(self):
        """Runs in the child, before exec."""
        audit, _, seccomp = Getrandom.ARCHITECTURES[platform.machine()]
        load, equal, is_set, ret = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_RET|K
        filters = [
            (load, 0, 0, 4),
            (equal, 0, 5, audit),
            (load, 0, 0, 0),
            (equal, 0, 3, self.numbers[platform.machine()]),
            (load, 0, 0, 16 + 8 * self.index),
            (is_set, 0, 1, self.bit),
            (ret, 0, 0, 0x00050000 | self.code),  # SECCOMP_RET_ERRNO
            (ret, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
        ]
        install_filter(seccomp, filters)


class Accept4(Getrandom):
    """Answers accept4(2) calls in place of the kernel."""

    ARCHITECTURES = {"x86_64": (0xC000003E, 288, 317), "aarch64": (0xC00000B7, 242, 277)}


@contextlib.contextmanager
def stopped(threads):
    """Stops individual threads of a process. No signal can do that; ptrace(2) can."""
    LIBC.ptrace.argtypes, LIBC.ptrace.restype = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_long
    seize, interrupt, detach, wall = 0x4206, 0x4207, 17, 0x40000000

    def trace(request, thread):
        if LIBC.ptrace(request, thread, None, None) < 0:
            raise OSError(ctypes.get_errno(), f"ptrace {request:#x}")

    for thread in threads:
        trace(seize, thread)
        trace(interrupt, thread)
        os.waitpid(thread, wall)
    try:
        yield
    finally:
        for thread in threads:
            with contextlib.suppress(ProcessLookupError):  # the process has ended
                trace(detach, thread)
