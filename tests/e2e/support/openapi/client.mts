// Every format through a generated TypeScript client; checked and run by tests/e2e/test_openapi.py.
import { strict as assert } from "node:assert";
import createClient from "openapi-fetch";
import type { components, paths } from "./key-service.js";

const baseUrl = process.argv[2]!;
const client = createClient<paths>({ baseUrl });
const json = createClient<paths, "application/json">({ baseUrl });
type Encoding = "hex" | "base64" | "base64url";

for (const length of [1, 16, 32, 33, 4096, 100_000]) { // the last one is streamed
    const path = { length };
    for (const query of [{}, { format: "raw" as const }]) {
        const { data, error } = await client.GET("/key/{length}", { params: { path, query }, parseAs: "arrayBuffer" });
        assert.equal(error, undefined);
        assert.equal(data!.byteLength, length);
    }
    for (const format of ["hex", "base64", "base64url"] satisfies Encoding[]) {
        const { data } = await client.GET("/key/{length}", { params: { path, query: { format } }, parseAs: "text" });
        const text: string = data!;
        assert.ok(text.endsWith("\n"));
        assert.equal(Buffer.from(text.trim(), format).length, length, format);
    }
    const one = await json.GET("/key/{length}", { params: { path, query: { format: "json" } } });
    assert.ok(one.data && !Array.isArray(one.data));
    const encoding: "base64" = one.data.encoding;
    assert.equal(Buffer.from(one.data.key, encoding).length, length);
    const jwk = await client.GET("/key/{length}", { params: { path, query: { format: "jwk" } } });
    const { kty, k } = jwk.data as components["schemas"]["Jwk"];
    assert.equal(kty, "oct");
    assert.equal(Buffer.from(k, "base64url").length, length);
}

const path = { length: 32 };
const lines = await client.GET("/key/{length}", { params: { path, query: { format: "hex", count: 5 } }, parseAs: "text" });
assert.equal(new Set(lines.data!.trim().split("\n")).size, 5);
const batch = await json.GET("/key/{length}", { params: { path, query: { format: "json", count: 5 } } });
assert.ok(Array.isArray(batch.data));
assert.equal(new Set(batch.data.map((one) => one.key)).size, 5);
const set = await client.GET("/key/{length}", { params: { path, query: { format: "jwk", count: 5 } } });
assert.equal((set.data as components["schemas"]["JwkSet"]).keys.length, 5);

const password = await client.GET("/password/{length}", { params: { path, query: { alphabet: "digits" } }, parseAs: "text" });
assert.match(password.data!, /^[0-9]{32}\n$/);
const worth = await json.GET("/password/{length}", { params: { path, query: { format: "json" } } });
assert.ok(worth.data && !Array.isArray(worth.data));
const alphabet: "alnum" | "ascii" | "digits" | "hex" | "unambiguous" = worth.data.alphabet;
assert.equal(alphabet, "alnum");
assert.equal(worth.data.password.length, 32);

for (const [length, status] of [[0, 400], [100_001, 413]] as const) {
    const { data, error, response } = await client.GET("/key/{length}", { params: { path: { length } }, parseAs: "arrayBuffer" });
    assert.equal(data, undefined);
    const detail: string = error!.detail;
    assert.ok(detail.startsWith("Length"), detail);
    assert.deepEqual([error!.status, response.status], [status, status]);
}
assert.equal((await client.GET("/readyz", { parseAs: "text" })).data, "OK");
assert.equal((await client.HEAD("/key/{length}", { params: { path } })).response.headers.get("content-length"), "32");
