"""The web page at /, in a real browser, with a real daemon: by keyboard, on a phone, without JavaScript, and for screen readers.

UPDATE_DOCUMENTS=1 just e2e -k pictures    makes the pictures of docs/page.md again, which a change of the page requires
"""

import base64
import hashlib
import json
import os
import re
import stat
import struct
import subprocess
import urllib.request
import zlib

import pytest
from cryptography.fernet import Fernet
from joserfc import jwt
from joserfc.jwk import OctKey
from support import certificates, npm, peers
from support.browser import HOST
from support.conditions import TIMEOUT, expect
from support.daemon import REPOSITORY, Daemon, binary, environment

pytestmark = [pytest.mark.tools("chromium", "curl"), pytest.mark.xdist_group("page")]

PRESETS = {"Session secret": "hex", "WireGuard": "base64", "Fernet": "base64", "JWT": "base64url"}
NPM = ["axe-core@4.14.1"]


def generate(page):
    """Presses the button, waits for the result, and returns its text."""
    page.click("get")
    page.until("!document.getElementById('result').className")
    return page.text("keys")


def choose_preset(page, name):
    page(f"[...document.querySelectorAll('#presets button')].find((button) => button.textContent === {name!r}).click()")


def choose_kind(page, kind):
    page(f"document.querySelector('[value={kind}]').click()")


def value(page, field):
    return page(f"document.getElementById('{field}').value")


def expect_no_problems(page):
    expect(page.problems(), [], "errors in the browser")


def parameters(daemon, kind):
    document = json.loads(daemon.get("/openapi.json")[2])
    return {each["name"]: each["schema"] for each in document["paths"][f"/{kind}/{{length}}"]["get"]["parameters"]}


def test_page_shows_that_the_service_is_healthy(daemon, browser):
    page = browser.open(daemon.address)
    page.until("document.getElementById('state').textContent === 'The service is healthy'")
    page.until("!document.getElementById('get').disabled")
    expect_no_problems(page)
    expect(page.requests() - {"/", "/health", "/openapi.json"}, set(), "URLs that the page requested, apart from its own")


def test_keyboard_alone_is_enough(daemon, browser):
    page = browser.ready(daemon.address)

    def focused():
        return page("(({ id, textContent, value }) => id || value || textContent)(document.activeElement)")

    def tab_to(*names):
        for name in names:
            page.key("Tab")
            expect(focused(), name, "the next element")

    expect(focused(), "length", "the focused element of a new page")
    page.send("Input.insertText", text="16")  # replaces the number that is selected
    page.key("Enter")
    page.until("!document.getElementById('result').className")
    key = page.text("keys")
    assert re.fullmatch("[0-9a-f]{32}", key), key
    tab_to("get")
    page.key(" ")
    page.until(f"!['', '{key}'].includes(document.getElementById('keys').textContent)")
    tab_to(page("document.querySelector('#options summary').textContent"))
    page.key("Enter")
    tab_to("format", "count", "keys", "copy", "download", "remove")
    page.key("Enter")
    expect((page.text("keys"), focused()), ("", "get"), "the result, and the focused element when the button Clear has disappeared")
    page("document.querySelector('#presets button').focus()")
    tab_to("WireGuard")
    page.key(" ")
    expect(value(page, "format"), "base64", "the format of the preset")
    tab_to("Fernet", "JWT", "key")
    page.key("ArrowRight")
    expect(page.text("unit"), "characters", "the unit of a password")
    expect_no_problems(page)


