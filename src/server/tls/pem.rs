//! PEM files: certificates and private keys, with errors that say what a file holds instead.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_cert::der::asn1::{ObjectIdentifier, OctetStringRef, UintRef};
use x509_cert::der::{Decode, Header, SliceReader};
use x509_cert::spki::AlgorithmIdentifierRef;
use zeroize::{Zeroize, Zeroizing};

use crate::access::file_source::{FileSource, read_file};

/// The largest file that is read, in bytes: certificates of a chain take a few thousand.
const FILE_MAX: u64 = 1 << 20;

/// The service's own certificate.
///
/// # Errors
/// A sentence, where it can't be read.
pub fn leaf(location: &FileSource) -> Result<CertificateDer<'static>, String> {
    Ok(certificates(location)?.swap_remove(0))
}

/// At least one.
pub(super) fn certificates(location: &FileSource) -> Result<Vec<CertificateDer<'static>>, String> {
    let (text, _) = read(location)?;
    check_pem(&text, location)?;
    let certificates: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&text).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(format!("expected PEM certificates, found {} in {location}", no_pem(&text))),
        Err(error) => Err(format!("expected PEM certificates, found in {location}: {error}")),
    }
}

pub(super) fn private_key(
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

/// The bytes of a file and its mode.
fn read(location: &FileSource) -> Result<(Zeroizing<Vec<u8>>, u32), String> {
    read_file(&location.path()?, FILE_MAX)
}
