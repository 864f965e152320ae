//! The log: structured entries in the journal where stderr is the journal, else lines on stderr.
//!
//! Events are queued and written by a thread of their own, because a write to a stopped journal blocks. When the queue
//! is full, events are dropped and counted; no request ever waits for the log.

use std::env;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::TrySendError;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use tracing::field::{Field, Value, Visit};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Dispatch, Event, Metadata, Subscriber, span};
use tracing_subscriber::Registry;
use tracing_subscriber::layer::SubscriberExt;

/// How many events may wait to be written.
const QUEUE: usize = 1024;

/// The most fields of one event, its message included.
const FIELDS_MAX: usize = 16;

/// The target of audit records. They are logged whatever the level is, and counted on their own when dropped.
pub const AUDIT: &str = "audit";

/// How long a stop waits for the last events to be written, and before it for room in the queue.
const FLUSH: Duration = Duration::from_secs(1);

/// How long to wait before it is tried again whether there is room in the queue.
const RETRY: Duration = Duration::from_millis(1);

/// From which severity on events are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLevel(LevelFilter);

impl LogLevel {
    /// Every level's name, from the quietest.
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

/// How many events were dropped since the start.
#[derive(Debug, Default)]
pub struct Dropped {
    events: AtomicU64,
    audit_records: AtomicU64,
}

impl Dropped {
    /// Counts one.
    pub fn count(&self, is_audit: bool) {
        let count = if is_audit { &self.audit_records } else { &self.events };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Those that were no audit records.
    pub fn events(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    /// Audit records.
    pub fn audit_records(&self) -> u64 {
        self.audit_records.load(Ordering::Relaxed)
    }
}

/// From which severity on events are let through; every audit record is.
#[derive(Debug)]
struct Threshold(RwLock<LevelFilter>);

impl Threshold {
    fn level(&self) -> LevelFilter {
        *self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves it, for events that have been logged before too.
    fn set(&self, level: LevelFilter) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = level;
        tracing::callsite::rebuild_interest_cache();
    }
}

/// The running log. Dropping it writes what is still queued, within a second.
#[derive(Debug)]
pub struct Log {
    threshold: Arc<Threshold>,
    end: SyncSender<Message>,
    /// Until when an event waits for room in the queue, once nothing else is to be done.
    waits_until: Arc<OnceLock<Instant>>,
    written: Receiver<()>,
    dropped: Arc<Dropped>,
}

impl Log {
    /// Starts the log as the process's only one.
    pub fn start(level: LogLevel) -> Self {
        let writer = writer();
        let (queue, events) = mpsc::sync_channel(QUEUE);
        let (done, written) = mpsc::sync_channel(1);
        let threshold = Arc::new(Threshold(RwLock::new(level.0)));
        let dropped = Arc::new(Dropped::default());
        let (end, waits_until) = (queue.clone(), Arc::new(OnceLock::new()));
        let log = Self {
            threshold: Arc::clone(&threshold),
            end,
            waits_until: Arc::clone(&waits_until),
            written,
            dropped: Arc::clone(&dropped),
        };
        thread::Builder::new()
            .name("log".into())
            .spawn(move || {
                write_all(&writer, &events);
                let _ = done.send(()); // nobody waits where the process has ended first
            })
            .expect("the process has just started and may have threads");
        tracing::subscriber::set_global_default(Queue { threshold, queue, waits_until, dropped })
            .expect("the log is started once");
        log
    }

    /// Logs from `level` on, from now on.
    pub fn set_level(&self, level: LogLevel) {
        self.threshold.set(level.0);
    }

    /// From now on an event waits for room in the queue instead of being dropped, until a second from now: to be called
    /// when nothing is served any more, before many connections end at once and leave their audit records.
    pub fn wait_for_room(&self) {
        self.waits_until.get_or_init(|| Instant::now() + FLUSH);
    }

    /// What was dropped since the start.
    pub fn dropped(&self) -> Arc<Dropped> {
        Arc::clone(&self.dropped)
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        // A stopped journal must not hold the exit.
        let until = Instant::now() + FLUSH;
        if send(&self.end, Message::End, Some(until)) {
            let _ = self.written.recv_timeout(until.saturating_duration_since(Instant::now()));
        }
    }
}

fn writer() -> Dispatch {
    if is_journal()
        && let Ok(journal) = tracing_journald::layer()
    {
        let journal = journal.with_field_prefix(None).with_syslog_identifier("key-service".into());
        return Dispatch::new(Registry::default().with(journal));
    }
    let lines = tracing_subscriber::fmt::layer().with_ansi(false).with_target(false).with_writer(io::stderr);
    Dispatch::new(Registry::default().with(lines))
}

/// systemd.exec(5), `$JOURNAL_STREAM`: stderr is the journal if its device and inode are those.
fn is_journal() -> bool {
    let Ok(stderr) = rustix::fs::fstat(io::stderr().as_fd()) else {
        return false;
    };
    env::var("JOURNAL_STREAM").is_ok_and(|stream| stream == format!("{}:{}", stderr.st_dev, stderr.st_ino))
}

enum Message {
    Event(Record),
    End,
}

/// An event whose values are its own, so that it may change threads.
struct Record {
    metadata: &'static Metadata<'static>,
    values: Vec<(Field, Text)>,
}

/// A value as it will be shown, without the quotes that `Debug` would put around it.
struct Text(String);

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether `message` is in the queue: where that is full, there may be room until the time that is given.
fn send(queue: &SyncSender<Message>, mut message: Message, until: Option<Instant>) -> bool {
    loop {
        match queue.try_send(message) {
            Ok(()) => return true,
            Err(TrySendError::Full(back)) if until.is_some_and(|until| Instant::now() < until) => {
                message = back;
                thread::sleep(RETRY);
            }
            Err(_) => return false,
        }
    }
}

/// Takes events, and hands them to the thread that writes. There are no spans here.
struct Queue {
    threshold: Arc<Threshold>,
    queue: SyncSender<Message>,
    waits_until: Arc<OnceLock<Instant>>,
    dropped: Arc<Dropped>,
}

impl Subscriber for Queue {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.enabled(metadata) { Interest::always() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == AUDIT || *metadata.level() <= self.threshold.level()
    }

    /// Audit records have the level info.
    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.threshold.level().max(LevelFilter::INFO))
    }

