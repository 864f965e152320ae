//! The configuration: defaults, then the TOML file, then the environment, then flags, into a [`Config`] that is always
//! valid. Every error is reported with its place, and nothing starts while there is one.
//!
//! May import: `systemd`, `http`, `server`, `access`, `telemetry`, `keys`.
//!
//! A new setting is an entry in `settings.rs`, its use and its test; `UPDATE_DOCUMENTS=1 cargo test --test settings`
//! then writes the documents. A new kind of value goes to `value_kind.rs`, a rule between settings to `rules.rs`, and a
//! setting that names a file is read in `named_files.rs`.

mod credential_rules;
mod endpoint;
mod environment;
mod errors;
mod file;
mod groups;
mod loader;
mod named_files;
mod print;
mod reload;
mod rules;
mod settings;
mod sources;
mod table;
mod value_kind;
pub mod watch;

pub use self::endpoint::LocalEndpoint;
pub use self::environment::ENV_PREFIX;
pub use self::errors::ConfigErrors;
pub use self::settings::{Config, MAX_SIZE_DEFAULT, MAX_SIZE_LIMIT, WORKERS_MAX, settings};
pub use self::sources::{DEFAULT_PATH, Sources, injected_variables};
pub use self::table::{Reload, Setting};
