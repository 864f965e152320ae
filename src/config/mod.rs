//! Defaults, then the TOML file, then the environment, then flags, into a [`Config`] that is always valid.
//!
//! Every mistake is reported, each with where it stands; nothing is started while there is one.

mod environment;
mod file;
pub mod watch;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU64;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider, Source};
use strum::VariantNames;

use self::environment::Variable;
use self::file::File;
use crate::access::authorization::AccessRules;
use crate::access::file_source::{self, FileSource};
use crate::access::forwarded::{ForwardedHeader, ProxySource, TrustedProxies};
use crate::access::rate_limit::Rates;
use crate::access::tokens_file::{self, Grant};
use crate::config::watch::WatchedFiles;
use crate::keys::format::Kind;
use crate::keys::key::KeyLength;
use crate::keys::key_spec::KeySpec;
use crate::keys::password::Alphabet;
use crate::server::address::{Host, SocketMode};
use crate::server::tls::identity::{self, TlsFile};
use crate::server::tls::settings::{MinVersion, TlsSettings};
use crate::systemd::credentials;
use crate::telemetry::log_level::LogLevel;

/// Where the configuration is read from when no other file is named; it need not exist.
pub const DEFAULT_PATH: &str = "/etc/key-service/config.toml";

/// The prefix of the environment's settings. Not `KEY_SERVICE_`: Kubernetes sets `KEY_SERVICE_PORT` and its like for
/// a Service of that name.
pub const ENV_PREFIX: &str = "KEYSERVICE_";

/// The largest value that `max-size` may have: 1 GiB.
pub const MAX_SIZE_LIMIT: u64 = 1 << 30;

/// The most threads that serve.
pub const WORKERS_MAX: usize = 256;

/// The largest configuration file that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;

const ONE_HOUR: u64 = 3600;

/// What `host` and `metrics-host` may be.
const HOST: &str = "an IP address, unix:/path or *";

/// Every setting, valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The file that was read; `None` where there was none.
    pub file: Option<PathBuf>,
    /// Where keys are served.
    pub host: Host,
    /// Its port; 0 is any free one.
    pub srv_port: u16,
    /// The largest key, in bytes: 1 to [`MAX_SIZE_LIMIT`].
    pub max_size: u64,
    /// Where metrics are served.
    pub metrics_host: Host,
    /// Its port; 0 is any free one, and `srv_port` means: beside the keys.
    pub metrics_port: u16,
    /// From which severity on events are logged.
    pub log_level: LogLevel,
    /// Threads that serve; 0 is one for each CPU.
    pub workers: usize,
    /// Connections that may be open at once.
    pub max_connections: usize,
    /// Until the headers of a request must have arrived.
    pub head_timeout: Duration,
    /// Until an idle connection closes.
    pub idle_timeout: Duration,
    /// Until a connection closes whose client takes nothing of its response.
    pub write_timeout: Duration,
    /// Until busy connections are cut after the service was told to stop.
    pub drain_timeout: Duration,
    /// How long the service goes on accepting, unready, after it was told to stop.
    pub drain_delay: Duration,
    /// How long the service may be without a connection before it ends, where a socket unit starts it again.
    pub exit_idle: Option<Duration>,
    /// Who the service is, where keys are served over TLS.
    pub tls: Option<TlsSettings>,
    /// The oldest version of TLS, also where TLS is off.
    pub tls_min_version: MinVersion,
    /// Where the hashes of tokens are, and what was found there; `None` where no token is asked for.
    pub tokens: Option<TokensFile>,
    /// The mode of a Unix socket that is bound here.
    pub unix_mode: SocketMode,
    /// Whether who could open a Unix socket needs no token.
    pub unix_trust: bool,
    /// What each client may take.
    pub rates: Rates,
    /// Whose word on the client's address is taken.
    pub proxies: TrustedProxies,
    /// Whether these proxies begin each connection with a PROXY header.
    pub proxy_protocol: bool,
    /// Connections that one address may have open; `None` is no bound.
    pub max_connections_per_client: Option<u32>,
    /// Responses above 16 KiB that may be in flight at once; one client has at most a quarter of them.
    pub max_bulk_streams: usize,
    /// Whether each key leaves a record.
    pub audit: bool,
    /// Whether there is a page for people at `/`.
    pub page: bool,
    /// What units get that load a credential.
    pub credentials: credentials::CredentialRules,
}

/// Where a service is, for a client on this machine, and whether it speaks TLS there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalEndpoint {
    /// Where keys are served.
    pub host: Host,
    /// Its port.
    pub srv_port: u16,
    /// Where metrics are served.
    pub metrics_host: Host,
    /// Its port.
    pub metrics_port: u16,
    /// Whether keys are served over TLS.
    pub tls: bool,
    /// The service's certificate, where it is set.
    pub certificate: Option<FileSource>,
    /// Whether clients have to show a certificate.
    pub wants_certificate: bool,
    /// The proxies that begin each connection for keys with a PROXY header, if any do.
    pub proxies: Option<TrustedProxies>,
}

impl LocalEndpoint {
    /// As [`Config::shares_port`].
    pub fn shares_port(&self) -> bool {
        self.srv_port == self.metrics_port && self.srv_port != 0 && self.host == self.metrics_host
    }
}

/// The file of tokens, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokensFile {
    /// As it is written in the configuration: a path, or `credential:` and a name.
    pub place: String,
    /// What it grants.
    pub grants: Arc<[Grant]>,
}

impl TokensFile {
    /// Where it is, as far as that is known.
    pub fn path(&self) -> Option<PathBuf> {
        self.place.parse::<FileSource>().ok()?.path().ok()
    }
}

