//! Keys that are too large to be held in memory whole: generated and encoded a chunk at a time.

use std::sync::Arc;

use bytes::Bytes;

use crate::keys::encoding::to_usize;
use crate::keys::format::Format;
use crate::keys::generator::{Generator, GeneratorError};
use crate::keys::key::KeyStream;
use crate::keys::key_spec::KeySpec;
use crate::keys::secret_buf::{STREAM_CHUNK_SIZE, SecretBuf};

/// The most bytes of a batch that are generated at a time: 60 JSON Web Keys, for instance, in 0.3 ms.
const BATCH_CHUNK_SIZE: u64 = 8 * 1024;

/// A streamed response: generated and encoded a chunk at a time, when the reader asks for the next chunk.
#[derive(Debug)]
pub struct EncodedStream {
    spec: KeySpec,
    generator: Arc<Generator>,
    /// The first chunk, until it is taken.
    first: Option<Chunk>,
    keys_started: u64,
    /// The rest of a key that is larger than a chunk.
    current: Option<KeyStream>,
    /// Bytes of the response that are still to be taken.
    remaining: u64,
}

/// A chunk of a streamed response.
#[derive(Debug)]
pub struct Chunk {
    /// The bytes to send; wiped when the last use of them is dropped.
    pub bytes: Bytes,
    /// The number of key bytes in the chunk, before encoding.
    pub key_bytes: u64,
    /// The number of keys that begin in the chunk.
    pub keys_started: u64,
}

impl EncodedStream {
    /// A stream of the keys of `spec`. Its first chunk is generated here, so that a failed generator is known before a
    /// response begins.
    ///
    /// # Errors
    /// The generator's failure.
    pub fn start(spec: &KeySpec, generator: Arc<Generator>) -> Result<Self, GeneratorError> {
        let remaining = spec.encoded_len();
        let mut stream =
            Self { spec: *spec, generator, first: None, keys_started: 0, current: None, remaining };
        stream.first = Some(stream.generate()?);
        Ok(stream)
    }

    /// The keys that are streamed.
    pub fn spec(&self) -> &KeySpec {
        &self.spec
    }

    /// The number of bytes that are still to be taken.
    pub fn remaining(&self) -> u64 {
        self.remaining
    }

    /// Generates the next chunk, which must exist.
    #[inline(never)] // Each caller would get a copy of the cipher and the encoders.
    fn generate(&mut self) -> Result<Chunk, GeneratorError> {
        let one = self.spec.encoded_len_of_one();
        if one > BATCH_CHUNK_SIZE {
            return self.generate_part();
        }
        let count = (BATCH_CHUNK_SIZE / one).min(self.spec.key_count() - self.keys_started);
        let indices = self.keys_started..self.keys_started + count;
        let bytes = self.spec.generate_range(indices, &self.generator)?;
        self.keys_started += count;
        Ok(Chunk { bytes, key_bytes: count * self.spec.length().bytes(), keys_started: count })
    }

    /// Generates a part of a key that is larger than a chunk.
    fn generate_part(&mut self) -> Result<Chunk, GeneratorError> {
        let spec = self.spec;
        let (open, separator, close) = spec.delimiters();
        let mut before = Vec::new();
        let mut keys_started = 0;
        let stream = match &mut self.current {
            Some(stream) => stream,
            None => {
                before.extend_from_slice(if self.keys_started == 0 { open } else { separator }.as_bytes());
                spec.append_prefix(&self.generator, &mut before)?;
                keys_started = 1;
                self.keys_started += 1;
                let chunk_size = chunk_size(spec.format());
                self.current.insert(KeyStream::new(spec.length(), chunk_size, Arc::clone(&self.generator)))
            }
        };
        let key = stream.next().expect("a key stream is dropped when it has no more")?;
        let key_bytes = key.as_bytes().len() as u64;
        let mut after = String::new();
        if stream.remaining() == 0 {
            self.current = None;
            after.push_str(spec.suffix());
            if self.keys_started == spec.key_count() {
                after.push_str(close);
            }
        }
        if spec.format() == Format::Raw {
            return Ok(Chunk { bytes: key.into_bytes(), key_bytes, keys_started });
        }
        let capacity = before.len() + to_usize(spec.encoding().encoded_len(key_bytes)) + after.len();
        let mut encoded = SecretBuf::with_capacity(capacity);
        let text = &mut encoded.0;
        text.extend_from_slice(&before);
        spec.encoding().append(key.as_bytes(), text);
        text.extend_from_slice(after.as_bytes());
        Ok(Chunk { bytes: Bytes::from_owner(encoded), key_bytes, keys_started })
    }
}

/// The number of key bytes that fill a chunk when they are encoded. Base64 encodes three at a time.
fn chunk_size(format: Format) -> usize {
    match format {
        Format::Raw | Format::Text => STREAM_CHUNK_SIZE,
        Format::Hex => STREAM_CHUNK_SIZE / 2,
        Format::Base64 | Format::Base64Url | Format::Json | Format::Jwk => STREAM_CHUNK_SIZE / 4 * 3,
    }
}

impl Iterator for EncodedStream {
    type Item = Result<Chunk, GeneratorError>;

    /// The next chunk. After a failure the rest must not be sent: the reader sees that the stream is too short.
    fn next(&mut self) -> Option<Self::Item> {
        if self.remaining == 0 {
            return None;
        }
        let chunk = self.first.take().map_or_else(|| self.generate(), Ok);
        if let Ok(chunk) = &chunk {
            self.remaining -= chunk.bytes.len() as u64;
        }
        Some(chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::format::Kind;
    use crate::keys::generator::{CHUNK_SIZE, OsRandom};
    use crate::keys::key::KeyLength;

    #[test]
    fn a_stream_has_exactly_the_encoded_length() {
        let generator = Arc::new(Generator::new(OsRandom).unwrap());
        let keys = [65_537, 98_304, 98_305, 300_000].map(|bytes| (bytes, None));
        let batches = [(1, 1), (1, 1024), (32, 5), (64, 1024), (20_000, 3), (65_536, 1)]
            .map(|(bytes, count)| (bytes, Some(count)));
        for format in Kind::Key.formats().iter().copied() {
            for (bytes, count) in keys.into_iter().chain(batches) {
                let length = KeyLength::new(bytes, u64::MAX).unwrap();
                let Ok(spec) = KeySpec::new(Kind::Key, length, format, count) else {
                    assert!(!format.has_batches());
                    continue;
                };
                let mut stream = EncodedStream::start(&spec, Arc::clone(&generator)).unwrap();
                let chunks: Vec<_> = stream.by_ref().map(Result::unwrap).collect();
                let sum = |of: fn(&Chunk) -> u64| chunks.iter().map(of).sum::<u64>();
                assert_eq!(sum(|chunk| chunk.bytes.len() as u64), spec.encoded_len(), "{spec:?}");
                assert_eq!(sum(|chunk| chunk.key_bytes), bytes * spec.key_count(), "{spec:?}");
                assert_eq!(sum(|chunk| chunk.keys_started), spec.key_count(), "{spec:?}");
                assert_eq!(stream.remaining(), 0);
                assert!(chunks.iter().all(|chunk| chunk.bytes.len() <= CHUNK_SIZE + 100), "{spec:?}");
            }
        }
    }
}
