//! Who is at the other end of a connection.

use std::fmt;
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
    Unix(PeerCredentials),
}

/// What the kernel says of a process that connected to a Unix socket (unix(7), `SO_PEERCRED`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Its number, where it is in a namespace that we see.
    pub pid: Option<i32>,
    /// Its effective user, where our user namespace has it.
    pub uid: Option<u32>,
    /// Its effective group, likewise.
    pub gid: Option<u32>,
}

/// What the kernel says instead of a user or group that our user namespace does not have (user_namespaces(7)): in a unit with
/// `PrivateUsers=yes`, all but root and the unit's own. It is the kernel's default, and systemd supports no other; the
/// sandbox hides /proc/sys/kernel/overflowuid. A process of the user `nobody` has the same number, and can't be told apart.
const OVERFLOW_ID: u32 = 65534;

fn known(id: u32) -> Option<u32> {
    (id != OVERFLOW_ID).then_some(id)
}

/// Whom a limit is counted for. One host can't have many of them for nothing: an IPv6 network is one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Client {
    /// An IPv4 address.
    V4(u32),
    /// The first 64 bits of an IPv6 address: what a host or a household is given whole (RFC 6177, RFC 4291 section
    /// 2.5.4), so that a limit on less can be walked around.
    V6(u64),
    /// A user of this host; all whom our user namespace does not have are one.
    User(Option<u32>),
    /// The bearer of a token, by a digest of the token's name.
    Bearer(u64),
}

impl From<IpAddr> for Client {
    fn from(ip: IpAddr) -> Self {
        match ip.to_canonical() {
            IpAddr::V4(ip) => Self::V4(ip.into()),
            IpAddr::V6(ip) => {
                let [a, b, c, d, ..] = ip.segments().map(u64::from);
                Self::V6(a << 48 | b << 32 | c << 16 | d)
            }
        }
    }
}

impl From<Origin> for Client {
    fn from(origin: Origin) -> Self {
        match origin {
            Origin::Ip(ip) => ip.into(),
            Origin::Unix(credentials) => Self::User(credentials.uid),
        }
    }
}

/// The address, or `unix`.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => ip.fmt(f),
            Self::Unix(_) => f.write_str("unix"),
        }
    }
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
        let credentials =
            PeerCredentials { pid: found.pid(), uid: known(found.uid()), gid: known(found.gid()) };
        Ok(Self { origin: Origin::Unix(credentials), identity: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(ip: &str) -> Client {
        ip.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn a_client_is_an_ipv4_address_or_an_ipv6_network() {
        assert_ne!(client("192.0.2.1"), client("192.0.2.2"));
        assert_eq!(client("192.0.2.1"), client("::ffff:192.0.2.1"), "the mapped form is the same address");
        assert_eq!(client("2001:db8:1:2::1"), client("2001:db8:1:2:ffff:ffff:ffff:ffff"));
        assert_ne!(client("2001:db8:1:2::1"), client("2001:db8:1:3::1"));
        assert_ne!(client("0:0:c000:201::"), client("192.0.2.1"), "kinds don't meet");
    }
}
