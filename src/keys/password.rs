//! Passwords: independent characters of a named alphabet, each as likely as any other.

use strum::IntoStaticStr;

use crate::keys::encoding::to_usize;
use crate::keys::generator::{Generator, GeneratorError};
use crate::keys::key::{Key, KeyLength};
use crate::keys::secret_buf::{SecretArray, SecretBuf};

/// The most characters of a password, unless `max-size` is smaller.
pub const PASSWORD_MAX: u64 = 1024;

/// The characters that a password may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum Alphabet {
    /// Letters and digits: 62.
    #[default]
    Alnum,
    /// The printing characters of ASCII without the space: 94.
    Ascii,
    /// Decimal digits: 10.
    Digits,
    /// Lower-case hexadecimal digits: 16.
    Hex,
    /// Letters and digits without 0, 1, I, O and l, for people to read and type: 57.
    Unambiguous,
}

impl Alphabet {
    /// Every alphabet, the default one first.
    pub const ALL: [Self; 5] = [Self::Alnum, Self::Ascii, Self::Digits, Self::Hex, Self::Unambiguous];

    /// The value of `?alphabet=` that selects this alphabet.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// The characters, each once; all are ASCII.
    pub fn characters(self) -> &'static [u8] {
        match self {
            Self::Alnum => b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
            Self::Ascii => {
                b"!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~"
            }
            Self::Digits => b"0123456789",
            Self::Hex => b"0123456789abcdef",
            Self::Unambiguous => b"23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz",
        }
    }

    /// Calls `write` with the parts of a decimal number: the bits of entropy in a password of `length` characters, rounded
    /// down to a tenth.
    #[expect(clippy::cast_precision_loss, reason = "both numbers are far below 2⁵²")]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small positive number")]
    pub fn write_entropy_bits(self, length: KeyLength, mut write: impl FnMut(&str)) {
        let bits = (self.characters().len() as f64).log2() * length.bytes() as f64;
        let tenths = (bits * 10.0) as u64;
        write(itoa::Buffer::new().format(tenths / 10));
        write(".");
        write(itoa::Buffer::new().format(tenths % 10));
    }
}

/// Generates a password of `length` characters, at most [`PASSWORD_MAX`].
///
/// # Errors
/// The generator's failure.
pub fn generate(length: KeyLength, alphabet: Alphabet, generator: &Generator) -> Result<Key, GeneratorError> {
    let mut password = SecretBuf::with_capacity(to_usize(length.bytes()));
    append(length, alphabet, generator, &mut password.0)?;
    Ok(Key::from(password))
}

