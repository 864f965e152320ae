"""Asks for keys at a steady rate until standard input ends; prints what came of it as JSON.

    load.py PORT RATE [until-refused|while-refused]
        RATE requests a second: three quarters on new connections, one quarter on kept ones
        until-refused: a refused connection says that the service has gone, ends its asker, and is no failure
        while-refused: nor is it here, and its asker goes on

A request fails if its connection is refused, is cut, or brings anything but 32 bytes with status 200. A kept connection
is given up when the server says so, as HTTP has it. A restart reads what comes within 250 ms; on a kept connection that this
machine left idle for longer than LATE, a request that is cut before its response is late: it is made again (RFC 9112 9.3.1),
and fails if more than one in a hundred are.
"""

import json
import socket
import sys
import threading
import time

PORT, RATE = int(sys.argv[1]), float(sys.argv[2])
UNTIL_REFUSED, WHILE_REFUSED = ([word] == sys.argv[3:] for word in ("until-refused", "while-refused"))
THREADS = 16
PATIENCE = 60  # seconds; a client waits in the socket for as long as a restart takes
LATE = 0.2  # seconds
REQUEST = b"GET /key/32 HTTP/1.1\r\nHost: localhost\r\n%s\r\n"

stop = threading.Event()
lock = threading.Lock()
served, refused, late, failures, slowest = 0, 0, 0, [], 0.0


def answered(connection):
    """Reads a response; whether the connection ends with it."""
    answer = b""
    while b"\r\n\r\n" not in answer or len(answer) < answer.index(b"\r\n\r\n") + 4 + 32:
        piece = connection.recv(4096)
        if not piece:
            raise ConnectionError(f"cut after {len(answer)} bytes")
        answer += piece
    head = answer.split(b"\r\n\r\n")[0].lower()
    if not head.startswith(b"http/1.1 200"):
        raise ConnectionError(head.split(b"\r\n")[0].decode())
    return b"connection: close" in head


def asker(number):
    global served, refused, late, slowest
    closes = number % 4 != 0
    kept, idle_since = None, 0.0
    begin, turn = time.monotonic(), number / RATE
    while not stop.wait(max(0.0, begin + turn - time.monotonic())):
        turn += THREADS / RATE
        since, sent = time.monotonic(), None
        try:
            connection = kept or socket.create_connection(("127.0.0.1", PORT), PATIENCE)
            connection.sendall(REQUEST % (b"Connection: close\r\n" if closes else b""))
            sent = time.monotonic()
            is_last = answered(connection) or closes
            kept, idle_since = None if is_last else connection, time.monotonic()
            if is_last:
                connection.close()
            with lock:
                served += 1
                slowest = max(slowest, idle_since - since)
        except OSError as error:
            was_idle = kept and (sent or time.monotonic()) - idle_since > LATE
            kept = None
            if was_idle and (str(error) == "cut after 0 bytes" or isinstance(error, BrokenPipeError | ConnectionResetError)):
                turn -= THREADS / RATE
                with lock:
                    late += 1
                continue
            if (UNTIL_REFUSED or WHILE_REFUSED) and isinstance(error, ConnectionRefusedError):
                with lock:
                    refused += 1
                if UNTIL_REFUSED:
                    return
                continue
            with lock:
                failures.append(f"{'new' if closes else 'kept'} connection: {error}")


threads = [threading.Thread(target=asker, args=(n,)) for n in range(THREADS)]
started = time.monotonic()
for thread in threads:
    thread.start()
sys.stdin.read()
stop.set()
for thread in threads:
    thread.join()
if late * 100 > served:
    failures.append(f"{late} of {served} requests were late")
print(
    json.dumps(
        {
            "served": served,
            "refused": refused,
            "late": late,
            "failed": len(failures),
            "failures": failures[:5],
            "seconds": round(time.monotonic() - started, 1),
            "slowest": round(slowest, 3),
        }
    )
)
