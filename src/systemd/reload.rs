//! What the unit runs for `systemctl reload` (systemd.service(5), ExecReload=), outside of the service's sandbox.
//!
//! systemd takes a reload for successful when this command is. The service can only put what came of it in its status, so
//! the command sends SIGHUP and waits for that status.

use std::env;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long the service has for its answer; TimeoutStartSec= of the unit, which holds for ExecReload= too, is longer.
const ANSWER: Duration = Duration::from_secs(8);

/// How long to wait before the status is read again: at first, and at most.
const PAUSES: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(200)];

/// What comes before an outcome in a status, and between its number and the rest.
const MARK: &str = "; reload ";
const DONE: &str = " succeeded";
const REFUSED: &str = " was refused: ";

/// What came of a reload that was asked for by a signal, as the service's status ends with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReloadOutcome {
    /// 1 for the first since the start: by it an outcome is told from the one before.
    pub number: u64,
    /// Why it was refused, if it was.
    pub refused: Option<String>,
}

impl fmt::Display for ReloadOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{MARK}{}", self.number)?;
        match &self.refused {
            None => f.write_str(DONE),
            Some(why) => write!(f, "{REFUSED}{why}"),
        }
    }
}

impl ReloadOutcome {
    /// The one that a status ends with.
    fn find(status: &str) -> Option<Self> {
        status.match_indices(MARK).find_map(|(at, _)| {
            let rest = &status[at + MARK.len()..];
            let (number, rest) = rest.split_at(rest.find(' ')?);
            let number = number.parse().ok()?;
            let refused = rest.strip_prefix(REFUSED).map(str::to_owned);
            (refused.is_some() || rest == DONE).then_some(Self { number, refused })
        })
    }
}

/// Tells the service of `unit`, whose process is `$MAINPID`, to read its configuration again, and returns once it has taken
/// the new one. `configuration` is where the unit's configuration file is.
///
/// # Errors
/// Why it has not, in one sentence.
pub fn run(unit: &str, configuration: &Path) -> Result<(), String> {
    let pid = env::var("MAINPID").ok().and_then(|pid| Pid::from_raw(pid.parse().ok()?));
    let pid = pid.ok_or("expected the service's process in $MAINPID, which systemd sets for ExecReload=")?;
    let number = |outcome: Option<&ReloadOutcome>| outcome.map(|outcome| outcome.number);
    let before = number(outcome(unit)?.as_ref());
    if let Some(directory) = configuration.parent() {
        compare(directory, pid)?;
    }
    kill_process(pid, Signal::HUP).map_err(|error| format!("process {}: {error}", pid.as_raw_nonzero()))?;
    let deadline = Instant::now() + ANSWER;
    let [mut pause, longest] = PAUSES;
    loop {
        thread::sleep(pause);
        let found = outcome(unit)?;
        match found {
            Some(ReloadOutcome { refused, .. }) if number(found.as_ref()) != before => {
                return refused
                    .map_or(Ok(()), |why| Err(format!("the new configuration was refused: {why}")));
            }
            _ if Instant::now() > deadline => {
                return Err(format!("{unit} has not answered within {} s", ANSWER.as_secs()));
            }
            _ => pause = longest.min(pause * 2),
        }
    }
}

/// The service sees the directory of its configuration that was there when it started. Another one, renamed into its place
/// or made since, would be read by the next start alone.
fn compare(directory: &Path, pid: Pid) -> Result<(), String> {
    let seen = Path::new("/proc").join(pid.as_raw_nonzero().to_string()).join("root");
    let seen = seen.join(directory.strip_prefix("/").unwrap_or(directory));
    if identity(directory)? == identity(&seen)? {
        return Ok(());
    }
    Err(format!(
        "{}: expected the directory that was there when the service started, found another one, which it can't see: \
         restart it",
        directory.display()
    ))
}

/// Device and inode; `None` where there is nothing.
fn identity(path: &Path) -> Result<Option<(u64, u64)>, String> {
    match fs::metadata(path) {
        Ok(found) => Ok(Some((found.dev(), found.ino()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// The outcome in the unit's status.
fn outcome(unit: &str) -> Result<Option<ReloadOutcome>, String> {
    let failed = |why: &dyn fmt::Display| format!("systemctl can't tell the status of {unit}: {why}");
    let shown = Command::new("systemctl").args(["show", "--property=StatusText", "--value", unit]).output();
    let shown = shown.map_err(|error| failed(&error))?;
    if !shown.status.success() {
        return Err(failed(&String::from_utf8_lossy(&shown.stderr).trim()));
    }
    Ok(ReloadOutcome::find(String::from_utf8_lossy(&shown.stdout).trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_is_found_at_the_end_of_a_status() {
        let taken = ReloadOutcome { number: 12, refused: None };
        let why = "max-size: expected a number; reload 3 succeeded".to_owned();
        let refused = ReloadOutcome { number: 7, refused: Some(why) };
        for outcome in [taken, refused] {
            let status = format!("Keys on 0.0.0.0:1123; no metrics{outcome}");
            assert_eq!(ReloadOutcome::find(&status), Some(outcome));
        }
        for none in [
            "",
            "Keys on 0.0.0.0:1123",
            "Draining",
            "Keys on [::]:1123; the last reload was refused: audit: a changed file alone removes no protection; reload \
             (SIGHUP) or restart to remove it on purpose",
            "Keys on [::]:1123; reload 1 succeeded, or so",
        ] {
            assert_eq!(ReloadOutcome::find(none), None, "{none}");
        }
    }

    #[test]
    fn another_directory_than_the_one_that_a_process_sees_is_refused() {
        let this = Pid::from_raw(std::process::id().try_into().unwrap()).unwrap();
        compare(Path::new("/etc"), this).unwrap();
        compare(Path::new("/nowhere"), this).unwrap();
        assert_ne!(identity(Path::new("/etc")), identity(Path::new("/proc")));
        assert_eq!(identity(Path::new("/nowhere")), Ok(None));
    }
}
