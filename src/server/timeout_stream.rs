//! A stream with timeouts for slow and idle clients. It is below hyper, which has no timeout for a stalled write and
//! would restart a timer for every request.

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

/// How often a blocked write is retried. The kernel wakes a writer only once half of the bytes it holds are sent, which
/// takes a slow client minutes. It accepts a few more bytes much earlier, as soon as the client has acknowledged as
/// many.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The most bytes of one write to a client that is not known to be fast. The client has to acknowledge as many before
/// the next write succeeds, within the write timeout. A key of 4 KiB and its headers fit.
pub(crate) const WRITE_MAX: usize = 5 * 1024;

/// A client is fast once it has taken so many bytes of a streamed response without a wait of [`RETRY_INTERVAL`]. The
/// buffers of both kernels hold less, so a slow client never appears fast.
const FAST_CLIENT_MIN: usize = 512 * 1024;

/// What a connection reads next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// The first byte of a request after a response: the idle timeout applies.
    Idle,
    /// The rest of a request's headers. The head timeout starts with the next wait.
    HeadBegun,
    /// The rest of a request's headers, with the head timeout running.
    Head,
}

/// A stream whose reads and writes fail with `TimedOut` after their timeouts.
#[derive(Debug)]
pub struct TimeoutStream<S: Transport + Unpin> {
    stream: S,
    timeouts: Arc<Timeouts>,
    /// The start of the current timeout: when the connection began, a write last made progress, or a read first waited
    /// for the rest of a request.
    since: Instant,
    reading: Reading,
    /// When a blocked write was last tried.
    last_try: Option<Instant>,
    /// Whether the last write was a retry that the kernel accepted.
    was_retry: bool,
    send_mode: SendMode,
    /// Bytes written since a write last waited for [`RETRY_INTERVAL`].
    unblocked_bytes: usize,
    resets_on_close: AtomicBool,
    /// Whether the kernel may hold much of a response that the client has not taken.
    may_have_unsent: bool,
    /// When the sending side was shut down, if the stream lingers after that.
    shut_down_at: Option<Instant>,
    /// One timer for the life of the connection. It is reset when it fires or would fire too late, not for each
    /// request.
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S: Transport + Unpin> TimeoutStream<S> {
    /// Wraps `stream` and starts the head timeout.
    pub fn new(stream: S, timeouts: Arc<Timeouts>) -> Self {
        Self {
            stream,
            timeouts,
            since: Instant::now(),
            reading: Reading::Head,
            last_try: None,
            was_retry: false,
            send_mode: SendMode::Short,
            unblocked_bytes: 0,
            resets_on_close: AtomicBool::new(false),
            may_have_unsent: false,
            shut_down_at: None,
            timer: None,
        }
    }

    /// The stream without timeouts.
    pub fn get_ref(&self) -> &S {
        &self.stream
    }

    /// The timeouts.
    pub fn timeouts(&self) -> &Timeouts {
        &self.timeouts
    }

    /// Ready at `deadline`. Until then, the task is woken no later than that.
    fn poll_deadline(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let mut is_set = self.timer.is_some();
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if timer.deadline() > deadline {
            timer.as_mut().reset(deadline);
            is_set = false;
        }
        // A connection has one task, whose waker stays the same: the timer has it after the first poll.
        while !is_set || timer.is_elapsed() {
            // Pending although the timer has elapsed, if the task's budget is used up (tokio::task::coop): then the
            // runtime polls the task again.
            ready!(timer.as_mut().poll(cx));
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            timer.as_mut().reset(deadline);
            is_set = false;
        }
        Poll::Pending
    }

    /// Ready with an error once the head or idle timeout has passed.
    fn poll_read_timeout(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if self.reading == Reading::HeadBegun {
            (self.since, self.reading) = (Instant::now(), Reading::Head);
        }
        let timeout = match self.reading {
            Reading::Idle => self.timeouts.idle(),
            Reading::HeadBegun | Reading::Head => self.timeouts.head(),
        };
        ready!(self.poll_deadline(cx, self.since + timeout));
        // A client may send a request at the last moment. Closing now would reset the connection with the request
        // unread.
        if self.reading == Reading::Idle && self.stream.has_input() {
            return Poll::Pending; // the runtime is about to report the input
        }
        Poll::Ready(io::ErrorKind::TimedOut.into())
    }

    /// The most bytes of one write.
    fn write_max(&self) -> usize {
        let is_fast = self.send_mode == SendMode::Stream && self.unblocked_bytes >= FAST_CLIENT_MIN;
        if is_fast { usize::MAX } else { WRITE_MAX }
    }

    /// Keeps a shut-down connection open until the client has closed it, too, and acknowledged everything, for at most
    /// the write timeout: a drain that begins meanwhile can still reset it. During a drain, connections that have ended
    /// are watched elsewhere.
    fn poll_linger(&mut self, cx: &mut Context<'_>, shut_down_at: Instant) -> Poll<()> {
        let deadline = shut_down_at + self.timeouts.write();
        while !self.timeouts.keeps_ended_connections() && Instant::now() < deadline {
            let next_check = match self.stream.poll_client_closed(cx) {
                Poll::Ready(true) => break,
                // Nothing wakes the task when the client acknowledges the rest.
                Poll::Ready(false) => Instant::now() + RETRY_INTERVAL,
                Poll::Pending => deadline,
            };
            ready!(self.poll_deadline(cx, deadline.min(next_check)));
        }
        Poll::Ready(())
    }

    /// Completes a write of `bufs` with this `result`: retries a blocked write, fails it after the write timeout, and
    /// records progress.
    fn poll_complete_write(
        &mut self,
        cx: &mut Context<'_>,
        mut result: Poll<io::Result<usize>>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        while result.is_pending() {
            self.may_have_unsent = true;
            // Without a wait after a retry that succeeded: the kernel's buffer is filled first, or each of the next
            // retries would count as progress.
            if !self.was_retry {
                let last_try = *self.last_try.get_or_insert_with(Instant::now);
                let deadline = self.since + self.timeouts.write();
                ready!(self.poll_deadline(cx, (last_try + RETRY_INTERVAL).min(deadline)));
                if self.send_mode == SendMode::Stream && self.unblocked_bytes >= FAST_CLIENT_MIN {
                    self.set_send_mode(SendMode::SlowStream);
                }
                self.unblocked_bytes = 0;
            }
            let first = bufs.iter().find(|buf| !buf.is_empty()).map_or(&[][..], |buf| buf);
            match self.stream.try_write(&first[..first.len().min(WRITE_MAX)]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let now = Instant::now();
                    (self.last_try, self.was_retry) = (Some(now), false);
                    if now >= self.since + self.timeouts.write() {
                        // An orderly close would leave up to megabytes of key bytes in the kernel for each connection,
                        // for as long as the client acknowledges and does not read.
                        self.reset_on_close();
                        result = Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                    }
                }
                retried => {
                    self.was_retry = true;
                    result = Poll::Ready(retried);
                }
            }
        }
        self.last_try = None;
        self.since = Instant::now();
        self.reading = Reading::Idle;
        if let Poll::Ready(Ok(count)) = result {
            self.unblocked_bytes = self.unblocked_bytes.saturating_add(count);
            if self.send_mode == SendMode::SlowStream && self.unblocked_bytes >= FAST_CLIENT_MIN {
                self.set_send_mode(SendMode::Stream);
            }
        }
        result
    }
}

