//! Open-loop load: sends each request at its scheduled time, whatever the responses do.
//!
//! The latency of a request counts from its scheduled time, so a server that stalls also delays the requests that are due
//! meanwhile (a closed loop would not send them, and would report one slow request: "coordinated omission"). The
//! intervals are exponentially distributed, as those of independent clients. A request that finds no idle connection waits
//! for one, and this counts.
//!
//! One thread polls without sleeping, because a timer or a wake-up would take longer than the responses do. It also
//! reports how late it sent requests for which a connection was idle: then the generator could not keep up.
//!
//! The run is divided into windows of 50 ms, by the times at which requests are scheduled. Each quantile is the median of
//! those of all windows: a virtual machine that loses its core for some milliseconds now and then spoils a few windows,
//! and would alone decide the p99 of the whole run. In turn, a stall of the server that most windows do not have is not
//! seen, except in the maximum of the run.
//!
//! Other clients can be active at the same time (`background.rs`), in the same thread: on a core of their own they would
//! need a third core, and on this one they would delay the requests unnoticed.
//!
//! Every response must be 200 with a body of the given length. Otherwise, or if a response is missing 10 s after the last
//! request, the exit status is 1.

mod background;
mod response;

use std::collections::{BTreeMap, VecDeque};
use std::error::Error;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

use background::Background;

const USAGE: &str = "usage: open-loop ADDRESS PATH BODY-LENGTH CONNECTIONS REQUESTS-PER-SECOND SECONDS \
                     [slow=CLIENTS] [stream=PATH] [scrape=ADDRESS]";
const RESPONSE_MAX: usize = 16 * 1024;
/// Responses read before the next request is sent, so that many ready responses do not make it late.
const EVENTS: usize = 4;
const LAST_RESPONSE: Duration = Duration::from_secs(10);
const WINDOW: Duration = Duration::from_millis(50);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, path, body, connections, rate, seconds, background @ ..] = arguments.as_slice() else {
        return Err(USAGE.into());
    };
    let address = address.parse()?;
    let background = Background::connect(address, background)?;
    let mut load = Load::connect(address, path, body.parse()?, connections.parse()?, background)?;
    load.run(Schedule::new(rate.parse()?), Duration::from_secs_f64(seconds.parse()?))?;
    load.print();
    Ok(())
}

/// The times at which requests are due, since the start.
struct Schedule {
    random: fastrand::Rng,
    mean_interval: f64,
    next: Duration,
}

impl Schedule {
    /// The seed is fixed: every server gets the same requests at the same times.
    fn new(rate: f64) -> Self {
        Self { random: fastrand::Rng::with_seed(1), mean_interval: 1.0 / rate, next: Duration::ZERO }
    }

    /// The next time, if it is not later than `now`.
    fn due(&mut self, now: Duration) -> Option<Duration> {
        let due = (self.next <= now).then_some(self.next)?;
        // 1 - f64() is in (0, 1], so the logarithm is finite.
        self.next += Duration::from_secs_f64(-self.mean_interval * (1.0 - self.random.f64()).ln());
        Some(due)
    }
}

/// A keep-alive connection, with at most one request in flight.
struct Connection {
    stream: TcpStream,
    scheduled: Duration,
    response: Box<[u8; RESPONSE_MAX]>,
    received: usize,
}

impl Connection {
    fn send(&mut self, request: &[u8], scheduled: Duration) -> io::Result<()> {
        self.scheduled = scheduled;
        self.received = 0;
        match self.stream.write(request)? {
            sent if sent == request.len() => Ok(()),
            _ => Err(io::Error::other("a request did not fit into an empty socket")),
        }
    }

