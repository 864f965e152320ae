//! What operators see of the daemon: metrics, metrics of the process, the log.
//!
//! May import: [`keys`](crate::keys). A new metric goes into [`metrics`], beside the function that counts it.

mod cgroup;
pub mod endpoint;
pub mod log;
pub mod metrics;
mod process;
mod register;
