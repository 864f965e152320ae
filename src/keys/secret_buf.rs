//! Buffers of secret bytes, wiped when they are dropped, and the thread's spare buffer for the next chunk of a stream.

use std::cell::Cell;
use std::fmt;
use std::mem;
use std::thread::LocalKey;

use zeroize::Zeroize;

use crate::keys::generator::CHUNK_SIZE;

/// The most bytes of a streamed key that are generated and sent at a time. For a client that doesn't read, the HTTP
/// library holds as many, and as many again while less than its own limit is left of them: 200 such clients took 28 MiB
/// at 64 KiB.
pub(super) const STREAM_CHUNK_SIZE: usize = CHUNK_SIZE / 2;

/// Bytes that are wiped on drop, up to their length: a user must neither shrink them nor make them grow beyond their
/// capacity. `Zeroizing<Vec<u8>>` wipes element by element, which for bytes takes ten times as long.
pub(crate) struct SecretBuf(pub(super) Vec<u8>);

impl SecretBuf {
    /// An empty buffer for up to `capacity` bytes.
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self(Vec::with_capacity(capacity))
    }

    /// A buffer of `length` zeros, the thread's spare one if that has the size.
    pub(super) fn zeroed(length: usize) -> Self {
        let spare = if length == STREAM_CHUNK_SIZE { SPARE.take() } else { Vec::new() };
        Self(if spare.is_empty() { vec![0; length] } else { spare })
    }
}

impl Drop for SecretBuf {
    fn drop(&mut self) {
        self.0.as_mut_slice().zeroize();
        if self.0.len() == STREAM_CHUNK_SIZE {
            keep_lower(&SPARE, &mut self.0);
        }
    }
}

impl AsRef<[u8]> for SecretBuf {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for SecretBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBuf({} bytes)", self.0.len())
    }
}

/// Secret bytes on the stack, wiped on drop. Not to be moved, which would leave a copy behind.
pub(super) struct SecretArray<const N: usize>([u8; N]);

impl<const N: usize> SecretArray<N> {
    /// Zeros.
    #[inline]
    pub(super) fn new() -> Self {
        Self([0; N])
    }
}

impl<const N: usize> AsMut<[u8]> for SecretArray<N> {
    #[inline]
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl<const N: usize> Drop for SecretArray<N> {
    #[inline]
    fn drop(&mut self) {
        self.0.as_mut_slice().zeroize();
    }
}

thread_local! {
    /// The last wiped buffer of a chunk, for the next chunk: a new one would have to be zeroed.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Allocates the calling thread's spare buffer.
pub(crate) fn reserve_spare() {
    SPARE.set(vec![0; STREAM_CHUNK_SIZE]);
}

/// Stores `buffer` in `spare`, or leaves the buffer that is there if that one is nearer the bottom of the thread's
/// heap: the lower one keeps less memory resident (`server/memory.rs`).
pub(crate) fn keep_lower(spare: &'static LocalKey<Cell<Vec<u8>>>, buffer: &mut Vec<u8>) {
    let kept = spare.take();
    let is_lower = kept.capacity() == 0 || buffer.as_ptr() < kept.as_ptr();
    spare.set(if is_lower { mem::take(buffer) } else { kept });
}
