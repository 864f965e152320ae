//! The settings of TLS: the files, and the oldest version.

use rustls::SupportedProtocolVersion;
use rustls::version::TLS13;

use crate::access::file_source::FileSource;

static TLS13_ONLY: &[&SupportedProtocolVersion] = &[&TLS13];

/// The files that TLS uses, and the oldest version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSettings {
    /// PEM certificates: the service's own, then the intermediate ones.
    pub certificate: FileSource,
    /// The PEM private key of the first certificate.
    pub key: FileSource,
    /// PEM certificates of the CAs of clients. If set, every client must show a certificate that one of them issued.
    pub client_ca: Option<FileSource>,
    /// The oldest TLS version that is accepted.
    pub min_version: MinVersion,
}

/// The oldest TLS version that is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::Display, strum::EnumString)]
pub enum MinVersion {
    /// TLS 1.2 (RFC 5246), for clients without TLS 1.3.
    #[strum(serialize = "1.2")]
    Tls12,
    /// TLS 1.3 (RFC 8446).
    #[strum(serialize = "1.3")]
    Tls13,
}

impl TlsSettings {
    /// The sources of all files.
    pub fn files(&self) -> impl Iterator<Item = &FileSource> {
        [&self.certificate, &self.key].into_iter().chain(&self.client_ca)
    }
}

impl MinVersion {
    /// The versions that are accepted.
    pub(super) fn versions(self) -> &'static [&'static SupportedProtocolVersion] {
        match self {
            Self::Tls12 => rustls::ALL_VERSIONS,
            Self::Tls13 => TLS13_ONLY,
        }
    }
}
