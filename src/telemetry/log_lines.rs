//! The lines of the log on stderr.

use std::env;
use std::fmt::Write as _;
use std::io::{self, ErrorKind, IsTerminal, Write as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tracing::Level;
use x509_cert::der::DateTime;

use crate::telemetry::drop_counters::DropCounters;
use crate::telemetry::log_event::OwnedEvent;

/// The most bytes that one write(2) takes, unless a single line is longer: `PIPE_BUF` of pipe(7), so a pipe takes all
/// of them or none.
const WRITE_MAX: usize = 4096;

/// Formats lines as `tracing_subscriber::fmt` does, which takes four times the instructions, and writes several at
/// once.
#[derive(Debug, Default)]
pub(super) struct StderrLines {
    /// The lines that are not written yet.
    text: String,
    lines: Vec<Line>,
    timestamp: Timestamp,
    terminal: Terminal,
}

/// How far stderr is a terminal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Terminal {
    /// It is a file, a pipe or a socket.
    #[default]
    None,
    /// It is a terminal that shows no colours, or its user wants none.
    Plain,
    Coloured,
}

/// A line that is not written yet.
#[derive(Debug)]
struct Line {
    /// Where it ends in the text.
    end: usize,
    is_audit: bool,
}

impl StderrLines {
    /// For the stderr of this process.
    pub(super) fn new() -> Self {
        Self { terminal: Terminal::of_stderr(), ..Self::default() }
    }

    /// Whether a person may be reading along.
    pub(super) fn is_on_terminal(&self) -> bool {
        self.terminal != Terminal::None
    }

    /// Adds a text that is not a log event. Like the line of an event, it may be written later.
    pub(super) fn add_text(&mut self, text: &str) {
        append_escaped(text, is_unprintable, &mut self.text);
        self.lines.push(Line { end: self.text.len(), is_audit: false });
    }

    /// Adds the line of an event. Call [`Self::write`] once there is no other event to add.
    pub(super) fn add(&mut self, event: &OwnedEvent, dropped: &DropCounters) {
        self.format(event, SystemTime::now());
        if self.text.len() >= WRITE_MAX {
            self.write(dropped);
        }
    }

    fn format(&mut self, event: &OwnedEvent, time: SystemTime) {
        let (level, colour) = match *event.metadata().level() {
            Level::ERROR => (" ERROR", "\x1b[31m"),
            Level::WARN => ("  WARN", "\x1b[33m"),
            Level::INFO => ("  INFO", "\x1b[32m"),
            Level::DEBUG => (" DEBUG", "\x1b[34m"),
            Level::TRACE => (" TRACE", "\x1b[35m"),
        };
        // ECMA-48, SGR: dim, a colour, and back to the default.
        let [dim, colour, reset] =
            if self.terminal == Terminal::Coloured { ["\x1b[2m", colour, "\x1b[0m"] } else { [""; 3] };
        let text = &mut self.text;
        text.push_str(dim);
        self.timestamp.append(time, text);
        [reset, colour, level, reset].into_iter().for_each(|part| text.push_str(part));
        for (field, value) in event.values() {
            text.push(' ');
            match (field.name(), self.terminal) {
                ("message", Terminal::None) => append_escaped(value, is_dangerous, text),
                ("message", _) => append_escaped(value, is_unprintable, text),
                (name, Terminal::None) => text.extend([name, "=", value]),
                (name, _) => {
                    text.extend([name, "="]);
                    append_escaped(value, char::is_control, text);
                }
            }
        }
        text.push('\n');
        self.lines.push(Line { end: text.len(), is_audit: event.is_audit() });
    }

    /// Writes all lines to stderr. A line that stderr does not take whole is dropped and counted.
    pub(super) fn write(&mut self, dropped: &DropCounters) {
        self.write_to(|bytes| io::stderr().write(bytes), dropped);
    }

    fn write_to(&mut self, mut write: impl FnMut(&[u8]) -> io::Result<usize>, dropped: &DropCounters) {
        let mut start = 0;
        let mut rest = &self.lines[..];
        while !rest.is_empty() {
            let count = rest.partition_point(|line| line.end - start <= WRITE_MAX).max(1);
            let end = rest[count - 1].end;
            let written = write_all(&mut write, &self.text.as_bytes()[start..end]);
            let done = match written {
                Ok(()) => count,
                Err(written) => {
                    let cut = rest.partition_point(|line| line.end - start <= written);
                    dropped.count_write_error();
                    dropped.count_dropped(rest[cut].is_audit);
                    cut + 1
                }
            };
            start = rest[done - 1].end;
            rest = &rest[done..];
        }
        self.lines.drain(..).for_each(|line| dropped.dequeue(line.is_audit));
        self.text.clear();
    }
}

/// Writes all of `bytes`; the error is the number of bytes that were written before it.
fn write_all(write: &mut impl FnMut(&[u8]) -> io::Result<usize>, bytes: &[u8]) -> Result<(), usize> {
    let mut written = 0;
    while written < bytes.len() {
        match write(&bytes[written..]) {
            Ok(0) => return Err(written),
            Ok(more) => written += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Err(written),
        }
    }
    Ok(())
}