/// The end of a drain drops a connection at any point.
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
            // No read timeout while a response waits for the client.
            Poll::Pending if this.last_try.is_none() => {
                let error = ready!(this.poll_read_timeout(cx));
                Poll::Ready(Err(error))
            }
            result => {
                if this.reading == Reading::Idle && buf.filled().len() > before {
                    // A client that sends a request most often has the previous response.
                    (this.reading, this.may_have_unsent) = (Reading::HeadBegun, false);
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
        this.poll_complete_write(cx, result, &[IoSlice::new(buf)])
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
            return this.poll_complete_write(cx, result, bufs);
        }
        let mut parts = [IoSlice::new(&[]); 4];
        for (part, buf) in parts.iter_mut().zip(bufs) {
            let size = buf.len().min(room);
            *part = IoSlice::new(&buf[..size]);
            room -= size;
        }
        let result = Pin::new(&mut this.stream).poll_write_vectored(cx, &parts);
        this.poll_complete_write(cx, result, &parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.shut_down_at.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
            // Most connections have nothing unsent when they end, and need not linger.
            this.shut_down_at = this.may_have_unsent.then(Instant::now);
        }
        this.shut_down_at.map_or(Poll::Ready(()), |at| this.poll_linger(cx, at)).map(Ok)
    }
}

