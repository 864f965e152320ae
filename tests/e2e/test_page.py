"""The web page at /, in a real browser, operated by keyboard, with a real daemon."""

import json
import re
import stat
import subprocess
import urllib.request

import pytest
from support import peers
from support.conditions import TIMEOUT, expect
from support.daemon import Daemon, binary, environment

pytestmark = [pytest.mark.tools("chromium", "curl"), pytest.mark.xdist_group("page")]


def test_page_shows_that_the_service_is_healthy(daemon, browser):
    page = browser.open(daemon.address)
    page.until("document.getElementById('state').textContent === 'The service is healthy'")
    page.until("!document.getElementById('get').disabled")
    expect(page.problems(), [], "errors in the browser")
    expect(page.requests() - {"/", "/health", "/openapi.json"}, set(), "URLs that the page requested, apart from its own")


def test_keyboard_alone_is_enough_to_get_a_key(daemon, browser):
    page = browser.ready(daemon.address)
    for _ in range(3):  # kind, length, format
        page.key("Tab")
    expect(page("document.activeElement.id"), "format", "the element after three tabs")
    page("document.getElementById('length').focus()")
    page.key("Enter", "\r")
    page.until("!document.getElementById('result').hidden")
    key = page("document.getElementById('keys').textContent")
    assert re.fullmatch("[0-9a-f]{64}", key), key
    page("document.getElementById('get').focus()")
    page.key("Tab")
    expect(page("document.activeElement.id"), "keys", "the element after the button")
    page.key("Tab")
    expect(page("document.activeElement.id"), "copy", "the element after the keys")
    page("document.getElementById('length').focus()")
    page.key("Enter", "\r")
    page.until(f"!['', '{key}'].includes(document.getElementById('keys').textContent)")
    expect(page.problems(), [], "errors in the browser")


def test_keys_and_shell_command_match_the_form(daemon, browser, tmp_path):
    page = browser.ready(daemon.address)
    document = json.loads(fetch(f"{daemon.address}/openapi.json"))
    for kind in ("key", "password"):
        page(f"document.querySelector('[value={kind}]').click()")
        parameters = {p["name"]: p["schema"] for p in document["paths"][f"/{kind}/{{length}}"]["get"]["parameters"]}
        expect(
            page("[...document.getElementById('format').options].map((option) => option.value)"), parameters["format"]["enum"], "formats"
        )
        expect(page("document.getElementById('alphabet-field').hidden"), kind == "key", "whether the alphabet field is hidden")
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
            ran = subprocess.run(["sh", "-ec", line], capture_output=True, text=True, timeout=TIMEOUT, check=True)
            others = keys_of(form, ran.stdout)
            expect([len(key) for key in others], [len(key) for key in keys], f"{kind} {form}: lengths by {line}")
            assert not set(keys) & set(others), "expected new keys from the shell command"
            page("document.getElementById('remove').click()")
    page("document.querySelector('[value=key]').click()")
    page.choose("format", "raw")
    expect(page("document.getElementById('get').disabled"), True, "whether the button is disabled for raw keys, which need a file")
    line = page("document.getElementById('curl').textContent")
    subprocess.run(["sh", "-ec", line], cwd=tmp_path, timeout=TIMEOUT, check=True)
    file = tmp_path / "key"
    expect((file.stat().st_size, stat.S_IMODE(file.stat().st_mode)), (16, 0o600), "size and mode of the file")
    file.unlink()
    ran = subprocess.run(["sh", "-ec", line.replace("/key/16", "/key/0")], cwd=tmp_path, capture_output=True, timeout=TIMEOUT, check=False)
    expect((ran.returncode, file.exists()), (22, False), "exit status of curl for an error response, and whether a file was written")
    page.choose("length", 0)
    expect(page("document.getElementById('get').disabled"), True, "whether the button is disabled for length 0")
    expect(page.problems(), [], "errors in the browser")


