//! Where a configuration comes from, and the ways to load it.

use std::path::{Path, PathBuf};

use super::endpoint::{ENDPOINT_SETTINGS, LocalEndpoint};
use super::environment;
use super::errors::ConfigErrors;
use super::file::{self, File};
use super::loader::Loader;
use super::named_files::{FileAccess, NamedFiles};
use super::rules;
use super::settings::{Config, LoadedSettings, NAMES};
use super::watch::WatchedFiles;

/// Where the configuration is read from if no other file is named; it need not exist.
pub const DEFAULT_PATH: &str = "/etc/key-service/config.toml";

/// How an administrator can do without settings in a file.
const EMPTY_FILE: &str = "an empty file leaves every setting at its default";

/// Where a configuration comes from; a reload reads it again.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// A file that must exist; else [`DEFAULT_PATH`], which need not.
    pub file: Option<PathBuf>,
    /// Settings from the command line, by name and unparsed.
    pub flags: Vec<(&'static str, String)>,
}

impl Sources {
    /// The path of the configuration file, whether or not it exists.
    pub fn path(&self) -> &Path {
        self.file.as_deref().unwrap_or(Path::new(DEFAULT_PATH))
    }

    /// Reads all layers, and the files that they name; `files` gets all of them.
    ///
    /// # Errors
    /// Every error there is.
    pub fn load(&self, files: &mut WatchedFiles) -> Result<Config, ConfigErrors> {
        self.config(self.path(), false, FileAccess::All, files).map(|(config, _)| config)
    }

    /// As [`Sources::load`], while `running` is in effect: if it came from a file, the file must still exist.
    /// Protection would go with the file otherwise.
    ///
    /// # Errors
    /// Every error there is.
    pub fn reload(&self, running: &Config, files: &mut WatchedFiles) -> Result<Config, ConfigErrors> {
        let must_exist = running.file.is_some();
        self.config(self.path(), must_exist, FileAccess::All, files).map(|(config, _)| config)
    }

    /// As [`Sources::load`], and a sentence for each file that can't be checked here: a credential that the service
    /// manager passes to the unit alone.
    ///
    /// # Errors
    /// Every error there is.
    pub fn check(&self) -> Result<(Config, Vec<String>), ConfigErrors> {
        let files = &mut WatchedFiles::default();
        self.config(self.path(), false, FileAccess::WithoutUnitCredentials, files)
    }

    /// As [`Sources::load`], but opens no file other than the configuration file.
    ///
    /// # Errors
    /// Every error that shows without opening another file.
    pub fn settings(&self) -> Result<Config, ConfigErrors> {
        let files = &mut WatchedFiles::default();
        self.config(self.path(), false, FileAccess::None, files).map(|(config, _)| config)
    }

    /// Where the service is. An error in any other setting is ignored: the running service may be older than the error,
    /// and may read files that the caller can't.
    ///
    /// # Errors
    /// Every error in the settings that [`LocalEndpoint`] is made of.
    pub fn endpoint(&self) -> Result<LocalEndpoint, ConfigErrors> {
        let files = &mut WatchedFiles::default();
        self.with_loader(self.path(), false, files, |loader, _, _| {
            let mut loader = loader.only(ENDPOINT_SETTINGS);
            let endpoint = LocalEndpoint::new(LoadedSettings::read(&mut loader));
            (endpoint, loader.errors)
        })
    }

    /// The configuration, and a sentence for each file that could not be checked.
    fn config(
        &self,
        path: &Path,
        must_exist: bool,
        access: FileAccess,
        watched: &mut WatchedFiles,
    ) -> Result<(Config, Vec<String>), ConfigErrors> {
        self.with_loader(path, must_exist, watched, |mut loader, file, watched| {
            let mut files = NamedFiles { access, watched, unchecked: Vec::new() };
            loader.refuse_unknown(NAMES);
            let settings = LoadedSettings::read(&mut loader);
            rules::check(&settings, &mut loader);
            files.check_tls(&settings, &mut loader);
            let grants = files.tokens(&settings, &mut loader);
            let config = settings.complete(file, grants).map(|config| (config, files.unchecked));
            (config, loader.errors)
        })
    }

    /// What `read` makes of the layers; it gets the path of the configuration file, if there is one.
    fn with_loader<T>(
        &self,
        path: &Path,
        must_exist: bool,
        watched: &mut WatchedFiles,
        read: impl FnOnce(Loader<'_>, Option<PathBuf>, &mut WatchedFiles) -> (Option<T>, Vec<String>),
    ) -> Result<T, ConfigErrors> {
        watched.add(path);
        let mut errors = Vec::new();
        // A file that can't be read at all hides the other errors in it; the other layers are still checked.
        let text = file::read(path).unwrap_or_else(|error| {
            errors.push(error);
            None
        });
        if text.is_none() && errors.is_empty() {
            if must_exist {
                errors.push(format!("{}: the file is gone; {EMPTY_FILE}", path.display()));
            } else if self.file.is_some() {
                errors.push(format!("{}: there is no such file; {EMPTY_FILE}", path.display()));
            }
        }
        let file = text.as_deref().and_then(|text| {
            File::parse(path, text).map_err(|syntax_errors| errors.extend(syntax_errors)).ok()
        });
        let variables = environment::read(NAMES).settings;
        let loader = Loader::new(file.as_ref(), &variables, &self.flags);
        let (loaded, found) = read(loader, file.as_ref().map(|_| path.to_owned()), watched);
        errors.extend(found);
        loaded.filter(|_| errors.is_empty()).ok_or(ConfigErrors(errors))
    }
}

/// The names of variables that Kubernetes or Docker injects for a Service or container of this name, and that are
/// ignored.
pub fn injected_variables() -> Vec<String> {
    environment::read(NAMES).injected
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// Whether the file that need not be named was read, or why it is refused.
    fn load(default: &Path, must_exist: bool) -> Result<bool, String> {
        Sources::default()
            .config(default, must_exist, FileAccess::None, &mut WatchedFiles::default())
            .map(|(config, _)| config.file.is_some())
            .map_err(|errors| errors.to_string())
    }

    #[test]
    fn the_default_file_may_be_absent_until_it_was_read() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path();
        let file = directory.join("config.toml");
        assert_eq!(load(&file, false), Ok(false));
        assert_eq!(load(&directory.join("absent/config.toml"), false), Ok(false));
        assert!(load(&file, true).unwrap_err().contains("config.toml: the file is gone"));
        symlink("nowhere", &file).unwrap();
        assert!(load(&file, false).unwrap_err().contains("No such file"), "a dangling link");
        fs::create_dir(directory.join("sub")).unwrap();
        assert!(
            load(&directory.join("sub"), false).unwrap_err().contains("found something else"),
            "a directory"
        );
        symlink("nowhere", directory.join("link")).unwrap();
        assert!(load(&directory.join("link/config.toml"), false).unwrap_err().contains("link"), "above it");
        fs::remove_file(&file).unwrap();
        fs::write(&file, "").unwrap();
        assert!(load(&file.join("config.toml"), false).unwrap_err().contains("Not a directory"));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!((load(&file, false), load(&file, true)), (Ok(true), Ok(true)));
    }

    #[test]
    fn the_endpoint_reports_errors_in_its_own_settings_alone() {
        let sources = |name| Sources { file: Some("/dev/null".into()), flags: vec![(name, "[[]]".into())] };
        for name in NAMES {
            let errors = sources(name).endpoint().err().map_or(0, |errors| errors.iter().count());
            assert_eq!(errors, usize::from(ENDPOINT_SETTINGS.contains(name)), "{name}");
        }
    }
}
