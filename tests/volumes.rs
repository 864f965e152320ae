//! Secrets and ConfigMaps as the kubelet mounts and updates them: each change takes effect within 30 s of the update,
//! without a signal.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::fs::{self, File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustls::version::TLS13;
use tempfile::TempDir;

use common::tls::{Authority, Identity, client_config, connect};
use common::{Client, Daemon, TempDirectory, key_service, run_to_end, until};

/// The longest time from the kubelet's update until the change takes effect.
const UPDATE_MAX: Duration = Duration::from_secs(30);

/// A mounted Secret or ConfigMap. It is in memory if /dev/shm exists, as a Secret is.
struct Volume(TempDir);

impl Volume {
    fn new(files: &[(&str, &str)]) -> Self {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let volume = Self(TempDir::with_prefix_in("key-service-", parent).unwrap());
        volume.publish(files);
        volume
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn data(&self) -> Option<PathBuf> {
        fs::read_link(self.file("..data")).ok().map(|data| self.0.path().join(data))
    }

    /// Updates the volume in the order of the kubelet's AtomicWriter: create a directory with all files, rename the
    /// link to it into place, link new files, remove the links of removed files, and remove the previous directory.
    fn publish(&self, files: &[(&str, &str)]) {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("..2026_11_28_00_00_00.{:010}", NEXT.fetch_add(1, Ordering::Relaxed));
        let previous = self.data();
        let directory = self.0.path().join(&name);
        fs::create_dir(&directory).unwrap();
        for (file, text) in files {
            fs::write(directory.join(file), text).unwrap();
            // defaultMode 0400; a pod with an fsGroup adds group permissions.
            fs::set_permissions(directory.join(file), Permissions::from_mode(0o440)).unwrap();
        }
        symlink(&name, self.file("..data_tmp")).unwrap();
        fs::rename(self.file("..data_tmp"), self.file("..data")).unwrap();
        for (file, _) in files {
            if fs::symlink_metadata(self.file(file)).is_err() {
                symlink(Path::new("..data").join(file), self.file(file)).unwrap();
            }
        }
        for entry in fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name()) {
            let entry = entry.to_str().unwrap();
            if !entry.starts_with("..") && files.iter().all(|(file, _)| *file != entry) {
                fs::remove_file(self.file(entry)).unwrap();
            }
        }
        if let Some(previous) = previous {
            fs::remove_dir_all(previous).unwrap();
        }
    }
}

/// Creates a token. Returns it and its line for the tokens file.
fn new_token(name: &str) -> (String, String) {
    let mut command = key_service(&TempDirectory::new());
    command.args(["token", "new", "--name", name]);
    let text = String::from_utf8(run_to_end(command).stdout).unwrap();
    let (token, line) = text.split_once('\n').unwrap();
    (token.to_owned(), line.to_owned())
}

/// Starts a daemon with a configuration from a ConfigMap, and settings that name files of a Secret.
fn start(config: &Volume, settings: &[(&str, PathBuf)]) -> Daemon {
    let directory = TempDirectory::new();
    let mut command = key_service(&directory);
    command.arg("--config").arg(config.file("config.toml"));
    command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    for (name, path) in settings {
        command.env(format!("KEYSERVICE_{name}"), path);
    }
    Daemon::run(directory, command)
}

fn config() -> Volume {
    Volume::new(&[("config.toml", "max-size = 100\n")])
}

fn request(token: &str) -> String {
    let header = if token.is_empty() { String::new() } else { format!("Authorization: Bearer {token}\r\n") };
    format!("GET /key/32 HTTP/1.1\r\nHost: a\r\n{header}\r\n")
}

/// Waits until requests with `tokens` get `statuses`, on the open connection of `client` and on new connections.
fn wait_for_statuses<const N: usize>(
    daemon: &Daemon,
    client: &mut Client,
    tokens: [&str; N],
    statuses: [u16; N],
) {
    let since = Instant::now();
    until(&format!("statuses {statuses:?}"), || {
        let open = tokens.map(|token| client.send(request(token)).response().status);
        let new = tokens.map(|token| common::exchange(daemon.keys(), request(token)).status);
        (open == statuses && new == statuses).then_some(())
    });
    assert!(since.elapsed() < UPDATE_MAX, "{:?}", since.elapsed());
}

