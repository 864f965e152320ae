"""Many clients in one process, from addresses of their own in 127.0.0.0/8; prints what became of them as JSON.

    fleet.py silent|stalled|quiet|half|drip|deaf PORT COUNT NET plain|tls [again]
        COUNT connections that say nothing, a quarter of a ClientHello, nothing after their handshake, half a head, a byte every
        5 seconds, or ask for a long key and never read it; prints `connected` once all are, and ends when the server has cut the
        last one; `unfinished` more were cut before they had done as much. With `again`, one that was cut comes again, until standard
        input ends
    fleet.py hoard PORT COUNT NET plain|tls FIRST
        COUNT connections that ask for as much as their sockets take and never read, 250 an address from number FIRST on:
        raw keys, batches as hexadecimal digits and as JSON Web Keys, and long keys; prints `connected` once all have asked,
        and ends when standard input does
    fleet.py steady PORT 1 NET plain|tls PAUSE
        one client that asks for a key again and again on a kept connection, PAUSE seconds after the last one; prints
        `connected` after the first, and ends when standard input does
    fleet.py ask PORT COUNT NET plain|tls PATH PAUSE new|kept
        COUNT clients that ask for PATH, each on new connections or on a kept one, PAUSE seconds after its last answer;
        prints `connected` after COUNT answers, and ends when standard input does

NET is the second number of their addresses; 200 share an address.
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
# On their way at once. The kernel's queue of a listener has 4,096 places: no SYN of ours is to be lost there. With more than
# 128 handshakes at once, each has a second, which a busy machine may not have.
CONNECTING_MAX = 256 if OVER == "plain" else 32
PATIENCE = 60
LONG = 256 << 20
TLS = None
if OVER == "tls" and KIND not in ("silent", "stalled"):
    TLS = ssl.create_default_context()
    # The name of the certificate is not what is tested.
    TLS.check_hostname, TLS.verify_mode = False, ssl.CERT_NONE


def connection(number):
    """A connection on its way, from the address that `number` has."""
    client = socket.socket()
    client.setblocking(False)
    client.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT: connect(2) chooses, among more
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as curl and browsers do
    if KIND == "deaf" or KIND == "hoard" and number % 2:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    share = number // SHARING
    client.bind((f"127.{NET}.{share // 250}.{share % 250 + 1}", 0))
    if (code := client.connect_ex(("127.0.0.1", PORT))) not in (0, errno.EINPROGRESS):
        raise OSError(code, f"connection {number}")
    return client


def encrypted(client):
    return TLS.wrap_socket(client, do_handshake_on_connect=False) if TLS else client


def has_shaken(client):
    """Goes on with a handshake, where there is one. Whether it is done."""
    try:
        if TLS:
            client.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def say(what):
    print(what, flush=True)


def hold():
    """The kinds that are only there. Their end is the server's doing, or the fleet fails."""
    opening = {
        "silent": b"",
        "stalled": b"\x16\x03\x01\x02",
        "quiet": b"",
        "half": b"GET /key/32 HTTP/1.1\r\nHost: loc",
        "drip": b"G",
        "deaf": b"GET /key/%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % LONG,
    }[KIND]
    dripping = b"ET /key/32 HTTP/1.1"
    poll, clients, shaking, since, lives, drips = select.epoll(), {}, set(), {}, [], []
    end = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
    made = connected = unfinished = 0
    comes_again = sys.argv[6:] == ["again"]
    limit = time.monotonic() + PATIENCE
    while len(lives) < COUNT or comes_again:
        if comes_again and select.select([sys.stdin], [], [], 0)[0]:
            break
        while made < COUNT + comes_again * len(lives) and made - connected < CONNECTING_MAX:
            client = connection(made % COUNT)
            clients[client.fileno()] = client
            poll.register(client, select.EPOLLOUT | end)
            made += 1
        now = time.monotonic()
        if now > limit:
            sys.exit(f"{COUNT - len(lives)} of {COUNT} connections were not cut within {PATIENCE} s")
        while drips and drips[0][0] <= now:
            _, number, at = heapq.heappop(drips)
            if number in clients and at < len(dripping):
                try:
                    clients[number].send(dripping[at : at + 1])
                    heapq.heappush(drips, (now + 5, number, at + 1))
                except OSError:
                    pass  # it has been cut, and the poll says so too
        for number, event in poll.poll(0.1):
            client = clients[number]
            if number in since:  # only its end is waited for
                lives.append(time.monotonic() - since.pop(number))  # the number may be the next connection's
                poll.unregister(client)
                clients.pop(number).close()
                continue
            if event & select.EPOLLERR and client not in shaking:
                sys.exit(f"a connection was refused: {client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)}")
            try:
                if client not in shaking:
                    client = clients[number] = encrypted(client)
                    shaking.add(client)
                    poll.modify(client, select.EPOLLIN | end)
                if not has_shaken(client):
                    continue
                if opening:
                    client.send(opening)
            except OSError:  # another one comes in its place
                unfinished, made = unfinished + 1, made - 1
                shaking.discard(clients.pop(number))
                client.close()  # which takes it from the poll, too
                continue
            poll.modify(client, end)
            shaking.discard(client)
            since[number] = time.monotonic()
            connected += 1
            if KIND == "drip":
                heapq.heappush(drips, (since[number] + 5, number, 0))
            if connected == COUNT:
                say("connected")
    say(json.dumps({"cut": len(lives), "unfinished": unfinished, "soonest": min(lives, default=None), "latest": max(lives, default=None)}))


