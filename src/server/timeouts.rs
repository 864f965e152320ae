//! How long clients may keep connections waiting: settings that the connections of a server share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::server::unacknowledged::EndedConnections;

/// How long a client may take; shared by the connections of a server, which may shorten it while they run.
#[derive(Debug)]
pub struct Timeouts {
    head: Duration,
    idle: Duration,
    write: Duration,
    /// What both of the first two are at most.
    read_max: AtomicU64,
    /// Whether connections that end from now on are reset.
    resets: AtomicBool,
    /// Whether a connection that ends in order is kept until its client has all of it.
    keeps: AtomicBool,
    ended: Arc<EndedConnections>,
}

impl Timeouts {
    /// `head`: until the headers of a request are complete, from the start of the connection or from their first byte.
    /// `idle`: from a response until the first byte of the next request. `write`: from the last byte that the client
    /// acknowledged, while a response waits for it; it is noticed within a second or two.
    pub fn new(head: Duration, idle: Duration, write: Duration) -> Self {
        Self {
            head,
            idle,
            write,
            read_max: AtomicU64::new(u64::MAX),
            resets: AtomicBool::new(false),
            keeps: AtomicBool::new(false),
            ended: Arc::default(),
        }
    }

    /// The same, each at most `limit`.
    #[must_use]
    pub fn at_most(&self, limit: Duration) -> Self {
        Self::new(self.head.min(limit), self.idle.min(limit), self.write.min(limit))
    }

    /// Shortens the wait for requests. Connections learn of it when they are next polled.
    pub fn shorten_read_timeouts(&self, to: Duration) {
        self.read_max.fetch_min(millis(to), Ordering::Relaxed);
    }

    /// Resets every connection that ends from now on: what a client has of its answer is never taken for all of it.
    pub fn reset_connections(&self) {
        self.resets.store(true, Ordering::Relaxed);
    }

    /// Whether a connection that ends now is reset.
    pub(crate) fn resets_connections(&self) -> bool {
        self.resets.load(Ordering::Relaxed)
    }

    /// Keeps a descriptor of every connection that ends in order from now on, so that it can still be reset.
    pub fn keep_ended_connections(&self) {
        self.keeps.store(true, Ordering::Relaxed);
    }

    /// Whether a connection that ends in order is kept.
    pub(crate) fn keeps_ended_connections(&self) -> bool {
        self.keeps.load(Ordering::Relaxed)
    }

    /// The connections that were kept.
    pub fn ended_connections(&self) -> &EndedConnections {
        &self.ended
    }

    /// How long the headers of a request may take now.
    pub fn head(&self) -> Duration {
        self.head.min(self.read_max())
    }

    /// How long the first byte of the next request may take now.
    pub(crate) fn idle(&self) -> Duration {
        self.idle.min(self.read_max())
    }

    /// How long a client may acknowledge nothing while a response waits.
    pub(crate) fn write(&self) -> Duration {
        self.write
    }

    fn read_max(&self) -> Duration {
        Duration::from_millis(self.read_max.load(Ordering::Relaxed))
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