/// The names of all settings, as TOML has them.
const NAMES: [&str; 32] = [
    "host",
    "srv-port",
    "max-size",
    "metrics-host",
    "metrics-port",
    "log-level",
    "workers",
    "max-connections",
    "head-timeout",
    "idle-timeout",
    "write-timeout",
    "drain-timeout",
    "drain-delay",
    "exit-idle",
    "tls-cert",
    "tls-key",
    "tls-client-ca",
    "tls-min-version",
    "tokens-file",
    "unix-mode",
    "unix-trust",
    "rate-requests",
    "rate-bytes",
    "rate-burst",
    "trusted-proxies",
    "forwarded-header",
    "proxy-protocol",
    "max-connections-per-client",
    "max-bulk-streams",
    "audit",
    "page",
    "credentials",
];

/// The settings that a running service takes on at a reload.
const RELOADABLE: [&str; 8] = [
    "max-size",
    "log-level",
    "tokens-file",
    "rate-requests",
    "rate-bytes",
    "rate-burst",
    "audit",
    "credentials",
];

/// Those that it takes on too while TLS stays on.
const LIVE_TLS: [&str; 4] = ["tls-cert", "tls-key", "tls-client-ca", "tls-min-version"];

impl Config {
    /// Whether metrics are served beside the keys instead of on a listener of their own.
    pub fn shares_port(&self) -> bool {
        self.srv_port == self.metrics_port && self.srv_port != 0 && self.host == self.metrics_host
    }

    /// What requests for keys are judged by.
    pub fn rules(&self) -> AccessRules {
        AccessRules {
            tokens: self.tokens.as_ref().map(|file| Arc::clone(&file.grants)),
            trusts_unix: self.unix_trust,
            rates: self.rates,
            proxies: self.proxies.clone(),
            audit: self.audit,
        }
    }

    /// The files that settings name.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> {
        let tls = self.tls.as_ref().map(TlsSettings::files).into_iter().flatten();
        tls.filter_map(|file| file.path().ok()).chain(self.tokens.as_ref().and_then(TokensFile::path))
    }

    /// Settings that protect keys and that `new` no longer has: those that a reload removes at once.
    pub fn removed_by_reload(&self, new: &Self) -> Vec<&'static str> {
        let client_ca = |config: &Self| config.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some());
        [
            ("tokens-file", self.tokens.is_some() && new.tokens.is_none()),
            ("tls-client-ca", client_ca(self) && new.tls.is_some() && !client_ca(new)),
            ("rate-requests", self.rates.requests.is_some() && new.rates.requests.is_none()),
            ("rate-bytes", self.rates.bytes.is_some() && new.rates.bytes.is_none()),
            ("audit", self.audit && !new.audit),
        ]
        .into_iter()
        .filter_map(|(name, is_removed)| is_removed.then_some(name))
        .collect()
    }

    /// Whether `new` has no TLS where `self` has: the running service keeps it, and a restart removes it.
    pub fn loses_tls_at_restart(&self, new: &Self) -> bool {
        self.tls.is_some() && new.tls.is_none()
    }

    /// Takes from `new` what may change while the service runs.
    pub fn apply_reloadable(&mut self, new: &Self) {
        self.file.clone_from(&new.file);
        self.max_size = new.max_size;
        self.log_level = new.log_level;
        self.tokens.clone_from(&new.tokens);
        self.rates = new.rates;
        self.audit = new.audit;
        self.credentials.clone_from(&new.credentials);
    }

    /// The settings that differ in `new` and that only a restart takes on.
    pub fn needs_restart(&self, new: &Self) -> Vec<&'static str> {
        let changed = |(old, new): &((_, Value), (_, Value))| old.1 != new.1;
        self.values()
            .into_iter()
            .zip(new.values())
            .filter(changed)
            .map(|((name, _), _)| name)
            .filter(|name| !RELOADABLE.contains(name))
            .filter(|name| !(LIVE_TLS.contains(name) && self.tls.is_some() && new.tls.is_some()))
            .collect()
    }

    fn values(&self) -> [(&'static str, Value); NAMES.len()] {
        let text = |value: &dyn fmt::Display| Value::from(value.to_string());
        let tls = self.tls.as_ref();
        let file = |location: Option<&FileSource>| {
            Value::from(location.map_or_else(String::new, ToString::to_string))
        };
        let values = [
            text(&self.host),
            self.srv_port.into(),
            self.max_size.into(),
            text(&self.metrics_host),
            self.metrics_port.into(),
            text(&self.log_level),
            (self.workers as u64).into(),
            (self.max_connections as u64).into(),
            self.head_timeout.as_secs().into(),
            self.idle_timeout.as_secs().into(),
            self.write_timeout.as_secs().into(),
            self.drain_timeout.as_secs().into(),
            self.drain_delay.as_secs().into(),
            self.exit_idle.map_or(0, |period| period.as_secs()).into(),
            file(tls.map(|tls| &tls.certificate)),
            file(tls.map(|tls| &tls.key)),
            file(tls.and_then(|tls| tls.client_ca.as_ref())),
            text(&self.tls_min_version),
            self.tokens.as_ref().map_or("", |file| &file.place).into(),
            text(&self.unix_mode),
            self.unix_trust.into(),
            self.rates.requests.map_or(0, NonZeroU64::get).into(),
            self.rates.bytes.map_or(0, NonZeroU64::get).into(),
            u64::from(self.rates.burst).into(),
            self.proxies.sources.iter().map(ToString::to_string).collect::<Vec<_>>().into(),
            text(&self.proxies.header),
            self.proxy_protocol.into(),
            u64::from(self.max_connections_per_client.unwrap_or(0)).into(),
            (self.max_bulk_streams as u64).into(),
            self.audit.into(),
            self.page.into(),
            self.credentials
                .iter()
                .map(|(name, shape)| (name.to_owned(), credential_value(shape)))
                .collect::<Dict>()
                .into(),
        ];
        let mut names = NAMES.into_iter();
        values.map(|value| (names.next().expect("as many names as values"), value))
    }
}

