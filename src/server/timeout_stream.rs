//! A connection that ends when its client keeps it waiting too long. It sits below hyper, which has no deadline for a
//! stalled write and would set a timer anew for every request.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::server::timeouts::Timeouts;
use crate::server::transport::{SendMode, Transport};

/// How often a blocked write is tried again. The kernel wakes a writer only once half of what it holds is sent, which
/// takes a slow client minutes; it takes a few more bytes long before that, as soon as the client has acknowledged as many.
const RETRY: Duration = Duration::from_secs(1);

/// The most bytes of one write to a client that is not known to be fast: so much has to be acknowledged before the next
/// write succeeds, which has to happen within the write timeout. A key of 4 KiB and its header fit.
pub const WRITE_MAX: usize = 5 * 1024;

/// A client is fast once it has taken so many bytes of a streamed response without a wait of [`RETRY`]. The buffers of both
/// kernels hold less, so a slow client never is.
const FAST_MIN: usize = 512 * 1024;

/// What a connection waits for while it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Awaiting {
    /// The first byte of a request, after a response.
    Request,
    /// The rest of its headers. Since when is noted once it waits.
    Begun,
    /// The same, since a time that is known.
    Head,
}

/// A stream whose reads and writes fail with `TimedOut` when their time is over.
#[derive(Debug)]
pub struct TimeoutStream<S: Transport + Unpin> {
    stream: S,
    timeouts: Arc<Timeouts>,
    /// What the deadlines count from: the start of the connection, the last progress of a write, or the first wait for the
    /// rest of a request.
    since: Instant,
    awaiting: Awaiting,
    /// When a write that waits was last tried.
    blocked: Option<Instant>,
    /// Whether the last write was a retry that the kernel took.
    is_retrying: bool,
    sending: SendMode,
    /// Bytes written since a write last waited for long.
    quickly: usize,
    resets_on_close: AtomicBool,
    /// Whether the kernel may hold much of a response that its client has not taken.
    may_have_unsent: bool,
    /// Since when the sending side is shut down.
    ended: Option<Instant>,
    /// One timer for the life of the connection. It is set anew only when it fires or would fire too late, never for
    /// a request.
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S: Transport + Unpin> TimeoutStream<S> {
    /// Starts the clock.
    pub fn new(stream: S, timeouts: Arc<Timeouts>) -> Self {
        Self {
            stream,
            timeouts,
            since: Instant::now(),
            awaiting: Awaiting::Head,
            blocked: None,
            is_retrying: false,
            sending: SendMode::Short,
            quickly: 0,
            resets_on_close: AtomicBool::new(false),
            may_have_unsent: false,
            ended: None,
            timer: None,
        }
    }

    /// The stream itself, for what needs no deadline.
    pub fn get_ref(&self) -> &S {
        &self.stream
    }

    /// What the client is held to.
    pub fn timeouts(&self) -> &Timeouts {
        &self.timeouts
    }

    /// Ready at `deadline`; else the task is woken when it may have come.
    fn poll_deadline(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let mut is_set = self.timer.is_some();
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if timer.deadline() > deadline {
            timer.as_mut().reset(deadline);
            is_set = false;
        }
        // A connection is one task's, whose waker stays the same: once the timer has it, it need not be polled again.
        while !is_set || timer.is_elapsed() {
            // Pending, although it has elapsed, where the task's turn is over (tokio::task::coop): then the runtime polls again.
            ready!(timer.as_mut().poll(cx));
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            timer.as_mut().reset(deadline);
            is_set = false;
        }
        Poll::Pending
    }

    /// Waits for the request that the client may send, or for the rest of it.
    fn poll_overdue(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if self.awaiting == Awaiting::Begun {
            (self.since, self.awaiting) = (Instant::now(), Awaiting::Head);
        }
        let limit = match self.awaiting {
            Awaiting::Request => self.timeouts.idle(),
            Awaiting::Begun | Awaiting::Head => self.timeouts.head(),
        };
        ready!(self.poll_deadline(cx, self.since + limit));
        // A client may use its connection at the last moment. Closed now, it would be reset with a request unread.
        if self.awaiting == Awaiting::Request && self.stream.has_input() {
            return Poll::Pending; // the runtime is about to say so
        }
        Poll::Ready(io::ErrorKind::TimedOut.into())
    }

    /// How many bytes one write may have.
    fn write_max(&self) -> usize {
        let is_fast = self.sending == SendMode::Stream && self.quickly >= FAST_MIN;
        if is_fast { usize::MAX } else { WRITE_MAX }
    }

    /// Keeps an ended connection open until its client has closed it too and has all of it, for at most the write timeout:
    /// if the drain comes meanwhile, it can still be reset. The drain itself looks after connections that have ended.
    fn poll_linger(&mut self, cx: &mut Context<'_>, ended: Instant) -> Poll<()> {
        let end = ended + self.timeouts.write();
        while !self.timeouts.keeps_ended_connections() && Instant::now() < end {
            let next_look = match self.stream.poll_client_closed(cx) {
                Poll::Ready(true) => break,
                // Nothing wakes the task when the client takes the rest.
                Poll::Ready(false) => Instant::now() + RETRY,
                Poll::Pending => end,
            };
            ready!(self.poll_deadline(cx, end.min(next_look)));
        }
        Poll::Ready(())
    }

    /// Notes what became of a write of `bufs`.
    fn written(
        &mut self,
        cx: &mut Context<'_>,
        mut result: Poll<io::Result<usize>>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        while result.is_pending() {
            self.may_have_unsent = true;
            // After a retry that the kernel took, it is filled at once, or each of the next would pass for progress.
            if !self.is_retrying {
                let tried = *self.blocked.get_or_insert_with(Instant::now);
                ready!(self.poll_deadline(cx, (tried + RETRY).min(self.since + self.timeouts.write())));
                if self.sending == SendMode::Stream && self.quickly >= FAST_MIN {
                    self.set_send_mode(SendMode::SlowStream);
                }
                self.quickly = 0;
            }
            let first = bufs.iter().find(|buf| !buf.is_empty()).map_or(&[][..], |buf| buf);
            match self.stream.try_write(&first[..first.len().min(WRITE_MAX)]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let now = Instant::now();
                    (self.blocked, self.is_retrying) = (Some(now), false);
                    if now >= self.since + self.timeouts.write() {
                        // Closed in order, its key bytes would stay in the kernel, megabytes a connection, for as long
                        // as the client acknowledges and does not read.
                        self.reset_on_close();
                        result = Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                    }
                }
                tried => {
                    self.is_retrying = true;
                    result = Poll::Ready(tried);
                }
            }
        }
        self.blocked = None;
        self.since = Instant::now();
        self.awaiting = Awaiting::Request;
        if let Poll::Ready(Ok(count)) = result {
            self.quickly = self.quickly.saturating_add(count);
            if self.sending == SendMode::SlowStream && self.quickly >= FAST_MIN {
                self.set_send_mode(SendMode::Stream);
            }
        }
        result
    }
}

