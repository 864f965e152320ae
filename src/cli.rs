//! The command line.

use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use zeroize::Zeroizing;

use crate::access::token::Token;
use crate::access::tokens_file::{ExpiryDate, Grant, TokenName};
use crate::config::Sources;
use crate::keys::generator::{Generator, OsRandom};

/// Hands out cryptographically secure random keys over HTTP.
///
/// Settings come from flags, then KEYSERVICE_* variables, then the configuration file, then defaults; see
/// key-service.toml(5) for all of them.
#[derive(Debug, Clone, Parser)]
#[command(name = "key-service", version, max_term_width = 100)]
#[command(
    after_help = "Exit status: 0 stopped as told, 1 could not start or go on, 2 wrong usage, 78 wrong configuration."
)]
pub struct Cli {
    /// Address to serve keys on: IPv4, IPv6, unix:/path, or * for every address [default: *]
    #[arg(long, global = true, value_name = "ADDRESS")]
    host: Option<String>,

    /// Port to serve keys on [default: 1123]
    #[arg(long, global = true, value_name = "PORT")]
    srv_port: Option<String>,

    /// Largest key that is handed out, in bytes [default: 1024]
    #[arg(long, value_name = "BYTES")]
    max_size: Option<String>,

    /// Port to serve metrics on; the same as --srv-port serves them beside the keys [default: 8000]
    #[arg(long, global = true, value_name = "PORT")]
    metrics_port: Option<String>,

    /// Severity from which on events are logged: off, error, warn, info, debug or trace [default: info]
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<String>,

    /// Configuration file, which must exist [default: /etc/key-service/config.toml, which need not]
    #[arg(long, global = true, value_name = "PATH")]
    config: Option<PathBuf>,

    /// Read the configuration, print what is in effect, and stop
    #[arg(long, global = true)]
    pub check: bool,

    /// What to do instead of serving keys.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What to do instead of serving keys.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Ask a running service how it is: prints its answer, and exits with 0 if it is well, else with 1
    Health {
        /// Whom to ask: http://host:port, with a path other than /health if need be [default: the configured address]
        #[arg(long, value_name = "URL")]
        url: Option<String>,

        /// As before `health`. It can't be a global option: `token new` has one of the same name.
        #[arg(long, value_name = "BYTES", hide = true)]
        max_size: Option<String>,
    },
    /// What the unit runs for `systemctl reload`: sends SIGHUP to $MAINPID, waits, and exits with 1 if the reload was refused
    Reload {
        /// The unit, as systemd calls it: %n
        #[arg(value_name = "UNIT")]
        unit: String,
    },
    /// Make a bearer token
    Token {
        /// What to do.
        #[command(subcommand)]
        action: TokenAction,
    },
}

/// What to do with tokens.
#[derive(Debug, Clone, Subcommand)]
pub enum TokenAction {
    /// Print a new token, which is shown once, and on the next line what to add to the tokens file: its hash
    New {
        /// Whose it is: letters, digits, dots, hyphens, underscores and at signs
        #[arg(long, value_name = "NAME", value_parser = |text: &str| text.parse::<TokenName>().map_err(|()| TokenName::GRAMMAR))]
        name: TokenName,

        /// Largest key that it is good for, in bytes [default: as everyone's]
        #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
        max_size: Option<u64>,

        /// Requests a second, wherever they come from [default: as every address's]
        #[arg(long, value_name = "NUMBER")]
        rate_requests: Option<NonZeroU64>,

        /// Key bytes a second [default: as every address's]
        #[arg(long, value_name = "BYTES")]
        rate_bytes: Option<NonZeroU64>,

        /// First day on which it is not valid any more, in UTC: YYYY-MM-DD [default: never]
        #[arg(long, value_name = "DATE", value_parser = |text: &str| text.parse::<ExpiryDate>().map_err(|()| "expected a date such as 2027-01-31"))]
        expires: Option<ExpiryDate>,
    },
}

impl Cli {
    /// The configuration's sources; flags are read there, with the other layers and by the same rules.
    pub fn sources(self) -> Sources {
        let flags = [
            ("host", self.host),
            ("srv-port", self.srv_port),
            ("max-size", self.max_size),
            ("metrics-port", self.metrics_port),
            ("log-level", self.log_level),
        ];
        Sources {
            file: self.config,
            flags: flags.into_iter().filter_map(|(name, value)| Some((name, value?))).collect(),
        }
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
