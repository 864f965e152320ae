//! A daemon with a credential socket, and a client that binds its end as systemd does.

use std::io::Read;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use socket2::{Domain, SockAddr, Socket, Type};

use super::{Daemon, Folder, PATIENCE};

/// A daemon that inherited a credential socket, in its folder.
pub fn start(config: &str, settings: &[(&str, &str)]) -> Daemon {
    let folder = Folder::new();
    folder.write("config.toml", config);
    let listener = UnixListener::bind(folder.file("credential.sock")).unwrap();
    let command = activated(&folder, "credential", listener.into(), settings);
    Daemon::run(folder, command)
}

/// The daemon with descriptor 3 handed over under a name (sd_listen_fds(3)).
pub fn activated(folder: &Folder, name: &str, socket: OwnedFd, settings: &[(&str, &str)]) -> Command {
    let mut command = super::process::shell("exec 3<&0; export LISTEN_PID=$$; exec \"$@\" </dev/null");
    super::scrub(&mut command, folder);
    command.arg(super::binary()).arg("--config").arg(folder.file("config.toml"));
    command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    for (name, value) in settings {
        command.env(format!("KEYSERVICE_{name}"), value);
    }
    command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", name).stdin(Stdio::from(socket));
    command
}

/// Connects as systemd does: bound to an abstract name, and with nothing to say.
pub fn connect(folder: &Folder, name: Option<&[u8]>) -> UnixStream {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    if let Some(name) = name {
        let mut path = vec![0];
        path.extend_from_slice(name);
        let path: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(&path);
        socket.bind(&SockAddr::unix(path).unwrap()).unwrap();
    }
    socket.connect(&SockAddr::unix(folder.file("credential.sock")).unwrap()).unwrap();
    let stream = UnixStream::from(OwnedFd::from(socket));
    stream.shutdown(Shutdown::Write).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

pub fn fetch_raw(folder: &Folder, name: Option<&[u8]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    connect(folder, name).read_to_end(&mut bytes).unwrap();
    bytes
}

/// What `unit` gets for `credential`; the random part of the name is not used twice.
pub fn fetch(folder: &Folder, unit: &str, credential: &str) -> Vec<u8> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let random = u64::from(std::process::id()) << 32 | NEXT.fetch_add(1, Ordering::Relaxed);
    fetch_raw(folder, Some(format!("{random:x}/unit/{unit}/{credential}").as_bytes()))
}
