//! Reloads the configuration on SIGHUP or when a file has changed, and applies the settings that may change in a
//! running service.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::{error, info, warn};

use super::certificate;
use crate::access::tokens_file;
use crate::config::watch::WatchedFiles;
use crate::config::{Config, Sources};
use crate::http::state::AppState;
use crate::server::tls::handshake::Tls;
use crate::server::tls::settings::TlsSettings;
use crate::systemd::credentials::CredentialServer;
use crate::telemetry::log::Log;

/// Why the configuration is read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trigger {
    /// SIGHUP: its sender wants the files as they are.
    Signal,
    /// A file has changed. It may be incomplete.
    FileChange,
}

/// Why a configuration is refused, in one line. The reason is also logged.
pub(super) struct ReloadRefused(pub(super) String);

/// The configuration in effect, where it comes from, and the parts of the service that it changes.
pub(super) struct Reloader<'a> {
    pub(super) config: Config,
    pub(super) sources: &'a Sources,
    pub(super) files: WatchedFiles,
    pub(super) app: Arc<AppState>,
    pub(super) credential_server: Arc<CredentialServer>,
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) log: &'a Log,
}

impl Reloader<'_> {
    /// Returns once a file of the configuration has changed.
    pub(super) async fn files_changed(&self) {
        self.files.changed().await;
    }

    /// Applies the settings that may change while the service runs, and logs those that take effect at a restart.
    ///
    /// # Errors
    /// The configuration is refused, and the previous one stays in effect.
    pub(super) fn reload(&mut self, trigger: Trigger) -> Result<(), ReloadRefused> {
        let previous = std::mem::take(&mut self.files);
        let loaded = self.sources.reload(&self.config, &mut self.files);
        // Files in use are watched too, even if the new configuration does not name them.
        self.config.files().for_each(|path| self.files.add(&path));
        let changed: Vec<_> = self.files.changed_since(&previous).into_iter().map(Path::to_owned).collect();
        if trigger == Trigger::FileChange {
            let changed =
                changed.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
            info!(changed, "files have changed, reloading the configuration");
        }
        let mut reasons: Vec<_> = self.files.deleted().map(deleted_file).collect();
        match loaded {
            Ok(new) if reasons.is_empty() => {
                let removed = self.config.removed_by_reload(&new);
                if trigger == Trigger::Signal || removed.is_empty() {
                    self.apply(&new, &removed);
                    return Ok(());
                }
                reasons.push(format!(
                    "{}: a changed file alone removes no protection; reload (SIGHUP) or restart to remove it on purpose",
                    removed.join(", ")
                ));
            }
            Ok(_) => {}
            Err(errors) => reasons.extend(errors.iter().map(str::to_owned)),
        }
        for reason in &reasons {
            error!(mistake = reason, "configuration reload refused");
        }
        error!("keeping the previous configuration");
        self.app.metrics.config_last_reload_successful.set(0);
        self.reload_changed_files(&changed);
        Err(ReloadRefused(reasons.join("; ")))
    }

    /// Puts `new` into effect, as far as no restart is needed.
    fn apply(&mut self, new: &Config, removed: &[&str]) {
        for setting in self.config.needs_restart(new) {
            warn!(setting, "setting has changed and takes effect at the next restart");
        }
        if self.config.loses_tls_at_restart(new) {
            warn!("TLS is no longer configured: it stays on until the next restart");
        }
        if !removed.is_empty() {
            warn!(settings = removed.join(", "), "protection removed by this reload");
        }
        if let Some(tls) = &self.tls {
            match tls.reload(new.tls()) {
                Ok(identity) => {
                    certificate::log_loaded("TLS certificate reloaded", &identity);
                    if new.tls_cert.is_some() {
                        self.config.apply_tls(new);
                    }
                }
                // The files were valid a moment ago: a change since then triggers another reload within seconds.
                Err(error) => certificate::log_refused(&error),
            }
        }
        self.app.max_size.store(new.max_size, Ordering::Relaxed);
        self.log.set_level(new.log_level);
        self.config.apply_reloadable(new);
        self.app.authorizer.replace(self.config.rules());
        self.credential_server.replace_rules(self.config.credentials.clone());
        self.app.metrics.config_last_reload_successful.set(1);
        info!(max_size = new.max_size, log_level = %new.log_level, "configuration reloaded");
        self.log_tokens();
    }

    /// Reloads the tokens and certificates in use whose files have changed, although the configuration as a whole is
    /// refused: an error elsewhere must neither keep a revoked token valid nor let a certificate expire.
    fn reload_changed_files(&mut self, changed: &[PathBuf]) {
        let has_changed = |path: &PathBuf| changed.contains(path);
        let tls_has_changed = |settings: &TlsSettings| {
            settings.files().filter_map(|file| file.path().ok()).any(|path| has_changed(&path))
        };
        if let Some(tls) =
            self.tls.as_ref().filter(|_| self.config.tls().as_ref().is_some_and(tls_has_changed))
        {
            match tls.reload(None) {
                Ok(identity) => certificate::log_loaded(certificate::CHANGED, &identity),
                Err(error) => certificate::log_refused(&error),
            }
        }
        let tokens_file = self.config.tokens_file.as_ref();
        let path = tokens_file.and_then(|file| file.path().ok()).filter(has_changed);
        if let Some(Ok(grants)) = path.map(|path| tokens_file::read(&path)) {
            self.config.grants = grants.into();
            self.app.authorizer.replace(self.config.rules());
            self.log_tokens();
        }
    }

    /// Logs the number of tokens, so that an operator notices a file that was not read.
    pub(super) fn log_tokens(&self) {
        if let Some(file) = &self.config.tokens_file {
            info!(
                count = self.config.grants.len(),
                file = file.to_string(),
                "requests for keys need a token"
            );
        }
    }
}

fn deleted_file(path: &Path) -> String {
    format!(
        "{}: expected a file in a directory, found one that was deleted from it: it never changes again; mount its \
         directory instead of the file (in Kubernetes without subPath)",
        path.display()
    )
}
