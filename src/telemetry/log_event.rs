//! A log event that owns its values, so that another thread can write it.

use std::fmt::{self, Write as _};

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

/// The usual size of all values of an event, in bytes: that of an audit record.
const USUAL_SIZE: usize = 256;

/// A log event that owns its values.
#[derive(Debug)]
pub(super) struct OwnedEvent {
    metadata: &'static Metadata<'static>,
    /// The values, one after the other, as they are logged: without the quotes that `Debug` puts around a text.
    text: String,
    /// The fields that have a value, and where it ends in the text.
    fields: Vec<(Field, usize)>,
}

impl OwnedEvent {
    pub(super) fn new(event: &Event<'_>) -> Self {
        let mut owned = Self {
            metadata: event.metadata(),
            text: String::with_capacity(USUAL_SIZE),
            fields: Vec::with_capacity(FIELDS_MAX),
        };
        event.record(&mut owned);
        owned
    }

    pub(super) fn metadata(&self) -> &'static Metadata<'static> {
        self.metadata
    }

    pub(super) fn is_audit(&self) -> bool {
        self.metadata.target() == AUDIT_TARGET
    }

    /// The fields that have a value, and their values.
    pub(super) fn values(&self) -> impl Iterator<Item = (&Field, &str)> {
        let mut start = 0;
        self.fields
            .iter()
            .map(move |(field, end)| (field, &self.text[std::mem::replace(&mut start, *end)..*end]))
    }

    /// Calls `write` with an event whose values are the texts of this one. An event without fields is not written.
    pub(super) fn replay(&self, write: impl FnOnce(&Event<'_>)) {
        let Some((any, _)) = self.fields.first() else { return };
        let mut values = [""; FIELDS_MAX];
        values.iter_mut().zip(self.values()).for_each(|(place, (_, value))| *place = value);
        // A value set has a fixed length; tracing skips elements without a value.
        let mut set: [(&Field, Option<&dyn Value>); FIELDS_MAX] = [(any, None); FIELDS_MAX];
        for ((place, (field, _)), value) in set.iter_mut().zip(&self.fields).zip(&values) {
            *place = (field, Some(value));
        }
        let set = self.metadata.fields().value_set(&set);
        write(&Event::new(self.metadata, &set));
    }

    /// Ends the value that was appended for `field`.
    fn end_value(&mut self, field: &Field) {
        let start = self.fields.last().map_or(0, |(_, end)| *end);
        truncate(&mut self.text, start + TEXT_MAX);
        self.fields.push((field.clone(), self.text.len()));
    }
}

impl Visit for OwnedEvent {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = write!(self.text, "{value:?}"); // a value that can't be formatted ends where it failed
        self.end_value(field);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.text.push_str(value);
        self.end_value(field);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.text.push_str(itoa::Buffer::new().format(value));
        self.end_value(field);
    }
}
