#!/usr/bin/env python3
"""Uses the page at / in a real browser, by keyboard, against a real daemon.

    tests/page/run

Needs chromium (Debian's package). It is driven over --remote-debugging-pipe, so that no port is open, and the page's
timers are the test's: a minute passes at once. The daemon is $KEY_SERVICE_BIN, else what is built in target/, else it is built.
"""
import json
import os
import re
import select
import shutil
import stat
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent

sys.path.insert(0, str(REPOSITORY / "tests/common"))
sys.dont_write_bytecode = True
import peers  # noqa: E402
from daemon import Daemon, PATIENCE, binary, environment  # noqa: E402


checks = []


def check(function):
    checks.append(function)
    return function


def expect(found, expected, what):
    assert found == expected, f"{what}: expected {expected!r}, found {found!r}"


@check
def the_service_is_said_to_be_well(daemon, browser):
    page = browser.open(daemon.address)
    page.until("document.getElementById('state').textContent === 'The service is well'")
    page.until("!document.getElementById('get').disabled")
    expect(page.problems(), [], "what the browser complains of")
    expect(page.requests() - {"/", "/health", "/openapi.json"}, set(), "what was loaded")


@check
def a_key_is_had_by_keyboard_alone(daemon, browser):
    page = browser.ready(daemon.address)
    for _ in range(3):  # kind, length, format
        page.key("Tab")
    expect(page("document.activeElement.id"), "format", "where three tabs lead")
    page("document.getElementById('length').focus()")
    page.key("Enter", "\r")
    page.until("!document.getElementById('result').hidden")
    key = page("document.getElementById('keys').textContent")
    assert re.fullmatch("[0-9a-f]{64}", key), key
    page("document.getElementById('get').focus()")
    page.key("Tab")
    expect(page("document.activeElement.id"), "keys", "what can be reached after the button")
    page.key("Tab")
    expect(page("document.activeElement.id"), "copy", "what comes next")
    page("document.getElementById('length').focus()")
    page.key("Enter", "\r")
    page.until(f"!['', '{key}'].includes(document.getElementById('keys').textContent)")
    expect(page.problems(), [], "what the browser complains of")


@check
def what_is_chosen_is_what_comes_and_what_the_shell_line_says(daemon, browser):
    page = browser.ready(daemon.address)
    document = json.loads(fetch(f"{daemon.address}/openapi.json"))
    for kind in ("key", "password"):
        page(f"document.querySelector('[value={kind}]').click()")
        parameters = {p["name"]: p["schema"] for p in document["paths"][f"/{kind}/{{length}}"]["get"]["parameters"]}
        expect(page("[...document.getElementById('format').options].map((option) => option.value)"), parameters["format"]["enum"], "formats")
        expect(page("document.getElementById('alphabet-field').hidden"), kind == "key", "whether there is no alphabet")
        for form in parameters["format"]["enum"]:
            if form == "raw":
                continue
            page.choose("length", 16)
            page.choose("format", form)
            page.choose("count", 3)
            page("document.getElementById('get').click()")
            page.until("!document.getElementById('result').hidden")
            keys = keys_of(form, page("document.getElementById('keys').textContent"))
            expect(len(keys), 3, f"{kind} {form}: keys")
            line = page("document.getElementById('curl').textContent")
            ran = subprocess.run(["sh", "-ec", line], capture_output=True, text=True, timeout=PATIENCE, check=True)
            others = keys_of(form, ran.stdout)
            expect([len(key) for key in others], [len(key) for key in keys], f"{kind} {form}: lengths by {line}")
            assert not set(keys) & set(others), "keys are drawn anew"
            page("document.getElementById('remove').click()")
    page("document.querySelector('[value=key]').click()")
    page.choose("format", "raw")
    expect(page("document.getElementById('get').disabled"), True, "raw keys are for files")
    with tempfile.TemporaryDirectory() as folder:
        line = page("document.getElementById('curl').textContent")
        subprocess.run(["sh", "-ec", line], cwd=folder, timeout=PATIENCE, check=True)
        file = Path(folder) / "key"
        expect((file.stat().st_size, stat.S_IMODE(file.stat().st_mode)), (16, 0o600), "bytes of the file, and its mode")
        file.unlink()
        ran = subprocess.run(["sh", "-ec", line.replace("/key/16", "/key/0")], cwd=folder, capture_output=True, timeout=PATIENCE, check=False)
        expect((ran.returncode, file.exists()), (22, False), "status of curl where there is an error, and whether it is stored")
    page.choose("length", 0)
    expect(page("document.getElementById('get').disabled"), True, "no length of 0")
    expect(page.problems(), [], "what the browser complains of")