/// The effective configuration, as TOML.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.values() {
            writeln!(f, "{name} = {}", shown(&value))?;
        }
        Ok(())
    }
}

/// Where a configuration comes from; it can be read as often as a reload asks for it.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// A file that must exist; else [`DEFAULT_PATH`], which need not.
    pub file: Option<PathBuf>,
    /// Settings from the command line, by name and unread.
    pub flags: Vec<(&'static str, String)>,
}

impl Sources {
    /// Where the configuration file is, if there is one.
    pub fn path(&self) -> &Path {
        self.file.as_deref().unwrap_or(Path::new(DEFAULT_PATH))
    }

    /// Reads all layers, and the files that they name; `files` gets all of them.
    ///
    /// # Errors
    /// Every mistake there is.
    pub fn load(&self, files: &mut WatchedFiles) -> Result<Config, ConfigErrors> {
        self.read(Path::new(DEFAULT_PATH), false, FileAccess::All, files).map(|(config, _)| config)
    }

    /// As [`Sources::load`], while `running` is in effect: the file that it came from has to be there still. Protection
    /// would go with the file otherwise.
    ///
    /// # Errors
    /// Every mistake there is.
    pub fn reload(&self, running: &Config, files: &mut WatchedFiles) -> Result<Config, ConfigErrors> {
        let must_exist = running.file.is_some();
        self.read(Path::new(DEFAULT_PATH), must_exist, FileAccess::All, files).map(|(config, _)| config)
    }

    /// As [`Sources::load`], and a sentence for each file that can't be checked here: a credential that the service
    /// manager passes to the unit alone.
    ///
    /// # Errors
    /// Every mistake there is.
    pub fn check(&self) -> Result<(Config, Vec<String>), ConfigErrors> {
        self.read(
            Path::new(DEFAULT_PATH),
            false,
            FileAccess::WithoutUnitCredentials,
            &mut WatchedFiles::default(),
        )
    }

    /// As [`Sources::load`], but no other file is opened than that of the configuration.
    ///
    /// # Errors
    /// Every mistake that shows without opening another file.
    pub fn settings(&self) -> Result<Config, ConfigErrors> {
        let files = &mut WatchedFiles::default();
        self.read(Path::new(DEFAULT_PATH), false, FileAccess::None, files).map(|(config, _)| config)
    }

    /// Where the service is. An error in any other setting is ignored: the running service may be older than the error, and
    /// may read files that the caller can't.
    ///
    /// # Errors
    /// Every error in the settings that [`LocalEndpoint`] is made of.
    pub fn endpoint(&self) -> Result<LocalEndpoint, ConfigErrors> {
        let files = &mut WatchedFiles::default();
        self.with_reader(Path::new(DEFAULT_PATH), false, FileAccess::None, files, |reader| reader.endpoint())
            .map(|(endpoint, ..)| endpoint)
    }

    fn read(
        &self,
        default: &Path,
        must_exist: bool,
        access: FileAccess,
        files: &mut WatchedFiles,
    ) -> Result<(Config, Vec<String>), ConfigErrors> {
        self.with_reader(default, must_exist, access, files, |reader| {
            reader.refuse_unknown();
            reader.config()
        })
        .map(|(config, file, unchecked)| (Config { file, ..config }, unchecked))
    }

    /// What `read` makes of the layers, the file that was read, and a sentence for each file that could not be checked.
    fn with_reader<T>(
        &self,
        default: &Path,
        must_exist: bool,
        access: FileAccess,
        files: &mut WatchedFiles,
        read: impl FnOnce(&mut Loader<'_>) -> Option<T>,
    ) -> Result<(T, Option<PathBuf>, Vec<String>), ConfigErrors> {
        let path = self.file.as_deref().unwrap_or(default);
        files.add(path);
        // A file that can't be read at all hides whatever else is in it; the other layers are still looked at.
        let (text, unreadable) = match config_text(path) {
            Ok(None) if must_exist => {
                (None, Some(format!("{}: the file is gone; {EMPTY_FILE}", path.display())))
            }
            Ok(None) if self.file.is_some() => {
                (None, Some(format!("{}: there is no such file; {EMPTY_FILE}", path.display())))
            }
            Ok(text) => (text, None),
            Err(problem) => (None, Some(problem)),
        };
        let mut mistakes: Vec<String> = unreadable.into_iter().collect();
        let file = text.as_deref().map(|text| File::parse(path, text));
        let file = file.and_then(|file| file.map_err(|malformed| mistakes.extend(malformed)).ok());
        let (variables, _) = environment::read();
        let mut figment = Figment::new();
        if let Some(file) = &file {
            figment = figment.merge(file);
        }
        let environment = variables.iter().map(|variable| (variable.setting(), &*variable.text));
        let flags = self.flags.iter().map(|(name, text)| ((*name).to_owned(), &**text));
        figment =
            figment.merge(Texts(ENVIRONMENT, environment.collect())).merge(Texts(FLAG, flags.collect()));
        let mut reader = Loader {
            figment,
            file: file.as_ref(),
            variables: &variables,
            flags: &self.flags,
            mistakes,
            access,
            unchecked: Vec::new(),
            files,
        };
        match read(&mut reader) {
            Some(read) if reader.mistakes.is_empty() => {
                Ok((read, text.as_ref().map(|_| path.to_owned()), reader.unchecked))
            }
            _ => Err(ConfigErrors(reader.mistakes)),
        }
    }
}

/// The names of variables that Kubernetes or Docker injects for a Service or container of this name, and that are ignored.
pub fn injected_variables() -> Vec<String> {
    environment::read().1
}

/// What an administrator can do who wants no configuration file.
const EMPTY_FILE: &str = "an empty file leaves every setting at its default";

/// The text of the configuration file; `None` where nothing has this path.
fn config_text(path: &Path) -> Result<Option<String>, String> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // A directory above it may be a symbolic link that leads nowhere.
            return file_source::dangling_link(path).map_or(Ok(None), Err);
        }
        Err(error) => {
            return Err(format!("{}: expected a file that can be read, found: {error}", path.display()));
        }
        Ok(_) => {}
    }
    // Everybody may write to it, and it is empty all the same.
    if path == Path::new("/dev/null") {
        return Ok(Some(String::new()));
    }
    let (bytes, _) = file_source::read_file(path, FILE_MAX)?;
    let text = str::from_utf8(&bytes).map_err(|error| {
        let line = 1 + bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
        format!("{}:{line}: expected UTF-8, found {error}", path.display())
    })?;
    Ok(Some(text.to_owned()))
}

