//! The files that are shipped with the binary agree with it and with each other.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;
#[path = "../examples/package.rs"]
#[expect(dead_code, reason = "its main writes files")]
mod package;

use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::{Shell, generate};
use common::{TempDirectory, key_service, run_to_end};
use key_service::cli::Cli;

fn shipped(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// What `--check` prints for a configuration.
fn check(config: &str) -> String {
    let directory = TempDirectory::new();
    let mut command = key_service(&directory);
    command.arg("--check").arg("--config").arg(directory.write("config.toml", config));
    let output = run_to_end(command);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_sample_configuration_shows_every_default() {
    let sample = shipped("packaging/config.toml");
    let defaults = check("");
    assert_eq!(check(&sample), defaults, "every setting in it is a comment");
    let is_setting = |line: &&str| line.starts_with('#') && !line.starts_with("# ");
    let shown: String = sample.lines().filter(is_setting).map(|line| format!("{}\n", &line[1..])).collect();
    assert_eq!(shown, defaults, "the comments show the settings in order with their defaults");
}

#[test]
fn the_configuration_manual_shows_every_default() {
    let manual = shipped("packaging/man/key-service.toml.5").replace("\\-", "-").replace("\\(dq", "\"");
    for line in check("").lines() {
        let (name, default) = line.split_once(" = ").unwrap();
        assert!(manual.contains(&format!(".BR {name} \" = {default}\"")), "{line}");
    }
    assert_eq!(manual.matches(".TP\n").count(), check("").lines().count(), "it has no other setting");
}

/// The text of key-service(8), as the package installs it.
fn manual() -> String {
    package::manual(&shipped("packaging/man/key-service.8")).unwrap().replace("\\-", "-")
}

/// What `--help` prints for the daemon and for each of its commands.
fn help() -> String {
    let directory = TempDirectory::new();
    ["", "health ", "key ", "password ", "reload ", "token new "]
        .map(|name| {
            let mut command = key_service(&directory);
            command.args(format!("{name}--help").split(' '));
            String::from_utf8(run_to_end(command).stdout).unwrap()
        })
        .concat()
}

/// The words that are flags, such as --host.
fn flags(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_ascii_lowercase() && c != '-');
    words.filter(|word| word.starts_with("--")).map(str::to_owned).collect()
}

#[test]
fn the_command_manual_lists_every_flag() {
    let manual = flags(&manual());
    for flag in flags(&help()) {
        assert!(manual.contains(&flag), "{flag}");
    }
    for name in ["--host", "--srv-port", "--max-size", "--metrics-port", "--check", "--config"] {
        assert!(manual.iter().any(|flag| flag == name), "{name}");
    }
}

#[test]
fn the_command_manual_lists_only_existing_flags_and_commands() {
    let manual = manual();
    let help = flags(&help());
    for flag in flags(&manual) {
        assert!(help.contains(&flag), "{flag}");
    }
    let commands: Vec<&str> =
        manual.lines().filter_map(|line| line.strip_prefix("\\fBkey-service")).collect();
    let [synopsis, described] = [&commands[1..6], &commands[6..]];
    assert_eq!(synopsis, described, "the synopsis lists the daemon and the commands that are described");
    assert_eq!(synopsis.len(), 5);
    assert_eq!(
        manual.matches("\\fB--srv-port\\fR").count(),
        1,
        "the options of the service are described once"
    );
}

#[test]
fn shells_complete_the_options_and_values_of_every_command() {
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let mut completions = Vec::new();
        generate(shell, &mut Cli::command(), "key-service", &mut completions);
        let completions = String::from_utf8(completions).unwrap();
        for word in ["srv-port", "keep-existing", "base64url", "unambiguous", "rate-requests"] {
            assert!(completions.contains(word), "{shell}: {word}");
        }
    }
}

#[test]
fn a_manual_without_option_placeholders_is_refused() {
    let text = shipped("packaging/man/key-service.8");
    for name in ["synopsis", "options", "commands"] {
        let error = package::manual(&text.replace(&format!("examples/package.rs: {name}"), ""))
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            format!("key-service.8: expected one line \".\\\\\\\" examples/package.rs: {name}\"")
        );
    }
}

#[test]
fn all_shipped_files_have_the_same_version() {
    let version = env!("CARGO_PKG_VERSION");
    assert!(shipped("packaging/debian/changelog").starts_with(&format!("key-service ({version})")));
    for manual in ["key-service.8", "key-service-check.8", "key-service.toml.5"] {
        assert!(
            shipped(&format!("packaging/man/{manual}")).contains(&format!("\"key-service {version}\"")),
            "{manual}"
        );
    }
    let chart = shipped("helm-chart/Chart.yaml");
    for line in [format!("version: {version}"), format!("appVersion: \"{version}\"")] {
        assert!(chart.lines().any(|found| found == line), "Chart.yaml: expected the line {line}");
    }
}

