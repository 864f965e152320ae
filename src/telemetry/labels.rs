//! Values of metric labels. Each is an enum, so that no client can create a series; routes are in `endpoint.rs`.

use std::io;

use rustix::io::Errno;
use strum::{IntoStaticStr, VariantArray};

/// Why a request or a connection was rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Rejection {
    /// All connection slots were taken.
    Connections,
    /// The bytes were not a valid HTTP/1.1 request.
    Malformed,
    /// The generator is out of service.
    Generator,
    /// The service is shutting down, and the response would be streamed.
    Draining,
    /// A required token was missing or invalid.
    Unauthorized,
    /// The client exceeded its limit of requests or bytes.
    Rate,
    /// The client has as many connections as one client may have.
    ClientConnections,
    /// As many streamed responses are in flight as the service, or one client, may have.
    Bulk,
    /// Too many connections hold buffers, so this one was reset.
    Buffers,
}

/// Why a request for a key or a password got a 503, or a response that was cut short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum KeyRequestError {
    /// All connection slots were taken.
    Connections,
    /// The client has as many connections as one client may have.
    ClientConnections,
    /// The generator is out of service.
    Generator,
    /// The service is shutting down, and the response would be streamed.
    Draining,
    /// As many streamed responses are in flight as the service, or one client, may have.
    Bulk,
}

impl From<KeyRequestError> for Rejection {
    fn from(reason: KeyRequestError) -> Self {
        match reason {
            KeyRequestError::Connections => Self::Connections,
            KeyRequestError::ClientConnections => Self::ClientConnections,
            KeyRequestError::Generator => Self::Generator,
            KeyRequestError::Draining => Self::Draining,
            KeyRequestError::Bulk => Self::Bulk,
        }
    }
}

/// Why accept(2) failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum AcceptError {
    /// The client closed this connection before it was accepted.
    Connection,
    /// File descriptors or memory ran out.
    Resources,
    /// Anything else: the listening socket is broken, or a filter denies the call.
    Listener,
}

impl AcceptError {
    /// The kind of `error`, by accept(2).
    pub fn classify(error: &io::Error) -> Self {
        match Errno::from_io_error(error) {
            // Section "Error handling": Linux returns pending network errors of the new connection. EPERM is a
            // firewall's.
            Some(
                Errno::CONNABORTED
                | Errno::CONNRESET
                | Errno::INTR
                | Errno::PERM
                | Errno::NETDOWN
                | Errno::PROTO
                | Errno::NOPROTOOPT
                | Errno::HOSTDOWN
                | Errno::NONET
                | Errno::HOSTUNREACH
                | Errno::NETUNREACH
                | Errno::TIMEDOUT,
            ) => Self::Connection,
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => Self::Resources,
            _ => Self::Listener,
        }
    }

    /// The cause, for the log.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Connection => "clients close them first",
            Self::Resources => "out of file descriptors or memory",
            Self::Listener => "the listening socket is not usable",
        }
    }
}

/// How a connection to the credential socket ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum CredentialOutcome {
    /// The unit got its key.
    Served,
    /// The peer was not a unit that systemd loads a credential for.
    Malformed,
    /// The generator is out of service.
    Failed,
    /// The peer closed the connection before it had all of its key.
    Aborted,
}

/// Why a TLS handshake failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum HandshakeError {
    /// The handshake timed out.
    Timeout,
    /// The client closed the connection.
    Closed,
    /// The client did not send TLS.
    Malformed,
    /// The client sent plain HTTP.
    PlainHttp,
    /// Client and server share no version, algorithm or protocol.
    Incompatible,
    /// The client sent no certificate, or one that is not accepted.
    ClientCertificate,
    /// The client aborted with an alert, most often because it does not trust the certificate of the server.
    ClientAlert,
    /// Anything else.
    Other,
}

/// Why a connection was closed because of its PROXY header, or the lack of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum ProxyProtocolError {
    /// A client that is not a trusted proxy sent a PROXY header.
    Untrusted,
    /// A trusted proxy sent no PROXY header.
    Missing,
    /// A trusted proxy sent an invalid PROXY header.
    Malformed,
    /// A trusted proxy did not complete its PROXY header in time.
    Timeout,
}