#[test]
fn token_changes_apply_and_a_missing_file_keeps_old_tokens() {
    let ((a, line_a), (b, line_b)) = (new_token("a"), new_token("b"));
    let both = format!("{line_a}\n{line_b}\n");
    let (config, secret) = (config(), Volume::new(&[("tokens", &both)]));
    let daemon = start(&config, &[("TOKENS_FILE", secret.file("tokens"))]);
    let mut client = Client::connect(daemon.keys());
    let tokens = [&*a, &*b, ""];
    wait_for_statuses(&daemon, &mut client, tokens, [200, 200, 401]);

    secret.publish(&[("tokens", &line_b)]);
    wait_for_statuses(&daemon, &mut client, tokens, [401, 200, 401]);

    secret.publish(&[("tokens", &both), ("unrelated", "x")]);
    wait_for_statuses(&daemon, &mut client, tokens, [200, 200, 401]);
    daemon.wait_for_metric("config_last_reload_successful", 1.0);

    secret.publish(&[("unrelated", "x")]); // the key is removed from the Secret
    daemon.wait_for_metric("config_last_reload_successful", 0.0);
    let path = secret.file("tokens");
    daemon
        .wait_for_log(&format!("{}: expected a file that can be read, found: No such file", path.display()));
    wait_for_statuses(&daemon, &mut client, tokens, [200, 200, 401]);

    secret.publish(&[("tokens", &line_a)]);
    wait_for_statuses(&daemon, &mut client, tokens, [200, 401, 401]);
    daemon.wait_for_metric("config_last_reload_successful", 1.0);

    secret.publish(&[("tokens", "")]);
    wait_for_statuses(&daemon, &mut client, tokens, [401, 401, 401]);
    daemon.wait_for_metric("config_last_reload_successful", 1.0);
}

#[test]
fn tokens_change_while_the_daemon_drains() {
    let ((a, line_a), (b, line_b)) = (new_token("a"), new_token("b"));
    let (config, secret) = (config(), Volume::new(&[("tokens", &line_a)]));
    let daemon =
        start(&config, &[("TOKENS_FILE", secret.file("tokens")), ("DRAIN_DELAY", PathBuf::from("3600"))]);
    daemon.signal("TERM");
    daemon.manager.wait_for("STOPPING=1");
    let statuses = || [&a, &b].map(|token| common::exchange(daemon.keys(), request(token)).status);
    assert_eq!(statuses(), [200, 401]);
    let since = Instant::now();
    secret.publish(&[("tokens", &line_b)]);
    until("the new tokens", || (statuses() == [401, 200]).then_some(()));
    assert!(since.elapsed() < UPDATE_MAX, "{:?}", since.elapsed());
}

#[test]
fn a_constantly_changing_secret_is_still_loaded() {
    let ((a, line_a), (b, line_b), (c, line_c)) = (new_token("a"), new_token("b"), new_token("c"));
    let (config, secret) = (config(), Volume::new(&[("tokens", &line_a)]));
    let daemon = start(&config, &[("TOKENS_FILE", secret.file("tokens"))]);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                secret.publish(&[("tokens", &line_b)]);
                secret.publish(&[("tokens", &line_c)]);
            }
        });
        // The files never stay unchanged, and the path is dangling for a moment at each change.
        until("a new token", || {
            let status = |token: &str| common::exchange(daemon.keys(), request(token)).status;
            assert_eq!(status(""), 401);
            (status(&a) == 401).then_some(())
        });
        stop.store(true, Ordering::Relaxed);
    });
    let mut client = Client::connect(daemon.keys());
    wait_for_statuses(&daemon, &mut client, [&*a, &*b, &*c, ""], [401, 401, 200, 401]);
    daemon.wait_for_metric("config_last_reload_successful", 1.0);
}

/// The contents of a Secret with all files that a setting can name.
struct Secret<'a> {
    server: &'a Identity,
    key: &'a str,
    client_ca: &'a str,
    tokens: &'a str,
}

impl Secret<'_> {
    fn files(&self) -> [(&str, &str); 4] {
        [
            ("tls.crt", &self.server.certificate),
            ("tls.key", self.key),
            ("ca.crt", self.client_ca),
            ("tokens", self.tokens),
        ]
    }
}

/// The server's certificate and the status of a request with `token`, for a client that trusts `authority` and has a
/// certificate; `None` if the handshake fails.
fn request_over_tls(
    daemon: &Daemon,
    authority: &Authority,
    client: &Identity,
    token: &str,
) -> Option<(Vec<u8>, u16)> {
    let mut client = connect(daemon.keys(), &client_config(authority, &[&TLS13], Some(client)));
    let sent = std::io::Write::write_all(&mut client.stream, request(token).as_bytes());
    let certificate = client.stream.conn.peer_certificates().map(|chain| chain[0].to_vec());
    sent.ok()?;
    let mut first = [0; 12];
    std::io::Read::read_exact(&mut client.stream, &mut first).ok()?;
    Some((certificate?, String::from_utf8_lossy(&first[9..]).parse().unwrap()))
}

