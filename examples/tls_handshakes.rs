//! A client that opens one TLS connection after the other, for one request each: `benches/compare/run` measures what
//! this costs a server.
//!
//! It offers exactly one version, one cipher suite, one key exchange and no session, so that every server that it is
//! used with does the same work; another server fails the handshake. It prints what was negotiated, and ends with an
//! error unless every response is a 200 with a body of 32 bytes.
//!
//! `tls_handshakes ADDRESS CERTIFICATE GROUP THREADS CONNECTIONS`: each thread opens its share of the connections.

#![expect(clippy::print_stdout, reason = "the benchmark reads what was negotiated")]

use std::env;
use std::error::Error;
use std::fs::read;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// What curl sends, and that the connection is closed.
const REQUEST: &[u8] =
    b"GET /key/32 HTTP/1.1\r\nHost: localhost:1123\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n\
    Connection: close\r\n\r\n";

/// How long a server may take for one step.
const TIMEOUT: Duration = Duration::from_secs(60);

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let [address, certificate, group, threads, connections] = &arguments[..] else {
        return Err("usage: tls_handshakes ADDRESS CERTIFICATE GROUP THREADS CONNECTIONS".into());
    };
    let (address, client) = (address.parse()?, client(certificate, group)?);
    let (threads, connections): (usize, usize) = (threads.parse()?, connections.parse()?);
    let results = thread::scope(|scope| {
        let clients: Vec<_> = (0..threads)
            .map(|_| scope.spawn(|| (0..connections / threads).map(|_| request(&client, address)).collect()))
            .collect();
        clients.into_iter().map(|client| client.join().expect("no client panics")).collect::<Vec<_>>()
    });
    let negotiated = results.into_iter().collect::<Result<Vec<Vec<String>>, Failure>>()?.concat();
    let first = negotiated.first().ok_or("expected at least one connection for each thread")?;
    println!("{} connections, {first}", negotiated.len());
    Ok(())
}

fn client(certificate: &str, group: &str) -> Result<Arc<ClientConfig>, Failure> {
    let mut provider =
        CryptoProvider { cipher_suites: vec![TLS13_AES_256_GCM_SHA384], ..aws_lc_rs::default_provider() };
    provider.kx_groups.retain(|each| format!("{:?}", each.name()) == group);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&read(certificate)?)?)?;
    let mut client = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.resumption = Resumption::disabled();
    Ok(Arc::new(client))
}

/// Sends one request on a new connection, and returns the key exchange and the cipher suite.
fn request(client: &Arc<ClientConfig>, address: SocketAddr) -> Result<String, Failure> {
    let socket = TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    let connection = ClientConnection::new(Arc::clone(client), ServerName::try_from("localhost")?)?;
    let mut stream = StreamOwned::new(connection, socket);
    stream.write_all(REQUEST)?;
    let mut response = Vec::new();
    match stream.read_to_end(&mut response) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => {} // closed without close_notify
        result => _ = result?,
    }
    let body = response.windows(4).position(|four| four == b"\r\n\r\n").map(|end| response.len() - end - 4);
    if !response.starts_with(b"HTTP/1.1 200 ") || body != Some(32) {
        return Err(
            format!("expected 200 and 32 bytes, found {:?}", String::from_utf8_lossy(&response)).into()
        );
    }
    let tls = &stream.conn;
    let (group, suite) = (tls.negotiated_key_exchange_group(), tls.negotiated_cipher_suite());
    let (group, suite) = (group.ok_or("no key exchange")?.name(), suite.ok_or("no cipher suite")?.suite());
    Ok(format!("{group:?} {suite:?}"))
}
