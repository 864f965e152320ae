//! A connection that ends when its client keeps it waiting too long. It sits below hyper, which has no deadline for a
//! stalled write and would set a timer anew for every request.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// How long a client may take; shared by the connections of a server, which may shorten it while they run.
#[derive(Debug)]
pub struct Patience {
    head: AtomicU64,
    write: Duration,
    /// Whether connections that end from now on are reset.
    resets: AtomicBool,
}

impl Patience {
    /// `head`: from the start of the connection, or from the last byte of an answer, until the next request's head is
    /// complete. `write`: for a write that makes no progress.
    pub fn new(head: Duration, write: Duration) -> Self {
        Self { head: AtomicU64::new(millis(head)), write, resets: AtomicBool::new(false) }
    }

    /// Shortens the wait for heads. Connections learn of it when they are next polled.
    pub fn shorten_head(&self, to: Duration) {
        self.head.fetch_min(millis(to), Ordering::Relaxed);
    }

    /// Resets every connection that ends from now on: what a client has of its answer is never taken for all of it.
    pub fn reset_connections(&self) {
        self.resets.store(true, Ordering::Relaxed);
    }

    /// How long a head may take now.
    pub fn head(&self) -> Duration {
        Duration::from_millis(self.head.load(Ordering::Relaxed))
    }
}

/// A stream down to the socket, with what HTTP wants of a socket beside its bytes.
pub trait Transport: AsyncWrite {
    /// Writes as `poll_write` does. What is written may wait for the shutdown, which has to follow, and go with it.
    ///
    /// # Errors
    /// Those of `poll_write`.
    fn poll_write_last(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write(cx, buf)
    }

    /// From now on, closing it forgets what was not sent, and resets the connection.
    fn forget_unsent(&self);

    /// Whether closing it is such a reset, and so not to be announced.
    fn is_reset(&self) -> bool {
        false
    }

    /// Lets the kernel hold more unsent bytes, for a streamed response, or few again.
    fn set_streaming(&mut self, is_streaming: bool);
}

/// In memory there is no kernel that holds anything.
impl Transport for tokio::io::DuplexStream {
    fn forget_unsent(&self) {}

    fn set_streaming(&mut self, _: bool) {}
}

/// A stream whose reads and writes fail with `TimedOut` when patience is at an end.
#[derive(Debug)]
pub struct Timed<S: Transport + Unpin> {
    stream: S,
    patience: Arc<Patience>,
    /// The start of the connection or the last progress of a write: what both deadlines count from.
    since: Instant,
    write_waits: bool,
    is_reset: AtomicBool,
    /// One timer for the life of the connection. It is set anew only when it fires or would fire too late, never for
    /// a request.
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S: Transport + Unpin> Timed<S> {
    /// Starts the clock.
    pub fn new(stream: S, patience: Arc<Patience>) -> Self {
        let (since, is_reset) = (Instant::now(), AtomicBool::new(false));
        Self { stream, patience, since, write_waits: false, is_reset, timer: None }
    }

    /// The stream itself, for what needs no deadline.
    pub fn get_ref(&self) -> &S {
        &self.stream
    }

    /// What the client is held to.
    pub fn patience(&self) -> &Patience {
        &self.patience
    }

    /// Ready when `limit` has passed since the last progress; else the task is woken when it may have.
    fn poll_deadline(&mut self, cx: &mut Context<'_>, limit: Duration) -> Poll<io::Error> {
        let deadline = self.since + limit;
        let mut is_set = self.timer.is_some();
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if timer.deadline() > deadline {
            timer.as_mut().reset(deadline);
        }
        // A connection is one task's, whose waker stays the same: once the timer has it, it need not be polled again.
        while !is_set || timer.is_elapsed() {
            is_set = true;
            if timer.as_mut().poll(cx).is_ready() {
                if Instant::now() >= deadline {
                    return Poll::Ready(io::ErrorKind::TimedOut.into());
                }
                timer.as_mut().reset(deadline);
                is_set = false;
            }
        }
        Poll::Pending
    }
}

impl<S: Transport + Unpin> Timed<S> {
    fn written(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match result {
            Poll::Ready(result) => {
                self.write_waits = false;
                self.since = Instant::now();
                Poll::Ready(result)
            }
            Poll::Pending => {
                self.write_waits = true;
                let error = ready!(self.poll_deadline(cx, self.patience.write));
                // Closed in order, its key bytes would stay in the kernel, megabytes a connection, for as long as the
                // client acknowledges and does not read.
                self.forget_unsent();
                Poll::Ready(Err(error))
            }
        }
    }
}

/// At the end of the drain a connection is dropped wherever it is.
impl<S: Transport + Unpin> Drop for Timed<S> {
    fn drop(&mut self) {
        if self.is_reset() {
            self.stream.forget_unsent();
        }
    }
}

impl<S: AsyncRead + Transport + Unpin> AsyncRead for Timed<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match Pin::new(&mut this.stream).poll_read(cx, buf) {
            // While an answer waits for its reader, no head is owed.
            Poll::Pending if !this.write_waits => {
                let error = ready!(this.poll_deadline(cx, this.patience.head()));
                Poll::Ready(Err(error))
            }
            other => other,
        }
    }
}

