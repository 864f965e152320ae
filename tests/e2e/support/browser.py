"""Headless Chromium (Debian's package), driven over --remote-debugging-pipe: no port is open, and tests control the timers of a page."""

import base64
import json
import os
import re
import select
import subprocess

from support import peers
from support.conditions import TIMEOUT

# A host name of the page that browsers do not regard as local. It resolves to 127.0.0.1.
HOST = "keys.example.org"
# key: its code, its number and its text
KEYS = {"Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r"), " ": ("Space", 32, " "), "ArrowRight": ("ArrowRight", 39, "")}
# Replaces the timers and the clock of the page by a clock that the test advances, so that a minute takes no time.
CLOCK = """(() => {
  const timers = new Map(), start = Date.now();
  let now = 0, next = 1, slept = 0;
  Date.now = () => start + now + slept;
  globalThis.sleepFor = (milliseconds) => { slept += milliseconds; }; // as while the computer sleeps: no timer advances
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
        self.number, self.rest, self.events, self.handlers = 0, b"", [], {}
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
            f"--host-resolver-rules=MAP {HOST} 127.0.0.1",
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

    def post(self, method, session=None, **parameters):
        """Sends a command without waiting for its result, and returns its number."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        return self.number

    def send(self, method, session=None, **parameters):
        number = self.post(method, session, **parameters)
        while True:
            message = self.receive()
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.keep(message)

    def keep(self, message):
        """Keeps an event for `event`, or handles it at once: a command may not return before."""
        if handler := self.handlers.get((message.get("method"), message.get("sessionId"))):
            handler(message["params"])
        elif "method" in message:  # not the result of a command that was posted
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
            self.keep(self.receive())

    def open(self, address, prepare=None):
        """A new page of this address, after it has loaded. `prepare` gets the page before that."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.send("Page.addScriptToEvaluateOnNewDocument", source=CLOCK)
        if prepare:
            prepare(page)
        page.navigate(address)
        return page

    def ready(self, address, prepare=None):
        page = self.open(address, prepare)
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

    def navigate(self, address):
        self.send("Page.navigate", url=address)
        self.browser.event("Page.loadEventFired", self.session)

    def respond(self, urls, response):
        """Answers the requests for these URLs, a pattern, in place of their server: `response` gets the request, and returns status,
        headers and body."""

        def handle(event):
            status, headers, body = response(event["request"])
            fulfilled = {"responseCode": status, "responseHeaders": [{"name": name, "value": value} for name, value in headers]}
            body = base64.b64encode(body).decode()
            self.browser.post("Fetch.fulfillRequest", self.session, requestId=event["requestId"], body=body, **fulfilled)

        self.browser.handlers["Fetch.requestPaused", self.session] = handle
        self.send("Fetch.enable", patterns=[{"urlPattern": urls}])

    def resize(self, width, height, scale=1):
        """The size of the viewport in CSS pixels. Scrollbars take no space, as on a phone."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=width < 500)
        self.send("Emulation.setScrollbarsHidden", hidden=True)

    def color_scheme(self, scheme):
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def isolated(self, script):
        """A function that evaluates scripts in a world of its own, after this one: with the page's document, but with neither its
        Content-Security-Policy nor the clock of the test."""
        frame = self.send("Page.getFrameTree")["frameTree"]["frame"]["id"]
        context = self.send("Page.createIsolatedWorld", frameId=frame)["executionContextId"]

        def evaluate(script):
            result = self.send("Runtime.evaluate", contextId=context, expression=script, returnByValue=True, awaitPromise=True)
            assert "exceptionDetails" not in result, result["exceptionDetails"]
            return result["result"].get("value")

        evaluate(script)
        return evaluate

    def until(self, condition):
        """Waits, inside the page, until a condition is true."""
        script = (
            "new Promise((resolve) => { let left = 2000; const look = () => "
            f"(({condition}) ? resolve(true) : left-- ? reallyWait(look, 5) : resolve(false)); look(); }})"
        )
        assert self(script), f"timed out waiting for {condition}; the page is {self('document.body.innerText')!r}"

    def key(self, name):
        """Presses and releases a key."""
        code, number, text = KEYS[name]
        common = {"key": name, "code": code, "windowsVirtualKeyCode": number}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **common, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def text(self, name):
        return self(f"document.getElementById('{name}').textContent")

    def click(self, name):
        self(f"document.getElementById('{name}').click()")

    def is_hidden(self, name):
        return not self(f"document.getElementById('{name}').checkVisibility({{ visibilityProperty: true }})")

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
