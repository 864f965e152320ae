//! The monotonic clock as a number.

use rustix::time::{ClockId, clock_gettime};

/// A moment, in nanoseconds of the monotonic clock. Unlike [`Instant`](std::time::Instant), it fits into an atomic
/// number, and a subtraction is one instruction instead of 42.
pub type Nanos = i64;

/// Nanoseconds of a second.
pub const SECOND: Nanos = 1_000_000_000;

/// Now.
pub fn now() -> Nanos {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec * SECOND + time.tv_nsec
}
