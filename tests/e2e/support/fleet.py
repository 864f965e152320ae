"""Runs many clients in one process, each with a source address in 127.0.0.0/8, and prints the results as JSON.

    fleet.py silent|stalled|quiet|half|drip|deaf PORT COUNT NET plain|tls [again]
        Opens COUNT connections that do nothing useful, and measures how long the server keeps them:
          silent   sends nothing
          stalled  sends the first 4 bytes of a TLS handshake
          quiet    completes its TLS handshake and sends nothing after it
          half     sends half of the request headers
          drip     sends one byte of its request every 5 seconds
          deaf     requests a streamed key and never reads it
        Prints `connected` once all have done so, and ends when the server has closed the last one. `unfinished` counts the
        connections that the server closed earlier than that; each is replaced. With `again`, each closed connection is opened
        again, until standard input ends.
    fleet.py hoard PORT COUNT NET plain|tls FIRST
        Opens COUNT connections that pipeline as many requests as their sockets accept and never read: raw keys, batches in hex,
        JSON and JWK format, and streamed keys. FIRST is the number of the first connection; the number determines the address.
        Prints `connected` once all have sent their requests, and ends when standard input ends.
    fleet.py steady PORT 1 NET plain|tls PAUSE
        Runs one client that requests keys on a keep-alive connection, each PAUSE seconds after the last response. Prints
        `connected` after the first response, and ends when standard input ends.
    fleet.py ask PORT COUNT NET plain|tls PATH PAUSE new|kept
        Runs COUNT clients that request PATH, on new connections or on one keep-alive connection each, PAUSE seconds after the
        last response. Prints `connected` after COUNT responses, and ends when standard input ends. `soonest_failure` is the
        shortest time after which a request failed.

NET is the second octet of the clients' addresses. 200 connections share an address, or 250 with `hoard`.
"""

import errno
import heapq
import json
import re
import select
import socket
import ssl
import sys
import time

KIND, PORT, COUNT, NET, OVER = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
SHARING = 250 if KIND == "hoard" else 200
# Connections that may be in progress at once. The listener's backlog is 4,096, and no SYN may be lost there. With more than 128
# TLS handshakes at once, the daemon allows each of them one second, which can be too short on a busy machine.
CONNECTING_MAX = 256 if OVER == "plain" else 32
TIMEOUT = 60  # seconds
STREAMED = 256 << 20  # bytes of a streamed key
TLS = None
if OVER == "tls" and KIND not in ("silent", "stalled"):
    TLS = ssl.create_default_context()
    # The certificate's name is not under test.
    TLS.check_hostname, TLS.verify_mode = False, ssl.CERT_NONE


def connect(number):
    """Starts a connection from the address of client `number`; it may not be established yet."""
    client = socket.socket()
    client.setblocking(False)
    client.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT: connect(2) chooses the port, out of a larger range
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as curl and browsers do
    if KIND == "deaf" or KIND == "hoard" and number % 2:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    address = number // SHARING
    client.bind((f"127.{NET}.{address // 250}.{address % 250 + 1}", 0))
    if (code := client.connect_ex(("127.0.0.1", PORT))) not in (0, errno.EINPROGRESS):
        raise OSError(code, f"connection {number}")
    return client


def with_tls(client):
    return TLS.wrap_socket(client, do_handshake_on_connect=False) if TLS else client


def handshake_done(client):
    """Continues the TLS handshake, if there is one, and returns whether it is complete."""
    try:
        if TLS:
            client.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def report(line):
    print(line, flush=True)


