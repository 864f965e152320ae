//! A request for a credential: the unit and the credential that systemd requests, from the address of its socket.

use std::fmt;

/// The credential that is requested, and the unit that gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialRequest {
    /// The unit name, with its suffix.
    pub unit: String,
    /// The name of the credential in the unit (systemd.exec(5), `LoadCredential=`).
    pub credential: String,
}

impl CredentialRequest {
    /// Parses `RANDOM/unit/UNIT/CREDENTIAL`, the abstract address of systemd's socket, without the `@` that stands for
    /// its first byte. `RANDOM` is a 64-bit number in hexadecimal digits. `None` if `name` has another form.
    pub(crate) fn parse(name: &[u8]) -> Option<Self> {
        let mut parts = str::from_utf8(name).ok()?.split('/');
        let (random, kind, unit, credential) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let is_random = matches!(random.len(), 1..=16)
            && random.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
        let is_end = parts.next().is_none();
        (is_random && kind == "unit" && is_unit_name(unit) && is_credential_name(credential) && is_end)
            .then(|| Self { unit: unit.to_owned(), credential: credential.to_owned() })
    }
}

impl fmt::Display for CredentialRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.unit, self.credential)
    }
}

/// Whether `name` is a unit name (systemd.unit(5)) of a type that runs programs (systemd.exec(5)).
pub(crate) fn is_unit_name(name: &str) -> bool {
    let Some((stem, kind)) = name.rsplit_once('.') else {
        return false;
    };
    let is_valid = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    name.len() <= 255
        && !stem.is_empty()
        && stem.bytes().all(is_valid)
        && matches!(kind, "service" | "socket" | "mount" | "swap")
}

/// Whether `name` is a credential name, as systemd defines it: a file name of printable ASCII without a colon.
pub(crate) fn is_credential_name(name: &str) -> bool {
    matches!(name.len(), 1..=255)
        && !matches!(name, "." | "..")
        && name.bytes().all(|byte| matches!(byte, b' '..=b'~') && !matches!(byte, b':' | b'/'))
}
