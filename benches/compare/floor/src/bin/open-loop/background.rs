//! Clients that are active beside the load: slow ones, one that reads a large key again and again, and a scraper.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{Result, response};

/// How often each slow client sends or reads, and how often the metrics are scraped.
const INTERVAL: Duration = Duration::from_secs(1);

/// What a slow reader requests: the largest response that is not streamed.
const SLOW_PATH: &str = "/key/16384";
/// The receive buffer of a slow reader, and how much it reads at a time: a thirtieth of the response, so that no run of
/// less than 30 s reaches its end.
const SLOW_BUFFER: usize = 2048;
const SLOW_READ: usize = 512;

/// How much of the stream is read at a time, which takes some 10 µs.
const STREAM_READ: usize = 64 * 1024;

/// The clients beside the load.
pub struct Background {
    slow: Vec<SlowClient>,
    /// When the next slow client has its turn, and how many had one.
    slow_due: Duration,
    slow_turns: usize,
    stream: Option<Exchange>,
    scrape: Option<Exchange>,
    scrape_due: Duration,
}

impl Background {
    /// Connects the clients that the arguments name.
    pub fn connect(address: SocketAddr, arguments: &[String]) -> Result<Self> {
        let mut background = Self {
            slow: Vec::new(),
            slow_due: Duration::ZERO,
            slow_turns: 0,
            stream: None,
            scrape: None,
            scrape_due: Duration::ZERO,
        };
        for argument in arguments {
            match argument.split_once('=') {
                Some(("slow", count)) => {
                    let clients = (0..count.parse()?).map(|index| SlowClient::connect(address, index));
                    background.slow = clients.collect::<Result<_>>()?;
                }
                Some(("stream", path)) => background.stream = Some(Exchange::connect(address, path)?),
                Some(("scrape", metrics)) => {
                    background.scrape = Some(Exchange::connect(metrics.parse()?, "/metrics")?);
                }
                _ => return Err(crate::USAGE.into()),
            }
        }
        Ok(background)
    }

    /// Registers those whose responses are awaited, with tokens from `first` on.
    pub fn register(&mut self, registry: &Registry, first: usize) -> Result<()> {
        for (index, exchange) in [&mut self.stream, &mut self.scrape].into_iter().enumerate() {
            if let Some(exchange) = exchange {
                registry.register(&mut exchange.connection, Token(first + index), Interest::READABLE)?;
            }
        }
        Ok(())
    }

    /// Notes that the client of this index has something to read.
    pub fn set_ready(&mut self, index: usize) {
        if let Some(exchange) = [&mut self.stream, &mut self.scrape][index] {
            exchange.is_readable = true;
        }
    }

    /// One step of each kind that is due.
    pub fn turn(&mut self, now: Duration) -> Result<()> {
        if !self.slow.is_empty() && self.slow_due <= now {
            let index = self.slow_turns % self.slow.len();
            self.slow[index].turn()?;
            self.slow_turns += 1;
            self.slow_due += INTERVAL / u32::try_from(self.slow.len())?;
        }
        if let Some(stream) = &mut self.stream {
            if stream.is_idle() {
                stream.send()?;
            }
            stream.read_some()?;
        }
        if let Some(scrape) = &mut self.scrape {
            if scrape.is_idle() && self.scrape_due <= now {
                scrape.send()?;
                self.scrape_due += INTERVAL;
            }
            scrape.read_some()?;
        }
        Ok(())
    }
}

/// The members of a JSON object that tell what the clients did.
impl fmt::Display for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let received =
            |exchange: &Option<Exchange>| exchange.as_ref().map_or(0, |exchange| exchange.received);
        let (slow, streamed, scraped) = (self.slow_turns, received(&self.stream), received(&self.scrape));
        write!(f, r#""slow turns": {slow}, "streamed": {streamed}, "scraped": {scraped}"#)
    }
}

/// A client that takes its turns slowly. Every second one never completes its request.
struct SlowClient {
    connection: std::net::TcpStream,
    /// The bytes to send one by one; empty if the client is a slow reader.
    unsent: std::vec::IntoIter<u8>,
}

impl SlowClient {
    /// Each has an address of its own, because the server limits the connections of one address.
    fn connect(server: SocketAddr, index: usize) -> Result<Self> {
        let [high, low] = u16::try_from(index)?.to_be_bytes();
        let own = SocketAddr::from((Ipv4Addr::new(127, 1, high, low), 0));
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_recv_buffer_size(SLOW_BUFFER)?;
        socket.set_tcp_nodelay(true)?;
        socket.bind(&SockAddr::from(own))?;
        socket.connect(&SockAddr::from(server))?;
        let mut connection = std::net::TcpStream::from(socket);
        let mut request = response::request(SLOW_PATH);
        if index % 2 == 1 {
            connection.write_all(request.as_bytes())?;
            request.clear();
        }
        connection.set_nonblocking(true)?;
        Ok(Self { connection, unsent: request.into_bytes().into_iter() })
    }

    fn turn(&mut self) -> Result<()> {
        if let Some(byte) = self.unsent.next() {
            self.connection.write_all(&[byte])?;
            return Ok(());
        }
        match self.connection.read(&mut [0; SLOW_READ]) {
            Ok(0) => Err("the server closed the connection of a slow client".into()),
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// A client that sends one request again and again, and counts what it receives.
struct Exchange {
    connection: TcpStream,
    request: String,
    /// How much of the response is missing; `None` before its head is complete.
    missing: Option<usize>,
    /// Whether a request was sent whose response is not complete.
    is_in_flight: bool,
    is_readable: bool,
    buffer: Vec<u8>,
    received: usize,
}

impl Exchange {
    fn connect(address: SocketAddr, path: &str) -> Result<Self> {
        let connection = std::net::TcpStream::connect(address)?;
        connection.set_nonblocking(true)?;
        Ok(Self {
            connection: TcpStream::from_std(connection),
            request: response::request(path),
            missing: None,
            is_in_flight: false,
            is_readable: false,
            buffer: vec![0; STREAM_READ],
            received: 0,
        })
    }

    fn is_idle(&self) -> bool {
        !self.is_in_flight
    }

    fn send(&mut self) -> Result<()> {
        self.is_in_flight = true;
        self.missing = None;
        Ok(self.connection.write_all(self.request.as_bytes())?)
    }

    fn read_some(&mut self) -> Result<()> {
        if !self.is_readable {
            return Ok(());
        }
        let count = match self.connection.read(&mut self.buffer) {
            Ok(0) => return Err("the server closed a connection".into()),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error.into()),
        };
        // A full read may have left something, and epoll would not report it again.
        self.is_readable = count == self.buffer.len();
        self.received += count;
        let missing = match self.missing {
            Some(missing) => missing,
            None if count == 0 => return Ok(()),
            None => {
                let (head, body) =
                    response::parse(&self.buffer[..count])?.ok_or("a head came in two segments")?;
                head + body
            }
        };
        let missing = missing.checked_sub(count).ok_or("a response is too long")?;
        self.missing = Some(missing);
        self.is_in_flight = missing > 0;
        Ok(())
    }
}