def hold():
    """Holds connections open until the server closes them. The fleet fails if it does not."""
    opening = {
        "silent": b"",
        "stalled": b"\x16\x03\x01\x02",
        "quiet": b"",
        "half": b"GET /key/32 HTTP/1.1\r\nHost: loc",
        "drip": b"G",
        "deaf": b"GET /key/%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % STREAMED,
    }[KIND]
    dripping = b"ET /key/32 HTTP/1.1"
    poll, clients, handshaking, since, lifetimes, drips = select.epoll(), {}, set(), {}, [], []
    closed = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
    made = connected = unfinished = 0
    reconnects = sys.argv[6:] == ["again"]
    limit = time.monotonic() + TIMEOUT
    while len(lifetimes) < COUNT or reconnects:
        if reconnects and select.select([sys.stdin], [], [], 0)[0]:
            break
        while made < COUNT + reconnects * len(lifetimes) and made - connected < CONNECTING_MAX:
            client = connect(made % COUNT)
            clients[client.fileno()] = client
            poll.register(client, select.EPOLLOUT | closed)
            made += 1
        now = time.monotonic()
        if now > limit:
            sys.exit(f"{COUNT - len(lifetimes)} of {COUNT} connections were not closed within {TIMEOUT} s")
        while drips and drips[0][0] <= now:
            _, number, at = heapq.heappop(drips)
            if number in clients and at < len(dripping):
                try:
                    clients[number].send(dripping[at : at + 1])
                    heapq.heappush(drips, (now + 5, number, at + 1))
                except OSError:
                    pass  # the server has closed it; the poll reports that, too
        for number, event in poll.poll(0.1):
            client = clients[number]
            if number in since:  # after `connected`, only the server's close is awaited
                lifetimes.append(time.monotonic() - since.pop(number))  # the next connection may reuse the number
                poll.unregister(client)
                clients.pop(number).close()
                continue
            if event & select.EPOLLERR and client not in handshaking:
                sys.exit(f"a connection was refused: {client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)}")
            try:
                if client not in handshaking:
                    client = clients[number] = with_tls(client)
                    handshaking.add(client)
                    poll.modify(client, select.EPOLLIN | closed)
                if not handshake_done(client):
                    continue
                if opening:
                    client.send(opening)
            except OSError:  # another connection replaces it
                unfinished, made = unfinished + 1, made - 1
                handshaking.discard(clients.pop(number))
                client.close()  # this removes it from the poll, too
                continue
            poll.modify(client, closed)
            handshaking.discard(client)
            since[number] = time.monotonic()
            connected += 1
            if KIND == "drip":
                heapq.heappush(drips, (since[number] + 5, number, 0))
            if connected == COUNT:
                report("connected")
    earliest, latest = min(lifetimes, default=None), max(lifetimes, default=None)
    report(json.dumps({"closed": len(lifetimes), "unfinished": unfinished, "earliest": earliest, "latest": latest}))


# What hoarders request: each pipelines one of these paths.
HOARDED = [
    b"/key/1024",
    b"/key/1024?count=64&format=hex",
    b"/key/32?count=1024&format=jwk",
    b"/key/%d" % STREAMED,
    b"/key/4000?format=base64",
    b"/key/64?count=1000&format=json",
]


class Hoarder:
    """A client that sends requests and never reads."""

    def __init__(self, number):
        self.client = with_tls(connect(number))
        path = HOARDED[number % len(HOARDED)]
        self.requests = memoryview(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path * 400)
        self.is_handshaking, self.is_done = bool(TLS), False

    def advance(self):
        """Returns true once the socket accepts no more bytes, or the connection is closed."""
        try:
            if self.is_handshaking:
                self.client.do_handshake()
                self.is_handshaking = False
            while self.requests:
                self.requests = self.requests[self.client.send(self.requests) :]
        except ssl.SSLWantReadError:
            return False
        except (ssl.SSLWantWriteError, BlockingIOError):
            return not self.is_handshaking
        except OSError:
            return True
        return True


