//! The tokens file: one grant per line, with the digest of a token and the limits of its bearer.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::num::NonZeroU64;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

use base16ct::{HexDisplay, lower};
use sha2::{Digest as _, Sha256};
use x509_cert::der::DateTime;

use crate::access::file_source;
use crate::access::token::{Digest, PREFIX};

/// Maximum size of the tokens file in bytes: some 80,000 tokens.
const FILE_MAX: u64 = 8 << 20;

/// One line of the tokens file: the digest of a token, and the limits of its bearer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The name of the token. Several tokens may share one, so that a new token can replace an old one gradually.
    pub name: TokenName,
    /// The digest of the token.
    pub digest: Digest,
    /// Maximum key size in bytes, if below the maximum for every client.
    pub max_size: Option<u64>,
    /// Requests per second, counted for the token and not for the address.
    pub rate_requests: Option<NonZeroU64>,
    /// Key bytes per second, counted for the token and not for the address.
    pub rate_bytes: Option<NonZeroU64>,
    /// The first day on which the token is no longer valid.
    pub expires: Option<ExpiryDate>,
}

impl Grant {
    /// A grant without limits of its own.
    pub fn new(name: TokenName, digest: Digest) -> Self {
        Self { name, digest, max_size: None, rate_requests: None, rate_bytes: None, expires: None }
    }

    /// Whether the grant has expired.
    pub(crate) fn has_expired(&self) -> bool {
        self.expires.is_some_and(|date| date.is_past(SystemTime::now()))
    }

    /// Whether the token has rates of its own.
    pub(crate) fn has_rates(&self) -> bool {
        self.rate_requests.or(self.rate_bytes).is_some()
    }

    fn parse(line: &str) -> Result<Self, String> {
        let mut words = line.split_ascii_whitespace();
        let name = words.next().unwrap_or_default().parse();
        let name = name.map_err(|()| format!("expected {}", TokenName::GRAMMAR))?;
        // No error repeats the rest of the line: it may contain a token that was written there by accident.
        let hash = words.next().unwrap_or_default();
        if hash.starts_with(PREFIX) {
            return Err("expected the hash of a token, found a token: it must not be in this file".into());
        }
        let digest = hash.strip_prefix("sha256:").and_then(parse_digest);
        let digest = digest.ok_or("expected sha256: and 64 hexadecimal digits after the name")?;
        let mut grant = Self::new(name, digest);
        let mut seen = HashSet::new();
        for word in words {
            let (setting, value) = word.split_once('=').unwrap_or((word, ""));
            if !seen.insert(setting) {
                return Err(format!("{setting} is given twice"));
            }
            let is_digits = value.bytes().all(|byte| byte.is_ascii_digit());
            let integer = || value.parse::<NonZeroU64>().ok().filter(|_| is_digits);
            let positive = || integer().ok_or_else(|| format!("{setting}: expected a whole number from 1"));
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

/// The grant's line in the tokens file.
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

/// The name of a token, for the audit log: 1 to 64 letters, digits, dots, hyphens, underscores and at signs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TokenName {
    text: Arc<str>,
    id: u64,
}

impl TokenName {
    /// The grammar in words, for error messages.
    pub const GRAMMAR: &str = "a name of 1 to 64 letters, digits, dots, hyphens, underscores or at signs";

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// A number that identifies the name: the first 64 bits of its SHA-256.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }
}

impl FromStr for TokenName {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_@".contains(&byte);
        let is_name =
            (1..=64).contains(&text.len()) && text.bytes().all(is_allowed) && !text.starts_with(PREFIX);
        if !is_name {
            return Err(());
        }
        let [a, b, c, d, e, f, g, h, ..] = <[u8; 32]>::from(Sha256::digest(text.as_bytes()));
        Ok(Self { text: text.into(), id: u64::from_be_bytes([a, b, c, d, e, f, g, h]) })
    }
}

impl fmt::Display for TokenName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A day in UTC, from 1970 to 9999.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpiryDate(DateTime);

impl ExpiryDate {
    fn is_past(self, now: SystemTime) -> bool {
        now >= self.0.to_system_time()
    }
}

impl FromStr for ExpiryDate {
    type Err = ();

