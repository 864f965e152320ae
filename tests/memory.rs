//! The daemon's memory holds no part of a key that has been sent.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use common::credential::{fetch, start};
use common::formats::{FORMATS, decode_batch, decode_hex, decode_key};
use common::tls::{Authority, client_config, connect};
use common::{Client, Daemon, Process, TempDirectory, find, get, key_service, request, run_to_end};
use rustls::version::{TLS12, TLS13};

/// The number of consecutive key bytes that count as a match: 16 bytes never match by chance.
const WINDOW: usize = 16;

/// All memory of a process, as runs of resident or swapped pages. Pages that were never touched are skipped.
fn memory(pid: u32) -> Vec<Vec<u8>> {
    let open =
        |name| File::open(format!("/proc/{pid}/{name}")).expect("a process may read the memory of its child");
    let (memory, pages) = (open("mem"), open("pagemap"));
    let page = rustix::param::page_size() as u64;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let regions = maps.lines().filter_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let is_special = ["[vvar", "[vsyscall"].iter().any(|name| rest.contains(name));
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        (rest.starts_with('r') && !is_special).then(|| (number(start), number(end)))
    });
    // proc_pid_pagemap(5): eight bytes for each page; the top two bits are set if it is in memory or in swap.
    let is_present = |entry: &[u8; 8]| u64::from_ne_bytes(*entry) >> 62 != 0;
    let runs = regions.flat_map(|(start, end)| {
        let mut entries = vec![0; usize::try_from((end - start) / page * 8).unwrap()];
        pages.read_exact_at(&mut entries, start / page * 8).unwrap();
        let (entries, _) = entries.as_chunks::<8>();
        let mut at = start;
        let runs = entries.chunk_by(|one, next| is_present(one) == is_present(next)).filter_map(|run| {
            let begin = at;
            at += run.len() as u64 * page;
            is_present(&run[0]).then_some((begin, at))
        });
        runs.collect::<Vec<_>>()
    });
    runs.filter_map(|(start, end)| {
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        memory.read_exact_at(&mut bytes, start).ok()?; // it may have been unmapped since
        Some(bytes)
    })
    .collect()
}

/// The number of `keys` of which the first, middle or last [`WINDOW`] bytes are in memory.
fn count_found(memory: &[Vec<u8>], keys: &[Vec<u8>]) -> usize {
    let windows = |key: &Vec<u8>| {
        let last = key.len() - WINDOW;
        [0, last / 2, last].map(|at| key[at..at + WINDOW].to_vec())
    };
    let wanted: Vec<(usize, Vec<u8>)> =
        keys.iter().enumerate().flat_map(|(n, key)| windows(key).map(|window| (n, window))).collect();
    // A table of the windows' first two bytes finds all of them in a single pass.
    let mut starts = vec![Vec::new(); 1 << 16];
    for (n, window) in &wanted {
        starts[usize::from(u16::from_ne_bytes([window[0], window[1]]))].push((*n, window));
    }
    let mut hits = vec![false; keys.len()];
    for region in memory {
        for (at, pair) in region.windows(2).enumerate() {
            for (n, window) in &starts[usize::from(u16::from_ne_bytes([pair[0], pair[1]]))] {
                hits[*n] |= region[at..].starts_with(window);
            }
        }
    }
    hits.into_iter().filter(|hit| *hit).count()
}

#[test]
fn the_scan_finds_a_known_text() {
    let daemon = Daemon::start(&[]);
    let mut client = Client::connect(daemon.keys());
    // Incomplete request headers that contain this mark stay in the daemon's buffer.
    let mark = b"0123456789abcdef-a-mark-that-must-be-found".to_vec();
    client.send("GET /key/32 HTTP/1.1\r\nHost: a\r\nX-Mark: ").send(&mark);
    common::until("the headers to be read", || {
        (count_found(&memory(daemon.pid()), std::slice::from_ref(&mark)) == 1).then_some(())
    });
}

#[test]
fn no_key_is_in_memory_after_its_response() {
    // 20 keys of each kind: directly from the kernel, expanded from a seed, and streamed in chunks.
    let daemon = Daemon::start(&[("MAX_SIZE", "1048576")]);
    for length in [16, 32, 64, 128, 129, 1024, 4096, 65_536, 300_000] {
        // A new connection, since the last scan may have taken longer than the idle timeout.
        let mut client = Client::connect(daemon.keys());
        let keys: Vec<_> =
            (0..20).map(|_| client.send(request(&format!("/key/{length}"))).response().body).collect();
        assert!(keys.iter().all(|key| key.len() == length));
        let memory = memory(daemon.pid());
        assert!(
            memory.iter().any(|region| find(region, b"application/octet-stream").is_some()),
            "the scan reads the memory"
        );
        // The client may have the key before the daemon has returned from its last write.
        common::until("the keys to be wiped", || {
            (count_found(&self::memory(daemon.pid()), &keys) == 0).then_some(())
        });
    }
}

