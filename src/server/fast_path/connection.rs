//! A connection whose requests are answered on the fast path for as long as they are plain.

use std::io;
use std::mem::{self, MaybeUninit};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, ReadBuf};

use crate::server::buffers::{BufferAccount, BufferPermit};
use crate::server::fast_path::request::{Head, READ_BUFFER};
use crate::server::fast_path::response_buffer::ResponseBuffer;
use crate::server::fast_path::rewind::{Exchange, Rewind};
use crate::server::fast_path::service::{FastOutcome, FastPath};
use crate::server::idle::Activity;
use crate::server::transport::Transport;
use crate::telemetry::metrics::{Metrics, Rejection};

/// How often a connection reads or writes before others have a turn: at most some 0.2 ms.
const TURNS: usize = 4;

/// How long a connection that was never used is not closed for a new one.
const UNUSED_GRACE: Duration = Duration::from_millis(250);

/// A connection on the short way.
#[derive(Debug)]
pub struct Connection<'a, I, S> {
    io: I,
    service: S,
    /// What was read and is not answered.
    unread: Vec<u8>,
    /// What is answered and not sent.
    answers: Option<ResponseBuffer<'a>>,
    next: Next,
    has_answered: bool,
    metrics: &'a Metrics,
    buffers: BufferAccount,
    activity: Arc<Activity>,
    /// When its last request was read.
    last_used: Instant,
    /// While answers wait for the client to read.
    held: Option<BufferPermit>,
}

/// What a connection does when its answers are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// It reads.
    Read,
    /// It answers more of what it has read.
    Answer,
    /// It ends.
    Exit,
    /// It takes the long way.
    Leave,
}

/// How the short way ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// With the connection.
    Closed,
    /// At something that is for hyper.
    Handover,
}

