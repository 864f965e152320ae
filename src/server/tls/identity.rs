//! What the service shows to its clients and asks of them: certificate, key and client CAs, loaded and checked.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::CertificateDer;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{InconsistentKeys, RootCertStore, ServerConfig};
use x509_cert::Certificate;
use x509_cert::der::{DateTime, Decode};

use crate::access::file_source::FileSource;
use crate::server::timeout_stream::WRITE_MAX;
use crate::server::tls::pem::{certificates, private_key};
use crate::server::tls::settings::{MinVersion, TlsSettings};

/// A certificate that is valid for less than this is warned of: the time to find out why nothing has renewed it.
const EXPIRES_SOON: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// What is wrong with one of the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    /// Which one it is.
    pub part: TlsFile,
    /// What was expected, and what was found where.
    pub sentence: String,
}

/// One of the files of [`TlsSettings`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsFile {
    /// [`TlsSettings::certificate`]
    Certificate,
    /// [`TlsSettings::key`]
    Key,
    /// [`TlsSettings::client_ca`]
    ClientCa,
}

/// What the files of [`TlsSettings`] hold, found to fit together.
#[derive(Debug, Clone)]
pub struct LoadedIdentity {
    pub(super) server: Arc<ServerConfig>,
    /// When the whole chain begins and ends to be valid.
    pub(super) validity: Validity,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Validity {
    not_before: SystemTime,
    not_after: DateTime,
}

impl LoadedIdentity {
    /// When the first certificate of the chain expires. Its text is RFC 3339's.
    pub fn not_after(&self) -> DateTime {
        self.validity.not_after
    }

    /// What a client will not like about the certificate today or soon, as a sentence.
    pub fn warning(&self) -> Option<&'static str> {
        let Validity { not_before, not_after } = self.validity;
        let now = SystemTime::now();
        if now > not_after.to_system_time() {
            Some("the TLS certificate has expired: clients will refuse it")
        } else if now < not_before {
            Some("the TLS certificate is not valid yet: clients will refuse it")
        } else if now + EXPIRES_SOON > not_after.to_system_time() {
            Some("the TLS certificate expires in less than 7 days")
        } else {
            None
        }
    }
}

/// Reads the files.
///
/// # Errors
/// All that is wrong with them.
pub fn load(settings: &TlsSettings) -> Result<LoadedIdentity, Vec<LoadError>> {
    whole(load_parts(settings), settings.min_version)
}

/// Certificate and key, found to belong together.
#[derive(Debug)]
pub(super) struct ServerIdentity {
    pub(super) resolver: Arc<dyn ResolvesServerCert>,
    pub(super) validity: Validity,
}

/// Both halves of what the files hold; each is in order or not by itself.
pub(super) type Parts =
    (Result<ServerIdentity, Vec<LoadError>>, Result<Arc<dyn ClientCertVerifier>, LoadError>);

pub(super) fn load_parts(settings: &TlsSettings) -> Parts {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let clients = match &settings.client_ca {
        None => Ok(WebPkiClientVerifier::no_client_auth()),
        Some(location) => {
            verifier(location, &provider).map_err(|sentence| LoadError { part: TlsFile::ClientCa, sentence })
        }
    };
    (load_identity(settings, &provider), clients)
}

pub(super) fn whole(parts: Parts, min_version: MinVersion) -> Result<LoadedIdentity, Vec<LoadError>> {
    match parts {
        (Ok(ServerIdentity { resolver, validity }), Ok(clients)) => {
            Ok(LoadedIdentity { server: server_config(resolver, clients, min_version), validity })
        }
        (identity, clients) => Err(identity.err().into_iter().flatten().chain(clients.err()).collect()),
    }
}

