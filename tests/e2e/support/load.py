"""Asks for keys at a steady rate until standard input ends; prints what came of it as JSON.

    load.py PORT RATE [until-refused|while-refused]
        RATE requests a second: three quarters on new connections, one quarter on kept ones
        until-refused: a refused connection says that the service has gone, ends its asker, and is no failure
        while-refused: nor is it here, and its asker goes on

A request fails if its connection is refused, is cut, or brings anything but 32 bytes with status 200. A kept connection
is given up when the server says so, as HTTP has it.
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
REQUEST = b"GET /key/32 HTTP/1.1\r\nHost: localhost\r\n%s\r\n"

stop = threading.Event()
lock = threading.Lock()
served, refused, failures, slowest = 0, 0, [], 0.0


def ask(connection, closes):
    connection.sendall(REQUEST % (b"Connection: close\r\n" if closes else b""))
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
    global served, refused, slowest
    closes = number % 4 != 0
    kept = None
    begin, turn = time.monotonic(), number / RATE
    while not stop.wait(max(0.0, begin + turn - time.monotonic())):
        turn += THREADS / RATE
        since = time.monotonic()
        try:
            connection = kept or socket.create_connection(("127.0.0.1", PORT), PATIENCE)
            kept = None if ask(connection, closes) or closes else connection
            if kept is None:
                connection.close()
            with lock:
                served += 1
                slowest = max(slowest, time.monotonic() - since)
        except OSError as error:
            kept = None
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
print(
    json.dumps(
        {
            "served": served,
            "refused": refused,
            "failed": len(failures),
            "failures": failures[:5],
            "seconds": round(time.monotonic() - started, 1),
            "slowest": round(slowest, 3),
        }
    )
)
