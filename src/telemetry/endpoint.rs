//! The HTTP routes: the path of each, spelled once, and the metric label that is the same text.

use strum::VariantArray;

/// Random bytes.
pub const KEY_PATH: &str = "/key/{length}";
/// Random characters.
pub const PASSWORD_PATH: &str = "/password/{length}";
/// Whether the generator works.
pub const HEALTH_PATH: &str = "/health";
/// Whether the process makes progress.
pub const LIVEZ_PATH: &str = "/livez";
/// Whether keys are served now.
pub const READYZ_PATH: &str = "/readyz";
/// The metrics, for Prometheus.
pub const METRICS_PATH: &str = "/metrics";
/// The web page, and its plain-text index.
pub const PAGE_PATH: &str = "/";
/// The OpenAPI document.
pub const OPENAPI_PATH: &str = "/openapi.json";

/// [`KEY_PATH`] up to its length.
pub const KEY_PREFIX: &str = before_length(KEY_PATH);
/// [`PASSWORD_PATH`] up to its length.
pub const PASSWORD_PREFIX: &str = before_length(PASSWORD_PATH);

const fn before_length(path: &'static str) -> &'static str {
    path.split_at(path.len() - "{length}".len()).0
}

/// The route of a request, as a metric label: never the raw path, so no client can create a series.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantArray)]
pub enum Endpoint {
    /// [`KEY_PATH`]
    Key,
    /// [`PASSWORD_PATH`]
    Password,
    /// [`HEALTH_PATH`]
    Health,
    /// [`LIVEZ_PATH`]
    Livez,
    /// [`READYZ_PATH`]
    Readyz,
    /// [`METRICS_PATH`]
    Metrics,
    /// [`PAGE_PATH`]
    Page,
    /// [`OPENAPI_PATH`]
    OpenApi,
    /// Any other path.
    Other,
}

impl Endpoint {
    /// The route of `path`. The routes with a length in their path are recognized where the length is parsed, not here.
    pub fn from_fixed_path(path: &[u8]) -> Self {
        match str::from_utf8(path).unwrap_or_default() {
            HEALTH_PATH => Self::Health,
            LIVEZ_PATH => Self::Livez,
            READYZ_PATH => Self::Readyz,
            METRICS_PATH => Self::Metrics,
            PAGE_PATH => Self::Page,
            OPENAPI_PATH => Self::OpenApi,
            _ => Self::Other,
        }
    }
}

impl From<Endpoint> for &'static str {
    fn from(endpoint: Endpoint) -> Self {
        match endpoint {
            Endpoint::Key => KEY_PATH,
            Endpoint::Password => PASSWORD_PATH,
            Endpoint::Health => HEALTH_PATH,
            Endpoint::Livez => LIVEZ_PATH,
            Endpoint::Readyz => READYZ_PATH,
            Endpoint::Metrics => METRICS_PATH,
            Endpoint::Page => PAGE_PATH,
            Endpoint::OpenApi => OPENAPI_PATH,
            Endpoint::Other => "other",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_its_path_without_the_length() {
        assert_eq!((KEY_PREFIX, PASSWORD_PREFIX), ("/key/", "/password/"));
    }

    #[test]
    fn each_fixed_path_is_its_own_label() {
        for endpoint in Endpoint::VARIANTS {
            let label = <&str>::from(*endpoint);
            let expected = if label.contains("{length}") { Endpoint::Other } else { *endpoint };
            assert_eq!(Endpoint::from_fixed_path(label.as_bytes()), expected, "{label}");
        }
        for path in ["/key/{length}/x", "/key/32", "/health/", ""] {
            assert_eq!(Endpoint::from_fixed_path(path.as_bytes()), Endpoint::Other, "{path}");
        }
    }
}
