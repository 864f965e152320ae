//! Writes log events: to the journal if stderr is the journal, otherwise as lines to stderr.

use std::env;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use errno::Errno;
use tracing::{Dispatch, Event, Metadata};
use tracing_subscriber::Registry;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;

use crate::telemetry::drop_counters::DropCounters;
use crate::telemetry::log_event::{AUDIT_TARGET, OwnedEvent};

/// The first and the longest pause before an entry is sent to the journal again. A shutdown waits for a second, so a
/// journal that is back is found well within it.
const RESEND_MIN: Duration = Duration::from_millis(10);
const RESEND_MAX: Duration = Duration::from_millis(100);

pub(super) enum LogWriter {
    Journal(Dispatch),
    Stderr(Dispatch),
}

impl LogWriter {
    pub(super) fn new(dropped: &Arc<DropCounters>) -> Self {
        if is_journal()
            && let Ok(journal) = tracing_journald::layer()
        {
            let journal = journal.with_field_prefix(None).with_syslog_identifier("key-service".into());
            return Self::Journal(Dispatch::new(Registry::default().with(journal)));
        }
        let lines = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_target(false)
            .with_writer(MakeStderrLine(Arc::clone(dropped)));
        Self::Stderr(Dispatch::new(Registry::default().with(lines)))
    }

    /// Writes an event. To the journal it is sent until the journal takes it; a line that stderr refuses is dropped.
    pub(super) fn write(&self, event: &OwnedEvent, dropped: &DropCounters) {
        event.replay(|event| match self {
            Self::Journal(journal) => {
                let mut pause = RESEND_MIN;
                while !is_sent(journal, event) {
                    dropped.count_write_error();
                    thread::sleep(pause);
                    pause = RESEND_MAX.min(pause * 2);
                }
            }
            Self::Stderr(lines) => lines.event(event),
        });
    }
}

/// Whether stderr is the journal: its device and inode are those in `$JOURNAL_STREAM` (systemd.exec(5)).
fn is_journal() -> bool {
    let Ok(stderr) = rustix::fs::fstat(io::stderr().as_fd()) else {
        return false;
    };
    env::var("JOURNAL_STREAM").is_ok_and(|stream| stream == format!("{}:{}", stderr.st_dev, stderr.st_ino))
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

/// Makes a writer for each line to stderr.
struct MakeStderrLine(Arc<DropCounters>);

impl<'a> MakeWriter<'a> for MakeStderrLine {
    type Writer = StderrLine<'a>;

    fn make_writer(&'a self) -> StderrLine<'a> {
        StderrLine { dropped: &self.0, is_audit: false }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> StderrLine<'a> {
        StderrLine { dropped: &self.0, is_audit: metadata.target() == AUDIT_TARGET }
    }
}

/// Writes one line to stderr by one `write_all`, and counts it as dropped if it can't be written whole.
struct StderrLine<'a> {
    dropped: &'a DropCounters,
    is_audit: bool,
}

impl Write for StderrLine<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::stderr().write(bytes)
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        io::stderr().write_all(bytes).inspect_err(|_| {
            self.dropped.count_write_error();
            self.dropped.count_dropped(self.is_audit);
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
