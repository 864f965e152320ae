//! The log: structured entries in the journal if stderr is the journal, otherwise lines on stderr.
//!
//! Events are queued and written by a thread of their own, because a write to a stopped journal blocks. When the queue
//! is full, events are dropped and counted; no request ever waits for the log. An entry that the journal refuses is
//! sent again until the journal takes it; a line that stderr refuses is dropped and counted.

use std::io;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::SendFlags;

use crate::telemetry::drop_counters::DropCounters;
use crate::telemetry::log_level::{LogLevel, ReloadableLevel};
use crate::telemetry::log_queue::{LogQueue, Message, enqueue, enqueue_or_drop};
use crate::telemetry::log_writer::LogWriter;

/// The most events in the queue.
const QUEUE_SIZE: usize = 1024;

/// How long a shutdown waits for the last events to be written, and before that for room in the queue.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// The running log. Dropping it writes what is still queued, within a second, and reports what could not be written.
#[derive(Debug)]
pub struct Log {
    level: Arc<ReloadableLevel>,
    queue: SyncSender<Message>,
    /// Until when events wait for room in the queue; set when serving has ended.
    deadline: Arc<OnceLock<Instant>>,
    /// Gets a message when the queue is written up to [`Message::Shutdown`].
    written: Receiver<()>,
    dropped: Arc<DropCounters>,
    is_on_terminal: bool,
}

impl Log {
    /// Starts the only log of the process.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(level: LogLevel) -> io::Result<Self> {
        let (queue, messages) = mpsc::sync_channel(QUEUE_SIZE);
        let (done, written) = mpsc::sync_channel(1);
        let dropped = Arc::new(DropCounters::default());
        let writer = LogWriter::new();
        let log = Self {
            level: Arc::new(ReloadableLevel::new(level)),
            queue,
            deadline: Arc::default(),
            written,
            dropped: Arc::clone(&dropped),
            is_on_terminal: writer.is_on_terminal(),
        };
        thread::Builder::new().name("log".into()).spawn(move || {
            write_all(writer, &messages, &dropped);
            let _ = done.send(()); // the receiver is gone if the flush timed out
        })?;
        let subscriber = LogQueue {
            level: Arc::clone(&log.level),
            queue: log.queue.clone(),
            deadline: Arc::clone(&log.deadline),
            dropped: Arc::clone(&log.dropped),
        };
        tracing::subscriber::set_global_default(subscriber).expect("the log is started once");
        Ok(log)
    }

    /// Changes the minimum level of logged events.
    pub fn set_level(&self, level: LogLevel) {
        self.level.set(level);
    }

    /// Whether log events are lines on a terminal.
    pub fn is_on_terminal(&self) -> bool {
        self.is_on_terminal
    }

    /// Writes `text` to the terminal, below the events so far. It is not a log event: no level hides it, and without a
    /// terminal it is not written. A terminal that its user has stopped delays nothing else.
    pub fn print_on_terminal(&self, text: String) {
        if self.is_on_terminal {
            enqueue_or_drop(&self.queue, Message::Text(text), false, None, &self.dropped);
        }
    }

    /// For a second from now, makes events wait for room in a full queue instead of being dropped. Call this when
    /// serving has ended, before many connections close at once and log their audit records.
    pub fn block_when_full(&self) {
        self.deadline.get_or_init(|| Instant::now() + FLUSH_TIMEOUT);
    }

    /// The counts of what was dropped since the start.
    pub fn dropped(&self) -> Arc<DropCounters> {
        Arc::clone(&self.dropped)
    }

    /// Reports the events that are still queued, and those that were dropped before, since the log accepts no more
    /// events. Under systemd, stderr is a stream to the journal, which may work if the journal's socket does not. On
    /// any other stderr nothing is reported: the lines themselves wait for it.
    fn report_lost(&self) {
        let [records, events] = [true, false].map(|is_audit| self.dropped.queued(is_audit));
        if records + events > 0 {
            let line = format!(
                "<4>key-service: {} audit records and {} other log entries were lost since the start: the journal did not \
                 take them in time\n", // sd-daemon(3): 4 is a warning
                records + self.dropped.audit_records(),
                events + self.dropped.events(),
            );
            // A full stream must not delay the exit, and an error can't be reported anywhere.
            let _ =
                rustix::net::send(io::stderr(), line.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        // A stopped journal must not delay the exit.
        let deadline = Instant::now() + FLUSH_TIMEOUT;
        if enqueue(&self.queue, Message::Shutdown, Some(deadline)) {
            let _ = self.written.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        }
        self.report_lost();
    }
}

fn write_all(mut writer: LogWriter, messages: &Receiver<Message>, dropped: &DropCounters) {
    let mut message = messages.recv().ok();
    while let Some(next) = message {
        match next {
            Message::Event(event) => writer.write(&event, dropped),
            Message::Text(text) => writer.write_text(&text),
            Message::Shutdown => break,
        }
        message = messages.try_recv().ok().or_else(|| {
            writer.flush(dropped);
            messages.recv().ok()
        });
    }
    writer.flush(dropped);
}
