"""Every format through a generated Python client; run by tests/e2e/test_openapi.py."""

import asyncio
import base64
import json
import re
import sys

from key_service import Client
from key_service.api.keys import get_key, get_password, head_key
from key_service.api.state import get_description, get_health, get_index, get_livez, get_readyz
from key_service.models import GetKeyFormat, GetPasswordAlphabet, GetPasswordFormat, Jwk, JwkSet, Key, Password, Problem

LENGTHS = [1, 16, 32, 33, 4096, 100_000]  # the last one is streamed
client = Client(sys.argv[1], raise_on_unexpected_status=True)


def base64url(text):
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars="-_", validate=True)


def of_json(text):
    parsed = Key.from_dict(json.loads(text))
    assert parsed.encoding == "base64", parsed
    key = base64.b64decode(parsed.key, validate=True)
    assert parsed.length == len(key), parsed
    return key


DECODE = {
    GetKeyFormat.RAW: lambda content: content,
    GetKeyFormat.HEX: lambda content: bytes.fromhex(content.decode().removesuffix("\n")),
    GetKeyFormat.BASE64: lambda content: base64.b64decode(content.decode().removesuffix("\n"), validate=True),
    GetKeyFormat.BASE64URL: lambda content: base64url(content.decode().removesuffix("\n")),
    GetKeyFormat.JSON: of_json,
    GetKeyFormat.JWK: lambda content: base64url(Jwk.from_dict(json.loads(content)).k),
}
assert set(DECODE) == set(GetKeyFormat)
for form, decode in DECODE.items():
    for length in LENGTHS:
        for _ in range(3):  # random bytes are now and then UTF-8
            response = get_key.sync_detailed(length, client=client, format_=form)
            assert response.status_code == 200 and response.parsed == response.content, form
            assert len(decode(response.parsed)) == length, (form, length)
assert len(get_key.sync(16, client=client)) == 16
assert len(asyncio.run(get_key.asyncio(16, client=client, format_=GetKeyFormat.HEX))) == 33

for form in set(DECODE) - {GetKeyFormat.RAW}:
    content = get_key.sync(32, client=client, format_=form, count=5)
    if form == GetKeyFormat.JWK:
        keys = [base64url(jwk.k) for jwk in JwkSet.from_dict(json.loads(content)).keys]
    elif form == GetKeyFormat.JSON:
        keys = [of_json(json.dumps(key)) for key in json.loads(content)]
    else:
        keys = [DECODE[form](line + b"\n") for line in content.splitlines()]
    assert len(set(keys)) == 5 and {len(key) for key in keys} == {32}, form

for alphabet in GetPasswordAlphabet:
    text = get_password.sync(24, client=client, alphabet=alphabet)
    assert len(text) == 25 and text.endswith("\n"), text
    lines = get_password.sync(24, client=client, alphabet=alphabet, count=5)
    assert len(set(lines.split())) == 5, lines
    parsed = Password.from_dict(json.loads(get_password.sync(24, client=client, alphabet=alphabet, format_=GetPasswordFormat.JSON)))
    assert (len(parsed.password), parsed.alphabet.value) == (24, alphabet.value), parsed
assert re.fullmatch("[0-9A-Za-z]{24}\n", get_password.sync(24, client=client))

for problem, status in [
    (get_key.sync(0, client=client), 400),
    (get_key.sync(100_001, client=client), 413),
    (get_key.sync(16, client=client, count=2), 400),
    (get_key.sync(16, client=client, format_=GetKeyFormat.HEX, count=1025), 400),
    (get_password.sync(1025, client=client), 413),
]:
    assert isinstance(problem, Problem) and problem.status == status and problem.detail, problem

assert head_key.sync_detailed(32, client=client).content == b""
for state in (get_health, get_livez, get_readyz):
    assert state.sync(client=client) == "OK"
assert get_description.sync(client=client)["openapi"] == "3.1.0"
assert "/key/" in get_index.sync(client=client)
