//! `key-service key` and `key-service password`: the keys and passwords of the HTTP service, without a service. They read no
//! configuration and no environment variable, so an init container can run them.

use std::fmt;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::builder::PossibleValuesParser;
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, value_parser};

use super::option::option;
use super::output::{self, GenerateError};
use crate::config::{MAX_SIZE_DEFAULT, MAX_SIZE_LIMIT};
use crate::daemon::resources::forbid_core_dumps;
use crate::keys::encoded_stream::EncodedStream;
use crate::keys::format::{Format, Kind};
use crate::keys::generator::{Generator, OsRandom};
use crate::keys::key::KeyLength;
use crate::keys::key_spec::{KeySpec, parse_count};
use crate::keys::password::Alphabet;

const LENGTH: &str = "length";
const ALPHABET: &str = "alphabet";
const FORMAT: &str = "format";
const COUNT: &str = "count";
const MAX_SIZE: &str = "max-size";
const OUTPUT: &str = "output";
const KEEP_EXISTING: &str = "keep-existing";

/// The arguments of `key-service key`, or of `key-service password`.
#[derive(Debug, Clone)]
pub struct Generate<const IS_PASSWORD: bool>(Arguments);

#[derive(Debug, Clone)]
struct Arguments {
    length: String,
    /// `None` is a key.
    alphabet: Option<String>,
    format: String,
    count: Option<String>,
    max_size: u64,
    /// `None` is standard output.
    output: Option<PathBuf>,
    keep_existing: bool,
}

impl<const IS_PASSWORD: bool> Generate<IS_PASSWORD> {
    /// Generates what is asked for and writes it. Wrong usage ends the process, with status 2.
    ///
    /// # Errors
    /// The output is not complete.
    pub fn run(&self) -> Result<(), GenerateError> {
        self.0.run()
    }
}

impl<const IS_PASSWORD: bool> Args for Generate<IS_PASSWORD> {
    fn augment_args(command: Command) -> Command {
        if IS_PASSWORD { password(command) } else { key(command) }
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<const IS_PASSWORD: bool> FromArgMatches for Generate<IS_PASSWORD> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self(Arguments::new(matches)))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

fn key(command: Command) -> Command {
    let count = "Number of keys, 1 to 1024, in another format than raw [default: one key, which is no batch]";
    let max_size = option(MAX_SIZE, "BYTES", "")
        .help(format!("Maximum LENGTH [default: {MAX_SIZE_DEFAULT}]"))
        .value_parser(value_parser!(u64).range(1..=MAX_SIZE_LIMIT));
    let command =
        arguments(command, Kind::Key, "Number of random bytes, 1 to --max-size", count).arg(max_size);
    command.after_help(
        "Examples:\n  \
           key-service key 32 --format hex\n  \
           key-service key 32 --format base64url --count 3\n  \
           key-service key 32 --output session.key\n\n\
         Exit status: 0 the whole output was written, 1 failure, 2 wrong usage.",
    )
}

fn password(command: Command) -> Command {
    let count = "Number of passwords, 1 to 1024 [default: one password, which is no batch]";
    let alphabets = Alphabet::ALL.map(Alphabet::name);
    let alphabet = choice(ALPHABET, "ALPHABET", "Characters that a password may have", &alphabets);
    let kind = Kind::Password(Alphabet::default());
    let command = arguments(command, kind, "Number of random characters, 1 to 1024", count).arg(alphabet);
    command.after_help(
        "Examples:\n  \
           key-service password 24\n  \
           key-service password 12 --alphabet unambiguous --count 30\n  \
           key-service password 24 --output password\n\n\
         Exit status: 0 the whole output was written, 1 failure, 2 wrong usage.",
    )
}

/// Adds what both commands have.
#[inline(never)]
fn arguments(command: Command, kind: Kind, length: &'static str, count: &'static str) -> Command {
    let formats: Vec<_> = kind.formats().iter().map(|format| format.name()).collect();
    let output = "Write to this file, which must not exist, instead of standard output: complete or not at all, with mode 0600";
    let keep_existing = "If FILE exists and has the size of the output, keep it and exit with 0";
    command.args([
        Arg::new(LENGTH).value_name("LENGTH").help(length).required(true).allow_negative_numbers(true),
        choice(FORMAT, "FORMAT", "How the output is written", &formats),
        option(COUNT, "NUMBER", count).allow_negative_numbers(true),
        option(OUTPUT, "FILE", output).value_parser(value_parser!(PathBuf)),
        Arg::new(KEEP_EXISTING)
            .long(KEEP_EXISTING)
            .help(keep_existing)
            .action(ArgAction::SetTrue)
            .requires(OUTPUT),
    ])
}

/// An option that has one of these values, the first one by default. `--help` and the shell completions list them.
#[inline(never)]
fn choice(name: &'static str, value: &'static str, help: &'static str, values: &[&'static str]) -> Arg {
    option(name, value, help).default_value(values[0]).value_parser(PossibleValuesParser::new(values))
}