/// The addresses in a text.
fn addresses(text: &str) -> impl Iterator<Item = &str> {
    let ends = |c: char| c.is_whitespace() || "\"'`<>()[]{},".contains(c);
    text.match_indices("https://").map(move |(at, _)| text[at..].split(ends).next().unwrap())
}

/// Whether an address points to this project's repository on any host: its path is an owner, then key-service.
fn is_of_this_repository(address: &str) -> bool {
    address.split('/').nth(4).is_some_and(|name| name == "key-service" || name == "key-service.git")
}

/// Collects the text files in a directory and its subdirectories.
fn texts(directory: &Path, found: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            texts(&entry.path(), found);
        } else if let Ok(text) = fs::read_to_string(entry.path()) {
            found.push((entry.path(), text));
        }
    }
}

#[test]
fn all_links_point_to_the_same_repository() {
    let repository = env!("CARGO_PKG_REPOSITORY");
    assert!(is_of_this_repository(repository), "{repository}");
    let mut files = Vec::new();
    for directory in [".github", "docs", "helm-chart", "packaging", "systemd"] {
        texts(&Path::new(env!("CARGO_MANIFEST_DIR")).join(directory), &mut files);
    }
    let documents =
        ["CHANGELOG.md", "CONTRIBUTING.md", "README.md", "RELEASING.md", "SECURITY.md", "Dockerfile"];
    files.extend(documents.map(|name| (PathBuf::from(name), shipped(name))));
    let mut count = 0;
    for (path, text) in &files {
        for address in addresses(text).filter(|address| is_of_this_repository(address)) {
            let rest = address.strip_prefix(repository);
            assert!(
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
                "{}: expected an address below {repository}, found {address}",
                path.display()
            );
            count += 1;
        }
    }
    assert!(
        count > 30,
        "expected the runbook of every alert and the links of the chart and the dashboard, found {count} links"
    );
    let chart = shipped("helm-chart/Chart.yaml");
    for line in [format!("home: {repository}"), format!("sources: [{repository}]")] {
        assert!(chart.lines().any(|found| found == line), "Chart.yaml: expected the line {line}");
    }
}

#[test]
fn all_shipped_files_name_the_same_maintainer() {
    let maintainer = env!("CARGO_PKG_AUTHORS");
    let (name, address) = maintainer.trim_end_matches('>').split_once(" <").unwrap();
    for (file, text) in [
        ("packaging/debian/changelog", format!("\n -- {maintainer}  ")),
        ("helm-chart/Chart.yaml", format!("  - name: {name}\n    email: {address}\n")),
        ("packaging/debian/copyright", format!(" {name}\n")),
        ("LICENSE-MIT", format!(" {name}\n")),
        ("CODE_OF_CONDUCT.md", format!(" {address}.")),
    ] {
        assert!(shipped(file).contains(&text), "{file}: expected {text:?}");
    }
}

/// What rustc reports for the generator alone with these flags. It never compiles without its crates.
fn errors_of_the_generator(flags: &[&str]) -> String {
    let mut command = common::process::rustc();
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(["--edition", "2024", "--crate-type", "lib"]);
    command.args(["--emit", "metadata", "-o", "/dev/null"]).args(flags).arg("src/keys/generator.rs");
    let output = run_to_end(command);
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_build_with_another_getrandom_backend_is_refused() {
    // An exported RUSTFLAGS replaces the flags of .cargo/config.toml, and the crate prefers other backends to linux_raw.
    let missing = "add --cfg=getrandom_backend=\"linux_raw\" to RUSTFLAGS";
    let another = "remove every --cfg=getrandom_backend but \"linux_raw\" from RUSTFLAGS";
    let [raw, libc, custom] =
        ["linux_raw", "linux_getrandom", "custom"].map(|name| format!("--cfg=getrandom_backend=\"{name}\""));
    for (flags, expected) in [
        (&[][..], [true, false]),
        (&[&libc], [true, true]),
        (&[&libc, &raw], [false, true]),
        (&[&raw, &custom], [false, true]),
        (&[&raw], [false, false]),
    ] {
        let flags: Vec<&str> = flags.iter().map(|flag| flag.as_str()).collect();
        let errors = errors_of_the_generator(&flags);
        assert_eq!(
            [missing, another].map(|sentence| errors.contains(sentence)),
            expected,
            "{flags:?}\n{errors}"
        );
    }
    assert!(shipped(".cargo/config.toml").contains(&format!("rustflags = ['{raw}']")));
}