/// At the end of the drain a connection is dropped wherever it is.
impl<S: Transport + Unpin> Drop for TimeoutStream<S> {
    fn drop(&mut self) {
        if self.resets_on_close() {
            self.stream.reset_on_close();
        } else if self.timeouts.keeps_ended_connections()
            && let Some(connection) = self.stream.shutdown_and_duplicate()
        {
            self.timeouts.ended_connections().add(connection);
        }
    }
}

impl<S: AsyncRead + Transport + Unpin> AsyncRead for TimeoutStream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        match Pin::new(&mut this.stream).poll_read(cx, buf) {
            // While an answer waits for its reader, no request is owed.
            Poll::Pending if this.blocked.is_none() => {
                let error = ready!(this.poll_overdue(cx));
                Poll::Ready(Err(error))
            }
            result => {
                if this.awaiting == Awaiting::Request && buf.filled().len() > before {
                    // Its client has the response before, most often.
                    (this.awaiting, this.may_have_unsent) = (Awaiting::Begun, false);
                }
                result
            }
        }
    }
}

impl<S: Transport + Unpin> AsyncWrite for TimeoutStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let buf = &buf[..buf.len().min(this.write_max())];
        let result = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.written(cx, result, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let mut room = this.write_max();
        if room == usize::MAX {
            let result = Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
            return this.written(cx, result, bufs);
        }
        let mut few = [IoSlice::new(&[]); 4];
        for (few, buf) in few.iter_mut().zip(bufs) {
            let size = buf.len().min(room);
            *few = IoSlice::new(&buf[..size]);
            room -= size;
        }
        let result = Pin::new(&mut this.stream).poll_write_vectored(cx, &few);
        this.written(cx, result, &few)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.ended.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
            // Most connections have sent all that they had when they end.
            this.ended = this.may_have_unsent.then(Instant::now);
        }
        this.ended.map_or(Poll::Ready(()), |ended| this.poll_linger(cx, ended)).map(Ok)
    }
}

