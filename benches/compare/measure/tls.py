"""CPU time and memory over TLS. Every server has the same certificate, and negotiates the same version, cipher suite and key exchange."""

import functools
import shutil

from kinds import CONNECTIONS
from servers import TLS_CIPHER, TLS_GROUP, TLS_SERVERS, TLS_VERSION, Running
from tools import Failed, run

from measure.bulk import BULK, download
from measure.load import under_wrk
from measure.memory import LONG_TIMEOUTS, allow_descriptors, connect_idle

HYBRID_GROUP = "X25519MLKEM768"
HYBRID = f"key-service, {HYBRID_GROUP}"  # known to the daemon only
IDLE_CONNECTIONS = 5_000


@functools.cache
def requests(bench):
    """For each server, CPU seconds per request on kept connections, one figure per round."""
    return rounds(bench, TLS_SERVERS, lambda server, _: under_wrk(bench, server, "keep-alive")["cpu"])


@functools.cache
def handshakes(bench):
    """For each server, CPU seconds of a new connection with one request, one figure per round."""

    def measure(server, name):
        group = HYBRID_GROUP if name == HYBRID else TLS_GROUP
        cpu = server.cpu_seconds()
        client = [bench.tls_handshakes, f"127.0.0.1:{server.address[1]}", bench.certificate("P-256")[0], group, CONNECTIONS]
        opened, negotiated = run([*map(str, client), str(bench.handshakes)]).strip().split(" connections, ")
        if negotiated != f"{group} TLS13_AES_256_GCM_SHA384":
            raise Failed(f"{name} negotiated {negotiated}")
        return (server.cpu_seconds() - cpu) / int(opened)

    return rounds(bench, [*TLS_SERVERS, HYBRID], measure)


@functools.cache
def memory(bench):
    """For each server, the resident bytes that each of many idle connections adds."""

    def measure(server, _):
        own, _, connections = connect_idle(server, number=IDLE_CONNECTIONS)
        for connection in connections:
            connection.close()
        return own

    allow_descriptors()
    return rounds(bench, TLS_SERVERS, measure, number=1)


@functools.cache
def bulk(bench):
    """Bytes per second of CPU time of a key of 1 GiB, and of nginx sending a file of zeros, one figure per round."""

    def measure(server, _):
        cpu = server.cpu_seconds()
        download(f"{server.origin}/key/{BULK}", "--insecure", "--tlsv1.3", "--tls13-ciphers", TLS_CIPHER)
        return BULK / (server.cpu_seconds() - cpu)

    directory = bench.scratch / "key"
    directory.mkdir()
    with open(directory / str(BULK), "w+b", buffering=0) as zeros:
        zeros.truncate(BULK)
        while zeros.read(1 << 20):  # into the page cache
            pass
    bench.nginx_constants = f"location = /key/{BULK} {{ root {bench.scratch}; }}"
    try:
        return rounds(bench, ["key-service", "nginx"], measure)
    finally:
        bench.nginx_constants = ""
        shutil.rmtree(directory)


def rounds(bench, names, measure, number=None):
    """What `measure` finds for each of these, one figure per round."""
    certificate, key = bench.certificate("P-256")
    settings = {
        "KEYSERVICE_WORKERS": "1",
        "KEYSERVICE_MAX_SIZE": str(BULK),
        **LONG_TIMEOUTS,
        "KEYSERVICE_TLS_CERT": str(certificate),
        "KEYSERVICE_TLS_KEY": str(key),
    }
    found = {name: [] for name in names}
    for _ in range(number or bench.rounds):
        for name in names:
            with Running(bench, "key-service" if name == HYBRID else name, environment=settings, tls=True) as server:
                with server.connect() as connection:
                    connection.ask()
                    cipher, version, _ = connection.socket.cipher()
                if (version, cipher) != (TLS_VERSION, TLS_CIPHER):
                    raise Failed(f"{name} negotiated {version} {cipher}")
                found[name].append(measure(server, name))
    return found
