//! The one place that generates random bytes, with its self-tests and its failure latch.
//!
//! Small keys are the kernel's own bytes (getrandom(2)); larger ones are AES-256-CTR key stream (NIST SP 800-38A) under
//! a key of 32 kernel bytes that is used for one chunk and wiped. Nothing is pooled and no generator state outlives a
//! call, so neither a fork nor a restored snapshot of a virtual machine can repeat a key. Expanded bytes have 256-bit
//! computational security, like those of the kernel's own generator. The blocks of one chunk never repeat, which blocks
//! of truly random bytes might: that distinguishes the 4,096 blocks of a chunk from random ones with a probability
//! below 2⁻¹⁰⁴.
//!
//! The self-tests catch a source that fails totally: unreadable, constant, or repeating. They do not measure entropy,
//! and claim no conformance to SP 800-90B, AIS 31 or FIPS 140.

use std::fmt;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use aes::Aes256;
use aes::cipher::{Array, BlockCipherEncrypt, KeyInit};
use rand::TryRng;
use rand::rngs::SysRng;
use sha2::{Digest, Sha256};
use siphasher::sip::SipHasher13;
use zeroize::{Zeroize, Zeroizing};

// RUSTFLAGS replaces the flags of .cargo/config.toml, and the getrandom crate prefers `custom` and `linux_getrandom` to
// `linux_raw`.
#[cfg(not(any(doc, getrandom_backend = "linux_raw")))]
compile_error!(
    "keys would come from /dev/urandom or from a pool in the C library: build with the flags of .cargo/config.toml, \
     or add --cfg=getrandom_backend=\"linux_raw\" to RUSTFLAGS"
);
#[cfg(any(getrandom_backend = "custom", getrandom_backend = "linux_getrandom"))]
compile_error!(
    "keys would not come from the kernel: remove every --cfg=getrandom_backend but \"linux_raw\" from RUSTFLAGS"
);

/// The most bytes that are expanded from one kernel seed; a larger request takes several.
pub const CHUNK_SIZE: usize = 64 * 1024;

/// The most bytes that are read from the kernel directly; a larger key is expanded from a kernel seed.
/// The two cost about the same at this size, by `cargo bench --bench generator`.
pub const DIRECT_MAX: usize = 128;

/// Bytes of a seed, and of the block that each self-test looks at.
const SEED_SIZE: usize = 32;

/// Bytes of an AES block.
const BLOCK_SIZE: usize = 16;

/// AES blocks that are counted and then encrypted at a time: their 8 KiB stay in the first-level cache in between.
const BLOCKS_PER_PASS: usize = 512;

/// Recent blocks are remembered in this many sets, selected by 8 bits of their fingerprints. A block of a healthy source
/// has the other 56 bits of one of its set by chance with a probability of 2⁻⁵⁴.
const SETS: usize = 256;

/// Fingerprints in a set. A source that repeats itself after as many reads or fewer is detected at once, since no other
/// blocks can have displaced the first one. If its period is longer, up to some hundreds of reads, the probability that
/// it is never detected is at most 2⁻³², that of five blocks in one set.
const SET_SIZE: usize = 4;

/// A source of random bytes: [`OsRandom`] in the daemon, a broken one in tests.
pub trait Source: Send + Sync + 'static {
    /// Writes random bytes to the start of `buffer` and returns their number; like getrandom(2), it may write fewer
    /// than `buffer` can hold.
    ///
    /// # Errors
    /// The source can't be read. After `Interrupted`, the caller tries again.
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize>;
}

/// getrandom(2), through `rand`'s `SysRng`: each read is a system call, which blocks until the kernel's generator is
/// initialised. There is no fallback.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsRandom;

impl Source for OsRandom {
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match SysRng.try_fill_bytes(buffer) {
            Ok(()) => Ok(buffer.len()),
            Err(error) => Err(error
                .raw_os_error()
                .map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error)),
        }
    }
}

