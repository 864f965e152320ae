//! The sample file, the manual page, the docs and `--help` agree with the settings table.
//!
//! `UPDATE_DOCUMENTS=1 cargo test --test settings` updates the first three from the table.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::fs;
use std::path::Path;

use common::{TempDirectory, key_service, run_to_end};
use key_service::config::{ENV_PREFIX, Reload, Setting, settings};

/// The longest line that the tests write.
const LINE_MAX: usize = 120;

fn read_file(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// Checks that the part of a file between `start` and `end` is `expected`. With UPDATE_DOCUMENTS, replaces it instead.
fn check_section(path: &str, start: &str, end: &str, expected: &str) {
    let text = read_file(path);
    let from = text.find(start).unwrap_or_else(|| panic!("{path} has no {start:?}")) + start.len();
    let to = if end.is_empty() { text.len() } else { from + text[from..].find(end).unwrap() };
    if std::env::var_os("UPDATE_DOCUMENTS").is_some() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        return fs::write(path, format!("{}{expected}{}", &text[..from], &text[to..])).unwrap();
    }
    for (found, expected) in text[from..to].lines().zip(expected.lines()) {
        assert_eq!(found, expected, "{path}: UPDATE_DOCUMENTS=1 cargo test --test settings updates it");
    }
    assert_eq!(
        text[from..to].len(),
        expected.len(),
        "{path}: UPDATE_DOCUMENTS=1 cargo test --test settings updates it"
    );
}

/// The description of a setting, in Markdown.
fn description(setting: &Setting) -> String {
    let Setting { help, details, .. } = setting;
    if details.is_empty() { format!("{help}.") } else { format!("{help}. {details}") }
}

/// The values of a setting, and whether a reload applies a change.
fn values_and_reload(setting: &Setting) -> String {
    let reload = match setting.reload {
        Reload::Applied => " Changes at a reload.",
        Reload::AppliedWithTls => " Changes at a reload while TLS stays on.",
        Reload::NeedsRestart => "",
    };
    let removal = if setting.protects { " Removing it takes SIGHUP or a restart." } else { "" };
    format!("Value: {}.{reload}{removal}", setting.values)
}

/// Wraps text into lines of at most [`LINE_MAX`] characters, each with this prefix.
fn wrapped(text: &str, prefix: &str) -> String {
    let mut lines = vec![prefix.to_owned()];
    for word in text.split(' ') {
        if lines.last().unwrap().chars().count() + 1 + word.chars().count() > LINE_MAX {
            lines.push(prefix.to_owned());
        }
        let line = lines.last_mut().unwrap();
        if line.len() > prefix.len() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines.join("\n") + "\n"
}

#[test]
fn the_sample_file_matches_the_settings_table() {
    let entry = |setting: Setting| {
        let text = wrapped(&description(&setting).replace('`', ""), "# ");
        let examples: String = setting.examples.iter().map(|line| format!("# {line}\n")).collect();
        let values = wrapped(&values_and_reload(&setting), "# ");
        format!("\n{text}{examples}{values}#{} = {}\n", setting.name, setting.default)
    };
    let entries: String = settings().into_iter().map(entry).collect();
    check_section("packaging/config.toml", "metrics.socket.\n", "", &entries);
}

#[test]
fn the_manual_page_matches_the_settings_table() {
    let escaped = |text: &str| text.replace('-', "\\-").replace('"', "\\(dq").replace('\'', "\\(aq");
    let entry = |setting: Setting| {
        let text = format!("{} {}", description(&setting), values_and_reload(&setting));
        let marked: String = text
            .split('`')
            .enumerate()
            .map(|(index, part)| if index % 2 == 1 { format!("\\fB{part}\\fR") } else { part.to_owned() })
            .collect();
        let examples: String = setting.examples.iter().map(|line| format!("{}\n", escaped(line))).collect();
        let examples = if examples.is_empty() { examples } else { format!(".IP\n.EX\n{examples}.EE\n") };
        let (name, default) = (escaped(setting.name), escaped(&setting.default));
        format!(".TP\n.BR {name} \" = {default}\"\n{}{examples}", wrapped(&escaped(&marked), ""))
    };
    let entries: String = settings().into_iter().map(entry).collect();
    check_section("packaging/man/key-service.toml.5", ".SH SETTINGS\n", ".SH SEE ALSO\n", &entries);
}

#[test]
fn the_settings_page_matches_the_settings_table() {
    let row = |setting: Setting| {
        let variable = format!("{ENV_PREFIX}{}", setting.name.replace('-', "_").to_uppercase());
        let flag = setting.flag.map_or_else(String::new, |_| format!(" `--{}`", setting.name));
        let text = format!("{} {}", description(&setting), values_and_reload(&setting));
        format!("| `{}` | `{variable}` |{flag} | `{}` | {text} |\n", setting.name, setting.default)
    };
    let rows: String = settings().into_iter().map(row).collect();
    check_section("docs/configuration.md", "\n|---|---|---|---|---|\n", "\n\n", rows.trim_end());
}

#[test]
fn help_shows_each_flag_with_its_default() {
    let directory = TempDirectory::new();
    let mut command = key_service(&directory);
    command.arg("--help");
    let help = String::from_utf8(run_to_end(command).stdout).unwrap();
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for Setting { name, values, default, flag, help: text, .. } in settings() {
        let Some(value_name) = flag else {
            assert!(!help.contains(&format!("--{name} ")), "{name} has no flag");
            continue;
        };
        let default = default.trim_matches('"');
        let expected =
            format!("--{name} <{value_name}> {text}: {values} [default: {default}]").replace('`', "");
        assert!(help.contains(&expected), "{expected}\nis not in\n{help}");
    }
}

#[test]
fn documents_list_the_reloadable_settings() {
    let access = read_file("docs/access.md");
    let access = access.split("## What changes at a reload").nth(1).unwrap();
    let manual = read_file("packaging/man/key-service.8").replace("\\-", "-");
    let signal = manual.split(".B SIGHUP").nth(1).unwrap().split(".SH").next().unwrap();
    for Setting { name, reload, .. } in settings() {
        assert_eq!(
            access.contains(&format!("`{name}`")),
            reload != Reload::NeedsRestart,
            "access.md: {name}"
        );
        let is_named = signal.split_whitespace().any(|word| word == name);
        assert_eq!(is_named, reload == Reload::Applied, "key-service(8): {name}");
    }
}
