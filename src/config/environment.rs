//! The environment: settings, and the variables that Kubernetes and Docker inject for a Service or container of this
//! name.

use std::collections::BTreeMap;
use std::env;
use std::net::{IpAddr, SocketAddr};

/// The prefix of variables that are settings. Not `KEY_SERVICE_`: Kubernetes sets `KEY_SERVICE_PORT` and the like for a
/// Service of that name.
pub const ENV_PREFIX: &str = "KEYSERVICE_";

/// A variable with our prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Variable {
    /// The name, with the prefix.
    pub(super) name: String,
    pub(super) text: String,
}

impl Variable {
    /// The name of the setting, as a file has it; not every name is a setting.
    pub(super) fn setting(&self) -> String {
        self.name[ENV_PREFIX.len()..].to_ascii_lowercase().replace('_', "-")
    }
}

/// The variables with our prefix.
#[derive(Debug, Default)]
pub(super) struct Variables {
    pub(super) settings: Vec<Variable>,
    /// The names of injected variables.
    pub(super) injected: Vec<String>,
}

/// Reads the environment. A variable that is named as one of the `known` settings counts as a setting, whatever its
/// value is.
pub(super) fn read(known: &[&str]) -> Variables {
    let text = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
    sort(known, env::vars_os().map(|(name, value)| (text(name), text(value))))
}

fn sort(known: &[&str], variables: impl Iterator<Item = (String, String)>) -> Variables {
    let ours: BTreeMap<_, _> = variables
        .filter(|(name, _)| {
            name.get(..ENV_PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(ENV_PREFIX))
        })
        .collect();
    let mut sorted = Variables::default();
    for (name, text) in &ours {
        let variable = Variable { name: name.clone(), text: text.clone() };
        // A Service named keyservice-metrics has a variable with the name of our setting: that one is an error, not
        // ignored.
        if !known.contains(&variable.setting().as_str()) && is_injected(name, text, &ours) {
            sorted.injected.push(name.clone());
        } else {
            sorted.settings.push(variable);
        }
    }
    sorted
}

/// Whether Kubernetes injects the variable for a Service ("Discovering services" in its manual, `envvars.FromServices`
/// in its code), or Docker for a link. Both inject the same values several times, so name and value must agree with the
/// other variables of the same Service or link. The name may go on after `KEYSERVICE`, as in `KEYSERVICE_1_PORT`.
fn is_injected(name: &str, value: &str, all: &BTreeMap<String, String>) -> bool {
    let mut ends = name.match_indices('_').map(|(at, _)| at).filter(|at| *at + 1 >= ENV_PREFIX.len());
    ends.any(|at| belongs_to_service(&name[..at], &name[at + 1..], value, all))
}

fn belongs_to_service(service: &str, rest: &str, value: &str, all: &BTreeMap<String, String>) -> bool {
    if rest == "NAME" || rest.starts_with("ENV_") {
        // Only a link has it: `/container/alias`.
        let mut path = all.get(&format!("{service}_NAME")).map_or("", String::as_str).split('/');
        let (root, container, alias) = (path.next(), path.next(), path.next().unwrap_or_default());
        return root == Some("")
            && container.is_some_and(|name| !name.is_empty())
            && path.next().is_none()
            && alias.to_ascii_uppercase().replace('-', "_") == service;
    }
    // Each Service and link has `tcp://10.0.0.1:1123`, and every other variable repeats some of it.
    let Some((_, first)) = all.get(&format!("{service}_PORT")).and_then(|text| url(text)) else {
        return false;
    };
    if let Some(name) = rest.strip_prefix("SERVICE_PORT_") {
        let is_exposed = |protocol: &&str| {
            all.contains_key(&format!("{service}_PORT_{value}_{}", protocol.to_uppercase()))
        };
        return !name.is_empty() && port(value).is_some() && PROTOCOLS.iter().any(is_exposed);
    }
    let is_address = || value.parse::<IpAddr>() == Ok(first.ip());
    match rest.split('_').collect::<Vec<_>>()[..] {
        ["PORT"] => true,
        ["SERVICE", "HOST"] => is_address(),
        ["SERVICE", "PORT"] => port(value) == Some(first.port()),
        ["PORT", number, protocol, ref part @ ..] => {
            let Some(protocol) = PROTOCOLS.into_iter().find(|name| name.to_uppercase() == protocol) else {
                return false;
            };
            match (port(number), part) {
                (None, _) => false,
                (Some(number), [] | ["START"]) => {
                    url(value) == Some((protocol, SocketAddr::new(first.ip(), number)))
                }
                (_, ["PROTO"]) => value == protocol,
                (number, ["PORT"] | ["PORT", "START"]) => port(value) == number,
                (number, ["PORT", "END"]) => port(value) > number,
                (_, ["ADDR"]) => is_address(),
                _ => false,
            }
        }
        _ => false,
    }
}

