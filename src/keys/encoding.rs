//! Encodes bytes as characters, in constant time for keys: hexadecimal, base64, JSON strings.

use base64ct::{Base64, Base64UrlUnpadded, Encoding as _};

/// How bytes become characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// The bytes as they are.
    Identity,
    /// Lower-case hexadecimal digits.
    Hex,
    /// Base64 with padding.
    Base64,
    /// URL-safe base64 without padding.
    Base64Url,
    /// A JSON string with its quotes, of printing ASCII characters that each take up to `max_width`. If escapes take
    /// less than they might, spaces before the string make up for it: the length of a response reveals nothing about
    /// the password.
    JsonString { max_width: u64 },
}

impl Encoding {
    /// A JSON string of any of these printing ASCII characters.
    pub(super) fn json_string(characters: &[u8]) -> Self {
        Self::JsonString { max_width: if characters.iter().any(needs_escape) { 2 } else { 1 } }
    }

    /// The number of characters for `bytes` bytes.
    pub(super) fn encoded_len(self, bytes: u64) -> u64 {
        match self {
            Self::Identity => bytes,
            Self::Hex => 2 * bytes,
            Self::Base64 => bytes.div_ceil(3) * 4,
            Self::Base64Url => (bytes * 4).div_ceil(3),
            Self::JsonString { max_width } => max_width * bytes + 2,
        }
    }

    /// Appends the characters for `bytes` to `text`. A secret `text` needs the capacity for them beforehand, because a
    /// buffer that grows leaves a copy behind.
    pub(super) fn append(self, bytes: &[u8], text: &mut Vec<u8>) {
        let start = text.len();
        text.resize(start + to_usize(self.encoded_len(bytes.len() as u64)), b' ');
        let room = &mut text[start..];
        let fits = match self {
            Self::Identity => {
                room.copy_from_slice(bytes);
                true
            }
            Self::Hex => base16ct::lower::encode(bytes, room).is_ok(),
            Self::Base64 => Base64::encode(bytes, room).is_ok(),
            Self::Base64Url => Base64UrlUnpadded::encode(bytes, room).is_ok(),
            Self::JsonString { .. } => {
                write_json_string(bytes, room);
                true
            }
        };
        assert!(fits, "encoded_len() is the length that the encoders need, as a test checks");
    }
}

/// Writes the string to the end of `room`.
fn write_json_string(bytes: &[u8], room: &mut [u8]) {
    let escaped = bytes.iter().flat_map(|byte| {
        let escape = needs_escape(byte).then_some(b'\\');
        escape.into_iter().chain([*byte])
    });
    let length = 2 + bytes.len() + bytes.iter().filter(|byte| needs_escape(byte)).count();
    let padding = room.len() - length;
    let quoted = [b'"'].into_iter().chain(escaped).chain([b'"']);
    room[padding..].iter_mut().zip(quoted).for_each(|(place, character)| *place = character);
}

/// Whether JSON escapes a printing ASCII character (RFC 8259 section 7).
fn needs_escape(byte: &u8) -> bool {
    matches!(byte, b'"' | b'\\')
}

/// The size of something that is held in memory.
pub(super) fn to_usize(size: u64) -> usize {
    usize::try_from(size).expect("a buffer is far smaller than the address space")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(encoding: Encoding, bytes: &[u8]) -> String {
        let mut text = Vec::new();
        encoding.append(bytes, &mut text);
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
            assert_eq!(encoded(Encoding::Hex, bytes), hex);
            assert_eq!(encoded(Encoding::Base64, bytes), base64);
            assert_eq!(encoded(Encoding::Base64Url, bytes), base64url);
        }
    }

    #[test]
    fn escapes_do_not_change_the_length_of_a_json_string() {
        let quoted = |bytes| encoded(Encoding::json_string(b"abc\"\\"), bytes);
        assert_eq!(quoted(b"abc"), r#"   "abc""#);
        assert_eq!(quoted(br#"a"c"#), r#"  "a\"c""#);
        assert_eq!(quoted(br#"\"\"#), r#""\\\"\\""#);
        assert_eq!(encoded(Encoding::json_string(b"abc"), b"abc"), r#""abc""#);
    }
}
