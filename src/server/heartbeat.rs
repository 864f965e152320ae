//! Heartbeats of the accept loops: a worker whose thread is blocked sends none.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

/// Requests heartbeats in numbered rounds, and finds out which accept loops sent theirs.
#[derive(Debug)]
pub struct Heartbeats {
    round: watch::Sender<u64>,
    /// The last round that each accept loop has answered.
    answered: Vec<Arc<AtomicU64>>,
}

impl Heartbeats {
    /// No accept loops yet.
    #[expect(clippy::new_without_default, reason = "it is made once, by name")]
    pub fn new() -> Self {
        Self { round: watch::Sender::new(0), answered: Vec::new() }
    }

    /// Adds an accept loop, and returns its side.
    pub fn register(&mut self) -> Heartbeat {
        let answered = Arc::new(AtomicU64::new(*self.round.borrow()));
        self.answered.push(Arc::clone(&answered));
        Heartbeat { round: self.round.subscribe(), answered }
    }

    /// Removes the `count` accept loops that were added last: they were never started.
    pub fn unregister_last(&mut self, count: usize) {
        self.answered.truncate(self.answered.len().saturating_sub(count));
    }

    /// Whether every accept loop has answered this round.
    pub fn all_answered(&self) -> bool {
        let round = *self.round.borrow();
        self.answered.iter().all(|answered| answered.load(Ordering::Relaxed) == round)
    }

    /// Whether every accept loop has answered this round; then starts the next one.
    pub fn next_round(&self) -> bool {
        let all = self.all_answered();
        self.round.send_modify(|round| *round += 1);
        all
    }
}

/// An accept loop's side of [`Heartbeats`].
#[derive(Debug)]
pub struct Heartbeat {
    round: watch::Receiver<u64>,
    answered: Arc<AtomicU64>,
}

impl Heartbeat {
    /// Answers every round.
    pub(crate) async fn run(&mut self) -> Infallible {
        while self.round.changed().await.is_ok() {
            self.answered.store(*self.round.borrow_and_update(), Ordering::Relaxed);
        }
        std::future::pending().await // there are no more rounds
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::ready;
    use std::io::Write;
    use std::sync::{Mutex, mpsc};
    use std::thread;
    use std::time::Duration;

    use hyper::body::Incoming;
    use hyper::service::service_fn;
    use hyper::{Request, Response};

    use crate::access::peer::Peer;
    use crate::server::accept::serve;
    use crate::server::address::{Host, SocketMode};
    use crate::server::connection::http_handler;
    use crate::server::connection_limit::{ConnectionClass, ConnectionLimit};
    use crate::server::context::ServerContext;
    use crate::server::drain::Drain;
    use crate::server::fast_path::service::tests::SlowPathOnly;
    use crate::server::listener::Listener;
    use crate::server::timeouts::Timeouts;
    use crate::telemetry::metrics::Metrics;

    /// The server runs on its own thread, and its service blocks until the test releases it.
    #[test]
    fn a_blocked_worker_sends_no_heartbeat() {
        let listener =
            Listener::bind(&"127.0.0.1".parse::<Host>().unwrap(), 0, SocketMode::default()).unwrap();
        let address = listener.to_string();
        let mut heartbeats = Heartbeats::new();
        let heartbeat = heartbeats.register();
        let drain = Drain::new();
        let phase = drain.subscribe();
        let long = Duration::from_secs(60);
        let context = ServerContext::new(
            ConnectionLimit::new(8, 8),
            Timeouts::new(long, long, long),
            Arc::new(Metrics::new()),
        );
        let (entered, is_entered) = mpsc::channel();
        let (release, is_released) = mpsc::channel::<()>();
        let is_released = Arc::new(Mutex::new(is_released));
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let service = move |_: ConnectionClass, _: Peer| {
                let (entered, is_released) = (entered.clone(), Arc::clone(&is_released));
                SlowPathOnly(service_fn(move |_: Request<Incoming>| {
                    entered.send(()).unwrap();
                    let _ = is_released.lock().unwrap().recv();
                    ready(Ok(Response::new(String::new())))
                }))
            };
            runtime
                .block_on(serve(vec![(listener, heartbeat)], http_handler(service), context, phase))
                .unwrap();
        });
        let answers = |heartbeats: &Heartbeats| {
            // The call before has started a round; a worker that makes progress answers within milliseconds.
            heartbeats.next_round();
            (0..2000).any(|_| {
                thread::sleep(Duration::from_millis(5));
                heartbeats.all_answered()
            })
        };
        assert!(answers(&heartbeats), "an idle worker answers");
        let mut client = std::net::TcpStream::connect(address).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        is_entered.recv_timeout(long).unwrap();
        assert!(!answers(&heartbeats), "a blocked worker does not");
        assert!(!heartbeats.next_round());
        release.send(()).unwrap();
        assert!(answers(&heartbeats), "a released worker answers again");
    }

    #[test]
    fn an_accept_loop_that_never_started_owes_no_heartbeat() {
        let mut heartbeats = Heartbeats::new();
        let started = heartbeats.register();
        drop((heartbeats.register(), heartbeats.register()));
        heartbeats.unregister_last(2);
        heartbeats.next_round();
        assert!(!heartbeats.all_answered(), "the started accept loop owes one");
        started.answered.store(*heartbeats.round.borrow(), Ordering::Relaxed);
        assert!(heartbeats.all_answered());
    }
}
