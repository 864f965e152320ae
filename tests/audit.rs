//! The audit log: one record for each key, if `audit` is enabled.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use common::{Client, Daemon, TempDirectory, exchange, request, until};
use socket2::{Domain, Socket, Type};

/// The audit records so far.
fn records(daemon: &Daemon) -> Vec<String> {
    daemon.log().lines().filter(|line| line.contains("key issued")).map(str::to_owned).collect()
}

fn wait_for_records(daemon: &Daemon, count: usize) -> Vec<String> {
    until("the records", || Some(records(daemon)).filter(|records| records.len() >= count))
}

#[test]
fn without_audit_there_is_no_record_and_no_request_id() {
    let daemon = Daemon::start(&[("LOG_LEVEL", "trace")]);
    assert_eq!(daemon.get("/key/32").header("x-request-id"), None);
    assert!(records(&daemon).is_empty());
}

#[test]
fn each_key_has_one_record_at_every_log_level() {
    for level in ["off", "error", "info", "trace"] {
        let daemon =
            Daemon::start(&[("AUDIT", "true"), ("LOG_LEVEL", level), ("TRUSTED_PROXIES", "127.0.0.1")]);
        let key = daemon.get("/key/48");
        let id = key.header("x-request-id").unwrap();
        assert!(id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
        let sent =
            "GET /key/16 HTTP/1.1\r\nHost: a\r\nX-Request-Id: mine\r\nX-Forwarded-For: 192.0.2.7\r\n\r\n";
        let second = exchange(daemon.keys(), sent);
        assert_ne!(second.header("x-request-id"), Some("mine"), "a client's own request ID is not used");
        // None of these requests gets a key.
        assert_eq!(daemon.get("/key/0").header("x-request-id"), None);
        Client::connect(daemon.keys()).send(request("/key/8").replace("GET", "HEAD")).head_response();
        daemon.get("/health");
        assert_eq!(daemon.get("/key/24").status, 200);
        let records = wait_for_records(&daemon, 3);
        assert_eq!(records.len(), 3, "{records:?}");
        let record = |response: &common::Response| {
            let id = format!("request_id={}", response.header("x-request-id").unwrap());
            records
                .iter()
                .find(|record| record.contains(&id))
                .unwrap_or_else(|| panic!("no {id}: {records:?}"))
        };
        let first = record(&key);
        for part in ["INFO", "address=127.0.0.1", "length=48", "format=raw", "sent=48", "outcome=complete"] {
            assert!(first.contains(part), "{part}: {first}");
        }
        let second = record(&second);
        assert!(second.contains("address=192.0.2.7 proxy=127.0.0.1"), "{second}");
        let hex: String = key.body.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(!daemon.log().contains(&hex[..12]));
        // The log level applies to other events.
        if ["info", "trace"].contains(&level) {
            daemon.wait_for_log("Keys on");
        } else {
            assert!(!daemon.log().contains("Keys on"));
        }
        assert_eq!(daemon.metric("audit_records_dropped_total"), 0.0);
    }
}

#[test]
fn an_interrupted_key_is_recorded_as_aborted() {
    let daemon = Daemon::start(&[("AUDIT", "true"), ("MAX_SIZE", "1073741824")]);
    let mut stream = TcpStream::connect(daemon.keys()).unwrap();
    stream.write_all(request("/key/1073741824").as_bytes()).unwrap();
    stream.read_exact(&mut [0; 100_000]).unwrap();
    drop(stream);
    assert!(wait_for_records(&daemon, 1)[0].contains("outcome=aborted"));
    assert_eq!(daemon.get("/key/300000").body.len(), 300_000);
    let record = wait_for_records(&daemon, 2).remove(1);
    assert!(record.contains("length=300000") && record.contains("sent=300000 outcome=complete"), "{record}");
}

/// Reads the headers of a response, and returns its request ID.
fn request_id(stream: &mut TcpStream) -> String {
    let mut headers = Vec::new();
    while common::find(&headers, b"\r\n\r\n").is_none() {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        headers.push(byte[0]);
    }
    let headers = String::from_utf8(headers).unwrap().to_ascii_lowercase();
    let (_, id) = headers.split_once("x-request-id: ").unwrap();
    id.split("\r\n").next().unwrap().to_owned()
}

#[test]
fn a_streamed_key_has_a_record_before_a_crash() {
    let mut daemon = Daemon::start(&[("AUDIT", "true"), ("MAX_SIZE", "1073741824"), ("LOG_LEVEL", "off")]);
    let mut stream = TcpStream::connect(daemon.keys()).unwrap();
    stream.write_all(request("/key/1073741824").as_bytes()).unwrap();
    let id = request_id(&mut stream);
    daemon.wait_for_log(&id);
    daemon.signal("KILL");
    until("the daemon to be killed", || (!daemon.is_running()).then_some(()));
    let log = daemon.log();
    assert_eq!(log.lines().count(), 1, "{log}");
    for part in ["key stream started", &id, "length=1073741824", "sent=0 outcome=started"] {
        assert!(log.contains(part), "{part}: {log}");
    }
}

#[test]
fn every_stream_aborted_by_shutdown_has_a_record() {
    const STREAMS: usize = 1500; // more than the log queue holds
    let mut daemon = Daemon::start(&[
        ("AUDIT", "true"),
        ("MAX_SIZE", "1073741824"),
        ("MAX_BULK_STREAMS", "8000"),
        ("MAX_CONNECTIONS_PER_CLIENT", "0"),
        ("DRAIN_TIMEOUT", "1"),
        ("WRITE_TIMEOUT", "3600"), // nothing but the shutdown ends a stream, however long it takes to start them all
    ]);
    let connect = || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(4096).unwrap(); // so that 1,500 connections take little memory
        socket.connect(&daemon.keys().into()).unwrap();
        TcpStream::from(socket)
    };
    // Only headers are read: soon the oldest connections are reset so that the newest get buffers.
    let (streams, ids): (Vec<_>, Vec<_>) = (0..STREAMS)
        .map(|_| {
            let mut stream = connect();
            stream.write_all(request("/key/1073741824").as_bytes()).unwrap();
            let id = request_id(&mut stream);
            (stream, id)
        })
        .unzip();
    daemon.signal("TERM");
    assert_eq!(daemon.wait(), 0);
    let log = daemon.log();
    assert!(!log.contains("were dropped"), "{log}");
    let lines_with = |outcome: &str| log.lines().filter(|line| line.contains(outcome)).collect::<Vec<_>>();
    let (started, aborted) = (lines_with("outcome=started"), lines_with("outcome=aborted"));
    assert_eq!((started.len(), aborted.len()), (STREAMS, STREAMS));
    for id in &ids {
        assert!(started.iter().any(|line| line.contains(id)), "no start record for {id}");
        let end =
            aborted.iter().find(|line| line.contains(id)).unwrap_or_else(|| panic!("no end record for {id}"));
        assert!(end.contains("key issued") && !end.contains("sent=0 "), "{end}");
    }
    for mut stream in streams {
        let end = std::io::copy(&mut stream, &mut std::io::sink());
        assert_eq!(
            end.map_err(|error| error.kind()),
            Err(ErrorKind::ConnectionReset),
            "the response is cut short by a reset"
        );
    }
}

