//! How a key is written: the one layer that every outlet uses. What held a key, in whatever form, is wiped when it is
//! dropped; keys are encoded in constant time, and no buffer grows, since one that grows leaves a copy behind.

use std::ops::Range;
use std::sync::Arc;

use base64ct::{Base64, Base64UrlUnpadded, Encoding as _};
use bytes::Bytes;
use strum::{IntoStaticStr, VariantArray};

use crate::keys::generator::{CHUNK, Generator, GeneratorError};
use crate::keys::key::{Key, KeyLength, KeyStream, STREAM_CHUNK_SIZE, SecretBuf};
use crate::keys::password::{self, Alphabet, PASSWORD_MAX};

/// The most keys of one batch.
pub const COUNT_MAX: u64 = 1024;

/// The most key bytes of one batch.
pub const BATCH_MAX: u64 = CHUNK as u64;

/// The largest response that is generated whole, in bytes as they are sent. A larger one is streamed: it takes a permit, and
/// is generated a chunk at a time, as its client reads.
pub const WHOLE_MAX: u64 = 16 * 1024;

/// How many bytes of a batch are generated at a time: 60 JSON Web Keys, for instance, in 0.3 ms.
const BATCH_CHUNK: u64 = 8 * 1024;

/// What is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Random bytes.
    Key,
    /// Random characters of an alphabet.
    Password(Alphabet),
}

impl Kind {
    /// The formats that it is written in, the default one first.
    pub fn formats(self) -> &'static [Format] {
        match self {
            Self::Key => {
                &[Format::Raw, Format::Hex, Format::Base64, Format::Base64Url, Format::Json, Format::Jwk]
            }
            Self::Password(_) => &[Format::Text, Format::Json],
        }
    }

    /// The largest length that it may have where keys may have `max_size`.
    pub fn length_max(self, max_size: u64) -> u64 {
        match self {
            Self::Key => max_size,
            Self::Password(_) => max_size.min(PASSWORD_MAX),
        }
    }
}

/// A way of writing a key or a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Format {
    /// The bytes as they are.
    Raw,
    /// The characters of a password and a newline.
    Text,
    /// Lower-case hexadecimal digits and a newline.
    Hex,
    /// Base64 with padding (RFC 4648 section 4) and a newline.
    Base64,
    /// The URL-safe alphabet without padding (RFC 4648 section 5, as RFC 7515 has it) and a newline.
    Base64Url,
    /// An object of `length`, `encoding` and `key`; of `length`, `alphabet`, `entropy_bits` and `password`.
    Json,
    /// A JSON Web Key (RFC 7517) of type `oct`, with a random `kid`.
    Jwk,
}

impl Format {
    /// The value of `?format=` that asks for it.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Its media type, in lower case; several formats may share one. A batch of JWKs is a set, which has its own.
    pub fn media_type(self, is_batch: bool) -> &'static str {
        match self {
            Self::Raw => "application/octet-stream",
            Self::Text | Self::Hex | Self::Base64 | Self::Base64Url => "text/plain",
            Self::Json => "application/json",
            Self::Jwk if is_batch => "application/jwk-set+json",
            Self::Jwk => "application/jwk+json",
        }
    }

    /// Whether keys of it may follow one another: raw ones could not be told apart.
    pub fn has_batches(self) -> bool {
        self != Self::Raw
    }

    /// How many bytes of a long key are written at a time: as many as fill a piece. Base64 takes them by threes.
    fn piece(self) -> usize {
        match self {
            Self::Raw | Self::Text => STREAM_CHUNK_SIZE,
            Self::Hex => STREAM_CHUNK_SIZE / 2,
            Self::Base64 | Self::Base64Url | Self::Json | Self::Jwk => STREAM_CHUNK_SIZE / 4 * 3,
        }
    }

    /// A name for a key, where the format has one. It is drawn, so that it says nothing of the key.
    fn id(self, generator: &Generator) -> Result<String, GeneratorError> {
        if self != Self::Jwk {
            return Ok(String::new());
        }
        let mut id = [0; ID];
        generator.fill(&mut id)?;
        Ok(Base64UrlUnpadded::encode_string(&id))
    }

    /// A text as long as [`Format::id`] is.
    fn measure_of_id(self) -> String {
        if self == Self::Jwk { Base64UrlUnpadded::encode_string(&[0; ID]) } else { String::new() }
    }

    /// What stands before the keys of a batch, between two of them, and after all.
    fn around_batch(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Raw | Self::Text | Self::Hex | Self::Base64 | Self::Base64Url => ("", "", ""),
            Self::Json => ("[", ",", "]"),
            Self::Jwk => (r#"{"keys":["#, ",", "]}"),
        }
    }
}