impl Arguments {
    fn new(matches: &ArgMatches) -> Self {
        // An option that this command does not have is an error.
        let text = |name| matches.try_get_one::<String>(name).ok().flatten().cloned();
        let max_size: Option<&u64> = matches.try_get_one(MAX_SIZE).unwrap_or(Some(&MAX_SIZE_LIMIT));
        Self {
            length: text(LENGTH).unwrap_or_default(),
            alphabet: text(ALPHABET),
            format: text(FORMAT).unwrap_or_default(),
            count: text(COUNT),
            max_size: max_size.copied().unwrap_or(MAX_SIZE_DEFAULT),
            output: matches.get_one(OUTPUT).cloned(),
            keep_existing: matches.get_flag(KEEP_EXISTING),
        }
    }

    fn run(&self) -> Result<(), GenerateError> {
        let spec = self.spec();
        let file = self.output.as_deref().filter(|path| *path != Path::new("-"));
        if file.is_none() && spec.format() == Format::Raw && io::stdout().is_terminal() {
            refuse(
                &"expected standard output to be a pipe or a file for raw bytes, found a terminal: use --format hex or \
                 base64, a pipe, or --output FILE",
            );
        }
        if let Some(path) = file
            && self.keep_existing
            && output::is_complete(path, spec.encoded_len())?
        {
            return Ok(());
        }
        forbid_core_dumps().map_err(|error| GenerateError::System("forbid core dumps".into(), error))?;
        let generator = Arc::new(Generator::new(OsRandom)?);
        let stream = EncodedStream::start(&spec, Arc::clone(&generator))?;
        match file {
            Some(path) => output::to_new_file(path, stream, &generator),
            None => output::to_stdout(stream),
        }
    }

    /// What to generate, by the rules of the HTTP service and with its sentences.
    fn spec(&self) -> KeySpec {
        let alphabet = |name| named(&Alphabet::ALL, Alphabet::name, name);
        let kind = self.alphabet.as_deref().map_or(Kind::Key, |name| Kind::Password(alphabet(name)));
        let length = KeyLength::parse(&self.length, kind.length_max(self.max_size));
        let count = self.count.as_deref().map(|text| {
            parse_count(text)
                .unwrap_or_else(|error| refuse(&format_args!("Invalid count \"{text}\": {error}")))
        });
        let format = named(kind.formats(), Format::name, &self.format);
        KeySpec::new(kind, length.unwrap_or_else(|error| refuse(&error)), format, count)
            .unwrap_or_else(|error| refuse(&error))
    }
}

/// The value with this name.
fn named<T: Copy>(values: &[T], name: fn(T) -> &'static str, text: &str) -> T {
    *values.iter().find(|value| name(**value) == text).expect("clap accepts only these names")
}

/// Ends the process as for any other wrong usage.
fn refuse(error: &dyn fmt::Display) -> ! {
    clap::Error::raw(ErrorKind::ValueValidation, format_args!("{error}\n")).exit()
}