/// Appends `text`, with these characters escaped.
fn append_escaped(text: &str, is_escaped: fn(char) -> bool, to: &mut String) {
    for char in text.chars() {
        let _ = match char {
            char if !is_escaped(char) => to.write_char(char),
            '\0'..='\x7f' => write!(to, "\\x{:02x}", u32::from(char)),
            char => write!(to, "\\u{{{:x}}}", u32::from(char)),
        };
    }
}

/// The control characters by which a terminal could be made to run commands, as tracing escapes them in messages.
fn is_dangerous(char: char) -> bool {
    matches!(char, '\x07' | '\x08' | '\x0c' | '\x1b' | '\x7f' | '\u{80}'..='\u{9f}')
}

/// What a message must not send to a terminal. A line break stays: no message of this program has one from outside.
fn is_unprintable(char: char) -> bool {
    char.is_control() && char != '\n'
}

impl Terminal {
    /// What stderr is. The user's variables are those of <https://no-color.org> and terminfo(5).
    fn of_stderr() -> Self {
        if !io::stderr().is_terminal() {
            return Self::None;
        }
        let [term, no_color] = ["TERM", "NO_COLOR"].map(|name| env::var_os(name).unwrap_or_default());
        let has_colours = !term.is_empty() && term != "dumb" && no_color.is_empty();
        if has_colours { Self::Coloured } else { Self::Plain }
    }
}

/// Formats times in RFC 3339, with microseconds. The part before them is formatted once per second.
#[derive(Debug, Default)]
struct Timestamp {
    second: Duration,
    /// The second, from the year on; empty before the first time.
    text: String,
}

