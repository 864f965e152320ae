//! The unit and the credential that systemd asks for, by the name it binds its end of the connection to.

use std::fmt;

/// For whom a credential is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialRequest {
    /// The unit, with its suffix.
    pub unit: String,
    /// What the unit calls it.
    pub credential: String,
}

impl CredentialRequest {
    /// Reads `RANDOM/unit/UNIT/CREDENTIAL`, the abstract name of systemd's end of the connection, without the `@` that
    /// stands for its first byte. `RANDOM` are the hexadecimal digits of 64 bits.
    pub fn parse(name: &[u8]) -> Option<Self> {
        let mut parts = std::str::from_utf8(name).ok()?.split('/');
        let (random, kind, unit, credential) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let is_random = matches!(random.len(), 1..=16)
            && random.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
        let is_whole = parts.next().is_none();
        (is_random && kind == "unit" && is_unit(unit) && is_credential(credential) && is_whole)
            .then(|| Self { unit: unit.to_owned(), credential: credential.to_owned() })
    }
}

impl fmt::Display for CredentialRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.unit, self.credential)
    }
}

/// systemd.unit(5), of the kinds that run programs (systemd.exec(5)).
pub(crate) fn is_unit(name: &str) -> bool {
    let Some((stem, kind)) = name.rsplit_once('.') else {
        return false;
    };
    let is_valid = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    name.len() <= 255
        && !stem.is_empty()
        && stem.bytes().all(is_valid)
        && matches!(kind, "service" | "socket" | "mount" | "swap")
}

/// A file name of printing ASCII without a colon, as systemd has it.
pub(crate) fn is_credential(name: &str) -> bool {
    matches!(name.len(), 1..=255)
        && !matches!(name, "." | "..")
        && name.bytes().all(|byte| matches!(byte, b' '..=b'~') && !matches!(byte, b':' | b'/'))
}