/// Which of the files that settings name are opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FileAccess {
    None,
    All,
    /// All but credentials where the service manager passes none.
    WithoutUnitCredentials,
}

/// What is wrong with a configuration: one sentence for each mistake.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigErrors(Vec<String>);

impl ConfigErrors {
    /// The sentences.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

struct Loader<'a> {
    figment: Figment,
    file: Option<&'a File<'a>>,
    variables: &'a [Variable],
    flags: &'a [(&'static str, String)],
    mistakes: Vec<String>,
    access: FileAccess,
    /// A sentence for each file that could not be checked.
    unchecked: Vec<String>,
    files: &'a mut WatchedFiles,
}

impl Loader<'_> {
    /// `None` where a setting is wrong; all of them have been looked at then.
    fn config(&mut self) -> Option<Config> {
        let (host, metrics_host) = self.hosts();
        let (srv_port, metrics_port) = self.ports();
        let levels = format!("one of {}", LogLevel::NAMES.join(", "));
        let info = "info".parse().expect("info is a level");
        let log_level = self.parsed("log-level", info, &levels);
        let max_size = self.integer("max-size", 1024, 1..=MAX_SIZE_LIMIT);
        let workers = self.integer("workers", 0, 0..=WORKERS_MAX as u64);
        let max_connections = self.integer("max-connections", 10_000, 1..=1_000_000);
        let head_timeout = self.integer("head-timeout", 10, 1..=ONE_HOUR);
        let idle_timeout = self.integer("idle-timeout", 75, 1..=ONE_HOUR);
        let write_timeout = self.integer("write-timeout", 15, 1..=ONE_HOUR);
        let drain_timeout = self.integer("drain-timeout", 20, 0..=ONE_HOUR);
        let drain_delay = self.integer("drain-delay", 0, 0..=ONE_HOUR);
        let exit_idle = self.integer("exit-idle", 0, 0..=24 * ONE_HOUR);
        let min_version = self.version("tls-min-version");
        let tls = self.tls(min_version);
        let tokens = self.tokens();
        let modes = "a mode in octal digits, such as \"0660\"";
        let unix_mode = self.parsed("unix-mode", SocketMode::default(), modes);
        let unix_trust = self.boolean("unix-trust", false);
        let rate_requests = self.integer("rate-requests", 0, 0..=1_000_000_000);
        let rate_bytes = self.integer("rate-bytes", 0, 0..=1 << 40);
        let rate_burst = self.integer("rate-burst", 10, 1..=ONE_HOUR);
        let trusted = self.trusted_proxies();
        let fields = format!("one of {}", ForwardedHeader::VARIANTS.join(", "));
        let header = self.parsed("forwarded-header", ForwardedHeader::default(), &fields);
        let proxy_protocol = self.boolean("proxy-protocol", false);
        let max_connections_per_client = self.integer("max-connections-per-client", 256, 0..=1_000_000);
        let max_bulk_streams = self.integer("max-bulk-streams", 64, 1..=1_000_000);
        let audit = self.boolean("audit", false);
        let page = self.boolean("page", true);
        let credentials = self.credentials();
        let proxies = TrustedProxies { sources: trusted?, header: header? };
        if unix_trust? && proxies.sources.contains(&ProxySource::Unix) {
            // Clients of a proxy behind the socket would need no token either, which nobody can want.
            let value = self.figment.find_value("unix-trust").ok()?;
            return self.refuse("unix-trust", &value, "false where trusted-proxies has unix");
        }
        let proxy_protocol = proxy_protocol?;
        if proxy_protocol && proxies.sources.is_empty() {
            return self.require("proxy-protocol", "trusted-proxies");
        }
        Some(Config {
            file: None,
            host: host?,
            srv_port: srv_port?,
            max_size: max_size?,
            metrics_host: metrics_host?,
            metrics_port: metrics_port?,
            log_level: log_level?,
            workers: workers?.try_into().ok()?,
            max_connections: max_connections?.try_into().ok()?,
            head_timeout: Duration::from_secs(head_timeout?),
            idle_timeout: Duration::from_secs(idle_timeout?),
            write_timeout: Duration::from_secs(write_timeout?),
            drain_timeout: Duration::from_secs(drain_timeout?),
            drain_delay: Duration::from_secs(drain_delay?),
            exit_idle: Some(Duration::from_secs(exit_idle?)).filter(|period| !period.is_zero()),
            tls: tls?,
            tls_min_version: min_version?,
            tokens: tokens?,
            unix_mode: unix_mode?,
            unix_trust: unix_trust?,
            rates: Rates {
                requests: NonZeroU64::new(rate_requests?),
                bytes: NonZeroU64::new(rate_bytes?),
                burst: rate_burst?.try_into().ok()?,
            },
            proxies,
            proxy_protocol,
            max_connections_per_client: Some(max_connections_per_client?.try_into().ok()?)
                .filter(|limit| *limit > 0),
            max_bulk_streams: max_bulk_streams?.try_into().ok()?,
            audit: audit?,
            page: page?,
            credentials: credentials?,
        })
    }

    fn hosts(&mut self) -> (Option<Host>, Option<Host>) {
        let host = self.parsed("host", Host::Any, HOST);
        // Metrics of a service on a Unix socket are for this machine only, until told otherwise.
        let beside = match &host {
            Some(host @ (Host::Any | Host::Ip(_))) => host.clone(),
            _ => Host::Ip(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        };
        (host, self.parsed("metrics-host", beside, HOST))
    }

    fn ports(&mut self) -> (Option<u16>, Option<u16>) {
        let mut port = |name, default| self.integer(name, default, 0..=u16::MAX.into())?.try_into().ok();
        (port("srv-port", 1123), port("metrics-port", 8000))
    }

    fn endpoint(&mut self) -> Option<LocalEndpoint> {
        let (host, metrics_host) = self.hosts();
        let (srv_port, metrics_port) = self.ports();
        let [certificate, key, client_ca] =
            ["tls-cert", "tls-key", "tls-client-ca"].map(|name| self.location(name));
        let (certificate, key, client_ca) = (certificate?, key?, client_ca?);
        let trusted = self.trusted_proxies();
        Some(LocalEndpoint {
            host: host?,
            srv_port: srv_port?,
            metrics_host: metrics_host?,
            metrics_port: metrics_port?,
            tls: certificate.is_some() || key.is_some() || client_ca.is_some(),
            certificate,
            wants_certificate: client_ca.is_some(),
            proxies: self
                .boolean("proxy-protocol", false)?
                .then_some(TrustedProxies { sources: trusted?, ..TrustedProxies::default() }),
        })
    }

    fn trusted_proxies(&mut self) -> Option<Vec<ProxySource>> {
        self.list("trusted-proxies", "an IP address, a network (10.0.0.0/8) or unix")
    }

    /// `None` where something is wrong, `Some(None)` where TLS is off.
    fn tls(&mut self, min_version: Option<MinVersion>) -> Option<Option<TlsSettings>> {
        let certificate = self.location("tls-cert");
        let key = self.location("tls-key");
        let client_ca = self.location("tls-client-ca");
        let (certificate, key, client_ca, min_version) = (certificate?, key?, client_ca?, min_version?);
        let (certificate, key) = match (certificate, key) {
            (Some(certificate), Some(key)) => (certificate, key),
            (Some(_), None) => return self.require("tls-cert", "tls-key"),
            (None, Some(_)) => return self.require("tls-key", "tls-cert"),
            (None, None) if client_ca.is_some() => {
                return self.require("tls-client-ca", "tls-cert and tls-key");
            }
            (None, None) => return Some(None),
        };
        let settings = TlsSettings { certificate, key, client_ca, min_version };
        if self.access != FileAccess::None {
            settings.files().filter_map(|file| file.path().ok()).for_each(|path| self.files.add(&path));
            let faults = identity::load(&settings).err().unwrap_or_default();
            for fault in faults {
                let (name, location) = match fault.file {
                    TlsFile::Certificate => ("tls-cert", Some(&settings.certificate)),
                    TlsFile::Key => ("tls-key", Some(&settings.key)),
                    TlsFile::ClientCa => ("tls-client-ca", settings.client_ca.as_ref()),
                };
                if location.is_some_and(|location| self.skips_credential(name, location)) {
                    continue;
                }
                let value = self.figment.find_value(name).expect("it named the file that was read");
                self.report(&[name], &value, &fault.message);
            }
        }
        Some(Some(settings))
    }

    /// Whether a file is one that can't be checked here, which is noted.
    fn skips_credential(&mut self, name: &str, location: &FileSource) -> bool {
        let is_unchecked = self.access == FileAccess::WithoutUnitCredentials && location.path().is_err();
        if is_unchecked {
            self.unchecked.push(format!(
                "{name}: {location} is not checked: $CREDENTIALS_DIRECTORY is not set, which systemd sets for the unit alone"
            ));
        }
        is_unchecked
    }

    /// A file, or none where the text is empty.
    fn location(&mut self, name: &'static str) -> Option<Option<FileSource>> {
        let Ok(value) = self.figment.find_value(name) else {
            return Some(None);
        };
        if value.as_str() == Some("") {
            return Some(None);
        }
        let location = value.as_str().and_then(|text| text.parse().ok());
        location.map(Some).or_else(|| self.refuse(name, &value, "a path or credential:NAME"))
    }

    /// The environment's and a careless file's 1.2 is a number.
    fn version(&mut self, name: &'static str) -> Option<MinVersion> {
        let Ok(value) = self.figment.find_value(name) else {
            return Some(MinVersion::Tls13);
        };
        let text = value.as_str().map_or_else(|| shown(&value), str::to_owned);
        text.parse().ok().or_else(|| self.refuse(name, &value, "\"1.2\" or \"1.3\""))
    }

    fn require<T>(&mut self, name: &str, missing: &str) -> Option<T> {
        let value = self.figment.find_value(name).expect("it is there and wants for another");
        self.report(&[name], &value, &format!("expected {missing} beside it, found none"));
        None
    }

    fn integer(&mut self, name: &'static str, default: u64, range: RangeInclusive<u64>) -> Option<u64> {
        let Ok(value) = self.figment.find_value(name) else {
            return Some(default);
        };
        match whole_number(&value) {
            Some(number) if range.contains(&number) => Some(number),
            _ => self.refuse(
                name,
                &value,
                &format!("a whole number from {} to {}", range.start(), range.end()),
            ),
        }
    }

    fn boolean(&mut self, name: &'static str, default: bool) -> Option<bool> {
        let Ok(value) = self.figment.find_value(name) else {
            return Some(default);
        };
        match value.to_bool() {
            Some(boolean) => Some(boolean),
            None => self.refuse(name, &value, "true or false"),
        }
    }

    /// A list; in the environment its brackets may be left out. Each wrong item is reported.
    fn list<T: FromStr>(&mut self, name: &'static str, expected: &str) -> Option<Vec<T>> {
        let Ok(value) = self.figment.find_value(name) else {
            return Some(Vec::new());
        };
        let items: Vec<Value> = match &value {
            Value::Array(_, items) => items.clone(),
            Value::String(_, text) => {
                text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(Value::from).collect()
            }
            _ => return self.refuse(name, &value, &format!("a list, each of which is {expected}")),
        };
        let mut list = Vec::new();
        for (at, item) in items.iter().enumerate() {
            match item.as_str().and_then(|text| text.parse().ok()) {
                Some(read) => list.push(read),
                None => {
                    let names = [name, &at.to_string()];
                    let found = self.written(&names, &value).unwrap_or_else(|| shown(item));
                    self.report(&names, &value, &format!("expected {expected}, found {found}"));
                }
            }
        }
        (list.len() == items.len()).then_some(list)
    }

    /// The file of tokens, read: a mistake in it is one of the configuration. `Some(None)` where none is set.
    fn tokens(&mut self) -> Option<Option<TokensFile>> {
        let name = "tokens-file";
        let Ok(value) = self.figment.find_value(name) else {
            return Some(None);
        };
        let Some(place) = value.as_str() else {
            return self.refuse(name, &value, "a path, or credential: and a name");
        };
        if place.is_empty() {
            return Some(None);
        }
        let location = place.parse::<FileSource>().ok();
        let unread = TokensFile { place: place.to_owned(), grants: Arc::default() };
        if location
            .as_ref()
            .is_some_and(|location| self.access == FileAccess::None || self.skips_credential(name, location))
        {
            return Some(Some(unread));
        }
        let Some(path) = location.and_then(|location| location.path().ok()) else {
            let expected = "the name of a credential that the service manager passes (LoadCredential=)";
            return self.refuse(name, &value, expected);
        };
        self.files.add(&path);
        match tokens_file::read(&path) {
            Ok(grants) => Some(Some(TokensFile { grants: grants.into(), ..unread })),
            Err(mistakes) => {
                mistakes.iter().for_each(|mistake| self.report(&[name], &value, mistake));
                None
            }
        }
    }

    fn credentials(&mut self) -> Option<credentials::CredentialRules> {
        let name = "credentials";
        let Ok(value) = self.figment.find_value(name) else {
            return Some(credentials::CredentialRules::default());
        };
        let Value::Dict(_, entries) = &value else {
            return self.refuse(name, &value, "a table of credentials");
        };
        let mut rules = BTreeMap::new();
        for (selector, entry) in entries {
            match credential_rule(selector, entry) {
                Ok(shape) => {
                    rules.insert(selector.clone(), shape);
                }
                Err((field, expected, hint)) => {
                    let names = [name, selector, field];
                    let names = if field.is_empty() { &names[..2] } else { &names };
                    let value = entry.as_dict().and_then(|fields| fields.get(field)).unwrap_or(entry);
                    let found = match field {
                        "" | LENGTH | FORMAT | ALPHABET => {
                            self.written(names, value).unwrap_or_else(|| shown(value))
                        }
                        unknown => quoted(unknown),
                    };
                    self.report(
                        names,
                        value,
                        &format!("{}: expected {expected}, found {found}{hint}", quoted(selector)),
                    );
                }
            }
        }
        (rules.len() == entries.len()).then(|| credentials::CredentialRules::new(rules))
    }

    fn parsed<T: FromStr>(&mut self, name: &'static str, default: T, expected: &str) -> Option<T> {
        let Ok(value) = self.figment.find_value(name) else {
            return Some(default);
        };
        // Digits of the environment come as a number, but for a mode they are a text: 0660 is not 660.
        let digits = match self.figment.get_metadata(value.tag()) {
            Some(Metadata { source: Some(Source::File(_)), .. }) => None,
            _ => value.to_u128().map(|number| number.to_string()),
        };
        match value.as_str().or(digits.as_deref()).and_then(|text| text.parse().ok()) {
            Some(parsed) => Some(parsed),
            None => self.refuse(name, &value, expected),
        }
    }

    fn refuse<T>(&mut self, name: &str, value: &Value, expected: &str) -> Option<T> {
        let found = self.written(&[name], value).unwrap_or_else(|| shown(value));
        self.report(&[name], value, &format!("expected {expected}, found {found}"));
        None
    }

    fn refuse_unknown(&mut self) {
        let data = self.figment.data().unwrap_or_default();
        for (name, value) in data.into_values().flatten().filter(|(name, _)| !NAMES.contains(&name.as_str()))
        {
            let meant = NAMES
                .into_iter()
                .find(|known| known.replace('-', "") == name.replace(['-', '_'], "").to_lowercase());
            let hint = meant.map_or_else(
                || format!("the settings are {}", NAMES.join(", ")),
                |known| format!("did you mean {known}?"),
            );
            self.report(&[&name], &value, &format!("not a setting; {hint}"));
        }
    }

    /// Adds an error in a value, or in what `names` lead to inside of it, with its place.
    fn report(&mut self, names: &[&str], value: &Value, sentence: &str) {
        let name = key(names[0]);
        self.mistakes.push(match self.source(value) {
            Layer::File(file) => format!("{}: {name}: {sentence}", file.place(names)),
            Layer::Flags => format!("{name}: {sentence} (--{name})"),
            Layer::Environment => {
                let variable = self.variables.iter().rfind(|variable| variable.setting() == names[0]);
                let variable = variable.map_or("the environment", |variable| &variable.name);
                format!("{name}: {sentence} ({})", one_line(variable))
            }
        });
    }

    /// A value as it is written, on one line. `None` for a text of the environment or a flag, and for what is inside one.
    fn written(&self, names: &[&str], value: &Value) -> Option<String> {
        match self.source(value) {
            Layer::File(file) => file.written(names),
            _ if names.len() > 1 || value.as_str().is_some() => None,
            Layer::Flags => {
                let flag = self.flags.iter().rfind(|(name, _)| *name == names[0]);
                flag.map(|(_, text)| one_line(text.trim()))
            }
            Layer::Environment => {
                let variable = self.variables.iter().rfind(|variable| variable.setting() == names[0]);
                variable.map(|variable| one_line(variable.text.trim()))
            }
        }
    }

    fn source(&self, value: &Value) -> Layer<'_> {
        match (self.figment.get_metadata(value.tag()), self.file) {
            (Some(Metadata { source: Some(Source::File(_)), .. }), Some(file)) => Layer::File(file),
            (Some(metadata), _) if metadata.name == FLAG => Layer::Flags,
            _ => Layer::Environment,
        }
    }
}

