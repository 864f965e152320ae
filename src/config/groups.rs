//! Settings that belong together, in the types of the layers below.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;

use super::endpoint::share_port;
use super::settings::{Config, LoadedSettings};
use crate::access::authorization::AccessRules;
use crate::access::file_source::FileSource;
use crate::access::forwarded::TrustedProxies;
use crate::access::rate_limit::Rates;
use crate::server::tls::settings::{MinVersion, TlsSettings};

impl Config {
    /// Whether metrics are served beside the keys instead of on a listener of their own.
    pub fn shares_port(&self) -> bool {
        share_port((&self.host, self.srv_port), (&self.metrics_host, self.metrics_port))
    }

    /// The rules that a request for a key must meet.
    pub fn rules(&self) -> AccessRules {
        AccessRules {
            tokens: self.tokens_file.is_some().then(|| Arc::clone(&self.grants)),
            trusts_unix: self.unix_trust,
            rates: Rates {
                requests: self.rate_requests.and_then(NonZeroU64::new),
                bytes: self.rate_bytes.and_then(NonZeroU64::new),
                burst: self.rate_burst.as_secs().try_into().expect("a burst is at most an hour"),
            },
            proxies: self.proxies(),
            audit: self.audit,
        }
    }

    /// The trusted proxies and their header.
    pub fn proxies(&self) -> TrustedProxies {
        TrustedProxies::new(&self.trusted_proxies, self.forwarded_header)
    }

    /// Certificate, key and client CA; `None` if keys are served in plain HTTP.
    pub fn tls(&self) -> Option<TlsSettings> {
        let [certificate, key, client_ca] =
            [&self.tls_cert, &self.tls_key, &self.tls_client_ca].map(Option::as_ref);
        tls(certificate, key, client_ca, self.tls_min_version)
    }

    /// The paths of the files that settings name, if they are known.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> {
        [&self.tls_cert, &self.tls_key, &self.tls_client_ca, &self.tokens_file]
            .into_iter()
            .flatten()
            .filter_map(|file| file.path().ok())
    }
}

impl LoadedSettings {
    /// As [`Config::tls`]; also `None` if one of the settings is wrong.
    pub(super) fn tls(&self) -> Option<TlsSettings> {
        let [certificate, key, client_ca] = [&self.tls_cert, &self.tls_key, &self.tls_client_ca];
        let (certificate, key, client_ca) = (certificate.as_ref()?, key.as_ref()?, client_ca.as_ref()?);
        tls(certificate.as_ref(), key.as_ref(), client_ca.as_ref(), self.tls_min_version?)
    }
}

fn tls(
    certificate: Option<&FileSource>,
    key: Option<&FileSource>,
    client_ca: Option<&FileSource>,
    min_version: MinVersion,
) -> Option<TlsSettings> {
    let (certificate, key) = (certificate?.clone(), key?.clone());
    Some(TlsSettings { certificate, key, client_ca: client_ca.cloned(), min_version })
}