/// The encoded keys in a text: runs of digits that are longer than any word in it.
fn encoded_keys(text: &str) -> Vec<Vec<u8>> {
    let is_digit = |c: char| c.is_ascii_alphanumeric() || "+/=-_".contains(c);
    let runs = text.split(|c| !is_digit(c)).filter(|run| run.len() > 2 * WINDOW);
    runs.map(|run| run.as_bytes().to_vec()).collect()
}

#[test]
fn no_raw_or_encoded_key_is_in_memory_after_its_response() {
    let daemon = Daemon::start(&[("MAX_SIZE", "1048576")]);
    for format in &FORMATS[1..] {
        for length in [32, 300_000] {
            // A new connection, since the last scan may have taken longer than the idle timeout.
            let mut client = Client::connect(daemon.keys());
            let responses: Vec<_> = (0..20)
                .map(|_| client.send(request(&format!("/key/{length}?format={format}"))).response())
                .collect();
            let mut secrets: Vec<_> = responses.iter().map(|response| decode_key(format, response)).collect();
            secrets.extend(responses.iter().flat_map(|response| encoded_keys(&response.text())));
            assert_eq!(secrets.len(), 40, "each key, raw and encoded");
            if length == 32 {
                let response = client.send(request(&format!("/key/32?format={format}&count=100"))).response();
                secrets.extend(decode_batch(format, &response));
                secrets.extend(encoded_keys(&response.text()));
                assert_eq!(secrets.len(), 240);
            }
            common::until("the keys to be wiped", || {
                (count_found(&memory(daemon.pid()), &secrets) == 0).then_some(())
            });
        }
    }
}

#[test]
fn no_password_is_in_memory_after_its_response() {
    let daemon = Daemon::start(&[]);
    for format in ["text", "json"] {
        for alphabet in ["alnum", "ascii"] {
            let mut client = Client::connect(daemon.keys());
            let path = format!("/password/100?alphabet={alphabet}&count=20&format={format}");
            let response = client.send(request(&path)).response();
            let secrets: Vec<_> = match format {
                "text" => response.text().lines().map(|line| line.as_bytes().to_vec()).collect(),
                _ => {
                    let json = response.json();
                    let all = json.as_array().unwrap().iter();
                    all.map(|one| one["password"].as_str().unwrap().as_bytes().to_vec()).collect()
                }
            };
            assert!(secrets.len() == 20 && secrets.iter().all(|secret| secret.len() == 100));
            common::until("the passwords to be wiped", || {
                (count_found(&memory(daemon.pid()), &secrets) == 0).then_some(())
            });
        }
    }
}

#[test]
fn no_credential_is_in_memory_after_it_was_sent() {
    let daemon = start("[credentials]\nhex = { format = \"hex\" }\nbig = { length = 4096 }\n", &[]);
    let mut secrets = Vec::new();
    for credential in ["raw", "hex", "big"] {
        secrets.extend((0..20).map(|_| fetch(&daemon.directory, "web.service", credential)));
    }
    assert!(secrets.iter().all(|secret| secret.len() >= 32));
    common::until("the credentials to be wiped", || {
        (count_found(&memory(daemon.pid()), &secrets) == 0).then_some(())
    });
}

#[test]
fn no_key_is_in_memory_after_its_connection_was_aborted() {
    let daemon = Daemon::start(&[("MAX_SIZE", "1073741824")]);
    let mut client = Client::connect(daemon.keys());
    client.send(request("/key/1073741824"));
    let mut received = vec![0; 4 << 20];
    std::io::Read::read_exact(&mut client.stream, &mut received).unwrap();
    drop(client);
    daemon.wait_for_metric("http_connections", 0.0);
    let begin = find(&received, b"\r\n\r\n").unwrap() + 4;
    let chunks: Vec<_> = received[begin..].chunks_exact(4096).map(<[u8]>::to_vec).collect();
    common::until("the chunks to be wiped", || {
        (count_found(&memory(daemon.pid()), &chunks) == 0).then_some(())
    });
}

