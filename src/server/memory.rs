//! Gives memory back to the kernel after many connections have left.
//!
//! glibc's malloc returns memory only from the top of a thread's heap, and keeps up to seven free chunks of each small size
//! for the thread (mallopt(3), glibc.malloc.tcache_count). After 10,000 connections those lie anywhere in the heap, and
//! each one keeps all that is below it: 47 MB stayed resident. So each worker puts aside as many chunks near the bottom of
//! its heap. To give memory back they take the place of those that are kept; the top of the heap is free then, and the
//! next large chunk that is freed has glibc return it.

use std::cell::Cell;
use std::hint::black_box;
use std::ops::RangeInclusive;
use std::time::Duration;

use tokio::time::sleep;

use crate::keys::key;
use crate::server::connection_limit::ConnectionLimit;
use crate::server::fast_path::response_buffer;

/// Usable sizes of the chunks that a thread keeps, in bytes: from the first to the last in steps of 16.
const SIZES: RangeInclusive<usize> = 24..=1032;

/// How many of each size it keeps.
const COUNT: usize = 7;

/// A chunk that makes malloc merge what is free and return what is at the top: larger than 64 KiB, and smaller than those
/// that come from mmap(2).
const LARGE: usize = 100 * 1024;

/// How often a worker looks at the number of connections.
const INTERVAL: Duration = Duration::from_secs(5);

/// Fewer connections take too little memory for it to matter.
const CONNECTIONS_MIN: usize = 256;

/// How many times in a row memory is given back.
const REPETITIONS: u32 = 4;

/// Chunks of each size.
struct Chunks(#[expect(dead_code, reason = "they are only there")] Vec<Vec<u8>>);

impl Chunks {
    /// `count` of each size: first those that the thread keeps, where it has some.
    fn allocate(count: usize) -> Self {
        let sizes = SIZES.step_by(16).flat_map(|size| std::iter::repeat_n(size, count));
        let mut chunks = Vec::with_capacity(SIZES.step_by(16).count() * count); // never grows: that would free small ones
        chunks.extend(sizes.map(|size| Vec::with_capacity(black_box(size))));
        Self(black_box(chunks))
    }
}

thread_local! {
    /// The chunks put aside, near the bottom of the thread's heap.
    static ASIDE: Cell<Option<Chunks>> = const { Cell::new(None) };
}

/// Has what the calling thread keeps for as long as it lives at the bottom of its heap. To be called while there are few
/// connections.
pub fn put_aside() {
    key::reserve();
    response_buffer::reserve();
    ASIDE.set(Some(Chunks::allocate(COUNT)));
}

/// Gives the calling thread's free memory back after most of many connections have left. Never returns.
pub async fn give_back(slots: &ConnectionLimit) {
    let mut burst = Burst::default();
    loop {
        sleep(INTERVAL).await;
        if burst.is_leaving(slots.open()) {
            ASIDE.set(ASIDE.take().map(exchange));
        }
    }
}

/// How many connections there were, and are left.
#[derive(Debug, Default)]
struct Burst {
    most: usize,
    least: usize,
    repetitions: u32,
}

impl Burst {
    /// Whether memory is to be given back now that `open` connections are left: a few times for each new low, since the
    /// last ones leave late.
    fn is_leaving(&mut self, open: usize) -> bool {
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

/// Puts `near` in the place of the chunks that the thread keeps, frees those, and takes `near` back.
fn exchange(near: Chunks) -> Chunks {
    merge();
    // More than the thread keeps: with each chunk that malloc takes from its lists it hands the thread some more.
    let far = Chunks::allocate(8 * COUNT);
    drop(near);
    drop(far);
    merge();
    Chunks::allocate(COUNT)
}

/// Has malloc merge what is free, and return what is at the top.
fn merge() {
    drop(Vec::<u8>::with_capacity(black_box(LARGE)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_a_few_times_for_each_new_low_after_a_burst() {
        let mut burst = Burst::default();
        let mut is_leaving =
            |open: &[usize]| open.iter().map(|open| burst.is_leaving(*open)).collect::<Vec<_>>();
        assert_eq!(is_leaving(&[0, 100, 255, 0]), [false; 4], "there were never many");
        assert_eq!(is_leaving(&[10_000, 9_000, 5_000]), [false; 3], "they are still there");
        assert_eq!(is_leaving(&[128; 6]), [true, true, true, true, false, false], "some stay");
        assert_eq!(
            is_leaving(&[130, 0, 5, 0, 0, 0]),
            [false, true, true, true, true, false],
            "the rest left"
        );
        assert_eq!(is_leaving(&[6_000, 0]), [false, true], "another burst");
    }
}
