//! Certificates and private keys from PEM files, with errors that say what a file has instead.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_cert::der::asn1::{ObjectIdentifier, OctetStringRef, UintRef};
use x509_cert::der::{Decode, Header, SliceReader};
use x509_cert::spki::AlgorithmIdentifierRef;
use zeroize::{Zeroize, Zeroizing};

use crate::access::file_source::{FileSource, read_file};

/// The largest file that is accepted, in bytes. A certificate chain has a few thousand.
const FILE_MAX: u64 = 1 << 20;

/// The first certificate of a file: the service's own.
///
/// # Errors
/// A sentence, if the file can't be loaded.
pub fn leaf_certificate(source: &FileSource) -> Result<CertificateDer<'static>, String> {
    Ok(certificates(source)?.swap_remove(0))
}

/// All certificates of a file, at least one.
pub(super) fn certificates(source: &FileSource) -> Result<Vec<CertificateDer<'static>>, String> {
    let (text, _) = read(source)?;
    check_blocks(&text, source)?;
    let certificates: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&text).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(format!("expected PEM certificates, found {} in {source}", describe_other(&text))),
        Err(error) => Err(format!("expected PEM certificates, found in {source}: {error}")),
    }
}

/// The private key of a file that others can't access.
pub(super) fn private_key(
    source: &FileSource,
    provider: &CryptoProvider,
) -> Result<Arc<dyn rustls::sign::SigningKey>, String> {
    let (text, mode) = read(source)?;
    if mode & 0o007 != 0 {
        let path = source.path()?.display().to_string();
        return Err(format!(
            "expected a key that others have no access to, found mode {:04o}: chmod o= {path}",
            mode & 0o7777
        ));
    }
    check_blocks(&text, source)?;
    // The header of PKCS #8, and the older header of OpenSSL.
    let is_encrypted = contains(&text, b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
        || contains(&text, b"Proc-Type: 4,ENCRYPTED");
    let mut key = PrivateKeyDer::from_pem_slice(&text).map_err(|error| match error {
        _ if is_encrypted => {
            format!(
                "expected a PEM private key without a passphrase, found one with a passphrase in {source}"
            )
        }
        pem::Error::NoItemsFound => {
            format!(
                "expected a PEM private key without a passphrase, found {} in {source}",
                describe_other(&text)
            )
        }
        // The parser's error might quote a part of the key.
        _ => format!("expected a PEM private key, found malformed PEM in {source}"),
    })?;
    let loaded = provider.key_provider.load_private_key(key.clone_key());
    let loaded = loaded.map_err(|_| {
        let found = describe(&key).unwrap_or_else(|| "a malformed one".into());
        format!(
            "expected a private key of RSA (2048 to 8192 bits), ECDSA (P-256, P-384 or P-521) or Ed25519, found {found} in \
             {source}"
        )
    });
    key.zeroize();
    loaded
}

/// The size of an RSA key, or the algorithm of another key. Never a part of the key itself.
fn describe(key: &PrivateKeyDer<'_>) -> Option<String> {
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

/// Refuses blocks that the parser would skip: those that do not begin a line, and those with older labels.
///
/// If the parser skipped the first certificate, the second would take its place.
fn check_blocks(text: &[u8], source: &FileSource) -> Result<(), String> {
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
            "expected -----BEGIN CERTIFICATE----- or a private key at the beginning of line {number}, found {found} in \
             {source}"
        ));
    }
    Ok(())
}

/// The byte order mark of UTF-8, which some editors write.
const BOM: &[u8] = "\u{feff}".as_bytes();

/// The format of a file without PEM blocks.
fn describe_other(bytes: &[u8]) -> &'static str {
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
fn read(source: &FileSource) -> Result<(Zeroizing<Vec<u8>>, u32), String> {
    read_file(&source.path()?, FILE_MAX)
}