/// Where a value comes from.
enum Layer<'a> {
    File(&'a File<'a>),
    Environment,
    Flags,
}

const LENGTH: &str = "length";
const FORMAT: &str = "format";
const ALPHABET: &str = "alphabet";

/// What a unit gets, out of its table; else which field is wrong (none: the table itself), what was expected of it, and
/// what may help.
fn credential_rule<'a>(selector: &str, entry: &'a Value) -> Result<KeySpec, (&'a str, String, &'static str)> {
    let quotation = "; a name with a dot stands in quotation marks";
    if !credentials::is_selector(selector) {
        return Err(("", "the name of a credential, or UNIT:NAME with the unit's suffix".into(), quotation));
    }
    let Value::Dict(_, fields) = entry else {
        return Err(("", "a table such as { length = 32, format = \"hex\" }".into(), quotation));
    };
    let known = [LENGTH, FORMAT, ALPHABET];
    if let Some(unknown) = fields.keys().find(|name| !known.contains(&name.as_str())) {
        return Err((unknown, known.join(", "), quotation));
    }
    let one_of = |name, names: Vec<&str>| (name, format!("{name} to be one of {}", names.join(", ")), "");
    let kind = match fields.get(ALPHABET) {
        None => Kind::Key,
        Some(value) => {
            let named = |alphabet: &Alphabet| value.as_str() == Some(alphabet.name());
            let alphabet = Alphabet::ALL.into_iter().find(named);
            let names = || Alphabet::ALL.map(Alphabet::name).to_vec();
            Kind::Password(alphabet.ok_or_else(|| one_of(ALPHABET, names()))?)
        }
    };
    let most = kind.length_max(credentials::LENGTH_MAX);
    let length = fields.get(LENGTH).map_or(Some(credentials::LENGTH_DEFAULT), whole_number);
    let length = length.and_then(|length| KeyLength::new(length, most).ok());
    let length =
        length.ok_or_else(|| (LENGTH, format!("length to be a whole number from 1 to {most}"), ""))?;
    let format = match fields.get(FORMAT) {
        None => kind.formats()[0],
        Some(value) => {
            let named = kind.formats().iter().find(|format| value.as_str() == Some(format.name()));
            let names = || kind.formats().iter().map(|format| format.name()).collect();
            *named.ok_or_else(|| one_of(FORMAT, names()))?
        }
    };
    Ok(KeySpec::new(kind, length, format, None).expect("only a batch can be too large"))
}

