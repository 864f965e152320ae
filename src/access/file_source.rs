//! The source of a file that a setting names, and the rules by which every such file is read.

use std::env;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use zeroize::Zeroizing;

/// The prefix of a setting that names a credential (systemd.exec(5)) and not a path.
const CREDENTIAL_PREFIX: &str = "credential:";

/// The source of a file: a path, or `credential:` and the name of a credential that the service manager passes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileSource {
    /// A path.
    Path(PathBuf),
    /// A file in `$CREDENTIALS_DIRECTORY` (systemd.exec(5), LoadCredential=).
    Credential(String),
}

impl FromStr for FileSource {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text.strip_prefix(CREDENTIAL_PREFIX) {
            Some(name) if name.is_empty() || name.contains('/') || name == "." || name == ".." => Err(()),
            Some(name) => Ok(Self::Credential(name.to_owned())),
            None if text.is_empty() => Err(()),
            None => Ok(Self::Path(text.into())),
        }
    }
}

impl fmt::Display for FileSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Credential(name) => write!(f, "{CREDENTIAL_PREFIX}{name}"),
        }
    }
}

impl FileSource {
    /// The path of the file.
    ///
    /// # Errors
    /// A sentence, if the source is a credential and the service manager passes none.
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

/// Reads a file of at most `max` bytes that decides which clients get keys (the configuration, tokens, certificates,
/// keys, client CAs), and returns its content and its mode.
///
/// The file must be a regular file that neither its group nor others can write to. Its owner is not checked: with
/// `PrivateUsers=` and in user namespaces of containers, the files of all other users appear to belong to `nobody`. The
/// directories above it are not checked either: the mode of a Kubernetes volume lets everyone write, although it is
/// mounted read-only.
///
/// # Errors
/// A sentence that begins with the path.
pub fn read_file(path: &Path, max: u64) -> Result<(Zeroizing<Vec<u8>>, u32), String> {
    let refused = |reason: String| format!("{}: {reason}", path.display());
    let unreadable = |error: io::Error| {
        let link = if error.kind() == io::ErrorKind::NotFound { dangling_link(path) } else { None };
        link.unwrap_or_else(|| refused(format!("expected a file that can be read, found: {error}")))
    };
    // Checked before the file is opened, since opening a FIFO waits for its writer.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(refused("expected a regular file, found something else".into()));
    }
    let file = File::open(path).map_err(unreadable)?;
    let mode = file.metadata().map_err(unreadable)?.mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(refused(format!(
            "expected a file that only its owner may write to, found mode {mode:04o} (chmod go-w)"
        )));
    }
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(max + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > max {
        return Err(refused(format!("expected at most {max} bytes, found more")));
    }
    Ok((bytes, mode))
}

/// A sentence, if `path` does not exist because it, or a directory above it, is a dangling symbolic link.
pub fn dangling_link(path: &Path) -> Option<String> {
    let found = path.ancestors().find(|above| fs::symlink_metadata(above).is_ok())?;
    let target = fs::read_link(found).ok()?;
    let error = fs::metadata(found).err()?;
    let prefix = if found == path { String::new() } else { format!("{}: ", path.display()) };
    Some(format!(
        "{prefix}{}: a symbolic link to {}: {error} (the shipped unit sees nothing but /etc/key-service)",
        found.display(),
        target.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_source_is_a_path_or_a_credential_name() {
        for good in ["/etc/tls/key.pem", "key.pem", "credential:tls.key"] {
            assert_eq!(good.parse::<FileSource>().unwrap().to_string(), good);
        }
        for bad in ["", "credential:", "credential:a/b", "credential:.."] {
            assert!(bad.parse::<FileSource>().is_err(), "{bad}");
        }
    }
}
