"""Responses of a daemon, read as strictly as HTTP lets them be."""

import re

MIB = 1 << 20


class Answers:
    """Reads answers off a connection."""

    def __init__(self, client):
        self.client, self.buffer = client, b""

    def more(self):
        """False where the connection is at its end, in order or not."""
        try:
            piece = self.client.recv(MIB)
        except ConnectionError:
            return False
        self.buffer += piece
        return bool(piece)

    def next(self, has_body=True):
        """The next answer; None where the connection ends before its first byte."""
        while b"\r\n\r\n" not in self.buffer:
            if not self.more():
                assert not self.buffer, f"an answer is cut in its head: {self.buffer[:200]!r}"
                return None
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.[01] (\d{3})( .*)?", lines[0])
        assert match, f"no status line: {lines[0]!r}"
        fields = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            assert name.lower() not in fields, f"{name} comes twice"
            fields[name.lower()] = value.strip()
        assert "transfer-encoding" not in fields and "content-length" in fields, f"an answer without a length: {fields}"
        length = int(fields["content-length"]) if has_body else 0
        while len(self.buffer) < length:
            if not self.more():
                break
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return int(match[1]), fields, body
