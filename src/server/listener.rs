//! An address to listen on: inherited from the service manager by name, or bound here; TCP or Unix.

use std::env;
use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::str::FromStr;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use listenfd::ListenFd;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, send, sendmsg, shutdown};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use zeroize::Zeroizing;

use crate::access::peer::Peer;
use crate::server::timeouts::{Sending, Transport};

/// How many connections the kernel holds while they wait to be accepted; it caps this at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// TCP_NOTSENT_LOWAT (tcp(7)) of an ordinary connection: the kernel takes another write only while it holds fewer unsent
/// bytes than this. A response of 16 KiB over a new connection still goes without a wait. The kernel would take up to 4 MB
/// (tcp_wmem) otherwise, from each of 10,000 connections that read nothing.
const NOTSENT_LOWAT: u32 = 4096;

/// The same for a connection with a streamed response, of which there are as many as permits: it must not run dry.
const NOTSENT_LOWAT_STREAMING: u32 = 128 * 1024;

/// The same once its client is slow: above what the last large write, of a chunk, left there.
const NOTSENT_LOWAT_SLOW: u32 = NOTSENT_LOWAT_STREAMING + 64 * 1024;

/// The most bytes of one write to a Unix socket, whose kernel gives memory back only for whole writes: a slow client has to
/// have read one before the next is taken.
const UNIX_WRITE_MAX: usize = 8 * 1024;

/// SO_RCVBUF (socket(7)), which the kernel doubles: the largest request header fits, and pipelined requests that nobody
/// reads take no more. The kernel would let them grow to 6 MB (tcp_rmem).
const RECEIVE_BUFFER: usize = 8 * 1024;

/// Bytes that are read at once from a client that goes on sending after its last response.
const DISCARDED_AT_ONCE: usize = 1024;

/// The first descriptor that a service manager passes (sd_listen_fds(3)).
const FIRST_FD: usize = 3;

/// Where to listen: `*`, an IP address, or `unix:` and a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// Every address of this host, IPv4 and IPv6: one dual-stack socket, or one of IPv4 where the host has no IPv6.
    Any,
    /// An IPv4 or IPv6 address; `::` takes both kinds, as Linux has it.
    Ip(IpAddr),
    /// A stream socket in the file system.
    Unix(PathBuf),
}

impl FromStr for Host {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text == "*" {
            return Ok(Self::Any);
        }
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.starts_with('/') { Ok(Self::Unix(path.into())) } else { Err(()) };
        }
        text.parse().map(Self::Ip).map_err(|_| ())
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Ip(ip) => ip.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Who may connect to a Unix socket, as bits of its file (unix(7): connecting takes the right to write).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode(u32);

impl Default for Mode {
    /// The user and the group of the service.
    fn default() -> Self {
        Self(0o660)
    }
}

impl FromStr for Mode {
    type Err = ();

