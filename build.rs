//! Puts the commit and its date (UTC) into the version that `key-service --version` prints.
//!
//! They come from $KEY_SERVICE_COMMIT and $KEY_SERVICE_COMMIT_DATE, for builds without a repository, or else from Git. A
//! copy of the sources in another repository, such as a vendored one, has neither, and then the version is the number
//! alone. Nothing comes from the time or the place of the build, so the same commit gives the same binary.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

/// What the binary is made of. Git is asked about these paths only, and after a change of one of them.
const SOURCES: [&str; 5] = ["src", "build.rs", "Cargo.toml", "Cargo.lock", ".cargo"];

/// The files of Git of which one changes with the current commit, where refs are loose, packed or a reftable. A linked
/// worktree has its own HEAD and reflog.
const GIT_FILES: [&str; 4] = ["HEAD", "logs/HEAD", "packed-refs", "reftable/tables.list"];

/// The digits of a commit that are shown. Git's own abbreviation depends on the other commits of a clone.
const DIGITS: usize = 7;

fn main() {
    let [commit, date] = ["KEY_SERVICE_COMMIT", "KEY_SERVICE_COMMIT_DATE"].map(variable);
    let (commit, date) = if commit.is_empty() { from_git().unwrap_or_default() } else { (commit, date) };
    let (digits, mark) = commit.split_at(commit.find('-').unwrap_or(commit.len()));
    let commit = format!("{}{mark}", digits.get(..DIGITS).unwrap_or(digits));
    let number = env!("CARGO_PKG_VERSION");
    let version = match (&*commit, &*date) {
        ("", _) => number.to_owned(),
        (commit, "") => format!("{number} ({commit})"),
        (commit, date) => format!("{number} ({commit}, {date})"),
    };
    println!("cargo:rustc-env=KEY_SERVICE_VERSION={version}");
    println!("cargo:rustc-env=KEY_SERVICE_VERSION_COMMIT={commit}");
    rerun_if_changed(SOURCES.into_iter().map(Path::new));
}

/// The value of a variable; empty if it is not set.
fn variable(name: &str) -> String {
    println!("cargo:rerun-if-env-changed={name}");
    let value = env::var(name).unwrap_or_default();
    let is_word = value.chars().all(|char| char.is_ascii_graphic());
    assert!(is_word, "{name}: expected printable ASCII characters without spaces, found {value:?}");
    value
}

/// The commit that is checked out and its date, if this directory is the top of a repository that Git reads. Changed
/// sources are marked.
fn from_git() -> Option<(String, String)> {
    let top = git(&["rev-parse", "--show-toplevel"])?;
    let here = env::current_dir().ok()?;
    if fs::canonicalize(top).ok()? != fs::canonicalize(here).ok()? {
        return None;
    }
    // Without a symbolic ref, HEAD itself is the commit.
    let branch = git(&["symbolic-ref", "--quiet", "HEAD"]);
    let files = GIT_FILES.into_iter().chain(branch.as_deref());
    let paths: Vec<_> = files.filter_map(|file| git(&["rev-parse", "--git-path", file])).collect();
    rerun_if_changed(paths.iter().map(Path::new));

    let shown = git(&["log", "-1", "--format=%H %cd", "--date=format-local:%Y-%m-%d"])?;
    let (commit, date) = shown.split_once(' ')?;
    let changed = git(&[&["status", "--porcelain", "--"], &SOURCES[..]].concat())?;
    let mark = if changed.is_empty() { "" } else { "-dirty" };
    Some((format!("{commit}{mark}"), date.to_owned()))
}

/// The output of a command of Git; `None` if it fails, as it does where Git is missing or distrusts the owner of the
/// directory.
fn git(arguments: &[&str]) -> Option<String> {
    let mut command = Command::new("git");
    command.args(arguments).env("TZ", "UTC").env("GIT_OPTIONAL_LOCKS", "0");
    // Of the command that a hook belongs to.
    for name in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"] {
        command.env_remove(name);
    }
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim_end().to_owned())
}

/// Runs this script again after a change of one of these paths. One that does not exist would count as changed in every
/// build.
fn rerun_if_changed<'a>(paths: impl Iterator<Item = &'a Path>) {
    for path in paths.filter(|path| path.exists()) {
        println!("cargo:rerun-if-changed={}", path.display());
    }
}
