"""The page at / in a real browser, by keyboard, against a real daemon."""

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


def test_the_service_is_said_to_be_well(daemon, browser):
    page = browser.open(daemon.address)
    page.until("document.getElementById('state').textContent === 'The service is well'")
    page.until("!document.getElementById('get').disabled")
    expect(page.problems(), [], "what the browser complains of")
    expect(page.requests() - {"/", "/health", "/openapi.json"}, set(), "what was loaded")


def test_a_key_is_had_by_keyboard_alone(daemon, browser):
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


def test_what_is_chosen_is_what_comes_and_what_the_shell_line_says(daemon, browser, tmp_path):
    page = browser.ready(daemon.address)
    document = json.loads(fetch(f"{daemon.address}/openapi.json"))
    for kind in ("key", "password"):
        page(f"document.querySelector('[value={kind}]').click()")
        parameters = {p["name"]: p["schema"] for p in document["paths"][f"/{kind}/{{length}}"]["get"]["parameters"]}
        expect(
            page("[...document.getElementById('format').options].map((option) => option.value)"), parameters["format"]["enum"], "formats"
        )
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
            ran = subprocess.run(["sh", "-ec", line], capture_output=True, text=True, timeout=TIMEOUT, check=True)
            others = keys_of(form, ran.stdout)
            expect([len(key) for key in others], [len(key) for key in keys], f"{kind} {form}: lengths by {line}")
            assert not set(keys) & set(others), "keys are drawn anew"
            page("document.getElementById('remove').click()")
    page("document.querySelector('[value=key]').click()")
    page.choose("format", "raw")
    expect(page("document.getElementById('get').disabled"), True, "raw keys are for files")
    line = page("document.getElementById('curl').textContent")
    subprocess.run(["sh", "-ec", line], cwd=tmp_path, timeout=TIMEOUT, check=True)
    file = tmp_path / "key"
    expect((file.stat().st_size, stat.S_IMODE(file.stat().st_mode)), (16, 0o600), "bytes of the file, and its mode")
    file.unlink()
    ran = subprocess.run(["sh", "-ec", line.replace("/key/16", "/key/0")], cwd=tmp_path, capture_output=True, timeout=TIMEOUT, check=False)
    expect((ran.returncode, file.exists()), (22, False), "status of curl where there is an error, and whether it is stored")
    page.choose("length", 0)
    expect(page("document.getElementById('get').disabled"), True, "no length of 0")
    expect(page.problems(), [], "what the browser complains of")


def test_a_key_is_gone_after_a_minute_or_when_it_is_told_to(daemon, browser):
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


def test_it_is_copied_without_a_clipboard_of_the_page_s(daemon, browser):
    page = browser.ready(daemon.address)
    page("document.getElementById('get').click()")
    page.until("!document.getElementById('result').hidden")
    page(
        "addEventListener('copy', () => { globalThis.copied = getSelection().toString(); }); "
        "Object.defineProperty(navigator, 'clipboard', { value: undefined }); document.getElementById('copy').focus()"
    )
    page.key("Enter", "\r")
    page.until("document.getElementById('note').textContent.startsWith('Copied')")
    expect(page("globalThis.copied"), page("document.getElementById('keys').textContent"), "what was copied")


def test_a_script_of_somebody_else_s_does_not_run(daemon, browser):
    page = browser.ready(daemon.address)
    page(
        "const script = document.createElement('script'); script.textContent = 'globalThis.ran = true'; document.head.append(script)",
        fails=True,
    )
    expect(page("globalThis.ran === undefined"), True, "an injected script does nothing")
    page("fetch('http://127.0.0.1:9/').catch(() => { globalThis.refused = true })")
    page.until("globalThis.refused")
    assert any("Content Security Policy" in problem for problem in page.problems()), "the policy is what stopped them"


def test_it_is_dark_where_the_system_is(daemon, browser):
    page = browser.ready(daemon.address)
    for scheme in ("light", "dark"):
        page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colors = page("getComputedStyle(document.body).color")
        light = sum(int(number) for number in re.findall(r"\d+", colors)[:3]) > 3 * 128
        expect(light, scheme == "dark", f"whether text is light where the system is {scheme} ({colors})")


def test_a_field_for_a_token_is_there_where_one_is_asked_for(daemon, browser, tmp_path):
    page = browser.ready(daemon.address)
    expect(page("document.getElementById('token-field').hidden"), True, "without tokens there is no field")
    expect(page("document.getElementById('header').hidden"), True, "nor a file for one")
    made = subprocess.run([binary(), "token", "new", "--name", "people"], env=environment(), capture_output=True, text=True, check=True)
    token, line = made.stdout.split("\n", 1)
    path = tmp_path / "tokens"
    path.write_text(line)
    path.chmod(0o600)
    with Daemon(tmp_path, f'tokens-file = "{path}"\n') as guarded:
        page = browser.ready(guarded.address)
        expect(page("document.getElementById('token-field').hidden"), False, "with tokens there is")
        page("document.getElementById('get').click()")
        page.until("document.getElementById('note').textContent === 'A bearer token is needed'")
        page.choose("token", token)
        line = page("document.getElementById('curl').textContent")
        assert "-H @token.header" in line and token not in line and "Authorization" not in line, line
        expect(page("document.getElementById('header').hidden"), False, "whether the file is not explained")
        header = tmp_path / "token.header"
        header.write_text(f"Authorization: Bearer {token}\n")
        ran = subprocess.run(["sh", "-ec", line], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        assert re.fullmatch("[0-9a-f]{64}\n", ran.stdout), "curl takes the token from the file"
        page("document.getElementById('get').click()")
        page.until("!document.getElementById('result').hidden")


def test_a_service_that_is_gone_is_said_to_be(browser, tmp_path):
    with peers.HeldPort() as port:  # nothing else may answer there afterwards
        with Daemon(tmp_path, port=port.number) as leaving:
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
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        return response.read()
