//! Measures the cost of random bytes by size and source: `cargo bench --bench generator`.
//!
//! `kernel` reads all bytes by getrandom(2). `expanded` reads a 32-byte seed and expands it with AES-256-CTR.
//! `generator` is the daemon's generator with its self-tests; its cost should follow the cheaper of the two.
//! `generator::DIRECT_MAX` is the size where the costs of the first two cross.

use std::hint::black_box;
use std::time::Duration;

use aes::Aes256;
use aes::cipher::{Array, BlockCipherEncrypt, KeyInit};
use criterion::{BenchmarkId, Criterion, Throughput};
use key_service::keys::generator::{CHUNK_SIZE, Generator, OsRandom, Source};
use zeroize::Zeroizing;

const SIZES: [(&str, usize); 11] = [
    ("AES-128 key", 16),
    ("AES-256 key", 32),
    ("HMAC-SHA-256 block", 64),
    ("HMAC-SHA-512 block", 128),
    ("192 B", 192),
    ("256 B", 256),
    ("512 B", 512),
    ("largest key by default", 1024),
    ("page", 4096),
    ("chunk", CHUNK_SIZE),
    ("16 chunks", 16 * CHUNK_SIZE),
];

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    let generator = Generator::new(OsRandom).expect("this machine's kernel generator works");
    for (purpose, size) in SIZES {
        let mut group = criterion.benchmark_group(format!("{size} B, {purpose}"));
        group.throughput(Throughput::Bytes(size as u64));
        let mut key = vec![0; size];
        group.bench_function(BenchmarkId::from_parameter("kernel"), |bench| {
            bench.iter(|| kernel(black_box(&mut key)));
        });
        group.bench_function(BenchmarkId::from_parameter("expanded"), |bench| {
            bench.iter(|| key.chunks_mut(CHUNK_SIZE).for_each(|chunk| expanded(black_box(chunk))));
        });
        group.bench_function(BenchmarkId::from_parameter("generator"), |bench| {
            bench.iter(|| generator.fill(black_box(&mut key)));
        });
        group.finish();
    }
    criterion.final_summary();
}

fn kernel(key: &mut [u8]) {
    let read = OsRandom.read(key).expect("this machine's kernel generator works");
    assert_eq!(read, key.len());
}

fn expanded(chunk: &mut [u8]) {
    let mut seed = Zeroizing::new([0; 32]);
    kernel(&mut seed[..]);
    let (blocks, _) = chunk.as_chunks_mut::<16>();
    (0_u128..).zip(&mut *blocks).for_each(|(counter, block)| *block = counter.to_be_bytes());
    Aes256::new((&*seed).into()).encrypt_blocks(Array::cast_slice_from_core_mut(blocks));
}
