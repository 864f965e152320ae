//! What the service manager is told: readiness, reload, stopping, and that the service makes progress.

use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::{error, warn};

/// How many messages may wait to be sent.
const QUEUE: usize = 64;

/// How long a stop waits for the last message to be taken.
const FLUSH: Duration = Duration::from_secs(1);

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
    pub fn start() -> Self {
        let (queue, messages) = mpsc::sync_channel(QUEUE);
        let (done, sent) = mpsc::sync_channel(1);
        thread::Builder::new()
            .name("notify".into())
            .spawn(move || {
                send_all(&messages);
                let _ = done.send(()); // nobody waits where the process has ended first
            })
            .expect("the process has just started and may have threads");
        Self { queue: Some(queue), sent }
    }

    /// The service serves; `status` says where.
    pub fn ready(&self, status: &str) {
        self.queue(Message::Ready(status.to_owned()));
    }

    /// The configuration is being read again; [`Notifier::ready`] ends that.
    pub fn reloading(&self) {
        self.queue(Message::Reloading);
    }

    /// What `systemctl status` shows from now on, outside of a reload that was asked for.
    pub fn status(&self, status: &str) {
        self.queue(Message::Status(status.to_owned()));
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
            Message::Ready(status) => sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(status)]),
            // One datagram: systemd pairs the two (sd_notify(3), RELOADING=1).
            Message::Reloading => NotifyState::monotonic_usec_now()
                .and_then(|now| sd_notify::notify(&[NotifyState::Reloading, now])),
            Message::Status(status) => sd_notify::notify(&[NotifyState::Status(status)]),
            Message::Stopping(status) => {
                sd_notify::notify(&[NotifyState::Stopping, NotifyState::Status(status)])
            }
            Message::Alive => sd_notify::notify(&[NotifyState::Watchdog]),
        };
        if let Err(error) = sent {
            warn!(%error, "the service manager can't be told");
        }
    }
}

/// Puts why there is no start where `systemctl status` shows it, whether or not the log has got there yet. It is sent
/// from here, as the process is about to end; a manager that does not read meets `TimeoutStartSec=`.
pub fn refused(reason: &str) {
    let line = reason.lines().collect::<Vec<_>>().join("; "); // a line break would end the message's field
    let _ = sd_notify::notify(&[NotifyState::Status(&line)]); // it is on stderr too
}

/// Pings the watchdog for as long as `progress` says that everything moved since the last time. Never returns.
/// Without a watchdog it does nothing.
pub async fn watchdog(notifier: &Notifier, mut progress: impl FnMut() -> Result<(), &'static str>) {
    let Some(limit) = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero()) else {
        return std::future::pending().await;
    };
    // sd_watchdog_enabled(3) advises half of the limit; a third leaves room for one late tick.
    let mut tick = tokio::time::interval(limit / 3);
    let mut silent = false;
    loop {
        tick.tick().await;
        match progress() {
            Ok(()) => {
                silent = false;
                notifier.queue(Message::Alive);
            }
            Err(reason) => {
                if !std::mem::replace(&mut silent, true) {
                    error!(reason, "the watchdog is not told that the service is alive");
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
