//! Handshakes: how many at once, for how long, and whom they show.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::CertificateError;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use crate::server::client_limit::ClientPermit;
use crate::server::close_notify::CloseNotify;
use crate::server::stream::Stream;
use crate::server::timeout_stream::TimeoutStream;
use crate::server::tls::client_name::client_name;
use crate::server::tls::identity::{self, LoadError, LoadedIdentity};
use crate::server::tls::plain_http::refuse_plain_http;
use crate::server::tls::reload::{ReloadError, ReloadableIdentity};
use crate::server::tls::settings::TlsSettings;
use crate::telemetry::metrics::{HandshakeFailure, TlsMetrics};

/// Handshakes at once; further ones wait for their turn with nothing read. A client may send 64 KiB before it has
/// shown who it is, so this bounds that memory to 16 MiB.
const HANDSHAKES: usize = 256;

/// How long a handshake may take while half of them are taken: the turn of those that stall comes to an end soon.
const OVER_LIMIT_TIMEOUT: Duration = Duration::from_secs(1);

/// The identity in use, and the handshakes that show it.
#[derive(Debug)]
pub struct Tls {
    identity: ReloadableIdentity,
    handshakes: Semaphore,
    metrics: TlsMetrics,
}

impl Tls {
    /// Reads the files for the first time.
    ///
    /// # Errors
    /// All that is wrong with them.
    pub fn new(settings: TlsSettings, metrics: TlsMetrics) -> Result<(Self, LoadedIdentity), Vec<LoadError>> {
        let loaded = identity::load(&settings)?;
        metrics.loaded(loaded.not_after().unix_duration().as_secs());
        // aws-lc seeds its generator at the first use, which takes 70 ms: now, and not in a worker with connections. A
        // failure is met again by each handshake, which tells its client.
        let _ = loaded.server.crypto_provider().secure_random.fill(&mut [0]);
        let tls = Self {
            identity: ReloadableIdentity::new(Arc::clone(&loaded.server), settings),
            handshakes: Semaphore::new(HANDSHAKES),
            metrics,
        };
        Ok((tls, loaded))
    }

    /// Reads the files again, those of `settings` where they are given. New handshakes show what was found;
    /// connections that are open go on.
    ///
    /// # Errors
    /// All that is wrong with the files. Those of `settings` have changed nothing then. Of the same files as before, the
    /// client CA is taken without the certificate, and the certificate without the client CA: an error in one must
    /// neither let in the clients of a CA that was removed, nor let a certificate expire.
    pub fn reload(&self, settings: Option<TlsSettings>) -> Result<LoadedIdentity, ReloadError> {
        let result = self.identity.reload(settings);
        let loaded = result.as_ref().map_or_else(|error| error.taken.as_ref(), Some);
        if let Some(loaded) = loaded {
            self.metrics.loaded(loaded.not_after().unix_duration().as_secs());
        }
        if result.is_err() {
            self.metrics.reload_refused();
        }
        result
    }

    /// One handshake, which ends within `patience`, and whom the client's certificate names. `None` where there is no
    /// connection: the client was told why, as far as TLS lets it be told. `share` is that of the connection.
    pub async fn handshake(
        &self,
        stream: TimeoutStream<Stream>,
        patience: Duration,
        share: &ClientPermit,
    ) -> Option<(CloseNotify<TimeoutStream<Stream>>, Option<Arc<str>>)> {
        match self.accept(stream, patience, share).await {
            Ok(done) => {
                self.metrics.handshake_done();
                Some(done)
            }
            Err(error) => {
                self.metrics.handshake_failed(failure(&error));
                debug!(%error, "a handshake failed");
                None
            }
        }
    }

    async fn accept(
        &self,
        stream: TimeoutStream<Stream>,
        patience: Duration,
        share: &ClientPermit,
    ) -> io::Result<(CloseNotify<TimeoutStream<Stream>>, Option<Arc<str>>)> {
        let deadline = Instant::now() + patience;
        // Before its turn: a client that says nothing takes none.
        let first = timeout_at(deadline, stream.get_ref().peek()).await??;
        if first.is_some_and(|byte| byte.is_ascii_uppercase()) {
            // The beginning of a method, where TLS has 0x16. In a box, since most connections never need it.
            let refused = Box::pin(refuse_plain_http(stream));
            let _ = timeout_at(deadline.min(Instant::now() + OVER_LIMIT_TIMEOUT), refused).await; // it is refused either way
            return Err(io::Error::other(PlainHttp));
        }
        // While many are made, those of a client wait for each other first, so that one that stalls them holds up no others.
        let own = if self.is_busy() { share.handshakes() } else { None };
        let _own_turn = match &own {
            Some(turns) => Some(timeout_at(deadline, turns.acquire()).await?),
            None => None,
        };
        let turn = timeout_at(deadline, self.handshakes.acquire()).await?;
        let deadline =
            if self.is_busy() { deadline.min(Instant::now() + OVER_LIMIT_TIMEOUT) } else { deadline };
        let server = self.identity.current();
        let stream = timeout_at(deadline, TlsAcceptor::from(server).accept(stream)).await??;
        let stream = CloseNotify::new(stream);
        drop(turn);
        let shown = stream.connection().peer_certificates().and_then(<[_]>::first);
        let identity = match shown {
            None => None,
            Some(certificate) => Some(client_name(certificate).ok_or_else(|| {
                // Verified, but with nothing to hold it to: no URI, DNS name, address or common name.
                io::Error::other(rustls::Error::InvalidCertificate(CertificateError::BadEncoding))
            })?),
        };
        Ok((stream, identity))
    }

    /// Whether more than half of the handshakes that are made at once are being made.
    fn is_busy(&self) -> bool {
        self.handshakes.available_permits() < HANDSHAKES / 2
    }
}

/// The client speaks plain HTTP.
#[derive(Debug, thiserror::Error)]
#[error("the client speaks plain HTTP")]
struct PlainHttp;

/// Why a handshake failed, as far as it is worth telling apart.
fn failure(error: &io::Error) -> HandshakeFailure {
    use rustls::Error;
    if error.get_ref().is_some_and(|inner| inner.is::<PlainHttp>()) {
        return HandshakeFailure::PlainHttp;
    }
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(Error::InvalidMessage(_)) => HandshakeFailure::Malformed,
        Some(Error::PeerIncompatible(_) | Error::NoApplicationProtocol) => HandshakeFailure::Incompatible,
        Some(Error::NoCertificatesPresented | Error::InvalidCertificate(_)) => {
            HandshakeFailure::ClientCertificate
        }
        Some(Error::AlertReceived(_)) => HandshakeFailure::ClientAlert,
        Some(_) => HandshakeFailure::Other,
        None => match error.kind() {
            io::ErrorKind::TimedOut => HandshakeFailure::Timeout,
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                HandshakeFailure::Closed
            }
            _ => HandshakeFailure::Other,
        },
    }
}
