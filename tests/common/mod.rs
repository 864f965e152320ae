//! A daemon that belongs to the test, and a client that sees every byte.
//!
//! No test sleeps until the daemon is ready: the daemon sends READY and its addresses to the test's notify socket.

#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    missing_docs,
    reason = "each test file uses a part of this"
)]

pub mod credential;
pub mod formats;
pub mod process;
pub mod tls;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use tempfile::TempDir;

pub use process::{Process, binary, run_to_end};

/// Whether the tests run under `just slow`, where the daemon's socket writes are delayed or short.
pub const IS_SLOW: bool = option_env!("SLOW").is_some();

/// Far longer than any operation of these tests takes, so that only a hang exceeds it.
pub const TIMEOUT: Duration = Duration::from_secs(if IS_SLOW { 300 } else { 30 });

/// A directory that is deleted at the end of the test.
pub struct TempDirectory(TempDir);

impl TempDirectory {
    pub fn new() -> Self {
        Self(TempDir::with_prefix("key-service-").unwrap())
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file that only its owner may write to, whatever the umask is.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        write(self.file(name), text, 0o644)
    }

    /// Writes a file that only its owner may read.
    pub fn write_secret(&self, name: &str, text: &str) -> PathBuf {
        write_secret(self.file(name), text)
    }
}

/// Writes a file that only its owner may read.
pub fn write_secret(path: impl Into<PathBuf>, text: &str) -> PathBuf {
    write(path.into(), text, 0o600)
}

/// Writes a file and renames it into place: a daemon never reads part of a file.
fn write(path: PathBuf, text: &str, mode: u32) -> PathBuf {
    let mut new = path.clone().into_os_string();
    new.push(".new");
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(mode).open(&new).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    std::fs::rename(new, &path).unwrap();
    path
}

/// A command of the daemon's binary, without the environment variables that the daemon would read.
pub fn key_service(directory: &TempDirectory) -> Command {
    let mut command = process::daemon();
    clear_environment(&mut command, directory);
    command
}

/// Removes the variables that the daemon would read from a command's environment, and creates an empty config.toml in
/// `directory` if there is none.
pub fn clear_environment(command: &mut Command, directory: &TempDirectory) {
    for (name, _) in std::env::vars() {
        let is_ours = ["KEYSERVICE_", "LISTEN_", "WATCHDOG_"].iter().any(|prefix| name.starts_with(prefix));
        if is_ours || name == "NOTIFY_SOCKET" || name == "JOURNAL_STREAM" {
            command.env_remove(name);
        }
    }
    if !directory.file("config.toml").exists() {
        directory.write("config.toml", "");
    }
}

/// The service manager's end of the notify socket.
pub struct Manager(UnixDatagram);

impl Manager {
    pub fn new(directory: &TempDirectory) -> (Self, PathBuf) {
        let path = directory.file("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        (Self(socket), path)
    }

    /// Receives the next message, and returns its lines.
    pub fn message(&self) -> Vec<String> {
        let mut buffer = [0; 4096];
        let length = self.0.recv(&mut buffer).expect("a message to the service manager");
        String::from_utf8(buffer[..length].to_vec()).unwrap().lines().map(String::from).collect()
    }

    /// Receives messages until one has a line that starts with `start`.
    pub fn wait_for(&self, start: &str) -> Vec<String> {
        let since = Instant::now();
        while since.elapsed() < TIMEOUT {
            let message = self.message();
            if message.iter().any(|line| line.starts_with(start)) {
                return message;
            }
        }
        panic!("the daemon never sent {start} to the service manager");
    }
}

/// A running daemon. Dropping it kills it.
pub struct Daemon {
    process: Process,
    pub manager: Manager,
    pub directory: TempDirectory,
    pub status: String,
    stderr: File,
}

impl Daemon {
    /// Starts the daemon on free loopback ports. Settings are passed as environment variables: `MAX_SIZE` sets
    /// `KEYSERVICE_MAX_SIZE`.
    pub fn start(settings: &[(&str, &str)]) -> Self {
        Self::start_with(TempDirectory::new(), |command| {
            command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
            for (name, value) in settings {
                command.env(format!("KEYSERVICE_{name}"), value);
            }
        })
    }

