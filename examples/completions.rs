//! Writes the shells' completions into a folder: `cargo run --example completions -- FOLDER`.

use clap::CommandFactory;
use clap_complete::{Shell, generate_to};
use key_service::cli::Cli;

fn main() -> std::io::Result<()> {
    let folder = std::env::args_os().nth(1).ok_or_else(|| std::io::Error::other("expected a folder"))?;
    std::fs::create_dir_all(&folder)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut Cli::command(), "key-service", &folder)?;
    }
    Ok(())
}
