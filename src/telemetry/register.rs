//! Creates and registers a metric in one step.

use prometheus::core::Collector;
use prometheus::{
    Counter, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, Result,
};

pub(super) fn int_counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    register(registry, IntCounter::new(name, help))
}

pub(super) fn int_gauge(registry: &Registry, name: &str, help: &str, value: i64) -> IntGauge {
    let gauge = register(registry, IntGauge::new(name, help));
    gauge.set(value);
    gauge
}

pub(super) fn counter(registry: &Registry, name: &str, help: &str) -> Counter {
    register(registry, Counter::new(name, help))
}

pub(super) fn gauge(registry: &Registry, name: &str, help: &str) -> Gauge {
    register(registry, Gauge::new(name, help))
}

pub(super) fn histogram(registry: &Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    register(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
}

/// A gauge that is always 1, with labels for information.
pub(super) fn info(registry: &Registry, name: &str, help: &str, labels: &[(&str, &str)]) {
    let (names, values): (Vec<_>, Vec<_>) = labels.iter().copied().unzip();
    register(registry, IntGaugeVec::new(Opts::new(name, help), &names)).with_label_values(&values).set(1);
}

pub(super) fn int_counter_vec(registry: &Registry, name: &str, help: &str, label: &str) -> IntCounterVec {
    register(registry, IntCounterVec::new(Opts::new(name, help), &[label]))
}

/// A counter for each value of a label, indexed by `value as usize`.
pub(super) fn int_counters<L: Copy + Into<&'static str>, const N: usize>(
    registry: &Registry,
    name: &str,
    help: &str,
    label: &str,
    values: &[L],
) -> [IntCounter; N] {
    let counters = int_counter_vec(registry, name, help, label);
    array(values).map(|value| counters.with_label_values(&[value.into()]))
}

/// A histogram for each value of a label, indexed by `value as usize`.
pub(super) fn histograms<L: Copy + Into<&'static str>, const N: usize>(
    registry: &Registry,
    opts: HistogramOpts,
    label: &str,
    values: &[L],
) -> [Histogram; N] {
    let histograms = register(registry, HistogramVec::new(opts, &[label]));
    array(values).map(|value| histograms.with_label_values(&[value.into()]))
}

fn array<L: Copy, const N: usize>(values: &[L]) -> [L; N] {
    values.try_into().expect("the metric has an element for each variant of the label")
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, metric: Result<C>) -> C {
    let metric = metric.expect("metric names and labels are constants that a test renders");
    registry.register(Box::new(metric.clone())).expect("each metric is registered once");
    metric
}