    /// Starts the daemon with the directory's config.toml and the arguments and variables that `prepare` adds.
    pub fn start_with(directory: TempDirectory, prepare: impl FnOnce(&mut Command)) -> Self {
        let mut command = key_service(&directory);
        command.arg("--config").arg(directory.file("config.toml"));
        prepare(&mut command);
        Self::run(directory, command)
    }

    /// Runs `command` until it sends READY. Standard error goes to a file in memory: at its exit, the daemon waits for a
    /// second at most until its log is written, which a busy disk may exceed.
    pub fn run(directory: TempDirectory, mut command: Command) -> Self {
        let stderr = memory_file();
        command.stderr(stderr.try_clone().unwrap());
        Self::spawn(directory, command, stderr)
    }

    /// Like [`Daemon::start_with`], but standard error goes to `stderr`.
    pub fn start_with_stderr(
        directory: TempDirectory,
        stderr: impl Into<Stdio>,
        prepare: impl FnOnce(&mut Command),
    ) -> Self {
        let mut command = key_service(&directory);
        command.arg("--config").arg(directory.file("config.toml"));
        prepare(&mut command);
        command.stderr(stderr);
        Self::spawn(directory, command, memory_file())
    }

    fn spawn(directory: TempDirectory, mut command: Command, stderr: File) -> Self {
        let (manager, notify) = Manager::new(&directory);
        command.env("NOTIFY_SOCKET", notify);
        let mut process = Process::spawn(command);
        manager.0.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let since = Instant::now();
        let status = loop {
            let mut buffer = [0; 4096];
            if let Ok(length) = manager.0.recv(&mut buffer) {
                let text = String::from_utf8(buffer[..length].to_vec()).unwrap();
                assert!(text.contains("READY=1"), "first message: {text}");
                break text.lines().find_map(|line| line.strip_prefix("STATUS=")).unwrap().to_owned();
            }
            if let Some(status) = process.try_wait() {
                panic!("the daemon exited with {status} before READY:\n{}", read(&stderr));
            }
            assert!(since.elapsed() < TIMEOUT, "the daemon sent no READY:\n{}", read(&stderr));
        };
        manager.0.set_read_timeout(Some(TIMEOUT)).unwrap();
        Self { process, manager, directory, status, stderr }
    }

    /// The first address on which keys are served.
    pub fn keys(&self) -> SocketAddr {
        address(&self.status, "Keys on ")
    }