/// Why the generator is out of service. It stays so until the process restarts, which repeats the self-tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GeneratorError {
    /// The source returned an error, with this errno if it had one.
    #[error(
        "the random source can't be read{}",
        .0.map_or_else(String::new, |errno| format!(": {}", io::Error::from_raw_os_error(errno)))
    )]
    Unreadable(Option<i32>),
    /// The source returned no more bytes.
    #[error("the random source returned fewer bytes than requested")]
    Exhausted,
    /// A block of 32 bytes was the same 8 bytes four times.
    #[error("the random source returned a constant block")]
    Constant,
    /// A block of 32 bytes was returned a second time.
    #[error("the random source repeated a block")]
    Repeated,
    /// AES-256-CTR did not produce the key stream that SP 800-38A prints, or that OpenSSL produces.
    #[error("AES-256-CTR failed its known-answer test")]
    WrongCipher,
}

/// Generates random bytes, or returns an error. Shared by all workers; no call waits for another.
pub struct Generator {
    source: Box<dyn Source>,
    /// The first failure: the generator is out of service from then on.
    failure: OnceLock<GeneratorError>,
    is_reported: AtomicBool,
    /// Hashes blocks to fingerprints, under a random key that only this process has.
    hasher: SipHasher13,
    /// Fingerprints of recent blocks, the latest of each set first; 0 is none.
    recent: Box<[[AtomicU64; SET_SIZE]]>,
}

impl fmt::Debug for Generator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generator").field("failure", &self.failure.get()).finish_non_exhaustive()
    }
}

impl Generator {
    /// Tests the cipher and the source, and returns a generator that has passed.
    ///
    /// # Errors
    /// The self-test that failed: no key may be served.
    pub fn new(source: impl Source) -> Result<Self, GeneratorError> {
        let mut probe = Zeroizing::new([0; SEED_SIZE]);
        read_full(&source, &mut probe[..])?;
        let mut key = Zeroizing::new([0; 16]);
        read_full(&source, &mut key[..])?;
        let generator = Self {
            source: Box::new(source),
            failure: OnceLock::new(),
            is_reported: AtomicBool::new(false),
            hasher: SipHasher13::new_with_key(&key),
            recent: (0..SETS).map(|_| Default::default()).collect(),
        };
        test_cipher(key_stream)?;
        generator.test_block(&probe)?;
        for _ in 0..64 {
            generator.check()?;
        }
        Ok(generator)
    }

    /// Fills `key` with random bytes. On failure `key` is wiped: no partly filled key is ever returned.
    ///
    /// # Errors
    /// The failure that took the generator out of service, now or earlier.
    pub fn fill(&self, key: &mut [u8]) -> Result<(), GeneratorError> {
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        let generated = if key.len() > DIRECT_MAX {
            key.chunks_mut(CHUNK_SIZE).try_for_each(|chunk| self.expand(chunk))
        } else if key.len() >= SEED_SIZE {
            self.read_tested(key)
        } else {
            // A shorter key is cut from a whole block: the self-tests need one, and it costs the same.
            let mut block = Zeroizing::new([0; SEED_SIZE]);
            self.read_tested(&mut block[..]).map(|()| key.copy_from_slice(&block[..key.len()]))
        };
        generated.map_err(|failure| {
            key.zeroize();
            *self.failure.get_or_init(|| failure)
        })
    }

    /// Reads a block, tests it and discards it, to find out whether the generator works now.
    ///
    /// # Errors
    /// As [`Generator::fill`].
    pub fn check(&self) -> Result<(), GeneratorError> {
        self.fill(&mut Zeroizing::new([0; SEED_SIZE])[..])
    }

    /// The failure that took the generator out of service; `None` while it is in service.
    pub fn failure(&self) -> Option<GeneratorError> {
        self.failure.get().copied()
    }

    /// The failure, on the first call after it; then `None`. For the one critical line in the log.
    pub fn take_report(&self) -> Option<GeneratorError> {
        let failure = self.failure()?;
        (!self.is_reported.swap(true, Ordering::Relaxed)).then_some(failure)
    }

