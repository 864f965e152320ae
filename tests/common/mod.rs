//! A daemon of the test's own, and a client that sees every byte.
//!
//! Nothing waits by the clock: the daemon says READY through a notify socket of the test's, with its addresses.

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

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

pub use process::{Process, binary, run_to_end};

/// Whether each write of the daemon takes 30 ms, or many small ones: under `just slow`.
pub const IS_SLOW: bool = option_env!("SLOW").is_some();

/// Far longer than anything here takes; only a hang meets it.
pub const TIMEOUT: Duration = Duration::from_secs(if IS_SLOW { 300 } else { 30 });

/// A directory that is gone with the test.
pub struct TempDirectory(TempDir);

impl TempDirectory {
    pub fn new() -> Self {
        Self(TempDir::with_prefix("key-service-").unwrap())
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Only its owner may write to the file, whatever the umask is.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let mut options = std::fs::OpenOptions::new();
        let mut file =
            options.write(true).create(true).truncate(true).mode(0o644).open(self.file(name)).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        self.file(name)
    }
}

/// The binary, in an environment that says nothing to it, with no configuration file of the host's.
pub fn key_service(directory: &TempDirectory) -> Command {
    let mut command = process::daemon();
    scrub(&mut command, directory);
    command
}

/// Takes out of a command's environment whatever would reach the daemon.
pub fn scrub(command: &mut Command, directory: &TempDirectory) {
    for (name, _) in std::env::vars() {
        let is_ours = ["KEYSERVICE_", "LISTEN_", "WATCHDOG_"].iter().any(|prefix| name.starts_with(prefix));
        if is_ours || name == "NOTIFY_SOCKET" || name == "JOURNAL_STREAM" {
            command.env_remove(name);
        }
    }
    let config = directory.file("config.toml");
    if !config.exists() {
        directory.write("config.toml", "");
    }
    command.env("TEST_CONFIG", config);
}

/// What the service manager would be told.
pub struct Manager(UnixDatagram);

impl Manager {
    pub fn new(directory: &TempDirectory) -> (Self, PathBuf) {
        let path = directory.file("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        (Self(socket), path)
    }

    /// The next message, as its lines.
    pub fn message(&self) -> Vec<String> {
        let mut buffer = [0; 4096];
        let length = self.0.recv(&mut buffer).expect("a message to the service manager");
        String::from_utf8(buffer[..length].to_vec()).unwrap().lines().map(String::from).collect()
    }

    /// The first message with a line that starts so; others are passed over.
    pub fn wait_for(&self, start: &str) -> Vec<String> {
        let since = Instant::now();
        while since.elapsed() < TIMEOUT {
            let message = self.message();
            if message.iter().any(|line| line.starts_with(start)) {
                return message;
            }
        }
        panic!("the service manager was never told {start}");
    }
}

/// A running daemon. It is killed when the test is done with it.
pub struct Daemon {
    process: Process,
    pub manager: Manager,
    pub directory: TempDirectory,
    pub status: String,
    stderr: PathBuf,
}

impl Daemon {
    /// On free ports of loopback, with settings as environment variables (`MAX_SIZE` for `KEYSERVICE_MAX_SIZE`).
    pub fn start(settings: &[(&str, &str)]) -> Self {
        Self::start_with(TempDirectory::new(), |command| {
            command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
            for (name, value) in settings {
                command.env(format!("KEYSERVICE_{name}"), value);
            }
        })
    }

    /// With `--config` to the directory's config.toml, and whatever `prepare` adds.
    pub fn start_with(directory: TempDirectory, prepare: impl FnOnce(&mut Command)) -> Self {
        let mut command = key_service(&directory);
        command.arg("--config").arg(directory.file("config.toml"));
        prepare(&mut command);
        Self::run(directory, command)
    }

    /// Whatever `command` becomes; it has to say READY.
    pub fn run(directory: TempDirectory, mut command: Command) -> Self {
        command.stderr(std::fs::File::create(directory.file("stderr")).unwrap());
        Self::spawn(directory, command)
    }

