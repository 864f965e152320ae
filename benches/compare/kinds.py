"""The kinds of requests that are measured."""

from typing import NamedTuple

CONNECTIONS = 64  # under load
MAX_SIZE = {"KEYSERVICE_MAX_SIZE": str(1 << 20)}


class Kind(NamedTuple):
    """A kind of request, the settings of the daemon for it, and the expected response."""

    what: str
    path: str = "/key/32"
    settings: dict = MAX_SIZE
    tls: str = ""  # a key of CERTIFICATE_KEYS; empty for plain HTTP
    closes: bool = False  # whether each connection is closed after one response
    headers: tuple = ()
    length: int | None = None  # of the response; None if it varies
    requests: int = 5000  # in the measurement of CPU time
    counted: int = 5000  # under callgrind, in the longer of two runs; the shorter has a tenth
    connections: int = CONNECTIONS

    @property
    def request(self):
        """What curl sends for this path, and these headers."""
        more = [*self.headers, *["Connection: close"] * self.closes]
        lines = "".join(f"{line}\r\n" for line in more)
        return f"GET {self.path} HTTP/1.1\r\nHost: localhost:1123\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n{lines}\r\n".encode()


# What a client requests by default, from any server.
RAW = Kind("32 bytes", settings={}, length=32)

# What `--costs` measures. All kinds are compared with the first one.
TOKEN = "Authorization: Bearer {token}"
RATES = {**MAX_SIZE, "KEYSERVICE_RATE_REQUESTS": "1000000", "KEYSERVICE_RATE_BYTES": "1000000000"}
LARGE = {"requests": 400, "counted": 40, "connections": 16}  # one client gets at most 16 permits for streamed keys
TLS, HANDSHAKE = {"tls": "P-256"}, {"closes": True, "requests": 1000, "counted": 200}
COSTS = [
    Kind("32 bytes"),
    Kind("16 bytes", "/key/16"),
    Kind("256 bytes", "/key/256"),
    Kind("1 KiB", "/key/1024"),
    Kind("16 KiB", "/key/16384"),
    Kind("64 KiB, streamed", "/key/65536", **LARGE),
    Kind("1 MiB, streamed", "/key/1048576", **LARGE),
    Kind("32 bytes, hex", "/key/32?format=hex"),
    Kind("32 bytes, base64", "/key/32?format=base64"),
    Kind("32 bytes, JSON", "/key/32?format=json"),
    Kind("32 bytes, JWK", "/key/32?format=jwk"),
    Kind("100 keys of 32 bytes, hex", "/key/32?format=hex&count=100"),
    Kind("1 MiB, hex, streamed", "/key/1048576?format=hex", **LARGE),
    Kind("password of 24 characters", "/password/24"),
    Kind("health", "/health"),
    Kind("32 bytes, with rates", settings=RATES),
    Kind("32 bytes, with a token", headers=(TOKEN,)),
    Kind("32 bytes, with audit records", settings={**MAX_SIZE, "KEYSERVICE_AUDIT": "true"}),
    Kind("32 bytes over TLS", **TLS),
    Kind("1 MiB over TLS, streamed", "/key/1048576", **TLS, **LARGE),
    Kind("32 bytes, new connection", **HANDSHAKE),
    Kind("32 bytes, TLS handshake, P-256", **TLS, **HANDSHAKE),
    Kind("32 bytes, TLS handshake, RSA-2048", tls="RSA-2048", **HANDSHAKE),
]
