//! The version of this binary.

/// The number, commit and date: `0.1.0 (726e8ad, 2026-11-30)`, or the number alone if the commit is not known.
pub const VERSION: &str = env!("KEY_SERVICE_VERSION");

/// The commit, with `-dirty` if its sources were changed, if it is known.
pub const COMMIT: Option<&str> = if COMMIT_OR_EMPTY.is_empty() { None } else { Some(COMMIT_OR_EMPTY) };

const COMMIT_OR_EMPTY: &str = env!("KEY_SERVICE_VERSION_COMMIT");
