//! Who the service is to its clients, and who they are to it: certificates, client CAs, handshakes, reload.

use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, InconsistentKeys, RootCertStore, ServerConfig,
    SignatureScheme, SupportedProtocolVersion,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsAcceptor;
use tracing::debug;
use x509_cert::Certificate;
use x509_cert::der::asn1::{ObjectIdentifier, OctetStringRef, UintRef};
use x509_cert::der::{DateTime, Decode, Header, SliceReader, Tag, Tagged};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::spki::AlgorithmIdentifierRef;
use zeroize::{Zeroize, Zeroizing};

use crate::access::file_source::FileSource;
use crate::server::client_limit::ClientPermit;
use crate::server::close_notify::CloseNotify;
use crate::server::listener::Stream;
use crate::server::timeouts::{TimeoutStream, WRITE_MAX};
use crate::telemetry::metrics::{HandshakeFailure, TlsMetrics};

/// The largest file that is read, in bytes: certificates of a chain take a few thousand.
const FILE_MAX: u64 = 1 << 20;

/// Handshakes at once; further ones wait for their turn with nothing read. A client may send 64 KiB before it has
/// shown who it is, so this bounds that memory to 16 MiB.
const HANDSHAKES: usize = 256;

/// How long a handshake may take while half of them are taken: the turn of those that stall comes to an end soon.
const OVER_LIMIT_TIMEOUT: Duration = Duration::from_secs(1);

/// A certificate that is valid for less than this is warned of: the time to find out why nothing has renewed it.
const EXPIRES_SOON: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// The longest name of a client that is taken from its certificate, in bytes.
const IDENTITY_MAX: usize = 256;

static TLS13_ONLY: &[&SupportedProtocolVersion] = &[&TLS13];

/// Common name (RFC 5280 appendix A.1).
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// Which files make the service's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSettings {
    /// PEM certificates: the service's own, then those that lead to its root.
    pub certificate: FileSource,
    /// Its PEM private key.
    pub key: FileSource,
    /// PEM certificates of those who vouch for clients; where there are some, every client has to show one of theirs.
    pub client_ca: Option<FileSource>,
    /// The oldest version of TLS that is spoken.
    pub min_version: MinVersion,
}

/// The oldest version of TLS that is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::Display, strum::EnumString)]
pub enum MinVersion {
    /// TLS 1.2 (RFC 5246), for clients that know no better.
    #[strum(serialize = "1.2")]
    Tls12,
    /// TLS 1.3 (RFC 8446).
    #[strum(serialize = "1.3")]
    Tls13,
}

impl TlsSettings {
    /// Where the files are.
    pub fn files(&self) -> impl Iterator<Item = &FileSource> {
        [&self.certificate, &self.key].into_iter().chain(&self.client_ca)
    }
}

impl MinVersion {
    fn versions(self) -> &'static [&'static SupportedProtocolVersion] {
        match self {
            Self::Tls12 => rustls::ALL_VERSIONS,
            Self::Tls13 => TLS13_ONLY,
        }
    }
}

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
    server: Arc<ServerConfig>,
    /// When the whole chain begins and ends to be valid.
    validity: Validity,
}

#[derive(Debug, Clone, Copy)]
struct Validity {
    not_before: SystemTime,
    not_after: DateTime,
}

