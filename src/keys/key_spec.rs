//! What to generate: the kind, length, format and number of keys, and the one way to generate and encode them whole.
//!
//! Every buffer that held a key, in whatever form, is wiped when it is dropped. Keys are encoded in constant time, and
//! no buffer grows, because one that grows leaves a copy behind.

use std::ops::Range;

use bytes::Bytes;
use zeroize::Zeroize;

use crate::keys::encoding::{Encoding, to_usize};
use crate::keys::format::{Format, Kind};
use crate::keys::generator::{CHUNK_SIZE, DIRECT_MAX, Generator, GeneratorError};
use crate::keys::key::{Key, KeyLength};
use crate::keys::password;
use crate::keys::secret_buf::{SecretArray, SecretBuf};

/// The most keys of one batch.
pub const COUNT_MAX: u64 = 1024;

/// The most key bytes of one batch.
pub const BATCH_BYTES_MAX: u64 = CHUNK_SIZE as u64;

/// The largest response that is generated whole, in bytes as they are sent. A larger one is streamed: it takes a
/// permit, and is generated a chunk at a time, as its client reads.
const WHOLE_MAX: u64 = 16 * 1024;

/// Random bytes in the `kid` of a JWK.
const KID_BYTES: usize = 16;

/// What surrounds the length of a key in JSON.
const KEY_JSON: [&str; 2] = [r#"{"length":"#, r#","encoding":"base64","key":""#];

/// What surrounds the length, the alphabet and the entropy of a password in JSON.
const PASSWORD_JSON: [&str; 4] =
    [r#"{"length":"#, r#","alphabet":""#, r#"","entropy_bits":"#, r#","password":"#];

/// What surrounds the `kid` of a JWK.
const JWK: [&str; 2] = [r#"{"kty":"oct","kid":""#, r#"","k":""#];

/// One key or password, or a batch of them, in one format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeySpec {
    kind: Kind,
    length: KeyLength,
    format: Format,
    /// `None` is one key that is not in a batch.
    count: Option<u64>,
    /// Bytes of one key as it is sent, without what separates keys.
    encoded_len_of_one: u64,
}

/// Why there is no such batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Keys of this format could not be told apart.
    #[error(
        "Keys in format {} could not be told apart in a batch; formats that allow a count: {}",
        .0.name(), batch_formats().join(", ")
    )]
    Unseparable(Format),
    /// More than [`BATCH_BYTES_MAX`] key bytes in all.
    #[error("Length times count exceeds the maximum size of a batch, {BATCH_BYTES_MAX}")]
    TooLarge,
}

/// A text is not the number of keys of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be an integer from 1 to {COUNT_MAX}, in decimal digits")]
pub struct CountError;

/// Parses the number of keys of a batch, 1 to [`COUNT_MAX`], by the grammar of [`KeyLength::parse`].
///
/// # Errors
/// The text is not such a number.
pub fn parse_count(text: impl AsRef<[u8]>) -> Result<u64, CountError> {
    KeyLength::parse(text, COUNT_MAX).map(KeyLength::bytes).map_err(|_| CountError)
}

/// The formats of keys that batches have. Passwords have no other.
fn batch_formats() -> Vec<&'static str> {
    Kind::Key.formats().iter().filter(|format| format.has_batches()).map(|format| format.name()).collect()
}

impl KeySpec {
    /// A batch of `count` keys of `length` each; without a count, one key that is not in a batch.
    ///
    /// # Errors
    /// Why such a batch is impossible. One key that is not in a batch never fails.
    pub fn new(
        kind: Kind,
        length: KeyLength,
        format: Format,
        count: Option<u64>,
    ) -> Result<Self, BatchError> {
        match count {
            Some(_) if !format.has_batches() => return Err(BatchError::Unseparable(format)),
            Some(count) if length.bytes().saturating_mul(count) > BATCH_BYTES_MAX => {
                return Err(BatchError::TooLarge);
            }
            _ => {}
        }
        let mut spec = Self { kind, length, format, count, encoded_len_of_one: 0 };
        let around = spec.prefix_len() + spec.suffix().len();
        spec.encoded_len_of_one = around as u64 + spec.encoding().encoded_len(length.bytes());
        Ok(spec)
    }

    /// What is generated.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The length of each key in bytes, or of each password in characters, which are a byte each.
    pub fn length(&self) -> KeyLength {
        self.length
    }

    /// How the keys are written.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The number of keys in a batch; `None` for one key that is not in a batch.
    pub fn count(&self) -> Option<u64> {
        self.count
    }

    /// The number of keys.
    pub fn key_count(&self) -> u64 {
        self.count.unwrap_or(1)
    }

    /// The number of key bytes in all, before encoding.
    pub fn key_bytes(&self) -> u64 {
        self.length.bytes() * self.key_count()
    }

