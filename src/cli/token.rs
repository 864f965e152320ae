//! `key-service token`: creates bearer tokens.

use std::num::NonZeroU64;

use clap::Subcommand;
use zeroize::Zeroizing;

use crate::access::token::Token;
use crate::access::tokens_file::{ExpiryDate, Grant, TokenName};
use crate::keys::generator::{Generator, OsRandom};

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
