//! The short way of plain requests: a whole head that says `GET /key/{length}`, and nothing that changes what that means.
//!
//! It reads with the parser that hyper has, draws the key where the answer is written, and writes once for all requests
//! that came together. Whatever else comes, an error too, goes to hyper with every byte that is not answered: this here
//! refuses nothing, so there is one place that says what is wrong with a request.

use std::cell::Cell;
use std::fmt;
use std::io::{self, Write};
use std::mem::{self, MaybeUninit};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use zeroize::Zeroize;

use crate::keys::key::{KeyLength, keep_lower};
use crate::server::buffers::{BufferAccount, BufferPermit};
use crate::server::idle::Activity;
use crate::server::timeouts::{Sending, Transport};
use crate::telemetry::endpoint::{Endpoint, KEY_PREFIX};
use crate::telemetry::metrics::{Metrics, Rejection};

/// The most headers of a request; hyper reads as many, and answers more with 431.
const FIELDS_MAX: usize = 100;

/// Bytes that are read at once.
const READ_BUFFER: usize = 4096;

/// A head that is longer takes the long way.
const HEAD_MAX: usize = READ_BUFFER / 2;

/// Bytes of answers that are written at once.
const WRITE_BUFFER: usize = 8192;

/// Of it, what an answer may need beside its key.
const ANSWER_HEAD_MAX: usize = 1024;

/// Of that, what the service may say. The rest is for the length, the date and the end, which are written here.
const HEADERS_MAX: usize = ANSWER_HEAD_MAX - 128;

/// How often a connection reads or writes before others have a turn: at most some 0.2 ms.
const TURNS: usize = 4;

/// From so many bytes of a response on, the kernel may hold more of it. A response that long has a permit.
const STREAMING_MIN: usize = 64 * 1024;

/// How long a connection that was never used is not closed for a new one.
const UNUSED_GRACE: Duration = Duration::from_millis(250);

/// The longest key that goes this way, in bytes.
pub const KEY_MAX: u64 = 4096;

/// How a request for a key begins: its method, and its path up to the length.
const START: [u8; METHOD.len() + KEY_PREFIX.len()] = {
    let mut start = [0; METHOD.len() + KEY_PREFIX.len()];
    let (method, path) = start.split_at_mut(METHOD.len());
    method.copy_from_slice(METHOD);
    path.copy_from_slice(KEY_PREFIX.as_bytes());
    start
};
const METHOD: &[u8] = b"GET ";

/// A request for a raw key, every part of which is understood here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FastRequest<'a> {
    /// What the path has for a length; not checked.
    pub length: &'a str,
    /// Whether the client wants the connection to end with the answer.
    pub closes: bool,
}

/// What the bytes of a connection begin with.
#[derive(Debug, PartialEq, Eq)]
enum Head<'a> {
    /// A plain request, and how many bytes it has.
    Plain(FastRequest<'a>, usize),
    /// What may become one.
    Partial,
    /// Something else.
    Other,
}

impl<'a> Head<'a> {
    fn read(bytes: &'a [u8]) -> Self {
        let start = &bytes[..bytes.len().min(START.len())];
        if start != &START[..start.len()] {
            return Self::Other;
        }
        let mut fields = [const { MaybeUninit::uninit() }; FIELDS_MAX];
        let mut request = httparse::Request::new(&mut []);
        let size = match request.parse_with_uninit_headers(bytes, &mut fields) {
            Ok(httparse::Status::Complete(size)) if size <= HEAD_MAX => size,
            Ok(httparse::Status::Partial) if bytes.len() <= HEAD_MAX => return Self::Partial,
            _ => return Self::Other,
        };
        let path = request.path.unwrap_or_default();
        let length = path.get(KEY_PREFIX.len()..).unwrap_or_default();
        match closes(request.headers) {
            Some(closes) if request.version == Some(1) => Self::Plain(FastRequest { length, closes }, size),
            _ => Self::Other,
        }
    }
}

