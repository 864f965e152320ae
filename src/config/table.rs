//! The macro that turns the table of settings into `Config` and the functions that load, print and reload it.

/// What a reload does about a changed setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reload {
    /// It takes effect at once.
    Applied,
    /// It takes effect at once if TLS is on before and after.
    AppliedWithTls,
    /// It takes effect at the next restart.
    NeedsRestart,
}

/// One entry of the table, as texts: for `--help` and the documents.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The key in the configuration file.
    pub name: &'static str,
    /// The values that are valid, such as `a whole number from 1 to 3600`.
    pub values: String,
    /// The default value, in TOML.
    pub default: String,
    /// What a reload does about a change.
    pub reload: Reload,
    /// Whether the setting protects keys: a changed file alone does not remove it.
    pub protects: bool,
    /// What `--help` calls the value of its flag; `None` if it has no flag.
    pub flag: Option<&'static str>,
    /// One line that says what the setting does, in Markdown and without a full stop.
    pub help: &'static str,
    /// Further sentences for the documents, in Markdown; may be empty.
    pub details: &'static str,
    /// Lines for the configuration file.
    pub examples: &'static [&'static str],
}

/// Defines each setting once. An entry is
///
/// ```text
/// "name-in-files" field_of_config: Type {
///     kind: how a value is checked, read and printed (value_kind.rs),
///     default: its default; it may use the fields of the entries above, each an `Option` that is `None` if wrong,
///     reload: a variant of [`Reload`],
///     protects: true,       // optional: only a signal or a restart removes it
///     flag: "VALUE_NAME",   // optional: it has the flag --name-in-files VALUE_NAME
///     help: "One line",
///     details: "Sentences.",       // optional
///     examples: ["a line"],        // optional
/// }
/// ```
macro_rules! settings {
    ($(
        $name:literal $field:ident: $type:ty {
            kind: $kind:expr,
            default: $default:expr,
            reload: $reload:ident,
            $(protects: $protects:literal,)?
            $(flag: $flag:literal,)?
            help: $help:literal,
            $(details: $details:literal,)?
            $(examples: [$($example:literal),+ $(,)?],)?
        }
    )+) => {
        /// Every setting, valid, and what was read with them.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct Config {
            /// The configuration file that was read; `None` if there was none.
            pub file: Option<PathBuf>,
            /// The contents of `tokens_file`; empty if no file is set, and then no token is required.
            pub grants: Arc<[Grant]>,
            $(#[doc = $help] pub $field: $type,)+
        }

        /// The names of all settings, in the order of the table.
        pub(super) const NAMES: &[&str] = &[$($name),+];

        /// The settings, each `None` if its value is wrong.
        #[derive(Debug, Default)]
        pub(super) struct LoadedSettings {
            $(pub(super) $field: Option<$type>,)+
        }

        impl LoadedSettings {
            /// Reads every setting; `loader` collects the errors.
            pub(super) fn read(loader: &mut Loader<'_>) -> Self {
                $(let $field = loader.read($name, &$kind, || $default);)+
                Self { $($field),+ }
            }

            /// `None` if any setting is wrong.
            pub(super) fn complete(self, file: Option<PathBuf>, grants: Arc<[Grant]>) -> Option<Config> {
                Some(Config { file, grants, $($field: self.$field?),+ })
            }
        }

        impl Config {
            /// The value of each setting, in the order of the table.
            pub(super) fn values(&self) -> Vec<Value> {
                vec![$($kind.to_value(&self.$field)),+]
            }

            /// Takes those settings from `new` whose entries have this `reload`.
            pub(super) fn apply(&mut self, new: &Self, reload: Reload) {
                $(if reload == Reload::$reload { self.$field.clone_from(&new.$field); })+
            }
        }

        /// The table, as texts.
        pub fn settings() -> Vec<Setting> {
            let mut defaults = Config::default().values().into_iter().map(|value| to_toml(&value));
            vec![$(Setting {
                name: $name,
                values: (&$kind as &dyn ValueKind<Value = $type>).values(),
                default: defaults.next().unwrap_or_default(),
                reload: Reload::$reload,
                protects: false $(|| $protects)?,
                flag: None$(.or(Some($flag)))?,
                help: $help,
                details: concat!($($details)?),
                examples: &[$($($example),+)?],
            }),+]
        }
    };
}

pub(super) use settings;
