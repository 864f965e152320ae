//! Bearer tokens: made by the command, kept as hashes, asked for where there are any.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, mknodat};

use common::{Daemon, Folder, Response, exchange, get, key_service, run_to_end};

/// A new token and its line.
fn new_token(options: &[&str]) -> (String, String) {
    let folder = Folder::new();
    let mut command = key_service(&folder);
    command.args(["token", "new", "--name", "ci"]).args(options);
    let ended = run_to_end(command);
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let text = String::from_utf8(ended.stdout).unwrap();
    let (token, line) = text.split_once('\n').unwrap();
    (token.to_owned(), line.trim_end().to_owned())
}

/// A daemon that asks for the tokens of `lines`.
fn start(lines: &str, settings: &[(&str, &str)]) -> Daemon {
    let folder = Folder::new();
    let path = write(&folder.file("tokens"), lines);
    Daemon::start_with(folder, |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
        command.env("KEYSERVICE_TOKENS_FILE", path);
        for (name, value) in settings {
            command.env(format!("KEYSERVICE_{name}"), value);
        }
    })
}

fn write(path: &Path, lines: &str) -> std::path::PathBuf {
    fs::write(path, lines).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    path.to_owned()
}

fn request(path: &str, credentials: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: a\r\n{credentials}\r\n")
}

fn bearer(daemon: &Daemon, path: &str, token: &str) -> Response {
    exchange(daemon.keys(), request(path, &format!("Authorization: Bearer {token}\r\n")))
}

#[test]
fn a_key_takes_a_token_and_health_and_metrics_do_not() {
    let (token, line) = new_token(&[]);
    let daemon = start(&format!("# people\n\n{line}\n"), &[]);
    assert_eq!(bearer(&daemon, "/key/32", &token).body.len(), 32);
    for scheme in ["bearer", "BEARER", "Bearer  "] {
        let request = request("/key/32", &format!("Authorization: {scheme} {token}\r\n"));
        assert_eq!(exchange(daemon.keys(), request).status, 200, "{scheme}");
    }
    for path in ["/health", "/livez", "/readyz"] {
        assert_eq!(daemon.get(path).status, 200, "{path}");
    }
    assert_eq!(get(daemon.metrics(), "/metrics").status, 200);
    assert_eq!(daemon.get("/nowhere").status, 404);
    assert_eq!(daemon.metric("http_rejections_total{reason=\"unauthorized\"}"), 0.0);
}

#[test]
fn what_is_no_valid_token_is_401_with_the_challenge_of_rfc_6750() {
    const BARE: &str = "Bearer realm=\"key-service\"";
    const INVALID: &str = "Bearer realm=\"key-service\", error=\"invalid_token\"";
    let (token, line) = new_token(&[]);
    let (other, _) = new_token(&[]);
    let daemon = start(&line, &[]);
    let hash = line.split("sha256:").nth(1).unwrap();
    let field = |value: &str| format!("Authorization: {value}\r\n");
    let twice = format!("{}{}", field(&format!("Bearer {token}")), field(&format!("Bearer {token}")));
    for (credentials, challenge) in [
        (String::new(), BARE),
        (field("Basic dXNlcjpwYXNz"), BARE),
        (field(&token), BARE),
        (field(&format!("Bearer {other}")), INVALID),
        (field(&format!("Bearer {token}0")), INVALID),
        (field(&format!("Bearer {}", &token[..66])), INVALID),
        (field(&format!("Bearer {}", token.to_uppercase())), INVALID),
        (field(&format!("Bearer ks_{hash}")), INVALID), // what is in the file opens nothing
        (field("Bearer "), BARE),
        (field("Bearer x"), INVALID),
        (twice, INVALID),
    ] {
        for path in ["/key/32", "/key/0", "/key/999999999"] {
            let response = exchange(daemon.keys(), request(path, &credentials));
            assert_eq!(response.status, 401, "{credentials:?}");
            assert_eq!(response.header("www-authenticate"), Some(challenge), "{credentials:?}");
            assert_eq!(response.header("cache-control"), Some("no-store"));
            response.problem();
        }
    }
    let head = request("/key/32", "").replace("GET", "HEAD");
    assert_eq!(common::Client::connect(daemon.keys()).send(head).head_response().status, 401);
    assert_eq!(daemon.metric("http_rejections_total{reason=\"unauthorized\"}"), 34.0);
    assert_eq!(daemon.metric("http_responses_total{status_code=\"401\"}"), 34.0);
    assert!(!daemon.log().contains("ks_"), "{}", daemon.log());
}