impl<S: Transport + Unpin> AsyncWrite for Timed<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.written(cx, result)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
        this.written(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl<S: Transport + Unpin> Transport for Timed<S> {
    fn poll_write_last(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_write_last(cx, buf);
        this.written(cx, result)
    }

    fn forget_unsent(&self) {
        self.is_reset.store(true, Ordering::Relaxed);
        self.stream.forget_unsent();
    }

    fn is_reset(&self) -> bool {
        self.is_reset.load(Ordering::Relaxed) || self.patience.resets.load(Ordering::Relaxed)
    }

    fn set_streaming(&mut self, is_streaming: bool) {
        self.stream.set_streaming(is_streaming);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    const HEAD: Duration = Duration::from_secs(10);
    const WRITE: Duration = Duration::from_secs(15);

    fn pair() -> (Timed<DuplexStream>, DuplexStream, Arc<Patience>) {
        let (ours, theirs) = duplex(64);
        let patience = Arc::new(Patience::new(HEAD, WRITE));
        (Timed::new(ours, Arc::clone(&patience)), theirs, patience)
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_that_drip_in_do_not_stretch_the_head_deadline() {
        let (mut ours, mut theirs, _) = pair();
        let start = Instant::now();
        let dripping = async {
            loop {
                theirs.write_all(b"x").await.unwrap();
                tokio::time::sleep(Duration::from_secs(4)).await;
            }
        };
        let reading = async { while ours.read_u8().await.is_ok() {} };
        tokio::select! { () = dripping => {}, () = reading => {} }
        assert_eq!(start.elapsed(), HEAD);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_starts_the_head_deadline_afresh() {
        let (mut ours, mut theirs, _) = pair();
        let start = Instant::now();
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_secs(9)).await;
            theirs.write_all(b"x").await.unwrap();
            ours.read_u8().await.unwrap();
            ours.write_all(b"y").await.unwrap();
        }
        let error = ours.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(start.elapsed(), Duration::from_secs(27) + HEAD);
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_makes_no_progress_fails() {
        let (mut ours, mut theirs, _) = pair();
        let start = Instant::now();
        let reading = async {
            tokio::time::sleep(Duration::from_secs(12)).await;
            theirs.read_exact(&mut [0; 10]).await.unwrap();
            std::future::pending::<()>().await;
        };
        let error = tokio::select! { result = ours.write_all(&[0; 200]) => result.unwrap_err(), () = reading => unreachable!() };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(start.elapsed(), Duration::from_secs(12) + WRITE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_shortened_deadline_holds_from_the_next_poll_on() {
        let (mut ours, mut theirs, patience) = pair();
        let start = Instant::now();
        let nudging = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            patience.shorten_head(Duration::from_secs(5));
            theirs.write_all(b"x").await.unwrap();
            std::future::pending::<()>().await;
        };
        let reading = async { while ours.read_u8().await.is_ok() {} };
        tokio::select! { () = nudging => {}, () = reading => {} }
        assert_eq!(start.elapsed(), Duration::from_secs(5));
    }
}
