//! Parses arguments, loads the configuration, starts the log, runs the daemon or a subcommand, and sets the exit status.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use key_service::cli::{Cli, Command};
use key_service::config::watch::WatchedFiles;
use key_service::config::{Config, ConfigErrors, Sources};
use key_service::daemon::{RunError, run};
use key_service::keys::generator::OsRandom;
use key_service::probe::{self, ProbeError};
use key_service::server::activation::ActivatedSockets;
use key_service::systemd::{notify, reload};
use key_service::telemetry::log::Log;

/// Runtime failure.
const EXIT_FAILURE: u8 = 1;

/// sysexits.h, EX_CONFIG: the configuration has errors.
const EXIT_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let cli = Cli::from_arguments(); // wrong usage ends the process here, with status 2
    let (check, command) = (cli.check, cli.command.clone());
    let sources = cli.sources();
    match command {
        Some(Command::Key(key)) => key.run().map_or_else(failure, |()| ExitCode::SUCCESS),
        Some(Command::Password(password)) => password.run().map_or_else(failure, |()| ExitCode::SUCCESS),
        Some(Command::Token { action }) => action.run().map_or_else(failure, |token| print(&token)),
        Some(Command::Health { url, .. }) if !check => match probe::run(url.as_deref(), &sources) {
            Ok(answer) => print(&format!("{answer}\n")),
            Err(ProbeError::Config(errors)) => config_failure(&errors),
            Err(ProbeError::Unhealthy(reason)) => failure(reason),
        },
        Some(Command::Reload { unit }) if !check => {
            reload::run(&unit, sources.path()).map_or_else(failure, |()| ExitCode::SUCCESS)
        }
        _ => {
            let mut files = WatchedFiles::default();
            match load(check, &sources, &mut files) {
                Ok(config) if check => print(&config.to_string()),
                Ok(config) => serve(config, &sources, files),
                Err(errors) => {
                    notify::startup_failed(&errors.to_string());
                    config_failure(&errors)
                }
            }
        }
    }
}

/// A check from a shell lacks the unit's credentials, so it only names them. For systemd, which runs the check as the
/// unit, a missing credential is an error.
fn load(check: bool, sources: &Sources, files: &mut WatchedFiles) -> Result<Config, ConfigErrors> {
    if !check || notify::is_started_by_manager() {
        return sources.load(files);
    }
    let (config, unchecked) = sources.check()?;
    unchecked.iter().for_each(|notice| eprintln!("key-service: {notice}"));
    Ok(config)
}

fn serve(config: Config, sources: &Sources, files: WatchedFiles) -> ExitCode {
    // Before there are threads, since this changes the environment. An error waits for the log.
    let inherited = ActivatedSockets::take();
    let log = match Log::start(config.log_level) {
        Ok(log) => log,
        Err(error) => {
            let error = RunError::Thread("log", error);
            notify::startup_failed(&error.to_string());
            return failure(error);
        }
    };
    let served = inherited
        .map_err(RunError::from)
        .and_then(|inherited| run(config, sources, files, inherited, OsRandom, &log));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            notify::startup_failed(&error.to_string());
            EXIT_FAILURE.into()
        }
    }
}

fn config_failure(errors: &ConfigErrors) -> ExitCode {
    errors.iter().for_each(|error| eprintln!("key-service: {error}"));
    EXIT_CONFIG.into()
}

fn failure(error: impl fmt::Display) -> ExitCode {
    // `eprintln!` would panic if standard error is full or closed.
    let _ = writeln!(std::io::stderr(), "key-service: {error}");
    EXIT_FAILURE.into()
}

/// Unlike `print!`, this fails and does not panic if the pipe is closed.
fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure(format_args!("failed to write to standard output: {error}")),
    }
}
