//! Bare hyper on one thread, the minimum cost of a server on hyper: no routes, no metrics, no timeouts, no limits.
//!
//! `/key/N` returns N zero bytes in chunks of 64 KiB, and any other path returns 32 bytes. The server listens on the
//! socket that it inherits as descriptor 3.

use std::convert::Infallible;
use std::error::Error;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use listenfd::ListenFd;
use tokio::net::TcpListener;

static CONSTANT: [u8; 32] = *b"0123456789abcdef0123456789abcdef";
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// A body of `remaining` bytes that repeats one chunk.
struct Repeated {
    chunk: Bytes,
    remaining: u64,
}

impl Body for Repeated {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.remaining == 0 {
            return Poll::Ready(None);
        }
        let size = self.remaining.min(self.chunk.len() as u64);
        self.remaining -= size;
        Poll::Ready(Some(Ok(Frame::data(self.chunk.slice(..size as usize)))))
    }

    fn is_end_stream(&self) -> bool {
        self.remaining == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.remaining)
    }
}

async fn respond(request: Request<Incoming>) -> Result<Response<Repeated>, Infallible> {
    let zeros = request.uri().path().strip_prefix("/key/");
    let body = match zeros.and_then(|length| length.parse().ok()) {
        Some(remaining) => Repeated { chunk: Bytes::from_static(&ZEROS), remaining },
        None => Repeated { chunk: Bytes::from_static(&CONSTANT), remaining: CONSTANT.len() as u64 },
    };
    Ok(Response::new(body))
}

async fn serve() -> Result<(), Box<dyn Error>> {
    let inherited = ListenFd::from_env().take_tcp_listener(0)?;
    let listener = inherited.ok_or("expected a listening socket as descriptor 3 and LISTEN_FDS=1")?;
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(
            hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service_fn(respond)),
        );
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(serve())
}