impl<'a, I: AsyncRead + Transport + Unpin, S: FastPath> Connection<'a, I, S> {
    /// A connection of which nothing was read, whose buffers count on `buffers`, and which notes in `activity` when it is
    /// idle.
    pub fn new(
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
            answers: None,
            next: Next::Read,
            has_answered: false,
            metrics,
            buffers,
            activity,
            last_used: Instant::now() + UNUSED_GRACE,
            held: None,
        }
    }

    /// Whether there was an answer yet.
    pub fn has_answered(&self) -> bool {
        self.has_answered
    }

    /// Whether it is idle and has to close for another connection.
    pub fn is_evicted(&self) -> bool {
        self.is_idle() && self.unread.is_empty() && self.activity.is_evicted()
    }

    /// Whether it is between two requests, with nothing to send.
    pub fn is_idle(&self) -> bool {
        self.answers.is_none() && self.next == Next::Read
    }

    /// Whose its buffers are.
    pub fn buffers(&self) -> &BufferAccount {
        &self.buffers
    }

    /// Lends the connection to hyper, as if nothing had been read but what was answered, and its service.
    /// [`Connection::resume`] has to follow before it is served here again.
    pub fn lend<'b>(&'b mut self, exchange: &'b Exchange) -> (Rewind<'b>, &'b S)
    where
        I: Send,
    {
        let unread = mem::take(&mut self.unread);
        (Rewind::new(unread, &mut self.io, exchange), &self.service)
    }

    /// Goes on here with `unread`, which hyper read and did not use.
    pub fn resume(&mut self, unread: Vec<u8>) {
        self.has_answered = true;
        self.last_used = Instant::now();
        self.next = if unread.is_empty() { Next::Read } else { Next::Answer };
        self.unread = unread;
    }

    /// Makes the connection's end a reset: what was not sent is forgotten.
    pub fn forget_unsent(&self) {
        self.io.forget_unsent();
    }

    /// Answers plain requests while there are no others.
    pub fn poll_serve(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Exit>> {
        for _ in 0..TURNS {
            if let Some(answers) = &mut self.answers {
                let Poll::Ready(sent) = answers.poll_send(&mut self.io, self.next == Next::Exit, cx) else {
                    let held = self.held.get_or_insert_with(|| self.buffers.hold(cx.waker()));
                    if held.is_evicted() {
                        self.io.forget_unsent();
                        self.metrics.rejected(Rejection::Buffers);
                        return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                    }
                    return Poll::Pending;
                };
                sent?;
                self.answers = None;
                self.held = None;
            }
            match self.next {
                Next::Read => {
                    let mut input = [const { MaybeUninit::uninit() }; READ_BUFFER];
                    let mut input = ReadBuf::uninit(&mut input);
                    input.put_slice(&self.unread);
                    if !self.unread.is_empty() {
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
                        // The client sends no more. What it has begun is for hyper to judge.
                        self.next = if self.unread.is_empty() { Next::Exit } else { Next::Leave };
                        continue;
                    }
                    self.answer(input.filled());
                }
                Next::Answer => {
                    let unread = mem::take(&mut self.unread);
                    self.answer(&unread);
                }
                Next::Exit => return Pin::new(&mut self.io).poll_shutdown(cx).map_ok(|()| Exit::Closed),
                Next::Leave => return Poll::Ready(Ok(Exit::Handover)),
            }
        }
        // Its client sends more without a pause: other connections of this thread have a turn.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Answers what can be answered of `input`, and keeps the rest.
    fn answer(&mut self, mut input: &[u8]) {
        let mut answers = ResponseBuffer::start(self.metrics);
        self.next = loop {
            let (request, size) = match Head::read(input) {
                Head::Plain(request, size) => (request, size),
                Head::Partial => break Next::Read,
                Head::Other => break Next::Leave,
            };
            match self.service.respond_fast(&request, &mut answers) {
                FastOutcome::Written => input = &input[size..],
                FastOutcome::BufferFull => break Next::Answer,
                FastOutcome::NotHandled => break Next::Leave,
            }
            if request.closes {
                input = &[]; // RFC 9112 section 9.6: what follows is not read
                break Next::Exit;
            }
        };
        if !(self.unread.is_empty() && input.is_empty()) {
            self.unread = input.to_vec();
        }
        if let Some(started) = answers.responses_since() {
            self.has_answered = true;
            self.last_used = started;
            self.answers = Some(answers);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::peer::Client;
    use crate::keys::key::KeyLength;
    use crate::server::buffers::BufferLimit;
    use crate::server::fast_path::request::FastRequest;
    use crate::server::fast_path::response_buffer::KEY_MAX;
    use crate::server::idle::IdleConnections;
    use std::cell::Cell;
    use std::convert::Infallible;
    use std::future::poll_fn;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    /// Keys of one letter, until `left` of them are gone.
    struct Letters {
        left: Cell<usize>,
    }

    impl FastPath for Letters {
        fn respond_fast(&self, request: &FastRequest<'_>, answers: &mut ResponseBuffer<'_>) -> FastOutcome {
            let Ok(length) = KeyLength::parse(request.length, KEY_MAX) else {
                return FastOutcome::NotHandled;
            };
            if self.left.get() == 0 {
                return FastOutcome::NotHandled;
            }
            if !answers.have_room(length) {
                return FastOutcome::BufferFull;
            }
            self.left.set(self.left.get() - 1);
            answers
                .add(request, length, "HTTP/1.1 200 OK\r\n", "", |key| {
                    key.fill(b'k');
                    Ok::<_, Infallible>(())
                })
                .unwrap();
            FastOutcome::Written
        }
    }

    fn account(limit: usize, client: u32) -> BufferAccount {
        BufferAccount::new(Arc::new(BufferLimit::new(limit)), Client::V4(client))
    }

    fn connection(
        metrics: &Metrics,
        left: usize,
        pipe: usize,
    ) -> (Connection<'_, DuplexStream, Letters>, DuplexStream) {
        let (ours, theirs) = duplex(pipe);
        let (service, activity) = (Letters { left: Cell::new(left) }, IdleConnections::new().activity());
        (Connection::new(ours, service, metrics, account(8, 1), activity), theirs)
    }

    const REQUEST: &str = "GET /key/100 HTTP/1.1\r\nHost: a\r\n\r\n";

    #[tokio::test]
    async fn answers_come_whole_and_in_order_however_slowly_they_are_read() {
        let metrics = Metrics::new();
        let (mut ours, mut theirs) = connection(&metrics, usize::MAX, 64);
        let lengths: Vec<usize> = (0..300).map(|n| 1 + n * 7 % 4096).collect();
        let asking = async {
            let (mut incoming, mut outgoing) = tokio::io::split(&mut theirs);
            let wire: String =
                lengths.iter().map(|length| REQUEST.replace("100", &length.to_string())).collect();
            let sending = async {
                outgoing.write_all(wire.as_bytes()).await.unwrap();
                outgoing.shutdown().await.unwrap();
            };
            let mut answers = Vec::new();
            let reading = incoming.read_to_end(&mut answers);
            tokio::join!(sending, reading).1.unwrap();
            answers
        };
        let (end, answers) = tokio::join!(poll_fn(|cx| ours.poll_serve(cx)), asking);
        assert_eq!(end.unwrap(), Exit::Closed);
        let mut rest = &answers[..];
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
    async fn what_is_not_answered_here_is_left_to_the_last_byte() {
        let metrics = Metrics::new();
        for piece in [1, 20, 4096] {
            let (mut ours, mut theirs) = connection(&metrics, 2, 1 << 16);
            let others = format!("{REQUEST}POST / HTTP/1.1\r\n\r\nbody");
            let wire = format!("{REQUEST}{REQUEST}{others}");
            let sending = async {
                for piece in wire.as_bytes().chunks(piece) {
                    theirs.write_all(piece).await.unwrap();
                    tokio::task::yield_now().await;
                }
                theirs.shutdown().await.unwrap();
            };
            let (end, ()) = tokio::join!(poll_fn(|cx| ours.poll_serve(cx)), sending);
            assert_eq!(end.unwrap(), Exit::Handover);
            assert!(ours.has_answered());
            let exchange = Exchange::default();
            let (mut io, _) = ours.lend(&exchange);
            let mut left = String::new();
            io.read_to_string(&mut left).await.unwrap();
            assert_eq!(left, others, "in pieces of {piece}");
        }
    }

    #[tokio::test]
    async fn nothing_is_answered_after_a_request_that_closes() {
        let metrics = Metrics::new();
        let (mut ours, mut theirs) = connection(&metrics, usize::MAX, 1 << 16);
        let closing = REQUEST.replace("Host", "Connection: close\r\nHost");
        theirs.write_all(format!("{REQUEST}{closing}{REQUEST}").as_bytes()).await.unwrap();
        assert_eq!(poll_fn(|cx| ours.poll_serve(cx)).await.unwrap(), Exit::Closed);
        let mut answers = String::new();
        theirs.read_to_string(&mut answers).await.unwrap();
        assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 2);
    }
}
