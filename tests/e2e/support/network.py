"""A network for the daemon, one for its clients, and a wire between them that disappears with the daemon's process.

Containers and pods behave so: when the process exits, the kernel never sends what it had not sent yet. A network namespace alone
does not reproduce that, because a connection with unsent data keeps its namespace alive. The wire is a pair of TUN devices (the
kernel's Documentation/networking/tuntap.rst): a packet that is sent on one device arrives on the other after DELAY.
"""

import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import os
import select
import struct
import subprocess
import threading
import time

DELAY = 0.02  # seconds, each way
CLIENT, SERVER = "192.0.2.1", "192.0.2.2"
PACKET_MAX = 65_536
LIBC = ctypes.CDLL(None, use_errno=True)


class Network:
    """`daemon(daemon)` runs a daemon in its network; `clients(call)` calls a function in the clients' network."""

    def __init__(self):
        self.loses = lambda packet: False  # whether the wire drops a packet from the daemon
        self.longest_pause = 0.0  # seconds in which the wire carried nothing, because its thread was stalled
        self.threads = [concurrent.futures.ThreadPoolExecutor(1) for _ in range(2)]
        self.devices = [
            thread.submit(device, *addresses).result()
            for thread, addresses in zip(self.threads, [(CLIENT, SERVER), (SERVER, CLIENT)], strict=True)
        ]
        self.wire = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for thread in self.threads:
            thread.shutdown()
        if self.wire:
            self.wire.join()
        for each in self.devices:
            os.close(each)

    @contextlib.contextmanager
    def daemon(self, daemon):
        with contextlib.ExitStack() as stack:
            self.threads[1].submit(stack.enter_context, daemon).result()
            process = os.pidfd_open(daemon.pid)
            self.wire = threading.Thread(target=self.carry, args=[process], daemon=True)
            self.wire.start()
            yield daemon

    def clients(self, call):
        return self.threads[0].submit(call).result()

    def carry(self, process):
        client, server = self.devices
        on_wire, is_up, before = [], True, time.monotonic()  # for each packet: arrival time, target device, bytes
        while is_up or on_wire:
            timeout = min(DELAY, max(0.0, on_wire[0][0] - time.monotonic())) if on_wire else DELAY
            ready, _, _ = select.select([client, server, process] if is_up else [], [], [], timeout)
            is_up = is_up and process not in ready
            now = time.monotonic()
            self.longest_pause, before = max(self.longest_pause, now - before), now
            for source, target in [(server, client), (client, server)]:
                # Packets that the daemon's kernel sent before the process exited still arrive.
                while is_up or source == server:
                    packet = received(source)
                    if packet is None:
                        break
                    if source == client or not self.loses(packet):
                        on_wire.append((time.monotonic() + DELAY, target, packet))
                if not is_up:
                    break
            while on_wire and on_wire[0][0] <= time.monotonic():
                _, target, packet = on_wire.pop(0)
                if is_up or target == client:
                    with contextlib.suppress(OSError):  # an IPv6 packet, for a device without IPv6
                        os.write(target, packet)
        os.close(process)


def received(device):
    try:
        return os.read(device, PACKET_MAX)
    except BlockingIOError:
        return None


def device(own, other):
    """Moves the calling thread to a new network namespace, and makes a TUN device there."""
    if LIBC.unshare(0x40000000):  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), f"unshare: {errno.errorcode.get(ctypes.get_errno())}")
    opened = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(opened, 0x400454CA, struct.pack("16sH22x", b"wire", 0x1001))  # TUNSETIFF; IFF_TUN, IFF_NO_PI
    for command in [f"ip addr add {own} peer {other} dev wire", "ip link set wire up", "ip link set lo up"]:
        subprocess.run(command.split(), check=True)
    return opened


def has_data(packet):
    """Returns whether a packet is IPv4 and holds a TCP segment with a payload."""
    if packet[0] >> 4 != 4 or packet[9] != 6:
        return False
    header = (packet[0] & 15) * 4
    return len(packet) > header + (packet[header + 12] >> 4) * 4
