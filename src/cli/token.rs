//! `key-service token`: creates bearer tokens.

use std::num::NonZeroU64;

use clap::{ArgMatches, Args, Command, FromArgMatches, Subcommand, value_parser};
use zeroize::Zeroizing;

use super::option::option;
use crate::access::token::Token;
use crate::access::tokens_file::{ExpiryDate, Grant, TokenName};
use crate::keys::generator::{Generator, OsRandom};

/// What to do with tokens.
#[derive(Debug, Clone, Subcommand)]
pub enum TokenAction {
    /// Print a new token, which is shown only once, and on the next line its entry for the tokens file, with its hash
    New(NewToken),
}

const NAME: &str = "name";
const MAX_SIZE: &str = "max-size";
const RATE_REQUESTS: &str = "rate-requests";
const RATE_BYTES: &str = "rate-bytes";
const EXPIRES: &str = "expires";

/// What the token is for, and what it grants.
#[derive(Debug, Clone)]
pub struct NewToken {
    name: TokenName,
    max_size: Option<u64>,
    rate_requests: Option<NonZeroU64>,
    rate_bytes: Option<NonZeroU64>,
    expires: Option<ExpiryDate>,
}

impl Args for NewToken {
    fn augment_args(command: Command) -> Command {
        let name = |text: &str| text.parse::<TokenName>().map_err(|()| TokenName::GRAMMAR);
        let date = |text: &str| text.parse::<ExpiryDate>().map_err(|()| "expected a date such as 2027-01-31");
        command.args([
            option(NAME, "NAME", "Name of the client: letters, digits, dots, hyphens, underscores and at signs")
                .required(true)
                .value_parser(name),
            option(MAX_SIZE, "BYTES", "Maximum key size for this token, in bytes [default: max-size]")
                .value_parser(value_parser!(u64).range(1..)),
            option(
                RATE_REQUESTS,
                "NUMBER",
                "Requests per second for this token, from all addresses together [default: rate-requests for each address]",
            )
            .value_parser(value_parser!(NonZeroU64)),
            option(
                RATE_BYTES,
                "BYTES",
                "Key bytes per second for this token, from all addresses together [default: rate-bytes for each address]",
            )
            .value_parser(value_parser!(NonZeroU64)),
            option(
                EXPIRES,
                "DATE",
                "First day on which the token is no longer valid, in UTC: YYYY-MM-DD [default: never]",
            )
            .value_parser(date),
        ])
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for NewToken {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self {
            name: matches.get_one::<TokenName>(NAME).expect("clap requires it").clone(),
            max_size: matches.get_one(MAX_SIZE).copied(),
            rate_requests: matches.get_one(RATE_REQUESTS).copied(),
            rate_bytes: matches.get_one(RATE_BYTES).copied(),
            expires: matches.get_one(EXPIRES).copied(),
        })
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
        let Self::New(NewToken { name, max_size, rate_requests, rate_bytes, expires }) = self;
        let token = Generator::new(OsRandom)
            .and_then(|generator| Token::generate(&generator))
            .map_err(|failure| format!("no token can be generated: {failure}"))?;
        let grant = Grant { max_size, rate_requests, rate_bytes, expires, ..Grant::new(name, token.digest) };
        Ok(Zeroizing::new(format!("{}\n{grant}\n", *token.text)))
    }
}
