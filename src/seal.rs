//! Keeps the text of tokens out of the process: below HTTP, each one that comes in is replaced by a seal.
//!
//! hyper keeps a request's head in buffers that it does not wipe. So a token's text never gets there: as soon as its
//! bytes are read they are overwritten with as many digits of a digest under a key that this process drew at its start
//! and never shows. Above this, a bearer is recognised by that seal. It is good for nothing outside: what a client sends
//! is sealed in any case, a seal too. And since nobody can steer a seal, it takes no constant-time comparison to look
//! one up.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use zeroize::{Zeroize, Zeroizing};

use crate::deadline::{Sending, Transport};
use crate::random::{Failure, Generator};
use crate::token::{Digest, LENGTH, PREFIX};

/// Makes seals; one for the life of the process.
pub struct Sealer {
    key: Zeroizing<[u8; 32]>,
    /// Off while no tokens are asked for: then nothing is looked at.
    is_on: AtomicBool,
}

impl Sealer {
    /// A sealer with a key of its own, switched off.
    ///
    /// # Errors
    /// The generator's failure.
    pub fn new(generator: &Generator) -> Result<Self, Failure> {
        let mut key = Zeroizing::new([0; 32]);
        generator.fill(&mut key[..])?;
        Ok(Self { key, is_on: AtomicBool::new(false) })
    }

    /// The seal of the token with this hash.
    pub fn seal(&self, digest: &Digest) -> Digest {
        // Both parts have a fixed length, so this is as good as an HMAC.
        Sha256::new().chain_update(*self.key).chain_update(digest).finalize().into()
    }

    /// Switches it on or off.
    pub fn switch(&self, is_on: bool) {
        self.is_on.store(is_on, Ordering::Relaxed);
    }

    fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    /// Replaces the digits of every token in `bytes`, and says how many bytes at the end may be the beginning of one.
    fn replace(&self, bytes: &mut [u8]) -> usize {
        let mut at = 0;
        while let Some(found) = bytes[at..].iter().position(|byte| *byte == PREFIX.as_bytes()[0]) {
            at += found;
            let rest = &mut bytes[at..];
            let matching = matching(rest);
            if matching == LENGTH {
                let mut digest: Digest = Sha256::digest(&rest[..LENGTH]).into();
                base16ct::lower::encode(&self.seal(&digest), &mut rest[PREFIX.len()..LENGTH])
                    .expect("two digits a byte");
                digest.zeroize();
                at += LENGTH;
            } else if matching == rest.len() {
                return matching;
            } else {
                at += 1;
            }
        }
        0
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealer")
    }
}

/// How many bytes at the start of `bytes` are, or begin, a token.
fn matching(bytes: &[u8]) -> usize {
    let is_fine = |(at, byte): &(usize, &u8)| match PREFIX.as_bytes().get(*at) {
        Some(expected) => *byte == expected,
        None => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
    };
    bytes.iter().take(LENGTH).enumerate().take_while(is_fine).count()
}

/// A stream out of which no token is read, only its seal.
#[derive(Debug)]
pub struct Sealed<S> {
    stream: S,
    sealer: Option<Arc<Sealer>>,
    /// The beginning of a token whose rest has not come yet.
    held: Zeroizing<Vec<u8>>,
}