#[test]
fn a_token_that_comes_byte_by_byte_is_known_all_the_same() {
    let (token, line) = new_token(&[]);
    let daemon = start(&line, &[]);
    let mut client = common::Client::connect(daemon.keys());
    for byte in request("/key/32", &format!("Authorization: Bearer {token}\r\n")).bytes() {
        client.send([byte]);
    }
    assert_eq!(client.response().status, 200);
}

#[test]
fn a_token_has_a_size_and_a_rate_of_its_own_and_an_end() {
    let (token, line) = new_token(&["--max-size", "64", "--rate-requests", "2"]);
    let (old, expired) = new_token(&["--expires", "2020-01-01"]);
    let (_, later) = new_token(&["--expires", "2999-12-31"]);
    let daemon =
        start(&format!("{line}\n{expired}\n{later}\n"), &[("RATE_BURST", "1"), ("MAX_SIZE", "1000")]);
    let refused = bearer(&daemon, "/key/65", &token);
    assert_eq!((refused.status, refused.json()["max"].as_u64()), (413, Some(64)));
    let statuses: Vec<_> = (0..20).map(|_| bearer(&daemon, "/key/64", &token).status).collect();
    assert_eq!(statuses[..2], [200, 200]);
    assert!(statuses.contains(&429));
    let response = bearer(&daemon, "/key/32", &old);
    assert_eq!((response.status, response.problem().as_str()), (401, "The token has expired"));
}

#[test]
fn tokens_are_rotated_by_a_reload_on_connections_that_stay() {
    let (old, old_line) = new_token(&[]);
    let (new, new_line) = new_token(&[]);
    let daemon = start(&old_line, &[]);
    let file = daemon.folder.file("tokens");
    let mut client = common::Client::connect(daemon.keys());
    let mut status = |token: &str| {
        client.send(request("/key/32", &format!("Authorization: Bearer {token}\r\n"))).response().status
    };
    let reload = |lines: &str| {
        write(&file, lines);
        daemon.signal("HUP");
        daemon.manager.wait_for("RELOADING=1");
        daemon.manager.wait_for("READY=1");
    };
    assert_eq!((status(&old), status(&new)), (200, 401));
    reload(&format!("{old_line}\n{new_line}\n"));
    assert_eq!((status(&old), status(&new)), (200, 200), "both while they overlap");
    reload(&new_line);
    assert_eq!((status(&old), status(&new)), (401, 200));
    reload("nonsense\n");
    assert_eq!((status(&old), status(&new)), (401, 200), "a file with mistakes changes nothing");
    daemon.wait_for_metric("config_last_reload_successful", 0.0);
    daemon.wait_for_log("count=2");
    daemon.wait_for_log("tokens, line 1: expected");
}

/// Waits until `token` answers `status` on a connection that is open.
fn wait_for_status(client: &mut common::Client, token: &str, status: u16) {
    let request = request("/key/32", &format!("Authorization: Bearer {token}\r\n"));
    common::until(&format!("status {status}"), || {
        (client.send(&request).response().status == status).then_some(())
    });
}