    fn expand(&self, chunk: &mut [u8]) -> Result<(), GeneratorError> {
        let mut seed = Zeroizing::new([0; SEED_SIZE]);
        self.read_tested(&mut seed[..])?;
        // The key is used for this chunk only, so the first counter may be constant.
        key_stream(&seed, [0, 0], chunk);
        scrub_stack();
        Ok(())
    }

    fn read_tested(&self, buffer: &mut [u8]) -> Result<(), GeneratorError> {
        read_full(&*self.source, buffer)?;
        let block = buffer.first_chunk().expect("callers read at least a whole block");
        self.test_block(block)
    }

    fn test_block(&self, block: &[u8; SEED_SIZE]) -> Result<(), GeneratorError> {
        let (words, _) = block.as_chunks::<8>();
        if words.iter().all(|word| word == &words[0]) {
            return Err(GeneratorError::Constant);
        }
        let fingerprint = self.hasher.hash(block).max(1);
        let set = usize::try_from(fingerprint % SETS as u64).expect("below SETS");
        let [latest, older @ ..] = &self.recent[set];
        // Compared before this fingerprint is among them: afterwards, another call may move it on.
        let is_older = older.iter().any(|slot| slot.load(Ordering::Relaxed) == fingerprint);
        let mut moved = latest.swap(fingerprint, Ordering::Relaxed);
        if is_older || moved == fingerprint {
            return Err(GeneratorError::Repeated);
        }
        // The other fingerprints move on by one slot, and the last one is forgotten. One that is between two slots is
        // missed by another call, which detects a later repetition instead.
        for slot in older {
            moved = slot.swap(moved, Ordering::Relaxed);
        }
        Ok(())
    }
}

fn read_full(source: &dyn Source, mut buffer: &mut [u8]) -> Result<(), GeneratorError> {
    while !buffer.is_empty() {
        match source.read(buffer) {
            Ok(0) => return Err(GeneratorError::Exhausted),
            Ok(read) => buffer = buffer.get_mut(read..).ok_or(GeneratorError::Exhausted)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(GeneratorError::Unreadable(error.raw_os_error())),
        }
    }
    Ok(())
}

/// Bytes of stack, below a caller's frame, where the cipher may leave its last blocks: without optimisation its frames
/// take tens of KiB.
const STACK_SCRUB: usize = if cfg!(debug_assertions) { 64 } else { 16 } * 1024;

/// Overwrites the stack below the caller's frame, where the cipher may have spilled key stream. `tests/memory.rs`
/// searches for what is left.
#[inline(never)]
fn scrub_stack() {
    std::hint::black_box(&mut [0_u8; STACK_SCRUB]);
}

/// Overwrites `bytes` with AES-256-CTR key stream: counters, encrypted in place. The key schedule is wiped. `first` is
/// the upper and the lower half of the first counter.
fn key_stream(key: &[u8; SEED_SIZE], first: [u64; 2], bytes: &mut [u8]) {
    let (blocks, tail) = bytes.as_chunks_mut::<BLOCK_SIZE>();
    // No chunk is so long that the lower half overflows. A counter that carries into the upper half cost 14 % of a
    // streamed key with VAES, and 6 % with AES-NI.
    let [upper, mut lower] = first;
    let cipher = Aes256::new(key.into());
    for blocks in blocks.chunks_mut(BLOCKS_PER_PASS) {
        for block in &mut *blocks {
            block.copy_from_slice([upper, lower].map(u64::to_be_bytes).as_flattened());
            lower += 1;
        }
        cipher.encrypt_blocks(Array::cast_slice_from_core_mut(blocks));
    }
    if !tail.is_empty() {
        let mut last = Zeroizing::new([0; BLOCK_SIZE]);
        last.copy_from_slice([upper, lower].map(u64::to_be_bytes).as_flattened());
        cipher.encrypt_block((&mut *last).into());
        tail.copy_from_slice(&last[..tail.len()]);
    }
}

/// Whole blocks of the long known answer. The cipher encrypts 64 at a time with AVX-512, 30 with VAES, 8 with AES-NI or
/// on ARM, 4 without any of them, and the remaining ones singly. [`BLOCKS_PER_PASS`] blocks and then 95 make whole
/// batches and a remainder for each.
const KNOWN_ANSWER_BLOCKS: usize = BLOCKS_PER_PASS + 95;

