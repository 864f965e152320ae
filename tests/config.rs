//! Where a setting comes from, which one wins, and what is said of mistakes.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use common::{Folder, key_service, run_to_end};

/// `--check` with a file, variables and flags: status, output, errors.
fn check(file: Option<&str>, variables: &[(&str, &str)], flags: &[&str]) -> (Option<i32>, String, String) {
    let folder = Folder::new();
    let mut command = key_service(&folder);
    command.arg("--check");
    folder.write("config.toml", file.unwrap_or_default());
    command.arg("--config").arg(folder.file("config.toml"));
    for (name, value) in variables {
        command.env(format!("KEYSERVICE_{name}"), value);
    }
    texts(run_to_end(with(command, flags)))
}

fn with(mut command: Command, flags: &[&str]) -> Command {
    command.args(flags);
    command
}

fn texts(ended: Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (ended.status.code(), text(ended.stdout), text(ended.stderr))
}

const DEFAULTS: &str = r#"host = "0.0.0.0"
srv-port = 1123
max-size = 1024
metrics-host = "0.0.0.0"
metrics-port = 8000
log-level = "info"
workers = 0
max-connections = 10000
head-timeout = 10
idle-timeout = 75
write-timeout = 15
drain-timeout = 20
drain-delay = 0
exit-idle = 0
tls-cert = ""
tls-key = ""
tls-client-ca = ""
tls-min-version = "1.3"
tokens-file = ""
unix-mode = "0660"
unix-trust = false
rate-requests = 0
rate-bytes = 0
rate-burst = 10
trusted-proxies = []
forwarded-header = "x-forwarded-for"
max-connections-per-client = 256
max-bulk-streams = 64
audit = false
page = true
credentials = {}
"#;

#[test]
fn nothing_configured_means_the_defaults() {
    assert_eq!(check(None, &[], &[]), (Some(0), DEFAULTS.into(), String::new()));
}

#[test]
fn what_is_printed_can_be_read_again() {
    assert_eq!(check(Some(DEFAULTS), &[], &[]), (Some(0), DEFAULTS.into(), String::new()));
}

#[test]
fn any_text_that_is_printed_can_be_read_again() {
    // TOML has no escape of Rust's for most of these, and forbids the control characters as they are.
    let host = "unix:/run/'\"\\\u{1}\u{8}\t\n\u{1b}\u{7f}\u{85}\u{e9}\u{301}\u{200b}\u{1f600}";
    let (status, printed, errors) = check(None, &[], &["--host", host]);
    assert_eq!((status, errors.as_str()), (Some(0), ""));
    assert!(printed.chars().all(|c| c == '\n' || !c.is_control()), "{printed}");
    assert_eq!(check(Some(&printed), &[], &[]), (Some(0), printed, String::new()));
}

#[test]
fn a_flag_wins_over_the_environment_over_the_file_over_the_default() {
    let file = Some("max-size = 2\nsrv-port = 2\nmetrics-port = 2\nworkers = 2\n");
    let variables = [("MAX_SIZE", "3"), ("SRV_PORT", "3"), ("METRICS_PORT", "3")];
    let (status, printed, _) = check(file, &variables, &["--max-size", "4", "--srv-port=4"]);
    assert_eq!(status, Some(0));
    for line in ["max-size = 4", "srv-port = 4", "metrics-port = 3", "workers = 2", "drain-timeout = 20"] {
        assert!(printed.lines().any(|printed| printed == line), "{line}:\n{printed}");
    }
}

#[test]
fn every_mistake_is_reported_with_its_source() {
    let file =
        Some("host = \"localhost\"\nworkers = -1\nsrv-port = \"1123\"\nmaxsize = 1\n[table]\nkey = 1\n");
    let variables =
        [("MAX_SIZE", "1k"), ("HEAD_TIMEOUT", "0"), ("LOG_LEVEL", "verbose"), ("PORT", "tcp://10.0.0.1")];
    let (status, printed, errors) = check(file, &variables, &["--metrics-port", "99999"]);
    assert_eq!((status, printed.as_str()), (Some(78), ""));
    for expected in [
        "host: expected an IP address or unix:/path, found \"localhost\" (/",
        "workers: expected a whole number from 0 to 256, found -1 (/",
        "srv-port: expected a whole number from 0 to 65535, found \"1123\" (/",
        "maxsize: not a setting (/",
        "did you mean max-size?",
        "table: not a setting (/",
        "max-size: expected a whole number from 1 to 1073741824, found \"1k\" (KEYSERVICE_MAX_SIZE)",
        "head-timeout: expected a whole number from 1 to 3600, found 0 (KEYSERVICE_HEAD_TIMEOUT)",
        "log-level: expected one of off, error, warn, info, debug, trace, found \"verbose\" (KEYSERVICE_LOG_LEVEL)",
        "port: not a setting (KEYSERVICE_PORT)",
        "metrics-port: expected a whole number from 0 to 65535, found 99999 (--metrics-port)",
    ] {
        assert!(errors.contains(expected), "{expected}\nis not in\n{errors}");
    }
    assert_eq!(errors.lines().count(), 10, "one line each:\n{errors}");
}