#[test]
fn a_changed_file_is_taken_up_without_a_signal_on_connections_that_stay() {
    let (old, old_line) = new_token(&[]);
    let (new, new_line) = new_token(&[]);
    // As the kubelet lays a Secret out: it swaps the link in the middle, and nobody sends a signal.
    let publish = |volume: &Path, name: &str, lines: &str| {
        fs::create_dir(volume.join(name)).unwrap();
        write(&volume.join(name).join("tokens"), lines);
        symlink(name, volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    };
    let folder = Folder::new();
    let (volume, path) = (folder.file(""), folder.file("tokens"));
    publish(&volume, "..1", &old_line);
    symlink("..data/tokens", &path).unwrap();
    let daemon = Daemon::start_with(folder, |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
        command.env("KEYSERVICE_TOKENS_FILE", path);
    });
    let mut client = common::Client::connect(daemon.keys());
    wait_for_status(&mut client, &old, 200);
    publish(&volume, "..2", &new_line);
    wait_for_status(&mut client, &old, 401);
    wait_for_status(&mut client, &new, 200);
    daemon.wait_for_metric("config_last_reload_successful", 1.0);
}

#[test]
fn a_file_that_is_gone_or_writable_to_others_changes_nothing() {
    let (token, line) = new_token(&[]);
    let daemon = start(&line, &[]);
    let file = daemon.folder.file("tokens");
    let reload = || {
        daemon.signal("HUP");
        daemon.manager.wait_for("RELOADING=1");
        daemon.manager.wait_for("READY=1");
        assert_eq!(daemon.metric("config_last_reload_successful"), 0.0);
        assert_eq!((bearer(&daemon, "/key/32", &token).status, daemon.get("/key/32").status), (200, 401));
    };
    fs::set_permissions(&file, fs::Permissions::from_mode(0o660)).unwrap();
    reload();
    fs::remove_file(&file).unwrap();
    reload();
    write(&file, &line);
    daemon.wait_for_metric("config_last_reload_successful", 1.0); // by itself, within seconds
}

#[test]
fn a_token_is_revoked_while_the_configuration_is_refused() {
    let (old, old_line) = new_token(&[]);
    let (new, new_line) = new_token(&[]);
    let daemon = start(&old_line, &[]);
    daemon.folder.write("config.toml", "max-sise = 1\n");
    daemon.signal("HUP");
    daemon.wait_for_log("keeping the previous configuration");
    let mut client = common::Client::connect(daemon.keys());
    write(&daemon.folder.file("tokens"), &new_line);
    wait_for_status(&mut client, &old, 401);
    wait_for_status(&mut client, &new, 200);
    daemon.wait_for_metric("config_last_reload_successful", 0.0);
}

#[test]
fn every_mistake_in_the_file_is_reported_and_no_secret_with_it() {
    let (token, line) = new_token(&[]);
    let folder = Folder::new();
    let hash = line.split(' ').nth(1).unwrap();
    let lines = format!(
        "{line}\nci {token}\n{token}\nb {hash}\nc sha256:12\nna/me {hash}\nd {hash} max-size=0\nd {hash} color=red\n\
         d {hash} expires=2027-02-30\nd {hash} max-size=1 max-size=2\n"
    );
    let path = write(&folder.file("tokens"), &lines);
    let check = || {
        let mut command = key_service(&folder);
        command.arg("--check").env("KEYSERVICE_TOKENS_FILE", &path);
        let ended = run_to_end(command);
        (ended.status.code(), String::from_utf8(ended.stderr).unwrap())
    };
    let (status, errors) = check();
    assert_eq!(status, Some(78));
    for expected in [
        "tokens, line 2: expected the hash of a token, found a token: it must not be in this file (KEYSERVICE_TOKENS_FILE)",
        "line 3: expected a name",
        "line 4: the hash of line 1 again",
        "line 5: expected sha256: and 64 hexadecimal digits",
        "line 6: expected a name",
        "line 7: max-size: expected a whole number from 1",
        "line 8: expected max-size=",
        "line 9: expires: expected a date",
        "line 10: max-size is given twice",
    ] {
        assert!(errors.contains(expected), "{expected}\nis not in\n{errors}");
    }
    assert!(!errors.contains(&token[..20]), "{errors}");
    write(&path, &line);
    for (mode, status) in [(0o600, 0), (0o444, 0), (0o620, 78), (0o602, 78)] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let (found, errors) = check();
        assert_eq!(found, Some(status), "{mode:o}");
        assert_eq!(errors.contains("only its owner may write to"), status == 78, "{errors}");
    }
    fs::remove_file(&path).unwrap();
    assert_eq!(check().0, Some(78), "a file that is not there");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap();
    assert!(check().1.contains("expected a file"), "a pipe is not waited for");
}