/// Bytes of the long known answer: its last block is not whole.
const KNOWN_ANSWER_SIZE: usize = KNOWN_ANSWER_BLOCKS * BLOCK_SIZE + 7;

/// Compares `key_stream` with known answers that exercise every AES kernel that the CPU may select. Takes 10 µs, and
/// 0.12 ms on a CPU without instructions for AES.
fn test_cipher(key_stream: impl Fn(&[u8; SEED_SIZE], [u64; 2], &mut [u8])) -> Result<(), GeneratorError> {
    // SP 800-38A section F.5.5: key, first counter, plaintext and ciphertext.
    let key = [
        0x60, 0x3d, 0xeb, 0x10, 0x15, 0xca, 0x71, 0xbe, 0x2b, 0x73, 0xae, 0xf0, 0x85, 0x7d, 0x77, 0x81, 0x1f,
        0x35, 0x2c, 0x07, 0x3b, 0x61, 0x08, 0xd7, 0x2d, 0x98, 0x10, 0xa3, 0x09, 0x14, 0xdf, 0xf4,
    ];
    let first = [0xf0f1_f2f3_f4f5_f6f7, 0xf8f9_fafb_fcfd_feff];
    let plaintext = [
        0x6b, 0xc1, 0xbe, 0xe2, 0x2e, 0x40, 0x9f, 0x96, 0xe9, 0x3d, 0x7e, 0x11, 0x73, 0x93, 0x17, 0x2a, 0xae,
        0x2d, 0x8a, 0x57, 0x1e, 0x03, 0xac, 0x9c, 0x9e, 0xb7, 0x6f, 0xac, 0x45, 0xaf, 0x8e, 0x51, 0x30, 0xc8,
        0x1c, 0x46, 0xa3, 0x5c, 0xe4, 0x11, 0xe5, 0xfb, 0xc1, 0x19, 0x1a, 0x0a, 0x52, 0xef, 0xf6, 0x9f, 0x24,
        0x45, 0xdf, 0x4f, 0x9b, 0x17, 0xad, 0x2b, 0x41, 0x7b, 0xe6, 0x6c, 0x37, 0x10,
    ];
    let ciphertext = [
        0x60, 0x1e, 0xc3, 0x13, 0x77, 0x57, 0x89, 0xa5, 0xb7, 0xa7, 0xf5, 0x04, 0xbb, 0xf3, 0xd2, 0x28, 0xf4,
        0x43, 0xe3, 0xca, 0x4d, 0x62, 0xb5, 0x9a, 0xca, 0x84, 0xe9, 0x90, 0xca, 0xca, 0xf5, 0xc5, 0x2b, 0x09,
        0x30, 0xda, 0xa2, 0x3d, 0xe9, 0x4c, 0xe8, 0x70, 0x17, 0xba, 0x2d, 0x84, 0x98, 0x8d, 0xdf, 0xc9, 0xc5,
        0x8d, 0xb6, 0x7a, 0xad, 0xa6, 0x13, 0xc2, 0xdd, 0x08, 0x45, 0x79, 0x41, 0xa6,
    ];
    // One byte short of four blocks, so that both whole blocks and a partial one are tested.
    let mut text = [0xff; 63];
    key_stream(&key, first, &mut text);
    text.iter_mut().zip(plaintext).for_each(|(byte, plain)| *byte ^= plain);
    // The same key and counter in another implementation; KNOWN_ANSWER_SIZE is 9719, 607 blocks and 7 bytes:
    //   head -c 9719 /dev/zero | openssl enc -aes-256-ctr -nosalt \
    //     -K 603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4 \
    //     -iv f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff | sha256sum
    let digest = [
        0x1b, 0xb1, 0x03, 0x1e, 0x55, 0x6f, 0x8f, 0xcd, 0x1d, 0xfe, 0x03, 0x39, 0xda, 0x66, 0x57, 0x94, 0x74,
        0xa9, 0xb5, 0xf9, 0x01, 0xfa, 0x26, 0x0c, 0x40, 0x08, 0xdf, 0x31, 0xfe, 0xb0, 0x5c, 0x4d,
    ];
    let mut stream = [0; KNOWN_ANSWER_SIZE];
    key_stream(&key, first, &mut stream);
    if text == ciphertext[..63] && Sha256::digest(stream)[..] == digest {
        Ok(())
    } else {
        Err(GeneratorError::WrongCipher)
    }
}