    /// Reads what has arrived. True if the response is complete.
    fn receive(&mut self, body: usize) -> Result<bool> {
        match self.stream.read(&mut self.response[self.received..]) {
            Ok(0) => return Err("the server closed a connection, or a response is too long".into()),
            Ok(count) => self.received += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        let response = &self.response[..self.received];
        let Some((head, declared)) = response::parse(response)? else { return Ok(false) };
        if declared != body || response.len() > head + body {
            let text = String::from_utf8_lossy(response);
            return Err(format!("expected 200 and {body} bytes: {text}").into());
        }
        Ok(response.len() == head + body)
    }
}

struct Load {
    request: Vec<u8>,
    body: usize,
    connections: Vec<Connection>,
    background: Background,
    poll: Poll,
    /// Scheduled times of requests that are due and wait for an idle connection.
    waiting: VecDeque<Duration>,
    /// Connections without a request in flight, and since when.
    idle: VecDeque<(usize, Duration)>,
    latency: Sample,
    late: Sample,
}

/// Times that were measured, each with when its request was scheduled.
#[derive(Default)]
struct Sample(Vec<(Duration, Duration)>);

impl Sample {
    /// The median over all windows of their value at `quantile`, in seconds.
    fn quantile(&self, quantile: f64) -> f64 {
        let mut windows: BTreeMap<u128, Vec<f64>> = BTreeMap::new();
        for (scheduled, measured) in &self.0 {
            windows.entry(scheduled.as_nanos() / WINDOW.as_nanos()).or_default().push(measured.as_secs_f64());
        }
        value_at(0.5, windows.into_values().map(|window| value_at(quantile, window)).collect())
    }

    /// The largest time of the run.
    fn max(&self) -> Duration {
        self.0.iter().map(|(_, measured)| *measured).max().unwrap_or_default()
    }
}

/// The smallest of `values` that at least this part of them does not exceed.
fn value_at(quantile: f64, mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (quantile * values.len() as f64).ceil() as usize;
    values.get(rank.max(1) - 1).copied().unwrap_or_default()
}

impl Load {
    /// Connects, and sends one request on each connection, so that the server has set all of them up before the load.
    fn connect(
        address: SocketAddr,
        path: &str,
        body: usize,
        count: usize,
        background: Background,
    ) -> Result<Self> {
        let mut load = Self {
            request: response::request(path).into_bytes(),
            body,
            connections: Vec::with_capacity(count),
            background,
            poll: Poll::new()?,
            waiting: VecDeque::new(),
            idle: VecDeque::new(),
            latency: Sample::default(),
            late: Sample::default(),
        };
        for index in 0..count {
            let mut stream = std::net::TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            stream.write_all(&load.request)?;
            stream.set_nonblocking(true)?;
            let mut stream = TcpStream::from_std(stream);
            load.poll.registry().register(&mut stream, Token(index), Interest::READABLE)?;
            let response = Box::new([0; RESPONSE_MAX]);
            load.connections.push(Connection { stream, scheduled: Duration::ZERO, response, received: 0 });
        }
        load.background.register(load.poll.registry(), count)?;
        load.run(Schedule { next: Duration::MAX, ..Schedule::new(1.0) }, Duration::ZERO)?;
        load.latency.0.clear();
        load.idle.iter_mut().for_each(|(_, since)| *since = Duration::ZERO);
        Ok(load)
    }

    /// Sends what is due for so long, and waits for the last responses.
    fn run(&mut self, mut schedule: Schedule, duration: Duration) -> Result<()> {
        let mut events = Events::with_capacity(EVENTS);
        let begun = Instant::now();
        loop {
            let now = begun.elapsed();
            while let Some(due) = schedule.due(now.min(duration)) {
                self.waiting.push_back(due);
            }
            self.send_one(now)?;
            self.poll.poll(&mut events, Some(Duration::ZERO))?;
            for event in &events {
                match event.token().0.checked_sub(self.connections.len()) {
                    None => self.receive(event.token().0, begun)?,
                    Some(client) => self.background.set_ready(client),
                }
            }
            self.background.turn(now)?;
            if now > duration {
                let missing = self.waiting.len() + self.connections.len() - self.idle.len();
                if missing == 0 {
                    return Ok(());
                }
                if now > duration + LAST_RESPONSE {
                    return Err(format!("{missing} responses are missing").into());
                }
            }
        }
    }

