//! Start, shutdown and reload, as the service manager and clients see them.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::io::Write;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use common::{Client, Daemon, Process, TempDirectory, get, request, until};

/// A command that starts the daemon with its standard input as descriptor 3 (sd_listen_fds(3)).
fn socket_activated(directory: &TempDirectory) -> Command {
    let mut command = common::process::shell("exec 3<&0 && exec \"$@\"");
    common::clear_environment(&mut command, directory);
    command.arg(env!("CARGO_BIN_EXE_key-service"));
    command
}

#[test]
fn ready_reports_the_addresses() {
    let daemon = Daemon::start(&[]);
    assert_eq!(daemon.status, format!("Keys on {}; metrics on {}", daemon.keys(), daemon.metrics()));
    assert_eq!(daemon.get("/readyz").status, 200, "the daemon serves requests once it is ready");
}

#[test]
fn sigterm_and_sigint_stop_an_idle_daemon_with_status_0() {
    for signal in ["TERM", "INT"] {
        let mut daemon = Daemon::start(&[]);
        daemon.signal(signal);
        let message = daemon.manager.wait_for("STOPPING=1");
        assert!(message.contains(&"STATUS=Draining".to_owned()));
        assert_eq!(daemon.wait(), 0);
        assert!(daemon.log().contains(&format!("SIG{signal}")), "{}", daemon.log());
    }
}

#[test]
fn a_download_finishes_before_the_daemon_exits() {
    const LENGTH: usize = 16 << 20; // more than the socket buffers hold
    let mut daemon = Daemon::start(&[("MAX_SIZE", "1073741824"), ("DRAIN_TIMEOUT", "60")]);
    let mut client = Client::connect(daemon.keys());
    client.send(request(&format!("/key/{LENGTH}")));
    until("the stream to begin", || (daemon.metric("key_bytes_total{format=\"raw\"}") > 0.0).then_some(()));
    daemon.signal("TERM");
    daemon.manager.wait_for("STOPPING=1");
    let response = client.response();
    assert_eq!(response.body.len(), LENGTH);
    assert!(client.is_closed());
    assert_eq!(daemon.wait(), 0);
}

#[test]
fn an_aborted_stream_is_shorter_than_its_content_length() {
    let mut daemon = Daemon::start(&[("MAX_SIZE", "1073741824"), ("DRAIN_TIMEOUT", "1")]);
    let mut client = Client::connect(daemon.keys());
    client.send(request("/key/1073741824"));
    until("the stream to begin", || (daemon.metric("key_bytes_total{format=\"raw\"}") > 0.0).then_some(()));
    daemon.signal("TERM");
    assert_eq!(daemon.wait(), 0); // the daemon does not wait for a client that does not read
    assert!(daemon.log().contains("connections still open"));
    assert!(client.read_response(true).is_none(), "the response must not look complete");
}

/// A client that has not read its response. The daemon has written all of it to the socket buffers.
fn with_unread_response(daemon: &Daemon, connection: &str) -> Client {
    let mut client = Client::connect(daemon.keys());
    client.send(format!("GET /key/150000 HTTP/1.1\r\nHost: a\r\nConnection: {connection}\r\n\r\n"));
    until("the response to be written", || {
        let is_generated = daemon.metric("key_bytes_total{format=\"raw\"}") >= 150_000.0;
        (is_generated && daemon.metric("http_requests_in_flight") == 1.0).then_some(()) // only the metrics request
    });
    client
}

#[test]
fn an_unread_response_is_reset_at_the_end_of_the_drain() {
    for connection in ["close", "keep-alive"] {
        let mut daemon = Daemon::start(&[("MAX_SIZE", "1000000"), ("DRAIN_TIMEOUT", "1")]);
        let mut client = with_unread_response(&daemon, connection);
        daemon.signal("TERM");
        assert_eq!(daemon.wait(), 0);
        assert!(
            client.read_response(true).is_none(),
            "after a normal close, the kernel would still send the rest"
        );
        let log = daemon.log();
        assert!(log.contains("connections still open connections=0 unacknowledged=1"), "{log}");
    }
}

