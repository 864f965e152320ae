"""What an operator does at random moments, and what must be in force after each action."""

import signal

from support.certificates import self_signed

BROKEN_TOKENS = "nobody sha256:12 max-size=many\n"
BROKEN_CONFIG = "rate-request = 1\n"


class Operator:
    """Does one thing after another. Each action returns what it did, for the log and the plot."""

    def __init__(self, run, random):
        self.run, self.random, self.rotated = run, random, 0

    def act(self):
        steady, restarting = self.run.steady, self.run.restarting
        action, service = self.random.choice(
            [
                (self.rotate_token, steady),
                (self.rotate_token, restarting),
                (self.change_rate, steady),
                (self.change_rate, restarting),
                (self.renew, steady),
                (self.renew, steady),
                (self.refuse, steady),
                (self.refuse, restarting),
                (self.restart, restarting),
                (self.restart, restarting),
                (self.restart, restarting),
                (self.restart_quietly, restarting),
            ]
        )
        return action(service), service

    def reload(self, service, succeeds=True):
        """Sends SIGHUP and waits for RELOADING=1 and READY=1."""
        service.signal(signal.SIGHUP)
        service.daemon.heard("RELOADING=1")
        status = service.daemon.heard("READY=1")
        self.expect(service, "succeeded" in status, succeeds, f"whether the reload succeeded ({status})")

    @staticmethod
    def discard(service):
        """Discards earlier notifications: the daemon may have reloaded a changed file by itself, before the last signal."""
        service.daemon.pings(0)

    def expect(self, service, found, expected, what):
        if found != expected:
            self.run.problems.add(f"{service.name} ({service.state()}): {what}: expected {expected}, found {found}")

    def expect_status(self, service, token, expected, what, connection=None):
        status, headers = service.get(token, connection=connection)
        self.expect(service, status, expected, what)
        return headers

    def rotate_token(self, service):
        """Adds a token, which is valid at once, and removes the one before, which is refused at once, on open connections too."""
        self.rotated += 1
        new, old = f"rotated-{self.rotated}", next((name for name in service.tokens if name.startswith("rotated-")), None)
        self.discard(service)
        with service.connect() as connection:
            old_token = service.tokens.get(old)
            self.expect_status(service, old_token or service.tokens["web"], 200, "a token before its removal", connection)
            service.lines.pop(old, None)
            service.add_token(new)
            service.write_tokens()
            self.reload(service)
            self.expect_status(service, service.tokens[new], 200, "a token after it was added", connection)
            self.expect_status(service, service.tokens[new], 200, "the same on a new connection")
            if old:
                self.expect_status(service, old_token, 401, "a token after its removal", connection)
                self.expect_status(service, old_token, 401, "the same on a new connection")
                service.tokens.pop(old)
        return "reload"

    def change_rate(self, service):
        self.discard(service)
        with service.connect() as connection:
            service.rate = self.random.randint(50_000, 1_000_000)
            service.write_config()
            self.reload(service)
            self.expect_rate(service, connection)
            self.expect_rate(service)
        return "reload"

    def expect_rate(self, service, connection=None):
        headers = self.expect_status(service, service.tokens["web"], 200, "a key after the reload", connection)
        self.expect(service, headers.get("ratelimit-policy"), f'"requests";q={service.rate * 10};w=10', "RateLimit-Policy")

    def renew(self, service):
        """Renews the certificate: new handshakes get the new one, open connections stay."""
        self.discard(service)
        with service.connect() as connection:
            service.renew()
            self.reload(service)
            self.expect(service, service.served_certificate(), service.certificate, "the certificate after its renewal")
            self.expect_status(service, service.tokens["web"], 200, "a connection from before the renewal", connection)
        return "renewal"

    def refuse(self, service):
        """Reloads files with an error: what protected the service before still does, and the next valid reload succeeds."""
        self.discard(service)
        kind = self.random.choice(["tokens", "missing", "config", *(["certificate"] if hasattr(service, "certificate") else [])])
        if kind == "tokens":
            service.replace("tokens", BROKEN_TOKENS)
        elif kind == "missing":
            (service.directory / "tokens").unlink()
        elif kind == "config":
            service.replace("config.toml", BROKEN_CONFIG)
        else:  # the key of another certificate
            self_signed(service.directory / "key.pem", service.directory / "other.pem")
        self.reload(service, succeeds=False)
        values = service.scrape()
        self.expect(service, values["config_last_reload_successful"], 0, "config_last_reload_successful after a refused reload")
        if kind == "certificate":
            self.expect(service, values["tls_last_reload_successful"], 0, "tls_last_reload_successful after a refused reload")
        if hasattr(service, "certificate"):
            self.expect(service, service.served_certificate(), service.certificate, "the certificate after a refused reload")
        self.expect_rate(service)
        self.expect_status(service, None, 401, "a key without a token after a refused reload")
        self.discard(service)
        service.write_tokens()
        service.write_config()
        if kind == "certificate":
            service.renew()
        self.reload(service)
        self.expect_rate(service)
        return "refused reload"

    def restart(self, service):
        """Restarts the daemon under load."""
        service.restart()
        return "restart"

    def restart_quietly(self, service):
        """Compares everything in a quiet moment, and restarts."""
        with self.run.quiet():
            self.run.verify()
            service.restart()
        return "restart"
