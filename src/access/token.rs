//! Bearer tokens: how one is made, the file of their hashes, and how one that comes in is recognised.
//!
//! A token is `ks_` and 64 hexadecimal digits: 256 random bits. Nobody can search that space, so a plain SHA-256 of it
//! may lie in a file; a slow hash protects secrets that people choose, and would only make each request slow here.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::num::NonZeroU64;
use std::path::Path;
use std::time::SystemTime;

use base16ct::{HexDisplay, lower};
use sha2::{Digest as _, Sha256};
use x509_cert::der::DateTime;
use zeroize::Zeroizing;

use crate::access::file_source;
use crate::keys::generator::{Generator, GeneratorError};

/// What every token begins with, for scanners of leaked secrets to know it by: `ks_[0-9a-f]{64}`.
pub const PREFIX: &str = "ks_";

/// How long a token is, as text.
pub const LENGTH: usize = PREFIX.len() + 2 * SECRET;

/// How many random bytes are in it.
const SECRET: usize = 32;

/// The largest file of tokens that is read, in bytes: some 80,000 of them.
const FILE_MAX: u64 = 8 << 20;

/// The SHA-256 of something, or what stands for it.
pub type Digest = [u8; 32];

/// A token that was just made: its text, which is shown once, and its hash, which is kept.
pub struct Token {
    /// The text. It is wiped when dropped.
    pub text: Zeroizing<String>,
    /// Its hash.
    pub digest: Digest,
}

impl Token {
    /// A new token.
    ///
    /// # Errors
    /// The generator's failure.
    pub fn generate(generator: &Generator) -> Result<Self, GeneratorError> {
        let mut secret = Zeroizing::new([0; SECRET]);
        generator.fill(&mut secret[..])?;
        let mut text = Zeroizing::new(String::with_capacity(LENGTH)); // never moved by growing
        text.push_str(PREFIX);
        let mut digits = Zeroizing::new([0; 2 * SECRET]);
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

/// One line of the file: a token's hash, and what its bearer may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Whose it is; several tokens may have one name, so that a new one can replace an old one bit by bit.
    pub name: Name,
    /// The token's hash.
    pub digest: Digest,
    /// The largest key, where it is less than everyone's.
    pub max_size: Option<u64>,
    /// Requests a second, in place of those of an address.
    pub rate_requests: Option<NonZeroU64>,
    /// Key bytes a second, in place of those of an address.
    pub rate_bytes: Option<NonZeroU64>,
    /// The first day on which it is not valid any more.
    pub expires: Option<Date>,
}

impl Grant {
    /// A grant without bounds of its own.
    pub fn new(name: Name, digest: Digest) -> Self {
        Self { name, digest, max_size: None, rate_requests: None, rate_bytes: None, expires: None }
    }

    /// Whether it is over by now.
    pub fn has_expired(&self) -> bool {
        self.expires.is_some_and(|date| date.is_past(SystemTime::now()))
    }

