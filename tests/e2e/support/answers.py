"""A strict reader of HTTP/1.1 responses."""

import re

MIB = 1 << 20


class Answers:
    """Reads the responses of a connection one after the other."""

    def __init__(self, client):
        self.client, self.buffer = client, b""

    def more(self):
        """Receives more bytes. Returns False if the connection is closed or reset."""
        try:
            chunk = self.client.recv(MIB)
        except ConnectionError:
            return False
        self.buffer += chunk
        return bool(chunk)

    def next(self, has_body=True):
        """Status, headers and body of the next response; None if the connection ends before its first byte."""
        while b"\r\n\r\n" not in self.buffer:
            if not self.more():
                assert not self.buffer, f"the connection ended within the response headers: {self.buffer[:200]!r}"
                return None
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.[01] (\d{3})( .*)?", lines[0])
        assert match, f"expected a status line, found {lines[0]!r}"
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            assert name.lower() not in headers, f"repeated header: {name}"
            headers[name.lower()] = value.strip()
        assert "transfer-encoding" not in headers and "content-length" in headers, (
            f"expected a Content-Length and no Transfer-Encoding, found {headers}"
        )
        length = int(headers["content-length"]) if has_body else 0
        while len(self.buffer) < length:
            if not self.more():
                break
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return int(match[1]), headers, body
