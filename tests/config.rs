//! Where settings come from, which source wins, and how errors are reported.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use common::{Daemon, TempDirectory, key_service, run_to_end};

/// Runs `--check` with a file, variables and flags. Returns the exit status, stdout and stderr.
fn check(file: Option<&str>, variables: &[(&str, &str)], flags: &[&str]) -> (Option<i32>, String, String) {
    let directory = TempDirectory::new();
    let mut command = key_service(&directory);
    command.arg("--check");
    directory.write("config.toml", file.unwrap_or_default());
    command.arg("--config").arg(directory.file("config.toml"));
    for (name, value) in variables {
        command.env(format!("KEYSERVICE_{name}"), value);
    }
    text_output(run_to_end(with_flags(command, flags)))
}

fn with_flags(mut command: Command, flags: &[&str]) -> Command {
    command.args(flags);
    command
}

/// The exit status, stdout and stderr.
fn text_output(output: Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

const DEFAULTS: &str = r#"host = "*"
srv-port = 1123
max-size = 1024
metrics-host = "*"
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
proxy-protocol = false
max-connections-per-client = 256
max-bulk-streams = 64
audit = false
page = true
credentials = {}
"#;

#[test]
fn an_empty_file_means_the_defaults() {
    assert_eq!(check(None, &[], &[]), (Some(0), DEFAULTS.into(), String::new()));
}

#[test]
fn printed_defaults_can_be_read_again() {
    assert_eq!(check(Some(DEFAULTS), &[], &[]), (Some(0), DEFAULTS.into(), String::new()));
}

#[test]
fn every_printed_string_can_be_read_again() {
    // TOML lacks Rust's escapes for most of these characters, and forbids unescaped control characters.
    let host = "unix:/run/'\"\\\u{1}\u{8}\t\n\u{1b}\u{7f}\u{85}\u{e9}\u{301}\u{200b}\u{1f600}";
    let (status, printed, errors) = check(None, &[], &["--host", host]);
    assert_eq!((status, errors.as_str()), (Some(0), ""));
    assert!(printed.chars().all(|c| c == '\n' || !c.is_control()), "{printed}");
    assert_eq!(check(Some(&printed), &[], &[]), (Some(0), printed, String::new()));
}

#[test]
fn durations_are_seconds_or_have_a_unit() {
    let file = Some("idle-timeout = \"5m\"\nexit-idle = \"24h\"\ndrain-delay = \"0s\"\nhead-timeout = 20\n");
    let (status, printed, errors) = check(file, &[("WRITE_TIMEOUT", "30s"), ("RATE_BURST", "1h")], &[]);
    assert_eq!((status, errors.as_str()), (Some(0), ""));
    for (name, seconds) in [
        ("idle-timeout", 300),
        ("exit-idle", 86_400),
        ("drain-delay", 0),
        ("head-timeout", 20),
        ("write-timeout", 30),
        ("rate-burst", 3600),
    ] {
        assert!(printed.contains(&format!("\n{name} = {seconds}\n")), "{name}: {printed}");
    }
    assert_eq!(check(Some(&printed), &[], &[]).1, printed);

    let expected = "expected a duration from 1s to 1h (whole seconds, or a number with s, m or h), found";
    let file = "head-timeout = \"2h\"\nidle-timeout = \"10\"\nwrite-timeout = 1.5\n";
    assert_eq!(
        errors_in(file),
        [
            format!("1: head-timeout: {expected} \"2h\""),
            format!("2: idle-timeout: {expected} \"10\""),
            format!("3: write-timeout: {expected} 1.5"),
        ]
    );
}

#[test]
fn flags_override_environment_file_and_defaults() {
    let file = Some("max-size = 2\nsrv-port = 2\nmetrics-port = 2\nworkers = 2\n");
    let variables = [("MAX_SIZE", "3"), ("SRV_PORT", "3"), ("METRICS_PORT", "3")];
    let (status, printed, _) = check(file, &variables, &["--max-size", "4", "--srv-port=4"]);
    assert_eq!(status, Some(0));
    for line in ["max-size = 4", "srv-port = 4", "metrics-port = 3", "workers = 2", "drain-timeout = 20"] {
        assert!(printed.lines().any(|printed| printed == line), "{line}:\n{printed}");
    }
}

#[test]
fn every_error_is_reported_with_its_source() {
    let file =
        Some("host = \"localhost\"\nworkers = -1\nsrv-port = \"1123\"\nmaxsize = 1\n[table]\nkey = 1\n");
    let variables =
        [("MAX_SIZE", "1k"), ("HEAD_TIMEOUT", "0"), ("LOG_LEVEL", "verbose"), ("PORT", "tcp://10.0.0.1")];
    let (status, printed, errors) = check(file, &variables, &["--metrics-port", "99999"]);
    assert_eq!((status, printed.as_str()), (Some(78), ""));
    for expected in [
        "/config.toml:1: host: expected an IP address, unix:/path or *, found \"localhost\"\n",
        "/config.toml:2: workers: expected a whole number from 0 to 256, found -1\n",
        "/config.toml:3: srv-port: expected a whole number from 0 to 65535, found \"1123\"\n",
        "/config.toml:4: maxsize: not a setting; did you mean max-size?\n",
        "/config.toml:5: table: not a setting; the settings are host, ",
        "max-size: expected a whole number from 1 to 1073741824, found \"1k\" (KEYSERVICE_MAX_SIZE)",
        "head-timeout: expected a duration from 1s to 1h (whole seconds, or a number with s, m or h), found 0 (KEYSERVICE_HEAD_TIMEOUT)",
        "log-level: expected one of off, error, warn, info, debug, trace, found \"verbose\" (KEYSERVICE_LOG_LEVEL)",
        "port: not a setting; the settings are host, ",
        "(KEYSERVICE_PORT)",
        "metrics-port: expected a whole number from 0 to 65535, found 99999 (--metrics-port)",
    ] {
        assert!(errors.contains(expected), "{expected}\nis not in\n{errors}");
    }
    assert_eq!(errors.lines().count(), 10, "one line each:\n{errors}");
}

/// The errors in a configuration file, each without the path before its line number.
fn errors_in(file: &str) -> Vec<String> {
    let (status, _, errors) = check(Some(file), &[], &[]);
    assert_eq!(status, Some(78), "{file}");
    let after_directory =
        |line: &str| line.split_once("/config.toml:").unwrap_or_else(|| panic!("{line}")).1.to_owned();
    errors.lines().map(after_directory).collect()
}

#[test]
fn file_errors_show_the_line_and_the_value_as_written() {
    let size = "expected a whole number from 1 to 1073741824, found";
    for (found, shown) in [
        ("4096.0", "4096.0"),
        ("1e3", "1e3"),
        ("+0", "+0"),
        ("0x0", "0x0"),
        ("99_999_999_999", "99_999_999_999"),
        ("99999999999999999999999999", "99999999999999999999999999"),
        ("1979-05-27T07:32:00Z", "1979-05-27T07:32:00Z"),
        ("inf", "inf"),
        ("'1'", "'1'"),
        ("\"\\u001b[1m\"", "\"\\u001b[1m\""),
        ("\"\u{9b}\"", "\"\\u{9b}\""),
        ("[1, 2.50]", "[1, 2.50]"),
        ("[\n1,\n2]", "[…"),
        ("{ a = 1.0 }", "{ a = 1.0 }"),
        ("true # not a size", "true"),
    ] {
        let file = format!("# a comment\n\nmax-size = {found}\nworkers = 1\n");
        assert_eq!(errors_in(&file), [format!("3: max-size: {size} {shown}")]);
    }
    let long = errors_in(&format!("host = \"{}\"", "a".repeat(100_000))).remove(0);
    assert!(long.len() < 300 && long.ends_with("aaa…"), "{long}");
}

#[test]
fn errors_in_tables_and_lists_show_their_own_line() {
    let length = "expected length to be a whole number from 1 to 4096, found";
    for (file, expected) in [
        ("[credentials.x]\nformat = \"hex\"\nlength = 0.5\n", vec![format!("3: credentials: \"x\": {length} 0.5")]),
        ("[credentials]\nx = { format = \"hex\", length = 0 }\n", vec![format!("2: credentials: \"x\": {length} 0")]),
        ("credentials = { y = {}, x = { length = 0 } }\n", vec![format!("1: credentials: \"x\": {length} 0")]),
        ("page = true\ncredentials.x.length = -1\n", vec![format!("2: credentials: \"x\": {length} -1")]),
        (
            "[credentials]\n\"a/b\" = {}\nc = 32\nd = { lenght = 1 }\ne = { format = 2.0 }\n",
            vec![
                "2: credentials: \"a/b\": expected the name of a credential, or UNIT:NAME with the unit's suffix, found {}; a \
                 name with a dot stands in quotation marks"
                    .into(),
                "3: credentials: \"c\": expected a table such as { length = 32, format = \"hex\" }, found 32; a name with a dot \
                 stands in quotation marks"
                    .into(),
                "4: credentials: \"d\": expected length, format, alphabet, found \"lenght\"; a name with a dot stands in \
                 quotation marks"
                    .into(),
                "5: credentials: \"e\": expected format to be one of raw, hex, base64, base64url, json, jwk, found 2.0".into(),
            ],
        ),
        (
            "trusted-proxies = [\n  \"10.0.0.0/8\",\n  \"10.0.0.0/33\", \"::1\", 7.0,\n]\n",
            vec![
                "3: trusted-proxies: expected an IP address, a network (10.0.0.0/8) or unix, found \"10.0.0.0/33\"".into(),
                "3: trusted-proxies: expected an IP address, a network (10.0.0.0/8) or unix, found 7.0".into(),
            ],
        ),
        (
            "trusted-proxies = 7.0\n",
            vec!["1: trusted-proxies: expected a list, each item an IP address, a network (10.0.0.0/8) or unix, found 7.0".into()],
        ),
        (
            "\n[max-size]\nx = 1\n",
            vec!["2: max-size: expected a whole number from 1 to 1073741824, found [max-size]".into()],
        ),
        ("page = false\n\n\"a b\" = 1", vec![]),
        (
            "unix-trust = true\ntrusted-proxies = [\"unix\"]\ntls-cert = \"/a\"",
            vec![
                "3: tls-cert: expected tls-key beside it, found none".into(),
                "1: unix-trust: expected false where trusted-proxies has unix, found true".into(),
            ],
        ),
        ("unix-trust = true\ntrusted-proxies = [\"unix\"]", vec!["1: unix-trust: expected false where trusted-proxies has unix, found true".into()]),
        ("\n\ntls-client-ca = \"/ca\"", vec!["3: tls-client-ca: expected tls-cert and tls-key beside it, found none".into()]),
    ] {
        let found = errors_in(file);
        if expected.is_empty() {
            assert!(found[0].starts_with("3: \"a b\": not a setting; "), "{found:?}");
        } else {
            assert_eq!(found, expected);
        }
    }
}

#[test]
fn every_invalid_toml_line_is_reported() {
    for (file, expected) in [
        ("max-size = 1\nmax-size = 2\n", vec!["2: not valid TOML: duplicate key, found max-size"]),
        (
            "[credentials]\na = {}\n[credentials]\n",
            vec!["3: not valid TOML: duplicate key, found credentials"],
        ),
        ("[credentials.x]\nlength = 1\nlength = 2\n", vec!["3: not valid TOML: duplicate key, found length"]),
        ("host = \n\npage = yes\n", vec!["1: not valid TOML: ", "3: not valid TOML: "]),
        ("page = false\nhost = \"a\n", vec!["2: not valid TOML: "]),
        ("page = false\nkey\n", vec!["2: not valid TOML: "]),
        ("page = false\n\u{1}\n", vec!["2: not valid TOML: "]),
    ] {
        let found = errors_in(file);
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.starts_with(expected), "{expected} is not {found}");
            assert!(!found.contains(|c: char| c.is_control()), "{found:?}");
        }
    }
    assert_eq!(errors_in(&"x\n".repeat(1000)).len(), 10, "at most ten are reported");
    let directory = TempDirectory::new();
    let path = directory.file("config.toml");
    std::fs::write(&path, b"page = true\nhost = \"\xff\"\n").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let errors = text_output(run_to_end(check_command(&directory, &path))).2;
    assert!(errors.contains("/config.toml:2: expected UTF-8, found invalid utf-8"), "{errors}");
    assert_eq!(check(Some("\u{feff}page = true\r\n"), &[], &[]).0, Some(0), "a byte order mark is skipped");
}

