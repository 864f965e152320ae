//! The certificate and key that the service shows to clients, and the CAs that client certificates need: loaded from
//! files and checked.

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

/// A certificate that expires within this time causes a warning: enough to find out why nothing has renewed it.
const EXPIRES_SOON: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// An error in one of the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    /// The file.
    pub file: TlsFile,
    /// What was expected, what was found, and where.
    pub message: String,
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

/// The contents of the files of [`TlsSettings`], which match each other.
#[derive(Debug, Clone)]
pub struct LoadedIdentity {
    pub(super) server: Arc<ServerConfig>,
    pub(super) validity: Validity,
}

/// When every certificate of a chain is valid.
#[derive(Debug, Clone, Copy)]
pub(super) struct Validity {
    not_before: SystemTime,
    not_after: DateTime,
}

impl LoadedIdentity {
    /// When the first certificate of the chain expires. `Display` formats it by RFC 3339.
    pub fn not_after(&self) -> DateTime {
        self.validity.not_after
    }

    /// Why clients will refuse the certificate, now or soon.
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

/// Loads the files.
///
/// # Errors
/// Every error in the files.
pub fn load(settings: &TlsSettings) -> Result<LoadedIdentity, Vec<LoadError>> {
    LoadedFiles::load(settings).into_identity(settings.min_version)
}

/// The contents of the files. Either half can be valid without the other.
#[derive(Debug)]
pub(super) struct LoadedFiles {
    pub(super) certificate: Result<LoadedCertificate, Vec<LoadError>>,
    pub(super) client_verifier: Result<Arc<dyn ClientCertVerifier>, LoadError>,
}

/// The certificate and its key, which match.
#[derive(Debug)]
pub(super) struct LoadedCertificate {
    pub(super) resolver: Arc<dyn ResolvesServerCert>,
    pub(super) validity: Validity,
}

impl LoadedFiles {
    pub(super) fn load(settings: &TlsSettings) -> Self {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let client_verifier = match &settings.client_ca {
            None => Ok(WebPkiClientVerifier::no_client_auth()),
            Some(source) => client_verifier(source, &provider)
                .map_err(|message| LoadError { file: TlsFile::ClientCa, message }),
        };
        Self { certificate: load_certificate(settings, &provider), client_verifier }
    }

    pub(super) fn into_identity(self, min_version: MinVersion) -> Result<LoadedIdentity, Vec<LoadError>> {
        match (self.certificate, self.client_verifier) {
            (Ok(LoadedCertificate { resolver, validity }), Ok(client_verifier)) => {
                Ok(LoadedIdentity { server: server_config(resolver, client_verifier, min_version), validity })
            }
            (certificate, client_verifier) => {
                Err(certificate.err().into_iter().flatten().chain(client_verifier.err()).collect())
            }
        }
    }
}

/// The TLS configuration of a server with this certificate and this check of client certificates.
pub(super) fn server_config(
    certificate: Arc<dyn ResolvesServerCert>,
    client_verifier: Arc<dyn ClientCertVerifier>,
    min_version: MinVersion,
) -> Arc<ServerConfig> {
    let mut server = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(min_version.versions())
        .expect("the provider has cipher suites and key exchanges for both versions")
        .with_client_cert_verifier(client_verifier)
        .with_cert_resolver(certificate);
    // HTTP/2 would leave keys in memory. Old clients, such as `curl --http1.0` of Debian 12, offer HTTP/1.0 and no
    // other.
    server.alpn_protocols = vec![b"http/1.1".to_vec(), b"http/1.0".to_vec()];
    // No session is resumed: a ticket would keep a secret beyond its connection, and would admit a client whose
    // certificate has expired or whose CA was removed. Keep-alive saves handshakes instead.
    server.session_storage = Arc::new(NoServerSessionStorage {});
    // A client can use a record only once it has all of it, and acknowledges in such steps: a slow client must be able
    // to receive one well within the write timeout.
    server.max_fragment_size = Some(WRITE_MAX);
    Arc::new(server)
}

fn load_certificate(
    settings: &TlsSettings,
    provider: &CryptoProvider,
) -> Result<LoadedCertificate, Vec<LoadError>> {
    let mut errors = Vec::new();
    let mut add_error = |file, message| errors.push(LoadError { file, message });
    let chain = certificates(&settings.certificate).and_then(|chain| Ok((validity(&chain)?, chain)));
    let chain = chain.map_err(|message| add_error(TlsFile::Certificate, message)).ok();
    let key = private_key(&settings.key, provider).map_err(|message| add_error(TlsFile::Key, message)).ok();
    let (Some((validity, chain)), Some(key)) = (chain, key) else {
        return Err(errors);
    };
    let certified = CertifiedKey::new(chain, key);
    check_match(&certified, settings).map_err(|error| vec![error])?;
    Ok(LoadedCertificate { resolver: Arc::new(SingleCertAndKey::from(certified)), validity })
}

/// Whether the key belongs to the first certificate.
fn check_match(certified: &CertifiedKey, settings: &TlsSettings) -> Result<(), LoadError> {
    let TlsSettings { certificate, key, .. } = settings;
    let (file, message) = match certified.keys_match() {
        Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => return Ok(()),
        Err(rustls::Error::InconsistentKeys(_)) => {
            let matches_key = |other: &CertificateDer<'static>| {
                CertifiedKey::new(vec![other.clone()], Arc::clone(&certified.key)).keys_match().is_ok()
            };
            match certified.cert.iter().position(matches_key) {
                Some(index) => (
                    TlsFile::Certificate,
                    format!(
                        "expected the certificate of the key in {key} first, then those that lead to its root, found it as \
                         number {} in {certificate}",
                        index + 1
                    ),
                ),
                None => (
                    TlsFile::Key,
                    format!(
                        "expected the key of the first certificate in {certificate}, found another in {key}"
                    ),
                ),
            }
        }
        Err(error) => (
            TlsFile::Certificate,
            format!("expected a certificate of a server in {certificate}, found {error}"),
        ),
    };
    Err(LoadError { file, message })
}

fn client_verifier(
    source: &FileSource,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let invalid = |error: String| format!("expected certificates of CAs, found in {source}: {error}");
    let mut roots = RootCertStore::empty();
    for certificate in certificates(source)? {
        roots.add(certificate).map_err(|error| invalid(error.to_string()))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .build()
        .map_err(|error| invalid(error.to_string()))
}

/// From the latest `notBefore` to the earliest `notAfter` of `chain`.
fn validity(chain: &[CertificateDer<'_>]) -> Result<Validity, String> {
    let mut chain_validity = Validity { not_before: SystemTime::UNIX_EPOCH, not_after: DateTime::INFINITY };
    for certificate in chain {
        let certificate = Certificate::from_der(certificate)
            .map_err(|error| format!("expected X.509 certificates, found one that can't be read: {error}"))?;
        let validity = certificate.tbs_certificate.validity;
        chain_validity.not_before =
            chain_validity.not_before.max(validity.not_before.to_date_time().to_system_time());
        chain_validity.not_after = chain_validity.not_after.min(validity.not_after.to_date_time());
    }
    Ok(chain_validity)
}