def test_keys_and_shell_command_match_the_form(daemon, browser, tmp_path):
    page = browser.ready(daemon.address)
    for kind in ("key", "password"):
        choose_kind(page, kind)
        schemas = parameters(daemon, kind)
        options = page("[...document.getElementById('format').options].map((option) => option.value)")
        expect(options, schemas["format"]["enum"], "formats")
        hidden = [name for name in ("format", "alphabet", "count") if page.is_hidden(name)]
        expect(hidden, ["format", "alphabet", "count"], "fields that are out of the way")
        for form in schemas["format"]["enum"]:
            if form == "raw":
                continue
            page.choose("length", 16)
            page.choose("format", form)
            page.choose("count", 3)
            keys = keys_of(form, generate(page))
            expect(len(keys), 3, f"{kind} {form}: keys")
            line = page.text("curl")
            ran = subprocess.run(["sh", "-ec", line], capture_output=True, text=True, timeout=TIMEOUT, check=True)
            others = keys_of(form, ran.stdout)
            expect([len(key) for key in others], [len(key) for key in keys], f"{kind} {form}: lengths by {line}")
            assert not set(keys) & set(others), "expected new keys from the shell command"
    choose_kind(page, "key")
    page.choose("format", "raw")
    expect(page("[count.disabled, count.value]"), [True, "1"], "whether raw keys come one at a time")
    page("document.getElementById('options').open = true")
    expect((page.is_hidden("count-help"), page.is_hidden("alphabet")), (False, True), "whether the reason and the alphabets are hidden")
    line = page.text("curl")
    subprocess.run(["sh", "-ec", line], cwd=tmp_path, timeout=TIMEOUT, check=True)
    file = tmp_path / "key"
    expect((file.stat().st_size, stat.S_IMODE(file.stat().st_mode)), (16, 0o600), "size and mode of the file")
    file.unlink()
    ran = subprocess.run(["sh", "-ec", line.replace("/key/16", "/key/0")], cwd=tmp_path, capture_output=True, timeout=TIMEOUT, check=False)
    expect((ran.returncode, file.exists()), (22, False), "exit status of curl for an error response, and whether a file was written")
    expect_no_problems(page)


def test_every_result_can_be_downloaded(daemon, browser, tmp_path):
    page = browser.ready(daemon.address)
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True)
    page(
        "globalThis.urls = new Set(); const make = URL.createObjectURL; const drop = URL.revokeObjectURL; "
        "URL.createObjectURL = (blob) => { const url = make(blob); urls.add(url); return url; }; "
        "URL.revokeObjectURL = (url) => { urls.delete(url); drop(url); }"
    )
    for kind, form, name in [
        ("key", "raw", "key.bin"),
        ("key", "hex", "key.txt"),
        ("key", "jwk", "key.json"),
        ("password", "text", "password.txt"),
    ]:
        choose_kind(page, kind)
        page.choose("length", 48)
        page.choose("format", form)
        text = generate(page)
        expect(page.is_hidden("copy"), form == "raw", f"{form}: whether the button Copy is hidden")
        page.click("download")
        page.until("document.getElementById('result-note').textContent.startsWith('Downloaded.')")
        while browser.event("Browser.downloadProgress", None)["state"] != "completed":
            pass
        content = (tmp_path / name).read_bytes()
        if form == "raw":
            expect((len(content), text), (48, "48 raw bytes, ready to download."), "bytes of the file, and what the page displays")
        else:
            expect(content.decode().rstrip("\n"), text, f"{form}: the downloaded text")
        page("globalThis.held = bytes")
        page.click("remove")
        expect(
            page("[urls.size, held.every((byte) => byte === 0)]"), [0, True], "object URLs after removal, and whether the array is wiped"
        )
    expect_no_problems(page)


def test_page_removes_keys_after_a_minute_or_on_request(daemon, browser):
    page = browser.ready(daemon.address)
    contents = "document.documentElement.outerHTML + [...document.querySelectorAll('input')].map((input) => input.value)"

    def generated():
        key = generate(page)
        assert key and key in page(contents), "expected the key in the page"
        expect(page.text("countdown"), "Cleared in 60 s", "the countdown")
        page("letPass(50_000)")
        assert key in page(contents), "expected the key in the page after 50 s"
        expect(page.text("countdown"), "Cleared in 10 s", "the countdown after 50 s")
        return key

    def expect_removed(key):
        assert key not in page(contents), "expected the key to be removed"
        expect((page("bytes"), page.is_hidden("actions")), (None, True), "the response, and whether its buttons are hidden")

    for remove in ("letPass(10_000)", "document.getElementById('remove').click()", "sleepFor(3_600_000); letPass(1_000)"):
        key = generated()
        page(remove)
        expect_removed(key)
    key = generated()
    page.click("keep")
    page("letPass(59_000)")
    assert key in page(contents), "expected Keep longer to start another minute"
    page("letPass(1_000)")
    expect_removed(key)
    stored = page("[localStorage.length, sessionStorage.length, document.cookie]")
    expect(stored, [0, 0, ""], "entries in local and session storage, and cookies")
    generated()
    page("dispatchEvent(new PageTransitionEvent('pagehide'))")
    expect(page.text("keys"), "", "the result after the page was left")


