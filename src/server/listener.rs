//! Listening sockets, TCP or Unix: bind(2) and accept(2).

use std::fmt;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::io::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::access::peer::Peer;
use crate::server::address::{Host, SocketMode};
use crate::server::stream::{NOTSENT_LOWAT, Stream};

/// How many connections may wait to be accepted. The kernel limits this to net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// SO_RCVBUF (socket(7)), which the kernel doubles. The largest request headers fit, and unread pipelined requests take
/// no more. Without the option, the kernel would hold up to 6 MB of them (tcp_rmem).
const RECEIVE_BUFFER: usize = 8 * 1024;

/// A listening socket outside of a runtime. Dropping the last handle on a socket that was bound here closes it. An
/// inherited socket stays open in the service manager.
#[derive(Debug)]
pub enum Listener {
    /// TCP over IPv4 or IPv6.
    Tcp(TcpListener),
    /// A Unix stream socket.
    Unix(UnixListener),
}

impl Listener {
    /// Binds `host` and listens: on `port` (0: any free port) if it is an IP address, with `mode` if it is a path.
    ///
    /// # Errors
    /// If the kernel refuses the address or the port.
    pub fn bind(host: &Host, port: u16, mode: SocketMode) -> Result<Self, BindError> {
        let (address, bound) = match host {
            Host::Any => bind_any(port, bind_tcp),
            Host::Ip(ip) => {
                let address = SocketAddr::new(*ip, port);
                (address.to_string(), bind_tcp(address))
            }
            Host::Unix(path) => (host.to_string(), bind_unix(path, mode)),
        };
        bound.map_err(|source| BindError { host: host.clone(), address, source })
    }

    /// Another handle on the same socket.
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(listener) => listener.try_clone().map(Self::Tcp),
            Self::Unix(listener) => listener.try_clone().map(Self::Unix),
        }
    }

    /// The port of a TCP socket.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok().map(|address| address.port()),
            Self::Unix(_) => None,
        }
    }

    /// Registers the socket with the runtime of the calling thread.
    ///
    /// # Errors
    /// If the runtime can't register it.
    pub(crate) fn into_acceptor(self) -> io::Result<Acceptor> {
        match self {
            Self::Tcp(listener) => tokio::net::TcpListener::from_std(listener).map(Acceptor::Tcp),
            Self::Unix(listener) => tokio::net::UnixListener::from_std(listener).map(Acceptor::Unix),
        }
    }

    /// Sets the options that every listener needs, inherited or not.
    pub(crate) fn with_options(self) -> io::Result<Self> {
        match &self {
            // Accepted connections inherit the options, which saves system calls. TCP_NODELAY: no response waits for
            // the acknowledgement of the previous one.
            Self::Tcp(listener) => {
                SockRef::from(listener).set_tcp_nodelay(true)?;
                SockRef::from(listener).set_tcp_notsent_lowat(NOTSENT_LOWAT)?;
                SockRef::from(listener).set_recv_buffer_size(RECEIVE_BUFFER)?;
                listener.set_nonblocking(true)?;
            }
            Self::Unix(listener) => listener.set_nonblocking(true)?,
        }
        Ok(self)
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) => address.fmt(f),
                Err(_) => f.write_str("a TCP socket"),
            },
            Self::Unix(listener) => match listener.local_addr().ok().as_ref().and_then(|a| a.as_pathname()) {
                Some(path) => write!(f, "unix:{}", path.display()),
                None => f.write_str("a Unix socket"),
            },
        }
    }
}

/// A listening socket that is registered with a runtime.
#[derive(Debug)]
pub(crate) enum Acceptor {
    /// TCP.
    Tcp(tokio::net::TcpListener),
    /// Unix.
    Unix(tokio::net::UnixListener),
}

