//! The rules between settings: what one of them requires of another.

use super::loader::Loader;
use super::settings::LoadedSettings;
use crate::access::forwarded::ProxySource;

/// Reports every rule that is broken. A rule about a setting whose value is wrong by itself is not checked.
pub(super) fn check(settings: &LoadedSettings, loader: &mut Loader<'_>) {
    if let (Some(certificate), Some(key), Some(client_ca)) =
        (&settings.tls_cert, &settings.tls_key, &settings.tls_client_ca)
    {
        match (certificate, key, client_ca) {
            (Some(_), None, _) => require(loader, "tls-cert", "tls-key"),
            (None, Some(_), _) => require(loader, "tls-key", "tls-cert"),
            (None, None, Some(_)) => require(loader, "tls-client-ca", "tls-cert and tls-key"),
            (Some(_), Some(_), _) | (None, None, None) => {}
        }
    }
    if let Some(proxies) = &settings.trusted_proxies {
        if settings.unix_trust == Some(true) && proxies.contains(&ProxySource::Unix) {
            // Clients of a proxy behind the socket would need no token either, which nobody can want.
            loader.refuse("unix-trust", "false where trusted-proxies has unix");
        }
        if settings.proxy_protocol == Some(true) && proxies.is_empty() {
            require(loader, "proxy-protocol", "trusted-proxies");
        }
    }
}

fn require(loader: &mut Loader<'_>, name: &str, missing: &str) {
    loader.report(name, &format!("expected {missing} beside it, found none"));
}
