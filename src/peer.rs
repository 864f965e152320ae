//! Who is at the other end of a connection.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::net::UnixStream;

/// The client of one connection, as the kernel and its certificate name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Where the connection comes from.
    pub origin: Origin,
    /// Whom the client's certificate names, where it showed one that was verified.
    pub identity: Option<Arc<str>>,
}

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// An address; one of IPv4 is never in its mapped form (RFC 4291 section 2.5.5.2).
    Ip(IpAddr),
    /// A process of this host.
    Unix(Credentials),
}

/// What the kernel says of a process that connected to a Unix socket (unix(7), `SO_PEERCRED`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credentials {
    /// Its number, where it is in a namespace that we see.
    pub pid: Option<i32>,
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
}

impl Peer {
    /// A client at an IP address.
    pub fn tcp(address: SocketAddr) -> Self {
        Self { origin: Origin::Ip(address.ip().to_canonical()), identity: None }
    }

    /// A client on this host.
    ///
    /// # Errors
    /// When the kernel does not name it.
    pub fn unix(stream: &UnixStream) -> io::Result<Self> {
        let found = stream.peer_cred()?;
        let credentials = Credentials { pid: found.pid(), uid: found.uid(), gid: found.gid() };
        Ok(Self { origin: Origin::Unix(credentials), identity: None })
    }
}