#[test]
fn a_response_read_during_the_drain_is_complete_and_ends_it() {
    for connection in ["close", "keep-alive"] {
        let mut daemon = Daemon::start(&[("MAX_SIZE", "1000000"), ("DRAIN_TIMEOUT", "3600")]);
        let mut client = with_unread_response(&daemon, connection);
        daemon.signal("TERM");
        daemon.manager.wait_for("STOPPING=1");
        assert_eq!(client.response().body.len(), 150_000);
        assert!(client.is_closed());
        assert_eq!(daemon.wait(), 0); // although the client keeps the connection open
        assert!(!daemon.log().contains("connections still open"), "{}", daemon.log());
    }
}

#[test]
fn a_second_signal_ends_the_drain_at_once() {
    for (delay, second) in [("3600", "TERM"), ("0", "INT")] {
        let settings = [
            ("DRAIN_DELAY", delay),
            ("DRAIN_TIMEOUT", "3600"),
            ("MAX_SIZE", "1073741824"),
            ("AUDIT", "true"),
        ];
        let mut daemon = Daemon::start(&settings);
        let mut client = Client::connect(daemon.keys());
        client.send(request("/key/1073741824"));
        until("the stream to begin", || {
            (daemon.metric("key_bytes_total{format=\"raw\"}") > 0.0).then_some(())
        });
        daemon.signal("TERM");
        daemon.manager.wait_for("STOPPING=1");
        daemon.signal("HUP"); // a signal that does not end the drain
        daemon.signal(second);
        assert_eq!(daemon.wait(), 0);
        let log = daemon.log();
        assert!(log.contains("a second signal ends the drain"), "{log}");
        assert!(log.contains(&format!("signal=SIG{second}")), "{log}");
        assert!(log.contains("outcome=aborted"), "{log}");
        assert!(client.read_response(true).is_none(), "the response must not look complete");
    }
}

#[test]
fn a_request_in_flight_gets_a_response_with_connection_close() {
    // The daemon keeps reading for 250 ms. On a busy machine the test may miss them, so one success in five tries is
    // enough.
    let is_served = (0..5).any(|_| {
        let mut daemon = Daemon::start(&[]);
        let mut client = Client::connect(daemon.keys());
        assert_eq!(client.send(request("/key/32")).response().header("connection"), None);
        client.send(&request("/key/32")[..20]);
        daemon.signal("TERM");
        daemon.manager.wait_for("STOPPING=1");
        if client.stream.write_all(&request("/key/32").as_bytes()[20..]).is_err() {
            return false;
        }
        let Some(response) = client.read_response(true) else { return false };
        assert_eq!((response.status, response.header("connection")), (200, Some("close")));
        assert!(client.is_closed());
        assert_eq!(daemon.wait(), 0);
        true
    });
    assert!(is_served);
}

#[test]
fn half_a_request_does_not_delay_the_exit() {
    let mut daemon = Daemon::start(&[("HEAD_TIMEOUT", "3600"), ("DRAIN_TIMEOUT", "3600")]);
    let mut half = Client::connect(daemon.keys());
    half.send("GET /key/32 HT");
    let mut idle = Client::connect(daemon.keys());
    idle.send(request("/key/1")).response();
    let mut silent = Client::connect(daemon.keys());
    daemon.signal("TERM");
    assert_eq!(daemon.wait(), 0);
    assert!(half.is_closed() && idle.is_closed() && silent.is_closed());
}

#[test]
fn the_drain_delay_fails_readiness_and_serves_the_rest() {
    let mut daemon = Daemon::start(&[("DRAIN_DELAY", "3600"), ("MAX_SIZE", "1000000")]);
    daemon.signal("TERM");
    daemon.manager.wait_for("STOPPING=1");
    let response = daemon.get("/readyz");
    assert_eq!((response.status, response.problem().as_str()), (503, "The service is stopping"));
    assert!(response.header("retry-after").is_some());
    for path in ["/key/32", "/key/1000000", "/health", "/livez"] {
        let response = daemon.get(path);
        assert_eq!((response.status, response.header("connection")), (200, Some("close")), "{path}");
    }
    assert!(daemon.is_running());
}

