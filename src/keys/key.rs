//! A key and its length: values that can't be wrong, and bytes that don't outlive their use.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use crate::keys::generator::{CHUNK_SIZE, Generator, GeneratorError};
use crate::keys::secret_buf::SecretBuf;

/// The number of bytes of a key: at least 1, at most the limit given to the constructor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyLength(u64);

impl KeyLength {
    /// A length of `bytes`, from 1 to `limit`.
    ///
    /// # Errors
    /// [`LengthError::Zero`] or [`LengthError::TooLarge`].
    pub fn new(bytes: u64, limit: u64) -> Result<Self, LengthError> {
        match bytes {
            0 => Err(LengthError::Zero),
            _ if bytes > limit => Err(LengthError::TooLarge { limit }),
            _ => Ok(Self(bytes)),
        }
    }

    /// Parses `[1-9][0-9]*` and nothing else: no sign, no leading zero, no percent-encoding, no space.
    ///
    /// # Errors
    /// The rule that the text breaks. A number of any size above `limit` is [`LengthError::TooLarge`].
    pub fn parse(text: impl AsRef<[u8]>, limit: u64) -> Result<Self, LengthError> {
        let text = text.as_ref();
        match text {
            b"0" => return Err(LengthError::Zero),
            [b'1'..=b'9', rest @ ..] if rest.iter().all(u8::is_ascii_digit) => {}
            _ => return Err(LengthError::NotAnInteger),
        }
        let number = text
            .iter()
            .try_fold(0_u64, |number, digit| number.checked_mul(10)?.checked_add(u64::from(digit - b'0')));
        // `None` is a number beyond 64 bits.
        number.map_or(Err(LengthError::TooLarge { limit }), |bytes| Self::new(bytes, limit))
    }

    /// The length in bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

/// Why a text or a number is not the length of a key.
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
        /// The largest allowed length, in bytes.
        limit: u64,
    },
}

/// A whole key, or a chunk of a streamed one: at most [`CHUNK_SIZE`] bytes. Wiped when the last use of its bytes is
/// dropped; `Debug` prints only its size.
pub struct Key(SecretBuf);

impl Key {
    /// Generates a key of `length` bytes, or its first [`CHUNK_SIZE`] bytes if it is longer.
    ///
    /// # Errors
    /// The generator's failure.
    pub fn generate(length: KeyLength, generator: &Generator) -> Result<Self, GeneratorError> {
        Self::generate_chunk(length.0, CHUNK_SIZE, generator)
    }

    /// The bytes, for an encoder to read.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_ref()
    }

    /// The bytes, in the very buffer that they were generated into, for the kernel to read from.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self.0)
    }

    /// Generates `length` bytes, or `max` bytes if that is less.
    fn generate_chunk(length: u64, max: usize, generator: &Generator) -> Result<Self, GeneratorError> {
        let size = usize::try_from(length).map_or(max, |length| length.min(max));
        let mut bytes = SecretBuf::zeroed(size);
        generator.fill(&mut bytes.0)?;
        Ok(Self(bytes))
    }
}

/// A key whose bytes [`Key::generate`] did not make, such as the characters of a password.
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

/// A key that is generated a chunk at a time, when the reader asks for the next chunk.
#[derive(Debug)]
pub(super) struct KeyStream {
    /// Bytes that are still to be generated.
    remaining: u64,
    /// Bytes of every chunk but the last.
    chunk_size: usize,
    generator: Arc<Generator>,
}

impl KeyStream {
    /// A stream of `length` bytes in chunks of `chunk_size`, which is at most [`CHUNK_SIZE`].
    pub(super) fn new(length: KeyLength, chunk_size: usize, generator: Arc<Generator>) -> Self {
        Self { remaining: length.0, chunk_size, generator }
    }

    /// Bytes that are still to be generated.
    pub(super) fn remaining(&self) -> u64 {
        self.remaining
    }
}

impl Iterator for KeyStream {
    type Item = Result<Key, GeneratorError>;

    /// The next chunk. After a failure the rest must not be sent: the reader sees that the stream is too short.
    fn next(&mut self) -> Option<Self::Item> {
        if self.remaining == 0 {
            return None;
        }
        let chunk = Key::generate_chunk(self.remaining, self.chunk_size, &self.generator);
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
    fn a_length_is_from_1_to_its_limit() {
        assert_eq!(KeyLength::new(0, 0), Err(LengthError::Zero));
        assert_eq!(KeyLength::new(1, 1), Ok(KeyLength(1)));
        assert_eq!(KeyLength::new(2, 1), Err(LengthError::TooLarge { limit: 1 }));
        assert_eq!(KeyLength::new(u64::MAX, u64::MAX), Ok(KeyLength(u64::MAX)));
    }

    #[test]
    fn a_stream_yields_exactly_its_length() {
        let generator = Arc::new(Generator::new(OsRandom).unwrap());
        for length in [1, CHUNK_SIZE as u64, CHUNK_SIZE as u64 + 1, 3 * CHUNK_SIZE as u64 - 1] {
            for chunk_size in [CHUNK_SIZE, CHUNK_SIZE / 4 * 3] {
                let stream = KeyStream::new(KeyLength(length), chunk_size, Arc::clone(&generator));
                let sizes: Vec<_> = stream.map(|chunk| chunk.unwrap().as_bytes().len()).collect();
                assert_eq!(sizes.iter().sum::<usize>() as u64, length);
                assert!(sizes.iter().rev().skip(1).all(|size| *size == chunk_size));
            }
        }
    }
}
