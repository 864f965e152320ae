"""A journal for the audit records of a daemon: a socket that is read and whose entries are forgotten."""

import contextlib
import os
import socket
import threading

# In a mount namespace, binds the directory $0 to the path of the journal and runs a command whose stderr is the journal
# (systemd.exec(5)). The journal of this machine gets nothing.
COMMAND = """
mount -t tmpfs none /run && mkdir -p /run/systemd/journal && mount --bind "$0" /run/systemd/journal &&
export JOURNAL_STREAM=$(stat --dereference --format=%d:%i /dev/stderr) && exec "$@"
"""


@contextlib.contextmanager
def reading(bench):
    """Reads the journal's socket during the block. Yields the command that runs another command with this journal, and the list of the
    lengths of its entries."""
    directory = bench.scratch / "journal"
    directory.mkdir(exist_ok=True)
    (directory / "socket").unlink(missing_ok=True)
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    entries, ended = [], threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(directory / "socket"))

        def read():
            while (length := len(journal.recv(1 << 16))) or not ended.is_set():
                if length:  # tracing-journald starts with an empty entry
                    entries.append(length)

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield [*namespace, "sh", "-c", COMMAND, directory], entries
        finally:
            ended.set()
            journal.shutdown(socket.SHUT_RD)  # recv returns an empty entry when all have been read
            thread.join()
