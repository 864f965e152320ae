"""Requests keys at a steady rate until standard input ends; prints the results as JSON.

    load.py PORT RATE [until-refused|while-refused]
        RATE requests per second: three quarters on new connections, one quarter on keep-alive connections
        until-refused: a refused connection means that the service has stopped; it ends its client thread and is not a failure
        while-refused: a refused connection is not a failure, and its client thread continues

A request fails if its connection is refused or closed early, or if the response is not 32 bytes with status 200. A client
stops using a keep-alive connection when the server sends `Connection: close`. During a restart the daemon still reads requests
that arrive within 250 ms. If this client sent nothing on a connection for longer than LATE, and the connection is closed before
the response, the request counts as late and is retried (RFC 9112 9.3.1). More than one late request in a hundred is a failure,
if there are more than ten.
"""

import json
import socket
import sys
import threading
import time

PORT, RATE = int(sys.argv[1]), float(sys.argv[2])
UNTIL_REFUSED, WHILE_REFUSED = ([word] == sys.argv[3:] for word in ("until-refused", "while-refused"))
THREADS = 16
TIMEOUT = 60  # seconds; during a restart, clients wait in the socket's backlog
LATE = 0.2  # seconds
REQUEST = b"GET /key/32 HTTP/1.1\r\nHost: localhost\r\n%s\r\n"

stop = threading.Event()
lock = threading.Lock()
served, refused, late, failures, slowest = 0, 0, 0, [], 0.0


def read_response(connection):
    """Reads a response, and returns whether it announces that the connection closes."""
    answer = b""
    while b"\r\n\r\n" not in answer or len(answer) < answer.index(b"\r\n\r\n") + 4 + 32:
        chunk = connection.recv(4096)
        if not chunk:
            raise ConnectionError(f"closed after {len(answer)} bytes")
        answer += chunk
    headers = answer.split(b"\r\n\r\n")[0].lower()
    if not headers.startswith(b"http/1.1 200"):
        raise ConnectionError(headers.split(b"\r\n")[0].decode())
    return b"connection: close" in headers


def run_client(number):
    global served, refused, late, slowest
    closes = number % 4 != 0
    kept, idle_since = None, 0.0
    begin, due = time.monotonic(), number / RATE
    while not stop.wait(max(0.0, begin + due - time.monotonic())):
        due += THREADS / RATE
        since, sent = time.monotonic(), None
        try:
            connection = kept or socket.create_connection(("127.0.0.1", PORT), TIMEOUT)
            connection.sendall(REQUEST % (b"Connection: close\r\n" if closes else b""))
            sent = time.monotonic()
            is_last = read_response(connection) or closes
            kept, idle_since = None if is_last else connection, time.monotonic()
            if is_last:
                connection.close()
            with lock:
                served += 1
                slowest = max(slowest, idle_since - since)
        except OSError as error:
            was_idle = (sent or time.monotonic()) - (idle_since if kept else since) > LATE
            kept = None
            if was_idle and (str(error) == "closed after 0 bytes" or isinstance(error, BrokenPipeError | ConnectionResetError)):
                due -= THREADS / RATE
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
                failures.append(f"{'new' if closes else 'keep-alive'} connection: {error}")


threads = [threading.Thread(target=run_client, args=(n,)) for n in range(THREADS)]
started = time.monotonic()
for thread in threads:
    thread.start()
sys.stdin.read()
stop.set()
for thread in threads:
    thread.join()
if late * 100 > max(served, 1000):
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
