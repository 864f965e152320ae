//! The peer of a connection, and the client that limits are counted for.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::net::UnixStream;

/// The other end of a connection, as the kernel and the client certificate identify it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Where the connection comes from.
    pub origin: Origin,
    /// The name in the verified client certificate, if there is one.
    pub identity: Option<Arc<str>>,
}

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// An IP address, never an IPv4-mapped one (RFC 4291 section 2.5.5.2).
    Ip(IpAddr),
    /// A process of this host.
    Unix(PeerCredentials),
}

/// The credentials of a process that connected to a Unix socket (unix(7), `SO_PEERCRED`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerCredentials {
    /// The process ID; `None` if the process is in a PID namespace that we do not see.
    pub pid: Option<i32>,
    /// The effective user ID; `None` if our user namespace does not map it.
    pub uid: Option<u32>,
    /// The effective group ID; `None` if our user namespace does not map it.
    pub gid: Option<u32>,
}

/// The ID that the kernel reports for a user or group that our user namespace does not map (user_namespaces(7)): in a
/// unit with `PrivateUsers=yes`, all but root and the unit's own. It is the kernel's default, and systemd supports no
/// other; the sandbox hides /proc/sys/kernel/overflowuid. The user `nobody` has the same ID and can't be distinguished.
const OVERFLOW_ID: u32 = 65534;

fn mapped_id(id: u32) -> Option<u32> {
    (id != OVERFLOW_ID).then_some(id)
}

/// The client that a limit is counted for. A host can't be many clients at no cost: an IPv6 network is one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Client {
    /// An IPv4 address.
    V4(u32),
    /// The first 64 bits of an IPv6 address. A host or a household is given such a network whole (RFC 6177, RFC 4291
    /// section 2.5.4), so a limit on anything smaller could be circumvented.
    V6(u64),
    /// A user of this host; `None` stands for all users that our user namespace does not map.
    User(Option<u32>),
    /// The bearer of a token, identified by a digest of the token's name.
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
    /// The peer at an IP address, without a client certificate.
    pub fn tcp(address: SocketAddr) -> Self {
        Self { origin: Origin::Ip(address.ip().to_canonical()), identity: None }
    }

    /// The process at the other end of a Unix socket.
    ///
    /// # Errors
    /// The kernel does not report its credentials.
    pub fn unix(stream: &UnixStream) -> io::Result<Self> {
        let found = stream.peer_cred()?;
        let credentials =
            PeerCredentials { pid: found.pid(), uid: mapped_id(found.uid()), gid: mapped_id(found.gid()) };
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
        assert_eq!(
            client("192.0.2.1"),
            client("::ffff:192.0.2.1"),
            "an IPv4-mapped address is the IPv4 address"
        );
        assert_eq!(client("2001:db8:1:2::1"), client("2001:db8:1:2:ffff:ffff:ffff:ffff"));
        assert_ne!(client("2001:db8:1:2::1"), client("2001:db8:1:3::1"));
        assert_ne!(client("0:0:c000:201::"), client("192.0.2.1"), "the same bits in IPv6 and IPv4");
    }
}
