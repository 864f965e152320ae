//! The log: structured entries in the journal where stderr is the journal, else lines on stderr.
//!
//! Events are queued and written by a thread of their own, because a write to a stopped journal blocks. When the queue
//! is full, events are dropped and counted; no request ever waits for the log. An entry that the journal does not take is
//! sent again until it does; a line that stderr does not take is dropped and counted.

use std::env;
use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::TrySendError;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use errno::Errno;
use rustix::net::SendFlags;
use tracing::field::{Field, Value, Visit};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Dispatch, Event, Metadata, Subscriber, span};
use tracing_subscriber::Registry;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;

/// How many events may wait to be written.
const QUEUE: usize = 1024;

/// The most fields of one event, its message included.
const FIELDS_MAX: usize = 16;

/// The most bytes of one value; the rest is cut off. An entry must fit a datagram (212,992 bytes by default, socket(7)):
/// a larger one takes memfd_create(2), for which the unit's sandbox kills the process.
const TEXT_MAX: usize = 8192;
const _: () = assert!(FIELDS_MAX * (TEXT_MAX + 256) < 212_992); // 256: its name, length and terminator

/// The target of audit records. They are logged whatever the level is, and counted on their own when dropped.
pub const AUDIT: &str = "audit";

/// How long a stop waits for the last events to be written, and before it for room in the queue.
const FLUSH: Duration = Duration::from_secs(1);

/// How long to wait before it is tried again whether there is room in the queue.
const RETRY: Duration = Duration::from_millis(1);

/// How long to wait before an entry is sent to the journal again: the first time, and at most. A stop waits for [`FLUSH`],
/// so a journal that is back is found well within it.
const RESEND: Duration = Duration::from_millis(10);
const RESEND_MAX: Duration = Duration::from_millis(100);

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

/// How many events were dropped since the start, and how many writes failed.
#[derive(Debug, Default)]
pub struct DropCounters {
    events: AtomicU64,
    audit_records: AtomicU64,
    write_errors: AtomicU64,
    /// Events in the queue or being written, which are lost where the process ends first.
    waiting_events: AtomicU64,
    waiting_audit_records: AtomicU64,
}

impl DropCounters {
    /// Counts one.
    pub fn count(&self, is_audit: bool) {
        let count = if is_audit { &self.audit_records } else { &self.events };
        count.fetch_add(1, Ordering::Relaxed);
    }

    fn waiting(&self, is_audit: bool) -> &AtomicU64 {
        if is_audit { &self.waiting_audit_records } else { &self.waiting_events }
    }

