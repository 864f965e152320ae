//! The queue between the threads that log and the one that writes: a tracing subscriber that never waits for a writer.

use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber, span};

use crate::telemetry::drop_counters::DropCounters;
use crate::telemetry::log_event::{AUDIT_TARGET, OwnedEvent};
use crate::telemetry::log_level::ReloadableLevel;

/// The pause before another attempt to put a message into a full queue.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// A message to the thread that writes.
pub(super) enum Message {
    Event(OwnedEvent),
    /// A text for a terminal.
    Text(String),
    /// The last message: the thread ends.
    Shutdown,
}

/// The subscriber that queues events, or drops and counts them if the queue is full. There are no spans in this
/// program.
pub(super) struct LogQueue {
    pub(super) level: Arc<ReloadableLevel>,
    pub(super) queue: SyncSender<Message>,
    /// Until when an event waits for room in the queue; not set while requests are served.
    pub(super) deadline: Arc<OnceLock<Instant>>,
    pub(super) dropped: Arc<DropCounters>,
}

/// Puts `message` into the queue and returns whether it did. If the queue is full, retries until `deadline`.
pub(super) fn enqueue(queue: &SyncSender<Message>, mut message: Message, deadline: Option<Instant>) -> bool {
    loop {
        match queue.try_send(message) {
            Ok(()) => return true,
            Err(TrySendError::Full(back)) if deadline.is_some_and(|deadline| Instant::now() < deadline) => {
                message = back;
                thread::sleep(RETRY_INTERVAL);
            }
            Err(_) => return false,
        }
    }
}

/// Puts `message` into the queue, or counts it as dropped if the queue is full until `deadline`.
pub(super) fn enqueue_or_drop(
    queue: &SyncSender<Message>,
    message: Message,
    is_audit: bool,
    deadline: Option<Instant>,
    dropped: &DropCounters,
) {
    dropped.enqueue(is_audit);
    if !enqueue(queue, message, deadline) {
        dropped.dequeue(is_audit);
        dropped.count_dropped(is_audit);
    }
}

impl Subscriber for LogQueue {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.enabled(metadata) { Interest::always() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == AUDIT_TARGET || *metadata.level() <= self.level.filter()
    }

    /// At least info, the level of audit records.
    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level.filter().max(LevelFilter::INFO))
    }

    fn event(&self, event: &Event<'_>) {
        let event = OwnedEvent::new(event);
        let is_audit = event.is_audit();
        let deadline = self.deadline.get().copied();
        enqueue_or_drop(&self.queue, Message::Event(event), is_audit, deadline, &self.dropped);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::telemetry::log_event::TEXT_MAX;

    fn queue(queue: SyncSender<Message>, dropped: &Arc<DropCounters>) -> LogQueue {
        let level = Arc::new(ReloadableLevel::new("info".parse().unwrap()));
        LogQueue { level, queue, deadline: Arc::default(), dropped: Arc::clone(dropped) }
    }

    /// The next event in the queue, as text.
    fn next(events: &mpsc::Receiver<Message>) -> String {
        let Message::Event(event) = events.recv().unwrap() else { panic!("not an event") };
        let values = event.values().map(|(field, value)| format!("{}={value} ", field.name()));
        format!("{} {}", event.metadata().level(), values.collect::<String>())
    }

    #[test]
    fn a_full_queue_drops_events_and_never_blocks() {
        let (sender, _never_read) = mpsc::sync_channel(2);
        let dropped = Arc::new(DropCounters::default());
        tracing::subscriber::with_default(queue(sender, &dropped), || {
            for n in 0..5 {
                tracing::info!(n, "event");
                tracing::info!(target: AUDIT_TARGET, n, "record");
            }
        });
        assert_eq!((dropped.events(), dropped.audit_records()), (4, 4), "each kind is counted on its own");
    }

    #[test]
    fn an_event_waits_for_room_until_the_deadline() {
        let (sender, events) = mpsc::sync_channel(1);
        let dropped = Arc::new(DropCounters::default());
        let queue = queue(sender, &dropped);
        let record = || tracing::info!(target: AUDIT_TARGET, "record");
        let slow = thread::spawn(move || {
            (0..20).for_each(|_| {
                thread::sleep(RETRY_INTERVAL);
                events.recv().unwrap();
            });
        });
        queue.deadline.set(Instant::now() + Duration::from_secs(30)).unwrap();
        tracing::subscriber::with_default(queue, || (0..20).for_each(|_| record()));
        slow.join().unwrap();
        assert_eq!(dropped.audit_records(), 0);

        let (sender, _never_read) = mpsc::sync_channel(0);
        let queue = self::queue(sender, &dropped);
        queue.deadline.set(Instant::now() + RETRY_INTERVAL).unwrap();
        tracing::subscriber::with_default(queue, record);
        assert_eq!(dropped.audit_records(), 1);
    }

    #[test]
    fn long_values_are_cut() {
        let (sender, events) = mpsc::sync_channel(1);
        tracing::subscriber::with_default(queue(sender, &Arc::default()), || {
            tracing::warn!(short = "a", text = "€".repeat(TEXT_MAX), shown = %"x".repeat(TEXT_MAX + 1), "event");
        });
        let text = "€".repeat(TEXT_MAX / 3);
        let shown = "x".repeat(TEXT_MAX);
        assert_eq!(next(&events), format!("WARN message=event short=a text={text} shown={shown} "));
    }

    #[test]
    fn a_queued_event_is_written_as_it_was_logged() {
        let (sender, events) = mpsc::sync_channel(8);
        tracing::subscriber::with_default(queue(sender, &Arc::default()), || {
            tracing::warn!(address = %"127.0.0.1:1", count = 3, name = "http", "listening");
        });
        assert_eq!(next(&events), "WARN message=listening address=127.0.0.1:1 count=3 name=http ");
    }
}