    fn event(&self, event: &Event<'_>) {
        let mut record = Record { metadata: event.metadata(), values: Vec::new() };
        event.record(&mut record);
        if !send(&self.queue, Message::Event(record), self.waits_until.get().copied()) {
            self.dropped.count(event.metadata().target() == AUDIT);
        }
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

impl Visit for Record {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.values.push((field.clone(), Text(format!("{value:?}"))));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.values.push((field.clone(), Text(value.to_owned())));
    }
}

fn write_all(writer: &Dispatch, events: &Receiver<Message>) {
    while let Ok(Message::Event(record)) = events.recv() {
        let values: Vec<_> =
            record.values.iter().map(|(field, text)| (field, tracing::field::debug(text))).collect();
        let Some((any, _)) = values.first() else { continue };
        // A set of values has a fixed length; places without a value are passed over.
        let mut set: [(&Field, Option<&dyn Value>); FIELDS_MAX] = [(any, None); FIELDS_MAX];
        for (place, (field, value)) in set.iter_mut().zip(&values) {
            *place = (field, Some(value));
        }
        let set = record.metadata.fields().value_set(&set);
        writer.event(&Event::new(record.metadata, &set));
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

    fn queue(queue: SyncSender<Message>, dropped: &Arc<Dropped>) -> Queue {
        let threshold = Arc::new(Threshold(RwLock::new(LevelFilter::INFO)));
        Queue { threshold, queue, waits_until: Arc::default(), dropped: Arc::clone(dropped) }
    }

    #[test]
    fn a_writer_that_hangs_drops_events_and_never_waits() {
        let (sender, _never_read) = mpsc::sync_channel(2);
        let dropped = Arc::new(Dropped::default());
        tracing::subscriber::with_default(queue(sender, &dropped), || {
            for n in 0..5 {
                tracing::info!(n, "event");
                tracing::info!(target: AUDIT, n, "record");
            }
        });
        assert_eq!((dropped.events(), dropped.audit_records()), (4, 4), "each kind is counted on its own");
    }

    #[test]
    fn at_the_end_an_event_waits_for_room_and_no_longer_than_it_may() {
        let (sender, events) = mpsc::sync_channel(1);
        let dropped = Arc::new(Dropped::default());
        let queue = queue(sender, &dropped);
        let record = || tracing::info!(target: AUDIT, "record");
        let slow = thread::spawn(move || {
            (0..20).for_each(|_| {
                thread::sleep(RETRY);
                events.recv().unwrap();
            });
        });
        queue.waits_until.set(Instant::now() + Duration::from_secs(30)).unwrap();
        tracing::subscriber::with_default(queue, || (0..20).for_each(|_| record()));
        slow.join().unwrap();
        assert_eq!(dropped.audit_records(), 0);

        let (sender, _never_read) = mpsc::sync_channel(0);
        let queue = self::queue(sender, &dropped);
        queue.waits_until.set(Instant::now() + RETRY).unwrap();
        tracing::subscriber::with_default(queue, record);
        assert_eq!(dropped.audit_records(), 1);
    }

    #[test]
    fn an_event_comes_out_of_the_queue_as_it_went_in() {
        #[derive(Clone, Default)]
        struct Buffer(Arc<std::sync::Mutex<Vec<u8>>>);
        impl io::Write for Buffer {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let buffer = Buffer::default();
        let made = buffer.clone();
        let lines = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .without_time()
            .with_target(false)
            .with_writer(move || made.clone());
        let writer = Dispatch::new(Registry::default().with(lines));
        let (sender, events) = mpsc::sync_channel(8);
        tracing::subscriber::with_default(queue(sender, &Arc::default()), || {
            tracing::warn!(address = %"127.0.0.1:1", count = 3, name = "http", "listening");
        });
        write_all(&writer, &events);
        let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.trim(), "WARN listening address=127.0.0.1:1 count=3 name=http");
    }
}
