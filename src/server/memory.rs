//! Returns memory to the kernel after many connections have closed.
//!
//! glibc's malloc returns memory only from the top of a thread's heap, and caches up to seven free chunks of each small
//! size for the thread (mallopt(3), glibc.malloc.tcache_count). After 10,000 connections the cached chunks lie anywhere
//! in the heap, and each one keeps all memory below it: 47 MB stayed resident. So each worker reserves the same number
//! of chunks near the bottom of its heap. To trim the heap, the reserved chunks replace the cached ones. The top of the
//! heap is free then, and glibc returns it when the next large chunk is freed.

use std::cell::Cell;
use std::hint::black_box;
use std::ops::RangeInclusive;
use std::time::Duration;

use tokio::time::sleep;

use crate::keys::secret_buf;
use crate::server::connection_limit::ConnectionLimit;
use crate::server::fast_path::response_buffer;

/// Usable sizes of the chunks that malloc caches for a thread, in bytes: from the first to the last in steps of 16.
const CACHED_SIZES: RangeInclusive<usize> = 24..=1032;

/// How many chunks of each size it caches.
const CACHED_COUNT: usize = 7;

/// The size of a chunk whose release makes malloc merge free chunks and return the top of the heap: larger than 64 KiB,
/// and smaller than those that come from mmap(2).
const LARGE: usize = 100 * 1024;

/// How often a worker looks at the number of connections.
const INTERVAL: Duration = Duration::from_secs(5);

/// Fewer connections take too little memory to matter.
const CONNECTIONS_MIN: usize = 256;

/// How often in a row the heap is trimmed.
const REPETITIONS: u32 = 4;

/// Chunks of each cached size.
struct Chunks(#[expect(dead_code, reason = "they only take up memory")] Vec<Vec<u8>>);

impl Chunks {
    /// `count` chunks of each size. malloc takes them from the thread's cache first.
    fn allocate(count: usize) -> Self {
        let sizes = CACHED_SIZES.step_by(16).flat_map(|size| std::iter::repeat_n(size, count));
        // With its full capacity from the start: growing would free small chunks.
        let mut chunks = Vec::with_capacity(CACHED_SIZES.step_by(16).count() * count);
        chunks.extend(sizes.map(|size| Vec::with_capacity(black_box(size))));
        Self(black_box(chunks))
    }
}

thread_local! {
    /// The reserved chunks, near the bottom of the thread's heap.
    static RESERVED: Cell<Option<Chunks>> = const { Cell::new(None) };
}

/// Allocates what the calling thread needs for as long as it lives, at the bottom of its heap. Call it while few
/// connections are open.
pub(crate) fn reserve() {
    secret_buf::reserve_spare();
    response_buffer::reserve();
    RESERVED.set(Some(Chunks::allocate(CACHED_COUNT)));
}

/// Trims the calling thread's heap whenever most connections of a burst have closed. Never returns.
pub async fn trim_after_bursts(connection_limit: &ConnectionLimit) {
    let mut burst = Burst::default();
    loop {
        sleep(INTERVAL).await;
        if burst.is_over(connection_limit.open_connections()) {
            connection_limit.idle.forget_candidates();
            RESERVED.set(RESERVED.take().map(trim));
        }
    }
}

/// The highest number of connections so far, and the lowest number after the last burst.
#[derive(Debug, Default)]
struct Burst {
    most: usize,
    least: usize,
    repetitions: u32,
}

impl Burst {
    /// Whether to trim the heap now that `open` connections are left: a few times for each new minimum, since the last
    /// connections close late.
    fn is_over(&mut self, open: usize) -> bool {
        if open >= CONNECTIONS_MIN.max(self.most / 2) {
            *self = Self { most: self.most.max(open), least: open, repetitions: 0 };
            return false;
        }
        if self.most == 0 {
            return false;
        }
        if open < self.least {
            (self.least, self.repetitions) = (open, 0);
        }
        self.repetitions += 1;
        self.repetitions <= REPETITIONS
    }
}

/// Replaces the cached chunks with the reserved ones, frees them, and reserves the same chunks again.
fn trim(reserved: Chunks) -> Chunks {
    merge_free_chunks();
    // More than the cache holds: with each chunk that malloc takes from its lists, it caches some more.
    let cached = Chunks::allocate(8 * CACHED_COUNT);
    drop(reserved);
    drop(cached);
    merge_free_chunks();
    Chunks::allocate(CACHED_COUNT)
}

/// Makes malloc merge free chunks, and return the top of the heap.
fn merge_free_chunks() {
    drop(Vec::<u8>::with_capacity(black_box(LARGE)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_heap_is_trimmed_for_each_new_minimum_after_a_burst() {
        let mut burst = Burst::default();
        let mut is_over = |open: &[usize]| open.iter().map(|open| burst.is_over(*open)).collect::<Vec<_>>();
        assert_eq!(is_over(&[0, 100, 255, 0]), [false; 4], "there was no burst");
        assert_eq!(is_over(&[10_000, 9_000, 5_000]), [false; 3], "most are still open");
        assert_eq!(is_over(&[128; 6]), [true, true, true, true, false, false], "some stay open");
        assert_eq!(
            is_over(&[130, 0, 5, 0, 0, 0]),
            [false, true, true, true, true, false],
            "the rest have closed"
        );
        assert_eq!(is_over(&[6_000, 0]), [false, true], "another burst");
    }
}
