//! Merges the layers (file, environment, flags), reads settings from them, and collects errors with their places.

use std::convert::Infallible;

use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider, Source};

use super::environment::Variable;
use super::file::File;
use super::print::{key, one_line};
use super::value_kind::{Given, Mismatch, ValueKind};

const FLAG: &str = "flag";

const ENVIRONMENT: &str = "environment";

/// The merged layers, and the errors found so far.
#[derive(Default)]
pub(super) struct Loader<'a> {
    figment: Figment,
    file: Option<&'a File<'a>>,
    variables: &'a [Variable],
    flags: &'a [(&'static str, String)],
    /// The settings to read; `None` is all.
    only: Option<&'a [&'a str]>,
    /// A sentence for each error.
    pub(super) errors: Vec<String>,
}

impl<'a> Loader<'a> {
    /// Of two layers with the same setting, the later one wins; entries of tables are merged.
    pub(super) fn new(
        file: Option<&'a File<'a>>,
        variables: &'a [Variable],
        flags: &'a [(&'static str, String)],
    ) -> Self {
        let figment = file.map_or_else(Figment::new, |file| Figment::new().merge(file));
        let environment = variables.iter().map(|variable| (variable.setting(), &*variable.text));
        let flag_texts = flags.iter().map(|(name, text)| ((*name).to_owned(), &**text));
        let figment = figment
            .merge(TextLayer(ENVIRONMENT, environment.collect()))
            .merge(TextLayer(FLAG, flag_texts.collect()));
        Self { figment, file, variables, flags, only: None, errors: Vec::new() }
    }

    /// Ignores all settings but these, and the errors in them.
    pub(super) fn only(self, names: &'a [&'a str]) -> Self {
        Self { only: Some(names), ..self }
    }

    /// Reads a setting. `None` if it is wrong, which is reported, or if it is ignored.
    pub(super) fn read<K: ValueKind>(
        &mut self,
        name: &str,
        kind: &K,
        default: impl FnOnce() -> K::Value,
    ) -> Option<K::Value> {
        match self.given(name, kind)? {
            Some(value) => Some(value),
            None => Some(default()),
        }
    }

    /// The value of a setting in the layers: `Some(None)` if no layer has one, `None` if it is wrong or ignored.
    #[inline(never)] // Each setting has a default of its own, and would get a copy of this function.
    fn given<K: ValueKind>(&mut self, name: &str, kind: &K) -> Option<Option<K::Value>> {
        if self.only.is_some_and(|names| !names.contains(&name)) {
            return None;
        }
        let Ok(value) = self.figment.find_value(name) else { return Some(None) };
        let is_text = !matches!(self.layer(&value), Layer::File(_));
        kind.parse(&Given { value: &value, is_text })
            .map(Some)
            .map_err(|mismatches| mismatches.iter().for_each(|mismatch| self.report_mismatch(name, mismatch)))
            .ok()
    }

    /// Reports a setting whose value is fine by itself, but not `expected` together with others.
    pub(super) fn refuse(&mut self, name: &str, expected: &str) {
        if let Ok(value) = self.figment.find_value(name) {
            self.report_mismatch(name, &Mismatch::new(&value, expected));
        }
    }

    /// Reports a sentence about the value of a setting.
    pub(super) fn report(&mut self, name: &str, sentence: &str) {
        if let Ok(value) = self.figment.find_value(name) {
            self.report_at(&[name], &value, sentence);
        }
    }

    /// Reports every name in the layers that is not `known`.
    pub(super) fn refuse_unknown(&mut self, known: &[&str]) {
        let data = self.figment.data().unwrap_or_default();
        for (name, value) in data.into_values().flatten().filter(|(name, _)| !known.contains(&name.as_str()))
        {
            let simplified = name.replace(['-', '_'], "").to_lowercase();
            let similar = known.iter().find(|known| known.replace('-', "") == simplified);
            let hint = similar.map_or_else(
                || format!("the settings are {}", known.join(", ")),
                |similar| format!("did you mean {similar}?"),
            );
            self.report_at(&[&name], &value, &format!("not a setting; {hint}"));
        }
    }

    fn report_mismatch(&mut self, name: &str, mismatch: &Mismatch) {
        let Mismatch { path, origin, expected, found, is_verbatim, hint, subject } = mismatch;
        let names: Vec<&str> = [name].into_iter().chain(path.iter().map(String::as_str)).collect();
        let written = if *is_verbatim { None } else { self.written(&names, origin) };
        let found = written.as_ref().unwrap_or(found);
        self.report_at(&names, origin, &format!("{subject}expected {expected}, found {found}{hint}"));
    }

    /// Adds an error in a value, or in the part that `names` lead to, with its place.
    fn report_at(&mut self, names: &[&str], value: &Value, sentence: &str) {
        let name = key(names[0]);
        self.errors.push(match self.layer(value) {
            Layer::File(file) => format!("{}: {name}: {sentence}", file.place(names)),
            Layer::Flags => format!("{name}: {sentence} (--{name})"),
            Layer::Environment => {
                let variable = self.variables.iter().rfind(|variable| variable.setting() == names[0]);
                let variable = variable.map_or("the environment", |variable| &variable.name);
                format!("{name}: {sentence} ({})", one_line(variable))
            }
        });
    }

    /// A value as it is written, on one line. `None` for a text of a variable or a flag, and for a part of one.
    fn written(&self, names: &[&str], value: &Value) -> Option<String> {
        let text = match self.layer(value) {
            Layer::File(file) => return file.written(names),
            _ if names.len() > 1 || value.as_str().is_some() => return None,
            Layer::Flags => self.flags.iter().rfind(|(name, _)| *name == names[0]).map(|(_, text)| text),
            Layer::Environment => {
                let variable = self.variables.iter().rfind(|variable| variable.setting() == names[0]);
                variable.map(|variable| &variable.text)
            }
        };
        text.map(|text| one_line(text.trim()))
    }

    fn layer(&self, value: &Value) -> Layer<'a> {
        match (self.figment.get_metadata(value.tag()), self.file) {
            (Some(Metadata { source: Some(Source::File(_)), .. }), Some(file)) => Layer::File(file),
            (Some(metadata), _) if metadata.name == FLAG => Layer::Flags,
            _ => Layer::Environment,
        }
    }
}

/// Where a value comes from.
enum Layer<'a> {
    File(&'a File<'a>),
    Environment,
    Flags,
}

/// The environment or the flags. Both are parsed in the same way, so that a value means the same in both.
struct TextLayer<'a>(&'static str, Vec<(String, &'a str)>);

impl Provider for TextLayer<'_> {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.0)
    }

    fn data(&self) -> figment::Result<Map<Profile, Dict>> {
        let entry = |(name, text): &(String, &str)| {
            let value: Value = text.parse().unwrap_or_else(|never: Infallible| match never {});
            (name.clone(), value)
        };
        Ok(Profile::Default.collect(self.1.iter().map(entry).collect()))
    }
}