/// Why a reload did not take all that the files hold.
#[derive(Debug)]
pub struct ReloadError {
    /// All that is wrong with them.
    pub faults: Vec<LoadError>,
    /// The certificate, where it is in use without the client CA that was found beside it.
    pub taken: Option<LoadedIdentity>,
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
struct ServerIdentity {
    resolver: Arc<dyn ResolvesServerCert>,
    validity: Validity,
}

/// Both halves of what the files hold; each is in order or not by itself.
type Parts = (Result<ServerIdentity, Vec<LoadError>>, Result<Arc<dyn ClientCertVerifier>, LoadError>);

fn load_parts(settings: &TlsSettings) -> Parts {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let clients = match &settings.client_ca {
        None => Ok(WebPkiClientVerifier::no_client_auth()),
        Some(location) => {
            verifier(location, &provider).map_err(|sentence| LoadError { part: TlsFile::ClientCa, sentence })
        }
    };
    (load_identity(settings, &provider), clients)
}

fn whole(parts: Parts, min_version: MinVersion) -> Result<LoadedIdentity, Vec<LoadError>> {
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

fn server_config(
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

/// The identity in use, and the handshakes that show it.
#[derive(Debug)]
pub struct Tls {
    server: RwLock<Arc<ServerConfig>>,
    /// The files that it came from.
    files: Mutex<TlsSettings>,
    handshakes: Semaphore,
    metrics: TlsMetrics,
}

impl Tls {
    /// Reads the files for the first time.
    ///
    /// # Errors
    /// All that is wrong with them.
    pub fn new(settings: TlsSettings, metrics: TlsMetrics) -> Result<(Self, LoadedIdentity), Vec<LoadError>> {
        let loaded = load(&settings)?;
        metrics.loaded(loaded.not_after().unix_duration().as_secs());
        // aws-lc seeds its generator at the first use, which takes 70 ms: now, and not in a worker with connections. A
        // failure is met again by each handshake, which tells its client.
        let _ = loaded.server.crypto_provider().secure_random.fill(&mut [0]);
        let tls = Self {
            server: RwLock::new(Arc::clone(&loaded.server)),
            files: Mutex::new(settings),
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
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let takes_half = settings.is_none();
        let wanted = settings.unwrap_or_else(|| files.clone());
        let found = load_parts(&wanted);
        let mut server = self.server.write().unwrap_or_else(PoisonError::into_inner);
        let mut taken = None;
        match &found {
            (Ok(_), Ok(_)) => {}
            (Ok(identity), Err(_)) if takes_half => {
                let mut renewed = ServerConfig::clone(&server);
                renewed.cert_resolver = Arc::clone(&identity.resolver);
                *server = Arc::new(renewed);
                self.metrics.loaded(identity.validity.not_after.unix_duration().as_secs());
                taken = Some(LoadedIdentity { server: Arc::clone(&server), validity: identity.validity });
            }
            (Err(_), Ok(clients)) if takes_half => {
                *server =
                    server_config(Arc::clone(&server.cert_resolver), Arc::clone(clients), wanted.min_version);
            }
            _ => {}
        }
        let loaded = whole(found, wanted.min_version).map_err(|faults| {
            self.metrics.reload_refused();
            ReloadError { faults, taken }
        })?;
        *server = Arc::clone(&loaded.server);
        self.metrics.loaded(loaded.not_after().unix_duration().as_secs());
        *files = wanted;
        Ok(loaded)
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
        let server = Arc::clone(&self.server.read().unwrap_or_else(PoisonError::into_inner));
        let stream = timeout_at(deadline, TlsAcceptor::from(server).accept(stream)).await??;
        let stream = CloseNotify::new(stream);
        drop(turn);
        let shown = stream.connection().peer_certificates().and_then(<[_]>::first);
        let identity = match shown {
            None => None,
            Some(certificate) => Some(identity(certificate).ok_or_else(|| {
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

/// What a client is told that speaks plain HTTP.
pub const PLAIN_HTTP_DETAIL: &str = "This port speaks TLS: use https://";

/// Tells a client that speaks plain HTTP to use TLS, in the only words that it understands. Its request is not looked at.
async fn refuse_plain_http(mut stream: TimeoutStream<Stream>) -> io::Result<()> {
    let body = format!(r#"{{"title":"Bad Request","status":400,"detail":"{PLAIN_HTTP_DETAIL}"}}"#);
    let date = httpdate::HttpDate::from(SystemTime::now());
    let response = format!(
        "HTTP/1.1 400 Bad Request\r\n\
         content-type: application/problem+json\r\n\
         cache-control: no-store\r\n\
         x-content-type-options: nosniff\r\n\
         connection: close\r\n\
         content-length: {}\r\n\
         date: {date}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(response.as_bytes()).await?;
    stream.shutdown().await?;
    // A request that is not read resets the connection, and may take the response with it. It may have a token: wiped.
    let mut request = Zeroizing::new([0; 1024]);
    while stream.read(&mut request[..]).await? > 0 {}
    Ok(())
}

/// The configuration of a client that takes exactly `certificate`, whatever name it bears and whoever vouches for it.
pub fn pinned_client(certificate: CertificateDer<'static>) -> Arc<ClientConfig> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let algorithms = provider.signature_verification_algorithms;
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(MinVersion::Tls12.versions())
        .expect("the provider has cipher suites and key exchanges for both versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pin { certificate, algorithms }))
        .with_no_client_auth();
    client.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(client)
}

/// The service's own certificate.
///
/// # Errors
/// A sentence, where it can't be read.
pub fn leaf(location: &FileSource) -> Result<CertificateDer<'static>, String> {
    Ok(certificates(location)?.swap_remove(0))
}

/// The server has to be the one with this certificate and its key.
#[derive(Debug)]
struct Pin {
    certificate: CertificateDer<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Pin {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if *end_entity == self.certificate {
            return Ok(ServerCertVerified::assertion());
        }
        Err(rustls::Error::General("expected the certificate that is configured, found another".into()))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// At least one.
fn certificates(location: &FileSource) -> Result<Vec<CertificateDer<'static>>, String> {
    let (text, _) = read(location)?;
    check_pem(&text, location)?;
    let certificates: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&text).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(format!("expected PEM certificates, found {} in {location}", no_pem(&text))),
        Err(error) => Err(format!("expected PEM certificates, found in {location}: {error}")),
    }
}

fn private_key(
    location: &FileSource,
    provider: &CryptoProvider,
) -> Result<Arc<dyn rustls::sign::SigningKey>, String> {
    let (text, mode) = read(location)?;
    if mode & 0o007 != 0 {
        let path = location.path()?.display().to_string();
        return Err(format!(
            "expected a key that others have no access to, found mode {:04o}: chmod o= {path}",
            mode & 0o7777
        ));
    }
    check_pem(&text, location)?;
    // In PKCS #8 and in the older form of OpenSSL.
    let is_encrypted = contains(&text, b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
        || contains(&text, b"Proc-Type: 4,ENCRYPTED");
    let mut key = PrivateKeyDer::from_pem_slice(&text).map_err(|error| match error {
        _ if is_encrypted => {
            format!(
                "expected a PEM private key without a passphrase, found one with a passphrase in {location}"
            )
        }
        pem::Error::NoItemsFound => {
            format!("expected a PEM private key without a passphrase, found {} in {location}", no_pem(&text))
        }
        // What the parser says of a line might show a piece of the key.
        _ => format!("expected a PEM private key, found malformed PEM in {location}"),
    })?;
    let loaded = provider.key_provider.load_private_key(key.clone_key());
    let loaded = loaded.map_err(|_| {
        let found = kind(&key).unwrap_or_else(|| "a malformed one".into());
        format!(
            "expected a private key of RSA (2048 to 8192 bits), ECDSA (P-256, P-384 or P-521) or Ed25519, found {found} in \
             {location}"
        )
    });
    key.zeroize();
    loaded
}

/// The kind of a key: its size if it is an RSA key, else the number of its algorithm. Nothing of the key itself.
fn kind(key: &PrivateKeyDer<'_>) -> Option<String> {
    const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
    let sequence = |der| {
        let mut fields = SliceReader::new(der).ok()?;
        Header::decode(&mut fields).ok()?;
        u8::decode(&mut fields).ok()?; // the version
        Some(fields)
    };
    let rsa = |der| {
        let modulus = UintRef::decode(&mut sequence(der)?).ok()?;
        let bits = modulus.as_bytes().len() * 8 - modulus.as_bytes().first()?.leading_zeros() as usize;
        Some(format!("an RSA key of {bits} bits"))
    };
    match key {
        PrivateKeyDer::Pkcs1(key) => rsa(key.secret_pkcs1_der()),
        PrivateKeyDer::Pkcs8(key) => {
            let mut fields = sequence(key.secret_pkcs8_der())?;
            let algorithm = AlgorithmIdentifierRef::decode(&mut fields).ok()?;
            if algorithm.oid == RSA {
                return rsa(OctetStringRef::decode(&mut fields).ok()?.as_bytes());
            }
            let curve = algorithm
                .parameters_oid()
                .map_or_else(|_| String::new(), |curve| format!(" on curve {curve}"));
            Some(format!("a key of algorithm {}{curve}", algorithm.oid))
        }
        _ => Some("an EC key on another curve".into()),
    }
}

/// Whether the parser sees each block: it skips one that does not begin a line, and other labels.
///
/// If it skipped the first certificate, the next one would take its place.
fn check_pem(text: &[u8], location: &FileSource) -> Result<(), String> {
    const BEGIN: &[u8] = b"-----BEGIN ";
    let lines = text.split(|byte| *byte == b'\n').zip(1..);
    for (line, number) in lines {
        let Some(at) = line.windows(BEGIN.len()).position(|part| part == BEGIN) else { continue };
        let (before, label) = (&line[..at], line[at + BEGIN.len()..].trim_ascii());
        let found = if before.ends_with(BOM) {
            "a byte order mark (U+FEFF) before it".to_owned()
        } else if !before.is_empty() && before.trim_ascii().is_empty() {
            "spaces before it".to_owned()
        } else if before.is_empty()
            && (label == b"TRUSTED CERTIFICATE-----" || label == b"X509 CERTIFICATE-----")
        {
            format!("-----BEGIN {}", label.escape_ascii())
        } else {
            continue;
        };
        return Err(format!(
            "expected -----BEGIN CERTIFICATE----- or a key's at the beginning of line {number}, found {found} in {location}"
        ));
    }
    Ok(())
}

/// UTF-8's byte order mark, which some editors write.
const BOM: &[u8] = "\u{feff}".as_bytes();

/// What a file is that has no PEM.
fn no_pem(bytes: &[u8]) -> &'static str {
    match bytes {
        [] => "an empty file",
        [0x30, 0x80..=0x84, ..] => "DER",
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "UTF-16",
        _ => "none",
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
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

/// The bytes of a file and its mode.
fn read(location: &FileSource) -> Result<(Zeroizing<Vec<u8>>, u32), String> {
    crate::access::file_source::read_file(&location.path()?, FILE_MAX)
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

/// Whom a certificate names, with the kind of the name before it: its first URI, else DNS name, else mail address,
/// else common name.
///
/// The kind tells a common name that looks like a URI from a URI, which a CA may guard better.
fn identity(certificate: &CertificateDer<'_>) -> Option<Arc<str>> {
    let certificate = Certificate::from_der(certificate).ok()?.tbs_certificate;
    let alternatives =
        certificate.get::<SubjectAltName>().ok()?.map(|(_, names)| names.0).unwrap_or_default();
    let first = |kind: fn(&GeneralName) -> Option<String>| alternatives.iter().find_map(kind);
    let uri = first(|name| match name {
        GeneralName::UniformResourceIdentifier(uri) => printable("URI", uri.as_str()),
        _ => None,
    });
    let dns = || {
        first(|name| match name {
            GeneralName::DnsName(host) => printable("DNS", host.as_str()),
            _ => None,
        })
    };
    let mail = || {
        first(|name| match name {
            GeneralName::Rfc822Name(address) => printable("email", address.as_str()),
            _ => None,
        })
    };
    let common = || {
        let attributes = certificate.subject.0.iter().flat_map(|set| set.0.iter());
        attributes.filter(|attribute| attribute.oid == COMMON_NAME).find_map(|attribute| {
            let is_text =
                matches!(attribute.value.tag(), Tag::Utf8String | Tag::PrintableString | Tag::Ia5String);
            let text = std::str::from_utf8(attribute.value.value()).ok().filter(|_| is_text)?;
            printable("CN", text)
        })
    };
    uri.or_else(dns).or_else(mail).or_else(common).map(Into::into)
}

/// `kind:name`, where the name is neither empty nor too long; what is not printable ASCII is escaped.
fn printable(kind: &str, name: &str) -> Option<String> {
    let mut text = format!("{kind}:");
    for char in name.chars() {
        match char {
            ' '..='~' if char != '\\' => text.push(char),
            _ => text.extend(char.escape_unicode()),
        }
    }
    (!name.is_empty() && text.len() <= IDENTITY_MAX).then_some(text)
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    fn named(prepare: impl FnOnce(&mut CertificateParams)) -> Option<String> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        prepare(&mut params);
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        identity(certificate.der()).map(|name| name.to_string())
    }

    #[test]
    fn a_client_is_named_by_the_strongest_name_of_its_certificate() {
        let uri = || SanType::URI("spiffe://example.org/web".try_into().unwrap());
        let dns = || SanType::DnsName("web.example.org".try_into().unwrap());
        let mail = || SanType::Rfc822Name("web@example.org".try_into().unwrap());
        let common = |params: &mut CertificateParams, name: &str| {
            params.distinguished_name.push(DnType::CommonName, name);
        };
        assert_eq!(
            named(|params| {
                common(params, "web");
                params.subject_alt_names = vec![mail(), dns(), uri()];
            }),
            Some("URI:spiffe://example.org/web".into())
        );
        assert_eq!(
            named(|params| params.subject_alt_names = vec![mail(), dns()]),
            Some("DNS:web.example.org".into())
        );
        assert_eq!(
            named(|params| params.subject_alt_names = vec![mail()]),
            Some("email:web@example.org".into())
        );
        assert_eq!(named(|params| common(params, "web")), Some("CN:web".into()));
        assert_eq!(
            named(|params| common(params, "URI:x")),
            Some("CN:URI:x".into()),
            "it can't pose as another kind"
        );
        assert_eq!(named(|_| {}), None);
    }

    #[test]
    fn a_name_is_printable_and_bounded() {
        assert_eq!(printable("CN", "Zo\u{eb}\n\\"), Some("CN:Zo\\u{eb}\\u{a}\\u{5c}".into()));
        assert_eq!(printable("CN", ""), None);
        assert_eq!(printable("CN", &"x".repeat(IDENTITY_MAX - 3)).unwrap().len(), IDENTITY_MAX);
        assert_eq!(printable("CN", &"x".repeat(IDENTITY_MAX - 2)), None);
    }
}