#[test]
fn variables_and_flags_are_quoted_as_written() {
    for (text, found) in
        [("4096.0", "4096.0"), ("-0", "-0"), ("1k", "\"1k\""), ("[1.50]", "[1.50]"), ("{a=1.0}", "{a=1.0}")]
    {
        let expected = |source: &str| {
            format!(
                "key-service: max-size: expected a whole number from 1 to 1073741824, found {found} ({source})\n"
            )
        };
        assert_eq!(check(None, &[("MAX_SIZE", text)], &[]).2, expected("KEYSERVICE_MAX_SIZE"));
        assert_eq!(check(None, &[], &[&format!("--max-size={text}")]).2, expected("--max-size"));
    }
    let errors = check(None, &[("TRUSTED_PROXIES", "10.0.0.0/8, host,::1 , 10.0.0.1/40")], &[]).2;
    let expected =
        "key-service: trusted-proxies: expected an IP address, a network (10.0.0.0/8) or unix, found";
    assert_eq!(
        errors.lines().collect::<Vec<_>>(),
        ["host", "10.0.0.1/40"].map(|bad| format!("{expected} \"{bad}\" (KEYSERVICE_TRUSTED_PROXIES)"))
    );
}

#[test]
fn each_single_tls_setting_is_printed_or_refused() {
    for (name, value) in
        [("tls-cert", "/a"), ("tls-key", "/a"), ("tls-client-ca", "/a"), ("tls-min-version", "1.2")]
    {
        let line = format!("{name} = \"{value}\"\n");
        let (status, printed, errors) = check(Some(&line), &[], &[]);
        let is_shown = status == Some(0) && printed.contains(&line);
        let is_refused = status == Some(78) && errors.contains(&format!("/config.toml:1: {name}: expected "));
        assert!(is_shown || is_refused, "{name}: {printed}{errors}");
        assert_eq!(is_shown, name == "tls-min-version");
    }
}

