//! Where a service is, for a client on this machine.

use super::settings::LoadedSettings;
use crate::access::file_source::FileSource;
use crate::access::forwarded::{ForwardedHeader, TrustedProxies};
use crate::server::address::Host;

/// Where a service is, for a client on this machine, and whether it speaks TLS there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalEndpoint {
    /// The address of the key listener.
    pub host: Host,
    /// Its port.
    pub srv_port: u16,
    /// The address of the metrics listener.
    pub metrics_host: Host,
    /// Its port.
    pub metrics_port: u16,
    /// Whether keys are served over TLS.
    pub tls: bool,
    /// The service's certificate, if it is set.
    pub certificate: Option<FileSource>,
    /// Whether clients have to show a certificate.
    pub wants_certificate: bool,
    /// The proxies that begin each connection for keys with a PROXY header, if any do.
    pub proxies: Option<TrustedProxies>,
}

/// The settings that a [`LocalEndpoint`] is made of.
pub(super) const ENDPOINT_SETTINGS: &[&str] = &[
    "host",
    "srv-port",
    "metrics-host",
    "metrics-port",
    "tls-cert",
    "tls-key",
    "tls-client-ca",
    "trusted-proxies",
    "proxy-protocol",
];

impl LocalEndpoint {
    /// `None` if one of [`ENDPOINT_SETTINGS`] is wrong.
    pub(super) fn new(settings: LoadedSettings) -> Option<Self> {
        let (certificate, key, client_ca) = (settings.tls_cert?, settings.tls_key?, settings.tls_client_ca?);
        let sources = settings.trusted_proxies?;
        Some(Self {
            host: settings.host?,
            srv_port: settings.srv_port?,
            metrics_host: settings.metrics_host?,
            metrics_port: settings.metrics_port?,
            tls: certificate.is_some() || key.is_some() || client_ca.is_some(),
            certificate,
            wants_certificate: client_ca.is_some(),
            proxies: settings
                .proxy_protocol?
                .then(|| TrustedProxies::new(&sources, ForwardedHeader::default())),
        })
    }

    /// Whether metrics are served beside the keys instead of on a listener of their own.
    pub fn shares_port(&self) -> bool {
        share_port((&self.host, self.srv_port), (&self.metrics_host, self.metrics_port))
    }
}

/// Whether keys and metrics have one listener: the same address, and a port that is not chosen by the kernel.
pub(super) fn share_port(keys: (&Host, u16), metrics: (&Host, u16)) -> bool {
    keys == metrics && keys.1 != 0
}