    /// As [`Daemon::start_with`], with a standard error of the test's.
    pub fn start_with_stderr(
        directory: TempDirectory,
        stderr: impl Into<Stdio>,
        prepare: impl FnOnce(&mut Command),
    ) -> Self {
        let mut command = key_service(&directory);
        command.arg("--config").arg(directory.file("config.toml"));
        prepare(&mut command);
        command.stderr(stderr);
        directory.write("stderr", "");
        Self::spawn(directory, command)
    }

    fn spawn(directory: TempDirectory, mut command: Command) -> Self {
        let (manager, notify) = Manager::new(&directory);
        let stderr = directory.file("stderr");
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
            let log = || std::fs::read_to_string(&stderr).unwrap();
            if let Some(ended) = process.try_wait() {
                panic!("the daemon ended with {ended} instead of getting ready:\n{}", log());
            }
            assert!(since.elapsed() < TIMEOUT, "the daemon does not get ready:\n{}", log());
        };
        manager.0.set_read_timeout(Some(TIMEOUT)).unwrap();
        Self { process, manager, directory, status, stderr }
    }

    /// Where keys are served (the first address).
    pub fn keys(&self) -> SocketAddr {
        address(&self.status, "Keys on ")
    }

    /// Where metrics are served.
    pub fn metrics(&self) -> SocketAddr {
        address(&self.status, "metrics on ")
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub fn signal(&self, name: &str) {
        self.process.signal(name);
    }

    /// What the daemon wrote to stderr so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap()
    }

    /// Waits until the log has `text`.
    pub fn wait_for_log(&self, text: &str) {
        let what = format!("{text:?} in the log");
        until(&what, || self.log().contains(text).then_some(()));
    }

    /// The daemon's exit status, once it has ended.
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

    /// The value of a series, by its name and labels as they are written.
    pub fn metric(&self, series: &str) -> f64 {
        metric(&get(self.metrics(), "/metrics").text(), series)
    }

    /// Waits until a series has `value`: some things are counted after the client has seen them.
    pub fn wait_for_metric(&self, series: &str, value: f64) {
        let what = format!("{series} to be {value}");
        until(&what, || (self.metric(series) == value).then_some(()));
    }
}

fn address(status: &str, after: &str) -> SocketAddr {
    let (_, rest) = status.split_once(after).unwrap_or_else(|| panic!("no {after:?} in {status:?}"));
    rest.split([';', ',']).next().unwrap().parse().unwrap_or_else(|_| panic!("no address in {status:?}"))
}

pub fn metric(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().unwrap()
}