#[test]
fn options_may_precede_or_follow_a_subcommand() {
    let directory = TempDirectory::new();
    let file = directory.write("config.toml", "");
    let file = file.to_str().unwrap();
    let options = [
        ("--host", "127.0.0.1"),
        ("--srv-port", "1"),
        ("--max-size", "32"),
        ("--metrics-port", "2"),
        ("--log-level", "info"),
        ("--config", file),
    ];
    let run = |arguments: &[&str]| text_output(run_to_end(with_flags(key_service(&directory), arguments)));
    for (name, value) in options {
        for arguments in
            [[name, value, "token", "new", "--name=a"], ["token", "new", "--name=a", name, value]]
        {
            assert_eq!(run(&arguments).0, Some(0), "{arguments:?}");
        }
        for arguments in [[name, value, "health", "--url", "x"], ["health", "--url", "x", name, value]] {
            let (status, _, errors) = run(&arguments);
            assert_eq!(status, Some(1), "{arguments:?}: {errors}");
            assert!(
                errors.contains("expected http://host:port/path, found \"x\""),
                "{arguments:?}: {errors}"
            );
        }
    }
    let (status, printed, _) = run(&["health", "--check", "--config", file, "--srv-port", "7"]);
    assert!(status == Some(0) && printed.contains("srv-port = 7"), "{printed}");
    let printed = run(&["--max-size", "64", "token", "new", "--name=a"]).1;
    assert!(!printed.contains("max-size"), "the token does not get the limit of the service: {printed}");
}