fn load_identity(
    settings: &TlsSettings,
    provider: &CryptoProvider,
) -> Result<ServerIdentity, Vec<LoadError>> {
    let mut faults = Vec::new();
    let mut fault = |part, sentence| faults.push(LoadError { part, sentence });

    let chain = certificates(&settings.certificate).and_then(|chain| Ok((validity(&chain)?, chain)));
    let chain = chain.map_err(|sentence| fault(TlsFile::Certificate, sentence)).ok();
    let key = private_key(&settings.key, provider).map_err(|sentence| fault(TlsFile::Key, sentence)).ok();
    let (Some((validity, chain)), Some(key)) = (chain, key) else {
        return Err(faults);
    };
    let certified = CertifiedKey::new(chain, key);
    match certified.keys_match() {
        Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => {}
        Err(rustls::Error::InconsistentKeys(_)) => {
            let (key, certificate) = (&settings.key, &settings.certificate);
            let is_own = |other: &CertificateDer<'static>| {
                CertifiedKey::new(vec![other.clone()], Arc::clone(&certified.key)).keys_match().is_ok()
            };
            match certified.cert.iter().position(is_own) {
                Some(own) => fault(
                    TlsFile::Certificate,
                    format!(
                        "expected the certificate of the key in {key} first, then those that lead to its root, found it as \
                         number {} in {certificate}",
                        own + 1
                    ),
                ),
                None => fault(
                    TlsFile::Key,
                    format!(
                        "expected the key of the first certificate in {certificate}, found another in {key}"
                    ),
                ),
            }
            return Err(faults);
        }
        Err(error) => {
            let location = &settings.certificate;
            fault(
                TlsFile::Certificate,
                format!("expected a certificate of a server in {location}, found {error}"),
            );
            return Err(faults);
        }
    }

    Ok(ServerIdentity { resolver: Arc::new(SingleCertAndKey::from(certified)), validity })
}

pub(super) fn server_config(
    identity: Arc<dyn ResolvesServerCert>,
    clients: Arc<dyn ClientCertVerifier>,
    min_version: MinVersion,
) -> Arc<ServerConfig> {
    let mut server = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(min_version.versions())
        .expect("the provider has cipher suites and key exchanges for both versions")
        .with_client_cert_verifier(clients)
        .with_cert_resolver(identity);
    // HTTP/2 would leave keys in memory. Old clients, such as `curl --http1.0` of Debian 12, offer HTTP/1.0 and no other.
    server.alpn_protocols = vec![b"http/1.1".to_vec(), b"http/1.0".to_vec()];
    // No session is resumed: a ticket would keep a secret past its connection, and let a client in whose certificate
    // has expired or whose CA is gone. Keep-alive is what saves handshakes here.
    server.session_storage = Arc::new(NoServerSessionStorage {});
    // A client has to receive a whole record before it can use a byte of it, and acknowledges in such steps: a slow one must
    // be done with one well within the write timeout.
    server.max_fragment_size = Some(WRITE_MAX);
    Arc::new(server)
}

fn verifier(
    location: &FileSource,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let unfit = |error: String| format!("expected certificates of CAs, found in {location}: {error}");
    let mut roots = RootCertStore::empty();
    for certificate in certificates(location)? {
        roots.add(certificate).map_err(|error| unfit(error.to_string()))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .build()
        .map_err(|error| unfit(error.to_string()))
}

/// From the last beginning to the first end in `chain`.
fn validity(chain: &[CertificateDer<'_>]) -> Result<Validity, String> {
    let mut whole = Validity { not_before: SystemTime::UNIX_EPOCH, not_after: DateTime::INFINITY };
    for certificate in chain {
        let certificate = Certificate::from_der(certificate)
            .map_err(|error| format!("expected X.509 certificates, found one that can't be read: {error}"))?;
        let validity = certificate.tbs_certificate.validity;
        whole.not_before = whole.not_before.max(validity.not_before.to_date_time().to_system_time());
        whole.not_after = whole.not_after.min(validity.not_after.to_date_time());
    }
    Ok(whole)
}
