//! The grammar of a length, against another statement of it that does no arithmetic: numbers are compared as texts.

#![no_main]

use key_service::keys::key::{KeyLength, LengthError};
use libfuzzer_sys::fuzz_target;

const LIMITS: [u64; 6] = [1, 9, 1024, 65_536, 1 << 30, u64::MAX];

fuzz_target!(|text: &str| {
    for limit in LIMITS {
        let expected = expected(text, &limit.to_string()).map_err(|problem| match problem {
            Problem::NotAnInteger => LengthError::NotAnInteger,
            Problem::Zero => LengthError::Zero,
            Problem::TooLarge => LengthError::TooLarge { limit },
        });
        let found = KeyLength::parse(text, limit).map(|length| length.bytes().to_string());
        assert_eq!(found, expected.map(str::to_owned), "{text:?}, at most {limit}");
    }
});

enum Problem {
    NotAnInteger,
    Zero,
    TooLarge,
}

fn expected<'a>(text: &'a str, limit: &str) -> Result<&'a str, Problem> {
    if text == "0" {
        return Err(Problem::Zero);
    }
    if text.is_empty() || text.starts_with('0') || text.chars().any(|char| !"0123456789".contains(char)) {
        return Err(Problem::NotAnInteger);
    }
    // Of two numbers without leading zeros the longer one is larger, and of the same length the later one in a dictionary.
    if (text.len(), text) > (limit.len(), limit) { Err(Problem::TooLarge) } else { Ok(text) }
}