#[test]
fn a_reload_is_announced_in_one_datagram_and_applied() {
    let directory = TempDirectory::new();
    directory.write("config.toml", "max-size = 10\nlog-level = \"info\"\nworkers = 1\n");
    let daemon = Daemon::start_with(directory, |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    });
    assert_eq!(daemon.get("/key/11").status, 413);
    daemon
        .directory
        .write("config.toml", "max-size = 11\nlog-level = \"debug\"\nworkers = 2\nhead-timeout = 7\n");
    daemon.signal("HUP");
    let reloading = daemon.manager.wait_for("RELOADING=1");
    let now = reloading.iter().find_map(|line| line.strip_prefix("MONOTONIC_USEC="));
    assert!(now.expect("in the same datagram").parse::<u64>().unwrap() > 0);
    daemon.manager.wait_for("READY=1");
    assert_eq!(daemon.get("/key/11").status, 200);
    daemon.wait_for_log("configuration reloaded");
    for setting in ["workers", "head-timeout"] {
        daemon.wait_for_log(&format!("setting={setting}"));
    }
    // At the new level, a malformed request is logged.
    let _ = common::exchange(daemon.keys(), "nonsense\r\n\r\n");
    daemon.wait_for_log("connection failed");
    daemon.wait_for_metric("config_last_reload_successful", 1.0);
}

#[test]
fn a_reload_with_errors_changes_nothing_and_reports_them() {
    let directory = TempDirectory::new();
    directory.write("config.toml", "max-size = 10\n");
    let daemon = Daemon::start_with(directory, |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    });
    daemon.directory.write("config.toml", "max-size = 20\nlog-level = \"loud\"\nmaxsize = 1\n");
    daemon.signal("HUP");
    daemon.manager.wait_for("RELOADING=1");
    let ready = daemon.manager.wait_for("READY=1");
    // All errors are in one line.
    let status = ready.iter().find(|line| line.contains("; reload 1 was refused: ")).expect("a status");
    assert!(
        status.contains("log-level: expected one of") && status.contains("maxsize: not a setting"),
        "{status}"
    );
    assert_eq!(daemon.get("/key/11").status, 413, "no change was applied");
    daemon.wait_for_log("keeping the previous configuration");
    daemon.wait_for_log("log-level: expected one of");
    daemon.wait_for_log("maxsize: not a setting");
    daemon.wait_for_metric("config_last_reload_successful", 0.0);
}

/// A daemon with this configuration file, on free ports of loopback.
fn start(config: &str) -> Daemon {
    let directory = TempDirectory::new();
    directory.write("tokens", "");
    directory.write("config.toml", &config.replace("TOKENS", directory.file("tokens").to_str().unwrap()));
    Daemon::start_with(directory, |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    })
}

/// Sends SIGHUP, and returns the message to the service manager at the end of the reload.
fn reload(daemon: &Daemon) -> Vec<String> {
    daemon.signal("HUP");
    daemon.manager.wait_for("RELOADING=1");
    daemon.manager.wait_for("READY=1")
}

const PROTECTED: &str = "tokens-file = \"TOKENS\"\nrate-requests = 5\nrate-bytes = 500\naudit = true\n";

#[test]
fn a_reload_is_refused_when_the_configuration_file_is_gone() {
    let daemon = start(PROTECTED);
    let (file, away) = (daemon.directory.file("config.toml"), daemon.directory.file("away"));
    assert_eq!(daemon.get("/key/32").status, 401);
    std::fs::rename(&file, &away).unwrap();
    for number in 1..=2 {
        let ready = reload(&daemon);
        let refused = format!("; reload {number} was refused: {}: the file is gone", file.display());
        assert!(ready.iter().any(|line| line.contains(&refused)), "{ready:?}");
        assert_eq!(daemon.get("/key/32").status, 401);
        assert_eq!(daemon.metric("config_last_reload_successful"), 0.0);
    }
    daemon.wait_for_log("config.toml: the file is gone; an empty file leaves");
    std::os::unix::fs::symlink("nowhere", &file).unwrap();
    reload(&daemon);
    assert_eq!((daemon.get("/key/32").status, daemon.metric("config_last_reload_successful")), (401, 0.0));
    std::fs::rename(&away, &file).unwrap();
    daemon.wait_for_metric("config_last_reload_successful", 1.0); // without a signal, within seconds
}

