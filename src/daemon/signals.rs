//! The signals that the daemon handles, each with its usual sender.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The action that a signal requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SignalAction {
    /// Drain and stop. The name of the signal is for the log.
    Stop(&'static str),
    /// Reload the configuration.
    Reload,
}

/// The handled signals. They are caught as soon as this exists.
#[derive(Debug)]
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Catches the signals. The calling thread must have entered a runtime.
    ///
    /// # Errors
    /// When a handler can't be installed.
    pub(super) fn catch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the next signal.
    pub(super) async fn next(&mut self) -> SignalAction {
        tokio::select! {
            // systemd's stop, the kubelet, `docker stop`.
            _ = self.terminate.recv() => SignalAction::Stop("SIGTERM"),
            // A person at a terminal.
            _ = self.interrupt.recv() => SignalAction::Stop("SIGINT"),
            // `systemctl reload`, through ExecReload; or an administrator's kill.
            _ = self.hangup.recv() => SignalAction::Reload,
        }
    }

    /// Waits for the next signal that asks to stop, and returns its name.
    pub(super) async fn next_stop(&mut self) -> &'static str {
        loop {
            if let SignalAction::Stop(signal) = self.next().await {
                return signal;
            }
        }
    }
}
