//! The record that a key leaves, where that is asked for: who got how much, and whether all of it was sent. Never the
//! key.

use std::net::IpAddr;

use tracing::info;

use crate::access::authorization::Authorized;
use crate::access::credential_request::CredentialRequest;
use crate::access::peer::{Origin, Peer};
use crate::keys::format::Kind;
use crate::keys::generator::{Generator, GeneratorError};
use crate::keys::key_spec::KeySpec;
use crate::telemetry::log::AUDIT;

/// Who gets a key.
#[derive(Debug)]
pub enum AuditSubject {
    /// Someone who asked over HTTP.
    Client(Authorized),
    /// A unit of this host, through systemd.
    Unit(CredentialRequest),
}

/// A key on its way. The record is written when this is dropped, through the log's queue: nothing waits for it.
#[derive(Debug)]
pub struct AuditRecord {
    /// 128 random bits; the client is told them too.
    id: u128,
    recipient: AuditSubject,
    peer: Peer,
    shape: KeySpec,
    sent: u64,
    is_complete: bool,
}

impl AuditRecord {
    /// The record of keys of `shape`, none of which is sent.
    ///
    /// # Errors
    /// The generator's failure.
    pub fn start(
        recipient: AuditSubject,
        peer: Peer,
        shape: KeySpec,
        generator: &Generator,
    ) -> Result<Self, GeneratorError> {
        let mut id = [0; 16];
        generator.fill(&mut id)?;
        Ok(Self { id: u128::from_be_bytes(id), recipient, peer, shape, sent: 0, is_complete: false })
    }

    /// The request's id, as it is written.
    pub fn id(&self) -> String {
        format!("{:032x}", self.id)
    }

    /// Writes that a streamed key begins, so that a process which is killed leaves a trace of it. [`Drop`] writes the same
    /// request's end.
    pub fn started(&self) {
        self.write("key stream started", "started");
    }

    /// Notes that `bytes` more of the answer were handed to the connection; `is_last` says that none are left.
    pub fn sent(&mut self, bytes: usize, is_last: bool) {
        self.sent += bytes as u64;
        self.is_complete = is_last;
    }
}

impl AuditRecord {
    fn write(&self, event: &'static str, outcome: &'static str) {
        let (visit, unit) = match &self.recipient {
            AuditSubject::Client(visit) => (Some(visit), None),
            AuditSubject::Unit(unit) => (None, Some(unit)),
        };
        let proxy = visit.filter(|visit| visit.is_forwarded).map(|_| self.peer.origin);
        let alphabet = match self.shape.kind() {
            Kind::Key => None,
            Kind::Password(alphabet) => Some(alphabet.name()),
        };
        let (uid, gid, pid) = match self.peer.origin {
            Origin::Unix(peer) => (Some(number(peer.uid)), Some(number(peer.gid)), peer.pid),
            Origin::Ip(_) => (None, None, None),
        };
        let proxy = proxy.map(|origin| origin.to_string());
        info!(
            target: AUDIT,
            request_id = self.id(),
            unit = unit.map(|recipient| recipient.unit.as_str()),
            credential = unit.map(|recipient| recipient.credential.as_str()),
            token = visit.and_then(Authorized::bearer).map(|name| name.as_str()),
            // A certificate may name anything; a line break must not begin another record.
            certificate = self.peer.identity.as_ref().map(|name| name.escape_debug().to_string()),
            peer_uid = uid,
            peer_gid = gid,
            peer_pid = pid,
            address = visit.and_then(|visit| visit.address).map(|ip: IpAddr| ip.to_string()),
            proxy,
            length = self.shape.length().bytes(),
            count = self.shape.count(),
            format = self.shape.format().name(),
            alphabet,
            sent = self.sent,
            outcome,
            "{event}"
        );
    }
}

impl Drop for AuditRecord {
    fn drop(&mut self) {
        self.write("key issued", if self.is_complete { "complete" } else { "aborted" });
    }
}

/// A user or group that is not known is not written as one that exists.
fn number(id: Option<u32>) -> String {
    id.map_or_else(|| "unknown".into(), |id| id.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[tokio::test]
    async fn a_user_of_another_namespace_is_unknown() {
        assert_eq!(number(None), "unknown");
        let (ours, _theirs) = tokio::net::UnixStream::pair().unwrap();
        let uid = std::fs::metadata("/proc/self").unwrap().uid();
        let Origin::Unix(credentials) = Peer::unix(&ours).unwrap().origin else {
            panic!("not a Unix socket")
        };
        let expected = if uid == 65534 { "unknown".to_owned() } else { uid.to_string() };
        assert_eq!(number(credentials.uid), expected);
    }
}