#[test]
fn a_reload_that_removes_protection_warns_and_names_it() {
    let daemon = start(PROTECTED);
    daemon.directory.write("config.toml", "max-size = 10\n");
    reload(&daemon);
    assert_eq!(daemon.get("/key/10").status, 200);
    daemon.wait_for_log("configuration reloaded");
    let log = daemon.log();
    let warnings: Vec<_> = log.lines().filter(|line| line.contains(" WARN ")).collect();
    let [warning] = warnings[..] else { panic!("one warning: {log}") };
    assert!(warning.contains("protection removed by this reload"), "{warning}");
    assert!(warning.contains("settings=tokens-file, rate-requests, rate-bytes, audit"), "{warning}");
    // A second reload does not report it again.
    reload(&daemon);
    until("the second reload", || {
        (daemon.log().matches("configuration reloaded").count() == 2).then_some(())
    });
    assert_eq!(daemon.log().matches("protection removed").count(), 1);
}

#[test]
fn a_changed_file_alone_removes_no_protection() {
    let daemon = start(PROTECTED);
    daemon.directory.write("config.toml", ""); // an editor may empty the file before it writes
    daemon.wait_for_metric("config_last_reload_successful", 0.0);
    assert_eq!(daemon.get("/key/32").status, 401);
    daemon.wait_for_log("a changed file alone removes no protection");
    let message = daemon.manager.wait_for("STATUS=");
    let [status] = &message[..] else { panic!("one field: {message:?}") };
    assert!(status.contains("; the last reload was refused: tokens-file, rate-requests"), "{status}");
    let ready = reload(&daemon);
    assert!(ready.iter().any(|line| line.ends_with("; reload 1 succeeded")), "{ready:?}");
    assert_eq!(daemon.get("/key/32").status, 200, "a reload by signal removes the protection");
}

#[test]
fn a_changed_file_is_reloaded_without_a_signal() {
    let daemon = start("max-size = 10\nworkers = 1\n");
    daemon.directory.write("config.toml", "max-size = 11\nworkers = 2\n");
    until("the larger key", || (daemon.get("/key/11").status == 200).then_some(()));
    let message = daemon.manager.message();
    assert_eq!(message, [format!("STATUS={}", daemon.status)], "no reload was requested");
    daemon.wait_for_log("configuration reloaded");
    assert_eq!(daemon.log().matches("setting=workers").count(), 1, "{}", daemon.log());
}

#[test]
fn a_refused_change_is_logged_once_and_applied_when_fixed() {
    let daemon = start("max-size = 10\n");
    daemon.directory.write("config.toml", "max-size = 11\nmax-sise = 1\n");
    daemon.wait_for_metric("config_last_reload_successful", 0.0);
    std::thread::sleep(Duration::from_secs(12)); // two checks of the files
    reload(&daemon);
    std::thread::sleep(Duration::from_secs(7)); // the next check must not reload them again
    let log = daemon.log();
    assert_eq!(log.matches("max-sise: not a setting").count(), 2, "{log}");
    assert_eq!(log.matches("files have changed").count(), 1, "{log}");
    assert_eq!(daemon.get("/key/11").status, 413);
    daemon.directory.write("config.toml", "max-size = 12\n");
    daemon.wait_for_metric("config_last_reload_successful", 1.0);
    assert_eq!(daemon.get("/key/12").status, 200);
}

