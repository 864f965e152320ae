//! The command line.

use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::{Arg, ArgMatches, Args, FromArgMatches, Parser, Subcommand};
use zeroize::Zeroizing;

use crate::access::token::Token;
use crate::access::tokens_file::{ExpiryDate, Grant, TokenName};
use crate::config::{Setting, Sources, settings};
use crate::keys::generator::{Generator, OsRandom};

/// Issues cryptographically secure random keys over HTTP.
///
/// Settings come from flags, then KEYSERVICE_* variables, then the configuration file, then defaults.
/// key-service.toml(5) describes all of them.
#[derive(Debug, Clone, Parser)]
#[command(name = "key-service", version, max_term_width = 100)]
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

/// What to do with tokens.
#[derive(Debug, Clone, Subcommand)]
pub enum TokenAction {
    /// Print a new token, which is shown only once, and on the next line its entry for the tokens file, with its hash
    New {
        /// Name of the client: letters, digits, dots, hyphens, underscores and at signs
        #[arg(long, value_name = "NAME", value_parser = |text: &str| text.parse::<TokenName>().map_err(|()| TokenName::GRAMMAR))]
        name: TokenName,

        /// Maximum key size for this token, in bytes [default: max-size]
        #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
        max_size: Option<u64>,

        /// Requests per second for this token, from all addresses together [default: rate-requests for each address]
        #[arg(long, value_name = "NUMBER")]
        rate_requests: Option<NonZeroU64>,

        /// Key bytes per second for this token, from all addresses together [default: rate-bytes for each address]
        #[arg(long, value_name = "BYTES")]
        rate_bytes: Option<NonZeroU64>,

        /// First day on which the token is no longer valid, in UTC: YYYY-MM-DD [default: never]
        #[arg(long, value_name = "DATE", value_parser = |text: &str| text.parse::<ExpiryDate>().map_err(|()| "expected a date such as 2027-01-31"))]
        expires: Option<ExpiryDate>,
    },
}

impl Cli {
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

impl TokenAction {
    /// A new token, and on the next line the grant for the tokens file. Neither is kept.
    ///
    /// # Errors
    /// A sentence, when the random generator has failed.
    pub fn run(self) -> Result<Zeroizing<String>, String> {
        let Self::New { name, max_size, rate_requests, rate_bytes, expires } = self;
        let token = Generator::new(OsRandom)
            .and_then(|generator| Token::generate(&generator))
            .map_err(|failure| format!("no token can be generated: {failure}"))?;
        let grant = Grant { max_size, rate_requests, rate_bytes, expires, ..Grant::new(name, token.digest) };
        Ok(Zeroizing::new(format!("{}\n{grant}\n", *token.text)))
    }
}