def test_page_removes_keys_after_a_minute_or_on_request(daemon, browser):
    page = browser.ready(daemon.address)
    contents = "document.documentElement.outerHTML + [...document.querySelectorAll('input')].map((input) => input.value)"
    for remove in ("letPass(11_000)", "document.getElementById('remove').click()"):
        page("document.getElementById('get').click()")
        page.until("!document.getElementById('result').hidden")
        key = page("document.getElementById('keys').textContent")
        assert key and key in page(contents), "expected the key in the page"
        page("letPass(50_000)")
        assert key in page(contents), "expected the key in the page after 50 s"
        page(remove)
        assert key not in page(contents), "expected the key to be removed"
        expect(page("document.getElementById('result').hidden"), True, "whether the result is hidden")
    expect(
        page("[localStorage.length, sessionStorage.length, document.cookie]"),
        [0, 0, ""],
        "entries in local and session storage, and cookies",
    )


def test_keys_are_copied_without_the_clipboard_api(daemon, browser):
    page = browser.ready(daemon.address)
    page("document.getElementById('get').click()")
    page.until("!document.getElementById('result').hidden")
    page(
        "addEventListener('copy', () => { globalThis.copied = getSelection().toString(); }); "
        "Object.defineProperty(navigator, 'clipboard', { value: undefined }); document.getElementById('copy').focus()"
    )
    page.key("Enter", "\r")
    page.until("document.getElementById('note').textContent.startsWith('Copied')")
    expect(page("globalThis.copied"), page("document.getElementById('keys').textContent"), "the copied text")


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


def test_page_follows_the_system_color_scheme(daemon, browser):
    page = browser.ready(daemon.address)
    for scheme in ("light", "dark"):
        page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colors = page("getComputedStyle(document.body).color")
        light = sum(int(number) for number in re.findall(r"\d+", colors)[:3]) > 3 * 128
        expect(light, scheme == "dark", f"whether the text is light with the color scheme {scheme} ({colors})")


def test_token_field_appears_if_tokens_are_required(daemon, browser, tmp_path):
    page = browser.ready(daemon.address)
    expect(page("document.getElementById('token-field').hidden"), True, "whether the token field is hidden without tokens")
    expect(page("document.getElementById('header').hidden"), True, "whether the explanation of the token file is hidden without tokens")
    made = subprocess.run([binary(), "token", "new", "--name", "people"], env=environment(), capture_output=True, text=True, check=True)
    token, line = made.stdout.split("\n", 1)
    path = tmp_path / "tokens"
    path.write_text(line)
    path.chmod(0o600)
    with Daemon(tmp_path, f'tokens-file = "{path}"\n') as guarded:
        page = browser.ready(guarded.address)
        expect(page("document.getElementById('token-field').hidden"), False, "whether the token field is hidden with tokens")
        page("document.getElementById('get').click()")
        page.until("document.getElementById('note').textContent === 'A bearer token is required'")
        page.choose("token", token)
        line = page("document.getElementById('curl').textContent")
        assert "-H @token.header" in line and token not in line and "Authorization" not in line, line
        expect(page("document.getElementById('header').hidden"), False, "whether the explanation of the token file is hidden")
        header = tmp_path / "token.header"
        header.write_text(f"Authorization: Bearer {token}\n")
        ran = subprocess.run(["sh", "-ec", line], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        assert re.fullmatch("[0-9a-f]{64}\n", ran.stdout), "expected curl to send the token from the file"
        page("document.getElementById('get').click()")
        page.until("!document.getElementById('result').hidden")


def test_page_reports_a_stopped_service(browser, tmp_path):
    with peers.HeldPort() as port:  # holds the port, so that no other process can listen on it
        with Daemon(tmp_path, port=port.number) as stopping:
            page = browser.ready(stopping.address)
        page("letPass(11_000)")
        page.until("document.getElementById('state').textContent === 'No response from the service'")
        page("document.getElementById('get').click()")
        page.until("document.getElementById('note').textContent === 'No response from the service.'")


def keys_of(form, text):
    if form == "json":
        return [key.get("key") or key["password"] for key in json.loads(text)]
    if form == "jwk":
        return [key["k"] for key in json.loads(text)["keys"]]
    return text.splitlines()


def fetch(url):
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        return response.read()