    /// Parses `YYYY-MM-DD` (RFC 3339, full-date).
    fn from_str(text: &str) -> Result<Self, ()> {
        format!("{text}T00:00:00Z").parse().map(Self).map_err(|_| ())
    }
}

impl fmt::Display for ExpiryDate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}-{:02}", self.0.year(), self.0.month(), self.0.day())
    }
}

/// Reads the tokens file: one line per token, `NAME sha256:HEX` and its limits. Blank lines and lines that begin with
/// `#` are skipped.
///
/// # Errors
/// Every error in the file, each with its line number. [`file_source::read_file`] refuses a file that others can write
/// to: write access to it is access to keys. A reader learns names and hashes, and a hash reveals nothing.
pub fn read(path: &Path) -> Result<Vec<Grant>, Vec<String>> {
    let (bytes, _) = file_source::read_file(path, FILE_MAX).map_err(|error| vec![error])?;
    let text = str::from_utf8(&bytes).map_err(|error| vec![format!("{}: {error}", path.display())])?;
    let mut grants = Vec::new();
    let mut errors = Vec::new();
    let mut lines = HashMap::new();
    for (number, line) in text.lines().enumerate().map(|(index, line)| (index + 1, line.trim())) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let parsed = Grant::parse(line).and_then(|grant| match lines.insert(grant.digest, number) {
            Some(earlier) => Err(format!("expected a unique hash, found the hash of line {earlier}")),
            None => Ok(grant),
        });
        match parsed {
            Ok(grant) => grants.push(grant),
            Err(error) => errors.push(format!("{}, line {number}: {error}", path.display())),
        }
    }
    if errors.is_empty() { Ok(grants) } else { Err(errors) }
}

/// The digest that 64 lowercase hexadecimal digits encode.
fn parse_digest(digits: &str) -> Option<Digest> {
    let mut digest = Digest::default();
    let decoded = lower::decode(digits, &mut digest).ok()?;
    (decoded.len() == digest.len()).then_some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn a_grant_is_read_as_it_was_written() {
        let grant = Grant {
            max_size: Some(64),
            rate_requests: NonZeroU64::new(5),
            rate_bytes: NonZeroU64::new(7),
            expires: Some("2027-01-31".parse().unwrap()),
            ..Grant::new("ci@build-1".parse().unwrap(), [0xa5; 32])
        };
        assert_eq!(Grant::parse(&grant.to_string()), Ok(grant));
    }

    #[test]
    fn only_days_that_exist_are_dates() {
        for (text, days) in
            [("1970-01-01", 0), ("1972-03-01", 790), ("2000-02-29", 11_016), ("2026-11-24", 20_781)]
        {
            let date: ExpiryDate = text.parse().unwrap();
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
            assert!(bad.parse::<ExpiryDate>().is_err(), "{bad}");
        }
        let date: ExpiryDate = "1970-01-02".parse().unwrap();
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert!(!date.is_past(at(86_399)) && date.is_past(at(86_400)), "past from midnight on");
    }

    #[test]
    fn a_digest_is_64_lowercase_hexadecimal_digits() {
        let is_digit = |byte: &u8| parse_digest(&char::from(*byte).to_string().repeat(64)).is_some();
        assert!((0..=u8::MAX).filter(is_digit).eq(*b"0123456789abcdef"));
        assert!((0..=128).filter(|length| parse_digest(&"0".repeat(*length)).is_some()).eq([64]));
    }

    proptest! {
        #[test]
        fn a_digest_is_read_as_it_was_written(bytes: [u8; 32]) {
            prop_assert_eq!(parse_digest(&format!("{:x}", HexDisplay(&bytes))), Some(bytes));
        }

        #[test]
        fn no_line_panics_and_no_error_repeats_a_secret(secret in "ks_[0-9a-f]{64}", rest in "[ -~]{0,40}") {
            for line in [format!("name {secret} {rest}"), format!("{secret} {rest}"), format!("name sha256:{secret}{rest}")] {
                let error = Grant::parse(&line).unwrap_err();
                prop_assert!(!error.contains(&secret[..12]), "{error}");
            }
        }
    }
}
