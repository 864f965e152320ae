//! The credential socket: systemd connects for a unit with `LoadCredential=` (systemd.exec(5)), reads until the
//! connection ends, and stores the result where only that unit can read it. The name that systemd binds its socket to
//! contains the unit's name.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tracing::{debug, warn};

use crate::access::audit::{AuditRecord, AuditSubject, RequestId};
use crate::access::credential_request::{CredentialRequest, is_credential_name, is_unit_name};
use crate::http::state::AppState;
use crate::keys::format::{Format, Kind};
use crate::keys::key::KeyLength;
use crate::keys::key_spec::KeySpec;
use crate::server::accepted::Accepted;
use crate::telemetry::labels::CredentialOutcome as Outcome;

/// The largest credential, in bytes, or in characters of a password. In every format the kernel takes it in one write, so
/// that half a credential is never read.
pub const LENGTH_MAX: u64 = 4096;

/// The length of a credential without a rule, in bytes.
pub const LENGTH_DEFAULT: u64 = 32;

/// Units that are served at once; the same number of further units wait for a moment.
pub const CONNECTIONS: usize = 64;

/// The most bytes that systemd accepts for all credentials of a unit (`CREDENTIALS_TOTAL_SIZE_MAX`). If it receives
/// more, the unit does not start.
const SYSTEMD_MAX: usize = 1 << 20;

/// Whether `text` selects credentials for a rule: `CREDENTIAL` or `UNIT:CREDENTIAL`.
pub fn is_selector(text: &str) -> bool {
    match text.rsplit_once(':') {
        Some((unit, credential)) => is_unit_name(unit) && is_credential_name(credential),
        None => is_credential_name(text),
    }
}

/// The content of each credential. The rule for `UNIT:CREDENTIAL` applies, else the rule for `CREDENTIAL`; without
/// either, it is 32 raw bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CredentialRules(BTreeMap<String, KeySpec>);

impl CredentialRules {
    /// Rules by their selectors.
    pub fn new(rules: BTreeMap<String, KeySpec>) -> Self {
        Self(rules)
    }

    /// Each selector and its rule.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &KeySpec)> {
        self.0.iter().map(|(selector, spec)| (selector.as_str(), spec))
    }

    fn spec_for(&self, request: &CredentialRequest) -> KeySpec {
        let rule = self.0.get(&request.to_string()).or_else(|| self.0.get(&request.credential));
        rule.copied().unwrap_or_else(|| {
            let length = KeyLength::new(LENGTH_DEFAULT, LENGTH_MAX).expect("32 is a length");
            KeySpec::new(Kind::Key, length, Format::Raw, None).expect("one key is no batch")
        })
    }
}

/// Serves the credential socket.
#[derive(Debug)]
pub struct CredentialServer {
    app: Arc<AppState>,
    rules: RwLock<Arc<CredentialRules>>,
}

impl CredentialServer {
    /// Serves keys from the generator of `app`, and counts them in its metrics.
    pub fn new(app: Arc<AppState>, rules: CredentialRules) -> Self {
        Self { app, rules: RwLock::new(Arc::new(rules)) }
    }

    /// Replaces the rules for every connection from now on.
    pub fn replace_rules(&self, rules: CredentialRules) {
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
    }

    /// Serves each connection of an accept loop.
    pub fn handler(self: &Arc<Self>) -> impl Fn(Accepted) + Clone + Send + 'static {
        let server = Arc::clone(self);
        move |accepted| {
            let server = Arc::clone(&server);
            tokio::spawn(async move {
                let outcome = server.serve(accepted).await;
                server.app.metrics.count_credential(outcome);
            });
        }
    }

    async fn serve(&self, accepted: Accepted) -> Outcome {
        let name = accepted.stream.peer_name();
        let (mut stream, peer, _guard) = accepted.into_parts();
        let Some(request) = name.and_then(|name| CredentialRequest::parse(&name)) else {
            debug!("the client of the credential socket is not systemd loading a credential for a unit");
            return Outcome::Malformed;
        };
        let rules = Arc::clone(&self.rules.read().unwrap_or_else(PoisonError::into_inner));
        let spec = rules.spec_for(&request);
        let generated = self.app.generate(&spec).and_then(|bytes| {
            let new_id = || RequestId::generate(&self.app.generator);
            let id = self.app.authorizer.audits().then(new_id).transpose()?;
            let record = id.map(|id| AuditRecord::new(id, AuditSubject::Unit(request.clone()), peer, spec));
            Ok((bytes, record))
        });
        let (bytes, mut record) = match generated {
            Ok(generated) => generated,
            Err(failure) => {
                self.app.report_failure();
                warn!(recipient = %request, %failure, "failed to generate a credential: the unit does not start");
                let _ = prevent_start(&mut stream).await; // if systemd is gone, the unit has not started either
                return Outcome::Failed;
            }
        };
        let on_sent = |count: usize, is_last: bool| {
            if let Some(record) = &mut record {
                record.add_sent(count, is_last);
            }
        };
        if let Err(error) = send(&mut stream, &bytes, on_sent).await {
            debug!(recipient = %request, %error, "failed to send a credential");
            return Outcome::Aborted;
        }
        Outcome::Served
    }
}