/// Appends a password of `length` characters to `text`, which needs the capacity for it: a buffer that grows leaves a
/// copy behind.
///
/// # Errors
/// The generator's failure. What was appended is not wiped.
pub(super) fn append(
    length: KeyLength,
    alphabet: Alphabet,
    generator: &Generator,
    text: &mut Vec<u8>,
) -> Result<(), GeneratorError> {
    let characters = alphabet.characters();
    // A byte above the last multiple of the alphabet's size would make the first characters likelier than the others.
    let limit = 256 - 256 % characters.len();
    let end = text.len() + to_usize(length.bytes());
    let mut pool = SecretArray::<64>::new();
    while text.len() < end {
        generator.fill(pool.as_mut())?;
        let accepted = pool.as_mut().iter().map(|byte| usize::from(*byte)).filter(|byte| *byte < limit);
        for byte in accepted.take(end - text.len()) {
            text.push(characters[byte % characters.len()]);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::generator::OsRandom;

    #[test]
    fn alphabets_have_the_characters_of_their_names() {
        let of = |is_in: fn(&u8) -> bool| (0..=u8::MAX).filter(is_in).collect::<Vec<_>>();
        let sorted = |alphabet: Alphabet| {
            let mut characters = alphabet.characters().to_vec();
            characters.sort_unstable();
            characters
        };
        assert_eq!(sorted(Alphabet::Alnum), of(u8::is_ascii_alphanumeric));
        assert_eq!(sorted(Alphabet::Ascii), of(u8::is_ascii_graphic));
        assert_eq!(sorted(Alphabet::Digits), of(u8::is_ascii_digit));
        assert_eq!(sorted(Alphabet::Hex), of(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')));
        let unambiguous = of(|c| c.is_ascii_alphanumeric() && !b"01IOl".contains(c));
        assert_eq!(sorted(Alphabet::Unambiguous), unambiguous);
    }

    #[test]
    fn entropy_is_never_rounded_up() {
        let bits = |alphabet: Alphabet, length| {
            let mut text = String::new();
            alphabet.write_entropy_bits(KeyLength::new(length, PASSWORD_MAX).unwrap(), |part| text += part);
            text
        };
        assert_eq!(bits(Alphabet::Hex, 32), "128.0");
        assert_eq!(bits(Alphabet::Alnum, 24), "142.9"); // 142.9007
        assert_eq!(bits(Alphabet::Digits, 6), "19.9"); // 19.93
    }

    /// Pearson's statistic of the numbers of each character.
    fn chi_squared(alphabet: Alphabet, characters: impl Iterator<Item = u8>) -> f64 {
        let mut counts = [0_u32; 256];
        characters.for_each(|character| counts[usize::from(character)] += 1);
        let counts: Vec<_> =
            alphabet.characters().iter().map(|c| f64::from(counts[usize::from(*c)])).collect();
        let expected = counts.iter().sum::<f64>() / f64::from(u32::try_from(counts.len()).unwrap());
        counts.iter().map(|count| (count - expected).powi(2) / expected).sum()
    }

    /// The limit that an unbiased source exceeds with a probability below 10⁻⁹. By the Wilson-Hilferty approximation,
    /// the cube root of the statistic over its degrees of freedom is normal, and exceeds 6.5 of its deviations with a
    /// probability of 4·10⁻¹¹. Over the five alphabets the test fails by chance less than once in 2·10⁸ runs.
    fn limit(alphabet: Alphabet) -> f64 {
        let freedom = f64::from(u32::try_from(alphabet.characters().len()).unwrap() - 1);
        let spread = 2.0 / (9.0 * freedom);
        freedom * (1.0 - spread + 6.5 * spread.sqrt()).powi(3)
    }

    #[test]
    fn characters_are_equally_likely_and_a_modulo_would_fail() {
        let generator = Generator::new(OsRandom).unwrap();
        let length = KeyLength::new(1024, PASSWORD_MAX).unwrap();
        for alphabet in Alphabet::ALL {
            let generated: Vec<u8> = (0..1024)
                .flat_map(|_| generate(length, alphabet, &generator).unwrap().as_bytes().to_vec())
                .collect();
            let found = chi_squared(alphabet, generated.into_iter());
            assert!(found < limit(alphabet), "{alphabet:?}: {found}, limit {}", limit(alphabet));
            let mut bytes = vec![0; 1 << 20];
            generator.fill(&mut bytes).unwrap();
            let characters = alphabet.characters();
            let biased = bytes.iter().map(|byte| characters[usize::from(*byte) % characters.len()]);
            let found = chi_squared(alphabet, biased);
            // 16 divides 256, so a modulo adds no bias.
            assert_eq!(found > limit(alphabet), alphabet != Alphabet::Hex, "{alphabet:?}: {found}");
        }
    }

    #[test]
    fn a_password_has_exactly_its_length() {
        let generator = Generator::new(OsRandom).unwrap();
        for alphabet in Alphabet::ALL {
            for length in [1, 2, 63, 64, 65, 1024] {
                let length = KeyLength::new(length, PASSWORD_MAX).unwrap();
                let password = generate(length, alphabet, &generator).unwrap();
                assert_eq!(password.as_bytes().len() as u64, length.bytes());
                assert!(password.as_bytes().iter().all(|c| alphabet.characters().contains(c)));
            }
        }
    }
}
