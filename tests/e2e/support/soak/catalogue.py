"""The requests that clients choose from, and what the responses must be."""

import base64
import dataclasses
import hashlib
import json
import math
import re

MAX_SIZE = 1 << 20  # bytes, of the daemons
LIMITED_SIZE = 64  # bytes, of the token `limited`
STREAMED_MIN = 16 * 1024 + 1  # bytes of the smallest response that needs a permit
COMPARED_MAX = 8  # keys of a response that are compared with all others; this bounds the memory of the harness
UNIQUE_MIN = 16  # bytes of the shortest key that must be unique: of n keys, two are equal with a probability of n²/2^129

ALPHABETS = {
    "alnum": "A-Za-z0-9",
    "ascii": "!-~",
    "digits": "0-9",
    "hex": "0-9a-f",
    "unambiguous": "A-HJ-NP-Za-km-z2-9",
}
MEDIA_TYPES = {
    "raw": "application/octet-stream",
    "hex": "text/plain",
    "base64": "text/plain",
    "base64url": "text/plain",
    "text": "text/plain",
    "json": "application/json",
    "jwk": "application/jwk+json",
}


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys or passwords of a response. `count` is None if the request had no count."""

    length: int
    format: str
    count: int | None = None
    alphabet: str | None = None

    @property
    def number(self):
        return self.count or 1

    @property
    def key_bytes(self):
        return self.length * self.number

    @property
    def body_length(self):
        """The length of the body, computed independently of the daemon."""
        length, base64url = self.length, math.ceil(self.length * 8 / 6)
        if self.alphabet:
            entropy = int(length * math.log2(len(expand(self.alphabet))) * 10) / 10
            around = len(f'{{"length":{length},"alphabet":"{self.alphabet}","entropy_bits":{entropy},"password":""}}')
            # A quotation mark or backslash is escaped; so that the length does not depend on the password, it is padded.
            one = {"text": length + 1, "json": around + length * (2 if self.alphabet == "ascii" else 1)}
        else:
            one = {
                "raw": length,
                "hex": 2 * length + 1,
                "base64": 4 * math.ceil(length / 3) + 1,
                "base64url": base64url + 1,
                "json": len(f'{{"length":{length},"encoding":"base64","key":""}}') + 4 * math.ceil(length / 3),
                "jwk": len('{"kty":"oct","kid":"","k":""}') + 22 + base64url,
            }
        around = 0
        if self.count is not None:
            around = {"json": 2, "jwk": len('{"keys":[]}')}.get(self.format, 0) + (self.count - 1) * (self.format in ("json", "jwk"))
        return one[self.format] * self.number + around

    @property
    def is_streamed(self):
        return self.body_length >= STREAMED_MIN

    def decode(self, body):
        """The keys in the body, as bytes. Raises a ValueError that names what is wrong."""
        if self.format == "raw":
            return [body]
        if self.format in ("json", "jwk"):
            document = json.loads(body)
            if self.count is not None:
                document = document["keys"] if self.format == "jwk" else document
            texts = [self.member(each) for each in (document if self.count is not None else [document])]
        else:
            text = body.decode("ascii")
            if not text.endswith("\n"):
                raise ValueError("expected a newline at the end")
            texts = text[:-1].split("\n")
        return [self.decode_one(text) for text in texts]

    def member(self, document):
        name = "password" if self.alphabet else "k" if self.format == "jwk" else "key"
        expected = {"alphabet": self.alphabet} if self.alphabet else {"kty": "oct"} if self.format == "jwk" else {"encoding": "base64"}
        if any(document[key] != value for key, value in expected.items()):
            raise ValueError(f"expected {expected}, found {document}")
        return document[name]

    def decode_one(self, text):
        if self.alphabet:
            if not re.fullmatch(f"[{ALPHABETS[self.alphabet]}]+", text):
                raise ValueError(f"a character is not of the alphabet {self.alphabet}")
            return text.encode()
        if self.format == "hex":
            if text != text.lower():
                raise ValueError("expected lower-case digits")
            return bytes.fromhex(text)
        if self.format in ("base64url", "jwk"):
            return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        return base64.b64decode(text, validate=True)


# What hostile clients request that leave before they could read the headers. No other client requests it with their token.
LEFT = Keys(17, "hex")


def expand(alphabet):
    return [character for character in map(chr, range(33, 127)) if re.match(f"[{ALPHABETS[alphabet]}]", character)]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A request, and the statuses that its response may have."""

    path: str
    endpoint: str
    statuses: frozenset
    method: str = "GET"
    keys: Keys | None = None
    headers: tuple = ()
    has_host: bool = True
    has_token: bool = True
    reason: str | None = None  # of http_rejections_total, if the status is not 200

    @property
    def is_head(self):
        return self.method == "HEAD"

    def bytes(self, authorization, headers=()):
        lines = [f"{self.method} {self.path} HTTP/1.1"]
        lines += ["Host: localhost"] if self.has_host else []
        lines += [f"Authorization: Bearer {authorization}"] if self.has_token and authorization else []
        return ("\r\n".join([*lines, *self.headers, *headers]) + "\r\n\r\n").encode()