/// Sends `bytes` and shuts the stream down. `on_sent` is called with each number of bytes that the kernel took, and whether
/// they were the last.
///
/// # Errors
/// When the kernel does not take all of them.
async fn send(
    stream: &mut (impl AsyncWrite + Unpin),
    mut bytes: &[u8],
    mut on_sent: impl FnMut(usize, bool),
) -> io::Result<()> {
    while !bytes.is_empty() {
        let taken = stream.write(bytes).await?;
        if taken == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[taken..];
        on_sent(taken, bytes.is_empty());
    }
    // The unit has its key even if this fails: dropping the stream closes it.
    if let Err(error) = stream.shutdown().await {
        debug!(%error, "failed to shut down a credential connection");
    }
    Ok(())
}

/// Makes systemd fail the start of a unit that no key can be generated for. If the connection just closed, the
/// credential would be empty and the unit would start with it, so this sends more than systemd accepts.
async fn prevent_start(stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let zeros = [0; 8192];
    for _ in 0..=SYSTEMD_MAX / zeros.len() {
        stream.write_all(&zeros).await?;
    }
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    #[test]
    fn a_selector_names_a_credential_or_one_of_a_unit() {
        for selector in ["cookie", "web.service:cookie", "web@a:b.service:a b"] {
            assert!(is_selector(selector), "{selector}");
        }
        for text in ["", "a/b", "web:cookie", "web.service:", ":cookie", "web.service:cookie:"] {
            assert!(!is_selector(text), "{text}");
        }
    }

    #[test]
    fn the_most_specific_rule_applies() {
        let spec = |length, format| {
            let length = KeyLength::new(length, LENGTH_MAX).unwrap();
            KeySpec::new(Kind::Key, length, format, None).unwrap()
        };
        let rules = CredentialRules::new(BTreeMap::from([
            ("cookie".into(), spec(64, Format::Hex)),
            ("web.service:cookie".into(), spec(16, Format::Base64)),
        ]));
        let of = |unit: &str, credential: &str| {
            rules.spec_for(&CredentialRequest { unit: unit.into(), credential: credential.into() })
        };
        assert_eq!(of("web.service", "cookie"), spec(16, Format::Base64));
        assert_eq!(of("other.service", "cookie"), spec(64, Format::Hex));
        assert_eq!(of("web.service", "other"), spec(32, Format::Raw));
    }

    /// Takes `room` bytes, at most 10 with each write, and then fails, as its shutdown does.
    struct Failing {
        room: usize,
    }

    impl AsyncWrite for Failing {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let taken = bytes.len().min(self.room).min(10);
            self.room -= taken;
            Poll::Ready(if taken > 0 { Ok(taken) } else { Err(io::ErrorKind::BrokenPipe.into()) })
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::ErrorKind::NotConnected.into()))
        }
    }

    #[tokio::test]
    async fn sent_bytes_are_reported_and_a_failed_shutdown_is_no_error() {
        for (room, expected, is_sent) in
            [(100, (32, true), true), (32, (32, true), true), (31, (31, false), false)]
        {
            let mut reported = (0, false);
            let on_sent = |count, is_last| reported = (reported.0 + count, is_last);
            assert_eq!(send(&mut Failing { room }, &[0; 32], on_sent).await.is_ok(), is_sent);
            assert_eq!(reported, expected, "{room}");
        }
    }
}