/// Whether the connection ends after a request with these fields; `None` where they say anything else that matters.
/// Fields that nothing here looks at are let pass, as they are on the long way.
fn closes(fields: &[httparse::Header<'_>]) -> Option<bool> {
    let (mut hosts, mut closes) = (0, false);
    for field in fields {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        // By length first: a comparison with every name would cost as much as the rest.
        match field.name.len() {
            4 if is("host") => {
                hosts += 1;
                if !is_host(field.value) {
                    return None;
                }
            }
            6 if is("accept") && field.value != b"*/*" => return None,
            6 if is("expect") => return None,
            7 if is("upgrade") => return None,
            9 if is("forwarded") => return None,
            10 if is("connection") => match field.value {
                b"close" => closes = true,
                b"keep-alive" => {}
                _ => return None,
            },
            13 if is("authorization") => return None,
            14 if is("content-length") => return None,
            15 if is("x-forwarded-for") => return None,
            17 if is("transfer-encoding") => return None,
            _ => {}
        }
    }
    (hosts == 1).then_some(closes)
}

/// RFC 3986 section 3.2: whether these are characters of a host and its port.
pub fn is_host(value: &[u8]) -> bool {
    value.iter().all(|byte| HOST_CHARACTERS[usize::from(*byte)])
}

/// As a table: it is looked into for every byte of every request.
const HOST_CHARACTERS: [bool; 256] = {
    let mut table = [false; 256];
    let allowed = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*+,;=:%[]";
    let mut at = 0;
    while at < allowed.len() {
        table[allowed[at] as usize] = true;
        at += 1;
    }
    table
};

/// A service that knows the answers of plain requests.
pub trait FastPath {
    /// Adds the answer to `request`, or leaves `answers` as they were.
    fn respond_fast(&self, request: &FastRequest<'_>, answers: &mut ResponseBuffer<'_>) -> FastOutcome;
}

/// A service that gets every request by way of hyper.
#[derive(Debug, Clone)]
pub struct SlowPathOnly<S>(pub S);

impl<S> FastPath for SlowPathOnly<S> {
    fn respond_fast(&self, _: &FastRequest<'_>, _: &mut ResponseBuffer<'_>) -> FastOutcome {
        FastOutcome::NotHandled
    }
}

impl<R, S: hyper::service::Service<R>> hyper::service::Service<R> for SlowPathOnly<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn call(&self, request: R) -> S::Future {
        self.0.call(request)
    }
}

/// What became of a plain request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FastOutcome {
    /// It has its answer.
    Written,
    /// There is no room for its answer before the others are sent.
    BufferFull,
    /// It has to take the long way.
    NotHandled,
}

/// Answers to requests that came together, from their heads until all are sent or given up: then their time is taken
/// and their keys are wiped.
pub struct ResponseBuffer<'a> {
    /// Never grows, which would leave keys behind.
    bytes: Vec<u8>,
    sent: usize,
    count: usize,
    started: Instant,
    metrics: &'a Metrics,
}

thread_local! {
    /// Room for answers: wiped, empty, and there while no answers are. To ask the allocator for each cost more than all
    /// that is written into it.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Makes the calling thread's room for answers.
pub fn reserve() {
    SPARE.set(Vec::with_capacity(WRITE_BUFFER));
}

impl fmt::Debug for ResponseBuffer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Answers({}, {} of {} bytes sent)", self.count, self.sent, self.bytes.len())
    }
}

impl<'a> ResponseBuffer<'a> {
    fn start(metrics: &'a Metrics) -> Self {
        let spare = SPARE.take();
        let bytes = if spare.capacity() < WRITE_BUFFER { Vec::with_capacity(WRITE_BUFFER) } else { spare };
        Self { bytes, sent: 0, count: 0, started: Instant::now(), metrics }
    }

    /// Whether a key of `length` has room, with its head.
    pub fn have_room(&self, length: KeyLength) -> bool {
        length.bytes() <= (WRITE_BUFFER - self.bytes.len()).saturating_sub(ANSWER_HEAD_MAX) as u64
    }

