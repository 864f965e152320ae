//! Bearer tokens: their generation, form and digest.
//!
//! A token is `ks_` and 64 hexadecimal digits: 256 random bits. Nobody can search that space, so a plain SHA-256 of it
//! may lie in a file; a slow hash protects secrets that people choose, and would only make each request slow here.

use std::fmt;

use base16ct::lower;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::keys::generator::{Generator, GeneratorError};

/// The prefix of every token, by which scanners of leaked secrets recognise one: `ks_[0-9a-f]{64}`.
pub const PREFIX: &str = "ks_";

/// Random bytes in a token.
const SECRET_LENGTH: usize = 32;

/// Length of a token's text in bytes.
const TEXT_LENGTH: usize = PREFIX.len() + 2 * SECRET_LENGTH;

/// The SHA-256 digest of a token's text.
pub type Digest = [u8; 32];

/// A new token: its text, which is shown once, and its digest, which is stored.
pub struct Token {
    /// The text, wiped when dropped.
    pub text: Zeroizing<String>,
    /// The digest of the text.
    pub digest: Digest,
}

impl Token {
    /// Generates a token.
    ///
    /// # Errors
    /// The generator fails.
    pub fn generate(generator: &Generator) -> Result<Self, GeneratorError> {
        let mut secret = Zeroizing::new([0; SECRET_LENGTH]);
        generator.fill(&mut secret[..])?;
        // With its full capacity, since growing would leave an unwiped copy behind.
        let mut text = Zeroizing::new(String::with_capacity(TEXT_LENGTH));
        text.push_str(PREFIX);
        let mut digits = Zeroizing::new([0; 2 * SECRET_LENGTH]);
        text.push_str(lower::encode_str(&secret[..], &mut digits[..]).expect("two digits a byte"));
        let digest = Sha256::digest(text.as_bytes()).into();
        Ok(Self { text, digest })
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// The digest of a token's text; `None` if `text` does not have the form of a token. Tokens are compared by their
/// digests only.
pub(crate) fn digest_of(text: &[u8]) -> Option<Digest> {
    let digits = text.strip_prefix(PREFIX.as_bytes())?;
    let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    (text.len() == TEXT_LENGTH && digits.iter().all(is_digit)).then(|| Sha256::digest(text).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::generator::OsRandom;

    #[test]
    fn a_token_has_the_form_that_scanners_know() {
        let generator = Generator::new(OsRandom).unwrap();
        let token = Token::generate(&generator).unwrap();
        assert_eq!((token.text.len(), &token.text[..3]), (67, "ks_"));
        assert_eq!(digest_of(token.text.as_bytes()), Some(token.digest));
        assert_ne!(token.digest, Token::generate(&generator).unwrap().digest);
    }

    #[test]
    fn debug_output_of_a_token_hides_its_text() {
        let token = Token::generate(&Generator::new(OsRandom).unwrap()).unwrap();
        assert_eq!(format!("{token:?}"), "Token");
    }
}