#[test]
fn serving_keys_to_everyone_logs_a_warning() {
    const WARNING: &str = "keys are served to every client that reaches these addresses";
    let start = |host: &str, tokens: bool| {
        let directory = TempDirectory::new();
        let path = directory.write("tokens", "");
        Daemon::start_with(directory, |command| {
            command.args(["--host", host, "--srv-port", "0", "--metrics-port", "0"]);
            if tokens {
                command.env("KEYSERVICE_TOKENS_FILE", path);
            }
        })
    };
    for host in ["0.0.0.0", "*"] {
        let daemon = start(host, false);
        daemon.wait_for_log(WARNING);
        let log = daemon.log();
        let line = log.lines().find(|line| line.contains(WARNING)).unwrap();
        assert!(line.contains("WARN") && line.contains(&format!("addresses={}", daemon.keys())), "{line}");
        assert_eq!(log.matches(WARNING).count(), 1);
    }
    for (host, tokens) in [("127.0.0.1", false), ("::1", false), ("0.0.0.0", true)] {
        if host == "::1" && !common::has_ipv6() {
            continue;
        }
        let mut daemon = start(host, tokens);
        daemon.signal("TERM");
        assert_eq!(daemon.wait(), 0);
        assert!(!daemon.log().contains(WARNING), "{host}: {}", daemon.log());
    }
}

#[test]
fn serving_keys_to_everyone_on_inherited_sockets_logs_a_warning() {
    for (host, is_exposed) in [("0.0.0.0", true), ("127.0.0.1", false)] {
        let listener = TcpListener::bind((host, 0)).unwrap();
        let directory = TempDirectory::new();
        let mut command = socket_activated(&directory);
        command.arg("--config").arg(directory.file("config.toml")).args(["--metrics-port", "0"]);
        // The setting is not used for an inherited socket.
        command.args(["--host", if is_exposed { "127.0.0.1" } else { "0.0.0.0" }]);
        command.env("LISTEN_FDS", "1").stdin(OwnedFd::from(listener));
        let mut daemon = Daemon::run(directory, command);
        daemon.signal("TERM");
        assert_eq!(daemon.wait(), 0);
        assert_eq!(daemon.log().contains("keys are served to every client"), is_exposed, "{}", daemon.log());
    }
}

#[test]
fn the_watchdog_is_pinged_while_the_workers_make_progress() {
    let daemon = Daemon::start_with(TempDirectory::new(), |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
        command.env("WATCHDOG_USEC", "300000");
    });
    for _ in 0..5 {
        daemon.manager.wait_for("WATCHDOG=1");
    }
}

#[test]
fn a_suspended_process_reports_no_missed_heartbeat() {
    let daemon = Daemon::start_with(TempDirectory::new(), |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
        command.env("WATCHDOG_USEC", "30000000");
    });
    daemon.manager.wait_for("WATCHDOG=1");
    std::thread::sleep(Duration::from_secs(8)); // a tick takes 10 s
    daemon.signal("STOP");
    std::thread::sleep(Duration::from_secs(4));
    daemon.signal("CONT");
    daemon.manager.wait_for("WATCHDOG=1");
    assert!(!daemon.log().contains("missed a heartbeat"), "{}", daemon.log());
}

#[test]
fn an_abstract_notify_socket_gets_every_message() {
    let directory = TempDirectory::new();
    let name = format!("key-service-test-{}", std::process::id());
    let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    manager.set_read_timeout(Some(common::TIMEOUT)).unwrap();
    let message = || {
        let mut buffer = [0; 4096];
        let length = manager.recv(&mut buffer).expect("a message to the service manager");
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    };
    let start = |host: &str| {
        let mut command = common::key_service(&directory);
        command.arg("--config").arg(directory.file("config.toml"));
        command.args(["--host", host, "--srv-port", "0", "--metrics-port", "0"]);
        command.env("NOTIFY_SOCKET", format!("@{name}")).env("WATCHDOG_USEC", "300000");
        Process::spawn(command)
    };
    let mut child = start("127.0.0.1");
    let ready = message();
    assert!(ready.starts_with("READY=1\nSTATUS=Keys on 127.0.0.1:"), "{ready}");
    assert_eq!(message(), "WATCHDOG=1\n");
    child.signal("TERM");
    until("STOPPING=1", || (message() == "STOPPING=1\nSTATUS=Draining\n").then_some(()));
    assert_eq!(child.wait().code(), Some(0));
    assert_eq!(start("nowhere").wait().code(), Some(78));
    assert!(message().starts_with("STATUS=host: expected"));
}

