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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(name: &str) -> Option<String> {
        CredentialRequest::parse(name.as_bytes()).map(|request| request.to_string())
    }

    #[test]
    fn only_names_as_systemd_binds_them_are_parsed() {
        for (name, expected) in [
            ("9f8e7d6c5b4a3210/unit/web.service/cookie.key", "web.service:cookie.key"),
            ("1/unit/web.service/cookie", "web.service:cookie"),
            ("0a/unit/web@a:b\\x2d1.service/a b", "web@a:b\\x2d1.service:a b"),
            ("ffff/unit/dev-sda.swap/k", "dev-sda.swap:k"),
        ] {
            assert_eq!(parse(name).as_deref(), Some(expected), "{name}");
        }
        for malformed in [
            "",
            "1",
            "1/unit/web.service",
            "1/unit/web.service/",
            "1/unit//key",
            "1/unit/web.service/key/more",
            "1/unit/web.service/key/",
            "/unit/web.service/key",
            "g/unit/web.service/key",
            "F/unit/web.service/key",
            "00000000000000000/unit/web.service/key",
            "@1/unit/web.service/key",
            "1/user/web.service/key",
            "1/cryptsetup/volume/key",
            "1/unit/web/key",
            "1/unit/web.target/key",
            "1/unit/.service/key",
            "1/unit/we b.service/key",
            "1/unit/web.service/..",
            "1/unit/web.service/a:b",
            "1/unit/web.service/a\nb",
            "1/unit/web.service/\u{e9}",
            "1/unit/web.service/key\0",
        ] {
            assert_eq!(parse(malformed), None, "{malformed:?}");
        }
        assert_eq!(CredentialRequest::parse(b"1/unit/web.service/\xff"), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_name_is_parsed_or_refused(name in proptest::collection::vec(any::<u8>(), 0..110)) {
            let _ = CredentialRequest::parse(&name);
        }

        #[test]
        fn a_parsed_name_is_the_written_one(
            random in "[0-9a-f]{1,16}", stem in "[A-Za-z0-9:_.@\\\\-]{1,20}", credential in "[!-.0-9;-~]{3,20}"
        ) {
            let read = parse(&format!("{random}/unit/{stem}.service/{credential}"));
            let unit = format!("{stem}.service");
            prop_assert!(is_unit_name(&unit) && is_credential_name(&credential));
            let written = format!("{stem}.service:{credential}");
            prop_assert_eq!(read, Some(written));
        }
    }
}
