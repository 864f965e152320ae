//! Metrics, made and registered in one step.

use prometheus::core::{MetricVec, MetricVecBuilder};
use prometheus::{Counter, Gauge, Histogram, HistogramOpts, IntCounterVec, IntGauge, Opts, Registry};

pub(crate) fn register<C: prometheus::core::Collector + Clone + 'static>(
    registry: &Registry,
    metric: prometheus::Result<C>,
) -> C {
    let metric = metric.expect("metric names and labels are constants that a test renders");
    registry.register(Box::new(metric.clone())).expect("each metric is registered once");
    metric
}

pub(crate) fn counters(registry: &Registry, name: &str, help: &str, label: &str) -> IntCounterVec {
    register(registry, IntCounterVec::new(Opts::new(name, help), &[label]))
}

/// The series of each label, at the label's place in its enum.
pub(crate) fn series<L: Copy + Into<&'static str>, B: MetricVecBuilder, const N: usize>(
    labels: &[L],
    metric: &MetricVec<B>,
) -> [B::M; N] {
    let labels: [L; N] = labels.try_into().expect("each label has a place");
    labels.map(|label| metric.with_label_values(&[label.into()]))
}

pub(crate) fn int_gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    register(registry, IntGauge::new(name, help))
}

pub(crate) fn histogram(registry: &Registry, name: &str, help: &str, buckets: Vec<f64>) -> Histogram {
    register(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets)))
}

pub(crate) fn gauge(registry: &Registry, name: &str, help: &str) -> Gauge {
    register(registry, Gauge::new(name, help))
}

pub(crate) fn counter(registry: &Registry, name: &str, help: &str) -> Counter {
    register(registry, Counter::new(name, help))
}