/// The variables that the kubelet sets for a Service with this name, and Docker for a link.
const INJECTED: [(&str, &str); 22] = [
    ("SERVICE_HOST", "10.0.0.1"),
    ("SERVICE_PORT", "1123"),
    ("SERVICE_PORT_HTTP", "1123"),
    ("SERVICE_PORT_HTTP_ALT", "1124"),
    ("PORT", "tcp://10.0.0.1:1123"),
    ("PORT_1123_TCP", "tcp://10.0.0.1:1123"),
    ("PORT_1123_TCP_PROTO", "tcp"),
    ("PORT_1123_TCP_PORT", "1123"),
    ("PORT_1123_TCP_ADDR", "10.0.0.1"),
    ("PORT_1124_UDP", "udp://10.0.0.1:1124"),
    ("PORT_1124_UDP_PROTO", "udp"),
    ("PORT_1125_SCTP", "sctp://10.0.0.1:1125"),
    ("PORT_1125_SCTP_ADDR", "10.0.0.1"),
    ("PORT_1123_TCP_START", "tcp://10.0.0.1:1123"),
    ("PORT_1123_TCP_PORT_START", "1123"),
    ("PORT_1123_TCP_PORT_END", "1125"),
    ("NAME", "/web/keyservice"),
    ("ENV_PATH", "/usr/bin"),
    ("ENV_MAX_SIZE", "a text\n"),
    ("1_PORT", "tcp://[fd00::1]:1123"),
    ("1_PORT_1123_TCP_ADDR", "fd00::1"),
    ("HEADLESS_1_NAME", "/web_1/keyservice-headless-1"),
];

