//! The grammar of a length, over texts that nobody thought of.

use key_service::key::{KeyLength, LengthError};
use proptest::prelude::*;

/// The grammar, written another way than the code has it.
fn is_a_number(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_digit()) && !text.starts_with('0')
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_text_is_a_length_or_a_reason(text in "\\PC*", limit in 1..=u64::MAX) {
        match KeyLength::parse(&text, limit) {
            Ok(length) => {
                prop_assert!(is_a_number(&text));
                prop_assert!((1..=limit).contains(&length.bytes()));
                prop_assert_eq!(length.bytes().to_string(), text);
            }
            Err(LengthError::Zero) => prop_assert_eq!(text, "0"),
            Err(LengthError::NotAnInteger) => prop_assert!(!is_a_number(&text)),
            Err(LengthError::TooLarge { limit: named }) => {
                prop_assert!(is_a_number(&text));
                prop_assert_eq!(named, limit);
            }
        }
    }

    #[test]
    fn digits_alone_decide(text in "[0-9]{1,40}", limit in 1..=u64::MAX) {
        let expected = match text.parse::<u128>() {
            _ if text == "0" => Err(LengthError::Zero),
            _ if text.starts_with('0') => Err(LengthError::NotAnInteger),
            Ok(number) if number <= limit.into() => Ok(text.clone()),
            _ => Err(LengthError::TooLarge { limit }),
        };
        prop_assert_eq!(KeyLength::parse(&text, limit).map(|length| length.bytes().to_string()), expected);
    }

    #[test]
    fn one_other_character_anywhere_is_enough_to_refuse(
        number in 1..=u64::MAX, at in 0..20_usize, other in "[^0-9]",
    ) {
        let mut text = number.to_string();
        text.insert_str(at.min(text.len()), &other);
        prop_assert_eq!(KeyLength::parse(&text, u64::MAX), Err(LengthError::NotAnInteger));
    }
}