def test_screen_readers_announce_no_key_and_no_second(daemon, browser):
    page = browser.ready(daemon.address)
    page(
        "globalThis.announced = []; for (const region of document.querySelectorAll('[role=status], [aria-live]')) "
        "new MutationObserver(() => announced.push(region.textContent)).observe(region, { childList: true })"
    )
    key = generate(page)
    page("letPass(60_000)")
    expected = [
        "Waiting for the service.",
        "Ready. It is cleared in 60 seconds.",
        "The result is cleared in 20 seconds.",
        "Cleared after 60 seconds.",
    ]
    announced = page("announced")
    expect([text for text in announced if text], expected, "announcements")
    assert not any(key in text for text in announced), "expected no key"


def test_keys_are_copied(daemon, browser):
    browser.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"], origin=daemon.address)
    page = browser.ready(daemon.address)
    page.send("Emulation.setFocusEmulationEnabled", enabled=True)  # the clipboard is only for the page that has the focus
    key = generate(page)
    page.click("copy")
    page.until("document.getElementById('result-note').textContent.startsWith('Copied. The clipboard keeps it')")
    expect(page("navigator.clipboard.readText()"), key, "the text in the clipboard")
    # Over plain HTTP there is no clipboard API.
    page(
        "addEventListener('copy', () => { globalThis.copied = getSelection().toString(); }); "
        "Object.defineProperty(navigator, 'clipboard', { value: undefined }); document.getElementById('copy').focus()"
    )
    key = generate(page)
    page("document.getElementById('copy').focus()")
    page.key("Enter")
    page.until("document.getElementById('result-note').textContent.startsWith('Copied. The clipboard keeps it')")
    expect(page("globalThis.copied"), key, "the copied text")


def test_the_page_accepts_what_the_service_accepts(daemon, browser):
    """Each other number is refused beside its field, with the limit, and is not sent."""
    page = browser.ready(daemon.address)
    sent = len(key_requests(page))
    for kind in ("key", "password"):
        choose_kind(page, kind)
        for text in ["", "0", "1", "032", "1e2", "1.5", "-1", "+16", "0x10", "abc", "１６", "1024", "1025", "9" * 30]:
            page.choose("length", text)
            error = page.text("length-error")
            is_served = daemon.status(f"/{kind}/{urllib.request.quote(text)}") == 200
            expect(not error, is_served, f"{kind} {text!r}: whether the page accepts what the service accepts; its error is {error!r}")
            expect(page("length.getAttribute('aria-invalid')"), str(not is_served).lower(), f"{kind} {text!r}: aria-invalid")
            expect(bool(page.text("curl")), is_served, f"{kind} {text!r}: whether there is a shell command")
            if not is_served:
                assert "1024" in error, f"expected the limit in {error!r}"
                page("document.activeElement.blur()")
                page.click("get")
                expect(page("document.activeElement.id"), "length", "the focused element after the button, with an error")
    described = page("length.getAttribute('aria-describedby').split(' ')")
    assert "length-error" in described, described
    expect(page("document.getElementById('length-error').ariaLive"), "polite", "whether the error is announced")
    choose_kind(page, "key")
    page.choose("length", 1024)
    for text in ["", "0", "1", "02", "64", "65", "1025"]:
        page.choose("count", text)
        error = page.text("count-error")
        is_served = daemon.status(f"/key/1024?format=hex&count={text}") == 200
        expect(not error, is_served, f"count {text!r}: whether the page accepts what the service accepts; its error is {error!r}")
        if not is_served:
            assert re.search("64|1024", error), f"expected the limit in {error!r}"
            expect(page.is_hidden("count"), False, "whether the field with the error is hidden")
            page("document.getElementById('options').open = false")
            page.click("get")
            expect(page("document.activeElement.id"), "count", "the focused element after the button, with an error")
    expect(len(key_requests(page)), sent, "requests for keys")
    expect_no_problems(page)


