//! Certificates that the test creates, and a TLS client.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion};

use super::{Client, Daemon, TIMEOUT, TempDirectory};

pub type TlsStream = StreamOwned<ClientConnection, TcpStream>;

/// A certificate authority.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, as PEM.
pub struct Identity {
    pub certificate: String,
    pub key: String,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // The name must be unique: clients find the issuer by it.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("authority {}", NEXT.fetch_add(1, Ordering::Relaxed));
        params.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    pub fn issue(&self, prepare: impl FnOnce(&mut CertificateParams)) -> Identity {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        prepare(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Identity { certificate: certificate.pem(), key: key.serialize_pem() }
    }

    /// Issues a certificate for a server at 127.0.0.1.
    pub fn server(&self) -> Identity {
        self.issue(|params| {
            params.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())];
        })
    }

    /// Issues a certificate for a client with this name.
    pub fn client(&self, name: &str) -> Identity {
        self.issue(|params| params.distinguished_name.push(DnType::CommonName, name))
    }

    pub fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        roots
    }
}

impl Identity {
    /// Writes cert.pem and key.pem to `directory`.
    pub fn write(&self, directory: &TempDirectory) {
        directory.write_secret("cert.pem", &self.certificate);
        directory.write_secret("key.pem", &self.key);
    }

    pub fn der(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(self.certificate.as_bytes()).unwrap()
    }
}

/// The configuration of a client that trusts `authority`, with or without a client certificate.
pub fn client_config(
    authority: &Authority,
    versions: &[&'static SupportedProtocolVersion],
    identity: Option<&Identity>,
) -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(authority.roots());
    Arc::new(match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
            builder.with_client_auth_cert(vec![identity.der()], key).unwrap()
        }
    })
}

pub fn connect(address: SocketAddr, config: &Arc<ClientConfig>) -> Client<TlsStream> {
    connect_over(TcpStream::connect(address).unwrap(), config)
}

/// Uses TLS on an open connection.
pub fn connect_over(stream: TcpStream, config: &Arc<ClientConfig>) -> Client<TlsStream> {
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.set_nodelay(true).unwrap();
    let name = ServerName::from(stream.peer_addr().unwrap().ip());
    Client::new(StreamOwned::new(ClientConnection::new(Arc::clone(config), name).unwrap(), stream))
}

/// Starts a daemon with a new certificate from `authority`.
pub fn daemon(authority: &Authority, settings: &[(&str, &str)]) -> Daemon {
    let directory = TempDirectory::new();
    authority.server().write(&directory);
    start(directory, settings)
}

/// Starts a daemon with the cert.pem and key.pem in its directory.
pub fn start(directory: TempDirectory, settings: &[(&str, &str)]) -> Daemon {
    let (certificate, key) = (directory.file("cert.pem"), directory.file("key.pem"));
    Daemon::start_with(directory, |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
        command.env("KEYSERVICE_TLS_CERT", certificate).env("KEYSERVICE_TLS_KEY", key);
        for (name, value) in settings {
            command.env(format!("KEYSERVICE_{name}"), value);
        }
    })
}
