"""The soak test: mixed load on two daemons for minutes or hours, with reloads, certificate renewals and restarts at random moments.

`just soak MINUTES` starts __main__.py, which starts run.py. The harness holds the listening sockets, as systemd does, and passes
them to each process.

    run.py        the course of a run: load, events, quiet moments, the results
    service.py    the daemons: the one that never restarts (TLS, a proxy that sends X-Forwarded-For, credentials) and the one that
                  restarts (plain HTTP, PROXY protocol)
    operator.py   what an operator does at random moments: reload, renew, restart; and the checks that follow each
    clients.py    well-behaved clients, directly and through haproxy
    hostile.py    clients that are slow, broken or malicious
    catalogue.py  the requests that clients choose from, and what their responses must be
    ledger.py     what the clients counted, and how each metric compares with it
    audit.py      matches the audit records with the keys that clients received
    plot.py       the plot

Every random choice comes from the seed, which the run prints. Threads and the machine decide the order in which they happen.
"""
