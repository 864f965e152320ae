//! The minimum level of logged events.

use std::fmt;
use std::str::FromStr;
use std::sync::{PoisonError, RwLock};

use tracing::level_filters::LevelFilter;

/// The minimum level of logged events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLevel(LevelFilter);

impl LogLevel {
    /// The names of all levels, the quietest first.
    pub const NAMES: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
}

impl FromStr for LogLevel {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if Self::NAMES.contains(&text) { text.parse().map(Self).map_err(|_| ()) } else { Err(()) }
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A level that can change while events are logged.
#[derive(Debug)]
pub(super) struct ReloadableLevel(RwLock<LevelFilter>);

impl ReloadableLevel {
    pub(super) fn new(level: LogLevel) -> Self {
        Self(RwLock::new(level.0))
    }

    pub(super) fn filter(&self) -> LevelFilter {
        *self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the level, also for call sites that have logged before.
    pub(super) fn set(&self, level: LogLevel) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = level.0;
        tracing::callsite::rebuild_interest_cache();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_read_by_name_only() {
        for name in LogLevel::NAMES {
            assert_eq!(name.parse::<LogLevel>().unwrap().to_string(), name);
        }
        for bad in ["", "INFO", "3", "verbose", "warning"] {
            assert!(bad.parse::<LogLevel>().is_err(), "{bad}");
        }
    }
}