    /// Octal digits.
    fn from_str(text: &str) -> Result<Self, ()> {
        u32::from_str_radix(text, 8)
            .ok()
            .filter(|mode| *mode <= 0o777 && !text.starts_with('+'))
            .map(Self)
            .ok_or(())
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

/// A listening socket that no runtime has yet. Dropping the last copy of one that was bound here closes it; one that
/// was inherited stays open in the service manager.
#[derive(Debug)]
pub enum Listener {
    /// TCP over IPv4 or IPv6.
    Tcp(TcpListener),
    /// A Unix stream socket.
    Unix(UnixListener),
}

impl Listener {
    /// Binds `host`, with `port` where it is no path (0: any free port) and `mode` where it is one.
    ///
    /// # Errors
    /// When the kernel refuses the address or the port.
    pub fn bind(host: &Host, port: u16, mode: Mode) -> Result<Self, BindError> {
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
    /// When descriptors have run out.
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(listener) => listener.try_clone().map(Self::Tcp),
            Self::Unix(listener) => listener.try_clone().map(Self::Unix),
        }
    }

    /// Its port, of TCP.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok().map(|address| address.port()),
            Self::Unix(_) => None,
        }
    }

    /// Hands the socket to the runtime of the calling thread.
    ///
    /// # Errors
    /// When the runtime can't register it.
    pub fn into_acceptor(self) -> io::Result<Acceptor> {
        match self {
            Self::Tcp(listener) => tokio::net::TcpListener::from_std(listener).map(Acceptor::Tcp),
            Self::Unix(listener) => tokio::net::UnixListener::from_std(listener).map(Acceptor::Unix),
        }
    }

    /// What every listener needs, inherited or not.
    fn prepare(self) -> io::Result<Self> {
        match &self {
            // Accepted connections inherit them, which saves them the calls. TCP_NODELAY: an answer is never held back for
            // an acknowledgement of the one before.
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

/// Why an address can't be bound.
#[derive(Debug)]
pub struct BindError {
    host: Host,
    address: String,
    source: io::Error,
}

impl BindError {
    /// With the setting to change: `host` and `port` are the names of those that the address came from.
    pub fn of_settings(self, host: &'static str, port: &'static str) -> ListenError {
        // The port is to blame where another process has it, or where it is below 1024 and not for this process.
        let is_of_port =
            matches!(self.source.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied);
        let setting = if is_of_port && !matches!(self.host, Host::Unix(_)) { port } else { host };
        ListenError::Bind { address: self.address, setting, source: self.source }
    }
}

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address can't be bound.
    #[error("can't listen on {address} ({setting}): {source}")]
    Bind {
        /// The address, as a person writes it.
        address: String,
        /// The setting to change.
        setting: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// An inherited descriptor can't be used.
    #[error("inherited descriptor {descriptor} (name \"{name}\") is refused: {reason}")]
    ActivatedSockets {
        /// Its number.
        descriptor: usize,
        /// Its name in `LISTEN_FDNAMES`; empty where it has none.
        name: String,
        /// What should be otherwise.
        reason: &'static str,
    },
}

impl ListenError {
    /// Whether this process may make no such sockets at all: in the sandbox of the shipped unit (EAFNOSUPPORT, for a path
    /// EROFS), or where system calls are filtered (EPERM).
    pub fn is_forbidden(&self) -> bool {
        self.is_any_of(&[Errno::AFNOSUPPORT, Errno::ROFS, Errno::PERM])
    }

    /// The same, or that it may not have this port or this path.
    pub fn is_denied(&self) -> bool {
        self.is_forbidden() || self.is_any_of(&[Errno::ACCESS])
    }

    fn is_any_of(&self, errors: &[Errno]) -> bool {
        let Self::Bind { source, .. } = self else { return false };
        errors.iter().any(|errno| source.raw_os_error() == Some(errno.raw_os_error()))
    }
}

/// Every address by one socket, bound by `bind`; the address that was tried last goes with the result. IPv4 alone where
/// there is no IPv6: socket(2) fails with EAFNOSUPPORT where the kernel (`ipv6.disable=1`) or a sandbox has none, and
/// bind(2) with EADDRNOTAVAIL where a sysctl (`disable_ipv6`) has taken its addresses away.
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
        // `::` takes IPv4 too, whatever net.ipv6.bindv6only is.
        socket.set_only_v6(false)?;
    }
    // A restart must not wait for connections of the process before to leave TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Listener::Tcp(socket.into()).prepare()
}

fn bind_unix(path: &Path, mode: Mode) -> io::Result<Listener> {
    // A socket file outlives the process that made it. It is removed only where nobody answers on it any more, and
    // anything that is not a socket stays, for bind to trip over.
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
        fs::remove_file(path)?;
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&socket2::SockAddr::unix(path)?)?;
    // bind(2) gave it the mode that the umask left. Until listen(2), whoever connects is refused, whatever the mode.
    fs::set_permissions(path, fs::Permissions::from_mode(mode.0))?;
    socket.listen(BACKLOG)?;
    Listener::Unix(socket.into()).prepare()
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

/// A listening socket in a runtime.
#[derive(Debug)]
pub enum Acceptor {
    /// TCP.
    Tcp(tokio::net::TcpListener),
    /// Unix.
    Unix(tokio::net::UnixListener),
}

