//! A connection that serves fast-path requests itself, and lends its socket to hyper for the others.

use std::io;
use std::mem::{self, MaybeUninit};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, ReadBuf};

use crate::server::buffers::{BufferAccount, BufferPermit};
use crate::server::fast_path::request::{FastRequest, NotFast, READ_BUFFER};
use crate::server::fast_path::response_buffer::ResponseBuffer;
use crate::server::fast_path::rewind::{Exchange, Rewind};
use crate::server::fast_path::service::{FastOutcome, FastPath};
use crate::server::idle::Activity;
use crate::server::transport::Transport;
use crate::server::turn::poll_end_turn;
use crate::telemetry::clock::{self, Nanos, SECOND};
use crate::telemetry::labels::Rejection;
use crate::telemetry::metrics::Metrics;

/// Reads or writes of one connection before other connections have a turn: at most some 0.2 ms of work.
const OPERATIONS_PER_TURN: usize = 4;

/// How long a connection without any request yet is not evicted as idle.
const UNUSED_GRACE: Nanos = SECOND / 4;

/// A connection on the fast path.
#[derive(Debug)]
pub(crate) struct FastPathConnection<'a, I, S> {
    io: I,
    service: S,
    /// Bytes that were read, of requests without a response.
    unread: Vec<u8>,
    /// Responses that are not sent completely.
    responses: Option<ResponseBuffer<'a>>,
    state: State,
    has_responded: bool,
    metrics: &'a Metrics,
    buffers: BufferAccount,
    activity: Arc<Activity>,
    /// When the last request was read.
    last_used: Nanos,
    /// Held while responses wait for the client to read.
    buffer_permit: Option<BufferPermit>,
}

/// What a connection does once its responses are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Reads.
    Read,
    /// Responds to more of what it has read.
    Respond,
    /// Closes.
    Close,
    /// Leaves the fast path.
    Handover,
}

/// How a connection left the fast path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The connection is closed.
    Closed,
    /// The next request is for hyper.
    Handover,
}

impl<'a, I: AsyncRead + Transport + Unpin, S: FastPath> FastPathConnection<'a, I, S> {
    /// A connection of which nothing was read. Its buffers count towards `buffers`, and `activity` shows whether it is
    /// idle.
    pub(crate) fn new(
        io: I,
        service: S,
        metrics: &'a Metrics,
        buffers: BufferAccount,
        activity: Arc<Activity>,
    ) -> Self {
        Self {
            io,
            service,
            unread: Vec::new(),
            responses: None,
            state: State::Read,
            has_responded: false,
            metrics,
            buffers,
            activity,
            last_used: clock::now() + UNUSED_GRACE,
            buffer_permit: None,
        }
    }

    /// Whether the connection has had a response, and nothing of another request has been read.
    pub(crate) fn is_between_requests(&self) -> bool {
        self.has_responded && self.unread.is_empty()
    }

    /// Whether the connection is idle and has to close for a new one.
    pub(crate) fn is_evicted(&self) -> bool {
        self.is_idle() && self.unread.is_empty() && self.activity.is_evicted()
    }

    /// Whether the connection is between two requests, with nothing to send.
    pub(crate) fn is_idle(&self) -> bool {
        self.responses.is_none() && self.state == State::Read
    }

    /// The account that the connection's buffers count towards.
    pub(crate) fn buffers(&self) -> &BufferAccount {
        &self.buffers
    }

    /// Lends the socket and the service to hyper. The stream begins with the first request that has no response.
    /// [`FastPathConnection::resume`] has to follow before the connection is served here again.
    pub(crate) fn lend<'b>(&'b mut self, exchange: &'b Exchange) -> (Rewind<'b>, &'b S)
    where
        I: Send,
    {
        let unread = mem::take(&mut self.unread);
        (Rewind::new(unread, &mut self.io, exchange), &self.service)
    }

    /// Returns to the fast path with `unread`, the bytes that hyper read and did not use.
    pub(crate) fn resume(&mut self, unread: Vec<u8>) {
        self.has_responded = true;
        self.last_used = clock::now();
        self.state = if unread.is_empty() { State::Read } else { State::Respond };
        self.unread = unread;
    }

    /// Makes closing the connection a reset that discards unsent bytes.
    pub(crate) fn reset_on_close(&self) {
        self.io.reset_on_close();
    }

