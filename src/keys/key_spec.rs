//! What to generate: the kind, length, format and number of keys, and the one way to generate and encode them whole.
//!
//! Every buffer that held a key, in whatever form, is wiped when it is dropped. Keys are encoded in constant time, and
//! no buffer grows, because one that grows leaves a copy behind.

use std::ops::Range;

use base64ct::{Base64UrlUnpadded, Encoding as _};
use bytes::Bytes;

use crate::keys::encoding::{Encoding, to_usize};
use crate::keys::format::{Format, Kind};
use crate::keys::generator::{CHUNK_SIZE, Generator, GeneratorError};
use crate::keys::key::{Key, KeyLength};
use crate::keys::password;
use crate::keys::secret_buf::SecretBuf;

/// The most keys of one batch.
pub const COUNT_MAX: u64 = 1024;

/// The most key bytes of one batch.
pub const BATCH_BYTES_MAX: u64 = CHUNK_SIZE as u64;

/// The largest response that is generated whole, in bytes as they are sent. A larger one is streamed: it takes a
/// permit, and is generated a chunk at a time, as its client reads.
const WHOLE_MAX: u64 = 16 * 1024;

/// Random bytes in the `kid` of a JWK.
const KID_BYTES: usize = 16;

/// A text as long as every `kid`.
const KID_PLACEHOLDER: &str = "AAAAAAAAAAAAAAAAAAAAAA";

/// One key or password, or a batch of them, in one format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeySpec {
    kind: Kind,
    length: KeyLength,
    format: Format,
    /// `None` is one key that is not in a batch.
    count: Option<u64>,
}

/// Why there is no such batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchError {
    /// Keys of this format could not be told apart.
    Unseparable(Format),
    /// More than [`BATCH_BYTES_MAX`] key bytes in all.
    TooLarge,
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
        let spec = Self { kind, length, format, count };
        match count {
            None => Ok(spec),
            Some(_) if !format.has_batches() => Err(BatchError::Unseparable(format)),
            Some(count) if length.bytes().saturating_mul(count) > BATCH_BYTES_MAX => {
                Err(BatchError::TooLarge)
            }
            Some(_) => Ok(spec),
        }
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

    /// The value of `Content-Type`.
    pub fn content_type(&self) -> &'static str {
        match self.format.media_type(self.count.is_some()) {
            "text/plain" => "text/plain; charset=utf-8",
            other => other,
        }
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
        let around = self.prefix(KID_PLACEHOLDER).len() + self.suffix().len();
        around as u64 + self.encoding().encoded_len(self.length.bytes())
    }

    /// Generates and encodes all keys, in one buffer that is wiped when the last use of its bytes is dropped. Not for
    /// what is streamed.
    ///
    /// # Errors
    /// The generator's failure.
    pub fn generate(&self, generator: &Generator) -> Result<Bytes, GeneratorError> {
        if self.format == Format::Raw {
            return Ok(self.generate_one(generator)?.into_bytes());
        }
        self.generate_range(0..self.key_count(), generator)
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
        let text = &mut encoded.0;
        for index in indices {
            let prefix = self.generate_prefix(generator)?;
            let key = self.generate_one(generator)?;
            text.extend_from_slice(if index == 0 { open } else { separator }.as_bytes());
            text.extend_from_slice(prefix.as_bytes());
            self.encoding().append(key.as_bytes(), text);
            text.extend_from_slice(self.suffix().as_bytes());
            if index + 1 == self.key_count() {
                text.extend_from_slice(close.as_bytes());
            }
        }
        Ok(Bytes::from_owner(encoded))
    }

    fn generate_one(&self, generator: &Generator) -> Result<Key, GeneratorError> {
        match self.kind {
            Kind::Key => Key::generate(self.length, generator),
            Kind::Password(alphabet) => password::generate(self.length, alphabet, generator),
        }
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

    /// What precedes the characters of a key. A JWK gets a `kid` of its own random bytes, so it reveals nothing about
    /// the key.
    pub(super) fn generate_prefix(&self, generator: &Generator) -> Result<String, GeneratorError> {
        if self.format != Format::Jwk {
            return Ok(self.prefix(""));
        }
        let mut kid = [0; KID_BYTES];
        generator.fill(&mut kid)?;
        Ok(self.prefix(&Base64UrlUnpadded::encode_string(&kid)))
    }

    fn prefix(&self, kid: &str) -> String {
        let length = self.length.bytes();
        match (self.format, self.kind) {
            (Format::Raw | Format::Text | Format::Hex | Format::Base64 | Format::Base64Url, _) => {
                String::new()
            }
            (Format::Json, Kind::Key) => format!(r#"{{"length":{length},"encoding":"base64","key":""#),
            (Format::Json, Kind::Password(alphabet)) => {
                let (name, bits) = (alphabet.name(), alphabet.entropy_bits(self.length));
                format!(r#"{{"length":{length},"alphabet":"{name}","entropy_bits":{bits:.1},"password":"#)
            }
            (Format::Jwk, _) => format!(r#"{{"kty":"oct","kid":"{kid}","k":""#),
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