impl Acceptor {
    /// The next connection. Dropping the future loses none.
    ///
    /// # Errors
    /// As accept(2).
    pub async fn accept(&self) -> io::Result<(Stream, Peer)> {
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

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(tokio::net::TcpStream),
    /// Unix.
    Unix(tokio::net::UnixStream),
}

impl Stream {
    /// The abstract name that the other end is bound to (unix(7)), without the NUL that begins it.
    pub fn peer_name(&self) -> Option<Vec<u8>> {
        match self {
            Self::Tcp(_) => None,
            Self::Unix(stream) => stream.peer_addr().ok()?.as_abstract_name().map(<[u8]>::to_vec),
        }
    }

    /// The first byte that is to be read, which stays to be read. `None` at the end, and for a Unix socket.
    ///
    /// # Errors
    /// As recv(2).
    pub async fn peek(&self) -> io::Result<Option<u8>> {
        let mut first = [0];
        match self {
            Self::Tcp(stream) => Ok((stream.peek(&mut first).await? > 0).then_some(first[0])),
            Self::Unix(_) => Ok(None),
        }
    }
}

/// Sends by `send`, once the kernel takes bytes again.
fn poll_send(
    stream: &tokio::net::TcpStream,
    cx: &mut Context<'_>,
    send: impl Fn() -> rustix::io::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        ready!(stream.poll_write_ready(cx))?;
        match stream.try_io(Interest::WRITABLE, || Ok(send()?)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return Poll::Ready(result),
        }
    }
}

/// send(2): with MSG_EOR each write begins a segment of its own. Without it the kernel adds a write to its last unsent
/// segment, up to 64 KiB of them, and does not look at TCP_NOTSENT_LOWAT.
const SEND: SendFlags = SendFlags::EOR.union(SendFlags::NOSIGNAL);

macro_rules! delegate {
    ($self:ident, $method:ident $(, $argument:ident)*) => {
        match $self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).$method($($argument),*),
            Stream::Unix(stream) => Pin::new(stream).$method($($argument),*),
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        delegate!(self, poll_read, cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => poll_send(stream, cx, || send(&*stream, buf, SEND)),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, &buf[..buf.len().min(UNIX_WRITE_MAX)]),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => {
                poll_send(stream, cx, || sendmsg(&*stream, bufs, &mut SendAncillaryBuffer::default(), SEND))
            }
            unix @ Self::Unix(_) => {
                let first = bufs.iter().find(|buf| !buf.is_empty()).map_or(&[][..], |buf| buf);
                Pin::new(unix).poll_write(cx, first)
            }
        }
    }

    /// Vectored writes are what keeps key bytes out of hyper's own buffers.
    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, poll_flush, cx)
    }

    /// Sends what waits for the end, and the end: close(2) would forget it if the client had sent more than was read.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, poll_shutdown, cx)
    }
}

impl Transport for Stream {
    fn poll_write_last(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        // send(2): with MSG_MORE, one segment has the data and the end, which shutdown(2) sends.
        match self.get_mut() {
            Self::Tcp(stream) => {
                poll_send(stream, cx, || send(&*stream, buf, SendFlags::MORE | SendFlags::NOSIGNAL))
            }
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn forget_unsent(&self) {
        // tcp(7), socket(7): closing with SO_LINGER of 0 resets. A Unix socket forgets anyway.
        if let Self::Tcp(stream) = self {
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO)); // without it, it is closed in order
        }
    }

    fn poll_client_closed(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let Self::Tcp(stream) = self else { return Poll::Ready(true) };
        let mut input = Zeroizing::new([0; DISCARDED_AT_ONCE]); // it may have a token
        loop {
            let mut unread = ReadBuf::new(&mut input[..]);
            match ready!(Pin::new(&mut *stream).poll_read(cx, &mut unread)) {
                Ok(()) if !unread.filled().is_empty() => {}
                // getpeername(2): a TCP connection has no peer once both ends are closed and acknowledged, or it is reset.
                Ok(()) | Err(_) => return Poll::Ready(stream.peer_addr().is_err()),
            }
        }
    }