/// Random bytes in the `kid` of a JWK.
const ID: usize = 16;

/// How bytes become characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    /// As they are.
    Same,
    /// Lower-case hexadecimal digits.
    Hex,
    /// Base64 with padding.
    Base64,
    /// URL-safe base64 without.
    Base64Url,
    /// A JSON string with its quotes, of ASCII characters that each take up to `widest`. Where escapes make it shorter
    /// than it might be, spaces stand before it: the length of an answer says nothing of the password.
    Quoted { widest: u64 },
}

impl Encoding {
    /// How many characters `bytes` bytes take.
    fn digits(self, bytes: u64) -> u64 {
        match self {
            Self::Same => bytes,
            Self::Hex => 2 * bytes,
            Self::Base64 => bytes.div_ceil(3) * 4,
            Self::Base64Url => (bytes * 4).div_ceil(3),
            Self::Quoted { widest } => widest * bytes + 2,
        }
    }

    /// Appends the characters for `bytes` to `text`, which has the room for them.
    fn append(self, bytes: &[u8], text: &mut Vec<u8>) {
        let start = text.len();
        text.resize(start + whole(self.digits(bytes.len() as u64)), b' ');
        let room = &mut text[start..];
        let fits = match self {
            Self::Same => {
                room.copy_from_slice(bytes);
                true
            }
            Self::Hex => base16ct::lower::encode(bytes, room).is_ok(),
            Self::Base64 => Base64::encode(bytes, room).is_ok(),
            Self::Base64Url => Base64UrlUnpadded::encode(bytes, room).is_ok(),
            Self::Quoted { .. } => {
                let escaped = bytes.iter().flat_map(|byte| {
                    let escape = is_escaped(byte).then_some(b'\\');
                    escape.into_iter().chain([*byte])
                });
                let length = 2 + bytes.len() + bytes.iter().filter(|byte| is_escaped(byte)).count();
                let padding = room.len() - length;
                let quoted = [b'"'].into_iter().chain(escaped).chain([b'"']);
                room[padding..].iter_mut().zip(quoted).for_each(|(place, character)| *place = character);
                true
            }
        };
        assert!(fits, "the room is measured by digits(), which a test holds to the encoders");
    }
}

/// Whether JSON has a printing character of ASCII escaped (RFC 8259 section 7).
fn is_escaped(byte: &u8) -> bool {
    matches!(byte, b'"' | b'\\')
}

/// What is handed out: what is drawn, how long it is, how it is written, and how many there are.
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
    /// More than [`BATCH_MAX`] bytes in all.
    TooLarge,
}

impl KeySpec {
    /// `count` keys of `length` bytes each; without a count, one that is no batch.
    ///
    /// # Errors
    /// A batch that can't be.
    pub fn new(
        kind: Kind,
        length: KeyLength,
        format: Format,
        count: Option<u64>,
    ) -> Result<Self, BatchError> {
        let shape = Self { kind, length, format, count };
        match count {
            None => Ok(shape),
            Some(_) if !format.has_batches() => Err(BatchError::Unseparable(format)),
            Some(count) if length.bytes().saturating_mul(count) > BATCH_MAX => Err(BatchError::TooLarge),
            Some(_) => Ok(shape),
        }
    }

    /// What is drawn.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// How long each key is, in bytes, or in characters that are a byte each.
    pub fn length(&self) -> KeyLength {
        self.length
    }

    /// How it is written.
    pub fn format(&self) -> Format {
        self.format
    }

    /// How many keys a batch has; `None` for one that is no batch.
    pub fn count(&self) -> Option<u64> {
        self.count
    }

    /// How many keys there are.
    pub fn keys(&self) -> u64 {
        self.count.unwrap_or(1)
    }

    /// How many key bytes there are in all.
    pub fn key_bytes(&self) -> u64 {
        self.length.bytes() * self.keys()
    }

    /// Whether it is generated a chunk at a time instead of being held in memory whole.
    pub fn is_streamed(&self) -> bool {
        self.size() > WHOLE_MAX
    }

