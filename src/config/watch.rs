//! Notices when the configuration file, or a file that a setting names, changes.
//!
//! Files are polled: the sandbox has no inotify, and a Kubernetes volume changes by a symbolic link that is swapped two
//! directories above the file.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::sleep;

/// How often the files are polled.
const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// How long a changed file must have stayed the same before it is read: an editor may be writing it.
const SETTLE: Duration = Duration::from_secs(1);

/// After so many polls, a file that never settles is read all the same.
const SETTLE_POLLS: u32 = 10;

/// What changes when a file does: device, inode, size and number of links; modification and status change times with
/// nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileFingerprint([u64; 4], [i64; 4]);

impl FileFingerprint {
    /// The fingerprint of the file that `path` leads to; `None` if there is none or it can't be examined.
    fn of(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        Some(Self(
            [found.dev(), found.ino(), found.size(), found.nlink()],
            [found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()],
        ))
    }
}

/// Files with their fingerprints, taken just before each file was read so that no later change goes unnoticed.
#[derive(Debug, Clone, Default)]
pub struct WatchedFiles(Vec<(PathBuf, Option<FileFingerprint>)>);

impl WatchedFiles {
    /// Watches `path` from now on: call it before the file is read. A path that is watched keeps its fingerprint.
    pub fn add(&mut self, path: &Path) {
        if !self.0.iter().any(|(known, _)| known == path) {
            self.0.push((path.to_owned(), FileFingerprint::of(path)));
        }
    }

    /// The files of `self` whose fingerprints differ in `earlier`, or that `earlier` does not have.
    pub fn changed_since(&self, earlier: &Self) -> Vec<&Path> {
        let differs = |entry: &&(PathBuf, Option<FileFingerprint>)| !earlier.0.contains(entry);
        self.0.iter().filter(differs).map(|(path, _)| path.as_path()).collect()
    }

    /// The files without a link in any directory: each is mounted by itself, so what replaces it is not visible here.
    pub fn deleted(&self) -> impl Iterator<Item = &Path> {
        let is_deleted = |(_, fingerprint): &&(PathBuf, Option<FileFingerprint>)| {
            fingerprint.is_some_and(|FileFingerprint([.., links], _)| links == 0)
        };
        self.0.iter().filter(is_deleted).map(|(path, _)| path.as_path())
    }

    /// Returns once a file differs from when it was added, and has then stayed the same for a second.
    pub async fn changed(&self) {
        loop {
            sleep(POLL_INTERVAL).await;
            let mut found = self.poll();
            if found.0 == self.0 {
                continue;
            }
            for _ in 0..SETTLE_POLLS {
                sleep(SETTLE).await;
                let again = self.poll();
                if again.0 == found.0 {
                    break;
                }
                found = again;
            }
            return;
        }
    }

    /// The same files as they are now.
    fn poll(&self) -> Self {
        Self(self.0.iter().map(|(path, _)| (path.clone(), FileFingerprint::of(path))).collect())
    }
}
