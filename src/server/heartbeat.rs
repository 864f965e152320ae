//! Whether the accept loops make progress.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

/// Asks accept loops for a sign of life and sees who gave one: a worker whose thread is blocked gives none.
#[derive(Debug)]
pub struct Heartbeats {
    ask: watch::Sender<u64>,
    answers: Vec<Arc<AtomicU64>>,
}

impl Heartbeats {
    /// Nobody to ask yet.
    #[expect(clippy::new_without_default, reason = "it is made once, by name")]
    pub fn new() -> Self {
        Self { ask: watch::Sender::new(0), answers: Vec::new() }
    }

    /// The side of one accept loop.
    pub fn join(&mut self) -> Heartbeat {
        let answer = Arc::new(AtomicU64::new(*self.ask.borrow()));
        self.answers.push(Arc::clone(&answer));
        Heartbeat { asked: self.ask.subscribe(), answer }
    }

    /// Forgets the last `count` that joined: their accept loops were never started.
    pub fn withdraw(&mut self, count: usize) {
        self.answers.truncate(self.answers.len().saturating_sub(count));
    }

    /// Whether every accept loop has answered the last question.
    pub fn have_answered(&self) -> bool {
        let asked = *self.ask.borrow();
        self.answers.iter().all(|answer| answer.load(Ordering::Relaxed) == asked)
    }

    /// Whether everyone answered the last question; then asks again.
    pub fn all_answered(&self) -> bool {
        let all = self.have_answered();
        self.ask.send_modify(|asked| *asked += 1);
        all
    }
}

/// An accept loop's side of [`Heartbeats`].
#[derive(Debug)]
pub struct Heartbeat {
    asked: watch::Receiver<u64>,
    answer: Arc<AtomicU64>,
}

impl Heartbeat {
    pub(crate) async fn beat(&mut self) -> Infallible {
        while self.asked.changed().await.is_ok() {
            self.answer.store(*self.asked.borrow_and_update(), Ordering::Relaxed);
        }
        std::future::pending().await // nobody asks any more
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::ready;
    use std::io::Write;
    use std::sync::{Mutex, mpsc as blocking};
    use std::thread;
    use std::time::Duration;

    use hyper::body::Incoming;
    use hyper::service::service_fn;
    use hyper::{Request, Response};

    use crate::access::peer::Peer;
    use crate::server::accept::serve;
    use crate::server::address::{Host, Mode};
    use crate::server::connection::http;
    use crate::server::connection_limit::{ConnectionClass, ConnectionLimit};
    use crate::server::context::{OVER_LIMIT_TIMEOUT, ServerContext};
    use crate::server::drain::Drain;
    use crate::server::fast_path::service::SlowPathOnly;
    use crate::server::listener::Listener;
    use crate::server::timeouts::Timeouts;
    use crate::telemetry::metrics::Metrics;

    /// A server on a thread of its own, whose service does not return before it is told to.
    #[test]
    fn a_worker_that_is_blocked_gives_no_sign_of_life() {
        let listener = Listener::bind(&"127.0.0.1".parse::<Host>().unwrap(), 0, Mode::default()).unwrap();
        let address = listener.to_string();
        let mut heartbeats = Heartbeats::new();
        let heartbeat = heartbeats.join();
        let drain = Drain::new();
        let phase = drain.watch();
        let context = ServerContext::new(
            ConnectionLimit::new(8, 8),
            Timeouts::new(OVER_LIMIT_TIMEOUT, OVER_LIMIT_TIMEOUT, OVER_LIMIT_TIMEOUT),
            Arc::new(Metrics::new()),
        );
        let (entered, is_entered) = blocking::channel();
        let (release, is_released) = blocking::channel::<()>();
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
            runtime.block_on(serve(vec![(listener, heartbeat)], http(service), context, phase)).unwrap();
        });
        let answers = |heartbeats: &Heartbeats| {
            // It has been asked by the call before; a worker that moves answers within milliseconds.
            heartbeats.all_answered();
            (0..400).any(|_| {
                thread::sleep(Duration::from_millis(5));
                heartbeats.answers[0].load(Ordering::Relaxed) == *heartbeats.ask.borrow()
            })
        };
        assert!(answers(&heartbeats), "an idle worker answers");
        let mut client = std::net::TcpStream::connect(address).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        is_entered.recv().unwrap();
        assert!(!answers(&heartbeats), "a blocked one does not");
        assert!(!heartbeats.all_answered());
        release.send(()).unwrap();
        assert!(answers(&heartbeats), "and does again");
    }

    #[test]
    fn an_accept_loop_that_was_never_started_is_not_waited_for() {
        let mut heartbeats = Heartbeats::new();
        let started = heartbeats.join();
        drop((heartbeats.join(), heartbeats.join()));
        heartbeats.withdraw(2);
        let progress = |heartbeats: &Heartbeats| {
            heartbeats.all_answered();
            heartbeats.have_answered()
        };
        assert!(!progress(&heartbeats), "the one that was started is");
        started.answer.store(*heartbeats.ask.borrow(), Ordering::Relaxed);
        assert!(heartbeats.have_answered());
    }
}