    /// The address on which metrics are served.
    pub fn metrics(&self) -> SocketAddr {
        address(&self.status, "metrics on ")
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub fn signal(&self, name: &str) {
        self.process.signal(name);
    }

    /// What the daemon has written to stderr so far.
    pub fn log(&self) -> String {
        read(&self.stderr)
    }

    /// Waits until the log has `text`.
    pub fn wait_for_log(&self, text: &str) {
        let what = format!("{text:?} in the log");
        until(&what, || self.log().contains(text).then_some(()));
    }

    /// Waits for the daemon to exit, and returns its exit status.
    pub fn wait(&mut self) -> i32 {
        let status = self.process.wait();
        status.code().unwrap_or_else(|| panic!("{status}\n{}", self.log()))
    }

    pub fn is_running(&mut self) -> bool {
        self.process.try_wait().is_none()
    }

    pub fn get(&self, path: &str) -> Response {
        get(self.keys(), path)
    }

    /// The value of a series, given by its name and labels as /metrics writes them.
    pub fn metric(&self, series: &str) -> f64 {
        metric(&get(self.metrics(), "/metrics").text(), series)
    }

    /// Waits until a series has `value`: the daemon counts some events after the client has seen them.
    pub fn wait_for_metric(&self, series: &str, value: f64) {
        let what = format!("{series} to be {value}");
        until(&what, || (self.metric(series) == value).then_some(()));
    }
}

fn memory_file() -> File {
    memfd_create("stderr", MemfdFlags::CLOEXEC).unwrap().into()
}

/// Reads an open file from its beginning, without moving the offset at which the daemon writes.
fn read(file: &File) -> String {
    std::fs::read_to_string(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}

fn address(status: &str, after: &str) -> SocketAddr {
    let (_, rest) = status.split_once(after).unwrap_or_else(|| panic!("no {after:?} in {status:?}"));
    rest.split([';', ',']).next().unwrap().parse().unwrap_or_else(|_| panic!("no address in {status:?}"))
}

pub fn metric(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().unwrap()
}

/// Polls until `poll` returns a result; panics after [`TIMEOUT`].
pub fn until<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let since = Instant::now();
    loop {
        if let Some(result) = poll() {
            return result;
        }
        assert!(since.elapsed() < TIMEOUT, "timed out while waiting for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Calls `attempt` again, at most twice, if it panics and took long. The daemon closes some connections if their client
/// sends nothing for a second, and `key-service health` waits for two: on a machine that stopped the client or the
/// daemon for so long, a failure proves nothing.
pub fn unless_stalled<T>(attempt: impl Fn() -> T) -> T {
    for _ in 0..2 {
        let begin = Instant::now();
        match catch_unwind(AssertUnwindSafe(&attempt)) {
            Ok(result) => return result,
            Err(panic) if begin.elapsed() < Duration::from_millis(800) => resume_unwind(panic),
            Err(_) => eprintln!("trying again: this took {:?}", begin.elapsed()),
        }
    }
    attempt()
}

/// A connection that sends and receives raw bytes.
pub struct Client<S = TcpStream> {
    pub stream: S,
    buffer: Vec<u8>,
}

impl Client {
    pub fn connect(address: SocketAddr) -> Self {
        Self::from_tcp(TcpStream::connect(address).unwrap())
    }

    /// Uses an open TCP connection.
    pub fn from_tcp(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self::new(stream)
    }
}

impl<S: Read + Write> Client<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.stream.write_all(bytes.as_ref()).unwrap();
        self
    }

    /// Reads the next response to a GET.
    pub fn response(&mut self) -> Response {
        self.read_response(true).expect("a response before the connection is closed")
    }

    /// Reads the next response to a HEAD.
    pub fn head_response(&mut self) -> Response {
        self.read_response(false).expect("a response before the connection is closed")
    }

    /// Reads the next response, or returns `None` if the connection is closed before the response is complete.
    pub fn read_response(&mut self, has_body: bool) -> Option<Response> {
        let end = loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                break end + 4;
            }
            self.fill()?;
        };
        let headers = String::from_utf8(self.buffer[..end].to_vec()).expect("headers are UTF-8");
        let mut response = Response::parse(&headers);
        let length: usize = response.header("content-length").map_or(0, |text| text.parse().unwrap());
        let length = if has_body { length } else { 0 };
        while self.buffer.len() < end + length {
            self.fill()?;
        }
        response.body = self.buffer[end..end + length].to_vec();
        self.buffer.drain(..end + length);
        Some(response)
    }

    /// Whether the server has closed the connection without another byte.
    pub fn is_closed(&mut self) -> bool {
        self.buffer.is_empty() && self.fill().is_none()
    }

    fn fill(&mut self) -> Option<()> {
        let mut bytes = [0; 64 * 1024];
        match self.stream.read(&mut bytes) {
            Ok(0) => None,
            Ok(read) => {
                self.buffer.extend_from_slice(&bytes[..read]);
                Some(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
            // Suspending and resuming the machine interrupts a read that has a timeout (signal(7)).
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => self.fill(),
            Err(error) => panic!("failed to read: {error}"),
        }
    }
}

#[derive(Debug, Clone)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    fn parse(headers: &str) -> Self {
        let mut lines = headers.trim_end().split("\r\n");
        let status = lines.next().unwrap();
        assert!(status.starts_with("HTTP/1."), "{status}");
        let status = status.split(' ').nth(1).unwrap().parse().unwrap();
        let header = |line: &str| {
            let (name, value) = line.split_once(':').unwrap();
            (name.to_ascii_lowercase(), value.trim().to_owned())
        };
        Self { status, headers: lines.map(header).collect(), body: Vec::new() }
    }

    /// The value of a header. Panics if the header is repeated.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values =
            self.headers.iter().filter(|(found, _)| found == name).map(|(_, value)| value.as_str());
        let value = values.next();
        assert!(values.next().is_none(), "{name} is repeated");
        value
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("a text body")
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {:?}", self.text()))
    }