impl<S: Transport + Unpin> Transport for TimeoutStream<S> {
    fn poll_write_final(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if buf.len() > this.write_max() {
            return Pin::new(this).poll_write(cx, buf);
        }
        let result = Pin::new(&mut this.stream).poll_write_final(cx, buf);
        this.poll_complete_write(cx, result, &[IoSlice::new(buf)])
    }

    fn expect_head(&mut self) {
        if self.reading == Reading::Idle {
            self.reading = Reading::HeadBegun;
        }
    }

    fn reset_on_close(&self) {
        self.resets_on_close.store(true, Ordering::Relaxed);
        self.stream.reset_on_close();
    }

    fn resets_on_close(&self) -> bool {
        self.resets_on_close.load(Ordering::Relaxed) || self.timeouts.resets_connections()
    }

    fn set_send_mode(&mut self, mode: SendMode) {
        (self.send_mode, self.unblocked_bytes) = (mode, 0);
        self.may_have_unsent |= mode != SendMode::Short;
        self.stream.set_send_mode(mode);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    const HEAD: Duration = Duration::from_secs(10);
    const IDLE: Duration = Duration::from_secs(75);
    const WRITE: Duration = Duration::from_secs(15);

    /// A stream with timeouts, its client, and the timeouts.
    fn pair() -> (TimeoutStream<DuplexStream>, DuplexStream, Arc<Timeouts>) {
        let (stream, client) = duplex(64);
        let timeouts = Arc::new(Timeouts::new(HEAD, IDLE, WRITE));
        (TimeoutStream::new(stream, Arc::clone(&timeouts)), client, timeouts)
    }

    async fn sleep_seconds(count: u64) {
        tokio::time::sleep(Duration::from_secs(count)).await;
    }

    /// On a thread of its own, because a regression would loop forever.
    #[test]
    fn an_elapsed_deadline_yields_when_the_task_budget_is_used_up() {
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
                let (mut stream, _client, _) = pair();
                let deadline = Instant::now() + HEAD;
                let mut is_pending = |cx: &mut Context<'_>| stream.poll_deadline(cx, deadline).is_pending();
                sender.send(poll_fn(|cx| Poll::Ready(is_pending(cx))).await).unwrap();
                tokio::time::advance(HEAD).await;
                let without_budget = poll_fn(|cx| {
                    while has_budget_remaining() {
                        let _ = std::pin::pin!(consume_budget()).poll(cx);
                    }
                    Poll::Ready(is_pending(cx))
                });
                sender.send(without_budget.await).unwrap();
                tokio::task::yield_now().await;
                sender.send(poll_fn(|cx| Poll::Ready(is_pending(cx))).await).unwrap();
            });
        });
        for is_pending in [true, true, false] {
            assert_eq!(results.recv_timeout(Duration::from_secs(60)), Ok(is_pending));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn slow_bytes_do_not_extend_the_head_timeout() {
        let (mut stream, mut client, _) = pair();
        let start = Instant::now();
        let sending = async {
            loop {
                client.write_all(b"x").await.unwrap();
                sleep_seconds(4).await;
            }
        };
        let reading = async { while stream.read_u8().await.is_ok() {} };
        tokio::select! { () = sending => {}, () = reading => {} }
        assert_eq!(start.elapsed(), HEAD);
    }

    #[tokio::test(start_paused = true)]
    async fn the_idle_timeout_runs_from_response_to_next_request() {
        let (mut stream, mut client, _) = pair();
        let start = Instant::now();
        for _ in 0..3 {
            sleep_seconds(9).await;
            client.write_all(b"x").await.unwrap();
            stream.read_u8().await.unwrap();
            stream.write_all(b"y").await.unwrap();
        }
        let error = stream.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(start.elapsed(), Duration::from_secs(27) + IDLE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_begun_request_has_the_head_timeout() {
        let (mut stream, mut client, _) = pair();
        for has_unread in [false, true] {
            stream.write_all(b"y").await.unwrap();
            let start = Instant::now();
            let sending = async {
                sleep_seconds(70).await;
                client.write_all(b"x").await.unwrap();
                std::future::pending::<()>().await;
            };
            let reading = async {
                if has_unread {
                    stream.expect_head(); // the first bytes came with the previous request
                } else {
                    stream.read_u8().await.unwrap();
                }
                stream.read_u8().await.unwrap_err()
            };
            let error = tokio::select! { error = reading => error, () = sending => unreachable!() };
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            let began = if has_unread { 0 } else { 70 };
            assert_eq!(start.elapsed(), Duration::from_secs(began) + HEAD);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_without_progress_times_out() {
        let (mut stream, mut client, _) = pair();
        let start = Instant::now();
        let reading = async {
            sleep_seconds(12).await;
            client.read_exact(&mut [0; 10]).await.unwrap();
            std::future::pending::<()>().await;
        };
        let error = tokio::select! { result = stream.write_all(&[0; 200]) => result.unwrap_err(), () = reading => unreachable!() };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(start.elapsed(), Duration::from_secs(12) + WRITE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_shortened_timeout_applies_from_the_next_poll() {
        let (mut stream, mut client, timeouts) = pair();
        let start = Instant::now();
        let sending = async {
            sleep_seconds(3).await;
            timeouts.shorten_read_timeouts(Duration::from_secs(5));
            client.write_all(b"x").await.unwrap();
            std::future::pending::<()>().await;
        };
        let reading = async { while stream.read_u8().await.is_ok() {} };
        tokio::select! { () = sending => {}, () = reading => {} }
        assert_eq!(start.elapsed(), Duration::from_secs(5));
    }

    /// A stream that is never reported as writable while it is full, and accepts bytes when a write is tried.
    #[derive(Debug, Default)]
    struct FakeSocket {
        writes: Vec<usize>,
        is_full: bool,
        modes: Vec<SendMode>,
    }

    impl AsyncWrite for FakeSocket {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            let this = self.get_mut();
            if this.is_full {
                return Poll::Pending;
            }
            this.writes.push(buf.len());
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    impl Transport for FakeSocket {
        fn try_write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.writes.push(buf.len());
            Ok(buf.len())
        }

        fn reset_on_close(&self) {}

        fn set_send_mode(&mut self, mode: SendMode) {
            self.modes.push(mode);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn writes_are_large_only_while_the_client_is_fast() {
        const LARGE: usize = 64 * 1024;
        let timeouts = Arc::new(Timeouts::new(HEAD, IDLE, WRITE));
        let mut stream = TimeoutStream::new(FakeSocket::default(), timeouts);
        let large = vec![0; LARGE];
        stream.write_all(&large).await.unwrap();
        assert!(stream.get_ref().writes.iter().all(|size| *size <= WRITE_MAX), "a short response");
        stream.set_send_mode(SendMode::Stream);
        for _ in 0..2 * FAST_CLIENT_MIN / LARGE {
            stream.write_all(&large).await.unwrap();
        }
        let writes = std::mem::take(&mut stream.stream.writes);
        assert_eq!(writes[0], WRITE_MAX);
        assert_eq!(writes.last(), Some(&LARGE), "the client has taken much without a wait");
        stream.stream.is_full = true;
        let start = Instant::now();
        stream.write_all(&large).await.unwrap();
        assert_eq!(start.elapsed(), RETRY_INTERVAL, "the retries after the first do not wait");
        assert!(stream.get_ref().writes.iter().all(|size| *size <= WRITE_MAX));
        assert_eq!(stream.get_ref().modes, [SendMode::Stream, SendMode::SlowStream]);
    }
}