#[test]
fn injected_variables_are_ignored_and_logged() {
    assert_eq!(check(None, &INJECTED, &[]), (Some(0), DEFAULTS.into(), String::new()));
    let daemon = Daemon::start(&[&INJECTED[..], &[("LOG_LEVEL", "debug"), ("MAX_SIZE", "32")]].concat());
    daemon.wait_for_log(
        "ignored environment variables that Kubernetes or Docker set for a service of this name",
    );
    let log = daemon.log();
    assert!(log.contains("count=22") && log.contains("KEYSERVICE_1_PORT_1123_TCP_ADDR"), "{log}");
    assert_eq!(daemon.get("/key/33").status, 413);
}

#[test]
fn variables_that_only_look_injected_are_errors() {
    for (name, value) in [
        // Names of settings, whatever the value. Services named keyservice-metrics or keyservice-srv have such variables.
        ("METRICS_PORT", "tcp://10.0.0.1:1123"),
        ("SRV_PORT", "tcp://10.0.0.1:1123"),
        ("HOST", "tcp://10.0.0.1:1123"),
        // Inconsistent with the other variables.
        ("SERVICE_HOST", "10.0.0.2"),
        ("SERVICE_HOST", "example.org"),
        ("SERVICE_PORT", "9000"),
        ("SERVICE_PORT_", "1123"),
        ("SERVICE_PORT_HTTP", "9000"),
        ("SERVICE_PORTS", "1123"),
        ("PORT", "1123"),
        ("PORT", "http://10.0.0.1:1123"),
        ("PORT", "tcp://10.0.0.1"),
        ("PORT_1123_TCP", "udp://10.0.0.1:1123"),
        ("PORT_1123_TCP", "tcp://10.0.0.1:1124"),
        ("PORT_1123_TCP_PORT", "01123"),
        ("PORT_1123_TCP_ADDRESS", "10.0.0.1"),
        ("PORT_01123_TCP_ADDR", "10.0.0.1"),
        ("PORT_1123_TLS", "tls://10.0.0.1:1123"),
        ("NAME", "keyservice"),
        ("NAME", "/web/other"),
        ("2_ENV_A", "x"),
        ("MAXSIZE", "64"),
        ("METRIC_PORT", "8001"),
    ] {
        let mut variables: Vec<_> = INJECTED.into_iter().filter(|(injected, _)| *injected != name).collect();
        variables.push((name, value));
        let (status, _, errors) = check(None, &variables, &[]);
        assert_eq!(status, Some(78), "{name}={value}: {errors}");
        assert!(errors.contains(&format!("(KEYSERVICE_{name})")), "{name}={value}: {errors}");
    }
    // Without the others, each variable is an error, unless its form alone shows its origin.
    for (name, value) in INJECTED {
        let status = check(None, &[(name, value)], &[]).0;
        assert_eq!(
            status == Some(0),
            name.ends_with("NAME") || value.contains("://") && name.ends_with("PORT"),
            "{name}"
        );
    }
}

