"""Headless Chromium (Debian's package), driven over --remote-debugging-pipe: no port is open, and tests control the timers of a page."""

import json
import os
import re
import select
import subprocess

from support import peers
from support.conditions import TIMEOUT

# Replaces the timers of the page by a clock that the test advances, so that a minute takes no time.
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
    """Headless Chromium, driven over its descriptors 3 and 4 by JSON messages that each end with a zero byte."""

    def __init__(self, directory):
        self.number, self.rest, self.events = 0, b"", []
        browser_input, self.commands = os.pipe()
        self.messages, browser_output = os.pipe()
        # The browser's ends are its descriptors 3 and 4. Run as root, it can't use its own sandbox. It ends with this process.
        options = [
            "--headless=new",
            "--no-sandbox",
            "--remote-debugging-pipe",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={directory}",
        ]
        script = f'exec setpriv --pdeathsig KILL -- chromium "$@" 3<&{browser_input} 4>&{browser_output}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *options, "about:blank"],
            pass_fds=(browser_input, browser_output),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(browser_input)
        os.close(browser_output)

    def send(self, method, session=None, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            message = self.receive()
            if message.get("id") == self.number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.events.append(message)

    def receive(self):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.messages], [], [], TIMEOUT)
            assert ready, "the browser does not respond"
            read = os.read(self.messages, 1 << 16)
            assert read, "the browser has exited"
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

    def __enter__(self):
        return self

    def __exit__(self, *_):
        peers.stop_peer(self.process, "chromium")
        os.close(self.commands)
        os.close(self.messages)


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
        """Waits, inside the page, until a condition is true."""
        script = (
            "new Promise((resolve) => { let left = 2000; const look = () => "
            f"(({condition}) ? resolve(true) : left-- ? reallyWait(look, 5) : resolve(false)); look(); }})"
        )
        assert self(script), f"timed out waiting for {condition}; the note is {self('''document.getElementById('note').textContent''')!r}"

    def key(self, name, text=""):
        code = {"Tab": 9, "Enter": 13}[name]
        common = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **common, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def choose(self, name, value):
        self(
            f"(() => {{ const field = document.getElementById('{name}'); field.value = {json.dumps(str(value))}; "
            "field.dispatchEvent(new Event('input', { bubbles: true })); })()"
        )

    def problems(self):
        self("1")  # everything that was logged earlier has arrived after this
        events = [event for event in self.browser.events if event.get("sessionId") == self.session]
        logged = [event["params"]["entry"]["text"] for event in events if event["method"] == "Log.entryAdded"]
        thrown = [json.dumps(event["params"]) for event in events if event["method"] == "Runtime.exceptionThrown"]
        return logged + thrown

    def requests(self):
        events = [event for event in self.browser.events if event.get("sessionId") == self.session]
        urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return {re.sub(r"^http://[^/]+", "", url) for url in urls if not url.startswith("data:")}
