//! Inherited sockets, and sockets that the daemon binds. tests/e2e/test_system.py covers systemd itself.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use common::process::{run_to_end_keeping_stdout, shell};
use common::{Daemon, TempDirectory, get, run_to_end};

/// A command that starts the daemon with up to two sockets as descriptors 3 and 4 (sd_listen_fds(3)). A shell receives
/// them as its standard streams and moves them.
fn socket_activated(directory: &TempDirectory, names: Option<&str>, sockets: Vec<OwnedFd>) -> Command {
    let count = sockets.len();
    let mut command = shell("exec 3<&0 4<&1; export LISTEN_PID=$$; exec \"$@\" </dev/null >/dev/null");
    common::clear_environment(&mut command, directory);
    command.arg(env!("CARGO_BIN_EXE_key-service")).arg("--config").arg(directory.file("config.toml"));
    for (name, value) in [("HOST", "127.0.0.1"), ("SRV_PORT", "0"), ("METRICS_PORT", "0")] {
        command.env(format!("KEYSERVICE_{name}"), value);
    }
    command.env("LISTEN_FDS", count.to_string());
    if let Some(names) = names {
        command.env("LISTEN_FDNAMES", names);
    }
    let mut sockets = sockets.into_iter();
    command.stdin(sockets.next().map_or(Stdio::null(), Stdio::from));
    command.stdout(sockets.next().map_or(Stdio::null(), Stdio::from));
    command
}

fn start(names: Option<&str>, sockets: Vec<OwnedFd>) -> Daemon {
    let directory = TempDirectory::new();
    let command = socket_activated(&directory, names, sockets);
    Daemon::run(directory, command)
}

