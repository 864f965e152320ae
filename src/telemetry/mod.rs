//! What operators see of the daemon: metrics, metrics of the process, the log.
//!
//! May import: [`keys`](crate::keys).
//! A new metric goes into [`metrics`], beside the function that counts it; the values of its label into [`labels`]. A
//! new route goes into [`endpoint`]. What happens to log events is in [`log`] and the files named `log_*`.

mod cgroup;
pub mod clock;
pub mod drop_counters;
pub mod endpoint;
pub mod labels;
pub mod log;
pub mod log_event;
pub mod log_level;
mod log_lines;
mod log_queue;
mod log_writer;
pub mod metrics;
mod process;
mod register;
pub mod text;
pub mod version;