/// The table of which [`credential_rule`] makes the same.
fn credential_value(shape: &KeySpec) -> Value {
    let mut fields = Dict::from([
        (LENGTH.to_owned(), shape.length().bytes().into()),
        (FORMAT.to_owned(), shape.format().name().into()),
    ]);
    if let Kind::Password(alphabet) = shape.kind() {
        fields.insert(ALPHABET.to_owned(), alphabet.name().into());
    }
    fields.into()
}

const FLAG: &str = "flag";

const ENVIRONMENT: &str = "environment";

/// A layer of texts, the environment's or of flags: read in the same way, so that a value means the same in both.
struct Texts<'a>(&'static str, Vec<(String, &'a str)>);

impl Provider for Texts<'_> {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.0)
    }

    fn data(&self) -> figment::Result<Map<Profile, Dict>> {
        let entry = |(name, text): &(String, &str)| {
            let value = text.parse().unwrap_or_else(|never: std::convert::Infallible| match never {});
            (name.clone(), value)
        };
        Ok(Profile::Default.collect(self.1.iter().map(entry).collect()))
    }
}

/// TOML's integers are signed, those of the environment and of flags are not.
fn whole_number(value: &Value) -> Option<u64> {
    value.to_u128().and_then(|number| number.try_into().ok()).or_else(|| value.to_i128()?.try_into().ok())
}

