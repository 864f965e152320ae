//! A key and its length: values that can't be wrong, and bytes that don't outlive their use.

use std::cell::Cell;
use std::fmt;
use std::mem;
use std::sync::Arc;
use std::thread::LocalKey;

use bytes::Bytes;
use zeroize::Zeroize;

use crate::keys::generator::{CHUNK, Generator, GeneratorError};

/// How many bytes a key has: at least 1, at most the limit it was parsed under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyLength(u64);

impl KeyLength {
    /// Reads `[1-9][0-9]*`, nothing else: no sign, no leading zero, no percent-encoding, no space.
    ///
    /// # Errors
    /// Which part of that the text broke. A number of any size that is above `limit` is [`LengthError::TooLarge`].
    pub fn parse(text: &str, limit: u64) -> Result<Self, LengthError> {
        let digits = text.as_bytes();
        match digits {
            b"0" => return Err(LengthError::Zero),
            [b'1'..=b'9', rest @ ..] if rest.iter().all(u8::is_ascii_digit) => {}
            _ => return Err(LengthError::NotAnInteger),
        }
        // Only digits are left, so the one way for this to fail is a number beyond 64 bits.
        match text.parse() {
            Ok(length) if length <= limit => Ok(Self(length)),
            _ => Err(LengthError::TooLarge { limit }),
        }
    }

    /// The length in bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

/// Why a text is not the length of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LengthError {
    /// Not `[1-9][0-9]*`.
    #[error("Invalid length: must be an integer, in decimal digits without a sign or a leading zero")]
    NotAnInteger,
    /// `0`.
    #[error("Length must be at least 1")]
    Zero,
    /// A number above the limit.
    #[error("Length exceeds maximum size of {limit}")]
    TooLarge {
        /// The largest length that is allowed, in bytes.
        limit: u64,
    },
}

/// The most bytes of a streamed key that are drawn and written at a time. For a client that doesn't read, the HTTP library holds
/// as many, and as many again while less than its own limit is left of them: 200 such clients once took 28 MiB, 64 KiB at a time.
pub const STREAM_CHUNK_SIZE: usize = CHUNK / 2;

/// A whole key, of at most one chunk. Wiped when the last use of its bytes is dropped; it can't be printed.
pub struct Key(SecretBuf);

/// Bytes that are wiped when they are dropped, up to their length: they must not shrink or grow. `Zeroizing<Vec<u8>>`
/// wipes element by element, which for bytes takes ten times as long.
pub struct SecretBuf(pub Vec<u8>);

impl Drop for SecretBuf {
    fn drop(&mut self) {
        self.0.as_mut_slice().zeroize();
        if self.0.len() == STREAM_CHUNK_SIZE {
            keep_lower(&SPARE, &mut self.0);
        }
    }
}

thread_local! {
    /// The last piece that was wiped, for the next: a new one would have to be cleared.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Keeps `buffer` for the next use, or the one that is kept already: the one nearer the bottom of the thread's heap, which
/// keeps no memory below it resident (`memory.rs`).
pub fn keep_lower(spare: &'static LocalKey<Cell<Vec<u8>>>, buffer: &mut Vec<u8>) {
    let kept = spare.take();
    let is_lower = kept.capacity() == 0 || buffer.as_ptr() < kept.as_ptr();
    spare.set(if is_lower { mem::take(buffer) } else { kept });
}

/// Makes the calling thread's room for a piece.
pub fn reserve() {
    SPARE.set(vec![0; STREAM_CHUNK_SIZE]);
}

impl fmt::Debug for SecretBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wiped({} bytes)", self.0.len())
    }
}

impl AsRef<[u8]> for SecretBuf {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Key {
    /// Draws a key of `length` bytes, or the first chunk's worth of it.
    ///
    /// # Errors
    /// The generator's failure.
    pub fn generate(length: KeyLength, generator: &Generator) -> Result<Self, GeneratorError> {
        Self::draw_piece(length.0, CHUNK, generator)
    }

    /// The bytes, to be written in another form.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_ref()
    }

    /// The bytes, in the very buffer that they were drawn into, for the kernel to read from.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self.0)
    }

    fn draw_piece(length: u64, most: usize, generator: &Generator) -> Result<Self, GeneratorError> {
        let size = usize::try_from(length).map_or(most, |length| length.min(most));
        let spare = if size == STREAM_CHUNK_SIZE { SPARE.take() } else { Vec::new() };
        let mut bytes = SecretBuf(if spare.is_empty() { vec![0; size] } else { spare });
        generator.fill(&mut bytes.0)?;
        Ok(Self(bytes))
    }
}

/// Of bytes that were drawn in another way than [`Key::generate`] does, such as the characters of a password.
impl From<SecretBuf> for Key {
    fn from(bytes: SecretBuf) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({} bytes)", self.as_bytes().len())
    }
}

/// A key that is generated a chunk at a time, as fast as the reader takes it.
#[derive(Debug)]
pub struct KeyStream {
    /// How many bytes are still to be handed over.
    remaining: u64,
    /// How many there are in a chunk that is not the last.
    chunk: usize,
    generator: Arc<Generator>,
}

impl KeyStream {
    /// A stream of `length` bytes in chunks of `chunk`, which is at most [`CHUNK`].
    pub fn new(length: KeyLength, chunk: usize, generator: Arc<Generator>) -> Self {
        Self { remaining: length.0, chunk, generator }
    }

    /// How many bytes are still to come.
    pub fn remaining(&self) -> u64 {
        self.remaining
    }
}

impl Iterator for KeyStream {
    type Item = Result<Key, GeneratorError>;

    /// The next chunk. After a failure the rest must not be sent: the stream stays short, for the reader to see.
    fn next(&mut self) -> Option<Self::Item> {
        if self.remaining == 0 {
            return None;
        }
        let chunk = Key::draw_piece(self.remaining, self.chunk, &self.generator);
        if let Ok(key) = &chunk {
            self.remaining -= key.as_bytes().len() as u64;
        }
        Some(chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::generator::OsRandom;

    #[test]
    fn a_key_does_not_print() {
        let generator = Generator::new(OsRandom).unwrap();
        let key = Key::generate(KeyLength(32), &generator).unwrap();
        assert_eq!(format!("{key:?}"), "Key(32 bytes)");
    }

    #[test]
    fn a_stream_gives_exactly_its_length() {
        let generator = Arc::new(Generator::new(OsRandom).unwrap());
        for length in [1, CHUNK as u64, CHUNK as u64 + 1, 3 * CHUNK as u64 - 1] {
            for piece in [CHUNK, CHUNK / 4 * 3] {
                let stream = KeyStream::new(KeyLength(length), piece, Arc::clone(&generator));
                let sizes: Vec<_> = stream.map(|piece| piece.unwrap().as_bytes().len()).collect();
                assert_eq!(sizes.iter().sum::<usize>() as u64, length);
                assert!(sizes.iter().rev().skip(1).all(|size| *size == piece));
            }
        }
    }
}
