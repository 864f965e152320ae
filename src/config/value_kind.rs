//! The kinds of settings: how each checks, reads and prints a value.

use std::fmt::Display;
use std::marker::PhantomData;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use figment::value::Value;

use super::print::to_toml;
use crate::access::file_source::FileSource;
use crate::server::tls::settings::MinVersion;

/// How values of one kind are checked, read and printed.
pub(super) trait ValueKind {
    /// The type of the field of `Config`.
    type Value;

    /// What an error says it expected.
    fn expected(&self) -> String;

    /// The valid values, for the documents.
    fn values(&self) -> String {
        self.expected()
    }

    /// # Errors
    /// Everything that is wrong with the value.
    fn parse(&self, given: &Given<'_>) -> Result<Self::Value, Vec<Mismatch>>;

    /// The value that [`ValueKind::parse`] reads as `value`.
    fn to_value(&self, value: &Self::Value) -> Value;
}

/// A value to parse.
#[derive(Debug)]
pub(super) struct Given<'a> {
    /// The value.
    pub(super) value: &'a Value,
    /// Whether it is from a variable or a flag, where figment takes digits for a number.
    pub(super) is_text: bool,
}

/// A value, or a part of it, that is not what was expected.
#[derive(Debug)]
pub(super) struct Mismatch {
    /// The keys, or the index, that lead to the part; empty for the whole value.
    pub(super) path: Vec<String>,
    /// A value from the same source: a table may be merged from several.
    pub(super) origin: Value,
    /// What was expected.
    pub(super) expected: String,
    /// The part as TOML, for values whose source does not have them as written.
    pub(super) found: String,
    /// Whether `found` is reported even if the source has the part as written.
    pub(super) is_verbatim: bool,
    /// Added to the sentence; may be empty.
    pub(super) hint: &'static str,
    /// Put before the sentence; may be empty.
    pub(super) subject: String,
}

impl Mismatch {
    pub(super) fn new(value: &Value, expected: impl Into<String>) -> Self {
        Self {
            path: Vec::new(),
            origin: value.clone(),
            expected: expected.into(),
            found: to_toml(value),
            is_verbatim: false,
            hint: "",
            subject: String::new(),
        }
    }
}

/// An error for the whole value if there is no `parsed` one.
fn require<K: ValueKind>(
    kind: &K,
    given: &Given<'_>,
    parsed: Option<K::Value>,
) -> Result<K::Value, Vec<Mismatch>> {
    parsed.ok_or_else(|| vec![Mismatch::new(given.value, kind.expected())])
}

/// TOML's integers are signed, those of the environment and of flags are not.
pub(super) fn whole_number(value: &Value) -> Option<u64> {
    value.to_u128().and_then(|number| number.try_into().ok()).or_else(|| value.to_i128()?.try_into().ok())
}

/// A whole number.
pub(super) struct Integer<T>(RangeInclusive<u64>, PhantomData<T>);

/// A whole number in `range`, which must fit `T`.
pub(super) fn integer<T>(range: RangeInclusive<u64>) -> Integer<T> {
    Integer(range, PhantomData)
}

impl<T: TryFrom<u64> + TryInto<u64> + Copy> ValueKind for Integer<T> {
    type Value = T;

    fn expected(&self) -> String {
        format!("a whole number from {} to {}", self.0.start(), self.0.end())
    }

    fn parse(&self, given: &Given<'_>) -> Result<T, Vec<Mismatch>> {
        let number = whole_number(given.value).filter(|number| self.0.contains(number));
        require(self, given, number.and_then(|number| number.try_into().ok()))
    }

    fn to_value(&self, value: &T) -> Value {
        (*value).try_into().map_or_else(|_| unreachable!("no setting is above u64"), Value::from)
    }
}

/// A period of whole seconds.
pub(super) struct Seconds(RangeInclusive<u64>);

/// A duration of so many seconds, written as whole seconds or as a text with a unit: `10`, `"10s"`, `"5m"`, `"1h"`.
pub(super) fn duration(seconds: RangeInclusive<u64>) -> Seconds {
    Seconds(seconds)
}

impl Seconds {
    fn parse_unit(text: &str) -> Option<u64> {
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        let unit: u64 = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return None,
        };
        let is_plain = digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse::<u64>().ok().filter(|_| is_plain)?.checked_mul(unit)
    }
}

impl ValueKind for Seconds {
    type Value = Duration;

    fn expected(&self) -> String {
        format!("{} (whole seconds, or a number with s, m or h)", self.values())
    }

    fn values(&self) -> String {
        let with_unit = |seconds: &u64| match seconds {
            0 => "0".to_owned(),
            hours if hours % 3600 == 0 => format!("{}h", hours / 3600),
            seconds => format!("{seconds}s"),
        };
        format!("a duration from {} to {}", with_unit(self.0.start()), with_unit(self.0.end()))
    }

    fn parse(&self, given: &Given<'_>) -> Result<Duration, Vec<Mismatch>> {
        let seconds = whole_number(given.value).or_else(|| Self::parse_unit(given.value.as_str()?));
        require(self, given, seconds.filter(|seconds| self.0.contains(seconds)).map(Duration::from_secs))
    }

    fn to_value(&self, value: &Duration) -> Value {
        value.as_secs().into()
    }
}

/// A setting that 0 turns off.
pub(super) struct NoneIfZero<K>(K);

/// `kind`, or `None` for its zero.
pub(super) fn none_if_zero<K>(kind: K) -> NoneIfZero<K> {
    NoneIfZero(kind)
}

impl<K: ValueKind<Value: Default + PartialEq + Copy>> ValueKind for NoneIfZero<K> {
    type Value = Option<K::Value>;