    /// Whether the keys are generated a chunk at a time instead of being held in memory whole.
    pub fn is_streamed(&self) -> bool {
        self.encoded_len() > WHOLE_MAX
    }

    /// The number of bytes of all keys as they are sent, known before a key is generated.
    pub fn encoded_len(&self) -> u64 {
        let (open, separator, close) = self.delimiters();
        self.key_count() * self.encoded_len_of_one()
            + (self.key_count() - 1) * separator.len() as u64
            + (open.len() + close.len()) as u64
    }

    /// The number of bytes of one key as it is sent, without what separates keys.
    pub(super) fn encoded_len_of_one(&self) -> u64 {
        self.encoded_len_of_one
    }

    /// Generates and encodes all keys, in one buffer that is wiped when the last use of its bytes is dropped. Not for
    /// what is streamed.
    ///
    /// # Errors
    /// The generator's failure.
    pub fn generate(&self, generator: &Generator) -> Result<Bytes, GeneratorError> {
        let mut encoded = SecretBuf::with_capacity(to_usize(self.encoded_len()));
        self.append(generator, &mut encoded.0)?;
        Ok(Bytes::from_owner(encoded))
    }

    /// Generates and encodes all keys at the end of `text`, which needs [`encoded_len`](Self::encoded_len) of free
    /// capacity: a buffer that grows leaves a copy behind. Not for what is streamed.
    ///
    /// # Errors
    /// The generator's failure. What was appended is wiped then.
    pub fn append(&self, generator: &Generator, text: &mut Vec<u8>) -> Result<(), GeneratorError> {
        let start = text.len();
        let appended = self.append_range(0..self.key_count(), generator, text);
        if appended.is_err() {
            text[start..].zeroize();
            text.truncate(start);
        }
        appended
    }

    /// Generates and encodes the keys of these indices, with what separates them from the keys before. The last key of
    /// all is followed by the end of the batch.
    pub(super) fn generate_range(
        &self,
        indices: Range<u64>,
        generator: &Generator,
    ) -> Result<Bytes, GeneratorError> {
        let (open, separator, close) = self.delimiters();
        let count = indices.end - indices.start;
        let keys_len = count * (self.encoded_len_of_one() + separator.len() as u64);
        let capacity = to_usize(keys_len) + open.len() + close.len();
        let mut encoded = SecretBuf::with_capacity(capacity);
        self.append_range(indices, generator, &mut encoded.0)?;
        Ok(Bytes::from_owner(encoded))
    }

    fn append_range(
        &self,
        indices: Range<u64>,
        generator: &Generator,
        text: &mut Vec<u8>,
    ) -> Result<(), GeneratorError> {
        if self.format == Format::Raw {
            // In place. Raw keys have no batches.
            let start = text.len();
            text.resize(start + to_usize(self.length.bytes()), 0);
            return generator.fill(&mut text[start..]);
        }
        let (open, separator, close) = self.delimiters();
        for index in indices {
            text.extend_from_slice(if index == 0 { open } else { separator }.as_bytes());
            self.append_prefix(generator, text)?;
            self.append_one(generator, text)?;
            text.extend_from_slice(self.suffix().as_bytes());
            if index + 1 == self.key_count() {
                text.extend_from_slice(close.as_bytes());
            }
        }
        Ok(())
    }

    /// Generates a key or a password, and appends its characters.
    fn append_one(&self, generator: &Generator, text: &mut Vec<u8>) -> Result<(), GeneratorError> {
        let length = to_usize(self.length.bytes());
        match self.kind {
            Kind::Password(alphabet) if self.format == Format::Text => {
                return password::append(self.length, alphabet, generator, text);
            }
            Kind::Password(alphabet) => {
                let password = password::generate(self.length, alphabet, generator)?;
                self.encoding().append(password.as_bytes(), text);
            }
            Kind::Key if length <= DIRECT_MAX => {
                let mut key = SecretArray::<DIRECT_MAX>::new();
                let key = &mut key.as_mut()[..length];
                generator.fill(key)?;
                self.encoding().append(key, text);
            }
            Kind::Key => {
                self.encoding().append(Key::generate(self.length, generator)?.as_bytes(), text);
            }
        }
        Ok(())
    }

    pub(super) fn encoding(&self) -> Encoding {
        match (self.format, self.kind) {
            (Format::Raw | Format::Text, _) => Encoding::Identity,
            (Format::Hex, _) => Encoding::Hex,
            (Format::Base64, _) | (Format::Json, Kind::Key) => Encoding::Base64,
            (Format::Base64Url | Format::Jwk, _) => Encoding::Base64Url,
            (Format::Json, Kind::Password(alphabet)) => Encoding::json_string(alphabet.characters()),
        }
    }

    /// What precedes the first key, separates two keys, and follows the last.
    pub(super) fn delimiters(&self) -> (&'static str, &'static str, &'static str) {
        self.count.map_or(("", "", ""), |_| self.format.batch_delimiters())
    }