    /// Sends the request that has waited longest, if there is one and a connection is idle.
    fn send_one(&mut self, now: Duration) -> Result<()> {
        let Some(&scheduled) = self.waiting.front() else { return Ok(()) };
        let Some((index, since)) = self.idle.pop_front() else { return Ok(()) };
        self.waiting.pop_front();
        self.late.0.push((scheduled, now - scheduled.max(since)));
        Ok(self.connections[index].send(&self.request, scheduled)?)
    }

    fn receive(&mut self, index: usize, begun: Instant) -> Result<()> {
        let connection = &mut self.connections[index];
        // A short read has drained the socket: epoll reports the next bytes without a read that would block.
        if connection.receive(self.body)? {
            let now = begun.elapsed();
            self.latency.0.push((connection.scheduled, now - connection.scheduled));
            self.idle.push_back((index, now));
        }
        Ok(())
    }

    /// Prints one object of JSON; times are in seconds.
    fn print(&self) {
        let figures = |sample: &Sample| {
            let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|quantile| sample.quantile(quantile));
            let max = sample.max().as_secs_f64();
            format!(r#"{{"p50": {p50}, "p99": {p99}, "p99.9": {p999}, "max": {max}}}"#)
        };
        let (latency, late) = (figures(&self.latency), figures(&self.late));
        let (requests, background) = (self.latency.0.len(), &self.background);
        println!(r#"{{"requests": {requests}, "latency": {latency}, "late": {late}, {background}}}"#);
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufRead;
    use std::net::TcpListener;
    use std::sync::{Arc, Mutex};
    use std::thread;

    use super::*;

    const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfour";
    const RATE: f64 = 1000.0;
    const DURATION: Duration = Duration::from_millis(500);

    /// A server that answers one request after the other, and takes `stall` for one in the middle of the load.
    fn server(response: &'static str, stall: Duration) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let count = Arc::new(Mutex::new(0));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, count) = (stream.unwrap(), Arc::clone(&count));
                thread::spawn(move || {
                    let requests = io::BufReader::new(stream.try_clone().unwrap());
                    for line in requests.lines() {
                        if line.unwrap().is_empty() {
                            let mut count = count.lock().unwrap();
                            *count += 1;
                            if *count == 100 {
                                thread::sleep(stall);
                            }
                            stream.write_all(response.as_bytes()).unwrap();
                        }
                    }
                });
            }
        });
        address
    }

    fn load(address: SocketAddr) -> Result<Load> {
        let background = Background::connect(address, &[])?;
        let mut load = Load::connect(address, "/", 4, 8, background)?;
        load.run(Schedule::new(RATE), DURATION)?;
        Ok(load)
    }

    #[test]
    fn a_stall_delays_every_request_that_is_due_meanwhile() {
        let stall = Duration::from_millis(200);
        let load = load(server(OK, stall)).unwrap();
        let mut schedule = Schedule::new(RATE);
        let scheduled = std::iter::from_fn(|| schedule.due(DURATION)).count();
        assert_eq!(load.latency.0.len(), scheduled);
        // A closed loop would report at most one slow response per connection.
        let slow = load.latency.0.iter().filter(|(_, latency)| *latency >= stall / 2).count();
        assert!(slow > 50, "{slow} of {scheduled}");
        assert!(load.latency.max() >= stall);
    }

    #[test]
    fn a_quantile_is_the_median_of_those_of_all_windows() {
        let millis = Duration::from_millis;
        // Three windows, of which one has nothing but slow responses.
        let window = |index: u32, slowest: u64| {
            (1..=100_u64).map(move |rank| (index * WINDOW + millis(rank / 3), millis(slowest - 100 + rank)))
        };
        let sample = Sample(window(0, 100).chain(window(1, 9000)).chain(window(2, 300)).collect());
        assert_eq!([0.5, 0.99, 0.999].map(|quantile| sample.quantile(quantile)), [0.25, 0.299, 0.3]);
        assert_eq!(sample.max(), millis(9000));
        assert_eq!(Sample::default().quantile(0.99), 0.0);
    }

    #[test]
    fn an_unexpected_response_is_an_error() {
        for response in [
            "HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nfour",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfive!",
            "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfour and more",
        ] {
            assert!(load(server(response, Duration::ZERO)).is_err(), "{response}");
        }
    }
}
