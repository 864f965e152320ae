//! Socket activation: listening sockets that the service manager passes (sd_listen_fds(3)).

use std::env;

use listenfd::ListenFd;
use socket2::SockRef;

use crate::server::listener::{ListenError, Listener};

/// The first descriptor that a service manager passes (sd_listen_fds(3)).
const FIRST_FD: usize = 3;

/// The sockets that the process inherited, by name.
#[derive(Debug, Default)]
pub struct ActivatedSockets {
    /// Named `http`: for keys and health.
    pub http: Vec<Listener>,
    /// Named `metrics`: for metrics and health.
    pub metrics: Vec<Listener>,
    /// Named `credential`: Unix sockets where systemd fetches the credentials of units.
    pub credential: Vec<Listener>,
}

impl ActivatedSockets {
    /// Takes the sockets of sd_listen_fds(3) named `http`, `metrics` and `credential`, any number of each in any order.
    /// Of sockets without names, the first is `http` and the second `metrics`.
    ///
    /// To be called before the process has threads, because it changes the environment.
    ///
    /// # Errors
    /// The number and name of a descriptor that is not a listening stream socket, or has another name.
    pub fn take() -> Result<Self, ListenError> {
        let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':');
        let mut descriptors = ListenFd::from_env();
        let mut sockets = Self::default();
        for index in 0..descriptors.len() {
            let name = names.next().unwrap_or_default();
            let refuse = |reason| ListenError::Descriptor {
                descriptor: FIRST_FD + index,
                name: name.to_owned(),
                reason,
            };
            let listeners = match name {
                "http" => &mut sockets.http,
                "metrics" => &mut sockets.metrics,
                "credential" => &mut sockets.credential,
                // systemd names a stored descriptor `unknown` if it has no name.
                "" | "unknown" if sockets.http.is_empty() => &mut sockets.http,
                "" | "unknown" if sockets.metrics.is_empty() => &mut sockets.metrics,
                _ => {
                    return Err(refuse(
                        "expected the name http, metrics or credential (FileDescriptorName= of its socket unit)",
                    ));
                }
            };
            let listener = take_listener(&mut descriptors, index)
                .ok_or_else(|| refuse("expected a listening TCP or Unix stream socket"))?;
            if name == "credential" && matches!(listener, Listener::Tcp(_)) {
                return Err(refuse("expected a listening Unix stream socket, where peers have names"));
            }
            listeners.push(listener.with_options().map_err(|_| refuse("its options can't be set"))?);
        }
        Ok(sockets)
    }
}

/// The listener with this index; `None` if the descriptor is not a listening stream socket.
fn take_listener(descriptors: &mut ListenFd, index: usize) -> Option<Listener> {
    let listener = match descriptors.take_tcp_listener(index) {
        Ok(listener) => Listener::Tcp(listener?),
        Err(_) => Listener::Unix(descriptors.take_unix_listener(index).ok()??),
    };
    let listens = match &listener {
        Listener::Tcp(listener) => SockRef::from(listener).is_listener(),
        Listener::Unix(listener) => SockRef::from(listener).is_listener(),
    };
    listens.ok()?.then_some(listener)
}
