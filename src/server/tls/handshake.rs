//! TLS handshakes: how many at once, for how long, and who the client is.

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
use crate::telemetry::labels::HandshakeError;
use crate::telemetry::metrics::TlsMetrics;

/// Handshakes at once. Further connections wait, and nothing is read from them. A client may send 64 KiB before it is
/// authenticated, so this limits that memory to 16 MiB.
const HANDSHAKES: usize = 256;

/// The time limit of a handshake while more than half of [`HANDSHAKES`] are in progress, so that stalled handshakes
/// soon make room.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);

/// TLS of a server: the identity in use, and the handshakes in progress.
#[derive(Debug)]
pub struct Tls {
    identity: ReloadableIdentity,
    handshakes: Semaphore,
    metrics: TlsMetrics,
}

impl Tls {
    /// Loads the files for the first time.
    ///
    /// # Errors
    /// Every error in the files.
    pub fn new(settings: TlsSettings, metrics: TlsMetrics) -> Result<(Self, LoadedIdentity), Vec<LoadError>> {
        let loaded = identity::load(&settings)?;
        metrics.set_certificate(loaded.not_after().unix_duration().as_secs());
        // aws-lc seeds its generator at the first use, which takes 70 ms: that happens here, and not in a worker with
        // connections. If it fails, each handshake fails again, with an alert to its client.
        let _ = loaded.server.crypto_provider().secure_random.fill(&mut [0]);
        let tls = Self {
            identity: ReloadableIdentity::new(Arc::clone(&loaded.server), settings),
            handshakes: Semaphore::new(HANDSHAKES),
            metrics,
        };
        Ok((tls, loaded))
    }

    /// Loads the files again, or those of new `settings`. New handshakes use them; open connections continue.
    ///
    /// # Errors
    /// Every error in the files. An error in the files of new `settings` changes nothing. Of the same files as before,
    /// a valid client CA is applied without the certificate, and a valid certificate without the client CA: an error in
    /// one of them must neither admit clients of a CA that was removed, nor let a certificate expire.
    pub fn reload(&self, settings: Option<TlsSettings>) -> Result<LoadedIdentity, ReloadError> {
        let result = self.identity.reload(settings);
        let loaded = result.as_ref().map_or_else(|error| error.applied.as_ref(), Some);
        if let Some(loaded) = loaded {
            self.metrics.set_certificate(loaded.not_after().unix_duration().as_secs());
        }
        if result.is_err() {
            self.metrics.set_reload_failed();
        }
        result
    }

    /// Performs a handshake within `timeout`, and returns the connection with the name of the client certificate, if it
    /// has one. `None` if the handshake failed; the client was sent the reason, as far as TLS allows. `permit` is the
    /// permit of this connection.
    pub(crate) async fn handshake(
        &self,
        stream: TimeoutStream<Stream>,
        timeout: Duration,
        permit: &ClientPermit,
    ) -> Option<(CloseNotify<TimeoutStream<Stream>>, Option<Arc<str>>)> {
        match self.accept(stream, timeout, permit).await {
            Ok(accepted) => {
                self.metrics.count_handshake();
                Some(accepted)
            }
            Err(error) => {
                self.metrics.count_error(failure_reason(&error));
                debug!(%error, "TLS handshake failed");
                None
            }
        }
    }

    async fn accept(
        &self,
        stream: TimeoutStream<Stream>,
        timeout: Duration,
        permit: &ClientPermit,
    ) -> io::Result<(CloseNotify<TimeoutStream<Stream>>, Option<Arc<str>>)> {
        let deadline = Instant::now() + timeout;
        // Before the handshake gets a slot: a client that sends nothing takes none.
        let first = timeout_at(deadline, stream.get_ref().peek()).await??;
        if first.is_some_and(|byte| byte.is_ascii_uppercase()) {
            // An HTTP method begins with an uppercase letter, a TLS handshake with 0x16. In a box, because few
            // connections need it.
            let refusal = Box::pin(refuse_plain_http(stream));
            let _ = timeout_at(deadline.min(Instant::now() + BUSY_TIMEOUT), refusal).await; // refused in any case
            return Err(io::Error::other(PlainHttpError));
        }
        // While many handshakes are in progress, those of one client wait for each other first, so that a client that
        // stalls its handshakes does not block others.
        let client_slots = if self.is_busy() { permit.handshakes() } else { None };
        let _client_slot = match &client_slots {
            Some(slots) => Some(timeout_at(deadline, slots.acquire()).await?),
            None => None,
        };
        let slot = timeout_at(deadline, self.handshakes.acquire()).await?;
        let deadline = if self.is_busy() { deadline.min(Instant::now() + BUSY_TIMEOUT) } else { deadline };
        let server = self.identity.current();
        let stream = timeout_at(deadline, TlsAcceptor::from(server).accept(stream)).await??;
        let stream = CloseNotify::new(stream);
        drop(slot);
        let certificate = stream.connection().peer_certificates().and_then(<[_]>::first);
        let name = match certificate {
            None => None,
            Some(certificate) => Some(client_name(certificate).ok_or_else(|| {
                // The certificate is valid, but has no name to record: no URI, DNS name, email address or common name.
                io::Error::other(rustls::Error::InvalidCertificate(CertificateError::BadEncoding))
            })?),
        };
        Ok((stream, name))
    }

    /// Whether more than half of [`HANDSHAKES`] are in progress.
    fn is_busy(&self) -> bool {
        self.handshakes.available_permits() < HANDSHAKES / 2
    }
}

/// The client speaks plain HTTP.
#[derive(Debug, thiserror::Error)]
#[error("the client speaks plain HTTP")]
struct PlainHttpError;

/// The reason of a failed handshake, as the metric counts it.
fn failure_reason(error: &io::Error) -> HandshakeError {
    use rustls::Error;
    if error.get_ref().is_some_and(|inner| inner.is::<PlainHttpError>()) {
        return HandshakeError::PlainHttp;
    }
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(Error::InvalidMessage(_)) => HandshakeError::Malformed,
        Some(Error::PeerIncompatible(_) | Error::NoApplicationProtocol) => HandshakeError::Incompatible,
        Some(Error::NoCertificatesPresented | Error::InvalidCertificate(_)) => {
            HandshakeError::ClientCertificate
        }
        Some(Error::AlertReceived(_)) => HandshakeError::ClientAlert,
        Some(_) => HandshakeError::Other,
        None => match error.kind() {
            io::ErrorKind::TimedOut => HandshakeError::Timeout,
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                HandshakeError::Closed
            }
            _ => HandshakeError::Other,
        },
    }
}