/// Polls for what another process brings about.
pub fn until<T>(what: &str, mut happens: impl FnMut() -> Option<T>) -> T {
    let since = Instant::now();
    loop {
        if let Some(result) = happens() {
            return result;
        }
        assert!(since.elapsed() < TIMEOUT, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A connection that sends and receives raw bytes.
pub struct Client<S = TcpStream> {
    pub stream: S,
    buffer: Vec<u8>,
}

impl Client {
    pub fn connect(address: SocketAddr) -> Self {
        Self::on(TcpStream::connect(address).unwrap())
    }

    /// On a connection that is there.
    pub fn on(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self::over(stream)
    }
}

impl<S: Read + Write> Client<S> {
    pub fn over(stream: S) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.stream.write_all(bytes.as_ref()).unwrap();
        self
    }

    /// The next response to a GET.
    pub fn response(&mut self) -> Response {
        self.read_response(true).expect("a response before the end of the connection")
    }

    /// The next response to a HEAD.
    pub fn head_response(&mut self) -> Response {
        self.read_response(false).expect("a response before the end of the connection")
    }

    /// `None` where the connection ends before a whole one.
    pub fn read_response(&mut self, has_body: bool) -> Option<Response> {
        let end = loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                break end + 4;
            }
            self.fill()?;
        };
        let head = String::from_utf8(self.buffer[..end].to_vec()).expect("a head is text");
        let mut response = Response::parse(&head);
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
            // A machine that is suspended and goes on interrupts a read that has a timeout (signal(7)).
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => self.fill(),
            Err(error) => panic!("reading failed: {error}"),
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
    fn parse(head: &str) -> Self {
        let mut lines = head.trim_end().split("\r\n");
        let status = lines.next().unwrap();
        assert!(status.starts_with("HTTP/1."), "{status}");
        let status = status.split(' ').nth(1).unwrap().parse().unwrap();
        let header = |line: &str| {
            let (name, value) = line.split_once(':').unwrap();
            (name.to_ascii_lowercase(), value.trim().to_owned())
        };
        Self { status, headers: lines.map(header).collect(), body: Vec::new() }
    }

    /// The value of a field; a field that is there twice is a failure.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values =
            self.headers.iter().filter(|(found, _)| found == name).map(|(_, value)| value.as_str());
        let value = values.next();
        assert!(values.next().is_none(), "{name} is there twice");
        value
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("a text body")
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {:?}", self.text()))
    }

    /// The `detail` of a problem document, after a look at what every problem must have.
    pub fn problem(&self) -> String {
        assert_eq!(self.header("content-type"), Some("application/problem+json"));
        let json = self.json();
        assert_eq!(json["status"], self.status);
        assert!(json["title"].is_string());
        json["detail"].as_str().unwrap().to_owned()
    }
}

/// One GET on a connection of its own.
pub fn get(address: SocketAddr, path: &str) -> Response {
    exchange(address, request(path))
}

/// One exchange on a connection of its own.
pub fn exchange(address: SocketAddr, bytes: impl AsRef<[u8]>) -> Response {
    Client::connect(address).send(bytes).response()
}

/// A port for a server that binds it by itself. The socket is bound and never listens: as long as it is there, no other
/// process gets the port, and no client gets it as its own. The daemon may bind it too, since both set `SO_REUSEADDR`.
pub fn held_port() -> (socket2::Socket, u16) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let port = socket.local_addr().unwrap().as_socket().unwrap().port();
    (socket, port)
}

/// Whether this host has IPv6: some containers and kernels have none.
pub fn has_ipv6() -> bool {
    TcpListener::bind("[::1]:0").is_ok()
}

/// A well-formed GET.
pub fn request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")
}

/// A connection from an address of this host's.
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

/// A connection whose kernel takes little more than its client has read.
pub fn slow(to: SocketAddr) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.into()
}

/// Asks for `paths`, separated by spaces, in one go, and reads 10 kB/s. An error says how much there was of what.
pub fn read_slowly(mut stream: impl Read + Write, paths: &str) -> Result<(), String> {
    let mut requests: Vec<_> = paths.split_whitespace().map(request).collect();
    let count = requests.len();
    let last = requests[count - 1].replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n");
    requests[count - 1] = last;
    stream.write_all(requests.concat().as_bytes()).unwrap();
    stream.flush().unwrap();
    let (mut received, mut piece) = (Vec::new(), [0; 500]);
    let result = loop {
        match stream.read(&mut piece) {
            Ok(0) => break Ok(()),
            Ok(read) => received.extend_from_slice(&piece[..read]),
            Err(error) => break Err(error),
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let mut rest = &received[..];
    for number in 0..count {
        let whole = find(rest, b"\r\n\r\n").and_then(|end| {
            let head = Response::parse(std::str::from_utf8(&rest[..end]).unwrap());
            let length: usize = head.header("content-length")?.parse().ok()?;
            rest.get(end + 4 + length..)
        });
        rest = whole
            .ok_or_else(|| format!("{} bytes, ends in response {number}: {result:?}", received.len()))?;
    }
    if rest.is_empty() { Ok(()) } else { Err(format!("{} bytes more than expected", rest.len())) }
}
