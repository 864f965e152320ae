//! A log event that owns its values, so that another thread can write it.

use std::fmt;

use tracing::field::{Field, Value, Visit};
use tracing::{Event, Metadata};

use crate::telemetry::text::truncate;

/// The target of audit records. They are logged whatever the log level is, and counted on their own when dropped.
pub const AUDIT_TARGET: &str = "audit";

/// The most fields of one event, its message included.
const FIELDS_MAX: usize = 16;

/// The most bytes of one value; the rest is cut off. An entry must fit a datagram (212,992 bytes by default,
/// socket(7)): a larger one takes memfd_create(2), for which the unit's sandbox kills the process.
pub(super) const TEXT_MAX: usize = 8192;
const _: () = assert!(FIELDS_MAX * (TEXT_MAX + 256) < 212_992); // 256: its name, length and terminator

/// A log event that owns its values.
pub(super) struct OwnedEvent {
    metadata: &'static Metadata<'static>,
    values: Vec<(Field, Text)>,
}

impl OwnedEvent {
    pub(super) fn new(event: &Event<'_>) -> Self {
        let mut owned = Self { metadata: event.metadata(), values: Vec::new() };
        event.record(&mut owned);
        owned
    }

    pub(super) fn is_audit(&self) -> bool {
        self.metadata.target() == AUDIT_TARGET
    }

    /// Calls `write` with the event as tracing passes it. An event without fields is not written.
    pub(super) fn replay(&self, write: impl FnOnce(&Event<'_>)) {
        let values: Vec<_> =
            self.values.iter().map(|(field, text)| (field, tracing::field::debug(text))).collect();
        let Some((any, _)) = values.first() else { return };
        // A value set has a fixed length; tracing skips elements without a value.
        let mut set: [(&Field, Option<&dyn Value>); FIELDS_MAX] = [(any, None); FIELDS_MAX];
        for (place, (field, value)) in set.iter_mut().zip(&values) {
            *place = (field, Some(value));
        }
        let set = self.metadata.fields().value_set(&set);
        write(&Event::new(self.metadata, &set));
    }
}

impl Visit for OwnedEvent {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.values.push((field.clone(), Text::new(format!("{value:?}"))));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.values.push((field.clone(), Text::new(value.to_owned())));
    }
}

/// A value as it is logged, without the quotes that `Debug` would put around it.
struct Text(String);

impl Text {
    /// The first [`TEXT_MAX`] bytes of `text`.
    fn new(mut text: String) -> Self {
        truncate(&mut text, TEXT_MAX);
        Self(text)
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