    fn expected(&self) -> String {
        self.0.expected()
    }

    fn values(&self) -> String {
        self.0.values()
    }

    fn parse(&self, given: &Given<'_>) -> Result<Self::Value, Vec<Mismatch>> {
        self.0.parse(given).map(|value| Some(value).filter(|value| *value != K::Value::default()))
    }

    fn to_value(&self, value: &Self::Value) -> Value {
        self.0.to_value(&value.unwrap_or_default())
    }
}

/// True or false.
pub(super) struct Boolean;

impl ValueKind for Boolean {
    type Value = bool;

    fn expected(&self) -> String {
        "true or false".into()
    }

    fn parse(&self, given: &Given<'_>) -> Result<bool, Vec<Mismatch>> {
        require(self, given, given.value.to_bool())
    }

    fn to_value(&self, value: &bool) -> Value {
        (*value).into()
    }
}

/// A text with a grammar of its own.
pub(super) struct Text<T> {
    expected: String,
    of: PhantomData<T>,
}

/// A text that `T` parses; `expected` is its grammar in words.
pub(super) fn text<T>(expected: &str) -> Text<T> {
    Text { expected: expected.into(), of: PhantomData }
}

/// One of these texts, which `T` parses.
pub(super) fn one_of<T>(names: &[&str]) -> Text<T> {
    text(&format!("one of {}", names.join(", ")))
}

impl<T: FromStr + Display> ValueKind for Text<T> {
    type Value = T;

    fn expected(&self) -> String {
        self.expected.clone()
    }

    fn parse(&self, given: &Given<'_>) -> Result<T, Vec<Mismatch>> {
        // A variable's digits come as a number. For a mode they are a text: 0660 is not 660.
        let digits = given.value.to_u128().filter(|_| given.is_text).map(|number| number.to_string());
        let text = given.value.as_str().or(digits.as_deref());
        require(self, given, text.and_then(|text| text.parse().ok()))
    }

    fn to_value(&self, value: &T) -> Value {
        value.to_string().into()
    }
}

/// A version of TLS. 1.2 is a number in the environment, and in a file without quotation marks.
pub(super) struct TlsVersion;

impl ValueKind for TlsVersion {
    type Value = MinVersion;

    fn expected(&self) -> String {
        "\"1.2\" or \"1.3\"".into()
    }

    fn parse(&self, given: &Given<'_>) -> Result<MinVersion, Vec<Mismatch>> {
        let text = given.value.as_str().map_or_else(|| to_toml(given.value), str::to_owned);
        require(self, given, text.parse().ok())
    }

    fn to_value(&self, value: &MinVersion) -> Value {
        value.to_string().into()
    }
}

/// A file, or none for the empty text. It is opened later, by `named_files.rs`.
pub(super) struct FilePath;

impl ValueKind for FilePath {
    type Value = Option<FileSource>;

    fn expected(&self) -> String {
        "a path or credential:NAME".into()
    }

    fn parse(&self, given: &Given<'_>) -> Result<Self::Value, Vec<Mismatch>> {
        match given.value.as_str() {
            Some("") => Ok(None),
            path => require(self, given, path.and_then(|path| path.parse().ok()).map(Some)),
        }
    }

    fn to_value(&self, value: &Self::Value) -> Value {
        value.as_ref().map_or_else(String::new, ToString::to_string).into()
    }
}

/// A list of texts. In a variable its brackets may be left out.
pub(super) struct List<T> {
    item: &'static str,
    of: PhantomData<T>,
}

/// A list of what `T` parses; `item` is its grammar in words.
pub(super) fn list<T>(item: &'static str) -> List<T> {
    List { item, of: PhantomData }
}

impl<T: FromStr + Display> ValueKind for List<T> {
    type Value = Vec<T>;

    fn expected(&self) -> String {
        format!("a list, each item {}", self.item)
    }

    fn parse(&self, given: &Given<'_>) -> Result<Vec<T>, Vec<Mismatch>> {
        let items: Vec<Value> = match given.value {
            Value::Array(_, items) => items.clone(),
            Value::String(_, text) => {
                text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(Value::from).collect()
            }
            _ => return require(self, given, None),
        };
        let (mut parsed, mut mismatches) = (Vec::new(), Vec::new());
        for (index, item) in items.iter().enumerate() {
            match item.as_str().and_then(|text| text.parse().ok()) {
                Some(item) => parsed.push(item),
                None => mismatches.push(Mismatch {
                    path: vec![index.to_string()],
                    origin: given.value.clone(),
                    ..Mismatch::new(item, self.item)
                }),
            }
        }
        if mismatches.is_empty() { Ok(parsed) } else { Err(mismatches) }
    }

    fn to_value(&self, value: &Vec<T>) -> Value {
        value.iter().map(ToString::to_string).collect::<Vec<_>>().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_one_unit_and_no_sign() {
        let parse = |text: &str| {
            let given = Given { value: &text.into(), is_text: false };
            duration(1..=3600).parse(&given).ok().map(|duration| duration.as_secs())
        };
        for (text, seconds) in
            [("1s", 1), ("10s", 10), ("010s", 10), ("5m", 300), ("60m", 3600), ("1h", 3600)]
        {
            assert_eq!(parse(text), Some(seconds), "{text}");
        }
        for text in [
            "", "s", "10", "0s", "61m", "2h", "1d", "500ms", "1.5s", "+1s", "-1s", " 1s", "1 s", "1S",
            "1m30s", "1µ",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!(parse(&format!("{}h", u64::MAX)), None);
    }
}
