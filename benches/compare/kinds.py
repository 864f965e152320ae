"""The kinds of requests that are measured. `--costs`, the rows of instructions and the gate use this one table."""

from dataclasses import dataclass, field

CONNECTIONS = 64  # under load
COUNTED_CONNECTIONS = 8  # while instructions are counted

# What curl sends after Host.
CURL = ("User-Agent: curl/7.88.1", "Accept: */*")
# What Firefox sends after Host when a user opens the address, and what ingress-nginx adds: 14 headers more than curl sends.
BROWSER = (
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    "Accept-Language: en-US,en;q=0.5",
    "Accept-Encoding: gzip, deflate, br, zstd",
    "Upgrade-Insecure-Requests: 1",
    "Sec-Fetch-Dest: document",
    "Sec-Fetch-Mode: navigate",
    "Sec-Fetch-Site: none",
    "X-Request-ID: 7f6b3c0d9e2a45f18b6c0d3e5a7f9b21",
    "X-Real-IP: 203.0.113.7",
    "X-Forwarded-For: 203.0.113.7",
    "X-Forwarded-Host: keys.example.org",
    "X-Forwarded-Port: 443",
    "X-Forwarded-Proto: https",
    "X-Forwarded-Scheme: https",
    "X-Scheme: https",
)
FORWARDED = (*CURL, "X-Forwarded-For: 203.0.113.7")
TOKEN = (*CURL, "Authorization: Bearer {token}")

MAX_SIZE = {"KEYSERVICE_MAX_SIZE": str(1 << 20)}
RATES = {"KEYSERVICE_RATE_REQUESTS": "1000000", "KEYSERVICE_RATE_BYTES": "1000000000"}
PROXY = {"KEYSERVICE_TRUSTED_PROXIES": "127.0.0.0/8"}
AUDIT = {"KEYSERVICE_AUDIT": "true"}
# A client that gets 1,024 bytes has used the bytes of 1,024 seconds.
EXHAUSTED = {"KEYSERVICE_RATE_BYTES": "1", "KEYSERVICE_RATE_BURST": "1s"}


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of request, the settings of the daemon for it, and the expected response."""

    name: str
    what: str
    path: str = "/key/32"
    length: int | None = None  # of the body; None if it varies
    bar: float | None = None  # the most instructions of a request, relative to nginx; only `--costs` measures a kind without a bar
    status: int = 200
    headers: tuple = CURL
    settings: dict = field(default_factory=dict)
    before: str = ""  # the path of a request that is sent once, before all others
    tls: str = ""  # a key of CERTIFICATE_KEYS; empty for plain HTTP
    journal: bool = False  # whether the daemon logs to a journal, instead of to stderr
    closes: bool = False  # whether each connection is closed after one response
    requests: int = 5000  # in the measurement of CPU time
    connections: int = CONNECTIONS  # in the measurement of CPU time
    counted: int = 2000  # under callgrind

    @property
    def request(self):
        lines = [f"GET {self.path} HTTP/1.1", "Host: localhost:1123", *self.headers, *["Connection: close"] * self.closes]
        return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


LARGE = {"settings": MAX_SIZE, "requests": 400, "counted": 40, "connections": 16}  # one client gets at most 16 permits for streamed keys
TLS, HANDSHAKE = {"tls": "P-256"}, {"closes": True, "requests": 1000, "counted": 200}

# All kinds are compared with the first one, and clients send it by default, to any server.
RAW = Kind("raw", "32 bytes", length=32, bar=0.41)
KINDS = [
    RAW,
    Kind("hex", "32 bytes, hex", "/key/32?format=hex", length=65, bar=0.60),
    Kind("json", "32 bytes, JSON", "/key/32?format=json", length=86, bar=0.60),
    Kind("jwk", "32 bytes, JWK", "/key/32?format=jwk", length=94, bar=0.75),
    Kind("password", "password of 24 characters", "/password/24", length=25, bar=0.70),
    Kind("health", "health", "/health", length=2, bar=0.50),
    Kind("token", "32 bytes, with a token", headers=TOKEN, length=32, bar=0.75),
    Kind("forwarded", "32 bytes, X-Forwarded-For without a trusted proxy", headers=FORWARDED, length=32, bar=0.50),
    Kind("rates", "32 bytes, with rates", settings=RATES, length=32, bar=0.90),
    Kind("proxy", "32 bytes, from a trusted proxy, with rates", headers=FORWARDED, settings={**PROXY, **RATES}, length=32, bar=0.90),
    Kind("audit", "32 bytes, with audit records", settings=AUDIT, length=32, bar=1.8),
    Kind("journal", "32 bytes, with audit records in the journal", settings=AUDIT, journal=True, length=32, bar=1.8),
    Kind("browser", "32 bytes, a browser through an ingress", headers=BROWSER, length=32, bar=1.0),
    Kind("404", "404, unknown path", "/nope", status=404, length=60, bar=1.0),
    Kind("400", "400, invalid length", "/key/abc", status=400, length=134, bar=1.0),
    Kind("413", "413, key too large", "/key/1025", status=413, length=100, bar=1.0),
    Kind("429", "429, over the rate", settings=EXHAUSTED, before="/key/1024", status=429, length=94, bar=1.0),
    Kind("16", "16 bytes", "/key/16", length=16),
    Kind("256", "256 bytes", "/key/256", length=256),
    Kind("1k", "1 KiB", "/key/1024", length=1024),
    Kind("16k", "16 KiB", "/key/16384", length=16384, settings=MAX_SIZE),
    Kind("64k", "64 KiB, streamed", "/key/65536", length=1 << 16, **LARGE),
    Kind("1m", "1 MiB, streamed", "/key/1048576", length=1 << 20, **LARGE),
    Kind("base64", "32 bytes, base64", "/key/32?format=base64", length=45),
    Kind("hex-100", "100 keys of 32 bytes, hex", "/key/32?format=hex&count=100", length=6500),
    Kind("hex-1m", "1 MiB, hex, streamed", "/key/1048576?format=hex", length=(1 << 21) + 1, **LARGE),
    Kind("tls", "32 bytes over TLS", length=32, **TLS),
    Kind("tls-1m", "1 MiB over TLS, streamed", "/key/1048576", length=1 << 20, **TLS, **LARGE),
    Kind("new", "32 bytes, new connection", length=32, **HANDSHAKE),
    Kind("tls-p256", "32 bytes, TLS handshake, P-256", length=32, **TLS, **HANDSHAKE),
    Kind("tls-rsa", "32 bytes, TLS handshake, RSA-2048", length=32, tls="RSA-2048", **HANDSHAKE),
]
BARRED = [kind for kind in KINDS if kind.bar]