    /// Adds the answer to `request`, which is for a key of `length`: `head`, a status line and fields, more `fields`, all
    /// with their line's end, and the key that `draw` makes.
    ///
    /// # Errors
    /// That of `draw`; nothing is added then.
    ///
    /// # Panics
    /// Without room for it, or with a `head` and `fields` of more than 896 bytes.
    pub fn add<E>(
        &mut self,
        request: &FastRequest<'_>,
        length: KeyLength,
        head: &str,
        fields: &str,
        generate: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        assert!(self.have_room(length) && head.len() + fields.len() <= HEADERS_MAX, "an answer has room");
        let bytes = &mut self.bytes;
        let start = bytes.len();
        let end = if request.closes { "connection: close\r\n" } else { "" };
        // A length has one form, so its text is good for the answer, too.
        for part in [head, fields, end, "content-length: ", request.length, "\r\ndate: "] {
            bytes.extend_from_slice(part.as_bytes());
        }
        bytes.extend_from_slice(&date(self.started));
        bytes.extend_from_slice(b"\r\n\r\n");
        let key = bytes.len();
        bytes.resize(key + usize::try_from(length.bytes()).unwrap_or(0), 0);
        let generated = generate(&mut bytes[key..]);
        match generated {
            Ok(()) => {
                self.count += 1;
                self.metrics.requests_in_flight.inc();
            }
            Err(_) => bytes.truncate(start),
        }
        generated
    }

    /// Sends them; `last` says that the connection ends with them.
    fn poll_send<I: Transport + Unpin>(
        &mut self,
        io: &mut I,
        last: bool,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while self.sent < self.bytes.len() {
            let (io, rest) = (Pin::new(&mut *io), &self.bytes[self.sent..]);
            match ready!(if last { io.poll_write_last(cx, rest) } else { io.poll_write(cx, rest) })? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => self.sent += sent,
            }
        }
        Pin::new(io).poll_flush(cx)
    }
}

impl Drop for ResponseBuffer<'_> {
    fn drop(&mut self) {
        self.bytes.as_mut_slice().zeroize();
        self.bytes.clear();
        keep_lower(&SPARE, &mut self.bytes);
        let took = self.started.elapsed();
        for _ in 0..self.count {
            self.metrics.requests_in_flight.dec();
            self.metrics.finished(Endpoint::Key, took);
        }
    }
}

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
        (Rewind { unread, at: 0, io: &mut self.io, exchange, is_streaming: false }, &self.service)
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
        if answers.count > 0 {
            self.has_answered = true;
            self.last_used = answers.started;
            self.answers = Some(answers);
        }
    }
}

/// Any stream.
trait Io: AsyncRead + Transport + Send + Unpin {}

impl<I: AsyncRead + Transport + Send + Unpin> Io for I {}

/// How far hyper is with the requests that it was lent a connection for.
#[derive(Debug, Default)]
pub struct Exchange {
    /// A request was read.
    is_started: AtomicBool,
    /// A request had a body, so hyper alone knows where the next one begins.
    has_body: AtomicBool,
    /// Hyper asks for a request after those that it has answered.
    wants_more: AtomicBool,
    /// Something was written that may not be with the kernel yet.
    is_unflushed: AtomicBool,
    /// Bytes written since the last request was read.
    written: AtomicUsize,
    /// The connection has begun to end.
    is_ending: AtomicBool,
}

impl Exchange {
    /// Notes that a request was read.
    pub fn start(&self, has_body: bool) {
        self.is_started.store(true, Ordering::Relaxed);
        self.has_body.fetch_or(has_body, Ordering::Relaxed);
        self.written.store(0, Ordering::Relaxed);
    }

    /// Whether a request was read.
    pub fn is_started(&self) -> bool {
        self.is_started.load(Ordering::Relaxed)
    }

    /// Whether so much of a response was written that it must have a permit. It has none while the connection ends.
    pub fn is_streaming(&self) -> bool {
        self.written.load(Ordering::Relaxed) >= STREAMING_MIN && !self.is_ending.load(Ordering::Relaxed)
    }

    /// Whether every request that was read is answered and every answer sent.
    pub fn is_over(&self) -> bool {
        self.wants_more.load(Ordering::Relaxed) && !self.is_unflushed.load(Ordering::Relaxed)
    }
}

