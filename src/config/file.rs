//! The configuration file as a layer, with the line of each value.

use std::ops::Range;
use std::path::Path;

use figment::value::{Dict, Empty, Map, Tag, Value};
use figment::{Metadata, Profile, Provider};
use toml::de::{DeTable, DeValue, Error};

use super::one_line;

/// The most syntax errors that are reported: a file of another kind may have one on each line.
const ERRORS_MAX: usize = 10;

/// A file that was read, and is TOML.
pub(super) struct File<'a> {
    path: &'a Path,
    text: &'a str,
    table: DeTable<'a>,
}

impl<'a> File<'a> {
    /// # Errors
    /// A sentence for each line that is not TOML.
    pub(super) fn parse(path: &'a Path, text: &'a str) -> Result<Self, Vec<String>> {
        let (table, errors) = DeTable::parse_recoverable(text);
        let file = Self { path, text, table: table.into_inner() };
        let mut lines: Vec<(usize, String)> = errors.iter().map(|error| file.syntax_error(error)).collect();
        if lines.is_empty() {
            return Ok(file);
        }
        lines.sort_by_key(|(line, _)| *line);
        lines.dedup_by_key(|(line, _)| *line);
        Err(lines.into_iter().take(ERRORS_MAX).map(|(_, sentence)| sentence).collect())
    }

    /// `/path:line` of the setting, of an entry of its table, or of an item of its list.
    pub(super) fn place(&self, names: &[&str]) -> String {
        let line = self.find(names).map_or(1, |(key, _)| self.line(key.start));
        format!("{}:{line}", self.path.display())
    }

    /// A value as it is written.
    pub(super) fn written(&self, names: &[&str]) -> Option<String> {
        let (_, value) = self.find(names)?;
        self.text.get(value).filter(|text| !text.is_empty()).map(one_line)
    }

    fn syntax_error(&self, error: &Error) -> (usize, String) {
        let span = error.span().unwrap_or_default();
        let line = self.line(span.start);
        let found = self.text.get(span).map(one_line).filter(|text| !text.is_empty());
        let found = found.map_or_else(String::new, |text| format!(", found {text}"));
        let message = error.message();
        (line, format!("{}:{line}: not valid TOML: {message}{found}", self.path.display()))
    }

    fn line(&self, at: usize) -> usize {
        1 + self.text.bytes().take(at).filter(|byte| *byte == b'\n').count()
    }

    /// Where the key and the value are, as far along `names` as there are any; an item of a list is its own key.
    fn find(&self, names: &[&str]) -> Option<(Range<usize>, Range<usize>)> {
        let (name, inner) = names.split_first()?;
        let (key, value) = self.table.iter().find(|(key, _)| key.get_ref() == name)?;
        let (mut spans, mut value) = ((key.span(), value.span()), value.get_ref());
        for name in inner {
            let next = match value {
                DeValue::Table(table) => table
                    .iter()
                    .find(|(key, _)| key.get_ref() == name)
                    .map(|(key, value)| (key.span(), value)),
                DeValue::Array(items) => {
                    let item = name.parse().ok().and_then(|at: usize| items.get(at));
                    item.map(|item| (item.span(), item))
                }
                _ => None,
            };
            let Some((key, found)) = next else { break };
            (spans, value) = ((key, found.span()), found.get_ref());
        }
        Some(spans)
    }
}

impl Provider for &File<'_> {
    fn metadata(&self) -> Metadata {
        Metadata::from("TOML file", self.path)
    }

    fn data(&self) -> figment::Result<Map<Profile, Dict>> {
        Ok(Profile::Default.collect(dict(&self.table)))
    }
}

fn dict(table: &DeTable<'_>) -> Dict {
    table.iter().map(|(key, entry)| (key.get_ref().to_string(), value(entry.get_ref()))).collect()
}

/// What no setting can be (a date, a number beyond 64 bits) is no value: it is shown as it is written.
fn value(found: &DeValue<'_>) -> Value {
    let nothing = || Value::Empty(Tag::Default, Empty::Unit);
    match found {
        DeValue::String(text) => text.to_string().into(),
        DeValue::Integer(number) => {
            i64::from_str_radix(number.as_str(), number.radix()).map_or_else(|_| nothing(), Value::from)
        }
        DeValue::Float(number) => number.as_str().parse::<f64>().map_or_else(|_| nothing(), Value::from),
        DeValue::Boolean(truth) => (*truth).into(),
        DeValue::Datetime(_) => nothing(),
        DeValue::Array(items) => items.iter().map(|item| value(item.get_ref())).collect::<Vec<_>>().into(),
        DeValue::Table(table) => dict(table).into(),
    }
}