impl Timestamp {
    fn append(&mut self, time: SystemTime, text: &mut String) {
        let now = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let second = Duration::from_secs(now.as_secs());
        if second != self.second || self.text.is_empty() {
            self.second = second;
            self.text = DateTime::from_unix_duration(second).unwrap_or(DateTime::INFINITY).to_string();
            self.text.pop(); // the Z follows the microseconds
        }
        let mut digits = itoa::Buffer::new();
        let micros = digits.format(1_000_000 + now.subsec_micros()); // one digit more, so that zeros lead
        [&self.text, ".", &micros[1..], "Z"].into_iter().for_each(|part| text.push_str(part));
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;
    use tracing::level_filters::LevelFilter;
    use tracing::{Event, Subscriber};
    use tracing_subscriber::fmt::MakeWriter;
    use tracing_subscriber::fmt::format::Writer;
    use tracing_subscriber::fmt::time::{FormatTime, SystemTime as TracingTime};
    use tracing_subscriber::layer::{Context, SubscriberExt};
    use tracing_subscriber::{Layer, Registry};

    use super::*;

    /// The text that tracing's own formatter writes.
    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Written {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Written {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    /// Formats events as this program does, without their time.
    #[derive(Clone, Default)]
    struct Ours(Arc<Mutex<StderrLines>>);

    impl<S: Subscriber> Layer<S> for Ours {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            self.0.lock().unwrap().format(&OwnedEvent::new(event), UNIX_EPOCH);
        }
    }

    /// What tracing's formatter and ours write of the events that `log` logs.
    fn formatted(log: impl FnOnce()) -> (String, String) {
        let (theirs, ours) = (Written::default(), Ours::default());
        let layer = tracing_subscriber::fmt::layer().with_ansi(false).with_target(false).without_time();
        let layer = layer.with_writer(theirs.clone());
        let subscriber = Registry::default().with(LevelFilter::TRACE).with(layer).with(ours.clone());
        tracing::subscriber::with_default(subscriber, log);
        let lines = ours.0.lock().unwrap().text.replace("1970-01-01T00:00:00.000000Z ", "");
        (theirs.text(), lines)
    }

    #[test]
    fn every_level_is_written_as_tracing_does() {
        let (theirs, ours) = formatted(|| {
            tracing::error!(reason = %"out of file descriptors", "failed");
            tracing::warn!(count = 3, negative = -4, fraction = 0.5, is_set = true, "counted");
            tracing::info!(error = ?io::Error::other("an error"), "a {}", "message");
            tracing::debug!(absent = None::<u32>, "no field");
            tracing::trace!("nothing");
        });
        assert_eq!(theirs, ours);
    }

    /// The lines on such a terminal of the events that `log` logs.
    fn on_terminal(terminal: Terminal, log: impl FnOnce()) -> String {
        let ours = Ours(Arc::new(Mutex::new(StderrLines { terminal, ..StderrLines::default() })));
        tracing::subscriber::with_default(Registry::default().with(ours.clone()), log);
        ours.0.lock().unwrap().text.clone()
    }

    #[test]
    fn a_terminal_shows_each_level_in_its_colour() {
        let log = || {
            tracing::error!(count = 3, "a message");
            tracing::warn!("a message");
            tracing::info!("a message");
        };
        let time = "1970-01-01T00:00:00.000000Z";
        let plain = format!(
            "{time} ERROR a message count=3\n\
             {time}  WARN a message\n\
             {time}  INFO a message\n"
        );
        let coloured = format!(
            "\x1b[2m{time}\x1b[0m\x1b[31m ERROR\x1b[0m a message count=3\n\
             \x1b[2m{time}\x1b[0m\x1b[33m  WARN\x1b[0m a message\n\
             \x1b[2m{time}\x1b[0m\x1b[32m  INFO\x1b[0m a message\n"
        );
        assert_eq!(on_terminal(Terminal::None, log), plain);
        assert_eq!(on_terminal(Terminal::Plain, log), plain);
        assert_eq!(on_terminal(Terminal::Coloured, log), coloured);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_value_controls_a_terminal(value in ".*", controls in "[\\x00-\\x9f]{1,9}") {
            let line = on_terminal(Terminal::Plain, || tracing::info!(%value, controls, "a message"));
            prop_assert_eq!(line.find(char::is_control), Some(line.len() - 1), "{:?}", line);
            prop_assert!(value.contains(char::is_control) || line.contains(&value));
        }

        #[test]
        fn every_text_is_written_as_tracing_does(message in ".*", value in ".*", controls in "[\\x00-\\x9f]{0,9}") {
            let (theirs, ours) = formatted(|| {
                tracing::info!(%value, controls = %controls, "{message}");
                tracing::info!(%value, "{controls}");
            });
            prop_assert_eq!(theirs, ours);
        }

        #[test]
        fn every_time_is_written_as_tracing_does(ages in prop::collection::vec((-2i64..2, 0u32..1_000_000_000), 1..9)) {
            // Tracing's own formatter reads the clock, so both are compared with the present.
            let mut timestamp = Timestamp::default();
            for (seconds, nanos) in ages {
                let before = SystemTime::now();
                let mut theirs = String::new();
                TracingTime.format_time(&mut Writer::new(&mut theirs)).unwrap();
                let after = SystemTime::now();
                let mut text = |time| {
                    let mut text = String::new();
                    timestamp.append(time, &mut text);
                    text
                };
                let other = UNIX_EPOCH + Duration::new(1_700_000_000, nanos);
                let other = if seconds < 0 { other - Duration::from_secs(1) } else { other };
                let expected = format!(".{:06}Z", nanos / 1000);
                prop_assert!(text(other).ends_with(&expected));
                let present = text(before)..=text(after);
                prop_assert!(present.contains(&theirs));
            }
        }
    }

    /// Three lines of 1,500 bytes, of which two fit one write.
    fn lines() -> StderrLines {
        let text = ["a", "b", "c"].map(|line| format!("{}\n", line.repeat(1499))).concat();
        let lines = [1500, 3000, 4500].map(|end| Line { end, is_audit: end == 3000 });
        StderrLines { text, lines: lines.into(), ..StderrLines::default() }
    }

    #[test]
    fn only_whole_lines_that_a_pipe_takes_at_once_are_written_together() {
        let sizes = RefCell::new(Vec::new());
        let dropped = DropCounters::default();
        let mut lines = lines();
        lines.text.extend(["d".repeat(WRITE_MAX).as_str(), "\n"]);
        lines.lines.push(Line { end: lines.text.len(), is_audit: false });
        lines.write_to(
            |bytes| {
                sizes.borrow_mut().push(bytes.len());
                Ok(bytes.len())
            },
            &dropped,
        );
        assert_eq!(sizes.into_inner(), [3000, 1500, WRITE_MAX + 1]);
        assert_eq!((dropped.events(), dropped.write_errors()), (0, 0));
        assert!(lines.text.is_empty() && lines.lines.is_empty());
    }

    #[test]
    fn a_failed_write_drops_one_line() {
        for (room, expected, records) in
            [(0, "bc", 0), (1499, "abc", 0), (1500, "ac", 1), (2999, "abc", 1), (3000, "ab", 0)]
        {
            // The first bytes are taken, and then one write fails.
            let (mut taken, mut has_failed) = (Vec::new(), false);
            let dropped = DropCounters::default();
            lines().write_to(
                |bytes| {
                    if taken.len() == room && !has_failed {
                        has_failed = true;
                        return Err(ErrorKind::WouldBlock.into());
                    }
                    let count = if has_failed { bytes.len() } else { bytes.len().min(room - taken.len()) };
                    taken.extend_from_slice(&bytes[..count]);
                    Ok(count)
                },
                &dropped,
            );
            taken.dedup();
            let found = String::from_utf8(taken).unwrap().replace('\n', "");
            assert_eq!(found, expected, "{room} bytes");
            assert_eq!((dropped.audit_records(), dropped.events()), (records, 1 - records));
            assert_eq!(dropped.write_errors(), 1);
        }
    }
}
