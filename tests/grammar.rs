//! The grammar of a length, tested with all short texts and with random texts.

use key_service::keys::key::{KeyLength, LengthError};
use proptest::prelude::*;

/// The grammar, implemented independently of the library.
fn matches_grammar(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_digit()) && !text.starts_with('0')
}

#[test]
fn texts_of_up_to_three_ascii_characters_follow_the_grammar() {
    let characters: Vec<String> = (0..128_u8).map(|byte| char::from(byte).to_string()).collect();
    let mut texts = vec![String::new()];
    for _ in 0..3 {
        texts = texts
            .iter()
            .flat_map(|text| characters.iter().map(move |last| format!("{text}{last}")))
            .collect();
        for text in &texts {
            let expected = match text.as_str() {
                "0" => Err(LengthError::Zero),
                _ if !matches_grammar(text) => Err(LengthError::NotAnInteger),
                // Three-digit numbers without leading zeros sort in the same order as texts.
                _ if text.len() == 3 && text.as_str() > "500" => Err(LengthError::TooLarge { limit: 500 }),
                _ => Ok(text.clone()),
            };
            assert_eq!(KeyLength::parse(text, 500).map(|length| length.bytes().to_string()), expected);
        }
    }
    assert_eq!(texts.len(), 128 * 128 * 128);
    assert_eq!(KeyLength::parse("", 500), Err(LengthError::NotAnInteger));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_text_is_a_length_or_an_error(text in "\\PC*", limit in 1..=u64::MAX) {
        match KeyLength::parse(&text, limit) {
            Ok(length) => {
                prop_assert!(matches_grammar(&text));
                prop_assert!((1..=limit).contains(&length.bytes()));
                prop_assert_eq!(length.bytes().to_string(), text);
            }
            Err(LengthError::Zero) => prop_assert_eq!(text, "0"),
            Err(LengthError::NotAnInteger) => prop_assert!(!matches_grammar(&text)),
            Err(LengthError::TooLarge { limit: reported }) => {
                prop_assert!(matches_grammar(&text));
                prop_assert_eq!(reported, limit);
            }
        }
    }

    #[test]
    fn any_digits_are_a_length_or_an_error(text in "[0-9]{1,40}", limit in 1..=u64::MAX) {
        let expected = match text.parse::<u128>() {
            _ if text == "0" => Err(LengthError::Zero),
            _ if text.starts_with('0') => Err(LengthError::NotAnInteger),
            Ok(number) if number <= limit.into() => Ok(text.clone()),
            _ => Err(LengthError::TooLarge { limit }),
        };
        prop_assert_eq!(KeyLength::parse(&text, limit).map(|length| length.bytes().to_string()), expected);
    }

    #[test]
    fn a_non_digit_anywhere_is_an_error(
        number in 1..=u64::MAX, at in 0..20_usize, other in "[^0-9]",
    ) {
        let mut text = number.to_string();
        text.insert_str(at.min(text.len()), &other);
        prop_assert_eq!(KeyLength::parse(&text, u64::MAX), Err(LengthError::NotAnInteger));
    }
}