def test_large_keys_are_for_a_file(browser, tmp_path):
    with Daemon(tmp_path, settings={"max-size": 1_000_000}) as daemon:
        page = browser.ready(daemon.address)
        page.choose("length", 65_536)
        expect(len(generate(page)), 131_072, "digits of the largest key that is displayed")
        page.choose("length", 65_537)
        expect(page.text("length-error"), "This page shows up to 65536 bytes. The command below writes more to a file.", "the error")
        subprocess.run(["sh", "-ec", page.text("curl")], cwd=tmp_path, timeout=TIMEOUT, check=True)
        expect((tmp_path / "key").stat().st_size, 131_075, "bytes of the file: digits and a newline")
        page.choose("count", 2)
        expect(
            (page.text("count-error"), page.text("curl")), ("The limit is 1 for this length.", ""), "the error of a batch, and the command"
        )
        page.choose("length", 1_000_001)
        expect(page.text("length-error"), "The limit is 1000000 bytes.", "the error")


def test_a_result_belongs_to_its_settings(daemon, browser):
    page = browser.ready(daemon.address)
    for change in (
        lambda: page.choose("length", 24),
        lambda: page.choose("format", "base64"),
        lambda: page.choose("count", 2),
        lambda: choose_preset(page, "JWT"),
        lambda: choose_kind(page, "password"),
        lambda: page.choose("alphabet", "ascii"),
    ):
        generate(page)
        change()
        expect(page.text("keys"), "", "the result of other settings")
        expect(page.text("result-note"), "Cleared, because the settings have changed.", "the reason")
    # A response that is still in flight does not belong to the new settings either.
    page(
        "globalThis.shown = []; const keys = element('keys'); "
        "new MutationObserver(() => shown.push(keys.textContent)).observe(keys, { childList: true })"
    )
    page.send("Fetch.enable", patterns=[{"urlPattern": "*/password/*"}])
    page.click("get")
    held = browser.event("Fetch.requestPaused", page.session)
    page.choose("length", 16)
    page.send("Fetch.continueRequest", requestId=held["requestId"])
    page.send("Fetch.disable")
    while browser.event("Network.loadingFinished", page.session)["requestId"] != held["networkId"]:
        pass
    key = generate(page)
    expect((len(key), page("shown")), (16, [key]), "characters of the result, and what the page displayed")
    expect_no_problems(page)


def test_strength_equals_the_entropy_of_the_service(daemon, browser):
    page = browser.ready(daemon.address)
    for length, words in [(7, "Weak"), (8, "Fair"), (13, "Fair"), (14, "Strong"), (31, "Strong"), (32, "Very strong")]:
        page.choose("length", length)
        assert page.text("strength").startswith(f"{8 * length} bits. {words}: "), page.text("strength")
    choose_kind(page, "password")
    page("document.getElementById('options').open = true")
    expect(page.is_hidden("alphabet"), False, "whether the alphabets are hidden")
    for alphabet in parameters(daemon, "password")["alphabet"]["enum"]:
        page.choose("alphabet", alphabet)
        for length in (1, 17, 1024):
            page.choose("length", length)
            bits = float(daemon.get(f"/password/{length}?alphabet={alphabet}")[1]["entropy-bits"])
            assert page.text("strength").startswith(f"{bits:.1f}".removesuffix(".0") + " bits. "), (page.text("strength"), bits)


@pytest.mark.tools("wg")
def test_presets_make_what_they_are_made_for(daemon, browser):
    page = browser.ready(daemon.address)
    described = (REPOSITORY / "docs/page.md").read_text()
    found = {}
    for name, form in PRESETS.items():
        choose_kind(page, "password")
        page.choose("count", 5)
        choose_preset(page, name)
        expect(page("[kind(), length.value, format.value, count.value]"), ["key", "32", form, "1"], f"{name}: settings")
        pressed = page("[...document.querySelectorAll('#presets [aria-pressed=true]')].map((button) => button.textContent)")
        expect(pressed, [name], "the pressed presets")
        assert page.text("purpose") in page.text("words"), page.text("purpose")
        assert f"| {name} | `/key/32?format={form}` |" in described, f"docs/page.md: expected the settings of {name}"
        found[name] = generate(page)
    assert re.fullmatch("[0-9a-f]{64}", found["Session secret"])
    subprocess.run(["wg", "pubkey"], input=found["WireGuard"], text=True, capture_output=True, timeout=TIMEOUT, check=True)
    expect(Fernet(found["Fernet"]).decrypt(Fernet(found["Fernet"]).encrypt(b"a")), b"a", "what Fernet decrypts")
    for key in daemon.get("/key/32?format=base64&count=1000")[2].decode().split():  # with + and /
        Fernet(key)
    with pytest.raises(ValueError, match="32 url-safe base64-encoded bytes"):  # without padding
        Fernet(found["JWT"])
    secret = OctKey.import_key(found["JWT"])
    token = jwt.encode({"alg": "HS256"}, {"sub": "a"}, secret)
    expect(jwt.decode(token, secret, algorithms=["HS256"]).claims, {"sub": "a"}, "what a JWT says")
    page.choose("length", 33)
    expect(page("document.querySelectorAll('#presets [aria-pressed=true]').length"), 0, "pressed presets after another change")
    expect(page.text("purpose"), "", "the purpose after another change")


