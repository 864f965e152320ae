//! A daemon with a credential socket, and a client that binds its own address as systemd does.

use std::io::Read;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use socket2::{Domain, SockAddr, Socket, Type};

use super::{Daemon, TIMEOUT, TempDirectory};

/// Starts a daemon that inherits a credential socket in its directory.
pub fn start(config: &str, settings: &[(&str, &str)]) -> Daemon {
    let directory = TempDirectory::new();
    directory.write("config.toml", config);
    let listener = UnixListener::bind(directory.file("credential.sock")).unwrap();
    let command = activated(&directory, "credential", listener.into(), settings);
    Daemon::run(directory, command)
}

/// A command of the daemon that passes `socket` to it as descriptor 3 with this name (sd_listen_fds(3)).
pub fn activated(
    directory: &TempDirectory,
    name: &str,
    socket: OwnedFd,
    settings: &[(&str, &str)],
) -> Command {
    let mut command = super::process::shell("exec 3<&0; export LISTEN_PID=$$; exec \"$@\" </dev/null");
    super::clear_environment(&mut command, directory);
    command.arg(super::binary()).arg("--config").arg(directory.file("config.toml"));
    command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    for (name, value) in settings {
        command.env(format!("KEYSERVICE_{name}"), value);
    }
    command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", name).stdin(Stdio::from(socket));
    command
}

/// Connects as systemd does: bound to an abstract name, and without sending anything.
pub fn connect(directory: &TempDirectory, name: Option<&[u8]>) -> UnixStream {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    if let Some(name) = name {
        let mut path = vec![0];
        path.extend_from_slice(name);
        let path: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(&path);
        socket.bind(&SockAddr::unix(path).unwrap()).unwrap();
    }
    socket.connect(&SockAddr::unix(directory.file("credential.sock")).unwrap()).unwrap();
    let stream = UnixStream::from(OwnedFd::from(socket));
    stream.shutdown(Shutdown::Write).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream
}

pub fn fetch_raw(directory: &TempDirectory, name: Option<&[u8]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    connect(directory, name).read_to_end(&mut bytes).unwrap();
    bytes
}

/// Requests `credential` for `unit`. The random part of the client's socket name is different in each request.
pub fn fetch(directory: &TempDirectory, unit: &str, credential: &str) -> Vec<u8> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let random = u64::from(std::process::id()) << 32 | NEXT.fetch_add(1, Ordering::Relaxed);
    fetch_raw(directory, Some(format!("{random:x}/unit/{unit}/{credential}").as_bytes()))
}
