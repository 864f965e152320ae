"""Many clients in one process, from addresses of their own in 127.0.0.0/8; prints what became of them as JSON.

    fleet.py silent|half|drip|deaf PORT COUNT NET
        COUNT connections that say nothing, half a head, a byte every 5 seconds, or ask for a long key and never read it;
        prints `connected` once all are, and ends when the server has cut the last one
    fleet.py ask PORT COUNT NET PATH PAUSE new|kept
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
import sys
import time

KIND, PORT, COUNT, NET = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
SHARING = 200
CONNECTING_MAX = 256  # the kernel's queue of a listener has 4,096 places: no SYN of ours is to be lost there
PATIENCE = 60
LONG = 256 << 20


def connection(number):
    """A connection on its way, from the address that `number` has."""
    client = socket.socket()
    client.setblocking(False)
    client.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT: connect(2) chooses, among more
    if KIND == "deaf":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    share = number // SHARING
    client.bind((f"127.{NET}.{share // 250}.{share % 250 + 1}", 0))
    if (code := client.connect_ex(("127.0.0.1", PORT))) not in (0, errno.EINPROGRESS):
        raise OSError(code, f"connection {number}")
    return client


def say(what):
    print(what, flush=True)


def hold():
    """The kinds that are only there. Their end is the server's doing, or the fleet fails."""
    opening = {"silent": b"", "half": b"GET /key/32 HTTP/1.1\r\nHost: loc", "drip": b"G",
               "deaf": b"GET /key/%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % LONG}[KIND]
    dripping = b"ET /key/32 HTTP/1.1"
    poll, clients, since, lives, drips = select.epoll(), {}, {}, [], []
    end = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
    made = connected = 0
    limit = time.monotonic() + PATIENCE
    while len(lives) < COUNT:
        while made < COUNT and made - connected < CONNECTING_MAX:
            client = connection(made)
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
                    clients[number].send(dripping[at:at + 1])
                    heapq.heappush(drips, (now + 5, number, at + 1))
                except OSError:
                    pass  # it has been cut, and the poll says so too
        for number, event in poll.poll(0.1):
            client = clients[number]
            if event & select.EPOLLOUT and number not in since and not event & select.EPOLLERR:
                since[number] = time.monotonic()
                connected += 1
                if opening:
                    client.send(opening)
                if KIND == "drip":
                    heapq.heappush(drips, (since[number] + 5, number, 0))
                poll.modify(client, end)
                if connected == COUNT:
                    say("connected")
            elif event & end:
                if number not in since:
                    sys.exit(f"a connection was refused: {client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)}")
                lives.append(time.monotonic() - since.pop(number))  # the number may be the next connection's
                poll.unregister(client)
                clients.pop(number).close()
    say(json.dumps({"cut": len(lives), "soonest": min(lives), "latest": max(lives)}))


class Asker:
    """One client: its connection, what it has read, and when it began."""

    def __init__(self, number):
        self.number, self.client, self.answer, self.since = number, None, b"", 0.0


def ask():
    path, pause, is_kept = sys.argv[5], float(sys.argv[6]), sys.argv[7] == "kept"
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
                at = lambda share: times[min(len(times) - 1, int(len(times) * share))] if times else None
                say(json.dumps({"statuses": statuses, "failures": failures[:5], "failed": len(failures),
                                "without_retry": without_retry, "median": at(0.5), "p99": at(0.99), "longest": at(1)}))
                return
            asker = askers.get(number)
            if asker is None:
                continue
            try:
                if event & select.EPOLLOUT:
                    asker.client.send(request)
                    poll.modify(asker.client, select.EPOLLIN)
                    continue
                piece = asker.client.recv(65536)
                if not piece:
                    finish(asker, f"closed after {len(asker.answer)} bytes")
                    continue
                asker.answer += piece
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


ask() if KIND == "ask" else hold()