def test_injected_scripts_do_not_run(daemon, browser):
    page = browser.ready(daemon.address)
    page(
        "const script = document.createElement('script'); script.textContent = 'globalThis.ran = true'; document.head.append(script)",
        fails=True,
    )
    expect(page("globalThis.ran === undefined"), True, "whether an injected script did not run")
    page("fetch('http://127.0.0.1:9/').catch(() => { globalThis.refused = true })")
    page.until("globalThis.refused")
    assert any("Content Security Policy" in problem for problem in page.problems()), "expected an error of the Content Security Policy"


def test_page_works_below_another_path(daemon, browser):
    """As behind a proxy that serves the page at /keys/."""

    def prepare(page):
        page.respond(f"http://{HOST}/*", lambda request: proxied(daemon, request, "/keys"))

    page = browser.ready(f"http://{HOST}/keys/", prepare)
    assert re.fullmatch("[0-9a-f]{64}", generate(page)), page.text("keys")
    expect(page.text("curl"), f"curl -fsS 'http://{HOST}/keys/key/32?format=hex'", "the shell command")


@pytest.mark.tools("openssl")
def test_page_warns_if_keys_cross_the_network_in_clear(daemon, browser, tmp_path):
    port = daemon.authority.split(":")[1]
    certificates.self_signed(tmp_path / "tls.key", tmp_path / "tls.pem", names=f"DNS:{HOST}")
    (tmp_path / "tls.pem").chmod(0o600)
    with Daemon(tmp_path, f'tls-cert = "{tmp_path}/tls.pem"\ntls-key = "{tmp_path}/tls.key"\n') as encrypted:
        for address, is_clear in [
            (f"http://{HOST}:{port}", True),
            (f"http://127.0.0.1:{port}", False),
            (f"http://localhost:{port}", False),
            (f"https://{HOST}:{encrypted.authority.split(':')[1]}", False),
        ]:
            page = browser.ready(address, lambda page: page.send("Security.setIgnoreCertificateErrors", ignore=True))
            expect(page.is_hidden("warning"), not is_clear, f"{address}: whether the warning is hidden")
            generate(page)


def test_links_work_without_javascript(daemon, browser):
    page = browser.open(daemon.address, lambda page: page.send("Emulation.setScriptExecutionDisabled", value=True))
    expect((page.is_hidden("form"), page.is_hidden("result")), (True, True), "whether form and result, which need JavaScript, are hidden")
    links = page("[...document.querySelectorAll('noscript a')].map((link) => [link.textContent, link.getAttribute('href')])")
    expect(dict(links), {name: f"key/32?format={form}" for name, form in PRESETS.items()} | {"Password": "password/24"}, "links")
    for name, _ in links:
        page.navigate(daemon.address)
        page.until("document.links.length")
        page(f"[...document.links].find((link) => link.textContent === {name!r}).click()")
        browser.event("Page.loadEventFired", page.session)
        key = page("document.body.innerText").strip()
        assert re.fullmatch(r"[0-9a-f]{64}|[\w+/-]{43}=?|\w{24}", key), f"{name}: {key}"


