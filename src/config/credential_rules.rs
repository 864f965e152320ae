//! The setting `credentials`: a table with an entry for each credential.

use std::collections::BTreeMap;

use figment::value::{Dict, Value};

use super::print::quoted;
use super::value_kind::{Given, Mismatch, ValueKind, whole_number};
use crate::keys::format::Kind;
use crate::keys::key::KeyLength;
use crate::keys::key_spec::KeySpec;
use crate::keys::password::Alphabet;
use crate::systemd::credentials::{self, CredentialRules};

const LENGTH: &str = "length";
const FORMAT: &str = "format";
const ALPHABET: &str = "alphabet";

/// The most likely cause of a name that is none.
const QUOTATION: &str = "; a name with a dot stands in quotation marks";

/// A table of credentials, each a table with `length`, `format` and `alphabet`.
pub(super) struct CredentialTable;

impl ValueKind for CredentialTable {
    type Value = CredentialRules;

    fn expected(&self) -> String {
        "a table of credentials".into()
    }

    fn parse(&self, given: &Given<'_>) -> Result<CredentialRules, Vec<Mismatch>> {
        let Value::Dict(_, entries) = given.value else {
            return Err(vec![Mismatch::new(given.value, self.expected())]);
        };
        let (mut rules, mut mismatches) = (BTreeMap::new(), Vec::new());
        for (selector, entry) in entries {
            match parse_rule(selector, entry) {
                Ok(spec) => _ = rules.insert(selector.clone(), spec),
                Err(mut mismatch) => {
                    mismatch.path.insert(0, selector.clone());
                    mismatches.push(Mismatch { subject: format!("{}: ", quoted(selector)), ..*mismatch });
                }
            }
        }
        if mismatches.is_empty() { Ok(CredentialRules::new(rules)) } else { Err(mismatches) }
    }

    fn to_value(&self, rules: &CredentialRules) -> Value {
        rules
            .iter()
            .map(|(selector, spec)| (selector.to_owned(), rule_to_value(spec)))
            .collect::<Dict>()
            .into()
    }
}

/// The key that an entry describes.
fn parse_rule(selector: &str, entry: &Value) -> Result<KeySpec, Box<Mismatch>> {
    let with_hint = |mismatch| Box::new(Mismatch { hint: QUOTATION, ..mismatch });
    if !credentials::is_selector(selector) {
        let expected = "the name of a credential, or UNIT:NAME with the unit's suffix";
        return Err(with_hint(Mismatch::new(entry, expected)));
    }
    let Value::Dict(_, fields) = entry else {
        let expected = "a table such as { length = 32, format = \"hex\" }";
        return Err(with_hint(Mismatch::new(entry, expected)));
    };
    let known = [LENGTH, FORMAT, ALPHABET];
    if let Some((name, value)) = fields.iter().find(|(name, _)| !known.contains(&name.as_str())) {
        return Err(with_hint(Mismatch {
            path: vec![name.clone()],
            found: quoted(name),
            is_verbatim: true,
            ..Mismatch::new(value, known.join(", "))
        }));
    }
    let in_field = |name: &str, value: &Value, expected: String| {
        let mismatch = Mismatch::new(value, format!("{name} to be {expected}"));
        Box::new(Mismatch { path: vec![name.to_owned()], ..mismatch })
    };
    let one_of = |names: Vec<&str>| format!("one of {}", names.join(", "));

    let kind = match fields.get(ALPHABET) {
        None => Kind::Key,
        Some(value) => {
            let alphabet = Alphabet::ALL.into_iter().find(|alphabet| value.as_str() == Some(alphabet.name()));
            let expected = || one_of(Alphabet::ALL.map(Alphabet::name).to_vec());
            Kind::Password(alphabet.ok_or_else(|| in_field(ALPHABET, value, expected()))?)
        }
    };
    let max = kind.length_max(credentials::LENGTH_MAX);
    let default = Value::from(credentials::LENGTH_DEFAULT);
    let value = fields.get(LENGTH).unwrap_or(&default);
    let length = whole_number(value).and_then(|length| KeyLength::new(length, max).ok());
    let length = length.ok_or_else(|| in_field(LENGTH, value, format!("a whole number from 1 to {max}")))?;
    let format = match fields.get(FORMAT) {
        None => kind.formats()[0],
        Some(value) => {
            let format = kind.formats().iter().find(|format| value.as_str() == Some(format.name()));
            let expected = || one_of(kind.formats().iter().map(|format| format.name()).collect());
            *format.ok_or_else(|| in_field(FORMAT, value, expected()))?
        }
    };
    Ok(KeySpec::new(kind, length, format, None).expect("only a batch can be too large"))
}

/// The entry that [`parse_rule`] reads as `spec`.
fn rule_to_value(spec: &KeySpec) -> Value {
    let mut fields = Dict::from([
        (LENGTH.to_owned(), spec.length().bytes().into()),
        (FORMAT.to_owned(), spec.format().name().into()),
    ]);
    if let Kind::Password(alphabet) = spec.kind() {
        fields.insert(ALPHABET.to_owned(), alphabet.name().into());
    }
    fields.into()
}
