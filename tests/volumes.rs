//! Secrets and ConfigMaps as the kubelet mounts and changes them: nobody sends a signal, and every change takes effect
//! within 30 s of the moment when the kubelet has made it.

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

use common::tls::{Authority, Identity, connect, trusting};
use common::{Client, Daemon, Folder, key_service, run_to_end, until};

/// What the daemon may take beside the kubelet.
const TAKES_EFFECT: Duration = Duration::from_secs(30);

/// A volume, in memory where there is such a file system, as that of a Secret is.
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

    /// In the order of the kubelet's AtomicWriter: a directory with everything in it, the link to it renamed into place, a
    /// link to each file that is new, those of files that are gone removed, and then the directory before.
    fn publish(&self, files: &[(&str, &str)]) {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("..2026_11_28_00_00_00.{:010}", NEXT.fetch_add(1, Ordering::Relaxed));
        let before = self.data();
        let directory = self.0.path().join(&name);
        fs::create_dir(&directory).unwrap();
        for (file, text) in files {
            fs::write(directory.join(file), text).unwrap();
            // defaultMode 0400, to which a pod with an fsGroup adds its group.
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
        if let Some(before) = before {
            fs::remove_dir_all(before).unwrap();
        }
    }
}

/// A new token and its line.
fn new_token(name: &str) -> (String, String) {
    let mut command = key_service(&Folder::new());
    command.args(["token", "new", "--name", name]);
    let text = String::from_utf8(run_to_end(command).stdout).unwrap();
    let (token, line) = text.split_once('\n').unwrap();
    (token.to_owned(), line.to_owned())
}

/// A daemon with a configuration from a ConfigMap, and settings that name files of a Secret.
fn start(config: &Volume, settings: &[(&str, PathBuf)]) -> Daemon {
    let folder = Folder::new();
    let mut command = key_service(&folder);
    command.arg("--config").arg(config.file("config.toml"));
    command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    for (name, path) in settings {
        command.env(format!("KEYSERVICE_{name}"), path);
    }
    Daemon::run(folder, command)
}

fn config() -> Volume {
    Volume::new(&[("config.toml", "max-size = 100\n")])
}

fn request(token: &str) -> String {
    let field = if token.is_empty() { String::new() } else { format!("Authorization: Bearer {token}\r\n") };
    format!("GET /key/32 HTTP/1.1\r\nHost: a\r\n{field}\r\n")
}

/// The statuses of `tokens` become `statuses` on a connection that was open before, and on new ones.
fn expect<const N: usize>(daemon: &Daemon, client: &mut Client, tokens: [&str; N], statuses: [u16; N]) {
    let since = Instant::now();
    until(&format!("statuses {statuses:?}"), || {
        let kept = tokens.map(|token| client.send(request(token)).response().status);
        let new = tokens.map(|token| common::exchange(daemon.keys(), request(token)).status);
        (kept == statuses && new == statuses).then_some(())
    });
    assert!(since.elapsed() < TAKES_EFFECT, "{:?}", since.elapsed());
}

#[test]
fn tokens_are_removed_and_added_and_their_absence_opens_nothing() {
    let ((a, line_a), (b, line_b)) = (new_token("a"), new_token("b"));
    let both = format!("{line_a}\n{line_b}\n");
    let (config, secret) = (config(), Volume::new(&[("tokens", &both)]));
    let daemon = start(&config, &[("TOKENS_FILE", secret.file("tokens"))]);
    let mut client = Client::connect(daemon.keys());
    let tokens = [&*a, &*b, ""];
    expect(&daemon, &mut client, tokens, [200, 200, 401]);

    secret.publish(&[("tokens", &line_b)]);
    expect(&daemon, &mut client, tokens, [401, 200, 401]);

    secret.publish(&[("tokens", &both), ("unrelated", "x")]);
    expect(&daemon, &mut client, tokens, [200, 200, 401]);
    daemon.wait_for_metric("config_last_reload_successful", 1.0);

    secret.publish(&[("unrelated", "x")]); // the key is removed from the Secret
    daemon.wait_for_metric("config_last_reload_successful", 0.0);
    let path = secret.file("tokens");
    daemon
        .wait_for_log(&format!("{}: expected a file that can be read, found: No such file", path.display()));
    expect(&daemon, &mut client, tokens, [200, 200, 401]);

    secret.publish(&[("tokens", &line_a)]);
    expect(&daemon, &mut client, tokens, [200, 401, 401]);
    daemon.wait_for_metric("config_last_reload_successful", 1.0);

    secret.publish(&[("tokens", "")]);
    expect(&daemon, &mut client, tokens, [401, 401, 401]);
    daemon.wait_for_metric("config_last_reload_successful", 1.0);
}

#[test]
fn a_token_is_removed_while_the_daemon_drains() {
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
    until("the other token", || (statuses() == [401, 200]).then_some(()));
    assert!(since.elapsed() < TAKES_EFFECT, "{:?}", since.elapsed());
}

#[test]
fn a_secret_that_changes_all_the_time_is_read_and_ends_as_it_is() {
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
        // It never settles, and the path leads nowhere for a moment at each change.
        until("one of the others", || {
            let status = |token: &str| common::exchange(daemon.keys(), request(token)).status;
            assert_eq!(status(""), 401);
            (status(&a) == 401).then_some(())
        });
        stop.store(true, Ordering::Relaxed);
    });
    let mut client = Client::connect(daemon.keys());
    expect(&daemon, &mut client, [&*a, &*b, &*c, ""], [401, 401, 200, 401]);
    daemon.wait_for_metric("config_last_reload_successful", 1.0);
}

