//! Arguments, configuration, logging, `run`, exit status.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use key_service::cli::{Cli, Command, TokenAction};
use key_service::config::Config;
use key_service::listener::Inherited;
use key_service::logging::Log;
use key_service::probe::Target;
use key_service::random::{Generator, Kernel};
use key_service::token::{Grant, Token};
use key_service::watch::WatchedFiles;
use key_service::{forbid_core_dumps, run, systemd};
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
    let mut files = WatchedFiles::default();
    let loaded = match command {
        // Who asks for health need not be allowed to read the service's key.
        Some(_) => sources.settings(),
        // systemd runs it as the unit: what the unit lacks is a mistake. A shell has none of the unit's credentials.
        None if check && !systemd::is_invoker() => sources.check().map(|(config, unchecked)| {
            unchecked.iter().for_each(|notice| eprintln!("key-service: {notice}"));
            config
        }),
        None => sources.load(&mut files),
    };
    let config = match loaded {
        Ok(config) => config,
        Err(mistakes) => {
            for mistake in mistakes.iter() {
                eprintln!("key-service: {mistake}");
            }
            systemd::refused(&mistakes.to_string());
            return EXIT_CONFIG.into();
        }
    };
    if check {
        return print(&config.to_string());
    }
    if let Some(Command::Health { url }) = command {
        return health(url, &config);
    }
    // Before there are threads, since it changes the environment; judged when there is a log to say it in.
    let inherited = Inherited::take();
    let log = Log::start(config.log_level);
    if let Err(error) = forbid_core_dumps() {
        tracing::warn!(%error, "core dumps can't be forbidden");
    }
    let ended = inherited
        .map_err(Into::into)
        .and_then(|inherited| run(config, &sources, files, inherited, Kernel, &log));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            systemd::refused(&error.to_string());
            EXIT_FAILURE.into()
        }
    }
}

fn health(url: Option<String>, config: &Config) -> ExitCode {
    let target = url.map_or_else(|| Target::local(config), |url| Target::parse(&url, config));
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
    match Generator::new(Kernel).and_then(|generator| Token::draw(&generator)) {
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