#[test]
fn a_watchdog_of_another_process_is_not_pinged() {
    let daemon = Daemon::start_with(TempDirectory::new(), |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
        command.env("WATCHDOG_USEC", "10000").env("WATCHDOG_PID", "1");
    });
    for _ in 0..20 {
        assert_eq!(daemon.get("/key/32").status, 200);
    }
    daemon.signal("TERM");
    assert!(
        daemon.manager.message().contains(&"STOPPING=1".to_owned()),
        "no watchdog message was sent before"
    );
}

#[test]
fn a_full_notify_socket_stalls_no_request() {
    let directory = TempDirectory::new();
    let path = directory.file("stuck");
    let stuck = UnixDatagram::bind(&path).unwrap();
    let filler = UnixDatagram::unbound().unwrap();
    filler.set_nonblocking(true).unwrap();
    while filler.send_to(b"full", &path).is_ok() {}
    // READY can't report the address of the daemon, so the daemon inherits its socket.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut command = socket_activated(&directory);
    command.arg("--config").arg(directory.file("config.toml")).args([
        "--metrics-port",
        "0",
        "--log-level",
        "off",
    ]);
    command.env("LISTEN_FDS", "1").env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "20000");
    command.stdin(OwnedFd::from(listener));
    let mut child = Process::spawn(command);
    for _ in 0..50 {
        assert_eq!(get(address, "/key/32").body.len(), 32);
    }
    child.signal("TERM");
    assert_eq!(child.wait().code(), Some(0), "the exit is not delayed either");
    drop(stuck);
}

#[test]
fn a_full_log_stalls_no_request() {
    // Stderr is a pipe that is never read, which blocks writers as a stopped journal does.
    let (reader, writer) = std::io::pipe().unwrap();
    let directory = TempDirectory::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut command = socket_activated(&directory);
    command.arg("--config").arg(directory.file("config.toml")).args([
        "--metrics-port",
        "0",
        "--log-level",
        "trace",
    ]);
    command.env("LISTEN_FDS", "1").env("KEYSERVICE_MAX_CONNECTIONS", "100");
    command.stdin(OwnedFd::from(listener)).stderr(writer.as_fd().try_clone_to_owned().unwrap());
    let child = Process::spawn(command);
    // Each malformed request logs a line; the pipe holds 64 KiB and the queue 1,024 lines.
    for _ in 0..3000 {
        let _ = common::exchange(address, "nonsense\r\n\r\n");
    }
    assert_eq!(get(address, "/key/32").body.len(), 32);
    drop((child, reader));
}

#[test]
fn restarts_on_an_inherited_socket_lose_no_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let start = || {
        let directory = TempDirectory::new();
        let mut command = socket_activated(&directory);
        command.arg("--config").arg(directory.file("config.toml")).args(["--metrics-port", "0"]);
        command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "http");
        command.stdin(OwnedFd::from(listener.try_clone().unwrap()));
        Daemon::run(directory, command)
    };
    let stop = AtomicBool::new(false);
    let is_running = || !stop.load(Ordering::Relaxed);
    // A stopping server waits 250 ms for requests that are on their way. If the machine stops one of both for most of that,
    // the connection may be closed: `since` is when the client connected, or sent the request before.
    let closed = AtomicU32::new(0);
    let key = |client: &mut Client, since: &mut Instant| {
        let begin = Instant::now();
        let sent = client.stream.write_all(request("/key/32").as_bytes());
        let response = sent.ok().and_then(|()| client.read_response(true));
        if response.is_none() {
            assert!(since.elapsed() > Duration::from_millis(200), "a connection is lost");
            assert!(closed.fetch_add(1, Ordering::Relaxed) < 2, "connections are lost");
        }
        *since = begin;
        response.inspect(|response| assert_eq!(response.body.len(), 32))
    };
    let connect_for_each_key = || {
        let mut served = 0;
        while is_running() {
            let (mut since, mut client) = (Instant::now(), Client::connect(address));
            served += u32::from(key(&mut client, &mut since).is_some());
        }
        served
    };
    let reuse_connections = || {
        let mut served = 0;
        while is_running() {
            let (mut since, mut client) = (Instant::now(), Client::connect(address));
            // Until the server closes the connection.
            while let Some(response) = key(&mut client, &mut since)
                && response.header("connection") != Some("close")
                && is_running()
            {
                served += 1;
            }
        }
        served
    };
    std::thread::scope(|scope| {
        let mut clients: Vec<_> = (0..2).map(|_| scope.spawn(connect_for_each_key)).collect();
        clients.extend((0..2).map(|_| scope.spawn(reuse_connections)));
        for _ in 0..5 {
            let mut daemon = start();
            until("some load", || (daemon.metric("key_length_bytes_count") > 50.0).then_some(()));
            daemon.signal("TERM");
            assert_eq!(daemon.wait(), 0);
        }
        let _last = start();
        stop.store(true, Ordering::Relaxed);
        let served: u32 =
            clients.into_iter().map(|client| client.join().expect("no connection was lost")).sum();
        assert!(served > 200, "{served}");
    });
}