    /// The `detail` of a problem document. Checks the members that every problem document must have.
    pub fn problem(&self) -> String {
        assert_eq!(self.header("content-type"), Some("application/problem+json"));
        let json = self.json();
        assert_eq!(json["status"], self.status);
        assert!(json["title"].is_string());
        json["detail"].as_str().unwrap().to_owned()
    }
}

/// Sends one GET on a new connection.
pub fn get(address: SocketAddr, path: &str) -> Response {
    exchange(address, request(path))
}

/// Sends one request on a new connection.
pub fn exchange(address: SocketAddr, bytes: impl AsRef<[u8]>) -> Response {
    Client::connect(address).send(bytes).response()
}

/// Reserves a port that the daemon binds itself. The returned socket is bound and never listens: while it is open, the
/// kernel assigns the port to no other process. The daemon can bind it too, because both sockets set `SO_REUSEADDR`.
pub fn held_port() -> (socket2::Socket, u16) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let port = socket.local_addr().unwrap().as_socket().unwrap().port();
    (socket, port)
}

/// Whether this host has IPv6; some containers and kernels have none.
pub fn has_ipv6() -> bool {
    TcpListener::bind("[::1]:0").is_ok()
}

/// A well-formed GET.
pub fn request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")
}

/// Connects from `source`, an address of this host.
pub fn connect_from(source: &str, to: SocketAddr) -> TcpStream {
    let source: SocketAddr = format!("{source}:0").parse().unwrap();
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&source.into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket.into()
}

pub fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// Connects with a receive buffer so small that the server can send little more than the client has read.
pub fn connect_with_small_buffer(to: SocketAddr) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.into()
}

/// Requests all `paths`, separated by spaces, in one write, and reads the responses at 10 kB/s. An error reports how
/// many bytes arrived, and which response is incomplete.
///
/// A client that the machine stopped meanwhile has read too slowly for the timeouts, and tries again.
pub fn read_slowly<S: Read + Write>(connect: impl Fn() -> S, paths: &str) -> Result<(), String> {
    let attempt = || {
        let mut longest_step = Duration::ZERO;
        let result = read_slowly_once(connect(), paths, &mut longest_step);
        (result, longest_step)
    };
    for _ in 0..2 {
        let (result, longest_step) = attempt();
        if result.is_ok() || longest_step < Duration::from_secs(1) {
            return result;
        }
    }
    attempt().0
}

fn read_slowly_once(
    mut stream: impl Read + Write,
    paths: &str,
    longest_step: &mut Duration,
) -> Result<(), String> {
    let mut step = Instant::now();
    let mut requests: Vec<_> = paths.split_whitespace().map(request).collect();
    let count = requests.len();
    let last = requests[count - 1].replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n");
    requests[count - 1] = last;
    // A client that is stopped in its TLS handshake finds the connection closed here.
    let sent = stream.write_all(requests.concat().as_bytes()).and_then(|()| stream.flush());
    *longest_step = step.elapsed();
    sent.map_err(|error| error.to_string())?;
    let (mut received, mut chunk) = (Vec::new(), [0; 500]);
    let result = loop {
        match stream.read(&mut chunk) {
            Ok(0) => break Ok(()),
            Ok(read) => received.extend_from_slice(&chunk[..read]),
            Err(error) => break Err(error),
        }
        std::thread::sleep(Duration::from_millis(50));
        *longest_step = step.elapsed().max(*longest_step);
        step = Instant::now();
    };
    *longest_step = step.elapsed().max(*longest_step);
    let mut rest = &received[..];
    for number in 0..count {
        let after = find(rest, b"\r\n\r\n").and_then(|end| {
            let response = Response::parse(std::str::from_utf8(&rest[..end]).unwrap());
            let length: usize = response.header("content-length")?.parse().ok()?;
            rest.get(end + 4 + length..)
        });
        rest = after.ok_or_else(|| {
            format!("{} bytes received, response {number} is incomplete: {result:?}", received.len())
        })?;
    }
    if rest.is_empty() { Ok(()) } else { Err(format!("{} bytes more than expected", rest.len())) }
}