def test_token_field_appears_if_tokens_are_required(daemon, browser, tmp_path):
    page = browser.ready(daemon.address)
    expect(page.is_hidden("token-field"), True, "whether the token field is hidden without tokens")
    expect(page.is_hidden("header"), True, "whether the explanation of the token file is hidden without tokens")
    token, config = tokens(tmp_path, "--max-size", "64")
    with Daemon(tmp_path, config) as guarded:
        page = browser.ready(guarded.address)
        expect(page.is_hidden("token-field"), False, "whether the token field is hidden with tokens")
        page.click("get")
        page.until("document.getElementById('token-error').textContent === 'A bearer token is required'")
        expect(page("[document.activeElement.id, token.ariaInvalid ?? token.getAttribute('aria-invalid')]"), ["token", "true"], "the field")
        page.choose("token", "a token\N{EURO SIGN}")
        page.click("get")
        expect(
            page.text("token-error"), "A token has only ASCII characters, without spaces.", "the error of a token that no header can hold"
        )
        page.choose("token", f" {token}\n")
        expect(page.text("token-error"), "", "the error after another input")
        line = page.text("curl")
        assert "-H @token.header" in line and token not in line and "Authorization" not in line, line
        expect(page.is_hidden("header"), False, "whether the explanation of the token file is hidden")
        header = tmp_path / "token.header"
        header.write_text(f"Authorization: Bearer {token}\n")
        ran = subprocess.run(["sh", "-ec", line], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        assert re.fullmatch("[0-9a-f]{64}\n", ran.stdout), "expected curl to send the token from the file"
        generate(page)
        page.choose("length", 65)
        page.click("get")
        page.until("document.getElementById('length-error').textContent === 'Length exceeds maximum size of 64'")


def test_token_field_appears_when_tokens_become_required(browser, tmp_path):
    token, config = tokens(tmp_path)
    with peers.HeldPort() as port:
        with Daemon(tmp_path, port=port.number) as open_to_all:
            page = browser.ready(open_to_all.address)
        with Daemon(tmp_path, config, port=port.number):
            page.click("get")
            page.until("document.getElementById('token-error').textContent === 'A bearer token is required'")
            expect((page.is_hidden("token-field"), page.is_hidden("header")), (False, False), "whether field and explanation are hidden")
            page.choose("token", token)
            generate(page)


def test_page_says_when_to_try_again(browser, tmp_path):
    with Daemon(tmp_path, settings={"rate-bytes": 1, "rate-burst": "30m"}) as limited:
        page = browser.ready(limited.address)
        page.choose("length", 1024)
        generate(page)
        page.click("get")
        page.until("/[.] Try again in [0-9]+ s[.]$/.test(document.getElementById('note').textContent)")
        expect(page.text("keys"), "", "the result")


def test_page_retries_if_the_description_is_missing(daemon, browser):
    page = browser.open(daemon.address, lambda page: page.send("Network.setBlockedURLs", urls=["*/openapi.json"]))
    page.until("document.getElementById('state').textContent === 'The service did not describe its limits'")
    expect(page("[document.getElementById('get').disabled, presets.disabled]"), [True, True], "whether the buttons are disabled")
    page.send("Network.setBlockedURLs", urls=[])
    page("letPass(11_000)")
    page.until("!document.getElementById('get').disabled && !presets.disabled")


def test_page_reports_a_stopped_service(browser, tmp_path):
    with peers.HeldPort() as port:  # holds the port, so that no other process can listen on it
        with Daemon(tmp_path, port=port.number) as stopping:
            page = browser.ready(stopping.address)
            generate(page)
        page("letPass(11_000)")
        page.until("document.getElementById('state').textContent === 'No response from the service'")
        page.click("get")
        page.until("document.getElementById('note').textContent === 'No response from the service.'")
        expect(page.text("keys"), "", "the result")


# The states of the page, for the tests of its appearance. Each is reached from the one before.
STATES = {
    "new": lambda page: None,
    "result": generate,
    "error": lambda page: page.choose("length", "1e2"),
    "preset": lambda page: choose_preset(page, "WireGuard"),
    "preset result": generate,
    "options": lambda page: page("document.getElementById('options').open = true"),
    "batch": lambda page: (page.choose("count", 1000), generate(page)),
    "error of the count": lambda page: page.choose("count", "0"),
    "raw result": lambda page: (page.choose("format", "raw"), generate(page)),
    "password": lambda page: (choose_kind(page, "password"), generate(page)),
    "error of the service": lambda page: page("setText('note', 'The generator has failed. Try again in 10 s.', 'bad')"),
    "words": lambda page: page("for (const details of document.querySelectorAll('details')) details.open = true"),
    "wrong token": lambda page: (page.choose("token", "ks_wrong"), page.click("get"), page.until("token.matches('[aria-invalid=true]')")),
}


@pytest.fixture(scope="module")
def clear_with_tokens(tmp_path_factory):
    """The address of a daemon that offers everything the page can show: without encryption, and with a token that page gets here."""
    directory = tmp_path_factory.mktemp("tokens")
    token, config = tokens(directory)
    with Daemon(directory, config) as daemon:
        yield f"http://{HOST}:{daemon.authority.split(':')[1]}", token


def states(browser, clear_with_tokens, *size):
    address, token = clear_with_tokens
    page = browser.ready(address)
    page.resize(*size)
    page.choose("token", token)
    for name, reach in STATES.items():
        reach(page)
        yield name, page


def test_the_button_does_not_move(browser, clear_with_tokens):
    for width in (320, 800):
        found = {}
        for name, page in states(browser, clear_with_tokens, width, 700):
            found[name] = page("(({ x, y, width, height }) => [x, y + scrollY, width, height])(element('get').getBoundingClientRect())")
        assert len({tuple(place) for place in found.values()}) == 1, f"{width} px wide: {found}"


def test_the_page_fits_a_phone(browser, clear_with_tokens):
    """At 320 px, which is also a zoom of 400 % on a common screen: no horizontal scrolling, no overlap, and targets of 44 px."""
    for name, page in states(browser, clear_with_tokens, 320, 640):
        expect(page("document.documentElement.scrollWidth"), 320, f"{name}: width of the page")
        expect(page(OVERLAPS), [], f"{name}: elements that overlap or leave the page")
        expect(page(SMALL_TARGETS), [], f"{name}: targets below 44 px")


VISIBLE = (
    "[...document.querySelectorAll('button, input, select, summary, h1, h2, p, pre, dt, dd, legend:not(.spoken), .choice, #countdown')]"
    ".filter((each) => each.checkVisibility({ visibilityProperty: true }) && each.getBoundingClientRect().height)"
)
OVERLAPS = f"""(() => {{
  const found = [], elements = {VISIBLE};
  const text = (each) => each.id || each.textContent.slice(0, 20);
  for (const each of elements) {{
    const a = each.getBoundingClientRect();
    const isCut = each.matches('button, p, pre, summary') && each.scrollWidth > each.clientWidth + 1;
    if (a.left < 0 || a.right > innerWidth || isCut) found.push(text(each));
    for (const other of elements) {{
      const b = other.getBoundingClientRect();
      const overlap = a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
      if (each !== other && overlap && !each.contains(other) && !other.contains(each)) found.push(`${{text(each)}} and ${{text(other)}}`);
    }}
  }}
  return found;
}})()"""
SMALL_TARGETS = f"""{VISIBLE}
  .filter((each) => each.matches('button, input:not([type=radio]), select, summary, .choice'))
  .filter((each) => {{ const {{ width, height }} = each.getBoundingClientRect(); return Math.min(width, height) < 44; }})
  .map((each) => each.id || each.textContent)"""


@pytest.mark.tools("npm")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_has_no_finding(browser, clear_with_tokens, scheme):
    library = (npm.installed("axe", "KEY_SERVICE_AXE_TOOLS", NPM) / "axe-core/axe.min.js").read_text()
    for name, page in states(browser, clear_with_tokens, 800, 900):
        page.color_scheme(scheme)
        evaluate = page.isolated(library)
        result = evaluate("axe.run({ rules: { 'target-size': { enabled: true } } })")
        passed = {each["id"] for each in result["passes"]}
        expected = {"color-contrast", "label", "target-size"}
        assert passed >= expected, f"{name}: expected axe to have checked {expected}, found {passed}"
        findings = [
            f"{scheme}, {name}: {each['id']}: {each['help']}: {node['html']}"
            for each in result["violations"] + result["incomplete"]
            for node in each["nodes"]
        ]
        assert not findings, "\n".join(findings)


def test_page_follows_the_system_color_scheme(daemon, browser):
    page = browser.ready(daemon.address)
    for scheme in ("light", "dark"):
        page.color_scheme(scheme)
        colors = page("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
        light, dark = (sum(int(number) for number in re.findall(r"\d+", color)[:3]) > 3 * 128 for color in colors)
        expect(
            (light, dark),
            (scheme == "dark", scheme == "light"),
            f"whether text and background are light with the scheme {scheme}: {colors}",
        )


EXAMPLES = {"key": "0123456789abcdef" * 4, "password": "ThisPasswordIsAnExampleNotForUse"}
# picture: width, height, color scheme, and what it shows
PICTURES = {
    "light": (720, 800, "light", lambda page: choose_preset(page, "Session secret")),
    "dark": (720, 800, "dark", lambda page: choose_kind(page, "password")),
    "narrow": (390, 880, "light", lambda page: None),
}
SCALE = 1.5
SOURCE = REPOSITORY / "src/http/page.html"


@pytest.mark.tools("pngquant")
def test_pictures_show_the_page(daemon, browser):
    """The pictures of docs/page.md were made of this page, with an example in place of a key. With UPDATE_DOCUMENTS they are made again."""

    def respond(request):
        status, headers, body = proxied(daemon, request)
        kind = request["url"].split("/")[3]
        return status, headers, EXAMPLES[kind].encode() if kind in EXAMPLES else body

    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    for name, (width, height, scheme, reach) in PICTURES.items():
        page = browser.ready(f"https://{HOST}/", lambda page: page.respond(f"https://{HOST}/*", respond))
        page.resize(width, height, SCALE)
        page.color_scheme(scheme)
        reach(page)
        page("document.activeElement.blur()")
        assert generate(page) in EXAMPLES.values(), "expected an example"
        shot = base64.b64decode(page.send("Page.captureScreenshot", format="png")["data"])
        drawn = subprocess.run(["pngquant", "--speed=1", "24", "-"], input=shot, capture_output=True, timeout=TIMEOUT, check=True).stdout
        picture = REPOSITORY / f"docs/page-{name}.png"
        if "UPDATE_DOCUMENTS" in os.environ:
            picture.write_bytes(marked(drawn, digest))
        stored = picture.read_bytes()
        expect(source_of(stored), digest, f"{picture}: digest of its page; `UPDATE_DOCUMENTS=1 just e2e -k pictures` makes it again")
        for each in (drawn, stored):
            expect(struct.unpack(">II", each[16:24]), (SCALE * width, SCALE * height), f"{picture}: width and height")
            assert len(each) < 60_000, f"{picture}: expected less than 60 kB, found {len(each)} bytes"


END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of every PNG


def marked(png, digest):
    """The picture with a text chunk (PNG specification, section 11.3.3) that has the digest of its page."""
    text = b"tEXtSource\0" + digest.encode()
    assert png.endswith(END), png[-12:]
    return png.removesuffix(END) + struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text)) + END