    fn end_and_keep(&self) -> Option<OwnedFd> {
        let Self::Tcp(stream) = self else { return None };
        let kept = stream.as_fd().try_clone_to_owned().ok()?; // out of descriptors, it is closed in order
        // While there is another descriptor, close(2) does not end it. It may have ended already, or be broken.
        let _ = shutdown(&kept, Shutdown::Write);
        Some(kept)
    }

    fn try_write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(match self {
            Self::Tcp(stream) => send(&*stream, buf, SEND)?,
            Self::Unix(stream) => send(&*stream, buf, SendFlags::NOSIGNAL)?,
        })
    }

    fn has_input(&self) -> bool {
        let mut first = [0];
        let found = match self {
            Self::Tcp(stream) => recv(stream, &mut first, RecvFlags::PEEK),
            Self::Unix(stream) => recv(stream, &mut first, RecvFlags::PEEK),
        };
        found.is_ok_and(|(read, _)| read > 0)
    }

    fn set_sending(&mut self, sending: Sending) {
        if let Self::Tcp(stream) = self {
            let lowat = match sending {
                Sending::Short => NOTSENT_LOWAT,
                Sending::Stream => NOTSENT_LOWAT_STREAMING,
                Sending::SlowStream => NOTSENT_LOWAT_SLOW,
            };
            let _ = SockRef::from(&*stream).set_tcp_notsent_lowat(lowat); // without it, it is slower or holds more
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_an_address_or_a_path() {
        for good in ["*", "0.0.0.0", "::", "127.0.0.1", "unix:/run/key.sock"] {
            assert_eq!(good.parse::<Host>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "**",
            "*:80",
            "localhost",
            "127.0.0.1:99999",
            "unix:relative",
            "unix:",
            "/run/key.sock",
            "[::1]",
        ] {
            assert!(bad.parse::<Host>().is_err(), "{bad}");
        }
    }

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
            let sentence = error.of_settings("host", "srv-port").to_string();
            assert!(sentence.starts_with(&format!("can't listen on [::]:80 ({setting}): ")), "{sentence}");
        }
    }

    #[test]
    fn an_address_in_use_is_not_taken_for_a_forbidden_socket() {
        for (errno, expected) in [
            (Errno::AFNOSUPPORT, [true, true]),
            (Errno::PERM, [true, true]),
            (Errno::ROFS, [true, true]),
            (Errno::ACCESS, [false, true]), // a port below 1024, a directory of somebody else's
            (Errno::ADDRINUSE, [false, false]),
            (Errno::ADDRNOTAVAIL, [false, false]),
            (Errno::MFILE, [false, false]),
        ] {
            let error = BindError { host: Host::Any, address: "[::]:80".into(), source: errno.into() };
            let error = error.of_settings("host", "srv-port");
            assert_eq!([error.is_forbidden(), error.is_denied()], expected, "{errno:?}");
        }
    }

    #[test]
    fn every_address_is_ipv4_alone_where_there_is_no_ipv6() {
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
        // Another error is of IPv4 too, or would hide that half of the clients are not served.
        for errno in [Errno::ADDRINUSE, Errno::ACCESS, Errno::MFILE] {
            assert_eq!(outcome(bind(Some(errno), false)), ("[::]:1123".into(), false), "{errno:?}");
        }
    }

    #[test]
    fn a_socket_file_that_nobody_answers_on_is_replaced_and_other_files_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let stale = Host::Unix(folder.path().join("stale"));
        drop(Listener::bind(&stale, 0, Mode::default()).unwrap());
        let held = Listener::bind(&stale, 0, Mode::default()).expect("a stale socket is replaced");
        assert!(Listener::bind(&stale, 0, Mode::default()).is_err(), "a socket in use is not");
        let file = folder.path().join("file");
        fs::write(&file, "mine").unwrap();
        assert!(Listener::bind(&Host::Unix(file.clone()), 0, Mode::default()).is_err());
        assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
        drop(held);
    }
}