@check
def a_key_is_gone_after_a_minute_or_when_it_is_told_to(daemon, browser):
    page = browser.ready(daemon.address)
    whole = "document.documentElement.outerHTML + [...document.querySelectorAll('input')].map((input) => input.value)"
    for leave in ("letPass(11_000)", "document.getElementById('remove').click()"):
        page("document.getElementById('get').click()")
        page.until("!document.getElementById('result').hidden")
        key = page("document.getElementById('keys').textContent")
        assert key and key in page(whole), "it is in the page"
        page("letPass(50_000)")
        assert key in page(whole), "it stays for a while"
        page(leave)
        assert key not in page(whole), "it is gone"
        expect(page("document.getElementById('result').hidden"), True, "and the result with it")
    expect(page("[localStorage.length, sessionStorage.length, document.cookie]"), [0, 0, ""], "what else the page kept")


@check
def it_is_copied_without_a_clipboard_of_the_page_s(daemon, browser):
    page = browser.ready(daemon.address)
    page("document.getElementById('get').click()")
    page.until("!document.getElementById('result').hidden")
    page("addEventListener('copy', () => { globalThis.copied = getSelection().toString(); }); "
         "Object.defineProperty(navigator, 'clipboard', { value: undefined }); document.getElementById('copy').focus()")
    page.key("Enter", "\r")
    page.until("document.getElementById('note').textContent.startsWith('Copied')")
    expect(page("globalThis.copied"), page("document.getElementById('keys').textContent"), "what was copied")


@check
def a_script_of_somebody_else_s_does_not_run(daemon, browser):
    page = browser.ready(daemon.address)
    page("const script = document.createElement('script'); script.textContent = 'globalThis.ran = true'; document.head.append(script)", fails=True)
    expect(page("globalThis.ran === undefined"), True, "an injected script does nothing")
    page("fetch('http://127.0.0.1:9/').catch(() => { globalThis.refused = true })")
    page.until("globalThis.refused")
    assert any("Content Security Policy" in problem for problem in page.problems()), "the policy is what stopped them"


@check
def it_is_dark_where_the_system_is(daemon, browser):
    page = browser.ready(daemon.address)
    for scheme in ("light", "dark"):
        page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colors = page("getComputedStyle(document.body).color")
        light = sum(int(number) for number in re.findall(r"\d+", colors)[:3]) > 3 * 128
        expect(light, scheme == "dark", f"whether text is light where the system is {scheme} ({colors})")


@check
def a_field_for_a_token_is_there_where_one_is_asked_for(daemon, browser):
    page = browser.ready(daemon.address)
    expect(page("document.getElementById('token-field').hidden"), True, "without tokens there is no field")
    expect(page("document.getElementById('header').hidden"), True, "nor a file for one")
    made = subprocess.run([binary(), "token", "new", "--name", "people"], env=environment(), capture_output=True, text=True, check=True)
    token, line = made.stdout.split("\n", 1)
    path = daemon.folder / "tokens"
    path.write_text(line)
    path.chmod(0o600)
    with Daemon(daemon.folder, f'tokens-file = "{path}"\n') as guarded:
        page = browser.ready(guarded.address)
        expect(page("document.getElementById('token-field').hidden"), False, "with tokens there is")
        page("document.getElementById('get').click()")
        page.until("document.getElementById('note').textContent === 'A bearer token is needed'")
        page.choose("token", token)
        line = page("document.getElementById('curl').textContent")
        assert "-H @token.header" in line and token not in line and "Authorization" not in line, line
        expect(page("document.getElementById('header').hidden"), False, "whether the file is not explained")
        header = daemon.folder / "token.header"
        header.write_text(f"Authorization: Bearer {token}\n")
        ran = subprocess.run(["sh", "-ec", line], cwd=daemon.folder, capture_output=True, text=True, timeout=PATIENCE, check=True)
        assert re.fullmatch("[0-9a-f]{64}\n", ran.stdout), "curl takes the token from the file"
        page("document.getElementById('get').click()")
        page.until("!document.getElementById('result').hidden")


@check
def a_service_that_is_gone_is_said_to_be(daemon, browser):
    with peers.HeldPort() as port:  # nothing else may answer there afterwards
        with Daemon(daemon.folder, port=port.number) as leaving:
            page = browser.ready(leaving.address)
        page("letPass(11_000)")
        page.until("document.getElementById('state').textContent === 'No answer from the service'")
        page("document.getElementById('get').click()")
        page.until("document.getElementById('note').textContent === 'No answer from the service.'")


def keys_of(form, text):
    if form == "json":
        return [key.get("key") or key["password"] for key in json.loads(text)]
    if form == "jwk":
        return [key["k"] for key in json.loads(text)["keys"]]
    return text.splitlines()


def fetch(url):
    with urllib.request.urlopen(url, timeout=PATIENCE) as response:
        return response.read()


