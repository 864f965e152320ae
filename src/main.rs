//! Arguments, configuration, logging, `run`, exit status.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use key_service::access::token::Token;
use key_service::access::tokens_file::Grant;
use key_service::cli::{Cli, Command, TokenAction};
use key_service::config::watch::WatchedFiles;
use key_service::config::{ConfigErrors, Sources, injected_variables};
use key_service::daemon::{RunError, forbid_core_dumps, run};
use key_service::keys::generator::{Generator, OsRandom};
use key_service::probe::Target;
use key_service::server::activation::ActivatedSockets;
use key_service::systemd::{notify, reload};
use key_service::telemetry::log::Log;
use zeroize::Zeroizing;

/// Could not start or go on.
const EXIT_FAILURE: u8 = 1;

/// sysexits.h, EX_CONFIG: something is wrong with the configuration.
const EXIT_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let cli = Cli::parse(); // wrong usage ends here, with status 2
    let (check, command) = (cli.check, cli.command.clone());
    if let Some(Command::Token { action }) = command {
        return new_token(action);
    }
    let sources = cli.sources();
    match command {
        Some(Command::Health { url, .. }) if !check => return health(url.as_deref(), &sources),
        Some(Command::Reload { unit }) if !check => {
            let Err(error) = reload::run(&unit, sources.path()) else { return ExitCode::SUCCESS };
            eprintln!("key-service: {error}");
            return EXIT_FAILURE.into();
        }
        _ => {}
    }
    let mut files = WatchedFiles::default();
    // systemd runs it as the unit: what the unit lacks is a mistake. A shell has none of the unit's credentials.
    let loaded = if check && !notify::is_invoker() {
        sources.check().map(|(config, unchecked)| {
            unchecked.iter().for_each(|notice| eprintln!("key-service: {notice}"));
            config
        })
    } else {
        sources.load(&mut files)
    };
    let config = match loaded {
        Ok(config) => config,
        Err(mistakes) => {
            report(&mistakes);
            notify::refused(&mistakes.to_string());
            return EXIT_CONFIG.into();
        }
    };
    if check {
        return print(&config.to_string());
    }
    // Before there are threads, since it changes the environment; judged when there is a log to say it in.
    let inherited = ActivatedSockets::take();
    let log = match Log::start(config.log_level) {
        Ok(log) => log,
        Err(error) => {
            let error = RunError::Thread("log", error).to_string();
            eprintln!("key-service: {error}");
            notify::refused(&error);
            return EXIT_FAILURE.into();
        }
    };
    let injected = injected_variables();
    if !injected.is_empty() {
        let variables = injected.join(" ").escape_debug().to_string();
        tracing::debug!(
            count = injected.len(),
            variables,
            "ignored the variables of a Service or a link of this name"
        );
    }
    if let Err(error) = forbid_core_dumps() {
        tracing::warn!(%error, "core dumps can't be forbidden");
    }
    let ended = inherited
        .map_err(Into::into)
        .and_then(|inherited| run(config, &sources, files, inherited, OsRandom, &log));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            notify::refused(&error.to_string());
            EXIT_FAILURE.into()
        }
    }
}

fn report(mistakes: &ConfigErrors) {
    mistakes.iter().for_each(|mistake| eprintln!("key-service: {mistake}"));
}

fn health(url: Option<&str>, sources: &Sources) -> ExitCode {
    // A URL of plain HTTP says all that there is to know.
    let endpoint = match url {
        Some(url) if url.starts_with("http://") => None,
        _ => match sources.endpoint() {
            Ok(endpoint) => Some(endpoint),
            Err(mistakes) => {
                report(&mistakes);
                return EXIT_CONFIG.into();
            }
        },
    };
    let target = match (url, &endpoint) {
        (None, Some(endpoint)) => Target::local(endpoint),
        (url, endpoint) => Target::parse(url.unwrap_or_default(), endpoint.as_ref()),
    };
    match target.and_then(|target| target.ask()) {
        Ok(answer) => print(&format!("{answer}\n")),
        Err(error) => {
            eprintln!("key-service: {error}");
            EXIT_FAILURE.into()
        }
    }
}

/// Prints a token and the line that grants it something. Neither is kept.
fn new_token(
    TokenAction::New { name, max_size, rate_requests, rate_bytes, expires }: TokenAction,
) -> ExitCode {
    match Generator::new(OsRandom).and_then(|generator| Token::generate(&generator)) {
        Ok(token) => {
            let grant =
                Grant { max_size, rate_requests, rate_bytes, expires, ..Grant::new(name, token.digest) };
            print(&Zeroizing::new(format!("{}\n{grant}\n", *token.text)))
        }
        Err(failure) => {
            eprintln!("key-service: no token can be made: {failure}");
            EXIT_FAILURE.into()
        }
    }
}

/// Unlike `print!`, a closed pipe is a failure here and not a panic.
fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => EXIT_FAILURE.into(),
    }
}