#[test]
fn no_key_is_in_memory_after_it_was_sent_over_tls() {
    let authority = Authority::new();
    let settings = [("MAX_SIZE", "1073741824"), ("TLS_MIN_VERSION", "1.2")];
    let daemon = common::tls::daemon(&authority, &settings);
    for version in [&TLS13, &TLS12] {
        for length in [16, 32, 64, 128, 129, 1024, 4096, 16_384, 65_536, 300_000] {
            let mut client = connect(daemon.keys(), &client_config(&authority, &[version], None));
            let keys: Vec<_> =
                (0..20).map(|_| client.send(request(&format!("/key/{length}"))).response().body).collect();
            assert!(keys.iter().all(|key| key.len() == length));
            common::until("the keys to be wiped", || {
                (count_found(&memory(daemon.pid()), &keys) == 0).then_some(())
            });
        }
    }
}

#[test]
fn no_key_is_in_memory_after_its_tls_connection_was_aborted() {
    let authority = Authority::new();
    let daemon = common::tls::daemon(&authority, &[("MAX_SIZE", "1073741824")]);
    let mut client = connect(daemon.keys(), &client_config(&authority, &[&TLS13], None));
    client.send(request("/key/1073741824"));
    let mut received = vec![0; 4 << 20];
    std::io::Read::read_exact(&mut client.stream, &mut received).unwrap();
    drop(client);
    daemon.wait_for_metric("http_connections", 0.0);
    let begin = find(&received, b"\r\n\r\n").unwrap() + 4;
    let chunks: Vec<_> = received[begin..].chunks_exact(4096).map(<[u8]>::to_vec).collect();
    common::until("the chunks to be wiped", || {
        (count_found(&memory(daemon.pid()), &chunks) == 0).then_some(())
    });
}

#[test]
fn no_written_key_is_in_the_memory_of_the_command() {
    for format in ["raw", "hex", "json"] {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut command = key_service(&TempDirectory::new());
        command.args(["key", "1073741824", "--max-size", "1073741824", "--format", format]).stdout(writer);
        let process = Process::spawn(command);
        // The pipe holds more than the chunk that is being written, so all of these bytes are of earlier ones.
        let mut received = vec![0; 4 << 20];
        std::io::Read::read_exact(&mut reader, &mut received).unwrap();
        let mut chunks: Vec<_> = received[64..].chunks_exact(4096).map(<[u8]>::to_vec).collect();
        if format == "hex" {
            let digits = |chunk: &Vec<u8>| decode_hex(str::from_utf8(chunk).unwrap());
            chunks.extend(chunks.iter().map(digits).collect::<Vec<_>>());
        }
        common::until("the chunks to be wiped", || {
            (count_found(&memory(process.pid()), &chunks) == 0).then_some(())
        });
    }
}

/// The output of twenty runs of `token new`.
fn new_tokens() -> Vec<String> {
    let directory = TempDirectory::new();
    let new = |n: i32| {
        let mut command = key_service(&directory);
        command.args(["token", "new", "--name", &n.to_string()]);
        String::from_utf8(run_to_end(command).stdout).unwrap()
    };
    (0..20).map(new).collect()
}

/// A daemon that accepts all tokens but the first, and logs everything.
fn start_with_tokens(tokens: &[String]) -> Daemon {
    let lines: Vec<_> = tokens[1..].iter().map(|output| output.lines().nth(1).unwrap()).collect();
    let directory = TempDirectory::new();
    let file = directory.write("tokens", &lines.join("\n"));
    Daemon::start_with(directory, |command| {
        command.args([
            "--host",
            "127.0.0.1",
            "--srv-port",
            "0",
            "--metrics-port",
            "0",
            "--log-level",
            "trace",
        ]);
        command.env("KEYSERVICE_TOKENS_FILE", file).env("KEYSERVICE_AUDIT", "true");
    })
}

#[test]
fn no_token_is_in_the_log_or_the_metrics() {
    let tokens = new_tokens();
    let daemon = start_with_tokens(&tokens);
    let mut client = Client::connect(daemon.keys());
    for (n, output) in tokens.iter().enumerate() {
        let token = output.lines().next().unwrap();
        let request = format!("GET /key/16 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n");
        assert_eq!(client.send(request).response().status, if n == 0 { 401 } else { 200 });
    }
    let texts = [daemon.log(), get(daemon.metrics(), "/metrics").text()];
    for output in &tokens {
        // Neither the text of a token nor its hash.
        for secret in
            [&output[3..20], output.split("sha256:").nth(1).unwrap().split_whitespace().next().unwrap()]
        {
            assert!(texts.iter().all(|text| !text.contains(secret)), "{secret}");
        }
    }
}
