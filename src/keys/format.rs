//! What clients can request, keys and passwords, and the formats of each: names, media types, batches.

use strum::{IntoStaticStr, VariantArray};

use crate::keys::password::{Alphabet, PASSWORD_MAX};

/// The kind of secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Random bytes.
    Key,
    /// Random characters of an alphabet.
    Password(Alphabet),
}

impl Kind {
    /// The formats of this kind, the default one first.
    pub fn formats(self) -> &'static [Format] {
        match self {
            Self::Key => {
                &[Format::Raw, Format::Hex, Format::Base64, Format::Base64Url, Format::Json, Format::Jwk]
            }
            Self::Password(_) => &[Format::Text, Format::Json],
        }
    }

    /// The largest length of this kind, in bytes or characters, where a key may have `max_size` bytes.
    pub fn length_max(self, max_size: u64) -> u64 {
        match self {
            Self::Key => max_size,
            Self::Password(_) => max_size.min(PASSWORD_MAX),
        }
    }
}

/// How a key or a password is written.
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
    /// Base64 with the URL-safe alphabet, without padding (RFC 4648 section 5, as in RFC 7515), and a newline.
    Base64Url,
    /// An object: of a key, `length`, `encoding` and `key`; of a password, `length`, `alphabet`, `entropy_bits` and
    /// `password`.
    Json,
    /// A JSON Web Key (RFC 7517) of type `oct`, with a random `kid`.
    Jwk,
}

impl Format {
    /// The value of `?format=` that selects this format.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// The media type, in lower case; several formats may share one. A batch of JWKs is a set, which has its own.
    pub fn media_type(self, is_batch: bool) -> &'static str {
        match self {
            Self::Raw => "application/octet-stream",
            Self::Text | Self::Hex | Self::Base64 | Self::Base64Url => "text/plain",
            Self::Json => "application/json",
            Self::Jwk if is_batch => "application/jwk-set+json",
            Self::Jwk => "application/jwk+json",
        }
    }

    /// Whether a batch can have this format: raw keys could not be told apart.
    pub fn has_batches(self) -> bool {
        self != Self::Raw
    }

    /// What precedes the first key of a batch, separates two keys, and follows the last.
    pub(super) fn batch_delimiters(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Raw | Self::Text | Self::Hex | Self::Base64 | Self::Base64Url => ("", "", ""),
            Self::Json => ("[", ",", "]"),
            Self::Jwk => (r#"{"keys":["#, ",", "]}"),
        }
    }
}
