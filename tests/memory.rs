//! After a key has been sent, the server's memory holds no part of it.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use common::{Client, Daemon, find, request};

/// How many bytes in a row have to be found for a key to have been kept: 16 bytes match by chance never.
const WINDOW: usize = 16;

/// Every readable byte of a process, region by region.
fn memory(pid: u32) -> Vec<Vec<u8>> {
    let memory =
        File::open(format!("/proc/{pid}/mem")).expect("the memory of a child of one's own may be read");
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let regions = maps.lines().filter_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let is_special = ["[vvar", "[vsyscall"].iter().any(|name| rest.contains(name));
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        (rest.starts_with('r') && !is_special).then(|| (number(start), number(end)))
    });
    regions
        .filter_map(|(start, end)| {
            let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
            memory.read_exact_at(&mut bytes, start).ok()?; // a region may be gone by now
            Some(bytes)
        })
        .collect()
}

/// How many of `keys` the memory holds a window of: its beginning, its middle or its end.
fn found(memory: &[Vec<u8>], keys: &[Vec<u8>]) -> usize {
    let windows = |key: &Vec<u8>| {
        let last = key.len() - WINDOW;
        [0, last / 2, last].map(|at| key[at..at + WINDOW].to_vec())
    };
    let wanted: Vec<(usize, Vec<u8>)> =
        keys.iter().enumerate().flat_map(|(n, key)| windows(key).map(|window| (n, window))).collect();
    // All windows at once: a table of their first two bytes keeps this a single pass.
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
fn the_scan_finds_what_is_there() {
    let daemon = Daemon::start(&[]);
    let mut client = Client::connect(daemon.keys());
    // A head that is not complete yet is in the server's buffer, and so is this mark.
    let mark = b"0123456789abcdef-a-mark-that-must-be-found".to_vec();
    client.send("GET /key/32 HTTP/1.1\r\nHost: a\r\nX-Mark: ").send(&mark);
    common::until("the head to be read", || {
        (found(&memory(daemon.pid()), std::slice::from_ref(&mark)) == 1).then_some(())
    });
}

#[test]
fn no_key_is_in_memory_after_its_response() {
    // 20 keys of each kind: from the kernel as they are, expanded, and in pieces.
    let daemon = Daemon::start(&[("MAX_SIZE", "1048576")]);
    let mut client = Client::connect(daemon.keys());
    for length in [16, 32, 64, 128, 129, 1024, 4096, 65_536, 300_000] {
        let keys: Vec<_> =
            (0..20).map(|_| client.send(request(&format!("/key/{length}"))).response().body).collect();
        assert!(keys.iter().all(|key| key.len() == length));
        let memory = memory(daemon.pid());
        assert!(
            memory.iter().any(|region| find(region, b"application/octet-stream").is_some()),
            "it was read"
        );
        // The client can be here before the server has returned from its last write.
        common::until("the keys to be gone", || {
            (found(&self::memory(daemon.pid()), &keys) == 0).then_some(())
        });
    }
}

#[test]
fn no_key_is_in_memory_after_its_connection_was_cut() {
    let daemon = Daemon::start(&[("MAX_SIZE", "1073741824")]);
    let mut client = Client::connect(daemon.keys());
    client.send(request("/key/1073741824"));
    let mut received = vec![0; 4 << 20];
    std::io::Read::read_exact(&mut client.stream, &mut received).unwrap();
    drop(client);
    common::until("the end of the stream", || (daemon.metric("http_connections") == 0.0).then_some(()));
    let begin = find(&received, b"\r\n\r\n").unwrap() + 4;
    let pieces: Vec<_> = received[begin..].chunks_exact(4096).map(<[u8]>::to_vec).collect();
    common::until("the pieces to be gone", || (found(&memory(daemon.pid()), &pieces) == 0).then_some(()));
}
