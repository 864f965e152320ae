//! The timeouts that the connections of a server share, and how connections end during a drain.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::server::unacknowledged::EndedConnections;

/// How long clients may keep a connection waiting. The connections of a server share one value, which may change while
/// they are open.
#[derive(Debug)]
pub struct Timeouts {
    head: Duration,
    idle: Duration,
    write: Duration,
    /// The upper limit of `head` and `idle`, once there is one.
    read_max: OnceLock<Duration>,
    /// Whether connections that end from now on are reset.
    resets: AtomicBool,
    /// Whether connections that end in order are kept until the client has acknowledged everything.
    keeps: AtomicBool,
    ended: EndedConnections,
}

impl Timeouts {
    /// `head`: from the start of the connection, or the first byte of a later request, until its headers are complete.
    /// `idle`: from a response until the first byte of the next request. `write`: from the last byte that the client
    /// acknowledged, while a response waits; it is noticed within a second or two.
    pub fn new(head: Duration, idle: Duration, write: Duration) -> Self {
        Self {
            head,
            idle,
            write,
            read_max: OnceLock::new(),
            resets: AtomicBool::new(false),
            keeps: AtomicBool::new(false),
            ended: EndedConnections::default(),
        }
    }

    /// The same timeouts, each at most `limit`.
    #[must_use]
    pub(crate) fn at_most(&self, limit: Duration) -> Self {
        Self::new(self.head.min(limit), self.idle.min(limit), self.write.min(limit))
    }

    /// Limits the head and the idle timeout, once. It takes effect for each connection when it is next polled.
    pub(crate) fn shorten_read_timeouts(&self, limit: Duration) {
        self.read_max.get_or_init(|| limit);
    }

    /// Resets every connection that ends from now on, so that no client takes a part of a response for all of it.
    pub(crate) fn reset_connections(&self) {
        self.resets.store(true, Ordering::Relaxed);
    }

    /// Whether a connection that ends now is reset.
    pub(crate) fn resets_connections(&self) -> bool {
        self.resets.load(Ordering::Relaxed)
    }

    /// Keeps a descriptor of every connection that ends in order from now on, so that it can still be reset.
    pub(crate) fn keep_ended_connections(&self) {
        self.keeps.store(true, Ordering::Relaxed);
    }

    /// Whether a descriptor of a connection that ends in order now is kept.
    pub(crate) fn keeps_ended_connections(&self) -> bool {
        self.keeps.load(Ordering::Relaxed)
    }

    /// The connections that were kept.
    pub(crate) fn ended_connections(&self) -> &EndedConnections {
        &self.ended
    }

    /// The current head timeout.
    pub(crate) fn head(&self) -> Duration {
        self.shortened(self.head)
    }

    /// The current idle timeout.
    pub(crate) fn idle(&self) -> Duration {
        self.shortened(self.idle)
    }

    /// The write timeout.
    pub(crate) fn write(&self) -> Duration {
        self.write
    }

    fn shortened(&self, timeout: Duration) -> Duration {
        self.read_max.get().map_or(timeout, |max| timeout.min(*max))
    }
}