/// A stream that yields already-read bytes first. It is one type whatever the stream is: hyper would be in the binary
/// once for each. It reads little at a time, so that hyper's buffer does not grow beyond what one request needs.
pub struct Rewind<'a> {
    unread: Vec<u8>,
    at: usize,
    io: &'a mut dyn Io,
    exchange: &'a Exchange,
    is_streaming: bool,
}

impl Rewind<'_> {
    /// What was read before and hyper did not take. The stream is as it was lent.
    pub fn finish(self) -> Vec<u8> {
        if self.is_streaming {
            self.io.set_sending(Sending::Short);
        }
        self.unread[self.at..].to_vec()
    }

    /// Before each write: lets the kernel hold as much as the response needs.
    fn prepare(&mut self) {
        let is_streaming = self.exchange.is_streaming();
        if is_streaming != self.is_streaming {
            self.is_streaming = is_streaming;
            self.io.set_sending(if is_streaming { Sending::Stream } else { Sending::Short });
        }
    }

    fn note(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.exchange.is_unflushed.store(true, Ordering::Relaxed);
        if let Poll::Ready(Ok(count)) = written {
            self.exchange.written.fetch_add(count, Ordering::Relaxed);
        }
        written
    }
}

impl AsyncRead for Rewind<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let unread = &this.unread[this.at..];
        if unread.is_empty() {
            // Without a body to read, and while its client may close its sending side, hyper reads only for a request.
            if this.exchange.is_started() && !this.exchange.has_body.load(Ordering::Relaxed) {
                this.exchange.wants_more.store(true, Ordering::Relaxed);
                return Poll::Pending;
            }
            // It has begun, or has a body; after a body, only hyper knows whether the next one has.
            this.io.expect_head();
            let few = buf.remaining().min(READ_BUFFER);
            let mut few = ReadBuf::new(buf.initialize_unfilled_to(few));
            ready!(Pin::new(&mut *this.io).poll_read(cx, &mut few))?;
            let read = few.filled().len();
            buf.advance(read);
            return Poll::Ready(Ok(()));
        }
        let size = unread.len().min(buf.remaining()).min(READ_BUFFER);
        buf.put_slice(&unread[..size]);
        this.at += size;
        if this.at == this.unread.len() {
            (this.unread, this.at) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Rewind<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.prepare();
        let written = Pin::new(&mut *this.io).poll_write(cx, buf);
        this.note(written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.prepare();
        let written = Pin::new(&mut *this.io).poll_write_vectored(cx, bufs);
        this.note(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut *this.io).poll_flush(cx))?;
        this.exchange.is_unflushed.store(false, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.exchange.is_ending.store(true, Ordering::Relaxed);
        Pin::new(&mut *this.io).poll_shutdown(cx)
    }
}