# Each as often as fits a pipeline.
HOARDED = [
    b"/key/1024",
    b"/key/1024?count=64&format=hex",
    b"/key/32?count=1024&format=jwk",
    b"/key/%d" % LONG,
    b"/key/4000?format=base64",
    b"/key/64?count=1000&format=json",
]


class Hoarder:
    """A client that asks and never reads."""

    def __init__(self, number):
        self.client = encrypted(connection(number))
        path = HOARDED[number % len(HOARDED)]
        self.requests = memoryview(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path * 400)
        self.is_shaking, self.has_asked = bool(TLS), False

    def go_on(self):
        """True once the socket takes no more, or the connection is gone."""
        try:
            if self.is_shaking:
                self.client.do_handshake()
                self.is_shaking = False
            while self.requests:
                self.requests = self.requests[self.client.send(self.requests) :]
        except ssl.SSLWantReadError:
            return False
        except (ssl.SSLWantWriteError, BlockingIOError):
            return not self.is_shaking
        except OSError:
            return True
        return True


def steady():
    pause = float(sys.argv[6])
    client = socket.create_connection(("127.0.0.1", PORT), PATIENCE, (f"127.{NET}.0.1", 0))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if TLS:
        client = TLS.wrap_socket(client)
    times, failure = [], None
    while not failure and not select.select([sys.stdin], [], [], pause)[0]:
        begin, answer = time.monotonic(), b""
        client.sendall(b"GET /key/32 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while len(answer.partition(b"\r\n\r\n")[2]) < 32:
            if not (piece := client.recv(65536)):
                failure = f"closed after {len(answer)} bytes"
                break
            answer += piece
        if not answer.startswith(b"HTTP/1.1 200 "):
            failure = failure or f"{answer[:100]!r}"
        times.append(time.monotonic() - begin)
        if len(times) == 1:
            say("connected")
    times.sort()
    say(json.dumps({"failure": failure, "count": len(times), "p99": times[len(times) * 99 // 100], "longest": times[-1]}))


def hoard():
    first = int(sys.argv[6])
    poll, hoarders, made, asked = select.epoll(), {}, 0, 0
    limit = time.monotonic() + 4 * PATIENCE
    while asked < COUNT:
        if time.monotonic() > limit:
            sys.exit(f"{asked} of {COUNT} have asked")
        while made < COUNT and made - asked < CONNECTING_MAX:
            hoarder = Hoarder(first + made)
            hoarders[hoarder.client.fileno()] = hoarder
            poll.register(hoarder.client, select.EPOLLOUT | select.EPOLLIN | select.EPOLLET)
            made += 1
        for number, _ in poll.poll(0.1):
            hoarder = hoarders[number]
            if not hoarder.has_asked and hoarder.go_on():
                hoarder.has_asked, asked = True, asked + 1
    say("connected")
    sys.stdin.read()
    say(json.dumps({"asked": asked}))


class Asker:
    """One client: its connection, what it has read, and when it began."""

    def __init__(self, number):
        self.number, self.client, self.is_shaking, self.answer, self.since = number, None, False, b"", 0.0


def share_of(times, share):
    return times[min(len(times) - 1, int(len(times) * share))] if times else None


def ask():
    path, pause, is_kept = sys.argv[6], float(sys.argv[7]), sys.argv[8] == "kept"
    closing = b"" if is_kept else b"Connection: close\r\n"
    request = b"GET %s HTTP/1.1\r\nHost: localhost\r\n%s\r\n" % (path.encode(), closing)
    poll, askers = select.epoll(), {}
    begin = time.monotonic()
    # Spread over one pause, so that they do not come as one.
    turns = [(begin + pause * number / COUNT, number, Asker(number)) for number in range(COUNT)]
    heapq.heapify(turns)
    statuses, times, failures, without_retry, told = {}, [], [], 0, False
    poll.register(sys.stdin, select.EPOLLIN | select.EPOLLHUP)

    def finish(asker, failure=None):
        nonlocal told
        if failure:
            failures.append(failure)
        else:
            times.append(time.monotonic() - asker.since)
        if failure or not is_kept or b"\r\nconnection: close" in asker.answer.lower():
            askers.pop(asker.client.fileno(), None)
            asker.client.close()
            asker.client = None
        asker.answer = b""
        heapq.heappush(turns, (time.monotonic() + pause, asker.number, asker))
        if not told and len(times) + len(failures) >= COUNT:
            told = True
            say("connected")

    while True:
        now = time.monotonic()
        while turns and turns[0][0] <= now:
            _, number, asker = heapq.heappop(turns)
            asker.since = time.monotonic()
            if asker.client:
                asker.client.send(request)
            else:
                asker.client = connection(number)
                askers[asker.client.fileno()] = asker
                poll.register(asker.client, select.EPOLLOUT)
        wait = max(0.0, turns[0][0] - time.monotonic()) if turns else 1.0
        for number, event in poll.poll(min(wait, 1.0)):
            if number == sys.stdin.fileno():
                times.sort()
                say(
                    json.dumps(
                        {
                            "statuses": statuses,
                            "failures": failures[:5],
                            "failed": len(failures),
                            "without_retry": without_retry,
                            "median": share_of(times, 0.5),
                            "p99": share_of(times, 0.99),
                            "longest": share_of(times, 1),
                        }
                    )
                )
                return
            asker = askers.get(number)
            if asker is None:
                continue
            try:
                if event & select.EPOLLOUT:
                    asker.client, asker.is_shaking = encrypted(asker.client), True
                    poll.modify(asker.client, select.EPOLLIN)
                if asker.is_shaking:
                    if has_shaken(asker.client):
                        asker.is_shaking = False
                        asker.client.send(request)
                    continue
                piece = asker.client.recv(65536)
                if not piece:
                    finish(asker, f"closed after {len(asker.answer)} bytes")
                    continue
                asker.answer += piece
            except ssl.SSLWantReadError:
                continue
            except OSError as error:
                finish(asker, str(error))
                continue
            head, found, body = asker.answer.partition(b"\r\n\r\n")
            length = re.search(rb"\r\ncontent-length: (\d+)", head, re.I)
            if found and length and len(body) >= int(length[1]):
                status = head[9:12].decode()
                statuses[status] = statuses.get(status, 0) + 1
                without_retry += status == "503" and b"\r\nretry-after: " not in head.lower()
                finish(asker)


{"ask": ask, "hoard": hoard, "steady": steady}.get(KIND, hold)()