#[test]
fn a_unix_socket_client_is_recorded_by_user_and_process() {
    let directory = TempDirectory::new();
    let socket = directory.file("socket");
    let daemon = Daemon::start_with(directory, |command| {
        command.env("KEYSERVICE_HOST", format!("unix:{}", socket.display())).env("KEYSERVICE_AUDIT", "true");
        command.args(["--metrics-port", "0"]);
    });
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.write_all(b"GET /key/32 HTTP/1.0\r\n\r\n").unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap();
    let record = wait_for_records(&daemon, 1).remove(0);
    let pid = format!("peer_pid={}", std::process::id());
    let uid = format!("peer_uid={}", rustix::process::geteuid().as_raw());
    assert!(record.contains(&pid) && record.contains(&uid) && !record.contains("address="), "{record}");
}

#[test]
fn an_unread_log_stalls_no_key_and_lost_records_are_counted() {
    let (reader, writer) = std::io::pipe().unwrap();
    let daemon = Daemon::start_with_stderr(TempDirectory::new(), writer, |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
        command.env("KEYSERVICE_AUDIT", "true").env("KEYSERVICE_LOG_LEVEL", "error");
    });
    let mut client = Client::connect(daemon.keys());
    for _ in 0..5000 {
        assert_eq!(client.send(request("/key/16")).response().status, 200);
    }
    let lost = daemon.metric("audit_records_dropped_total");
    assert!(lost > 1000.0, "{lost}: the queue and the pipe hold fewer than 4,000 records");
    assert_eq!(daemon.metric("log_events_dropped_total"), 0.0, "audit records have a counter of their own");
    eprintln!("5,000 keys with an unread log: {lost} records dropped, no key delayed");
    drop(reader);
}

/// A daemon that writes only audit records to `stderr`.
fn daemon_with_stderr(stderr: impl Into<OwnedFd>) -> Daemon {
    Daemon::start_with_stderr(TempDirectory::new(), stderr.into(), |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
        command.env("KEYSERVICE_AUDIT", "true").env("KEYSERVICE_LOG_LEVEL", "off");
    })
}

fn issue(daemon: &Daemon, count: u32) {
    let mut client = Client::connect(daemon.keys());
    for _ in 0..count {
        assert_eq!(client.send(request("/key/16")).response().status, 200);
    }
}

#[test]
fn records_that_stderr_refuses_are_counted() {
    let (reader, broken_pipe) = std::io::pipe().unwrap();
    drop(reader);
    let full_disk = File::options().write(true).open("/dev/full").unwrap();
    for stderr in [OwnedFd::from(broken_pipe), full_disk.into()] {
        let daemon = daemon_with_stderr(stderr);
        issue(&daemon, 1500); // more than the log queue holds
        daemon.wait_for_metric("audit_records_dropped_total", 1500.0);
        let errors = daemon.metric("log_write_errors_total");
        assert!(
            errors >= 1024.0,
            "{errors}: after the first error, at least the records in the queue are still tried"
        );
        assert_eq!(daemon.metric("log_events_dropped_total"), 0.0);
    }
}

#[test]
fn a_full_stderr_drops_and_counts_records_until_it_is_read() {
    let (reader, writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    let daemon = daemon_with_stderr(writer);
    issue(&daemon, 2000); // more than the pipe holds
    until("a failed write", || (daemon.metric("log_write_errors_total") > 0.0).then_some(()));
    let lines = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&lines);
    let reader_thread = std::thread::spawn(move || {
        for line in BufReader::new(reader).lines() {
            assert!(line.unwrap().contains("key issued"));
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    let written = || f64::from(lines.load(Ordering::Relaxed));
    let wait_until_all_counted = |keys| {
        until("each record to be written or dropped", || {
            (daemon.metric("audit_records_dropped_total") + written() == keys).then_some(())
        });
    };
    wait_until_all_counted(2000.0);
    let before = written();
    issue(&daemon, 10);
    wait_until_all_counted(2010.0);
    assert!(written() > before, "records are written again");
    drop(daemon);
    reader_thread.join().unwrap();
}
