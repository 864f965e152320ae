"""A simple key server in Python: http.server and os.urandom, with one thread per connection.

It listens on the socket that it inherits as descriptor 3.
"""

import os
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one write: with two, the second would wait 40 ms (Nagle's algorithm and delayed ACK)

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
