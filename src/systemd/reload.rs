//! The `reload` subcommand, which the unit runs for `systemctl reload` (systemd.service(5), ExecReload=), outside of the
//! service's sandbox.
//!
//! For systemd, a reload succeeds if this command does. The service can report the outcome only in its status, so the
//! command sends SIGHUP and waits for that status.

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

/// How long the outcome may take. TimeoutStartSec= of the unit, which applies to ExecReload= too, is longer.
const OUTCOME_TIMEOUT: Duration = Duration::from_secs(8);

/// How long to wait before the status is read again: at first, and at most.
const POLL_INTERVALS: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(200)];

/// The text before an outcome in a status. [`SUCCEEDED`] or [`REFUSED`] follows its number.
const PREFIX: &str = "; reload ";
const SUCCEEDED: &str = " succeeded";
const REFUSED: &str = " was refused: ";

/// The outcome of a reload by SIGHUP. The service's status ends with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReloadOutcome {
    /// 1 for the first reload since the start. It distinguishes an outcome from the previous one.
    pub number: u64,
    /// Why it was refused, if it was.
    pub refused: Option<String>,
}

impl fmt::Display for ReloadOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.number)?;
        match &self.refused {
            None => f.write_str(SUCCEEDED),
            Some(why) => write!(f, "{REFUSED}{why}"),
        }
    }
}

impl ReloadOutcome {
    /// The outcome at the end of `status`.
    fn find(status: &str) -> Option<Self> {
        status.match_indices(PREFIX).find_map(|(at, _)| {
            let rest = &status[at + PREFIX.len()..];
            let (number, rest) = rest.split_at(rest.find(' ')?);
            let number = number.parse().ok()?;
            let refused = rest.strip_prefix(REFUSED).map(str::to_owned);
            (refused.is_some() || rest == SUCCEEDED).then_some(Self { number, refused })
        })
    }
}

/// Makes the service of `unit`, whose process is `$MAINPID`, reload its configuration, and returns once the new one is in
/// effect. `config_path` is the unit's configuration file.
///
/// # Errors
/// A sentence: why the new configuration is not in effect.
pub fn run(unit: &str, config_path: &Path) -> Result<(), String> {
    let pid = env::var("MAINPID").ok().and_then(|pid| Pid::from_raw(pid.parse().ok()?));
    let pid = pid.ok_or("expected the service's process in $MAINPID, which systemd sets for ExecReload=")?;
    let number = |outcome: Option<&ReloadOutcome>| outcome.map(|outcome| outcome.number);
    let previous = number(current_outcome(unit)?.as_ref());
    if let Some(directory) = config_path.parent() {
        expect_same_directory(directory, pid)?;
    }
    kill_process(pid, Signal::HUP).map_err(|error| format!("process {}: {error}", pid.as_raw_nonzero()))?;
    let deadline = Instant::now() + OUTCOME_TIMEOUT;
    let [mut interval, longest] = POLL_INTERVALS;
    loop {
        thread::sleep(interval);
        let found = current_outcome(unit)?;
        match found {
            Some(ReloadOutcome { refused, .. }) if number(found.as_ref()) != previous => {
                return refused
                    .map_or(Ok(()), |why| Err(format!("the new configuration was refused: {why}")));
            }
            _ if Instant::now() > deadline => {
                return Err(format!(
                    "expected {unit} to report a reload within {} s, found none",
                    OUTCOME_TIMEOUT.as_secs()
                ));
            }
            _ => interval = longest.min(interval * 2),
        }
    }
}

/// The service sees the directory that held its configuration when it started. Only its next start would read another
/// directory that was created or renamed to that path since.
///
/// # Errors
/// When the service sees another directory than this process.
fn expect_same_directory(directory: &Path, pid: Pid) -> Result<(), String> {
    let root = Path::new("/proc").join(pid.as_raw_nonzero().to_string()).join("root");
    let seen = root.join(directory.strip_prefix("/").unwrap_or(directory));
    if identity(directory)? == identity(&seen)? {
        return Ok(());
    }
    Err(format!(
        "{}: expected the directory that was there when the service started, found another one, which it can't see: \
         restart it",
        directory.display()
    ))
}

/// Device and inode; `None` if nothing exists at `path`.
fn identity(path: &Path) -> Result<Option<(u64, u64)>, String> {
    match fs::metadata(path) {
        Ok(found) => Ok(Some((found.dev(), found.ino()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// The outcome in the unit's status.
fn current_outcome(unit: &str) -> Result<Option<ReloadOutcome>, String> {
    let failed = |why: &dyn fmt::Display| format!("systemctl failed to show the status of {unit}: {why}");
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
    fn a_status_ends_with_the_outcome_of_a_reload() {
        let succeeded = ReloadOutcome { number: 12, refused: None };
        let why = "max-size: expected a number; reload 3 succeeded".to_owned();
        let refused = ReloadOutcome { number: 7, refused: Some(why) };
        for outcome in [succeeded, refused] {
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
    fn a_directory_that_the_process_does_not_see_is_refused() {
        let this = Pid::from_raw(std::process::id().try_into().unwrap()).unwrap();
        expect_same_directory(Path::new("/etc"), this).unwrap();
        expect_same_directory(Path::new("/nowhere"), this).unwrap();
        assert_ne!(identity(Path::new("/etc")), identity(Path::new("/proc")));
        assert_eq!(identity(Path::new("/nowhere")), Ok(None));
    }
}
