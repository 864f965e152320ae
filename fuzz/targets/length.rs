//! The grammar of a length, compared with an independent implementation that compares numbers as text.

#![no_main]

use key_service::keys::key::{KeyLength, LengthError};
use libfuzzer_sys::fuzz_target;

const LIMITS: [u64; 6] = [1, 9, 1024, 65_536, 1 << 30, u64::MAX];

fuzz_target!(|text: &str| {
    for limit in LIMITS {
        let expected = expected(text, &limit.to_string()).map_err(|error| match error {
            ExpectedError::NotAnInteger => LengthError::NotAnInteger,
            ExpectedError::Zero => LengthError::Zero,
            ExpectedError::TooLarge => LengthError::TooLarge { limit },
        });
        let found = KeyLength::parse(text, limit).map(|length| length.bytes().to_string());
        assert_eq!(found, expected.map(str::to_owned), "{text:?}, at most {limit}");
    }
});

enum ExpectedError {
    NotAnInteger,
    Zero,
    TooLarge,
}

fn expected<'a>(text: &'a str, limit: &str) -> Result<&'a str, ExpectedError> {
    if text == "0" {
        return Err(ExpectedError::Zero);
    }
    if text.is_empty() || text.starts_with('0') || text.chars().any(|char| !"0123456789".contains(char)) {
        return Err(ExpectedError::NotAnInteger);
    }
    // Without leading zeros, the longer number is larger. Of the same length, the lexicographically greater one is
    // larger.
    if (text.len(), text) > (limit.len(), limit) { Err(ExpectedError::TooLarge) } else { Ok(text) }
}