/// A basic string of TOML. What does not print is escaped, so that none of it reaches a terminal or begins a line.
fn quoted(text: &str) -> String {
    let characters = text.chars().map(|c| match c {
        '\'' => "'".to_owned(),
        // Rust's own escapes beyond \t, \n, \r, quotes and backslashes are none of TOML's.
        c if c == '\0' || c.escape_debug().len() > 2 => format!("\\U{:08x}", u32::from(c)),
        c => c.escape_debug().to_string(),
    });
    format!("\"{}\"", characters.collect::<String>())
}

/// The longest text that is repeated from a configuration, in characters.
const SHOWN_MAX: usize = 200;

/// The first line of a text, as far as it prints, with `…` where it goes on.
fn one_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let mut shown: String = line
        .chars()
        .take(SHOWN_MAX)
        .flat_map(|c| match c {
            '"' | '\'' | '\\' => vec![c],
            c => c.escape_debug().collect(),
        })
        .collect();
    if line.chars().nth(SHOWN_MAX).is_some() || line.len() < text.trim_end().len() {
        shown.push('…');
    }
    shown
}

/// A key as TOML writes it.
fn key(name: &str) -> String {
    let is_bare = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if name.chars().all(is_bare) && !name.is_empty() { name.to_owned() } else { quoted(name) }
}