#[cfg(test)]
pub(crate) use tests::breaks;

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    struct Breaks<F> {
        reads: AtomicUsize,
        breaks_at: usize,
        broken: F,
    }

    impl<F: Fn(&mut [u8]) -> io::Result<usize> + Send + Sync + 'static> Source for Breaks<F> {
        fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.reads.fetch_add(1, Ordering::Relaxed) < self.breaks_at {
                OsRandom.read(buffer)
            } else {
                (self.broken)(buffer)
            }
        }
    }

    /// A source of the kernel's bytes whose reads from the one with this number are those of `broken`. The self-tests of
    /// [`Generator::new`] take 66.
    pub(crate) fn breaks(
        breaks_at: usize,
        broken: impl Fn(&mut [u8]) -> io::Result<usize> + Send + Sync + 'static,
    ) -> impl Source {
        Breaks { reads: AtomicUsize::new(0), breaks_at, broken }
    }

    fn stuck(buffer: &mut [u8]) -> io::Result<usize> {
        for (i, byte) in buffer.iter_mut().enumerate() {
            *byte = u8::try_from(i % 251).unwrap();
        }
        Ok(buffer.len())
    }

    fn zero(buffer: &mut [u8]) -> io::Result<usize> {
        buffer.fill(0);
        Ok(buffer.len())
    }

    fn denied(_: &mut [u8]) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(1))
    }

    #[test]
    fn a_broken_source_prevents_the_start() {
        assert_eq!(Generator::new(breaks(0, zero)).unwrap_err(), GeneratorError::Constant);
        assert_eq!(Generator::new(breaks(0, stuck)).unwrap_err(), GeneratorError::Repeated);
        assert_eq!(Generator::new(breaks(0, denied)).unwrap_err(), GeneratorError::Unreadable(Some(1)));
        assert_eq!(Generator::new(breaks(0, |_: &mut [u8]| Ok(0))).unwrap_err(), GeneratorError::Exhausted);
    }

    #[test]
    fn a_later_failure_latches_and_wipes_the_key() {
        for (broken, expected) in [
            (zero as fn(&mut [u8]) -> io::Result<usize>, GeneratorError::Constant),
            (stuck, GeneratorError::Repeated),
            (denied, GeneratorError::Unreadable(Some(1))),
        ] {
            for size in [16, 32, 100, 4096, 3 * CHUNK_SIZE] {
                let generator = Generator::new(breaks(66, broken)).unwrap();
                let mut key = vec![0xaa; size];
                let failure = (0..3).find_map(|_| generator.fill(&mut key).err());
                assert_eq!(failure, Some(expected), "{size}");
                assert!(key.iter().all(|&byte| byte == 0), "{size}");
                assert_eq!(generator.failure(), Some(expected));
                assert_eq!(generator.take_report(), Some(expected));
                assert_eq!(generator.take_report(), None, "reported once");
            }
        }
    }

    #[test]
    fn one_wrong_bit_fails_the_known_answer_test() {
        assert_eq!(test_cipher(key_stream), Ok(()));
        // The first and last block of a batch of each kernel, of each pass, and the bytes after the last whole block.
        let blocks = [
            0, 1, 2, 3, 4, 7, 8, 29, 30, 31, 59, 60, 63, 64, 127, 128, 448, 509, 510, 511, 512, 519, 541, 542,
        ];
        for block in
            blocks.into_iter().chain([575, 576, 601, 602, KNOWN_ANSWER_BLOCKS - 1, KNOWN_ANSWER_BLOCKS])
        {
            for length in [63, KNOWN_ANSWER_SIZE] {
                let wrong = |key: &[u8; SEED_SIZE], first, bytes: &mut [u8]| {
                    key_stream(key, first, bytes);
                    if bytes.len() == length
                        && let Some(byte) = bytes.get_mut(block * BLOCK_SIZE)
                    {
                        *byte ^= 0x10;
                    }
                };
                let is_there = block * BLOCK_SIZE < length;
                let expected = if is_there { Err(GeneratorError::WrongCipher) } else { Ok(()) };
                assert_eq!(test_cipher(wrong), expected, "block {block} of {length} bytes");
            }
        }
    }

    #[test]
    fn short_and_interrupted_reads_are_continued() {
        let reads = AtomicUsize::new(0);
        let source = breaks(0, move |buffer: &mut [u8]| {
            if reads.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let some = buffer.len().min(5);
            OsRandom.read(&mut buffer[..some])
        });
        let generator = Generator::new(source).unwrap();
        let mut key = [0; 100];
        generator.fill(&mut key).unwrap();
        assert!(key.chunks(5).all(|chunk| chunk != [0; 5]));
    }

    /// Different blocks whose fingerprints are all of one set.
    fn blocks_of_one_set(generator: &Generator) -> impl Iterator<Item = [u8; SEED_SIZE]> {
        let is_of_first_set =
            |block: &[u8; SEED_SIZE]| generator.hasher.hash(block).is_multiple_of(SETS as u64);
        let block = |n: u64| {
            let mut block = [1; SEED_SIZE];
            block[..8].copy_from_slice(&n.to_be_bytes());
            block
        };
        (0..).map(block).filter(is_of_first_set)
    }

    #[test]
    fn concurrent_calls_find_no_repetition_in_a_healthy_source() {
        let generator = Generator::new(OsRandom).unwrap();
        let blocks: Vec<_> = blocks_of_one_set(&generator).take(8000).collect();
        std::thread::scope(|scope| {
            for blocks in blocks.chunks(2000) {
                let generator = &generator;
                scope.spawn(move || {
                    for block in blocks {
                        assert_eq!(generator.test_block(block), Ok(()));
                    }
                });
            }
        });
    }

    #[test]
    fn a_short_period_is_detected_at_the_first_repetition() {
        for period in 1..=SET_SIZE {
            // The worst case: after 1,024 other blocks, all blocks of the period are of one set.
            let generator = Generator::new(OsRandom).unwrap();
            (0..SETS * SET_SIZE).for_each(|_| generator.check().unwrap());
            let blocks: Vec<_> = blocks_of_one_set(&generator).take(period).collect();
            for block in &blocks {
                assert_eq!(generator.test_block(block), Ok(()), "period {period}");
            }
            assert_eq!(generator.test_block(&blocks[0]), Err(GeneratorError::Repeated), "period {period}");
        }
    }

    #[test]
    fn a_periodic_source_is_detected() {
        // Missed by chance with a probability of 2⁻³² (see SET_SIZE).
        for period in [1, 2, 5, 63, 500] {
            let at = AtomicUsize::new(0);
            let source = breaks(66, move |buffer: &mut [u8]| {
                let n = at.fetch_add(1, Ordering::Relaxed) % period;
                for (i, byte) in buffer.iter_mut().enumerate() {
                    *byte = u8::try_from((n * 7 + i * (n + 3)) % 256).unwrap();
                }
                Ok(buffer.len())
            });
            let generator = Generator::new(source).unwrap();
            let is_detected = (0..20 * period + 20).any(|_| generator.check().is_err());
            assert!(is_detected, "period {period}");
        }
    }

    #[test]
    fn every_length_is_filled_to_the_end() {
        let generator = Generator::new(OsRandom).unwrap();
        for size in [1, 31, 32, 33, DIRECT_MAX, DIRECT_MAX + 1, CHUNK_SIZE, CHUNK_SIZE + 1] {
            // The last byte is zero in all of 16 keys with a probability of 2⁻¹²⁸.
            let filled = (0..16).any(|_| {
                let mut key = vec![0; size];
                generator.fill(&mut key).unwrap();
                key[size - 1] != 0
            });
            assert!(filled, "{size}");
        }
    }
}