def source_of(png):
    found = re.search(rb"tEXtSource\0([0-9a-f]{64})", png)
    return found and found[1].decode()


def proxied(daemon, request, prefix=""):
    """Status, headers and body of the daemon's response to a request of the browser for a path below `prefix`."""
    path = re.sub(r"^https?://[^/]+", "", request["url"])
    if not path.startswith(prefix):
        return 404, [], b""
    path = path.removeprefix(prefix)
    with urllib.request.urlopen(urllib.request.Request(daemon.address + path, headers=request["headers"]), timeout=TIMEOUT) as response:
        return response.status, response.getheaders(), response.read()


def key_requests(page):
    return [url for url in page.requests() if url.startswith(("/key/", "/password/"))]


def tokens(directory, *options):
    """A new token, and the configuration of a daemon that requires it."""
    command = [binary(), "token", "new", "--name", "people", *options]
    made = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    token, line = made.stdout.split("\n", 1)
    path = directory / "tokens"
    path.write_text(line)
    path.chmod(0o600)
    return token, f'tokens-file = "{path}"\n'


def keys_of(form, text):
    if form == "json":
        return [key.get("key") or key["password"] for key in json.loads(text)]
    if form == "jwk":
        return [key["k"] for key in json.loads(text)["keys"]]
    return text.splitlines()