    /// Appends what precedes the characters of a key. A JWK gets a `kid` of its own random bytes, so it reveals nothing
    /// about the key.
    pub(super) fn append_prefix(
        &self,
        generator: &Generator,
        text: &mut Vec<u8>,
    ) -> Result<(), GeneratorError> {
        let mut append =
            |parts: &[&str]| parts.iter().for_each(|part| text.extend_from_slice(part.as_bytes()));
        let mut length = itoa::Buffer::new();
        let length = length.format(self.length.bytes());
        match (self.format, self.kind) {
            (Format::Raw | Format::Text | Format::Hex | Format::Base64 | Format::Base64Url, _) => {}
            (Format::Json, Kind::Key) => {
                let [start, end] = KEY_JSON;
                append(&[start, length, end]);
            }
            (Format::Json, Kind::Password(alphabet)) => {
                let [start, middle, bits, end] = PASSWORD_JSON;
                append(&[start, length, middle, alphabet.name(), bits]);
                alphabet.write_entropy_bits(self.length, |part| append(&[part]));
                append(&[end]);
            }
            (Format::Jwk, _) => {
                let mut kid = [0; KID_BYTES];
                generator.fill(&mut kid)?;
                let [start, end] = JWK;
                text.extend_from_slice(start.as_bytes());
                Encoding::Base64Url.append(&kid, text);
                text.extend_from_slice(end.as_bytes());
            }
        }
        Ok(())
    }

    /// The number of bytes that [`KeySpec::append_prefix`] appends.
    fn prefix_len(&self) -> usize {
        let sum = |parts: &[&str]| parts.iter().map(|part| part.len()).sum::<usize>();
        let digits = || itoa::Buffer::new().format(self.length.bytes()).len();
        match (self.format, self.kind) {
            (Format::Raw | Format::Text | Format::Hex | Format::Base64 | Format::Base64Url, _) => 0,
            (Format::Json, Kind::Key) => sum(&KEY_JSON) + digits(),
            (Format::Json, Kind::Password(alphabet)) => {
                let mut entropy = 0;
                alphabet.write_entropy_bits(self.length, |part| entropy += part.len());
                sum(&PASSWORD_JSON) + digits() + alphabet.name().len() + entropy
            }
            (Format::Jwk, _) => sum(&JWK) + to_usize(Encoding::Base64Url.encoded_len(KID_BYTES as u64)),
        }
    }

    /// What follows the characters of a key.
    pub(super) fn suffix(&self) -> &'static str {
        match (self.format, self.kind) {
            (Format::Raw, _) => "",
            (Format::Text | Format::Hex | Format::Base64 | Format::Base64Url, _) => "\n",
            (Format::Json, Kind::Password(_)) => "}",
            (Format::Json, Kind::Key) | (Format::Jwk, _) => r#""}"#,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::generator::OsRandom;
    use crate::keys::password::Alphabet;

    fn spec(kind: Kind, length: u64, format: Format, count: Option<u64>) -> Result<KeySpec, BatchError> {
        KeySpec::new(kind, KeyLength::new(length, u64::MAX).unwrap(), format, count)
    }

    /// A buffer for the keys is allocated at this size, so that it never grows.
    #[test]
    fn encoded_len_is_the_exact_length() {
        let generator = Generator::new(OsRandom).unwrap();
        let keys = [1, 2, 3, 4, 31, 32, 33, 100, 1024, 65_535, 65_536].map(|length| (length, None));
        let batches = [(1, 1), (1, 1024), (32, 5), (64, 1024), (20_000, 3), (65_536, 1)];
        let passwords = [(1, None), (24, None), (1024, None), (24, Some(100))];
        let batches = batches.map(|(length, count)| (length, Some(count)));
        let cases = [(Kind::Key, &keys[..]), (Kind::Key, &batches)];
        for (kind, lengths) in
            cases.into_iter().chain(Alphabet::ALL.map(|alphabet| (Kind::Password(alphabet), &passwords[..])))
        {
            for format in kind.formats().iter().copied() {
                for (length, count) in lengths.iter().copied() {
                    if count.is_none() || format.has_batches() {
                        let spec = spec(kind, length, format, count).unwrap();
                        let generated = spec.generate(&generator).unwrap();
                        assert_eq!(generated.len() as u64, spec.encoded_len(), "{spec:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_batch_has_limits() {
        let unseparable = Err(BatchError::Unseparable(Format::Raw));
        assert_eq!(spec(Kind::Key, 32, Format::Raw, Some(1)), unseparable);
        for (length, count) in [(65, 1024), (65_537, 1), (u64::MAX, 2)] {
            assert_eq!(spec(Kind::Key, length, Format::Hex, Some(count)), Err(BatchError::TooLarge));
        }
    }
}
