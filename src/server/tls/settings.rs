//! The settings of TLS: which files are read, and which versions are spoken.

use rustls::SupportedProtocolVersion;
use rustls::version::TLS13;

use crate::access::file_source::FileSource;

static TLS13_ONLY: &[&SupportedProtocolVersion] = &[&TLS13];

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
    pub(super) fn versions(self) -> &'static [&'static SupportedProtocolVersion] {
        match self {
            Self::Tls12 => rustls::ALL_VERSIONS,
            Self::Tls13 => TLS13_ONLY,
        }
    }
}
