//! The credential socket: systemd connects for a unit with `LoadCredential=` (systemd.exec(5)), reads to the end, and
//! puts what it read where only that unit finds it. Whom a key is for is in the name that systemd binds its end to.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tracing::{debug, warn};

use crate::access::audit::{AuditRecord, AuditSubject};
use crate::access::credential_request::{CredentialRequest, is_credential_name, is_unit_name};
use crate::http::state::AppState;
use crate::keys::format::{Format, Kind};
use crate::keys::key::KeyLength;
use crate::keys::key_spec::KeySpec;
use crate::server::accepted::Accepted;
use crate::telemetry::labels::CredentialOutcome as Outcome;

/// The largest credential in bytes, or characters of a password. In every format the kernel takes it in one piece, so
/// that half of one is never read.
pub const LENGTH_MAX: u64 = 4096;

/// The length of a credential that the configuration says nothing about, in bytes.
pub const LENGTH_DEFAULT: u64 = 32;

/// Units that are served at once; as many more wait for a moment.
pub const CONNECTIONS: usize = 64;

/// The most that systemd takes for all credentials of a unit (`CREDENTIALS_TOTAL_SIZE_MAX`); more fails its start.
const SYSTEMD_MAX: usize = 1 << 20;

/// Whether a text can stand before a rule: `CREDENTIAL` or `UNIT:CREDENTIAL`.
pub fn is_selector(text: &str) -> bool {
    match text.rsplit_once(':') {
        Some((unit, credential)) => is_unit_name(unit) && is_credential_name(credential),
        None => is_credential_name(text),
    }
}

/// What each credential is: by `UNIT:CREDENTIAL`, else by `CREDENTIAL`, else 32 bytes as they are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CredentialRules(BTreeMap<String, KeySpec>);

impl CredentialRules {
    /// Rules by their selectors.
    pub fn new(rules: BTreeMap<String, KeySpec>) -> Self {
        Self(rules)
    }

    /// Each selector and what it stands for.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &KeySpec)> {
        self.0.iter().map(|(selector, shape)| (selector.as_str(), shape))
    }

    /// What `recipient` gets.
    pub fn shape(&self, recipient: &CredentialRequest) -> KeySpec {
        let rule = self.0.get(&recipient.to_string()).or_else(|| self.0.get(&recipient.credential));
        rule.copied().unwrap_or_else(default)
    }
}

fn default() -> KeySpec {
    let length = KeyLength::new(LENGTH_DEFAULT, LENGTH_MAX).expect("32 is a length");
    KeySpec::new(Kind::Key, length, Format::Raw, None).expect("one key is no batch")
}

/// The service of the credential socket.
#[derive(Debug)]
pub struct CredentialServer {
    api: Arc<AppState>,
    rules: RwLock<Arc<CredentialRules>>,
}

impl CredentialServer {
    /// An outlet of the keys of `api`.
    pub fn new(api: Arc<AppState>, rules: CredentialRules) -> Self {
        Self { api, rules: RwLock::new(Arc::new(rules)) }
    }

    /// Puts `rules` in force for every connection from now on.
    pub fn replace(&self, rules: CredentialRules) {
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
    }

    /// What an accept loop does with each connection.
    pub fn service(self: &Arc<Self>) -> impl Fn(Accepted) + Clone + Send + 'static {
        let credential_server = Arc::clone(self);
        move |accepted| {
            let credential_server = Arc::clone(&credential_server);
            tokio::spawn(async move {
                let outcome = credential_server.serve(accepted).await;
                credential_server.api.metrics.count_credential(outcome);
            });
        }
    }

    async fn serve(&self, accepted: Accepted) -> Outcome {
        let name = accepted.stream.peer_name();
        let (mut stream, peer, _guard) = accepted.into_parts();
        let Some(recipient) = name.and_then(|name| CredentialRequest::parse(&name)) else {
            debug!("who connected to the credential socket is not a unit that systemd loads one for");
            return Outcome::Malformed;
        };
        let rules = Arc::clone(&self.rules.read().unwrap_or_else(PoisonError::into_inner));
        let shape = rules.shape(&recipient);
        let generated = self.api.generate(&shape).and_then(|bytes| {
            let audits = self.api.authorizer.audits();
            let recorded = || AuditSubject::Unit(recipient.clone());
            let record =
                audits.then(|| AuditRecord::new(recorded(), peer, shape, &self.api.generator)).transpose()?;
            Ok((bytes, record))
        });
        let (bytes, mut record) = match generated {
            Ok(generated) => generated,
            Err(failure) => {
                self.api.report_failure();
                warn!(%recipient, %failure, "a unit gets no key and does not start");
                let _ = refuse(&mut stream).await; // a unit that is gone has not started either
                return Outcome::Failed;
            }
        };
        let sent = |bytes: usize, is_last: bool| {
            if let Some(record) = &mut record {
                record.add_sent(bytes, is_last);
            }
        };
        if let Err(error) = send(&mut stream, &bytes, sent).await {
            debug!(%recipient, %error, "a unit went away before it had its key");
            return Outcome::Aborted;
        }
        Outcome::Served
    }
}

