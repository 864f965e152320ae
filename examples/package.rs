//! Generates the manual page and the shell completions from the command line's definition, into a directory:
//! `cargo run --example package -- DIRECTORY`.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;
use key_service::cli::Cli;

fn main() -> io::Result<()> {
    let argument = std::env::args_os().nth(1).ok_or_else(|| io::Error::other("expected a directory"))?;
    let directory = PathBuf::from(argument);
    fs::create_dir_all(&directory)?;
    fs::write(directory.join("key-service.8"), manual(include_str!("../packaging/man/key-service.8"))?)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut Cli::command(), "key-service", &directory)?;
    }
    Ok(())
}

/// key-service(8): the hand-written text, with clap's output in place of each marker comment.
pub(crate) fn manual(text: &str) -> io::Result<String> {
    let root = Cli::command();
    let mut commands = Vec::new();
    add_commands(&root, "key-service", &mut commands);

    let options = section("OPTIONS", |to| Man::new(root.clone()).render_options_section(to))?;
    let mut synopsis = vec![section("SYNOPSIS", |to| page(root, "key-service").render_synopsis_section(to))?];
    let mut described = String::new();
    for (command, name) in commands {
        let page = page(command, &name);
        let usage = section("SYNOPSIS", |to| page.render_synopsis_section(to))?;
        let about = section("DESCRIPTION", |to| page.render_description_section(to))?;
        let options = section("OPTIONS", |to| page.render_options_section(to))?;
        described += &format!(".TP\n{usage}{about}.RS\n{options}.RE\n");
        synopsis.push(usage);
    }
    let mut manual = text.to_owned();
    for (name, generated) in
        [("synopsis", synopsis.join(".br\n")), ("options", options), ("commands", described)]
    {
        let marker = format!(".\\\" examples/package.rs: {name}\n");
        if manual.matches(&marker).count() != 1 {
            return Err(io::Error::other(format!(
                "key-service.8: expected one line {:?}",
                marker.trim_end()
            )));
        }
        manual = manual.replace(&marker, &generated);
    }
    Ok(manual)
}

/// Adds the runnable commands below `parent`, each with its full name such as `key-service token new`.
fn add_commands(parent: &Command, name: &str, commands: &mut Vec<(Command, String)>) {
    for command in parent.get_subcommands() {
        let name = format!("{name} {}", command.get_name());
        if command.is_subcommand_required_set() {
            add_commands(command, &name, commands);
        } else {
            commands.push((command.clone(), name));
        }
    }
}

/// The page of one command: its usage as in `--help`, and only its own options.
fn page(command: Command, name: &str) -> Man {
    let mut command = command.bin_name(name).disable_help_flag(true).disable_version_flag(true);
    let usage = command.render_usage().to_string();
    Man::new(command.override_usage(usage.trim_start_matches("Usage: ").to_owned()))
}

/// The text that clap_mangen writes below the heading of a section; empty if it writes no such section.
fn section(name: &str, render: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<String> {
    let mut written = Vec::new();
    render(&mut written)?;
    let written = String::from_utf8(written).map_err(io::Error::other)?;
    let below = written.split_once(&format!(".SH {name}\n")).map_or("", |(_, below)| below);
    // clap_mangen writes an apostrophe as a string that it defines above the heading, which is cut off here. Above possible
    // values it breaks the line around an empty one, which mandoc(1) warns of.
    Ok(below.replace("\\*(Aq", "\\(aq").replace(".br\n\n.br\n", ".br\n"))
}