#[test]
fn a_credential_is_found_where_the_service_manager_puts_it() {
    let (token, line) = new_token(&[]);
    let folder = Folder::new();
    let credentials = folder.file("credentials");
    fs::create_dir(&credentials).unwrap();
    write(&credentials.join("tokens"), &line);
    // Below systemd a missing credential is an error of the unit; in a shell there are none, and only that is said.
    let unit = "export SYSTEMD_EXEC_PID=$$; exec \"$@\"";
    let shell = "export SYSTEMD_EXEC_PID=1; exec \"$@\"";
    for (name, invoker, folder_is_told, status) in [
        ("tokens", unit, true, 0),
        ("tokens", unit, false, 78),
        ("tokens", shell, false, 0),
        ("../x", shell, false, 78),
        ("../x", unit, true, 78),
        ("", unit, true, 78),
        ("none", unit, true, 78),
        ("none", shell, true, 78),
    ] {
        let mut command = common::process::shell(invoker);
        common::scrub(&mut command, &folder);
        command.args([&common::binary(), "--check", "--config"]).arg(folder.file("config.toml"));
        command.env("KEYSERVICE_TOKENS_FILE", format!("credential:{name}"));
        command.env_remove("CREDENTIALS_DIRECTORY");
        if folder_is_told {
            command.env("CREDENTIALS_DIRECTORY", &credentials);
        }
        let ended = run_to_end(command);
        let errors = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(status), "{name:?}: {errors}");
        assert_eq!(
            errors.contains("credential:tokens is not checked"),
            status == 0 && !folder_is_told,
            "{errors}"
        );
    }
    let daemon = Daemon::start_with(folder, |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
        command.env("KEYSERVICE_TOKENS_FILE", "credential:tokens").env("CREDENTIALS_DIRECTORY", credentials);
    });
    assert_eq!((bearer(&daemon, "/key/32", &token).status, daemon.get("/key/32").status), (200, 401));
}

/// The status that a Unix socket answers with.
fn unix_status(path: &Path, request: &str) -> u16 {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
    stream.write_all(request.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n").as_bytes()).unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes[9..12]).parse().unwrap()
}

#[test]
fn a_unix_socket_has_its_mode_and_asks_for_a_token_unless_it_is_trusted() {
    for (trust, mode, status) in [("false", "0600", 401), ("true", "0666", 200)] {
        let (token, line) = new_token(&[]);
        let folder = Folder::new();
        let socket = folder.file("socket");
        let tokens = write(&folder.file("tokens"), &line);
        let _daemon = Daemon::start_with(folder, |command| {
            command.env("KEYSERVICE_HOST", format!("unix:{}", socket.display()));
            command.args(["--metrics-port", "0"]).env("KEYSERVICE_TOKENS_FILE", tokens);
            command.env("KEYSERVICE_UNIX_TRUST", trust).env("KEYSERVICE_UNIX_MODE", mode);
        });
        let found = fs::metadata(&socket).unwrap().permissions().mode() & 0o777;
        assert_eq!(format!("{found:04o}"), mode);
        assert_eq!(unix_status(&socket, &request("/key/32", "")), status, "unix-trust = {trust}");
        let field = format!("Authorization: Bearer {token}\r\n");
        assert_eq!(unix_status(&socket, &request("/key/32", &field)), 200);
        let unknown = format!("Authorization: Bearer {}\r\n", token.replace(['0', '1', '2', '3'], "4"));
        assert_eq!(
            unix_status(&socket, &request("/key/32", &unknown)),
            401,
            "a wrong token is wrong anywhere"
        );
    }
}
