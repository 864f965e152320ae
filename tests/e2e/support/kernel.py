"""Stands in for the kernel of a daemon: system calls that fail or give other bytes, and threads that don't run."""

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
    """Answers getrandom(2) for a daemon, in the kernel's place: a filter hands each call over (seccomp_unotify(2)).

    `answer` is asked with the length that the caller wants, and gives bytes to write there, a negative errno, or None to
    let the kernel answer. `written` is everything that was written so, for each thread: several may ask at the same time."""

    ARCHITECTURES = {"x86_64": (0xC000003E, 318, 317), "aarch64": (0xC00000B7, 278, 277)}  # audit, getrandom, seccomp

    def __init__(self, answer=lambda length: None):
        self.answer, self.written = answer, collections.defaultdict(bytearray)
        self.ours, self.theirs = socket.socketpair()
        audit, self.getrandom, self.seccomp = self.ARCHITECTURES[platform.machine()]
        load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
        filters = [
            (load, 0, 0, 4),
            (equal, 0, 3, audit),
            (load, 0, 0, 0),
            (equal, 0, 1, self.getrandom),
            (give, 0, 0, 0x7FC00000),
            (give, 0, 0, 0x7FFF0000),
        ]  # USER_NOTIF, ALLOW
        self.code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in filters))
        self.program = ctypes.create_string_buffer(struct.pack("@HP", len(filters), ctypes.addressof(self.code)))

    def install(self):
        """In the child, before exec."""
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
        while not poll.poll()[0][1] & (select.POLLHUP | select.POLLERR):  # until no process has the filter any more
            asked = bytearray(80)
            with contextlib.suppress(OSError):  # a caller may be killed meanwhile
                fcntl.ioctl(listener, 0xC0502100, asked)  # SECCOMP_IOCTL_NOTIF_RECV
                number, thread, _, _, _, _, buffer, length = struct.unpack_from("=QIIiIQQQ", asked)
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
        """What a daemon is started with, to be answered so."""
        return {"before": self.install, "after": self.start}


class Without(Getrandom):
    """socket(2) denies address families: IPv6 as a kernel that was started with ipv6.disable=1, IPv4 too as the unit's sandbox."""

    ARCHITECTURES = {"x86_64": (0xC000003E, 41, 317), "aarch64": (0xC00000B7, 198, 277)}  # audit, socket, seccomp

    def __init__(self, *families, code=errno.EAFNOSUPPORT):
        self.families, self.code = families, code

    def install(self):
        """In the child, before exec."""
        audit, call, seccomp = self.ARCHITECTURES[platform.machine()]
        load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
        deny, count = 0x00050000 | self.code, len(self.families)  # SECCOMP_RET_ERRNO
        filters = [
            (load, 0, 0, 4),
            (equal, 0, 3 + count, audit),
            (load, 0, 0, 0),
            (equal, 0, 1 + count, call),
            (load, 0, 0, 16),
            *((equal, count - at, 0, family) for at, family in enumerate(self.families)),  # the first argument
            (give, 0, 0, 0x7FFF0000),
            (give, 0, 0, deny),
        ]  # ALLOW
        code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in filters))
        program = ctypes.create_string_buffer(struct.pack("@HP", len(filters), ctypes.addressof(code)))
        if LIBC.prctl(38, 1, 0, 0, 0) or LIBC.syscall(seccomp, 1, 0, program):  # PR_SET_NO_NEW_PRIVS, SET_MODE_FILTER
            raise OSError(ctypes.get_errno(), "seccomp")


class Accept4(Getrandom):
    """The same for accept4(2)."""

    ARCHITECTURES = {"x86_64": (0xC000003E, 288, 317), "aarch64": (0xC00000B7, 242, 277)}


@contextlib.contextmanager
def stopped(threads):
    """Stops single threads of a process, which no signal can: ptrace(2) does."""
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
