//! Configuration loading. An input is the content of a file, then optionally a NUL byte and flags, one per line.
//!
//! Loading never panics. A valid configuration prints as a file that loads as the same configuration. An invalid one
//! has at least one error, and each error names the file or the flag.

#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use key_service::config::{Config, ConfigErrors, MAX_SIZE_LIMIT, Sources, settings};
use libfuzzer_sys::fuzz_target;

/// The settings that have a flag.
static FLAGS: LazyLock<Vec<&str>> = LazyLock::new(|| {
    settings().into_iter().filter(|setting| setting.flag.is_some()).map(|setting| setting.name).collect()
});

static FILE: LazyLock<PathBuf> =
    LazyLock::new(|| std::env::temp_dir().join(format!("key-service-fuzz-{}.toml", std::process::id())));

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(2, |byte| *byte == 0);
    let file = parts.next().unwrap_or_default();
    let flags = parts.next().and_then(|flags| std::str::from_utf8(flags).ok()).unwrap_or_default();
    let flags: Vec<_> = flags
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once('=')?;
            Some((*FLAGS.iter().find(|flag| **flag == name)?, value.to_owned()))
        })
        .collect();
    match load(file, &flags) {
        Ok(config) => {
            assert!((1..=MAX_SIZE_LIMIT).contains(&config.max_size));
            assert!(
                config.max_connections > 0 && config.max_bulk_streams > 0 && !config.rate_burst.is_zero()
            );
            assert!(!config.proxy_protocol || !config.trusted_proxies.is_empty());
            let printed = config.to_string();
            assert_eq!(load(printed.as_bytes(), &[]), Ok(config), "{printed}");
        }
        Err(errors) => {
            assert!(errors.iter().count() > 0, "an invalid configuration has an error");
            for error in errors.iter() {
                let file = FILE.to_str().expect("the path is ASCII");
                let in_flag = flags.iter().any(|(name, _)| error.contains(&format!("(--{name})")));
                assert!(in_flag || error.contains(file), "{error:?} names no source");
            }
        }
    }
});

/// Uses `settings`, not `load`, so that certificate files need not exist on this machine.
fn load(file: &[u8], flags: &[(&'static str, String)]) -> Result<Config, ConfigErrors> {
    fs::write(&*FILE, file).expect("a temporary file can be written");
    Sources { file: Some(FILE.clone()), flags: flags.to_vec() }.settings()
}
