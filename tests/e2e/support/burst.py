"""Asks for keys as fast as one connection takes them, and fails if one is not served.

burst.py PORT COUNT
"""

import socket
import sys

PORT, COUNT = map(int, sys.argv[1:])
PIPELINED = 500  # requests of one write
PATIENCE = 60  # seconds

with socket.create_connection(("127.0.0.1", PORT), PATIENCE) as connection:
    for begin in range(0, COUNT, PIPELINED):
        count = min(PIPELINED, COUNT - begin)
        connection.sendall(b"GET /key/16?format=hex HTTP/1.1\r\nHost: localhost\r\n\r\n" * count)
        answers = b""
        while answers.count(b"\r\n\r\n") < count or not answers.endswith(b"\n") or answers.endswith(b"\r\n\r\n"):
            piece = connection.recv(1 << 20)
            if not piece:
                sys.exit(f"the connection was closed within the requests from {begin} on")
            answers += piece
        served = answers.count(b"HTTP/1.1 200 ")
        if served != count:
            sys.exit(f"{served} of {count} requests were served: {answers[:200]}")
