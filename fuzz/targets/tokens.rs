//! A file of tokens, of any bytes. What is taken is written and read again as it was; what is refused is refused by its
//! line, and no mistake repeats a token that stands there.

#![no_main]

use std::collections::HashSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::LazyLock;

use key_service::access::token::{self, Grant, PREFIX};
use libfuzzer_sys::fuzz_target;

static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("key-service-fuzz-{}-tokens", std::process::id()));
    fs::write(&path, "").expect("a temporary file can be written");
    fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("it is ours");
    path
});

/// A piece of a token that is too much of it.
const TELLING: usize = PREFIX.len() + 8;

fuzz_target!(|input: &[u8]| {
    match read(input) {
        Ok(grants) => {
            let digests: HashSet<_> = grants.iter().map(|grant| grant.digest).collect();
            assert_eq!(digests.len(), grants.len(), "a hash stands for one grant");
            let lines: String = grants.iter().map(|grant| format!("{grant}\n")).collect();
            assert!(std::str::from_utf8(input).is_ok_and(|text| text.lines().count() >= grants.len()));
            assert_eq!(read(lines.as_bytes()), Ok(grants), "{lines}");
        }
        Err(mistakes) => {
            assert!(!mistakes.is_empty(), "a refusal has a reason");
            let lines = input.split(|byte| *byte == b'\n').count();
            for mistake in &mistakes {
                let rest = mistake.strip_prefix(FILE.to_str().expect("its name is ASCII"));
                let rest = rest.expect("a mistake names the file");
                if let Some(numbered) = rest.strip_prefix(", line ") {
                    let number = numbered.split(':').next().and_then(|number| number.parse::<usize>().ok());
                    assert!(number.is_some_and(|number| (1..=lines).contains(&number)), "{mistake}");
                }
                let secrets = input.windows(TELLING).filter(|text| text.starts_with(PREFIX.as_bytes()));
                for secret in secrets {
                    let is_told = mistake.as_bytes().windows(TELLING).any(|text| text == secret);
                    assert!(!is_told, "{mistake:?} repeats what may be a token");
                }
            }
        }
    }
});

fn read(bytes: &[u8]) -> Result<Vec<Grant>, Vec<String>> {
    fs::write(&*FILE, bytes).expect("a temporary file can be written");
    token::read(&FILE)
}
