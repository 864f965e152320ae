//! Metrics of the process, under the names that all Prometheus clients use.
//!
//! The `prometheus` crate has a collector for these, but it takes the start time from /proc/stat, which the unit's
//! sandbox hides (ProcSubset=pid), and counts CPU in whole seconds. This one reads only /proc/self,
//! clocks, and the control group.

use std::fs;

use prometheus::{Counter, Gauge, Registry};
use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, Timespec, clock_gettime};

use crate::telemetry::cgroup::CgroupMemory;
use crate::telemetry::register::{counter, gauge};

/// The metrics, updated by [`ProcessMetrics::refresh`].
#[derive(Debug)]
pub(super) struct ProcessMetrics {
    cpu_seconds: Counter,
    open_fds: Gauge,
    max_fds: Gauge,
    resident_memory: Gauge,
    virtual_memory: Gauge,
    threads: Gauge,
    /// Usage and limit, if they can be read.
    cgroup_memory: Option<[Gauge; 2]>,
}

impl ProcessMetrics {
    pub(super) fn register(registry: &Registry) -> Self {
        let start = gauge(
            registry,
            "process_start_time_seconds",
            "Start time of the process, in seconds since 1970-01-01 UTC.",
        );
        if let Some(seconds) = start_time() {
            start.set(seconds);
        }
        Self {
            cpu_seconds: counter(
                registry,
                "process_cpu_seconds_total",
                "User and system CPU time spent, in seconds.",
            ),
            open_fds: gauge(registry, "process_open_fds", "Open file descriptors."),
            max_fds: gauge(registry, "process_max_fds", "Limit of open file descriptors (RLIMIT_NOFILE)."),
            resident_memory: gauge(registry, "process_resident_memory_bytes", "Resident memory, in bytes."),
            virtual_memory: gauge(registry, "process_virtual_memory_bytes", "Virtual memory, in bytes."),
            threads: gauge(registry, "process_threads", "Threads of the process."),
            cgroup_memory: CgroupMemory::read().map(|_| {
                [
                    gauge(
                        registry,
                        "cgroup_memory_usage_bytes",
                        "Memory of the control group, with the kernel's memory for its sockets, in bytes.",
                    ),
                    gauge(
                        registry,
                        "cgroup_memory_limit_bytes",
                        "Memory limit of the control group, in bytes; +Inf without a limit.",
                    ),
                ]
            }),
        }
    }

    /// Updates all metrics. A value that can't be read stays as it was.
    pub(super) fn refresh(&self) {
        let cpu = seconds(clock_gettime(ClockId::ProcessCPUTime));
        self.cpu_seconds.inc_by((cpu - self.cpu_seconds.get()).max(0.0));
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            // One of them is the directory that is being read.
            self.open_fds.set(count(entries.count().saturating_sub(1) as u64));
        }
        if let Some(limit) = getrlimit(Resource::Nofile).current {
            self.max_fds.set(count(limit));
        }
        // proc_pid_statm(5): size and resident, in pages.
        if let Ok(statm) = fs::read_to_string("/proc/self/statm") {
            let pages: Vec<u64> = statm.split(' ').map_while(|field| field.parse().ok()).collect();
            if let [size, resident, ..] = pages[..] {
                self.virtual_memory.set(count(size * page_size() as u64));
                self.resident_memory.set(count(resident * page_size() as u64));
            }
        }
        if let Some(threads) = stat_field(20) {
            self.threads.set(count(threads));
        }
        if let (Some([usage, limit]), Some(memory)) = (&self.cgroup_memory, CgroupMemory::read()) {
            usage.set(count(memory.usage));
            limit.set(memory.limit.map_or(f64::INFINITY, count));
        }
    }
}

/// Field `number` of /proc/self/stat, as proc_pid_stat(5) counts them.
fn stat_field(number: usize) -> Option<u64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The command's name may contain spaces and parentheses; field 3 follows its last parenthesis.
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(number - 3)?.parse().ok()
}

/// The start time of the process in seconds since 1970: the kernel has it in clock ticks since boot.
fn start_time() -> Option<f64> {
    let since_boot = count(stat_field(22)?) / count(clock_ticks_per_second());
    let now = seconds(clock_gettime(ClockId::Realtime));
    Some(now - seconds(clock_gettime(ClockId::Boottime)) + since_boot)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "seconds and nanoseconds of this age are exact far below a tick"
)]
fn seconds(time: Timespec) -> f64 {
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus values are doubles; counts here stay below 2⁵³")]
fn count(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_those_of_this_process() {
        let process = ProcessMetrics::register(&Registry::new());
        process.refresh();
        let now = seconds(clock_gettime(ClockId::Realtime));
        let started = start_time().unwrap();
        assert!(started <= now && now - started < 3600.0, "{started} {now}");
        assert!(process.open_fds.get() >= 3.0);
        assert!(process.max_fds.get() >= process.open_fds.get());
        assert!(process.resident_memory.get() > 100e3);
        assert!(process.virtual_memory.get() >= process.resident_memory.get());
        assert!(process.threads.get() >= 2.0, "the test runner and this test");
        assert!(process.cpu_seconds.get() > 0.0);
    }
}
