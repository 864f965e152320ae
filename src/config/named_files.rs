//! Opens the files that settings name, so that an error in one of them is an error of the configuration.

use std::sync::Arc;

use super::loader::Loader;
use super::settings::LoadedSettings;
use super::watch::WatchedFiles;
use crate::access::file_source::FileSource;
use crate::access::tokens_file::{self, Grant};
use crate::server::tls::identity::{self, TlsFile};

/// Which of the files that settings name are opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileAccess {
    None,
    All,
    /// All but credentials if the service manager passes none.
    WithoutUnitCredentials,
}

/// Reads the files, and remembers what could not be checked.
pub(super) struct NamedFiles<'a> {
    pub(super) access: FileAccess,
    pub(super) watched: &'a mut WatchedFiles,
    /// A sentence for each file that could not be checked.
    pub(super) unchecked: Vec<String>,
}

impl NamedFiles<'_> {
    /// Checks certificate, key and client CA.
    pub(super) fn check_tls(&mut self, settings: &LoadedSettings, loader: &mut Loader<'_>) {
        let Some(tls) = settings.tls().filter(|_| self.access != FileAccess::None) else { return };
        tls.files().filter_map(|file| file.path().ok()).for_each(|path| self.watched.add(&path));
        for error in identity::load(&tls).err().unwrap_or_default() {
            let (name, file) = match error.file {
                TlsFile::Certificate => ("tls-cert", Some(&tls.certificate)),
                TlsFile::Key => ("tls-key", Some(&tls.key)),
                TlsFile::ClientCa => ("tls-client-ca", tls.client_ca.as_ref()),
            };
            if !file.is_some_and(|file| self.skips_credential(name, file)) {
                loader.report(name, &error.message);
            }
        }
    }

    /// The tokens; none if the file is wrong, which is reported, or not opened.
    pub(super) fn tokens(&mut self, settings: &LoadedSettings, loader: &mut Loader<'_>) -> Arc<[Grant]> {
        let name = "tokens-file";
        let Some(Some(file)) = &settings.tokens_file else { return Arc::default() };
        if self.access == FileAccess::None || self.skips_credential(name, file) {
            return Arc::default();
        }
        let Ok(path) = file.path() else {
            loader.refuse(name, "the name of a credential that the service manager passes (LoadCredential=)");
            return Arc::default();
        };
        self.watched.add(&path);
        match tokens_file::read(&path) {
            Ok(grants) => grants.into(),
            Err(errors) => {
                errors.iter().for_each(|error| loader.report(name, error));
                Arc::default()
            }
        }
    }

    /// Whether a file is a credential that can't be checked here, which is noted.
    fn skips_credential(&mut self, name: &str, file: &FileSource) -> bool {
        let skips = self.access == FileAccess::WithoutUnitCredentials && file.path().is_err();
        if skips {
            self.unchecked.push(format!(
                "{name}: {file} is not checked: $CREDENTIALS_DIRECTORY is not set, which systemd sets for the unit alone"
            ));
        }
        skips
    }
}
