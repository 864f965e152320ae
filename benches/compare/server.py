"""A key server as one would first write it in Python: http.server and os.urandom, a thread a connection.

Listens on the socket it inherits as descriptor 3.
"""

import os
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one write: two would wait 40 ms for each other (Nagle and the delayed ACK)

    def do_GET(self):
        key = os.urandom(int(self.path.removeprefix("/key/")))
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(key)))
        self.end_headers()
        self.wfile.write(key)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
server.socket.close()
server.socket = socket.socket(fileno=3)
server.serve_forever()