/// What a Secret has that holds everything.
struct Secret<'a> {
    server: &'a Identity,
    key: &'a str,
    clients: &'a str,
    tokens: &'a str,
}

impl Secret<'_> {
    fn files(&self) -> [(&str, &str); 4] {
        [
            ("tls.crt", &self.server.certificate),
            ("tls.key", self.key),
            ("ca.crt", self.clients),
            ("tokens", self.tokens),
        ]
    }
}

/// What a client sees that trusts `authority` and has a certificate: the server's, and the status of a request with `token`;
/// nothing where it is refused.
fn seen(daemon: &Daemon, authority: &Authority, client: &Identity, token: &str) -> Option<(Vec<u8>, u16)> {
    let mut client = connect(daemon.keys(), &trusting(authority, &[&TLS13], Some(client)));
    let sent = std::io::Write::write_all(&mut client.stream, request(token).as_bytes());
    let certificate = client.stream.conn.peer_certificates().map(|chain| chain[0].to_vec());
    sent.ok()?;
    let mut first = [0; 12];
    std::io::Read::read_exact(&mut client.stream, &mut first).ok()?;
    Some((certificate?, String::from_utf8_lossy(&first[9..]).parse().unwrap()))
}

#[test]
fn an_error_in_one_file_of_a_secret_keeps_no_other_from_taking_effect() {
    let authority = Authority::new();
    let servers = [authority.server(), authority.server(), authority.server()];
    let cas = [Authority::new(), Authority::new()];
    let clients = [cas[0].client("a"), cas[1].client("b")];
    let ((a, line_a), (b, line_b)) = (new_token("a"), new_token("b"));
    let ca = [cas[0].pem(), cas[1].pem()];
    let whole = |server: usize, ca| Secret {
        server: &servers[server],
        key: &servers[server].key,
        clients: ca,
        tokens: &line_b,
    };
    let first = Secret { tokens: &line_a, ..whole(0, &ca[0]) };
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
    // Each change with which server's certificate is shown then, which client is let in, and the statuses of both tokens.
    let expect = |what: &str, server: usize, client: usize, statuses: [u16; 2]| {
        let since = Instant::now();
        until(what, || {
            let found = [&a, &b].map(|token| seen(&daemon, &authority, &clients[client], token));
            let other = seen(&daemon, &authority, &clients[1 - client], &b);
            let wanted = statuses.map(|status| Some((servers[server].der().to_vec(), status)));
            (found == wanted && other.is_none()).then_some(())
        });
        assert!(since.elapsed() < TAKES_EFFECT, "{what}: {:?}", since.elapsed());
    };
    expect("the start", 0, 0, [200, 401]);

    secret.publish(&Secret { key: &servers[0].key, ..whole(1, &ca[0]) }.files());
    expect("a certificate without its key, and another token", 0, 0, [401, 200]);
    daemon.wait_for_metric("tls_last_reload_successful", 0.0);
    daemon.wait_for_metric("config_last_reload_successful", 0.0);
    daemon.wait_for_log("TLS reload failed, keeping the previous certificate");

    secret.publish(&Secret { key: &servers[0].key, ..whole(1, &ca[1]) }.files());
    expect("a certificate without its key, and another client CA", 0, 1, [401, 200]);
    daemon.wait_for_metric("tls_last_reload_successful", 0.0);

    secret.publish(&Secret { tokens: &line_a, ..whole(1, "nonsense") }.files());
    expect("no client CA, a renewed certificate, and another token", 1, 1, [200, 401]);
    daemon.wait_for_metric("tls_last_reload_successful", 0.0);
    daemon.wait_for_log("TLS reload failed, keeping the previous client CA");

    secret.publish(&Secret { tokens: "nonsense", ..whole(2, &ca[0]) }.files());
    expect("nonsense for tokens, and the rest in order", 2, 0, [200, 401]);
    daemon.wait_for_metric("tls_last_reload_successful", 1.0);
    daemon.wait_for_metric("config_last_reload_successful", 0.0);

    secret.publish(&whole(1, &ca[1]).files());
    expect("everything at once", 1, 1, [401, 200]);
    daemon.wait_for_metric("config_last_reload_successful", 1.0);
    assert!(!daemon.log().contains("protection removed"), "{}", daemon.log());
}

#[test]
fn a_file_that_is_mounted_by_itself_is_reported_when_it_is_replaced() {
    let ((a, line_a), (_, line_b)) = (new_token("a"), new_token("b"));
    let (config, secret) = (config(), Volume::new(&[("tokens", &line_a)]));
    // What a subPath mount shows is the file that was there when the container started, whatever is put in its place. So
    // does this path, which needs no mount.
    let opened = File::open(secret.file("tokens")).unwrap();
    let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), opened.as_raw_fd()));
    let daemon = start(&config, &[("TOKENS_FILE", path.clone())]);
    let mut client = Client::connect(daemon.keys());
    expect(&daemon, &mut client, [&a, ""], [200, 401]);
    secret.publish(&[("tokens", &line_b)]);
    daemon.wait_for_metric("config_last_reload_successful", 0.0);
    daemon.wait_for_log(&format!(
        "{}: expected a file in a directory, found one that was deleted",
        path.display()
    ));
    expect(&daemon, &mut client, [&a, ""], [200, 401]); // nothing tells the daemon what the file has now
}