const PROTOCOLS: [&str; 3] = ["tcp", "udp", "sctp"];

fn url(text: &str) -> Option<(&'static str, SocketAddr)> {
    let (protocol, address) = text.split_once("://")?;
    let protocol = PROTOCOLS.into_iter().find(|name| *name == protocol)?;
    // Docker writes IPv6 without brackets.
    let bare = || {
        let (ip, number) = address.rsplit_once(':')?;
        Some(SocketAddr::new(ip.parse().ok()?, port(number)?))
    };
    Some((protocol, address.parse().ok().or_else(bare)?))
}

/// A port number without a sign or leading zero.
fn port(text: &str) -> Option<u16> {
    text.parse().ok().filter(|number: &u16| *number > 0 && number.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::super::settings::NAMES;
    use super::*;
    use proptest::prelude::*;

    /// The variables that the kubelet and Docker set for a Service or a link of this name (in capitals).
    fn injected_for(name: &str, ip: IpAddr, port: u16, protocol: &str) -> Vec<(String, String)> {
        let (upper, url) = (protocol.to_uppercase(), format!("{protocol}://{}", SocketAddr::new(ip, port)));
        let exposed = format!("{name}_PORT_{port}_{upper}");
        vec![
            (format!("{name}_SERVICE_HOST"), ip.to_string()),
            (format!("{name}_SERVICE_PORT"), port.to_string()),
            (format!("{name}_SERVICE_PORT_KEYS"), port.to_string()),
            (format!("{name}_PORT"), url.clone()),
            (exposed.clone(), url),
            (format!("{exposed}_PROTO"), protocol.to_owned()),
            (format!("{exposed}_PORT"), port.to_string()),
            (format!("{exposed}_ADDR"), ip.to_string()),
            (format!("{name}_NAME"), format!("/web/{}", name.to_lowercase().replace('_', "-"))),
            (format!("{name}_ENV_A"), "b".into()),
        ]
    }

    fn names(variables: &[Variable]) -> Vec<&str> {
        variables.iter().map(|variable| &*variable.name).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn injected_variables_are_never_settings(
            suffix in "(_[A-Z0-9]{1,9}){0,2}", v6: bool, address: u128, port in 1u16..,
            protocol in prop::sample::select(&PROTOCOLS[..]), setting in prop::sample::select(NAMES), text in ".{0,20}"
        ) {
            let ip = if v6 { IpAddr::V6(address.into()) } else { IpAddr::V4(u32::try_from(address >> 96).unwrap().into()) };
            let service = format!("KEYSERVICE{suffix}");
            let theirs = injected_for(&service, ip, port, protocol);
            let Variables { settings, injected } = sort(NAMES, theirs.iter().cloned());
            // If a Service has the name that a setting begins with, such as keyservice-metrics, one of its variables is
            // that setting.
            prop_assert!(settings.iter().all(|variable| NAMES.contains(&&*variable.setting())), "{settings:?}");
            prop_assert_eq!(injected.len() + settings.len(), theirs.len());

            let ours = format!("{ENV_PREFIX}{}", setting.to_uppercase().replace('-', "_"));
            for text in [&text, &theirs[3].1, &theirs[8].1] {
                let all = theirs.iter().cloned().chain([(ours.clone(), text.clone())]);
                let Variables { settings, injected } = sort(NAMES, all);
                prop_assert!(names(&settings).contains(&&*ours), "{injected:?}");
            }
        }

        #[test]
        fn variables_without_an_origin_are_not_injected(
            variables in prop::collection::vec(("KEYSERVICE_[A-Z0-9_]{0,20}", "[a-z0-9:/.]{0,20}"), 0..8)
        ) {
            let has_origin = |(name, text): &(String, String)| {
                name.ends_with("_PORT") && url(text).is_some() || name.ends_with("_NAME") && text.starts_with('/')
            };
            prop_assume!(!variables.iter().any(has_origin));
            prop_assert_eq!(sort(NAMES, variables.into_iter()).injected, Vec::<String>::new());
        }
    }
}