    fn count_write_error(&self) {
        self.write_errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Those that were no audit records.
    pub fn events(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    /// Audit records.
    pub fn audit_records(&self) -> u64 {
        self.audit_records.load(Ordering::Relaxed)
    }

    /// Failed attempts to write an event: several may be of the same event.
    pub fn write_errors(&self) -> u64 {
        self.write_errors.load(Ordering::Relaxed)
    }
}

/// From which severity on events are let through; every audit record is.
#[derive(Debug)]
struct ReloadableLevel(RwLock<LevelFilter>);

impl ReloadableLevel {
    fn level(&self) -> LevelFilter {
        *self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves it, for events that have been logged before too.
    fn set(&self, level: LevelFilter) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = level;
        tracing::callsite::rebuild_interest_cache();
    }
}

/// The running log. Dropping it writes what is still queued, within a second, and reports what could not be written.
#[derive(Debug)]
pub struct Log {
    threshold: Arc<ReloadableLevel>,
    end: SyncSender<Message>,
    /// Until when an event waits for room in the queue, once nothing else is to be done.
    waits_until: Arc<OnceLock<Instant>>,
    written: Receiver<()>,
    dropped: Arc<DropCounters>,
}

impl Log {
    /// Starts the log as the process's only one.
    ///
    /// # Errors
    /// When there may be no more threads.
    pub fn start(level: LogLevel) -> io::Result<Self> {
        let (queue, events) = mpsc::sync_channel(QUEUE);
        let (done, written) = mpsc::sync_channel(1);
        let threshold = Arc::new(ReloadableLevel(RwLock::new(level.0)));
        let dropped = Arc::new(DropCounters::default());
        let writer = Writer::new(&dropped);
        let (end, waits_until) = (queue.clone(), Arc::new(OnceLock::new()));
        let log = Self {
            threshold: Arc::clone(&threshold),
            end,
            waits_until: Arc::clone(&waits_until),
            written,
            dropped: Arc::clone(&dropped),
        };
        let counts = Arc::clone(&dropped);
        thread::Builder::new().name("log".into()).spawn(move || {
            write_all(&writer, &events, &counts);
            let _ = done.send(()); // nobody waits where the process has ended first
        })?;
        tracing::subscriber::set_global_default(LogQueue { threshold, queue, waits_until, dropped })
            .expect("the log is started once");
        Ok(log)
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
    pub fn dropped(&self) -> Arc<DropCounters> {
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
        self.report_unwritten();
    }
}

impl Log {
    /// Reports what is lost with the queue and what was dropped before, since the log takes no report any more. Under systemd
    /// stderr is a stream to the journal, which may work where the journal's socket does not. Any other stderr is what the
    /// lines are waiting for.
    fn report_unwritten(&self) {
        let [records, events] =
            [true, false].map(|is_audit| self.dropped.waiting(is_audit).load(Ordering::Relaxed));
        if records + events > 0 {
            let line = format!(
                "<4>key-service: {} audit records and {} other log entries were lost since the start: the journal did not \
                 take them in time\n", // sd-daemon(3): 4 is a warning
                records + self.dropped.audit_records(),
                events + self.dropped.events(),
            );
            // A full stream must not hold the exit either. Nobody is left who could be told of an error.
            let _ =
                rustix::net::send(io::stderr(), line.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
    }
}

enum Writer {
    Journal(Dispatch),
    Lines(Dispatch),
}

impl Writer {
    fn new(dropped: &Arc<DropCounters>) -> Self {
        if is_journal()
            && let Ok(journal) = tracing_journald::layer()
        {
            let journal = journal.with_field_prefix(None).with_syslog_identifier("key-service".into());
            return Self::Journal(Dispatch::new(Registry::default().with(journal)));
        }
        let lines = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_target(false)
            .with_writer(Lines(Arc::clone(dropped)));
        Self::Lines(Dispatch::new(Registry::default().with(lines)))
    }

    /// Writes an event, to the journal as often as it takes.
    fn write(&self, event: &Event<'_>, dropped: &DropCounters) {
        match self {
            Self::Journal(journal) => {
                let mut pause = RESEND;
                while !is_sent(journal, event) {
                    dropped.count_write_error();
                    thread::sleep(pause);
                    pause = RESEND_MAX.min(pause * 2);
                }
            }
            Self::Lines(lines) => lines.event(event),
        }
    }
}

/// Whether the journal's socket took an event. tracing-journald drops the error of its sendto(2), but nothing after the call
/// changes errno(3), and a call that succeeds leaves the 0 from before. EMSGSIZE is left by an event that was too large for
/// a datagram and then sent as a file; any later error would be in its place.
///
/// Each call of sendto(2) looks the socket's path up, so the next one reaches a journal that has started again.
fn is_sent(journal: &Dispatch, event: &Event<'_>) -> bool {
    errno::set_errno(Errno(0));
    journal.event(event);
    let left = errno::errno().0;
    left == 0 || left == rustix::io::Errno::MSGSIZE.raw_os_error()
}

/// Makes a writer of each line to stderr.
struct Lines(Arc<DropCounters>);

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { dropped: &self.0, is_audit: false }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Line<'a> {
        Line { dropped: &self.0, is_audit: metadata.target() == AUDIT }
    }
}

/// Writes one line to stderr, by one call of `write_all`, and counts it as dropped where it can't be written whole.
struct Line<'a> {
    dropped: &'a DropCounters,
    is_audit: bool,
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::stderr().write(bytes)
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        io::stderr().write_all(bytes).inspect_err(|_| {
            self.dropped.count_write_error();
            self.dropped.count(self.is_audit);
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
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

impl Text {
    /// At most [`TEXT_MAX`] bytes of it.
    fn new(mut text: String) -> Self {
        truncate(&mut text, TEXT_MAX);
        Self(text)
    }
}

/// Shortens `text` to at most `max` bytes, at the end of a character.
pub fn truncate(text: &mut String, max: usize) {
    let end = (0..=max.min(text.len())).rfind(|&at| text.is_char_boundary(at));
    text.truncate(end.unwrap_or_default());
}

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
struct LogQueue {
    threshold: Arc<ReloadableLevel>,
    queue: SyncSender<Message>,
    waits_until: Arc<OnceLock<Instant>>,
    dropped: Arc<DropCounters>,
}

impl Subscriber for LogQueue {
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
        let is_audit = event.metadata().target() == AUDIT;
        self.dropped.waiting(is_audit).fetch_add(1, Ordering::Relaxed);
        if !send(&self.queue, Message::Event(record), self.waits_until.get().copied()) {
            self.dropped.waiting(is_audit).fetch_sub(1, Ordering::Relaxed);
            self.dropped.count(is_audit);
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
        self.values.push((field.clone(), Text::new(format!("{value:?}"))));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.values.push((field.clone(), Text::new(value.to_owned())));
    }
}

fn write_all(writer: &Writer, events: &Receiver<Message>, dropped: &DropCounters) {
    while let Ok(Message::Event(record)) = events.recv() {
        record.write(writer, dropped);
        dropped.waiting(record.metadata.target() == AUDIT).fetch_sub(1, Ordering::Relaxed);
    }
}

impl Record {
    fn write(&self, writer: &Writer, dropped: &DropCounters) {
        let values: Vec<_> =
            self.values.iter().map(|(field, text)| (field, tracing::field::debug(text))).collect();
        let Some((any, _)) = values.first() else { return };
        // A set of values has a fixed length; places without a value are passed over.
        let mut set: [(&Field, Option<&dyn Value>); FIELDS_MAX] = [(any, None); FIELDS_MAX];
        for (place, (field, value)) in set.iter_mut().zip(&values) {
            *place = (field, Some(value));
        }
        let set = self.metadata.fields().value_set(&set);
        writer.write(&Event::new(self.metadata, &set), dropped);
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

    fn queue(queue: SyncSender<Message>, dropped: &Arc<DropCounters>) -> LogQueue {
        let threshold = Arc::new(ReloadableLevel(RwLock::new(LevelFilter::INFO)));
        LogQueue { threshold, queue, waits_until: Arc::default(), dropped: Arc::clone(dropped) }
    }

    #[test]
    fn a_writer_that_hangs_drops_events_and_never_waits() {
        let (sender, _never_read) = mpsc::sync_channel(2);
        let dropped = Arc::new(DropCounters::default());
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
        let dropped = Arc::new(DropCounters::default());
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
    fn long_values_are_cut() {
        let (sender, events) = mpsc::sync_channel(1);
        tracing::subscriber::with_default(queue(sender, &Arc::default()), || {
            tracing::warn!(short = "a", text = "€".repeat(TEXT_MAX), shown = %"x".repeat(TEXT_MAX + 1), "event");
        });
        let Message::Event(record) = events.recv().unwrap() else { panic!("not an event") };
        let lengths: Vec<_> = record.values.iter().map(|(_, text)| text.0.len()).collect();
        assert_eq!(lengths, [5, 1, TEXT_MAX / 3 * 3, TEXT_MAX], "the message comes first");
    }

    #[test]
    fn an_event_comes_out_of_the_queue_as_it_went_in() {
        #[derive(Clone, Default)]
        struct Buffer(Arc<std::sync::Mutex<Vec<u8>>>);
        impl Write for Buffer {
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
        let dropped = Arc::default();
        tracing::subscriber::with_default(queue(sender, &dropped), || {
            tracing::warn!(address = %"127.0.0.1:1", count = 3, name = "http", "listening");
        });
        write_all(&Writer::Lines(writer), &events, &dropped);
        let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.trim(), "WARN listening address=127.0.0.1:1 count=3 name=http");
    }
}
