//! Writes log events: to the journal if stderr is the journal, otherwise as lines to stderr.

use std::env;
use std::io;
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use errno::Errno;
use tracing::{Dispatch, Event};
use tracing_subscriber::Registry;
use tracing_subscriber::layer::SubscriberExt;

use crate::telemetry::drop_counters::DropCounters;
use crate::telemetry::log_event::OwnedEvent;
use crate::telemetry::log_lines::StderrLines;

/// The first and the longest pause before an entry is sent to the journal again. A shutdown waits for a second, so a
/// journal that is back is found well within it.
const RESEND_MIN: Duration = Duration::from_millis(10);
const RESEND_MAX: Duration = Duration::from_millis(100);

pub(super) enum LogWriter {
    Journal(Dispatch),
    Stderr(StderrLines),
}

impl LogWriter {
    pub(super) fn new() -> Self {
        if is_journal()
            && let Ok(journal) = tracing_journald::layer()
        {
            let journal = journal.with_field_prefix(None).with_syslog_identifier("key-service".into());
            return Self::Journal(Dispatch::new(Registry::default().with(journal)));
        }
        Self::Stderr(StderrLines::new())
    }

    /// Writes an event. To the journal it is sent until the journal takes it. A line for stderr may be written later,
    /// with others, but no later than [`Self::flush`] is called; a line that stderr refuses is dropped.
    pub(super) fn write(&mut self, event: &OwnedEvent, dropped: &DropCounters) {
        match self {
            Self::Journal(journal) => {
                event.replay(|event| send(journal, event, dropped));
                dropped.dequeue(event.is_audit());
            }
            Self::Stderr(lines) => lines.add(event, dropped),
        }
    }

    /// Whether stderr is a terminal.
    pub(super) fn is_on_terminal(&self) -> bool {
        match self {
            Self::Journal(_) => false,
            Self::Stderr(lines) => lines.is_on_terminal(),
        }
    }

    /// Writes a text that is not a log event to stderr, in the same way. The journal takes none.
    pub(super) fn write_text(&mut self, text: &str) {
        match self {
            Self::Journal(_) => {}
            Self::Stderr(lines) => lines.add_text(text),
        }
    }

    /// Writes what is not written yet.
    pub(super) fn flush(&mut self, dropped: &DropCounters) {
        match self {
            Self::Journal(_) => {}
            Self::Stderr(lines) => lines.write(dropped),
        }
    }
}

/// Whether stderr is the journal: its device and inode are those in `$JOURNAL_STREAM` (systemd.exec(5)).
fn is_journal() -> bool {
    let Ok(stderr) = rustix::fs::fstat(io::stderr().as_fd()) else {
        return false;
    };
    env::var("JOURNAL_STREAM").is_ok_and(|stream| stream == format!("{}:{}", stderr.st_dev, stderr.st_ino))
}

/// Sends an event to the journal until the journal takes it.
fn send(journal: &Dispatch, event: &Event<'_>, dropped: &DropCounters) {
    let mut pause = RESEND_MIN;
    while !is_sent(journal, event) {
        dropped.count_write_error();
        thread::sleep(pause);
        pause = RESEND_MAX.min(pause * 2);
    }
}

/// Sends an event to the journal's socket, and returns whether the socket took it. tracing-journald drops the error of
/// its sendto(2), but nothing after the call changes errno(3), and a call that succeeds leaves the 0 from before.
/// EMSGSIZE is left by an event that was too large for a datagram and then sent as a file; any later error would
/// replace it.
///
/// Each sendto(2) looks up the socket's path, so the next one reaches a journal that has restarted.
fn is_sent(journal: &Dispatch, event: &Event<'_>) -> bool {
    errno::set_errno(Errno(0));
    journal.event(event);
    let left = errno::errno().0;
    left == 0 || left == rustix::io::Errno::MSGSIZE.raw_os_error()
}
