//! A configuration: a file of any bytes, and after a NUL byte flags, one a line.
//!
//! It is valid or refused, never a panic. What is valid prints as a file that means the same. What is refused has a
//! reason, and each reason says in which file or flag it lies.

#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use key_service::config::{Config, ConfigErrors, MAX_SIZE_LIMIT, Sources};
use libfuzzer_sys::fuzz_target;

/// The settings that have a flag.
const FLAGS: [&str; 5] = ["host", "srv-port", "max-size", "metrics-port", "log-level"];

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
            assert!(config.max_connections > 0 && config.max_bulk_streams > 0 && config.rates.burst > 0);
            assert!(!config.proxy_protocol || !config.proxies.trusted.is_empty());
            let printed = config.to_string();
            assert_eq!(load(printed.as_bytes(), &[]), Ok(config), "{printed}");
        }
        Err(mistakes) => {
            assert!(mistakes.iter().count() > 0, "a refusal has a reason");
            for mistake in mistakes.iter() {
                let file = FILE.to_str().expect("its name is ASCII");
                let in_flag = flags.iter().any(|(name, _)| mistake.contains(&format!("(--{name})")));
                assert!(in_flag || mistake.contains(file), "{mistake:?} names no source");
            }
        }
    }
});

/// `settings`, not `load`: a certificate that is named is not looked for on this machine.
fn load(file: &[u8], flags: &[(&'static str, String)]) -> Result<Config, ConfigErrors> {
    fs::write(&*FILE, file).expect("a temporary file can be written");
    Sources { file: Some(FILE.clone()), flags: flags.to_vec() }.settings()
}
