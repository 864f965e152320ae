//! Socket activation: listening sockets that the service manager passes (sd_listen_fds(3)).

use std::env;

use listenfd::ListenFd;
use socket2::SockRef;

use crate::server::listener::{ListenError, Listener};

/// The first descriptor that a service manager passes (sd_listen_fds(3)).
const FIRST_FD: usize = 3;

/// Sockets that came with the process, by the role that their name gives them.
#[derive(Debug, Default)]
pub struct ActivatedSockets {
    /// Named `http`: keys and health.
    pub http: Vec<Listener>,
    /// Named `metrics`.
    pub metrics: Vec<Listener>,
    /// Named `credential`: where systemd fetches credentials of units; Unix sockets.
    pub credential: Vec<Listener>,
}

impl ActivatedSockets {
    /// Takes the sockets of sd_listen_fds(3): those named `http`, `metrics` and `credential` in any order, and as many
    /// of each as there are; without names, the first is `http` and the second `metrics`.
    ///
    /// Call it before the process has threads: it changes the environment.
    ///
    /// # Errors
    /// Anything that is not a listening stream socket, or has another name, is refused by descriptor and name.
    pub fn take() -> Result<Self, ListenError> {
        let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':');
        let mut descriptors = ListenFd::from_env();
        let mut inherited = Self::default();
        for index in 0..descriptors.len() {
            let name = names.next().unwrap_or_default();
            let refuse = |reason| ListenError::ActivatedSockets {
                descriptor: FIRST_FD + index,
                name: name.to_owned(),
                reason,
            };
            let role = match name {
                "http" => &mut inherited.http,
                "metrics" => &mut inherited.metrics,
                "credential" => &mut inherited.credential,
                // systemd says `unknown` for a descriptor that was stored without a name.
                "" | "unknown" if inherited.http.is_empty() => &mut inherited.http,
                "" | "unknown" if inherited.metrics.is_empty() => &mut inherited.metrics,
                _ => {
                    return Err(refuse(
                        "its name should be http, metrics or credential (FileDescriptorName= of its socket unit)",
                    ));
                }
            };
            let listener = take_stream(&mut descriptors, index)
                .ok_or_else(|| refuse("it should be a listening TCP or Unix stream socket"))?;
            if name == "credential" && matches!(listener, Listener::Tcp(_)) {
                return Err(refuse(
                    "it should be a listening Unix stream socket: only there does a peer have a name",
                ));
            }
            role.push(listener.prepare().map_err(|_| refuse("it can't be made non-blocking"))?);
        }
        Ok(inherited)
    }
}

fn take_stream(descriptors: &mut ListenFd, index: usize) -> Option<Listener> {
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