/// Runs a daemon that must refuse these sockets, and returns its standard error.
fn refused_socket_error(names: Option<&str>, sockets: Vec<OwnedFd>) -> String {
    let directory = TempDirectory::new();
    let output = run_to_end_keeping_stdout(socket_activated(&directory, names, sockets));
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

fn tcp_listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

#[test]
fn named_sockets_are_assigned_in_any_order() {
    for names in ["http:metrics", "metrics:http"] {
        let (first, second) = (tcp_listener(), tcp_listener());
        let addresses = [first.local_addr().unwrap(), second.local_addr().unwrap()];
        let daemon = start(Some(names), vec![first.into(), second.into()]);
        let http = usize::from(names == "metrics:http");
        assert_eq!(daemon.keys(), addresses[http], "{names}");
        assert_eq!(daemon.metrics(), addresses[1 - http], "{names}");
        assert_eq!(get(addresses[http], "/key/32").body.len(), 32);
        assert_eq!(get(addresses[1 - http], "/metrics").status, 200);
    }
}

#[test]
fn unnamed_sockets_are_assigned_in_order() {
    for names in [None, Some(""), Some("unknown:unknown")] {
        let (first, second) = (tcp_listener(), tcp_listener());
        let addresses = [first.local_addr().unwrap(), second.local_addr().unwrap()];
        let daemon = start(names, vec![first.into(), second.into()]);
        assert_eq!([daemon.keys(), daemon.metrics()], addresses);
    }
}

#[test]
fn all_sockets_of_one_name_are_served() {
    let (first, second) = (tcp_listener(), tcp_listener());
    let addresses = [first.local_addr().unwrap(), second.local_addr().unwrap()];
    let daemon = start(Some("http:http"), vec![first.into(), second.into()]);
    assert!(daemon.status.starts_with(&format!("Keys on {}, {};", addresses[0], addresses[1])));
    for address in addresses {
        assert_eq!(get(address, "/key/32").body.len(), 32);
    }
}

#[test]
fn sockets_that_are_not_inherited_are_bound() {
    let metrics = tcp_listener();
    let address = metrics.local_addr().unwrap();
    let daemon = start(Some("metrics"), vec![metrics.into()]);
    assert_eq!(daemon.metrics(), address);
    assert_eq!(daemon.get("/key/32").body.len(), 32);
}

#[test]
fn an_inherited_unix_socket_is_served() {
    let directory = TempDirectory::new();
    let path = directory.file("http.sock");
    let daemon = start(Some("http"), vec![UnixListener::bind(&path).unwrap().into()]);
    assert!(daemon.status.starts_with(&format!("Keys on unix:{};", path.display())));
    let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
    let response = std::io::read_to_string(stream).unwrap();
    assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
}

#[test]
fn an_unknown_socket_name_is_refused() {
    let log = refused_socket_error(Some("http:ssh"), vec![tcp_listener().into(), tcp_listener().into()]);
    assert!(
        log.contains(
            "inherited descriptor 4 (name \"ssh\") is refused: expected the name http, metrics or credential"
        ),
        "{log}"
    );
    let log = refused_socket_error(Some("key-service.socket"), vec![tcp_listener().into()]);
    assert!(
        log.contains("descriptor 3 (name \"key-service.socket\")") && log.contains("FileDescriptorName="),
        "{log}"
    );
}

#[test]
fn a_descriptor_that_does_not_listen_is_refused() {
    let listener = tcp_listener();
    let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    for (what, descriptor) in [
        ("a connection", OwnedFd::from(stream)),
        ("a datagram socket", UdpSocket::bind("127.0.0.1:0").unwrap().into()),
        ("a file", File::open("/dev/null").unwrap().into()),
    ] {
        let log = refused_socket_error(Some("http"), vec![descriptor]);
        assert!(
            log.contains(
                "inherited descriptor 3 (name \"http\") is refused: expected a listening TCP or Unix"
            ),
            "{what}: {log}"
        );
    }
}

#[test]
fn a_third_unnamed_socket_is_refused() {
    let directory = TempDirectory::new();
    let mut command = shell("exec 3<&0 4<&1 5<&0; export LISTEN_PID=$$; exec \"$@\" </dev/null >/dev/null");
    common::clear_environment(&mut command, &directory);
    command.args([env!("CARGO_BIN_EXE_key-service"), "--config"]).arg(directory.file("config.toml"));
    command.env("LISTEN_FDS", "3").stdin(OwnedFd::from(tcp_listener())).stdout(OwnedFd::from(tcp_listener()));
    let output = run_to_end_keeping_stdout(command);
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(log.contains("inherited descriptor 5"), "{log}");
}

#[test]
fn sockets_for_another_process_are_ignored() {
    let directory = TempDirectory::new();
    let mut command = common::key_service(&directory);
    command.arg("--config").arg(directory.file("config.toml"));
    command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    command.env("LISTEN_FDS", "1").env("LISTEN_PID", "1");
    let daemon = Daemon::run(directory, command);
    assert_eq!(daemon.get("/key/32").body.len(), 32);
}

#[test]
fn a_blocking_socket_is_made_non_blocking() {
    // std's listeners block. A client that disconnects before it is accepted would leave the accept loop blocked.
    let listener = tcp_listener();
    let address = listener.local_addr().unwrap();
    let daemon = start(Some("http"), vec![listener.into()]);
    for _ in 0..20 {
        drop(std::net::TcpStream::connect(address).unwrap());
    }
    assert_eq!(get(address, "/key/32").body.len(), 32);
    assert_eq!(daemon.get("/livez").status, 200);
}

/// A daemon without `--host`, which listens on every address.
fn start_on_every_address() -> Daemon {
    Daemon::start_with(TempDirectory::new(), |command| {
        command.args(["--srv-port", "0", "--metrics-port", "0"]);
    })
}

#[test]
fn localhost_is_served_over_ipv4_and_ipv6() {
    let daemon = start_on_every_address();
    let (keys, metrics) = (daemon.keys().port(), daemon.metrics().port());
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    for ip in loopback.into_iter().filter(|ip| ip.is_ipv4() || common::has_ipv6()) {
        assert_eq!(get((ip, keys).into(), "/key/32").body.len(), 32, "{ip}");
        assert_eq!(get((ip, metrics).into(), "/metrics").status, 200, "{ip}");
    }
    if common::has_ipv6() {
        assert_eq!(daemon.status, format!("Keys on [::]:{keys}; metrics on [::]:{metrics}"));
    }
}

#[test]
fn a_dual_stack_socket_reports_ipv4_clients_as_ipv4() {
    let daemon = Daemon::start_with(TempDirectory::new(), |command| {
        command.args(["--srv-port", "0", "--metrics-port", "0"]).env("KEYSERVICE_AUDIT", "true");
    });
    let keys = (Ipv4Addr::LOCALHOST, daemon.keys().port()).into();
    assert_eq!(get(keys, "/key/32").status, 200);
    daemon.wait_for_log("address=127.0.0.1");
    assert!(!daemon.log().contains("::ffff:"), "{}", daemon.log());
}

#[test]
fn an_ipv4_host_leaves_the_ipv6_port_free() {
    let leaves_it_free = || {
        let daemon = Daemon::start_with(TempDirectory::new(), |command| {
            command.args(["--host", "0.0.0.0", "--srv-port", "0", "--metrics-port", "0"]);
        });
        let (keys, metrics) = (daemon.keys().port(), daemon.metrics().port());
        assert_eq!(daemon.status, format!("Keys on 0.0.0.0:{keys}; metrics on 0.0.0.0:{metrics}"));
        TcpListener::bind((Ipv6Addr::LOCALHOST, keys)).is_ok()
    };
    // Another process may have bound the same port for IPv6 alone, but not three times.
    assert!(!common::has_ipv6() || (0..3).any(|_| leaves_it_free()), "the port is free for IPv6");
}

#[test]
fn the_health_subcommand_finds_a_wildcard_listener() {
    let daemon = start_on_every_address();
    let directory = TempDirectory::new();
    common::unless_stalled(|| {
        let mut command = common::key_service(&directory);
        command.arg("--config").arg(directory.file("config.toml"));
        command.args(["--srv-port", &daemon.keys().port().to_string(), "health"]);
        let output = run_to_end(command);
        assert_eq!((output.status.code(), &*output.stdout), (Some(0), b"OK\n".as_slice()));
    });
}

/// Runs a daemon that must fail to bind its sockets, and returns its standard error.
fn bind_error(flags: &[&str], settings: &[(&str, &str)]) -> String {
    let directory = TempDirectory::new();
    let mut command = common::key_service(&directory);
    command.arg("--config").arg(directory.file("config.toml")).args(flags);
    for (name, value) in settings {
        command.env(format!("KEYSERVICE_{name}"), value);
    }
    let output = run_to_end(command);
    assert_eq!(output.status.code(), Some(1), "{flags:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_bind_error_names_the_address_and_the_setting() {
    let taken = tcp_listener();
    let taken = taken.local_addr().unwrap().port().to_string();
    let directory = TempDirectory::new();
    let file = directory.write("a-file", "").to_str().unwrap().to_owned();
    let path = format!("unix:{file}");
    let (local, free, absent) = (["--host", "127.0.0.1"], ["--srv-port", "0"], "192.0.2.1");
    let metrics = |port| ["--metrics-port", port];
    let in_use = "Address already in use";
    for (flags, settings, expected) in [
        (
            [local, ["--srv-port", &taken], metrics("0")],
            None,
            format!("127.0.0.1:{taken} (srv-port): {in_use}"),
        ),
        ([local, free, metrics(&taken)], None, format!("127.0.0.1:{taken} (metrics-port): {in_use}")),
        // A socket on every address conflicts with one on a single address.
        (
            [["--host", "*"], ["--srv-port", &taken], metrics("0")],
            None,
            format!(":{taken} (srv-port): {in_use}"),
        ),
        (
            [["--host", absent], free, metrics("0")],
            None,
            format!("{absent}:0 (host): Cannot assign requested"),
        ),
        (
            [local, free, metrics("0")],
            Some(absent),
            format!("{absent}:0 (metrics-host): Cannot assign requested"),
        ),
        ([["--host", &path], free, metrics("0")], None, format!("{path} (host): {in_use}")),
        ([local, free, metrics("0")], Some(&path), format!("{path} (metrics-host): {in_use}")),
    ] {
        let settings: Vec<_> = settings.into_iter().map(|host| ("METRICS_HOST", host)).collect();
        let log = bind_error(flags.as_flattened(), &settings);
        assert!(log.contains("can't listen on ") && log.contains(&expected), "{expected}\n{log}");
    }
}

#[test]
fn one_port_serves_keys_and_metrics() {
    let listener = tcp_listener();
    let directory = TempDirectory::new();
    let mut command = socket_activated(&directory, Some("http"), vec![listener.into()]);
    command.args(["--srv-port", "1123", "--metrics-port", "1123"]); // not used, since the socket is inherited
    let daemon = Daemon::run(directory, command);
    assert!(daemon.status.ends_with("; metrics on the same"));
    for path in ["/key/32", "/health", "/metrics"] {
        assert_eq!(daemon.get(path).status, 200, "{path}");
    }
}