impl Acceptor {
    /// Accepts the next connection. Dropping the future loses no connection.
    ///
    /// # Errors
    /// As accept(2).
    pub(crate) async fn accept(&self) -> io::Result<(Stream, Peer)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                Ok((Stream::Tcp(stream), Peer::tcp(address)))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let peer = Peer::unix(&stream)?;
                Ok((Stream::Unix(stream), peer))
            }
        }
    }
}

/// Why an address can't be bound.
#[derive(Debug)]
pub struct BindError {
    host: Host,
    address: String,
    source: io::Error,
}

impl BindError {
    /// Adds the setting to change. `host` and `port` are the names of the settings that the address came from.
    pub fn with_settings(self, host: &'static str, port: &'static str) -> ListenError {
        // The port is at fault if another process uses it, or if it is below 1024 and not allowed.
        let is_port_error =
            matches!(self.source.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied);
        let setting = if is_port_error && !matches!(self.host, Host::Unix(_)) { port } else { host };
        ListenError::Bind { address: self.address, setting, source: self.source }
    }
}

/// Why a listener can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address can't be bound.
    #[error("can't listen on {address} ({setting}): {source}")]
    Bind {
        /// The address in its usual notation.
        address: String,
        /// The setting to change.
        setting: &'static str,
        /// The error of the kernel.
        source: io::Error,
    },
    /// An inherited descriptor can't be used.
    #[error("inherited descriptor {descriptor} (name \"{name}\") is refused: {reason}")]
    Descriptor {
        /// The number of the descriptor.
        descriptor: usize,
        /// The name in `LISTEN_FDNAMES`; empty if there is none.
        name: String,
        /// What was expected.
        reason: &'static str,
    },
}

impl ListenError {
    /// Whether the process may bind no such sockets at all: in the sandbox of the shipped unit (EAFNOSUPPORT, or EROFS
    /// for a path), or with a system call filter (EPERM).
    pub fn is_forbidden(&self) -> bool {
        self.is_any_of(&[Errno::AFNOSUPPORT, Errno::ROFS, Errno::PERM])
    }

    /// Whether [`ListenError::is_forbidden`], or the process lacks permission for this port or path (EACCES).
    pub fn is_denied(&self) -> bool {
        self.is_forbidden() || self.is_any_of(&[Errno::ACCESS])
    }

    fn is_any_of(&self, errors: &[Errno]) -> bool {
        let Self::Bind { source, .. } = self else { return false };
        errors.iter().any(|errno| source.raw_os_error() == Some(errno.raw_os_error()))
    }
}

/// Binds all addresses with one socket, by `bind`, and returns the address that was tried last. Without IPv6, the
/// socket is IPv4 only: socket(2) fails with EAFNOSUPPORT if the kernel (`ipv6.disable=1`) or a sandbox has no IPv6,
/// and bind(2) with EADDRNOTAVAIL if a sysctl (`disable_ipv6`) has removed its addresses.
fn bind_any<T>(port: u16, bind: impl Fn(SocketAddr) -> io::Result<T>) -> (String, io::Result<T>) {
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let lacks_ipv6 = |error: &io::Error| {
        let lacks = [Errno::AFNOSUPPORT, Errno::ADDRNOTAVAIL].map(|errno| Some(errno.raw_os_error()));
        lacks.contains(&error.raw_os_error())
    };
    match bind(address) {
        Err(error) if lacks_ipv6(&error) => {
            let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
            (address.to_string(), bind(address))
        }
        bound => (address.to_string(), bound),
    }
}

fn bind_tcp(address: SocketAddr) -> io::Result<Listener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        // `::` accepts IPv4 as well, whatever net.ipv6.bindv6only is.
        socket.set_only_v6(false)?;
    }
    // A restart must not wait until the connections of the previous process leave TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Listener::Tcp(socket.into()).with_options()
}