#[test]
fn bounds_are_those_that_are_named() {
    for (flag, good, bad) in [
        (
            "--max-size",
            &["1", "1073741824"][..],
            &["0", "1073741825", "-1", "1.5", "", "99999999999999999999999"][..],
        ),
        ("--srv-port", &["0", "65535"], &["65536", "-1", "http"]),
        ("--host", &["::1", "127.0.0.1", "unix:/a"], &["", "a", "unix:a", "127.0.0.1:80", "127.0.0.1:99999"]),
    ] {
        for value in good {
            assert_eq!(check(None, &[], &[&format!("{flag}={value}")]).0, Some(0), "{flag}={value}");
        }
        for value in bad {
            let (status, _, errors) = check(None, &[], &[&format!("{flag}={value}")]);
            assert_eq!(status, Some(78), "{flag}={value}");
            assert!(errors.contains(&format!("({flag})")), "{errors}");
        }
    }
}

#[test]
fn a_file_that_is_named_must_be_there() {
    let folder = Folder::new();
    let mut command = key_service(&folder);
    command.arg("--check").arg("--config").arg(folder.file("absent.toml")).args(["--max-size", "0"]);
    let (status, _, errors) = texts(run_to_end(command));
    assert_eq!(status, Some(78));
    assert!(errors.contains("absent.toml: there is no such file"), "{errors}");
    assert!(errors.contains("(--max-size)"), "the other layers are looked at too: {errors}");
}

#[test]
fn a_file_that_is_not_toml_is_refused_with_its_line() {
    let (status, _, errors) = check(Some("max-size = 1\nhost = \n"), &[], &["--max-size", "0"]);
    assert_eq!(status, Some(78));
    assert!(errors.contains("config.toml: ") && errors.contains("line 2"), "{errors}");
    assert!(errors.contains("(--max-size)"), "{errors}");
    assert_eq!(errors.lines().count(), 2, "{errors}");
}

#[test]
fn a_folder_in_place_of_the_file_is_refused() {
    let folder = Folder::new();
    let path = folder.file("folder.toml");
    std::fs::create_dir(&path).unwrap();
    let mut command = key_service(&folder);
    let (status, _, errors) = texts(run_to_end(with_path(&mut command, &path)));
    assert_eq!(status, Some(78), "{errors}");
    assert!(errors.contains("folder.toml"), "{errors}");
}

#[test]
fn only_a_path_that_does_not_exist_is_no_file() {
    let folder = Folder::new();
    std::os::unix::fs::symlink("nowhere", folder.file("dangling.toml")).unwrap();
    folder.write("file", "");
    for (path, expected) in [
        ("dangling.toml", "dangling.toml: expected a file that can be read, found: No such file"),
        ("file/config.toml", "file/config.toml: expected a file that can be read, found: Not a directory"),
        (
            "absent.toml",
            "absent.toml: there is no such file; an empty file leaves every setting at its default",
        ),
    ] {
        let path = folder.file(path);
        let (status, _, errors) = texts(run_to_end(with_path(&mut key_service(&folder), &path)));
        assert_eq!(status, Some(78), "{errors}");
        assert!(errors.contains(expected), "{errors}");
    }
    let null = std::path::Path::new("/dev/null");
    assert_eq!(texts(run_to_end(with_path(&mut key_service(&folder), null))).0, Some(0));
}

#[test]
fn a_file_that_others_may_write_to_is_refused() {
    let folder = Folder::new();
    let path = folder.write("open.toml", "max-size = 1\n");
    for (mode, status) in
        [(0o600, 0), (0o640, 0), (0o644, 0), (0o444, 0), (0o664, 78), (0o646, 78), (0o602, 78)]
    {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let (found, _, errors) = texts(run_to_end(with_path(&mut key_service(&folder), &path)));
        assert_eq!(found, Some(status), "{mode:o}: {errors}");
        assert_eq!(
            errors.contains("open.toml: expected a file that only its owner may write to"),
            status != 0
        );
    }
}

fn with_path(command: &mut Command, path: &std::path::Path) -> Command {
    let mut checked = Command::new(command.get_program());
    checked.arg("--check").arg("--config").arg(path);
    checked
}

#[test]
fn with_mistakes_nothing_starts() {
    let folder = Folder::new();
    let mut command = key_service(&folder);
    command.args(["--max-size", "0", "--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    let (status, _, errors) = texts(run_to_end(command));
    assert_eq!(status, Some(78));
    assert!(!errors.contains("Keys on"), "{errors}");
}

#[test]
fn wrong_usage_is_2() {
    let folder = Folder::new();
    for flags in [&["--port", "1"][..], &["--max-size"], &["unknown"]] {
        let ended = run_to_end(with(key_service(&folder), flags));
        assert_eq!(ended.status.code(), Some(2), "{flags:?}");
    }
}

#[test]
fn what_kubernetes_sets_for_a_service_of_this_name_is_not_ours() {
    let folder = Folder::new();
    let mut command = key_service(&folder);
    command.arg("--check").arg("--config").arg(folder.write("config.toml", ""));
    command.env("KEY_SERVICE_PORT", "tcp://10.0.0.1:1123").env("KEY_SERVICE_SERVICE_HOST", "10.0.0.1");
    assert_eq!(texts(run_to_end(command)).1, DEFAULTS);
}

#[test]
fn the_readme_names_every_setting_with_its_default() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    for line in DEFAULTS.lines() {
        let (name, default) = line.split_once(" = ").unwrap();
        let row = readme.lines().find(|row| row.starts_with(&format!("| `{name}` |")));
        let row = row.unwrap_or_else(|| panic!("no row for {name}"));
        assert!(row.contains(&format!("`KEYSERVICE_{}`", name.replace('-', "_").to_uppercase())), "{row}");
        if name != "metrics-host" {
            assert!(row.contains(&format!("| `{default}` |")), "{name} = {default}: {row}");
        }
    }
}
