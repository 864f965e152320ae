"""Requests COUNT keys as fast as one connection allows, and fails if a key is not served.

burst.py PORT COUNT
"""

import socket
import sys

PORT, COUNT = map(int, sys.argv[1:])
PIPELINED = 500  # requests per write
TIMEOUT = 60  # seconds

with socket.create_connection(("127.0.0.1", PORT), TIMEOUT) as connection:
    for begin in range(0, COUNT, PIPELINED):
        count = min(PIPELINED, COUNT - begin)
        connection.sendall(b"GET /key/16?format=hex HTTP/1.1\r\nHost: localhost\r\n\r\n" * count)
        answers = b""
        while answers.count(b"\r\n\r\n") < count or not answers.endswith(b"\n") or answers.endswith(b"\r\n\r\n"):
            chunk = connection.recv(1 << 20)
            if not chunk:
                sys.exit(f"the connection was closed while requests {begin} to {begin + count - 1} were in flight")
            answers += chunk
        served = answers.count(b"HTTP/1.1 200 ")
        if served != count:
            sys.exit(f"only {served} of {count} requests were served: {answers[:200]}")