impl<S> Sealed<S> {
    /// Without a sealer everything passes as it is.
    pub fn new(stream: S, sealer: Option<Arc<Sealer>>) -> Self {
        Self { stream, sealer, held: Zeroizing::default() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Sealed<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let Some(sealer) = this.sealer.as_ref().filter(|sealer| sealer.is_on() || !this.held.is_empty())
        else {
            return Pin::new(&mut this.stream).poll_read(cx, buf);
        };
        // hyper offers kilobytes. With less room than a token needs, its beginning would have to be let through.
        if buf.remaining() <= LENGTH {
            return Poll::Ready(Err(io::ErrorKind::InvalidInput.into()));
        }
        let start = buf.filled().len();
        loop {
            buf.put_slice(&this.held);
            let before = buf.filled().len();
            let read = Pin::new(&mut this.stream).poll_read(cx, buf);
            if !matches!(read, Poll::Ready(Ok(()))) {
                buf.filled_mut()[start..].zeroize();
                buf.set_filled(start);
                return read;
            }
            let is_end = buf.filled().len() == before;
            this.held.zeroize(); // and empties it
            let new = &mut buf.filled_mut()[start..];
            let open = sealer.replace(new);
            if is_end || open == 0 {
                return Poll::Ready(Ok(()));
            }
            // It may have been a token's: it waits here for the rest, and hyper does not see it.
            let whole = new.len() - open;
            if this.held.capacity() < LENGTH {
                this.held.reserve_exact(LENGTH); // never moved by growing
            }
            this.held.extend_from_slice(&new[whole..]);
            new[whole..].zeroize();
            buf.set_filled(start + whole);
            if whole > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Sealed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl<S: Transport + Unpin> Transport for Sealed<S> {
    fn poll_write_last(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_last(cx, buf)
    }

    fn forget_unsent(&self) {
        self.stream.forget_unsent();
    }

    fn expect_head(&mut self) {
        self.stream.expect_head();
    }

    fn set_sending(&mut self, sending: Sending) {
        self.stream.set_sending(sending);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Kernel;
    use base16ct::HexDisplay;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    const TOKEN: &str = "ks_00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

    fn sealer() -> Arc<Sealer> {
        let sealer = Sealer::new(&Generator::new(Kernel).unwrap()).unwrap();
        sealer.switch(true);
        Arc::new(sealer)
    }

    fn sealed(sealer: &Sealer, token: &str) -> String {
        let seal = sealer.seal(&Sha256::digest(token.as_bytes()).into());
        format!("{PREFIX}{:x}", HexDisplay(&seal))
    }

    /// What comes out of a sealed stream into which `pieces` go one after the other.
    fn through(sealer: &Arc<Sealer>, pieces: &[&[u8]]) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (ours, mut theirs) = duplex(4096);
            let mut ours = Sealed::new(ours, Some(Arc::clone(sealer)));
            let mut text = Vec::with_capacity(1024);
            for piece in pieces {
                theirs.write_all(piece).await.unwrap();
                let reading = async {
                    while ours.read_buf(&mut text).await.unwrap() > 0 {
                        text.reserve(1024);
                    }
                };
                // What is there is read without a wait; what is held stays held.
                tokio::select! { biased; () = reading => {}, () = std::future::ready(()) => {} }
            }
            drop(theirs);
            while ours.read_buf(&mut text).await.unwrap() > 0 {}
            String::from_utf8(text).unwrap()
        })
    }

    #[test]
    fn a_token_is_sealed_and_everything_else_passes() {
        let sealer = sealer();
        let head = |token: &str| format!("GET /key/32 HTTP/1.1\r\nAuthorization: Bearer {token}\r\n\r\n");
        let seal = sealed(&sealer, TOKEN);
        assert_eq!(through(&sealer, &[head(TOKEN).as_bytes()]), head(&seal));
        let twice = format!("{}{}", head(TOKEN), head(TOKEN));
        assert_eq!(through(&sealer, &[twice.as_bytes()]), twice.replace(TOKEN, &seal));
        assert_ne!(
            through(&sealer, &[head(&seal).as_bytes()]),
            head(&seal),
            "a seal is sealed as a token is"
        );
        for other in ["ks_", "ks_00", "k", "ks_0G", &TOKEN[..LENGTH - 1], "kks_ks_ks"] {
            assert_eq!(through(&sealer, &[other.as_bytes()]), other);
        }
        sealer.switch(false);
        assert_eq!(
            through(&sealer, &[head(TOKEN).as_bytes()]),
            head(TOKEN),
            "nothing is looked at when it is off"
        );
    }

    proptest! {
        #[test]
        fn pieces_of_any_size_make_no_difference(
            before in "[ks_0-9a-f ]{0,80}", after in "[ks_ \r\n]{0,20}", size in 1usize..90
        ) {
            let sealer = sealer();
            let text = format!("{before} {TOKEN}{after}");
            let pieces: Vec<_> = text.as_bytes().chunks(size).collect();
            prop_assert_eq!(through(&sealer, &pieces), through(&sealer, &[text.as_bytes()]));
        }
    }
}
