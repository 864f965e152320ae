//! Messages to the service manager: readiness, reload, stopping, and the watchdog's ping (sd_notify(3)).

use std::convert::Infallible;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::MissedTickBehavior;
use tracing::{error, warn};

use crate::keys::generator::Generator;
use crate::telemetry::text::truncate;

/// How many messages may wait to be sent.
const QUEUE: usize = 64;

/// The most bytes of a status: systemd ignores a message of more than 4,096 (PIPE_BUF).
const STATUS_MAX: usize = 2048;

/// How long a shutdown waits until the last message is sent.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// The watchdog's limit if the service manager has set none: WatchdogSec= of the shipped unit.
const WATCHDOG_DEFAULT: Duration = Duration::from_secs(10);

/// How often the watchdog checks again for heartbeats, within a tenth of its limit, before it reports that one is
/// missing.
const CHECKS: u32 = 10;

/// Proof of what READY=1 promises: the generator passed its self-tests, and workers serve.
#[derive(Debug, Clone, Copy)]
pub struct Readiness(());

impl Readiness {
    /// A [`Generator`] exists only once it passed its self-tests, and a [`JoinHandle`] only once its thread was started.
    ///
    /// # Panics
    /// Without a worker.
    pub fn new(_self_tested: &Generator, workers: &[JoinHandle<()>]) -> Self {
        assert!(!workers.is_empty(), "READY=1 needs a worker that serves");
        Self(())
    }
}

/// Sends messages to the service manager, in order and from a thread of its own: a send to a full notify socket blocks.
#[derive(Debug)]
pub struct Notifier {
    queue: Option<SyncSender<Message>>,
    flushed: Receiver<()>,
}

#[derive(Debug)]
enum Message {
    Ready(String),
    Reloading,
    Status(String),
    Stopping(String),
    Watchdog,
}

impl Notifier {
    /// Starts the thread. Without `NOTIFY_SOCKET`, messages are dropped (sd_notify(3)).
    ///
    /// # Errors
    /// When the thread can't be started.
    pub fn start() -> io::Result<Self> {
        let (queue, messages) = mpsc::sync_channel(QUEUE);
        let (done, flushed) = mpsc::sync_channel(1);
        thread::Builder::new().name("notify".into()).spawn(move || {
            send_all(&messages);
            let _ = done.send(()); // fails if the process ends first
        })?;
        Ok(Self { queue: Some(queue), flushed })
    }

    /// Reports that the service is ready, or that a reload has ended. `status` is what `systemctl status` shows.
    pub fn ready(&self, _proof: Readiness, status: &str) {
        self.queue(Message::Ready(one_line(status)));
    }

    /// Reports that the configuration is being reloaded, until [`Notifier::ready`].
    pub fn reloading(&self) {
        self.queue(Message::Reloading);
    }

    /// Changes what `systemctl status` shows, outside of a reload that the service manager waits for.
    pub fn status(&self, status: &str) {
        self.queue(Message::Status(one_line(status)));
    }

    /// Reports that the service is stopping.
    pub fn stopping(&self, status: &str) {
        self.queue(Message::Stopping(status.to_owned()));
    }

    fn queue(&self, message: Message) {
        if let Some(queue) = &self.queue {
            let _ = queue.try_send(message); // full only if the manager has not read for minutes
        }
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        drop(self.queue.take());
        let _ = self.flushed.recv_timeout(FLUSH_TIMEOUT); // a manager that does not read must not delay the exit
    }
}

fn send_all(messages: &Receiver<Message>) {
    for message in messages {
        let sent = match &message {
            Message::Ready(status) => notify(&[NotifyState::Ready, NotifyState::Status(status)]),
            // One datagram: systemd pairs the two (sd_notify(3), RELOADING=1).
            Message::Reloading => {
                NotifyState::monotonic_usec_now().and_then(|now| notify(&[NotifyState::Reloading, now]))
            }
            Message::Status(status) => notify(&[NotifyState::Status(status)]),
            Message::Stopping(status) => notify(&[NotifyState::Stopping, NotifyState::Status(status)]),
            Message::Watchdog => notify(&[NotifyState::Watchdog]),
        };
        if let Err(error) = sent {
            warn!(%error, "sd_notify failed");
        }
    }
}

/// Sends one message to `$NOTIFY_SOCKET`, which may name an abstract socket (sd_notify(3)): sd-notify 0.5 mistakes its `@`
/// for the first character of a path.
fn notify(state: &[NotifyState<'_>]) -> io::Result<()> {
    let name = std::env::var_os("NOTIFY_SOCKET");
    let Some(name) = name.as_deref().map(OsStr::as_bytes).and_then(|name| name.strip_prefix(b"@")) else {
        return sd_notify::notify(state);
    };
    let message: String = state.iter().map(|state| format!("{state}\n")).collect();
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?;
    let sent = socket.send(message.as_bytes())?;
    if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Shows in `systemctl status` why the service does not start, even if the log has not arrived yet. The calling thread
/// sends it, since the process is about to exit. If the manager does not read, `TimeoutStartSec=` ends the process.
pub fn startup_failed(reason: &str) {
    let _ = notify(&[NotifyState::Status(&one_line(reason))]); // stderr has it too
}

/// A line break would end the message's field.
fn one_line(status: &str) -> String {
    let mut line = status.lines().collect::<Vec<_>>().join("; ");
    truncate(&mut line, STATUS_MAX);
    line
}

/// Pings the watchdog for as long as `check_progress`, called once a tick, is `Ok`. If the service manager has set no
/// watchdog, the checks run as if it had: /livez reports their result to other supervisors.
///
/// After the whole process was stopped (SIGSTOP, a debugger, a suspended machine), a tick may run before the workers
/// had time to send their heartbeats. If `is_settled` is false, the tick therefore waits a little, in short steps: a
/// stop of any length uses up only one step.
pub async fn watchdog(
    notifier: &Notifier,
    is_settled: impl Fn() -> bool,
    mut check_progress: impl FnMut() -> Result<(), &'static str>,
) -> Infallible {
    let enabled = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
    let limit = enabled.unwrap_or(WATCHDOG_DEFAULT);
    // sd_watchdog_enabled(3) advises half of the limit; a third leaves room for one late tick.
    let mut tick = tokio::time::interval(limit / 3);
    // Catching up on missed ticks would check again before a heartbeat could arrive.
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_stalled = false;
    loop {
        tick.tick().await;
        for _ in 0..CHECKS {
            if is_settled() {
                break;
            }
            tokio::time::sleep(limit / 10 / CHECKS).await;
        }
        match check_progress() {
            Ok(()) => {
                is_stalled = false;
                if enabled.is_some() {
                    notifier.queue(Message::Watchdog);
                }
            }
            Err(reason) => {
                if !std::mem::replace(&mut is_stalled, true) {
                    error!(reason, "no progress: the watchdog gets no ping, and /livez fails");
                }
            }
        }
    }
}

/// Whether the service manager itself started this process for the unit (systemd.exec(5), `$SYSTEMD_EXEC_PID`). A shell
/// that a unit runs passes the variable on, but with the ID of another process.
pub fn is_started_by_manager() -> bool {
    std::env::var("SYSTEMD_EXEC_PID").is_ok_and(|pid| pid == std::process::id().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::generator::OsRandom;

    #[test]
    #[should_panic(expected = "READY=1 needs a worker that serves")]
    fn readiness_needs_a_worker() {
        let _ = Readiness::new(&Generator::new(OsRandom).unwrap(), &[]);
    }
}