def keys(random, size_max):
    """Keys or passwords of any kind, most of them short."""
    is_password = random.random() < 0.2
    count = random.choice([1, 2, 7, 40, 250]) if random.random() < 0.15 else None
    if is_password:
        longest = min(size_max, 1024)
        length = random.choice([8, 16, 24, random.randint(1, longest), longest])
        return Keys(min(length, longest, 65_536 // (count or 1)), random.choice(["text", "json"]), count, random.choice(list(ALPHABETS)))
    length = random.choice([16, 32, 32, 64, random.randint(1, 1024), random.randint(1, 16_000)])
    if random.random() < 0.06:
        length = random.randint(16_000, 300_000)
    length = min(length, size_max)
    formats = ["hex", "base64", "base64url", "json", "jwk"]
    if count is not None:
        return Keys(min(length, 65_536 // count), random.choice(formats), count)
    return Keys(length, random.choice(["raw", *formats]))


def key_request(random, wanted, rates, method="GET"):
    """The request for `wanted`. `rates` says whether the token may exceed its rate."""
    query = [] if wanted.count is None else [f"count={wanted.count}"]
    headers = ()
    if wanted.alphabet:
        query += [f"alphabet={wanted.alphabet}"] if wanted.alphabet != "alnum" or random.random() < 0.5 else []
        query += [f"format={wanted.format}"] if wanted.format != "text" or random.random() < 0.5 else []
    elif wanted.count is None and wanted.format in ("hex", "json", "jwk", "raw") and random.random() < 0.4:
        headers = (f"Accept: {MEDIA_TYPES[wanted.format]}",)
    elif wanted.format != "raw" or random.random() < 0.5:
        query += [f"format={wanted.format}"]
    kind = "password" if wanted.alphabet else "key"
    statuses = {200} | ({429} if rates else set()) | ({503} if wanted.is_streamed and method == "GET" else set())
    path = f"/{kind}/{wanted.length}" + (f"?{'&'.join(query)}" if query else "")
    return Wanted(path, f"/{kind}/{{length}}", frozenset(statuses), method, wanted, headers)


def error_request(random, size_max):
    """A request that gets an error."""
    key, password = "/key/{length}", "/password/{length}"
    choices = [
        ("/key/0", key, 400),
        ("/key/abc", key, 400),
        ("/key/016", key, 400),
        ("/key/32?format=morse", key, 400),
        ("/key/32?colour=red", key, 400),
        ("/key/8?count=2", key, 400),
        ("/password/16?alphabet=runes", password, 400),
        (f"/key/{size_max + 1}", key, 413),
        ("/key/99999999999999999999", key, 413),
        ("/password/1025", password, 413),
        ("/keys", "other", 404),
        ("/key/32/extra", "other", 404),
    ]
    kind = random.randrange(len(choices) + 5) - len(choices)
    if kind < 0:
        path, endpoint, status = choices[kind]
        return Wanted(path, endpoint, frozenset({status}))
    if kind == 0:
        method = random.choice(["POST", "DELETE", "PUT", "OPTIONS"])
        return Wanted("/key/32", key, frozenset({405}), method, headers=("Content-Length: 0",))
    if kind == 1:
        return Wanted("/key/32", key, frozenset({406}), headers=("Accept: image/png",))
    if kind == 2:
        return Wanted("/key/32", key, frozenset({401}), has_token=False, reason="unauthorized")
    if kind == 3:
        token = "ks_" + "A" * 43
        return Wanted(
            "/password/9", password, frozenset({401}), has_token=False, headers=(f"Authorization: Bearer {token}",), reason="unauthorized"
        )
    return Wanted("/key/32", key, frozenset({400}), has_host=False, reason="malformed")


def other_request(random):
    path = random.choice(["/health", "/livez", "/readyz", "/openapi.json", "/"])
    # A daemon that is shutting down is not ready.
    return Wanted(path, path, frozenset({200, 503} if path == "/readyz" else {200}))


def choose(random, size_max=MAX_SIZE, rates=False):
    """The next request of a well-behaved client."""
    kind = random.random()
    if kind < 0.75:
        return key_request(random, keys(random, size_max), rates)
    if kind < 0.80:
        return key_request(random, keys(random, size_max), rates, "HEAD")
    return error_request(random, size_max) if kind < 0.92 else other_request(random)


def fingerprints(found, alphabet):
    """128 bits for each key that must be unique. Of n, two are equal by chance with a probability of n²/2^129: 1e-27 for a million."""
    if alphabet:  # passwords of at least 128 bits
        found = [each for each in found if len(each) * math.log2(len(expand(alphabet))) >= 128]
    found = [each for each in found if len(each) >= UNIQUE_MIN][:COMPARED_MAX]
    return [int.from_bytes(hashlib.sha256(each).digest()[:16], "big") for each in found]
