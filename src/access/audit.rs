//! The audit log: one record for each key, with its recipient, its length, and whether all of it was sent. Never the
//! key.

use std::fmt;

use base16ct::lower;
use tracing::info;

use crate::access::authorization::Authorized;
use crate::access::credential_request::CredentialRequest;
use crate::access::peer::{Origin, Peer};
use crate::keys::format::Kind;
use crate::keys::generator::{Generator, GeneratorError};
use crate::keys::key_spec::KeySpec;
use crate::telemetry::log_event::AUDIT_TARGET;
use crate::telemetry::text::ip_text;

/// The recipient of a key.
#[derive(Debug)]
pub enum AuditSubject {
    /// A client, over HTTP.
    Client(Authorized),
    /// A unit of this host, through systemd.
    Unit(CredentialRequest),
}

/// Identifies an audit record, in the log and in the response: 128 random bits, as 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestId([u8; 32]);

impl RequestId {
    /// A new one.
    ///
    /// # Errors
    /// The generator fails.
    pub fn generate(generator: &Generator) -> Result<Self, GeneratorError> {
        let mut id = [0; 16];
        generator.fill(&mut id)?;
        let mut digits = [0; 32];
        lower::encode(&id, &mut digits).expect("two digits a byte");
        Ok(Self(digits))
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        str::from_utf8(&self.0).expect("hexadecimal digits are ASCII")
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The audit record of a key in flight. Dropping it logs the record through the log's queue, so nothing waits for it.
#[derive(Debug)]
pub struct AuditRecord {
    request_id: RequestId,
    subject: AuditSubject,
    peer: Peer,
    spec: KeySpec,
    sent: u64,
    is_complete: bool,
}

impl AuditRecord {
    /// Creates the record of the keys that `spec` describes, which were generated. Nothing is logged yet.
    pub fn new(request_id: RequestId, subject: AuditSubject, peer: Peer, spec: KeySpec) -> Self {
        Self { request_id, subject, peer, spec, sent: 0, is_complete: false }
    }

    /// Logs that a streamed key begins, so that there is a trace of it if the process is killed. Dropping the record
    /// logs the end under the same request ID.
    pub fn log_start(&self) {
        self.log("key stream started", "started");
    }

    /// Adds `bytes` of the response that the connection accepted; `is_last` says that they complete it.
    pub fn add_sent(&mut self, bytes: usize, is_last: bool) {
        self.sent += bytes as u64;
        self.is_complete = is_last;
    }

    fn log(&self, event: &'static str, outcome: &'static str) {
        let (client, unit) = match &self.subject {
            AuditSubject::Client(client) => (Some(client), None),
            AuditSubject::Unit(request) => (None, Some(request)),
        };
        let proxy = client.filter(|client| client.is_forwarded).map(|_| match self.peer.origin {
            Origin::Ip(ip) => ip_text(ip),
            Origin::Unix(_) => self.peer.origin.to_string(),
        });
        let alphabet = match self.spec.kind() {
            Kind::Key => None,
            Kind::Password(alphabet) => Some(alphabet.name()),
        };
        let (uid, gid, pid) = match self.peer.origin {
            Origin::Unix(peer) => (Some(id_text(peer.uid)), Some(id_text(peer.gid)), peer.pid),
            Origin::Ip(_) => (None, None, None),
        };
        info!(
            target: AUDIT_TARGET,
            message = event,
            request_id = self.request_id.as_str(),
            unit = unit.map(|request| request.unit.as_str()),
            credential = unit.map(|request| request.credential.as_str()),
            token = client.and_then(Authorized::token_name).map(|name| name.as_str()),
            // A certificate may contain any name: a line break in it must not begin another record.
            certificate = self.peer.identity.as_ref().map(|name| tracing::field::display(name.escape_debug())),
            peer_uid = uid,
            peer_gid = gid,
            peer_pid = pid,
            address = client.and_then(|client| client.address).map(ip_text),
            proxy,
            length = self.spec.length().bytes(),
            count = self.spec.count(),
            format = self.spec.format().name(),
            alphabet,
            sent = self.sent,
            outcome,
        );
    }
}

impl Drop for AuditRecord {
    fn drop(&mut self) {
        self.log("key issued", if self.is_complete { "complete" } else { "aborted" });
    }
}

/// A user or group ID; `unknown` if our user namespace does not map it, since the number would look like an existing
/// one.
fn id_text(id: Option<u32>) -> String {
    id.map_or_else(|| "unknown".into(), |id| id.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[tokio::test]
    async fn a_user_of_another_namespace_is_unknown() {
        assert_eq!(id_text(None), "unknown");
        let (ours, _theirs) = tokio::net::UnixStream::pair().unwrap();
        let uid = std::fs::metadata("/proc/self").unwrap().uid();
        let Origin::Unix(credentials) = Peer::unix(&ours).unwrap().origin else {
            panic!("not a Unix socket")
        };
        let expected = if uid == 65534 { "unknown".to_owned() } else { uid.to_string() };
        assert_eq!(id_text(credentials.uid), expected);
    }
}
