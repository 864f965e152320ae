//! Where a file is that a setting names.

use std::env;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// What a path begins with that names a credential of systemd.exec(5) instead.
const CREDENTIAL: &str = "credential:";

/// Where a file is: a path, or `credential:` and the name of a credential that the service manager passes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A path.
    Path(PathBuf),
    /// A file in `$CREDENTIALS_DIRECTORY` (systemd.exec(5), LoadCredential=).
    Credential(String),
}

impl FromStr for Location {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text.strip_prefix(CREDENTIAL) {
            Some(name) if name.is_empty() || name.contains('/') || name == "." || name == ".." => Err(()),
            Some(name) => Ok(Self::Credential(name.to_owned())),
            None if text.is_empty() => Err(()),
            None => Ok(Self::Path(text.into())),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Credential(name) => write!(f, "{CREDENTIAL}{name}"),
        }
    }
}

impl Location {
    /// The path to open.
    ///
    /// # Errors
    /// A sentence, where it is a credential and none is passed.
    pub fn path(&self) -> Result<PathBuf, String> {
        match self {
            Self::Path(path) => Ok(path.clone()),
            Self::Credential(name) => match env::var_os("CREDENTIALS_DIRECTORY") {
                Some(directory) => Ok(PathBuf::from(directory).join(name)),
                None => Err(format!(
                    "expected the directory of credential {name} in $CREDENTIALS_DIRECTORY, found none: systemd sets it \
                     for a unit with LoadCredential="
                )),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_a_path_or_the_name_of_a_credential() {
        for good in ["/etc/tls/key.pem", "key.pem", "credential:tls.key"] {
            assert_eq!(good.parse::<Location>().unwrap().to_string(), good);
        }
        for bad in ["", "credential:", "credential:a/b", "credential:.."] {
            assert!(bad.parse::<Location>().is_err(), "{bad}");
        }
    }
}