def steady():
    pause = float(sys.argv[6])
    client = socket.create_connection(("127.0.0.1", PORT), TIMEOUT, (f"127.{NET}.0.1", 0))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if TLS:
        client = TLS.wrap_socket(client)
    times, failure = [], None
    while not failure and not select.select([sys.stdin], [], [], pause)[0]:
        begin, response = time.monotonic(), b""
        client.sendall(b"GET /key/32 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while len(response.partition(b"\r\n\r\n")[2]) < 32:
            if not (chunk := client.recv(65536)):
                failure = f"closed after {len(response)} bytes"
                break
            response += chunk
        if not response.startswith(b"HTTP/1.1 200 "):
            failure = failure or f"{response[:100]!r}"
        times.append(time.monotonic() - begin)
        if len(times) == 1:
            report("connected")
    times.sort()
    report(json.dumps({"failure": failure, "count": len(times), "p99": times[len(times) * 99 // 100], "longest": times[-1]}))


def hoard():
    first = int(sys.argv[6])
    poll, hoarders, made, done = select.epoll(), {}, 0, 0
    limit = time.monotonic() + 4 * TIMEOUT
    while done < COUNT:
        if time.monotonic() > limit:
            sys.exit(f"only {done} of {COUNT} connections have sent their requests")
        while made < COUNT and made - done < CONNECTING_MAX:
            hoarder = Hoarder(first + made)
            hoarders[hoarder.client.fileno()] = hoarder
            poll.register(hoarder.client, select.EPOLLOUT | select.EPOLLIN | select.EPOLLET)
            made += 1
        for number, _ in poll.poll(0.1):
            hoarder = hoarders[number]
            if not hoarder.is_done and hoarder.advance():
                hoarder.is_done, done = True, done + 1
    report("connected")
    sys.stdin.read()
    report(json.dumps({"done": done}))


class Requester:
    """One client: its connection, the part of a response that it has read, and the time of its request."""

    def __init__(self, number):
        self.number, self.client, self.is_handshaking, self.response, self.since = number, None, False, b"", 0.0


def quantile(times, fraction):
    return times[min(len(times) - 1, int(len(times) * fraction))] if times else None


def ask():
    path, pause, is_kept = sys.argv[6], float(sys.argv[7]), sys.argv[8] == "kept"
    closing = b"" if is_kept else b"Connection: close\r\n"
    request = b"GET %s HTTP/1.1\r\nHost: localhost\r\n%s\r\n" % (path.encode(), closing)
    poll, requesters = select.epoll(), {}
    begin = time.monotonic()
    # The first requests are spread over one pause instead of being sent all at once.
    schedule = [(begin + pause * number / COUNT, number, Requester(number)) for number in range(COUNT)]
    heapq.heapify(schedule)
    statuses, times, failures, without_retry, reported = {}, [], [], 0, False
    poll.register(sys.stdin, select.EPOLLIN | select.EPOLLHUP)

    def finish(requester, failure=None):
        nonlocal reported
        if failure:
            failures.append((time.monotonic() - requester.since, failure))
        else:
            times.append(time.monotonic() - requester.since)
        if failure or not is_kept or b"\r\nconnection: close" in requester.response.lower():
            requesters.pop(requester.client.fileno(), None)
            requester.client.close()
            requester.client = None
        requester.response = b""
        heapq.heappush(schedule, (time.monotonic() + pause, requester.number, requester))
        if not reported and len(times) + len(failures) >= COUNT:
            reported = True
            report("connected")

    while True:
        now = time.monotonic()
        while schedule and schedule[0][0] <= now:
            _, number, requester = heapq.heappop(schedule)
            requester.since = time.monotonic()
            if requester.client:
                requester.client.send(request)
            else:
                requester.client = connect(number)
                requesters[requester.client.fileno()] = requester
                poll.register(requester.client, select.EPOLLOUT)
        wait = max(0.0, schedule[0][0] - time.monotonic()) if schedule else 1.0
        for number, event in poll.poll(min(wait, 1.0)):
            if number == sys.stdin.fileno():
                times.sort()
                report(
                    json.dumps(
                        {
                            "statuses": statuses,
                            "failures": failures[:5],
                            "failed": len(failures),
                            "soonest_failure": min(failures, default=(None,))[0],
                            "without_retry": without_retry,
                            "median": quantile(times, 0.5),
                            "p99": quantile(times, 0.99),
                            "longest": quantile(times, 1),
                        }
                    )
                )
                return
            requester = requesters.get(number)
            if requester is None:
                continue
            try:
                if event & select.EPOLLOUT:
                    requester.client, requester.is_handshaking = with_tls(requester.client), True
                    poll.modify(requester.client, select.EPOLLIN)
                if requester.is_handshaking:
                    if handshake_done(requester.client):
                        requester.is_handshaking = False
                        requester.client.send(request)
                    continue
                chunk = requester.client.recv(65536)
                if not chunk:
                    finish(requester, f"closed after {len(requester.response)} bytes")
                    continue
                requester.response += chunk
            except ssl.SSLWantReadError:
                continue
            except OSError as error:
                finish(requester, str(error))
                continue
            headers, found, body = requester.response.partition(b"\r\n\r\n")
            length = re.search(rb"\r\ncontent-length: (\d+)", headers, re.I)
            if found and length and len(body) >= int(length[1]):
                status = headers[9:12].decode()
                statuses[status] = statuses.get(status, 0) + 1
                without_retry += status == "503" and b"\r\nretry-after: " not in headers.lower()
                finish(requester)


{"ask": ask, "hoard": hoard, "steady": steady}.get(KIND, hold)()