    /// Serves requests until the connection closes or a request is not for the fast path.
    pub(crate) fn poll_serve(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Exit>> {
        for _ in 0..OPERATIONS_PER_TURN {
            if let Some(responses) = &mut self.responses {
                let is_final = self.state == State::Close;
                let Poll::Ready(sent) = responses.poll_send(&mut self.io, is_final, cx) else {
                    let permit = self.buffer_permit.get_or_insert_with(|| self.buffers.hold(cx.waker()));
                    if permit.is_evicted() {
                        self.io.reset_on_close();
                        self.metrics.count_rejection(Rejection::Buffers);
                        return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                    }
                    return Poll::Pending;
                };
                sent?;
                self.responses = None;
                self.buffer_permit = None;
            }
            match self.state {
                State::Read => {
                    let mut input = [const { MaybeUninit::uninit() }; READ_BUFFER];
                    let mut input = ReadBuf::uninit(&mut input);
                    if !self.unread.is_empty() {
                        input.put_slice(&self.unread);
                        self.io.expect_head();
                    }
                    let Poll::Ready(read) = Pin::new(&mut self.io).poll_read(cx, &mut input) else {
                        if self.unread.is_empty() {
                            self.activity.wake_on_eviction(cx.waker());
                            self.activity.set_idle(self.last_used);
                        }
                        return Poll::Pending;
                    };
                    read?;
                    self.activity.set_busy();
                    if input.filled().len() == self.unread.len() {
                        // The client has closed its sending side. hyper judges an incomplete request.
                        self.state = if self.unread.is_empty() { State::Close } else { State::Handover };
                        continue;
                    }
                    self.respond(input.filled());
                }
                State::Respond => {
                    let unread = mem::take(&mut self.unread);
                    self.respond(&unread);
                }
                State::Close => return Pin::new(&mut self.io).poll_shutdown(cx).map_ok(|()| Exit::Closed),
                State::Handover => return Poll::Ready(Ok(Exit::Handover)),
            }
        }
        // The client keeps sending: other connections of this thread have a turn.
        poll_end_turn(cx)
    }

    /// Responds to the requests that `input` begins with, and keeps the rest.
    fn respond(&mut self, mut input: &[u8]) {
        let responses = self.responses.get_or_insert_with(|| ResponseBuffer::new(self.metrics));
        self.state = loop {
            if input.is_empty() {
                break State::Read;
            }
            let parsed = FastRequest::parse(input);
            let request = match &parsed {
                Ok(request) => request,
                Err(NotFast::Incomplete) => break State::Read,
                Err(NotFast::Slow) => break State::Handover,
            };
            match self.service.respond_fast(&request.head, request.closes, responses) {
                FastOutcome::Written { closes: false } => input = &input[request.size..],
                FastOutcome::Written { closes: true } => {
                    input = &[]; // RFC 9112 section 9.6: what follows is not read
                    break State::Close;
                }
                FastOutcome::BufferFull => break State::Respond,
                FastOutcome::NotHandled => break State::Handover,
            }
        };
        if !(self.unread.is_empty() && input.is_empty()) {
            self.unread = input.to_vec();
        }
        if responses.count == 0 {
            self.responses = None;
        } else {
            self.has_responded = true;
            self.last_used = responses.read_at;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::peer::Client;
    use crate::access::request_head::RequestHead;
    use crate::server::buffers::BufferLimit;
    use crate::server::fast_path::response_buffer::{BODY_MAX, ResponseHead};
    use crate::server::idle::IdleConnections;
    use crate::telemetry::drop_counters::DropCounters;
    use crate::telemetry::endpoint::Endpoint;
    use axum::http::StatusCode;
    use std::cell::Cell;
    use std::convert::Infallible;
    use std::future::poll_fn;
    use std::task::Waker;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    /// A service that responds with `left` keys of one letter, and hands over the requests after them.
    struct Letters {
        left: Cell<usize>,
    }

    impl FastPath for Letters {
        fn respond_fast(
            &self,
            head: &RequestHead<'_>,
            closes: bool,
            responses: &mut ResponseBuffer<'_>,
        ) -> FastOutcome {
            if self.left.get() == 0 {
                return FastOutcome::NotHandled;
            }
            let length = std::str::from_utf8(head.path).unwrap().trim_start_matches("/key/").parse().unwrap();
            if !responses.make_room(length) {
                return FastOutcome::BufferFull;
            }
            self.left.set(self.left.get() - 1);
            let head = ResponseHead { status: StatusCode::OK, lines: ("", String::new()), closes };
            let Ok(()) = responses.add(&head, length as u64, Endpoint::Key, |text| {
                text.resize(text.len() + length, b'k');
                Ok::<_, Infallible>((None, clock::now()))
            });
            FastOutcome::Written { closes }
        }
    }

    fn connection(
        metrics: &Metrics,
        left: usize,
        capacity: usize,
    ) -> (FastPathConnection<'_, DuplexStream, Letters>, DuplexStream) {
        let (server, client) = duplex(capacity);
        let (service, activity) = (Letters { left: Cell::new(left) }, IdleConnections::new(1).activity());
        let buffers = BufferAccount::new(Arc::new(BufferLimit::new(8)), Client::V4(1));
        (FastPathConnection::new(server, service, metrics, buffers, activity), client)
    }

    const REQUEST: &str = "GET /key/100 HTTP/1.1\r\nHost: a\r\n\r\n";

    #[tokio::test]
    async fn responses_arrive_whole_and_in_order_at_any_reading_speed() {
        let metrics = Metrics::new();
        let (mut server, mut client) = connection(&metrics, usize::MAX, 64);
        let lengths: Vec<usize> = (0..300).map(|n| 1 + n * 97 % BODY_MAX).collect();
        let requesting = async {
            let (mut incoming, mut outgoing) = tokio::io::split(&mut client);
            let requests: String =
                lengths.iter().map(|length| REQUEST.replace("100", &length.to_string())).collect();
            let sending = async {
                outgoing.write_all(requests.as_bytes()).await.unwrap();
                outgoing.shutdown().await.unwrap();
            };
            let mut responses = Vec::new();
            let reading = incoming.read_to_end(&mut responses);
            tokio::join!(sending, reading).1.unwrap();
            responses
        };
        let (exit, responses) = tokio::join!(poll_fn(|cx| server.poll_serve(cx)), requesting);
        assert_eq!(exit.unwrap(), Exit::Closed);
        let mut rest = &responses[..];
        for length in lengths {
            let end = rest.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
            let head = std::str::from_utf8(&rest[..end]).unwrap();
            assert!(head.contains(&format!("\r\ncontent-length: {length}\r\n")), "{head}");
            assert_eq!(&rest[end..end + length], vec![b'k'; length]);
            rest = &rest[end + length..];
        }
        assert_eq!(rest, b"");
        assert_eq!(metrics.requests_in_flight.get(), 0);
    }

    #[tokio::test]
    async fn a_response_is_counted_before_its_client_has_it() {
        let metrics = Metrics::new();
        let (mut server, mut client) = connection(&metrics, usize::MAX, 64);
        client.write_all(REQUEST.as_bytes()).await.unwrap();
        assert!(server.poll_serve(&mut Context::from_waker(Waker::noop())).is_pending(), "nothing is read");
        assert_eq!(metrics.requests_in_flight.get(), 1);
        let text = metrics.render(&DropCounters::default());
        for series in [
            "http_responses_total{status_code=\"200\"}",
            "request_latency_seconds_count{endpoint=\"/key/{length}\"}",
        ] {
            assert!(text.contains(&format!("{series} 1\n")), "{series}: {text}");
        }
    }

    #[tokio::test]
    async fn requests_that_are_not_handled_are_handed_over_unchanged() {
        let metrics = Metrics::new();
        for size in [1, 20, 4096] {
            let (mut server, mut client) = connection(&metrics, 2, 1 << 16);
            let others = format!("{REQUEST}POST / HTTP/1.1\r\n\r\nbody");
            let requests = format!("{REQUEST}{REQUEST}{others}");
            let sending = async {
                for chunk in requests.as_bytes().chunks(size) {
                    client.write_all(chunk).await.unwrap();
                    tokio::task::yield_now().await;
                }
                client.shutdown().await.unwrap();
            };
            let (exit, ()) = tokio::join!(poll_fn(|cx| server.poll_serve(cx)), sending);
            assert_eq!(exit.unwrap(), Exit::Handover);
            assert!(server.has_responded);
            let exchange = Exchange::default();
            let (mut io, _) = server.lend(&exchange);
            let mut unread = String::new();
            io.read_to_string(&mut unread).await.unwrap();
            assert_eq!(unread, others, "sent in chunks of {size} bytes");
        }
    }

    #[tokio::test]
    async fn nothing_is_served_after_a_request_that_closes() {
        let metrics = Metrics::new();
        let (mut server, mut client) = connection(&metrics, usize::MAX, 1 << 16);
        let closing = REQUEST.replace("Host", "Connection: close\r\nHost");
        client.write_all(format!("{REQUEST}{closing}{REQUEST}").as_bytes()).await.unwrap();
        assert_eq!(poll_fn(|cx| server.poll_serve(cx)).await.unwrap(), Exit::Closed);
        let mut responses = String::new();
        client.read_to_string(&mut responses).await.unwrap();
        assert_eq!(responses.matches("HTTP/1.1 200 OK").count(), 2);
    }
}
