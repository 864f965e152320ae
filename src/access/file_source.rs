//! Where a file is that a setting names, and the one rule by which every such file is read.

use std::env;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use zeroize::Zeroizing;

/// What a path begins with that names a credential of systemd.exec(5) instead.
const CREDENTIAL: &str = "credential:";

/// Where a file is: a path, or `credential:` and the name of a credential that the service manager passes.
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
        match text.strip_prefix(CREDENTIAL) {
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
            Self::Credential(name) => write!(f, "{CREDENTIAL}{name}"),
        }
    }
}

impl FileSource {
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

/// Reads a file that decides who gets keys, of at most `max` bytes, and its mode: the configuration, tokens, certificates,
/// keys, client CAs.
///
/// It has to be a regular file that neither its group nor others may write to. Its owner is not looked at: with
/// `PrivateUsers=` and in user namespaces of containers, the files of everybody else appear to be those of nobody. Nor are
/// the directories above it: a volume of Kubernetes is writable to all in its mode, and mounted read-only.
///
/// # Errors
/// A sentence that begins with the path.
pub fn read_file(path: &Path, max: u64) -> Result<(Zeroizing<Vec<u8>>, u32), String> {
    let refused = |problem: String| format!("{}: {problem}", path.display());
    let unreadable = |error: io::Error| {
        let link = if error.kind() == io::ErrorKind::NotFound { dangling_link(path) } else { None };
        link.unwrap_or_else(|| refused(format!("expected a file that can be read, found: {error}")))
    };
    // Looked at before it is opened, since opening a FIFO waits for its writer.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(refused("expected a file, found something else".into()));
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

/// A sentence, if nothing is at `path` since it, or a directory above it, is a symbolic link that leads nowhere.
pub fn dangling_link(path: &Path) -> Option<String> {
    let found = path.ancestors().find(|above| fs::symlink_metadata(above).is_ok())?;
    let target = fs::read_link(found).ok()?;
    let error = fs::metadata(found).err()?;
    let of = if found == path { String::new() } else { format!("{}: ", path.display()) };
    Some(format!(
        "{of}{}: a symbolic link to {}: {error} (the shipped unit sees nothing but /etc/key-service)",
        found.display(),
        target.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_a_path_or_the_name_of_a_credential() {
        for good in ["/etc/tls/key.pem", "key.pem", "credential:tls.key"] {
            assert_eq!(good.parse::<FileSource>().unwrap().to_string(), good);
        }
        for bad in ["", "credential:", "credential:a/b", "credential:.."] {
            assert!(bad.parse::<FileSource>().is_err(), "{bad}");
        }
    }
}