# Timers of the page that the test lets pass, so that a minute is over at once.
CLOCK = """(() => {
  const timers = new Map();
  let now = 0, next = 1;
  globalThis.reallyWait = setTimeout.bind(globalThis);
  globalThis.setTimeout = (action, delay = 0) => { timers.set(next, { action, due: now + delay }); return next++; };
  globalThis.clearTimeout = (id) => timers.delete(id);
  globalThis.letPass = async (milliseconds) => {
    const end = now + milliseconds;
    for (;;) {
      const due = [...timers].filter(([, timer]) => timer.due <= end).sort(([, a], [, b]) => a.due - b.due)[0];
      if (!due) break;
      timers.delete(due[0]);
      now = due[1].due;
      await due[1].action();
    }
    now = end;
  };
})()"""


class Browser:
    """Headless Chromium, spoken to over its descriptors 3 and 4: JSON, each message ended by a zero byte."""

    def __init__(self, program, folder):
        self.number, self.rest, self.events = 0, b"", []
        theirs_in, self.out = os.pipe()
        self.into, theirs_out = os.pipe()
        # Descriptors 3 and 4 are the browser's ends. As root it has no sandbox of its own.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", program, "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu",
             "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", "--disable-component-update",
             f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)

    def send(self, method, session=None, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            message = self.receive()
            if message.get("id") == self.number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.events.append(message)

    def receive(self):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.into], [], [], PATIENCE)
            assert ready, "the browser does not answer"
            read = os.read(self.into, 1 << 16)
            assert read, "the browser has ended"
            self.rest += read
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def event(self, method, session):
        while True:
            for event in self.events:
                if event.get("method") == method and event.get("sessionId") == session:
                    self.events.remove(event)
                    return event["params"]
            self.events.append(self.receive())

    def open(self, address):
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.send("Page.addScriptToEvaluateOnNewDocument", source=CLOCK)
        page.send("Page.navigate", url=address)
        self.event("Page.loadEventFired", session)
        return page

    def ready(self, address):
        page = self.open(address)
        page.until("!document.getElementById('get').disabled")
        return page

    def close(self):
        peers.stop_peer(self.process, "chromium")


class Page:
    def __init__(self, browser, session):
        self.browser, self.session = browser, session

    def send(self, method, **parameters):
        return self.browser.send(method, self.session, **parameters)

    def __call__(self, script, fails=False):
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert fails or "exceptionDetails" not in result, f"{script}: {result.get('exceptionDetails')}"
        return result["result"].get("value")

    def until(self, condition):
        """Waits, in the page, for what another event brings about."""
        script = ("new Promise((resolve) => { let left = 2000; const look = () => "
                  f"(({condition}) ? resolve(true) : left-- ? reallyWait(look, 5) : resolve(false)); look(); }})")
        assert self(script), f"waited in vain for {condition}; the note is {self('''document.getElementById('note').textContent''')!r}"

    def key(self, name, text=""):
        code = {"Tab": 9, "Enter": 13}[name]
        common = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **common, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def choose(self, name, value):
        self(f"(() => {{ const field = document.getElementById('{name}'); field.value = {json.dumps(str(value))}; "
             "field.dispatchEvent(new Event('input', { bubbles: true })); })()")

    def problems(self):
        self("1")  # whatever was logged before has arrived then
        events = [event for event in self.browser.events if event.get("sessionId") == self.session]
        logged = [event["params"]["entry"]["text"] for event in events if event["method"] == "Log.entryAdded"]
        thrown = [json.dumps(event["params"]) for event in events if event["method"] == "Runtime.exceptionThrown"]
        return logged + thrown

    def requests(self):
        events = [event for event in self.browser.events if event.get("sessionId") == self.session]
        urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return {re.sub(r"^http://[^/]+", "", url) for url in urls if not url.startswith("data:")}


def main():
    program = shutil.which("chromium")
    passed, failed = 0, 0
    if not program:
        print("FAIL chromium is missing: apt-get install --no-install-recommends chromium")
        failed = 1
    else:
        with tempfile.TemporaryDirectory(prefix="key-service-page-", ignore_cleanup_errors=True) as folder:
            folder = Path(folder)
            browser = Browser(program, folder / "profile")
            try:
                with Daemon(folder) as daemon:
                    for function in checks:
                        if sys.argv[1:] and function.__name__ not in sys.argv[1:]:
                            continue
                        try:
                            function(daemon, browser)
                            print(f"ok   {function.__name__}", flush=True)
                            passed += 1
                        except (AssertionError, subprocess.SubprocessError, OSError) as problem:
                            print(f"FAIL {function.__name__}\n       {problem}", flush=True)
                            failed += 1
            finally:
                browser.close()
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()