/// Sends `bytes` and the end. `sent` is called with each number of bytes that the kernel took, and whether none are left.
///
/// # Errors
/// When the kernel does not take all of them.
async fn send(
    stream: &mut (impl AsyncWrite + Unpin),
    mut bytes: &[u8],
    mut sent: impl FnMut(usize, bool),
) -> io::Result<()> {
    while !bytes.is_empty() {
        let taken = stream.write(bytes).await?;
        if taken == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[taken..];
        sent(taken, bytes.is_empty());
    }
    // The unit has its key, whatever becomes of the end: dropping the stream closes it.
    if let Err(error) = stream.shutdown().await {
        debug!(%error, "the end of a credential could not be sent");
    }
    Ok(())
}

/// Makes systemd fail the start of a unit that no key can be made for. An end without a byte would be an empty
/// credential to it, with which the unit would start; what is above its limit is an error.
async fn refuse(stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let zeros = [0; 8192];
    for _ in 0..=SYSTEMD_MAX / zeros.len() {
        stream.write_all(&zeros).await?;
    }
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    fn parse(name: &str) -> Option<String> {
        CredentialRequest::parse(name.as_bytes()).map(|recipient| recipient.to_string())
    }

    #[test]
    fn a_peer_is_named_as_systemd_names_it() {
        for (name, expected) in [
            ("9f8e7d6c5b4a3210/unit/web.service/cookie.key", "web.service:cookie.key"),
            ("1/unit/web.service/cookie", "web.service:cookie"),
            ("0a/unit/web@a:b\\x2d1.service/a b", "web@a:b\\x2d1.service:a b"),
            ("ffff/unit/dev-sda.swap/k", "dev-sda.swap:k"),
        ] {
            assert_eq!(parse(name).as_deref(), Some(expected), "{name}");
        }
        for malformed in [
            "",
            "1",
            "1/unit/web.service",
            "1/unit/web.service/",
            "1/unit//key",
            "1/unit/web.service/key/more",
            "1/unit/web.service/key/",
            "/unit/web.service/key",
            "g/unit/web.service/key",
            "F/unit/web.service/key",
            "00000000000000000/unit/web.service/key",
            "@1/unit/web.service/key",
            "1/user/web.service/key",
            "1/cryptsetup/volume/key",
            "1/unit/web/key",
            "1/unit/web.target/key",
            "1/unit/.service/key",
            "1/unit/we b.service/key",
            "1/unit/web.service/..",
            "1/unit/web.service/a:b",
            "1/unit/web.service/a\nb",
            "1/unit/web.service/\u{e9}",
            "1/unit/web.service/key\0",
        ] {
            assert_eq!(parse(malformed), None, "{malformed:?}");
        }
        assert_eq!(CredentialRequest::parse(b"1/unit/web.service/\xff"), None);
    }

    #[test]
    fn the_closest_rule_counts() {
        let shape = |length, format| {
            let length = KeyLength::new(length, LENGTH_MAX).unwrap();
            KeySpec::new(Kind::Key, length, format, None).unwrap()
        };
        let rules = CredentialRules::new(BTreeMap::from([
            ("cookie".into(), shape(64, Format::Hex)),
            ("web.service:cookie".into(), shape(16, Format::Base64)),
        ]));
        let of = |unit: &str, credential: &str| {
            rules.shape(&CredentialRequest { unit: unit.into(), credential: credential.into() })
        };
        assert_eq!(of("web.service", "cookie"), shape(16, Format::Base64));
        assert_eq!(of("other.service", "cookie"), shape(64, Format::Hex));
        assert_eq!(of("web.service", "other"), shape(32, Format::Raw));
    }

    /// Takes `room` bytes, in pieces of 10, and fails then, as it does when it is shut down.
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
    async fn what_the_kernel_took_is_noted_and_a_failed_shutdown_changes_nothing() {
        for (room, expected, is_sent) in
            [(100, (32, true), true), (32, (32, true), true), (31, (31, false), false)]
        {
            let mut noted = (0, false);
            let note = |bytes, is_last| noted = (noted.0 + bytes, is_last);
            assert_eq!(send(&mut Failing { room }, &[0; 32], note).await.is_ok(), is_sent);
            assert_eq!(noted, expected, "{room}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_name_is_read_or_refused(name in proptest::collection::vec(any::<u8>(), 0..110)) {
            let _ = CredentialRequest::parse(&name);
        }

        #[test]
        fn what_is_read_is_what_was_written(
            random in "[0-9a-f]{1,16}", stem in "[A-Za-z0-9:_.@\\\\-]{1,20}", credential in "[!-.0-9;-~]{3,20}"
        ) {
            let read = parse(&format!("{random}/unit/{stem}.service/{credential}"));
            let written = format!("{stem}.service:{credential}");
            prop_assert!(is_selector(&written));
            prop_assert_eq!(read, Some(written));
        }
    }
}