/// A value as TOML writes it.
fn shown(value: &Value) -> String {
    match value {
        Value::String(_, text) => quoted(text),
        Value::Bool(_, boolean) => boolean.to_string(),
        Value::Dict(_, entries) if entries.is_empty() => "{}".into(),
        Value::Dict(_, entries) => {
            let entry = |(name, value): (&String, &Value)| format!("{} = {}", key(name), shown(value));
            format!("{{ {} }}", entries.iter().map(entry).collect::<Vec<_>>().join(", "))
        }
        Value::Array(_, items) => format!("[{}]", items.iter().map(shown).collect::<Vec<_>>().join(", ")),
        Value::Char(_, char) => quoted(&char.to_string()),
        Value::Empty(..) => "nothing".into(),
        Value::Num(_, number) => match (number.to_u128(), number.to_i128(), number.to_f64()) {
            (Some(integer), ..) => integer.to_string(),
            (None, Some(integer), _) => integer.to_string(),
            (None, None, Some(fraction)) => format!("{fraction:?}"),
            _ => "a number".into(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// What each document says of a reload, held to [`RELOADABLE`] and [`LIVE_TLS`].
    #[test]
    fn documents_name_the_settings_that_change_at_a_reload() {
        let is_live = |name: &str| RELOADABLE.contains(&name) || LIVE_TLS.contains(&name);
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");

        let manual = include_str!("../../packaging/man/key-service.toml.5").replace("\\-", "-");
        for block in manual.split(".TP\n.BR ").skip(1) {
            let name = block.split(' ').next().unwrap();
            let says = words(block);
            let changes =
                says.contains("Changes at a reload") || says.contains("Changes as .B tls-cert does");
            assert_eq!(changes, is_live(name), "key-service.toml(5): {name}");
        }

        let sample = include_str!("../../packaging/config.toml");
        let (mut block, mut changes, mut seen) = (String::new(), false, 0);
        for line in sample.lines() {
            if let Some((name, _)) = line.strip_prefix('#').and_then(|line| line.split_once(" = "))
                && NAMES.contains(&name)
            {
                if !block.is_empty() {
                    changes = words(&block).contains("hange at a reload")
                        || words(&block).contains("hanges at a reload");
                }
                block.clear();
                seen += 1;
                // The first of TLS speaks for all four.
                assert_eq!(changes, is_live(name) && !LIVE_TLS[1..].contains(&name), "config.toml: {name}");
            } else if line.is_empty() {
                block.clear();
            } else {
                block += line.trim_start_matches('#');
            }
        }
        assert_eq!(seen, NAMES.len());

        let access = include_str!("../../docs/access.md");
        let access = access.split("## What changes at a reload").nth(1).unwrap();
        let manual = include_str!("../../packaging/man/key-service.8").replace("\\-", "-");
        let signal = manual.split(".B SIGHUP").nth(1).unwrap().split(".SH").next().unwrap();
        for name in NAMES {
            assert_eq!(access.contains(&format!("`{name}`")), is_live(name), "access.md: {name}");
            assert!(
                RELOADABLE.contains(&name) == words(signal).split(' ').any(|word| word == name),
                "key-service(8): {name}"
            );
        }
    }

    /// What the file that need not be named is taken for: whether it was read, or why it is refused.
    fn read(default: &Path, must_exist: bool) -> Result<bool, String> {
        Sources::default()
            .read(default, must_exist, FileAccess::None, &mut WatchedFiles::default())
            .map(|(config, _)| config.file.is_some())
            .map_err(|mistakes| mistakes.to_string())
    }

    #[test]
    fn the_default_file_may_be_absent_until_it_was_read() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path();
        let file = directory.join("config.toml");
        assert_eq!(read(&file, false), Ok(false));
        assert_eq!(read(&directory.join("absent/config.toml"), false), Ok(false));
        assert!(read(&file, true).unwrap_err().contains("config.toml: the file is gone"));
        symlink("nowhere", &file).unwrap();
        assert!(read(&file, false).unwrap_err().contains("No such file"), "a link that leads nowhere");
        fs::create_dir(directory.join("sub")).unwrap();
        assert!(
            read(&directory.join("sub"), false).unwrap_err().contains("found something else"),
            "a directory"
        );
        symlink("nowhere", directory.join("link")).unwrap();
        assert!(read(&directory.join("link/config.toml"), false).unwrap_err().contains("link"), "above it");
        fs::remove_file(&file).unwrap();
        fs::write(&file, "").unwrap();
        assert!(read(&file.join("config.toml"), false).unwrap_err().contains("Not a directory"));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!((read(&file, false), read(&file, true)), (Ok(true), Ok(true)));
    }
}
