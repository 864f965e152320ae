//! The address of a listener, as the settings name it: an IP address or the path of a Unix socket.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// The address of a listener without its port: `*`, an IP address, or `unix:` and a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// Every IPv4 and IPv6 address of this host: one dual-stack socket, or an IPv4 socket if the host has no IPv6.
    Any,
    /// An IPv4 or IPv6 address. `::` accepts both protocols, as Linux does.
    Ip(IpAddr),
    /// The absolute path of a Unix stream socket.
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

/// The mode of the file of a Unix socket. Connecting needs write permission (unix(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketMode(u32);

impl SocketMode {
    /// The bits for chmod(2).
    pub(crate) fn bits(self) -> u32 {
        self.0
    }
}

impl Default for SocketMode {
    /// 0660: the user and the group of the service may connect.
    fn default() -> Self {
        Self(0o660)
    }
}

impl FromStr for SocketMode {
    type Err = ();

    /// Parses octal digits.
    fn from_str(text: &str) -> Result<Self, ()> {
        u32::from_str_radix(text, 8)
            .ok()
            .filter(|mode| *mode <= 0o777 && !text.starts_with('+'))
            .map(Self)
            .ok_or(())
    }
}

impl fmt::Display for SocketMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
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
}
