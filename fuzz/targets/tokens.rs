//! A tokens file with arbitrary bytes. Accepted grants, written out and read again, are the same. Errors name the
//! file, and the line if there is one, and no error repeats a token of the file.

#![no_main]

use std::collections::HashSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::LazyLock;

use key_service::access::token::PREFIX;
use key_service::access::tokens_file::{self, Grant};
use libfuzzer_sys::fuzz_target;

static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("key-service-fuzz-{}-tokens", std::process::id()));
    fs::write(&path, "").expect("a temporary file can be written");
    fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("this process owns the file");
    path
});

/// The shortest prefix of a token that an error must not repeat.
const SECRET_PREFIX_LENGTH: usize = PREFIX.len() + 8;

fuzz_target!(|input: &[u8]| {
    match read(input) {
        Ok(grants) => {
            let digests: HashSet<_> = grants.iter().map(|grant| grant.digest).collect();
            assert_eq!(digests.len(), grants.len(), "each grant has its own hash");
            let lines: String = grants.iter().map(|grant| format!("{grant}\n")).collect();
            assert!(std::str::from_utf8(input).is_ok_and(|text| text.lines().count() >= grants.len()));
            assert_eq!(read(lines.as_bytes()), Ok(grants), "{lines}");
        }
        Err(errors) => {
            assert!(!errors.is_empty(), "a rejected file has an error");
            let lines = input.split(|byte| *byte == b'\n').count();
            for error in &errors {
                let rest = error.strip_prefix(FILE.to_str().expect("the path is ASCII"));
                let rest = rest.expect("an error names the file");
                if let Some(numbered) = rest.strip_prefix(", line ") {
                    let number = numbered.split(':').next().and_then(|number| number.parse::<usize>().ok());
                    assert!(number.is_some_and(|number| (1..=lines).contains(&number)), "{error}");
                }
                let secrets =
                    input.windows(SECRET_PREFIX_LENGTH).filter(|text| text.starts_with(PREFIX.as_bytes()));
                for secret in secrets {
                    let is_repeated =
                        error.as_bytes().windows(SECRET_PREFIX_LENGTH).any(|text| text == secret);
                    assert!(!is_repeated, "{error:?} repeats a possible token");
                }
            }
        }
    }
});

fn read(bytes: &[u8]) -> Result<Vec<Grant>, Vec<String>> {
    fs::write(&*FILE, bytes).expect("a temporary file can be written");
    tokens_file::read(&FILE)
}
