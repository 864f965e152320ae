//! Each signal as a future, with a word on who sends it.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that the daemon answers to. They are caught from the moment this is made.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Catches the signals.
    ///
    /// # Errors
    /// When a handler can't be installed.
    pub fn catch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// The next one.
    pub async fn next(&mut self) -> SignalAction {
        tokio::select! {
            // systemd's stop, the kubelet, `docker stop`.
            _ = self.terminate.recv() => SignalAction::Stop("SIGTERM"),
            // A person at a terminal.
            _ = self.interrupt.recv() => SignalAction::Stop("SIGINT"),
            // `systemctl reload`, through ExecReload; or an administrator's kill.
            _ = self.hangup.recv() => SignalAction::Reload,
        }
    }

    /// The next signal that asks to stop, by its name.
    pub async fn stop(&mut self) -> &'static str {
        loop {
            if let SignalAction::Stop(signal) = self.next().await {
                return signal;
            }
        }
    }
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalAction {
    /// Drain and end; the name of the signal is for the log.
    Stop(&'static str),
    /// Read the configuration again.
    Reload,
}
