//! What the log lost: dropped events and failed writes, audit records on their own.

use std::sync::atomic::{AtomicU64, Ordering};

/// The log's counts since the start. Audit records are counted on their own.
#[derive(Debug, Default)]
pub struct DropCounters {
    events: AtomicU64,
    audit_records: AtomicU64,
    write_errors: AtomicU64,
    /// Events in the queue or being written: they are lost if the process ends now.
    queued_events: AtomicU64,
    queued_audit_records: AtomicU64,
}

impl DropCounters {
    /// The number of dropped events that were no audit records.
    pub fn events(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    /// The number of dropped audit records.
    pub fn audit_records(&self) -> u64 {
        self.audit_records.load(Ordering::Relaxed)
    }

    /// The number of failed attempts to write an event: several may be of the same event.
    pub fn write_errors(&self) -> u64 {
        self.write_errors.load(Ordering::Relaxed)
    }

    /// The number of events in the queue or being written.
    pub(super) fn queued(&self, is_audit: bool) -> u64 {
        self.queue(is_audit).load(Ordering::Relaxed)
    }

    /// Counts an event that is put into the queue.
    pub(super) fn enqueue(&self, is_audit: bool) {
        self.queue(is_audit).fetch_add(1, Ordering::Relaxed);
    }

    /// Counts an event that was in the queue and is written or dropped.
    pub(super) fn dequeue(&self, is_audit: bool) {
        self.queue(is_audit).fetch_sub(1, Ordering::Relaxed);
    }

    fn queue(&self, is_audit: bool) -> &AtomicU64 {
        if is_audit { &self.queued_audit_records } else { &self.queued_events }
    }

    pub(super) fn count_dropped(&self, is_audit: bool) {
        let count = if is_audit { &self.audit_records } else { &self.events };
        count.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_write_error(&self) {
        self.write_errors.fetch_add(1, Ordering::Relaxed);
    }
}
