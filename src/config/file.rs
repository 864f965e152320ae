//! The configuration file as a layer, with the line of each value.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;

use figment::value::{Dict, Empty, Map, Tag, Value};
use figment::{Metadata, Profile, Provider};
use toml::de::{DeTable, DeValue, Error};

use super::print::one_line;
use crate::access::file_source;

/// The largest configuration file that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;

/// The most syntax errors that are reported: a file of another kind may have one on each line.
const ERRORS_MAX: usize = 10;

/// The text of the configuration file; `None` if nothing has this path.
///
/// # Errors
/// A sentence, if there is something that can't be read, or that others may write to.
pub(super) fn read(path: &Path) -> Result<Option<String>, String> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // A directory above it may be a dangling symbolic link.
            return file_source::dangling_link(path).map_or(Ok(None), Err);
        }
        Err(error) => {
            return Err(format!("{}: expected a file that can be read, found: {error}", path.display()));
        }
        Ok(_) => {}
    }
    // Everybody may write to it, and yet it is always empty.
    if path == Path::new("/dev/null") {
        return Ok(Some(String::new()));
    }
    let (bytes, _) = file_source::read_file(path, FILE_MAX)?;
    let text = str::from_utf8(&bytes).map_err(|error| {
        let line = 1 + bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
        format!("{}:{line}: expected UTF-8, found {error}", path.display())
    })?;
    Ok(Some(text.to_owned()))
}

/// A configuration file that is valid TOML.
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

    /// `/path:line` of the setting, or of the part of its value that `names` lead to.
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

    /// The spans of key and value, as far along `names` as they exist; an item of a list is its own key.
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

/// A value of figment. One that no setting can have (a date, a number beyond 64 bits) becomes empty: errors quote it as
/// it is written.
fn value(found: &DeValue<'_>) -> Value {
    let empty = || Value::Empty(Tag::Default, Empty::Unit);
    match found {
        DeValue::String(text) => text.to_string().into(),
        DeValue::Integer(number) => {
            i64::from_str_radix(number.as_str(), number.radix()).map_or_else(|_| empty(), Value::from)
        }
        DeValue::Float(number) => number.as_str().parse::<f64>().map_or_else(|_| empty(), Value::from),
        DeValue::Boolean(boolean) => (*boolean).into(),
        DeValue::Datetime(_) => empty(),
        DeValue::Array(items) => items.iter().map(|item| value(item.get_ref())).collect::<Vec<_>>().into(),
        DeValue::Table(table) => dict(table).into(),
    }
}