#[test]
fn an_activated_daemon_exits_when_idle() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let directory = TempDirectory::new();
    let mut command = socket_activated(&directory);
    command.arg("--config").arg(directory.file("config.toml")).args(["--metrics-port", "0"]);
    command.env("LISTEN_FDS", "1").env("KEYSERVICE_EXIT_IDLE", "2").stdin(OwnedFd::from(listener));
    let mut client = Client::connect(address); // before the start, as with a service manager
    client.send(request("/key/32"));
    let mut daemon = Daemon::run(directory, command);
    client.response();
    std::thread::sleep(Duration::from_secs(3)); // an open connection keeps the daemon running
    assert!(daemon.is_running());
    drop(client);
    assert_eq!(daemon.wait(), 0);
    assert!(daemon.log().contains("idle"));
}

#[test]
fn a_daemon_that_bound_its_socket_never_exits_when_idle() {
    let mut daemon = Daemon::start(&[("EXIT_IDLE", "1")]);
    std::thread::sleep(Duration::from_secs(3));
    assert!(daemon.is_running());
}

#[test]
fn a_failed_start_reports_the_reason_to_the_service_manager() {
    let occupied = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = occupied.local_addr().unwrap().port().to_string();
    for (arguments, code, reason) in [
        (["--max-size", "1k", "--log-level", "loud"], 78, "max-size: expected"),
        (["--host", "127.0.0.1", "--srv-port", &port], 1, "can't listen on 127.0.0.1:"),
    ] {
        let directory = TempDirectory::new();
        let (manager, notify) = common::Manager::new(&directory);
        let mut command = common::key_service(&directory);
        command.args(arguments).env("NOTIFY_SOCKET", notify);
        command.arg("--config").arg(directory.write("config.toml", "metrics-port = 0\n"));
        assert_eq!(common::run_to_end(command).status.code(), Some(code));
        let [status] = &manager.message()[..] else { panic!("one line") };
        assert!(status.starts_with("STATUS=") && status.contains(reason), "{status}");
    }
}

#[test]
fn core_dumps_are_forbidden() {
    let daemon = Daemon::start(&[]);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["1", "1"]);
}

#[test]
fn the_health_subcommand_queries_the_running_service() {
    let daemon = Daemon::start(&[("DRAIN_DELAY", "3600")]);
    let query = |path: &str| {
        let directory = TempDirectory::new();
        let mut command = common::key_service(&directory);
        command.args(["health", "--url", &format!("http://{}{path}", daemon.keys())]);
        common::run_to_end(command)
    };
    common::unless_stalled(|| {
        let healthy = query("");
        assert_eq!((healthy.status.code(), &*healthy.stdout), (Some(0), b"OK\n".as_slice()));
    });
    daemon.signal("TERM");
    daemon.manager.wait_for("STOPPING=1");
    common::unless_stalled(|| {
        let not_ready = query("/readyz");
        assert_eq!(not_ready.status.code(), Some(1));
        assert!(String::from_utf8(not_ready.stderr).unwrap().contains("503"));
    });
}
