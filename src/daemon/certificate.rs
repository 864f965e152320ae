//! Log messages about the TLS certificate and the client CA.

use tracing::{error, info, warn};

use crate::server::tls::identity::{LoadError, LoadedIdentity, TlsFile};
use crate::server::tls::reload::ReloadError;

/// Logged for a certificate that was loaded because its files had changed.
pub(super) const CHANGED: &str = "changed TLS certificate loaded";

/// Logs that `identity` is in use, when it expires, and its warning if it has one.
pub(super) fn log_loaded(message: &'static str, identity: &LoadedIdentity) {
    info!(not_after = %identity.not_after(), "{message}");
    if let Some(warning) = identity.warning() {
        warn!(not_after = %identity.not_after(), "{warning}");
    }
}

/// Logs which files could not be reloaded. The certificate and the client CA are loaded separately: if only one of them
/// is valid, it is in use.
pub(super) fn log_refused(error: &ReloadError) {
    if let Some(identity) = &error.applied {
        log_loaded(CHANGED, identity);
    }
    let (client_ca, certificate): (Vec<_>, Vec<_>) =
        error.errors.iter().cloned().partition(|error| error.file == TlsFile::ClientCa);
    if !certificate.is_empty() {
        error!(faults = sentences(&certificate), "TLS reload failed, keeping the previous certificate");
    }
    if !client_ca.is_empty() {
        error!(faults = sentences(&client_ca), "TLS reload failed, keeping the previous client CA");
    }
}

/// All `errors` in one line.
pub(super) fn sentences(errors: &[LoadError]) -> String {
    errors.iter().map(|error| error.message.as_str()).collect::<Vec<_>>().join("; ")
}