    fn parse(line: &str) -> Result<Self, String> {
        let mut words = line.split_ascii_whitespace();
        let name =
            words.next().unwrap_or_default().parse().map_err(|()| format!("expected {}", Name::GRAMMAR))?;
        // What stands here may be a token by mistake, so it is never repeated.
        let hash = words.next().unwrap_or_default();
        if hash.starts_with(PREFIX) {
            return Err("expected the hash of a token, found a token: it must not be in this file".into());
        }
        let digest = hash.strip_prefix("sha256:").and_then(|digits| from_hex(digits.as_bytes()));
        let digest = digest.ok_or("expected sha256: and 64 hexadecimal digits after the name")?;
        let mut grant = Self::new(name, digest);
        let mut known = HashSet::new();
        for word in words {
            let (setting, value) = word.split_once('=').unwrap_or((word, ""));
            if !known.insert(setting) {
                return Err(format!("{setting} is given twice"));
            }
            let is_digits = value.bytes().all(|byte| byte.is_ascii_digit());
            let whole = || value.parse::<NonZeroU64>().ok().filter(|_| is_digits);
            let positive = || whole().ok_or_else(|| format!("{setting}: expected a whole number from 1"));
            match setting {
                "max-size" => grant.max_size = Some(positive()?.get()),
                "rate-requests" => grant.rate_requests = Some(positive()?),
                "rate-bytes" => grant.rate_bytes = Some(positive()?),
                "expires" => {
                    let date = value.parse().map_err(|()| "expires: expected a date such as 2027-01-31")?;
                    grant.expires = Some(date);
                }
                _ => return Err("expected max-size=, rate-requests=, rate-bytes= or expires=".into()),
            }
        }
        Ok(grant)
    }
}

/// The line that the file has for it.
impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} sha256:{:x}", self.name, HexDisplay(&self.digest))?;
        let number = |value: Option<NonZeroU64>| value.map(NonZeroU64::get);
        for (setting, value) in [
            ("max-size", self.max_size),
            ("rate-requests", number(self.rate_requests)),
            ("rate-bytes", number(self.rate_bytes)),
        ] {
            if let Some(value) = value {
                write!(f, " {setting}={value}")?;
            }
        }
        self.expires.map_or(Ok(()), |date| write!(f, " expires={date}"))
    }
}

/// Whose a token is, for records: 1 to 64 letters, digits, dots, hyphens, underscores and at signs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Name(String);

impl Name {
    /// What a name is, in words.
    pub const GRAMMAR: &str = "a name of 1 to 64 letters, digits, dots, hyphens, underscores or at signs";

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A number that stands for it; another name has another one.
    pub fn number(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = <[u8; 32]>::from(Sha256::digest(self.0.as_bytes()));
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }
}

impl std::str::FromStr for Name {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let is_fine = |byte: u8| byte.is_ascii_alphanumeric() || b".-_@".contains(&byte);
        let is_name =
            (1..=64).contains(&text.len()) && text.bytes().all(is_fine) && !text.starts_with(PREFIX);
        is_name.then(|| Self(text.to_owned())).ok_or(())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A day, in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Date(DateTime);

impl Date {
    fn is_past(self, now: SystemTime) -> bool {
        now >= self.0.to_system_time()
    }
}

impl std::str::FromStr for Date {
    type Err = ();

    /// `YYYY-MM-DD`, from 1970 to 9999 (RFC 3339, full-date).
    fn from_str(text: &str) -> Result<Self, ()> {
        format!("{text}T00:00:00Z").parse().map(Self).map_err(|_| ())
    }
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}-{:02}", self.0.year(), self.0.month(), self.0.day())
    }
}

/// Reads a file of tokens: a line each, `NAME sha256:HEX` and what bounds it; blank lines and those that begin with `#`
/// are passed over.
///
/// # Errors
/// Every mistake there is, each with its line. A file that [`file_source::read_file`] refuses is one: who may write to it
/// decides who gets keys. Who may read it learns names and hashes, and from a hash nothing.
pub fn read(path: &Path) -> Result<Vec<Grant>, Vec<String>> {
    let (bytes, _) = file_source::read_file(path, FILE_MAX).map_err(|problem| vec![problem])?;
    let text = str::from_utf8(&bytes).map_err(|error| vec![format!("{}: {error}", path.display())])?;
    let mut grants = Vec::new();
    let mut mistakes = Vec::new();
    let mut lines = HashMap::new();
    for (number, line) in text.lines().enumerate().map(|(index, line)| (index + 1, line.trim())) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let parsed = Grant::parse(line).and_then(|grant| match lines.insert(grant.digest, number) {
            Some(earlier) => Err(format!("the hash of line {earlier} again")),
            None => Ok(grant),
        });
        match parsed {
            Ok(grant) => grants.push(grant),
            Err(problem) => mistakes.push(format!("{}, line {number}: {problem}", path.display())),
        }
    }
    if mistakes.is_empty() { Ok(grants) } else { Err(mistakes) }
}

