//! The identity in use, which a reload replaces while connections stay open.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustls::ServerConfig;

use crate::server::tls::identity::{LoadError, LoadedFiles, LoadedIdentity, server_config};
use crate::server::tls::settings::TlsSettings;

/// The identity in use, and the settings that name its files.
#[derive(Debug)]
pub(super) struct ReloadableIdentity {
    server: RwLock<Arc<ServerConfig>>,
    settings: Mutex<TlsSettings>,
}

/// Why a reload was refused, in whole or in part.
#[derive(Debug)]
pub struct ReloadError {
    /// Every error in the files.
    pub errors: Vec<LoadError>,
    /// The new certificate, if it is in use although the client CA was refused.
    pub applied: Option<LoadedIdentity>,
}

impl ReloadableIdentity {
    /// The identity `server`, which was loaded from the files of `settings`.
    pub(super) fn new(server: Arc<ServerConfig>, settings: TlsSettings) -> Self {
        Self { server: RwLock::new(server), settings: Mutex::new(settings) }
    }

    /// The identity for a new handshake.
    pub(super) fn current(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// As `Tls::reload`, without metrics.
    pub(super) fn reload(&self, new_settings: Option<TlsSettings>) -> Result<LoadedIdentity, ReloadError> {
        let mut settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        let applies_partly = new_settings.is_none();
        let new_settings = new_settings.unwrap_or_else(|| settings.clone());
        let files = LoadedFiles::load(&new_settings);
        let mut server = self.server.write().unwrap_or_else(PoisonError::into_inner);
        let mut applied = None;
        match (&files.certificate, &files.client_verifier) {
            (Ok(certificate), Err(_)) if applies_partly => {
                let mut renewed = ServerConfig::clone(&server);
                renewed.cert_resolver = Arc::clone(&certificate.resolver);
                *server = Arc::new(renewed);
                applied =
                    Some(LoadedIdentity { server: Arc::clone(&server), validity: certificate.validity });
            }
            (Err(_), Ok(client_verifier)) if applies_partly => {
                let (certificate, client_verifier) =
                    (Arc::clone(&server.cert_resolver), Arc::clone(client_verifier));
                *server = server_config(certificate, client_verifier, new_settings.min_version);
            }
            _ => {}
        }
        let loaded = files
            .into_identity(new_settings.min_version)
            .map_err(|errors| ReloadError { errors, applied })?;
        *server = Arc::clone(&loaded.server);
        *settings = new_settings;
        Ok(loaded)
    }
}
