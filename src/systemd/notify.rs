//! What the service manager is told: readiness, reload, stopping, and that the service makes progress.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::MissedTickBehavior;
use tracing::{error, warn};

use crate::telemetry::log::truncate;

/// How many messages may wait to be sent.
const QUEUE: usize = 64;

/// The most bytes of a status: systemd ignores a message of more than 4,096 (PIPE_BUF).
const STATUS_MAX: usize = 2048;

/// How long a stop waits for the last message to be taken.
const FLUSH: Duration = Duration::from_secs(1);

/// The watchdog's limit where no service manager has set one: WatchdogSec= of the shipped unit.
const WATCHDOG_DEFAULT: Duration = Duration::from_secs(10);

/// How many times the watchdog looks again for signs of life, in a tenth of its limit, before it reports that there are none.
const STEPS: u32 = 10;

/// Tells the service manager, in order and from a thread of its own: a send to a full notify socket blocks.
#[derive(Debug)]
pub struct Notifier {
    queue: Option<SyncSender<Message>>,
    sent: Receiver<()>,
}

#[derive(Debug)]
enum Message {
    Ready(String),
    Reloading,
    Status(String),
    Stopping(String),
    Alive,
}

impl Notifier {
    /// Starts the thread. Without `NOTIFY_SOCKET` messages go nowhere, as sd_notify(3) has it.
    ///
    /// # Errors
    /// When there may be no more threads.
    pub fn start() -> io::Result<Self> {
        let (queue, messages) = mpsc::sync_channel(QUEUE);
        let (done, sent) = mpsc::sync_channel(1);
        thread::Builder::new().name("notify".into()).spawn(move || {
            send_all(&messages);
            let _ = done.send(()); // nobody waits where the process has ended first
        })?;
        Ok(Self { queue: Some(queue), sent })
    }

    /// The service serves; `status` says where.
    pub fn ready(&self, status: &str) {
        self.queue(Message::Ready(one_line(status)));
    }

    /// The configuration is being read again; [`Notifier::ready`] ends that.
    pub fn reloading(&self) {
        self.queue(Message::Reloading);
    }

    /// What `systemctl status` shows from now on, outside of a reload that was asked for.
    pub fn status(&self, status: &str) {
        self.queue(Message::Status(one_line(status)));
    }

    /// The service is on its way to the end.
    pub fn stopping(&self, status: &str) {
        self.queue(Message::Stopping(status.to_owned()));
    }

    fn queue(&self, message: Message) {
        if let Some(queue) = &self.queue {
            let _ = queue.try_send(message); // full only where the manager has not read for minutes
        }
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        drop(self.queue.take());
        let _ = self.sent.recv_timeout(FLUSH); // a manager that does not read must not hold the exit
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
            Message::Alive => notify(&[NotifyState::Watchdog]),
        };
        if let Err(error) = sent {
            warn!(%error, "the service manager can't be told");
        }
    }
}

/// Sends one message to `$NOTIFY_SOCKET`, which may name an abstract socket (sd_notify(3)): sd-notify 0.5 takes its `@` for
/// the first character of a path.
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

/// Puts why there is no start where `systemctl status` shows it, whether or not the log has got there yet. It is sent
/// from here, as the process is about to end; a manager that does not read meets `TimeoutStartSec=`.
pub fn refused(reason: &str) {
    let _ = notify(&[NotifyState::Status(&one_line(reason))]); // it is on stderr too
}

/// A line break would end the message's field.
fn one_line(status: &str) -> String {
    let mut line = status.lines().collect::<Vec<_>>().join("; ");
    truncate(&mut line, STATUS_MAX);
    line
}

/// Pings the watchdog for as long as `progress` says that everything moved since the last time. Never returns.
/// Without a watchdog it asks `progress` as if there were one: /livez has the answer for other supervisors.
///
/// A tick may be the first thing that happens after the whole process was stopped (SIGSTOP, a debugger, a suspended
/// machine). So what is not `settled` then gets a little time, of which such a stop, however long, takes one step.
pub async fn watchdog(
    notifier: &Notifier,
    settled: impl Fn() -> bool,
    mut progress: impl FnMut() -> Result<(), &'static str>,
) {
    let enabled = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
    let limit = enabled.unwrap_or(WATCHDOG_DEFAULT);
    // sd_watchdog_enabled(3) advises half of the limit; a third leaves room for one late tick.
    let mut tick = tokio::time::interval(limit / 3);
    // Ticks that were missed would judge again before there was time for an answer.
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut silent = false;
    loop {
        tick.tick().await;
        for _ in 0..STEPS {
            if settled() {
                break;
            }
            tokio::time::sleep(limit / 10 / STEPS).await;
        }
        match progress() {
            Ok(()) => {
                silent = false;
                if enabled.is_some() {
                    notifier.queue(Message::Alive);
                }
            }
            Err(reason) => {
                if !std::mem::replace(&mut silent, true) {
                    error!(reason, "no progress: the watchdog gets no ping, and /livez fails");
                }
            }
        }
    }
}

/// Whether the service manager itself started this process, as the unit says it (systemd.exec(5), `$SYSTEMD_EXEC_PID`);
/// a shell below a unit passes the variable on, with another process id in it.
pub fn is_invoker() -> bool {
    std::env::var("SYSTEMD_EXEC_PID").is_ok_and(|pid| pid == std::process::id().to_string())
}