/// The digest of a token; `None` for a text that has not the form of one. The text of a bearer is compared by its digest alone.
pub fn digest_of(text: &[u8]) -> Option<Digest> {
    let digits = text.strip_prefix(PREFIX.as_bytes())?;
    let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    (text.len() == LENGTH && digits.iter().all(is_digit)).then(|| Sha256::digest(text).into())
}

/// The 32 bytes that 64 digits stand for; letters are small.
pub fn from_hex(digits: &[u8]) -> Option<Digest> {
    let mut bytes = Digest::default();
    let decoded = lower::decode(digits, &mut bytes).ok()?;
    (decoded.len() == bytes.len()).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::generator::OsRandom;
    use proptest::prelude::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn a_token_has_the_form_that_scanners_know_and_its_line_is_read_again() {
        let generator = Generator::new(OsRandom).unwrap();
        let token = Token::generate(&generator).unwrap();
        assert_eq!(token.text.len(), LENGTH);
        assert!(from_hex(&token.text.as_bytes()[PREFIX.len()..]).is_some());
        assert_ne!(token.digest, Token::generate(&generator).unwrap().digest);
        let grant = Grant {
            max_size: Some(64),
            rate_requests: NonZeroU64::new(5),
            rate_bytes: NonZeroU64::new(7),
            expires: Some("2027-01-31".parse().unwrap()),
            ..Grant::new("ci@build-1".parse().unwrap(), token.digest)
        };
        assert_eq!(Grant::parse(&grant.to_string()), Ok(grant));
        assert_eq!(format!("{token:?}"), "Token");
    }

    #[test]
    fn a_date_is_a_day_that_exists() {
        for (text, days) in
            [("1970-01-01", 0), ("1972-03-01", 790), ("2000-02-29", 11_016), ("2026-11-24", 20_781)]
        {
            let date: Date = text.parse().unwrap();
            assert_eq!((date.0.unix_duration().as_secs(), date.to_string().as_str()), (days * 86_400, text));
        }
        for bad in [
            "2027-02-29",
            "2100-02-29",
            "2027-13-01",
            "2027-00-01",
            "2027-01-00",
            "27-01-01",
            "2027-1-01",
            "1969-12-31",
            "2027-01-01T00:00:00Z",
            "+027-01-01",
            "",
        ] {
            assert!(bad.parse::<Date>().is_err(), "{bad}");
        }
        let date: Date = "1970-01-02".parse().unwrap();
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert!(!date.is_past(at(86_399)) && date.is_past(at(86_400)), "from its midnight on");
    }

    #[test]
    fn a_hash_is_64_digits_with_small_letters() {
        let are_digits = |byte: &u8| from_hex(&[*byte; 64]).is_some();
        assert!((0..=u8::MAX).filter(are_digits).eq(*b"0123456789abcdef"));
        assert!((0..=128).filter(|length| from_hex(&b"0".repeat(*length)).is_some()).eq([64]));
    }

    proptest! {
        #[test]
        fn hexadecimal_digits_are_read_as_they_are_written(bytes: [u8; 32]) {
            prop_assert_eq!(from_hex(format!("{:x}", HexDisplay(&bytes)).as_bytes()), Some(bytes));
        }

        #[test]
        fn no_line_panics_and_no_mistake_repeats_what_was_in_it(secret in "ks_[0-9a-f]{64}", rest in "[ -~]{0,40}") {
            for line in [format!("name {secret} {rest}"), format!("{secret} {rest}"), format!("name sha256:{secret}{rest}")] {
                let mistake = Grant::parse(&line).unwrap_err();
                prop_assert!(!mistake.contains(&secret[..12]), "{mistake}");
            }
        }
    }
}