fn bind_unix(path: &Path, mode: SocketMode) -> io::Result<Listener> {
    // A socket file outlives its process. It is removed only if no process listens on it. A file that is not a socket
    // stays, and bind(2) fails.
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
        fs::remove_file(path)?;
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&socket2::SockAddr::unix(path)?)?;
    // bind(2) applied the umask to the mode. Until listen(2), every connection is refused, whatever the mode.
    fs::set_permissions(path, fs::Permissions::from_mode(mode.bits()))?;
    socket.listen(BACKLOG)?;
    Listener::Unix(socket.into()).with_options()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bind_error_names_the_setting_to_change() {
        let path = Host::Unix("/run/key.sock".into());
        for (host, errno, setting) in [
            (&Host::Any, Errno::ADDRINUSE, "srv-port"),
            (&Host::Any, Errno::ACCESS, "srv-port"), // a port below 1024
            (&Host::Any, Errno::AFNOSUPPORT, "host"),
            (&Host::Ip(Ipv4Addr::LOCALHOST.into()), Errno::ADDRNOTAVAIL, "host"),
            (&path, Errno::ADDRINUSE, "host"),
            (&path, Errno::ACCESS, "host"),
        ] {
            let error = BindError { host: host.clone(), address: "[::]:80".into(), source: errno.into() };
            let message = error.with_settings("host", "srv-port").to_string();
            assert!(message.starts_with(&format!("can't listen on [::]:80 ({setting}): ")), "{message}");
        }
    }

    #[test]
    fn an_address_in_use_is_neither_forbidden_nor_denied() {
        for (errno, expected) in [
            (Errno::AFNOSUPPORT, [true, true]),
            (Errno::PERM, [true, true]),
            (Errno::ROFS, [true, true]),
            (Errno::ACCESS, [false, true]), // a port below 1024, or another user's directory
            (Errno::ADDRINUSE, [false, false]),
            (Errno::ADDRNOTAVAIL, [false, false]),
            (Errno::MFILE, [false, false]),
        ] {
            let error = BindError { host: Host::Any, address: "[::]:80".into(), source: errno.into() };
            let error = error.with_settings("host", "srv-port");
            assert_eq!([error.is_forbidden(), error.is_denied()], expected, "{errno:?}");
        }
    }

    #[test]
    fn any_address_is_ipv4_only_without_ipv6() {
        let bind = |errno: Option<Errno>, both_fail: bool| {
            bind_any(1123, |address| match errno {
                Some(errno) if address.is_ipv6() || both_fail => Err(io::Error::from(errno)),
                _ => Ok(()),
            })
        };
        let outcome = |(address, bound): (String, io::Result<()>)| (address, bound.is_ok());
        assert_eq!(outcome(bind(None, false)), ("[::]:1123".into(), true));
        for errno in [Errno::AFNOSUPPORT, Errno::ADDRNOTAVAIL] {
            assert_eq!(outcome(bind(Some(errno), false)), ("0.0.0.0:1123".into(), true), "{errno:?}");
            assert_eq!(outcome(bind(Some(errno), true)), ("0.0.0.0:1123".into(), false), "{errno:?}");
        }
        // Any other error would occur with IPv4, too, or hide that IPv6 clients are not served.
        for errno in [Errno::ADDRINUSE, Errno::ACCESS, Errno::MFILE] {
            assert_eq!(outcome(bind(Some(errno), false)), ("[::]:1123".into(), false), "{errno:?}");
        }
    }

    #[test]
    fn bind_replaces_only_a_stale_socket_file() {
        let directory = tempfile::tempdir().unwrap();
        let stale = Host::Unix(directory.path().join("stale"));
        drop(Listener::bind(&stale, 0, SocketMode::default()).unwrap());
        let held = Listener::bind(&stale, 0, SocketMode::default()).expect("a stale socket is replaced");
        assert!(Listener::bind(&stale, 0, SocketMode::default()).is_err(), "a socket in use is not");
        let file = directory.path().join("file");
        fs::write(&file, "mine").unwrap();
        assert!(Listener::bind(&Host::Unix(file.clone()), 0, SocketMode::default()).is_err());
        assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
        drop(held);
    }
}