#[test]
fn an_error_in_one_file_does_not_block_the_others() {
    let authority = Authority::new();
    let servers = [authority.server(), authority.server(), authority.server()];
    let cas = [Authority::new(), Authority::new()];
    let clients = [cas[0].client("a"), cas[1].client("b")];
    let ((a, line_a), (b, line_b)) = (new_token("a"), new_token("b"));
    let ca = [cas[0].pem(), cas[1].pem()];
    let secret_of = |server: usize, ca| Secret {
        server: &servers[server],
        key: &servers[server].key,
        client_ca: ca,
        tokens: &line_b,
    };
    let first = Secret { tokens: &line_a, ..secret_of(0, &ca[0]) };
    let (config, secret) = (config(), Volume::new(&first.files()));
    let daemon = start(
        &config,
        &[
            ("TLS_CERT", secret.file("tls.crt")),
            ("TLS_KEY", secret.file("tls.key")),
            ("TLS_CLIENT_CA", secret.file("ca.crt")),
            ("TOKENS_FILE", secret.file("tokens")),
        ],
    );
    // Waits until the server presents this certificate, admits only this client, and returns `statuses` for the two
    // tokens.
    let wait_for = |case: &str, server: usize, client: usize, statuses: [u16; 2]| {
        let since = Instant::now();
        until(case, || {
            let found = [&a, &b].map(|token| request_over_tls(&daemon, &authority, &clients[client], token));
            let from_other_client = request_over_tls(&daemon, &authority, &clients[1 - client], &b);
            let wanted = statuses.map(|status| Some((servers[server].der().to_vec(), status)));
            (found == wanted && from_other_client.is_none()).then_some(())
        });
        assert!(since.elapsed() < UPDATE_MAX, "{case}: {:?}", since.elapsed());
    };
    wait_for("the start", 0, 0, [200, 401]);

    secret.publish(&Secret { key: &servers[0].key, ..secret_of(1, &ca[0]) }.files());
    wait_for("a certificate without its key, and another token", 0, 0, [401, 200]);
    daemon.wait_for_metric("tls_last_reload_successful", 0.0);
    daemon.wait_for_metric("config_last_reload_successful", 0.0);
    daemon.wait_for_log("TLS reload failed, keeping the previous certificate");

    secret.publish(&Secret { key: &servers[0].key, ..secret_of(1, &ca[1]) }.files());
    wait_for("a certificate without its key, and another client CA", 0, 1, [401, 200]);
    daemon.wait_for_metric("tls_last_reload_successful", 0.0);

    secret.publish(&Secret { tokens: &line_a, ..secret_of(1, "nonsense") }.files());
    wait_for("no client CA, a renewed certificate, and another token", 1, 1, [200, 401]);
    daemon.wait_for_metric("tls_last_reload_successful", 0.0);
    daemon.wait_for_log("TLS reload failed, keeping the previous client CA");

    secret.publish(&Secret { tokens: "nonsense", ..secret_of(2, &ca[0]) }.files());
    wait_for("invalid tokens, and the other files valid", 2, 0, [200, 401]);
    daemon.wait_for_metric("tls_last_reload_successful", 1.0);
    daemon.wait_for_metric("config_last_reload_successful", 0.0);

    secret.publish(&secret_of(1, &ca[1]).files());
    wait_for("everything at once", 1, 1, [401, 200]);
    daemon.wait_for_metric("config_last_reload_successful", 1.0);
    assert!(!daemon.log().contains("protection removed"), "{}", daemon.log());
}

#[test]
fn a_replaced_subpath_mount_is_reported() {
    let ((a, line_a), (_, line_b)) = (new_token("a"), new_token("b"));
    let (config, secret) = (config(), Volume::new(&[("tokens", &line_a)]));
    // A subPath mount shows the file that existed when the container started, whatever replaces it. So does this path,
    // without a mount.
    let opened = File::open(secret.file("tokens")).unwrap();
    let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), opened.as_raw_fd()));
    let daemon = start(&config, &[("TOKENS_FILE", path.clone())]);
    let mut client = Client::connect(daemon.keys());
    wait_for_statuses(&daemon, &mut client, [&a, ""], [200, 401]);
    secret.publish(&[("tokens", &line_b)]);
    daemon.wait_for_metric("config_last_reload_successful", 0.0);
    daemon.wait_for_log(&format!(
        "{}: expected a file in a directory, found one that was deleted",
        path.display()
    ));
    wait_for_statuses(&daemon, &mut client, [&a, ""], [200, 401]); // the daemon can't read the new file
}
