//! The identity in use, and its replacement while connections are open.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustls::ServerConfig;

use crate::server::tls::identity::{LoadError, LoadedIdentity, load_parts, server_config, whole};
use crate::server::tls::settings::TlsSettings;

/// The identity in use, and the files that it came from.
#[derive(Debug)]
pub(super) struct ReloadableIdentity {
    server: RwLock<Arc<ServerConfig>>,
    files: Mutex<TlsSettings>,
}

/// Why a reload did not take all that the files hold.
#[derive(Debug)]
pub struct ReloadError {
    /// All that is wrong with them.
    pub faults: Vec<LoadError>,
    /// The certificate, where it is in use without the client CA that was found beside it.
    pub taken: Option<LoadedIdentity>,
}

impl ReloadableIdentity {
    /// `server`, which came from `files`.
    pub(super) fn new(server: Arc<ServerConfig>, files: TlsSettings) -> Self {
        Self { server: RwLock::new(server), files: Mutex::new(files) }
    }

    /// The identity that a handshake has to show.
    pub(super) fn current(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads the files again, those of `settings` where they are given. New handshakes show what was found;
    /// connections that are open go on.
    ///
    /// # Errors
    /// All that is wrong with the files. Those of `settings` have changed nothing then. Of the same files as before, the
    /// client CA is taken without the certificate, and the certificate without the client CA: an error in one must
    /// neither let in the clients of a CA that was removed, nor let a certificate expire.
    pub(super) fn reload(&self, settings: Option<TlsSettings>) -> Result<LoadedIdentity, ReloadError> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let takes_half = settings.is_none();
        let wanted = settings.unwrap_or_else(|| files.clone());
        let found = load_parts(&wanted);
        let mut server = self.server.write().unwrap_or_else(PoisonError::into_inner);
        let mut taken = None;
        match &found {
            (Ok(_), Ok(_)) => {}
            (Ok(identity), Err(_)) if takes_half => {
                let mut renewed = ServerConfig::clone(&server);
                renewed.cert_resolver = Arc::clone(&identity.resolver);
                *server = Arc::new(renewed);
                taken = Some(LoadedIdentity { server: Arc::clone(&server), validity: identity.validity });
            }
            (Err(_), Ok(clients)) if takes_half => {
                *server =
                    server_config(Arc::clone(&server.cert_resolver), Arc::clone(clients), wanted.min_version);
            }
            _ => {}
        }
        let loaded = whole(found, wanted.min_version).map_err(|faults| ReloadError { faults, taken })?;
        *server = Arc::clone(&loaded.server);
        *files = wanted;
        Ok(loaded)
    }
}