    /// The value of `Content-Type`.
    pub fn content_type(&self) -> &'static str {
        match self.format.media_type(self.count.is_some()) {
            "text/plain" => "text/plain; charset=utf-8",
            other => other,
        }
    }

    /// How many bytes it takes written, known before a key is drawn.
    pub fn size(&self) -> u64 {
        let (open, between, close) = self.around_all();
        self.keys() * self.size_of_one()
            + (self.keys() - 1) * between.len() as u64
            + (open.len() + close.len()) as u64
    }

    /// How many bytes one key takes, without what separates keys.
    fn size_of_one(&self) -> u64 {
        let (before, after) = self.around(&self.format.measure_of_id());
        (before.len() + after.len()) as u64 + self.script().digits(self.length.bytes())
    }

    /// What stands before the first key, between two of them, and after the last.
    fn around_all(&self) -> (&'static str, &'static str, &'static str) {
        self.count.map_or(("", "", ""), |_| self.format.around_batch())
    }

    /// Draws and writes it, in one buffer that is wiped when the last use of its bytes is dropped. Not for what is
    /// streamed.
    ///
    /// # Errors
    /// The generator's failure.
    pub fn generate(&self, generator: &Generator) -> Result<Bytes, GeneratorError> {
        if self.format == Format::Raw {
            return Ok(self.draw_one(generator)?.into_bytes());
        }
        self.draw_some(0..self.keys(), generator)
    }

    /// Draws and writes keys `numbers` of a batch, with what separates them from those before, and what ends the batch.
    fn draw_some(&self, numbers: Range<u64>, generator: &Generator) -> Result<Bytes, GeneratorError> {
        let (open, between, close) = self.around_all();
        let count = numbers.end - numbers.start;
        let most = count * (self.size_of_one() + between.len() as u64) + (open.len() + close.len()) as u64;
        let mut written = SecretBuf(Vec::with_capacity(whole(most))); // never grows
        let text = &mut written.0;
        for number in numbers {
            let (before, after) = self.around(&self.format.id(generator)?);
            let key = self.draw_one(generator)?;
            text.extend_from_slice(if number == 0 { open } else { between }.as_bytes());
            text.extend_from_slice(before.as_bytes());
            self.script().append(key.as_bytes(), text);
            text.extend_from_slice(after.as_bytes());
            if number + 1 == self.keys() {
                text.extend_from_slice(close.as_bytes());
            }
        }
        Ok(Bytes::from_owner(written))
    }

    fn draw_one(&self, generator: &Generator) -> Result<Key, GeneratorError> {
        match self.kind {
            Kind::Key => Key::generate(self.length, generator),
            Kind::Password(alphabet) => password::generate(self.length, alphabet, generator),
        }
    }

    fn script(&self) -> Encoding {
        match (self.format, self.kind) {
            (Format::Raw | Format::Text, _) => Encoding::Same,
            (Format::Hex, _) => Encoding::Hex,
            (Format::Base64, _) | (Format::Json, Kind::Key) => Encoding::Base64,
            (Format::Base64Url | Format::Jwk, _) => Encoding::Base64Url,
            (Format::Json, Kind::Password(alphabet)) => {
                let is_wide = alphabet.characters().iter().any(is_escaped);
                Encoding::Quoted { widest: if is_wide { 2 } else { 1 } }
            }
        }
    }

    /// What stands before the characters of a key, and after them.
    fn around(&self, id: &str) -> (String, &'static str) {
        let length = self.length.bytes();
        match (self.format, self.kind) {
            (Format::Raw, _) => (String::new(), ""),
            (Format::Text | Format::Hex | Format::Base64 | Format::Base64Url, _) => (String::new(), "\n"),
            (Format::Json, Kind::Key) => {
                (format!(r#"{{"length":{length},"encoding":"base64","key":""#), r#""}"#)
            }
            (Format::Json, Kind::Password(alphabet)) => {
                let (name, bits) = (alphabet.name(), alphabet.entropy_bits(self.length));
                let before = format!(
                    r#"{{"length":{length},"alphabet":"{name}","entropy_bits":{bits:.1},"password":"#
                );
                (before, "}")
            }
            (Format::Jwk, _) => (format!(r#"{{"kty":"oct","kid":"{id}","k":""#), r#""}"#),
        }
    }
}

/// A streamed response: generated and written a chunk at a time, as fast as the reader takes it.
#[derive(Debug)]
pub struct EncodedStream {
    shape: KeySpec,
    generator: Arc<Generator>,
    /// The first chunk, until it is taken.
    first: Option<Chunk>,
    /// How many keys were begun.
    begun: u64,
    /// The rest of a key that is larger than a chunk.
    current: Option<KeyStream>,
    remaining: u64,
}

/// A chunk of a streamed response.
#[derive(Debug)]
pub struct Chunk {
    /// What is sent; wiped when the last use of it is dropped.
    pub bytes: Bytes,
    /// How many bytes of keys are in it.
    pub key_bytes: u64,
    /// How many keys begin in it.
    pub keys: u64,
}

impl EncodedStream {
    /// The keys of `shape`. The first chunk is generated here, so that a generator out of service is known before
    /// anything was promised.
    ///
    /// # Errors
    /// The generator's failure.
    pub fn start(shape: &KeySpec, generator: Arc<Generator>) -> Result<Self, GeneratorError> {
        let mut writing =
            Self { shape: *shape, generator, first: None, begun: 0, current: None, remaining: shape.size() };
        writing.first = Some(writing.generate()?);
        Ok(writing)
    }

    /// What is written.
    pub fn shape(&self) -> &KeySpec {
        &self.shape
    }

    /// How many bytes are still to be sent.
    pub fn remaining(&self) -> u64 {
        self.remaining
    }

    /// The next chunk, where there is one.
    fn generate(&mut self) -> Result<Chunk, GeneratorError> {
        let one = self.shape.size_of_one();
        if one > BATCH_CHUNK {
            return self.generate_part();
        }
        let count = (BATCH_CHUNK / one).min(self.shape.keys() - self.begun);
        let bytes = self.shape.draw_some(self.begun..self.begun + count, &self.generator)?;
        self.begun += count;
        Ok(Chunk { bytes, key_bytes: count * self.shape.length.bytes(), keys: count })
    }

    /// A part of a key that is larger than a chunk.
    fn generate_part(&mut self) -> Result<Chunk, GeneratorError> {
        let shape = self.shape;
        let (open, between, close) = shape.around_all();
        let mut before = String::new();
        let mut keys = 0;
        let stream = match &mut self.current {
            Some(stream) => stream,
            None => {
                before.push_str(if self.begun == 0 { open } else { between });
                before.push_str(&shape.around(&shape.format.id(&self.generator)?).0);
                (keys, self.begun) = (1, self.begun + 1);
                let chunk = shape.format.piece();
                self.current.insert(KeyStream::new(shape.length, chunk, Arc::clone(&self.generator)))
            }
        };
        let key = stream.next().expect("a stream is dropped when it has no more")?;
        let key_bytes = key.as_bytes().len() as u64;
        let mut after = String::new();
        if stream.remaining() == 0 {
            self.current = None;
            after.push_str(shape.around("").1);
            if self.begun == shape.keys() {
                after.push_str(close);
            }
        }
        if shape.format == Format::Raw {
            return Ok(Chunk { bytes: key.into_bytes(), key_bytes, keys });
        }
        let size = before.len() + whole(shape.script().digits(key_bytes)) + after.len();
        let mut written = SecretBuf(Vec::with_capacity(size));
        let text = &mut written.0;
        text.extend_from_slice(before.as_bytes());
        shape.script().append(key.as_bytes(), text);
        text.extend_from_slice(after.as_bytes());
        Ok(Chunk { bytes: Bytes::from_owner(written), key_bytes, keys })
    }
}

impl Iterator for EncodedStream {
    type Item = Result<Chunk, GeneratorError>;

    /// The next chunk. After a failure the rest must not be sent: it stays short, for the reader to see.
    fn next(&mut self) -> Option<Self::Item> {
        if self.remaining == 0 {
            return None;
        }
        let piece = self.first.take().map_or_else(|| self.generate(), Ok);
        if let Ok(piece) = &piece {
            self.remaining -= piece.bytes.len() as u64;
        }
        Some(piece)
    }
}

/// A size of something that is held in memory.
fn whole(size: u64) -> usize {
    usize::try_from(size).expect("what is held whole is far below the address space")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::generator::OsRandom;

    fn length(bytes: u64) -> KeyLength {
        KeyLength::parse(&bytes.to_string(), u64::MAX).unwrap()
    }

    fn written(script: Encoding, bytes: &[u8]) -> String {
        let mut text = Vec::new();
        script.append(bytes, &mut text);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn characters_are_those_of_rfc_4648() {
        // Section 10, and the two characters in which the alphabets differ.
        for (bytes, hex, base64, base64url) in [
            (&b"f"[..], "66", "Zg==", "Zg"),
            (b"fo", "666f", "Zm8=", "Zm8"),
            (b"foo", "666f6f", "Zm9v", "Zm9v"),
            (b"foobar", "666f6f626172", "Zm9vYmFy", "Zm9vYmFy"),
            (&[0xfb, 0xff, 0xbf], "fbffbf", "+/+/", "-_-_"),
        ] {
            assert_eq!(written(Encoding::Hex, bytes), hex);
            assert_eq!(written(Encoding::Base64, bytes), base64);
            assert_eq!(written(Encoding::Base64Url, bytes), base64url);
        }
    }

    #[test]
    fn a_quoted_password_is_as_long_as_any_other() {
        let quoted = |bytes| written(Encoding::Quoted { widest: 2 }, bytes);
        assert_eq!(quoted(b"abc"), r#"   "abc""#);
        assert_eq!(quoted(br#"a"c"#), r#"  "a\"c""#);
        assert_eq!(quoted(br#"\"\"#), r#""\\\"\\""#);
        assert_eq!(written(Encoding::Quoted { widest: 1 }, b"abc"), r#""abc""#);
    }

    #[test]
    fn the_size_is_known_before_anything_is_drawn() {
        let generator = Arc::new(Generator::new(OsRandom).unwrap());
        for format in Kind::Key.formats().iter().copied() {
            for bytes in [1, 2, 3, 4, 31, 32, 33, 100, 1024, 65_535, 65_536] {
                let shape = KeySpec::new(Kind::Key, length(bytes), format, None).unwrap();
                assert_eq!(shape.generate(&generator).unwrap().len() as u64, shape.size(), "{shape:?}");
            }
            for bytes in [65_537, 98_304, 98_305, 300_000] {
                let shape = KeySpec::new(Kind::Key, length(bytes), format, None).unwrap();
                let mut writing = EncodedStream::start(&shape, Arc::clone(&generator)).unwrap();
                let pieces: Vec<_> = writing.by_ref().map(Result::unwrap).collect();
                assert_eq!(pieces.iter().map(|piece| piece.bytes.len() as u64).sum::<u64>(), shape.size());
                assert_eq!(pieces.iter().map(|piece| piece.key_bytes).sum::<u64>(), bytes);
                assert_eq!(writing.remaining(), 0);
                assert!(pieces.iter().all(|piece| piece.bytes.len() <= CHUNK + 100), "{shape:?}");
            }
        }
        for format in Kind::Key.formats().iter().copied().filter(|format| format.has_batches()) {
            for (bytes, count) in [(1, 1), (1, 1024), (32, 5), (64, 1024), (20_000, 3), (65_536, 1)] {
                let shape = KeySpec::new(Kind::Key, length(bytes), format, Some(count)).unwrap();
                assert_eq!(shape.generate(&generator).unwrap().len() as u64, shape.size(), "{shape:?}");
                let pieces: Vec<_> = EncodedStream::start(&shape, Arc::clone(&generator))
                    .unwrap()
                    .map(Result::unwrap)
                    .collect();
                assert_eq!(pieces.iter().map(|piece| piece.bytes.len() as u64).sum::<u64>(), shape.size());
                assert_eq!(pieces.iter().map(|piece| piece.key_bytes).sum::<u64>(), bytes * count);
                assert_eq!(pieces.iter().map(|piece| piece.keys).sum::<u64>(), count);
            }
        }
        for alphabet in Alphabet::ALL {
            for format in Kind::Password(alphabet).formats() {
                for (bytes, count) in [(1, None), (24, None), (1024, None), (24, Some(100))] {
                    let kind = Kind::Password(alphabet);
                    let shape = KeySpec::new(kind, length(bytes), *format, count).unwrap();
                    assert_eq!(shape.generate(&generator).unwrap().len() as u64, shape.size(), "{shape:?}");
                }
            }
        }
    }

    #[test]
    fn a_batch_has_bounds() {
        assert_eq!(
            KeySpec::new(Kind::Key, length(32), Format::Raw, Some(1)),
            Err(BatchError::Unseparable(Format::Raw))
        );
        for (bytes, count) in [(65, 1024), (65_537, 1), (u64::MAX, 2)] {
            assert_eq!(
                KeySpec::new(Kind::Key, length(bytes), Format::Hex, Some(count)),
                Err(BatchError::TooLarge)
            );
        }
    }
}