impl<S: Transport + Unpin> Transport for TimeoutStream<S> {
    fn poll_write_final(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if buf.len() > this.write_max() {
            return Pin::new(this).poll_write(cx, buf);
        }
        let result = Pin::new(&mut this.stream).poll_write_final(cx, buf);
        this.written(cx, result, &[IoSlice::new(buf)])
    }

    fn expect_head(&mut self) {
        if self.awaiting == Awaiting::Request {
            self.awaiting = Awaiting::Begun;
        }
    }

    fn reset_on_close(&self) {
        self.resets_on_close.store(true, Ordering::Relaxed);
        self.stream.reset_on_close();
    }

    fn resets_on_close(&self) -> bool {
        self.resets_on_close.load(Ordering::Relaxed) || self.timeouts.resets_connections()
    }

    fn set_send_mode(&mut self, sending: SendMode) {
        (self.sending, self.quickly) = (sending, 0);
        self.may_have_unsent |= sending != SendMode::Short;
        self.stream.set_send_mode(sending);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    const HEAD: Duration = Duration::from_secs(10);
    const IDLE: Duration = Duration::from_secs(75);
    const WRITE: Duration = Duration::from_secs(15);

    fn pair() -> (TimeoutStream<DuplexStream>, DuplexStream, Arc<Timeouts>) {
        let (ours, theirs) = duplex(64);
        let timeouts = Arc::new(Timeouts::new(HEAD, IDLE, WRITE));
        (TimeoutStream::new(ours, Arc::clone(&timeouts)), theirs, timeouts)
    }

    async fn seconds(count: u64) {
        tokio::time::sleep(Duration::from_secs(count)).await;
    }

    /// On a thread of its own, which the wrong code would never give back.
    #[test]
    fn a_deadline_that_has_come_does_not_hold_a_task_whose_turn_is_over() {
        use std::future::poll_fn;
        use tokio::task::coop::{consume_budget, has_budget_remaining};
        let (sender, results) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .start_paused(true)
                .build()
                .unwrap();
            runtime.block_on(async {
                let (mut ours, _theirs, _) = pair();
                let deadline = Instant::now() + HEAD;
                let mut is_pending = |cx: &mut Context<'_>| ours.poll_deadline(cx, deadline).is_pending();
                sender.send(poll_fn(|cx| Poll::Ready(is_pending(cx))).await).unwrap();
                tokio::time::advance(HEAD).await;
                let at_the_end_of_its_turn = poll_fn(|cx| {
                    while has_budget_remaining() {
                        let _ = std::pin::pin!(consume_budget()).poll(cx);
                    }
                    Poll::Ready(is_pending(cx))
                });
                sender.send(at_the_end_of_its_turn.await).unwrap();
                tokio::task::yield_now().await;
                sender.send(poll_fn(|cx| Poll::Ready(is_pending(cx))).await).unwrap();
            });
        });
        for is_pending in [true, true, false] {
            assert_eq!(results.recv_timeout(Duration::from_secs(60)), Ok(is_pending));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_that_drip_in_do_not_extend_the_head_timeout() {
        let (mut ours, mut theirs, _) = pair();
        let start = Instant::now();
        let dripping = async {
            loop {
                theirs.write_all(b"x").await.unwrap();
                seconds(4).await;
            }
        };
        let reading = async { while ours.read_u8().await.is_ok() {} };
        tokio::select! { () = dripping => {}, () = reading => {} }
        assert_eq!(start.elapsed(), HEAD);
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_response_the_idle_timeout_holds_until_the_next_request_begins() {
        let (mut ours, mut theirs, _) = pair();
        let start = Instant::now();
        for _ in 0..3 {
            seconds(9).await;
            theirs.write_all(b"x").await.unwrap();
            ours.read_u8().await.unwrap();
            ours.write_all(b"y").await.unwrap();
        }
        let error = ours.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(start.elapsed(), Duration::from_secs(27) + IDLE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_has_begun_has_the_head_timeout() {
        let (mut ours, mut theirs, _) = pair();
        for has_unread in [false, true] {
            ours.write_all(b"y").await.unwrap();
            let start = Instant::now();
            let client = async {
                seconds(70).await;
                theirs.write_all(b"x").await.unwrap();
                std::future::pending::<()>().await;
            };
            let reading = async {
                if has_unread {
                    ours.expect_head(); // its beginning came with the request before
                } else {
                    ours.read_u8().await.unwrap();
                }
                ours.read_u8().await.unwrap_err()
            };
            let error = tokio::select! { error = reading => error, () = client => unreachable!() };
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            let began = if has_unread { 0 } else { 70 };
            assert_eq!(start.elapsed(), Duration::from_secs(began) + HEAD);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_makes_no_progress_fails() {
        let (mut ours, mut theirs, _) = pair();
        let start = Instant::now();
        let reading = async {
            seconds(12).await;
            theirs.read_exact(&mut [0; 10]).await.unwrap();
            std::future::pending::<()>().await;
        };
        let error = tokio::select! { result = ours.write_all(&[0; 200]) => result.unwrap_err(), () = reading => unreachable!() };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(start.elapsed(), Duration::from_secs(12) + WRITE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_shortened_timeout_holds_from_the_next_poll_on() {
        let (mut ours, mut theirs, timeouts) = pair();
        let start = Instant::now();
        let nudging = async {
            seconds(3).await;
            timeouts.shorten_read_timeouts(Duration::from_secs(5));
            theirs.write_all(b"x").await.unwrap();
            std::future::pending::<()>().await;
        };
        let reading = async { while ours.read_u8().await.is_ok() {} };
        tokio::select! { () = nudging => {}, () = reading => {} }
        assert_eq!(start.elapsed(), Duration::from_secs(5));
    }

    /// A stream that the kernel never calls writable, and that takes bytes all the same when it is tried.
    #[derive(Debug, Default)]
    struct Reluctant {
        taken: Vec<usize>,
        is_full: bool,
        sending: Vec<SendMode>,
    }

    impl AsyncWrite for Reluctant {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            let this = self.get_mut();
            if this.is_full {
                return Poll::Pending;
            }
            this.taken.push(buf.len());
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    impl Transport for Reluctant {
        fn try_write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.taken.push(buf.len());
            Ok(buf.len())
        }

        fn reset_on_close(&self) {}

        fn set_send_mode(&mut self, sending: SendMode) {
            self.sending.push(sending);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn writes_are_small_until_the_client_is_fast_and_again_once_it_is_slow() {
        const LARGE: usize = 64 * 1024;
        let timeouts = Arc::new(Timeouts::new(HEAD, IDLE, WRITE));
        let mut ours = TimeoutStream::new(Reluctant::default(), timeouts);
        let large = vec![0; LARGE];
        ours.write_all(&large).await.unwrap();
        assert!(ours.get_ref().taken.iter().all(|size| *size <= WRITE_MAX), "a short response");
        ours.set_send_mode(SendMode::Stream);
        for _ in 0..2 * FAST_MIN / LARGE {
            ours.write_all(&large).await.unwrap();
        }
        let taken = std::mem::take(&mut ours.stream.taken);
        assert_eq!(taken[0], WRITE_MAX);
        assert_eq!(taken.last(), Some(&LARGE), "it has taken much without a wait");
        ours.stream.is_full = true;
        let start = Instant::now();
        ours.write_all(&large).await.unwrap();
        assert_eq!(start.elapsed(), RETRY, "then all that it takes");
        assert!(ours.get_ref().taken.iter().all(|size| *size <= WRITE_MAX));
        assert_eq!(ours.get_ref().sending, [SendMode::Stream, SendMode::SlowStream]);
    }
}