/// The time at `now`, which has just been, as RFC 9110 section 5.6.7 writes it. Each thread asks for it and writes it once
/// a second, so a step of the clock shows within one.
fn date(now: Instant) -> [u8; 29] {
    thread_local! {
        /// With when it has to be written anew.
        static WRITTEN: Cell<Option<(Instant, [u8; 29])>> = const { Cell::new(None) };
    }
    if let Some((end, date)) = WRITTEN.get()
        && now < end
    {
        return date;
    }
    let time = SystemTime::now();
    let second = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().subsec_nanos();
    let mut date = [0; 29];
    write!(&mut date[..], "{}", httpdate::HttpDate::from(time)).expect("an HTTP date has 29 bytes");
    WRITTEN.set(Some((now + Duration::from_secs(1) - Duration::from_nanos(second.into()), date)));
    date
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::peer::Client;
    use crate::server::buffers::BufferLimit;
    use crate::server::idle::IdleConnections;
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

    fn plain(length: &str) -> Head<'_> {
        Head::Plain(FastRequest { length, closes: false }, 0)
    }

    /// What a head is read as, without its size.
    fn read(head: &str) -> Head<'_> {
        match Head::read(head.as_bytes()) {
            Head::Plain(request, size) => {
                assert_eq!(size, head.len());
                Head::Plain(request, 0)
            }
            other => other,
        }
    }

    #[test]
    fn a_plain_head_is_one_that_says_nothing_but_a_length() {
        assert_eq!(read("GET /key/32 HTTP/1.1\r\nHost: a\r\n\r\n"), plain("32"));
        assert_eq!(read("GET /key/ HTTP/1.1\r\nHost: a\r\n\r\n"), plain(""));
        let usual =
            "User-Agent: curl/8.14.1\r\nAccept: */*\r\nAccept-Encoding: gzip\r\nConnection: keep-alive\r\n";
        assert_eq!(read(&format!("GET /key/7 HTTP/1.1\r\nhost: a:1123\r\n{usual}\r\n")), plain("7"));
        assert_eq!(
            read("GET /key/7 HTTP/1.1\r\nHOST: [::1]:80\r\nCONNECTION: close\r\n\r\n"),
            Head::Plain(FastRequest { length: "7", closes: true }, 0)
        );
        let fields = (1..FIELDS_MAX).map(|n| format!("x-{n}: 1\r\n")).collect::<String>();
        assert_eq!(read(&format!("GET /key/7 HTTP/1.1\r\nHost: a\r\n{fields}\r\n")), plain("7"));
    }

    #[test]
    fn whatever_else_a_head_says_is_not_for_here() {
        for field in [
            "Host: b",
            "Accept: text/plain",
            "Accept: */*;q=0",
            "Authorization: Bearer x",
            "Connection: upgrade",
            "Connection: Close",
            "connection: close, x",
            "Content-Length: 0",
            "Expect: 100-continue",
            "FORWARDED: for=1.2.3.4",
            "Transfer-Encoding: chunked",
            "transfer-encoding: identity",
            "Upgrade: h2c",
            "X-Forwarded-For: 1.2.3.4",
            "folded: a\r\n b",
            "no colon",
            "space : a",
        ] {
            assert_eq!(
                read(&format!("GET /key/7 HTTP/1.1\r\nHost: a\r\n{field}\r\n\r\n")),
                Head::Other,
                "{field}"
            );
        }
        for line in [
            "GET /key/7 HTTP/1.0",
            "GET /key/7 HTTP/2.0",
            "GET  /key/7 HTTP/1.1",
            "HEAD /key/7 HTTP/1.1",
            "get /key/7 HTTP/1.1",
            "GET /password/7 HTTP/1.1",
            "GET http://a/key/7 HTTP/1.1",
            "\r\nGET /key/7 HTTP/1.1",
        ] {
            assert_eq!(read(&format!("{line}\r\nHost: a\r\n\r\n")), Head::Other, "{line}");
        }
        assert_eq!(read("GET /key/7 HTTP/1.1\r\n\r\n"), Head::Other, "no host");
        assert_eq!(read("GET /key/7 HTTP/1.1\r\nHost: a/b\r\n\r\n"), Head::Other);
        let many = "x: 1\r\n".repeat(FIELDS_MAX);
        assert_eq!(read(&format!("GET /key/7 HTTP/1.1\r\nHost: a\r\n{many}\r\n")), Head::Other);
        let long = "x".repeat(HEAD_MAX);
        assert_eq!(read(&format!("GET /key/7 HTTP/1.1\r\nHost: a\r\nx: {long}\r\n\r\n")), Head::Other);
        assert_eq!(
            read(&format!("GET /key/7 HTTP/1.1\r\nHost: a\r\nx: {long}")),
            Head::Other,
            "it will not be shorter"
        );
    }

    #[test]
    fn every_beginning_of_a_plain_head_may_become_one() {
        let head = "GET /key/32 HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n";
        for end in 0..head.len() {
            assert_eq!(read(&head[..end]), Head::Partial, "{end} bytes");
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

    #[test]
    fn a_date_is_written_as_rfc_9110_has_it_and_anew_each_second() {
        let read = |now| httpdate::parse_http_date(std::str::from_utf8(&date(now)).unwrap()).unwrap();
        let now = Instant::now();
        let first = read(now);
        assert!(first.elapsed().is_ok_and(|age| age < Duration::from_secs(2)), "{first:?}");
        assert_eq!(read(now), first);
        std::thread::sleep(Duration::from_secs(1));
        assert!(read(Instant::now()) > first);
    }
}
