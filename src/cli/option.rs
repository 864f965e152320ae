//! Options of commands. What clap derives instead takes 2 KB of the binary for each.

use clap::Arg;

/// An option with a value.
#[inline(never)]
pub(super) fn option(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name(value).help(help)
}