#[test]
fn ranges_are_as_documented() {
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
fn a_named_file_must_exist() {
    let directory = TempDirectory::new();
    let mut command = key_service(&directory);
    command.arg("--check").arg("--config").arg(directory.file("absent.toml")).args(["--max-size", "0"]);
    let (status, _, errors) = text_output(run_to_end(command));
    assert_eq!(status, Some(78));
    assert!(errors.contains("absent.toml: there is no such file"), "{errors}");
    assert!(errors.contains("(--max-size)"), "the other sources are checked too: {errors}");
}

#[test]
fn a_syntax_error_is_reported_with_its_line() {
    let (status, _, errors) = check(Some("max-size = 1\nhost = \n"), &[], &["--max-size", "0"]);
    assert_eq!(status, Some(78));
    assert!(errors.contains("/config.toml:2: not valid TOML: "), "{errors}");
    assert!(errors.contains("(--max-size)"), "{errors}");
    assert_eq!(errors.lines().count(), 2, "{errors}");
}

#[test]
fn a_directory_instead_of_the_file_is_refused() {
    let directory = TempDirectory::new();
    let path = directory.file("directory.toml");
    std::fs::create_dir(&path).unwrap();
    let (status, _, errors) = text_output(run_to_end(check_command(&directory, &path)));
    assert_eq!(status, Some(78), "{errors}");
    assert!(errors.contains("directory.toml"), "{errors}");
}

#[test]
fn an_unreadable_configuration_file_is_an_error() {
    let directory = TempDirectory::new();
    std::os::unix::fs::symlink("nowhere", directory.file("dangling.toml")).unwrap();
    directory.write("file", "");
    for (path, expected) in [
        ("dangling.toml", "dangling.toml: a symbolic link to nowhere: No such file"),
        ("file/config.toml", "file/config.toml: expected a file that can be read, found: Not a directory"),
        (
            "absent.toml",
            "absent.toml: there is no such file; an empty file leaves every setting at its default",
        ),
    ] {
        let path = directory.file(path);
        let (status, _, errors) = text_output(run_to_end(check_command(&directory, &path)));
        assert_eq!(status, Some(78), "{errors}");
        assert!(errors.contains(expected), "{errors}");
    }
    let null = std::path::Path::new("/dev/null");
    assert_eq!(text_output(run_to_end(check_command(&directory, null))).0, Some(0));
}

#[test]
fn a_file_that_others_can_write_to_is_refused() {
    let directory = TempDirectory::new();
    let path = directory.write("open.toml", "max-size = 1\n");
    for (mode, status) in
        [(0o600, 0), (0o640, 0), (0o644, 0), (0o444, 0), (0o664, 78), (0o646, 78), (0o602, 78)]
    {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let (found, _, errors) = text_output(run_to_end(check_command(&directory, &path)));
        assert_eq!(found, Some(status), "{mode:o}: {errors}");
        assert_eq!(
            errors.contains("open.toml: expected a file that only its owner may write to"),
            status != 0
        );
    }
}

fn check_command(directory: &TempDirectory, path: &std::path::Path) -> Command {
    let mut command = key_service(directory);
    command.arg("--check").arg("--config").arg(path);
    command
}

#[test]
fn a_configuration_error_prevents_startup() {
    let directory = TempDirectory::new();
    let mut command = key_service(&directory);
    command.args(["--max-size", "0", "--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    let (status, _, errors) = text_output(run_to_end(command));
    assert_eq!(status, Some(78));
    assert!(!errors.contains("Keys on"), "{errors}");
}

#[test]
fn wrong_usage_exits_with_status_2() {
    let directory = TempDirectory::new();
    for flags in [&["--port", "1"][..], &["--max-size"], &["unknown"]] {
        let output = run_to_end(with_flags(key_service(&directory), flags));
        assert_eq!(output.status.code(), Some(2), "{flags:?}");
    }
}

#[test]
fn variables_of_a_service_named_key_service_are_not_read() {
    let directory = TempDirectory::new();
    let mut command = key_service(&directory);
    command.arg("--check").arg("--config").arg(directory.write("config.toml", ""));
    command.env("KEY_SERVICE_PORT", "tcp://10.0.0.1:1123").env("KEY_SERVICE_SERVICE_HOST", "10.0.0.1");
    assert_eq!(text_output(run_to_end(command)).1, DEFAULTS);
}
