//! The command line: the options of the daemon, and the commands that do something else.
//!
//! May import: every layer below, and of its own layer what a command runs. A new command goes into [`Command`], and what
//! it does into a file of its own.

mod generate;
mod option;
mod output;
mod token;

use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Arg, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

pub use self::generate::Generate;
pub use self::output::GenerateError;
pub use self::token::{NewToken, TokenAction};
use crate::config::{Setting, Sources, settings};
use crate::telemetry::version::VERSION;

/// Issues cryptographically secure random keys over HTTP.
///
/// Settings come from flags, then KEYSERVICE_* variables, then the configuration file, then defaults.
/// key-service.toml(5) describes all of them.
#[derive(Debug, Clone, Parser)]
#[command(name = "key-service", version = VERSION, max_term_width = 100)]
#[command(
    after_help = "Exit status: 0 clean shutdown, 1 runtime failure, 2 wrong usage, 78 invalid configuration."
)]
pub struct Cli {
    #[command(flatten)]
    settings: SettingFlags,

    /// Configuration file, which must exist [default: /etc/key-service/config.toml, which need not exist]
    #[arg(long, global = true, value_name = "PATH")]
    config: Option<PathBuf>,

    /// Check the configuration, print the effective settings, and exit
    #[arg(long, global = true)]
    pub check: bool,

    /// What to do instead of serving keys.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What to do instead of serving keys.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Check the health of a running service: prints its response, and exits with 0 if it is healthy, else with 1
    Health {
        /// URL to check, such as http://host:port; the path is /health unless given [default: the configured address]
        #[arg(long, value_name = "URL")]
        url: Option<String>,

        /// Accepted after `health` too, like the global flags. It can't be global: `token new` has one of the same name.
        #[arg(long, value_name = "BYTES", hide = true)]
        max_size: Option<String>,
    },
    /// Print a random key, or write it to a file, without any service
    Key(Generate<false>),
    /// Print a random password, or write it to a file, without any service
    Password(Generate<true>),
    /// Reload the unit's service, for ExecReload=: sends SIGHUP to $MAINPID, waits, and exits with 1 if the reload was refused
    Reload {
        /// Name of the unit (%n)
        #[arg(value_name = "UNIT")]
        unit: String,
    },
    /// Create a bearer token
    Token {
        /// What to do.
        #[command(subcommand)]
        action: TokenAction,
    },
}

impl Cli {
    /// Parses the arguments of this process. Wrong usage ends it, with status 2.
    pub fn from_arguments() -> Self {
        let mut command = Self::command();
        // Global options that two commands refuse are not in their help.
        let is_global = |option: &&Arg| option.is_global_set();
        let refused: Vec<_> =
            command.get_arguments().filter(is_global).map(|option| option.clone().hide(true)).collect();
        for name in ["key", "password"] {
            command = command.mut_subcommand(name, |command| command.args(&refused));
        }
        let cli = Self::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit());
        if matches!(cli.command, Some(Command::Key(_) | Command::Password(_))) {
            cli.refuse_options_of_the_service();
        }
        cli
    }

    fn refuse_options_of_the_service(&self) {
        let others = [("check", self.check), ("config", self.config.is_some())];
        let others = others.into_iter().filter_map(|(name, is_given)| is_given.then_some(name));
        if let Some(name) = self.settings.0.iter().map(|(name, _)| *name).chain(others).next() {
            let error = format_args!(
                "expected no option of the service, found --{name}: this command reads no configuration, and its own \
                 options stand after it\n"
            );
            clap::Error::raw(ErrorKind::ArgumentConflict, error).exit();
        }
    }

    /// The configuration's sources; flags are parsed there, with the other layers and by the same rules.
    pub fn sources(self) -> Sources {
        Sources { file: self.config, flags: self.settings.0 }
    }
}

/// The flags of the table of settings: names and values.
#[derive(Debug, Clone)]
struct SettingFlags(Vec<(&'static str, String)>);

impl Args for SettingFlags {
    fn augment_args(command: clap::Command) -> clap::Command {
        let flag = |setting: Setting| {
            let Setting { name, flag, help, values, default, .. } = setting;
            let help = format!("{help}: {values} [default: {}]", default.trim_matches('"')).replace('`', "");
            // `token new` has an option --max-size of its own.
            Some(Arg::new(name).long(name).value_name(flag?).help(help).global(name != "max-size"))
        };
        command.args(settings().into_iter().filter_map(flag))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for SettingFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let names =
            settings().into_iter().filter(|setting| setting.flag.is_some()).map(|setting| setting.name);
        let given = |name| Some((name, matches.get_one::<String>(name)?.clone()));
        Ok(Self(names.filter_map(given).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
