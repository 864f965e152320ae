//! Values and texts as TOML has them, and as an error quotes them.

use figment::value::Value;

/// The longest text that an error quotes from a configuration, in characters.
const QUOTE_MAX: usize = 200;

/// A value as TOML writes it.
pub(super) fn to_toml(value: &Value) -> String {
    match value {
        Value::String(_, text) => quoted(text),
        Value::Bool(_, boolean) => boolean.to_string(),
        Value::Dict(_, entries) if entries.is_empty() => "{}".into(),
        Value::Dict(_, entries) => {
            let entry = |(name, value): (&String, &Value)| format!("{} = {}", key(name), to_toml(value));
            format!("{{ {} }}", entries.iter().map(entry).collect::<Vec<_>>().join(", "))
        }
        Value::Array(_, items) => format!("[{}]", items.iter().map(to_toml).collect::<Vec<_>>().join(", ")),
        Value::Char(_, char) => quoted(&char.to_string()),
        Value::Empty(..) => "nothing".into(),
        Value::Num(_, number) => match (number.to_u128(), number.to_i128(), number.to_f64()) {
            (Some(integer), ..) => integer.to_string(),
            (None, Some(integer), _) => integer.to_string(),
            (None, None, Some(fraction)) => format!("{fraction:?}"),
            _ => "a number".into(),
        },
    }
}

/// A key as TOML writes it.
pub(super) fn key(name: &str) -> String {
    let is_bare = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if name.chars().all(is_bare) && !name.is_empty() { name.to_owned() } else { quoted(name) }
}

/// A basic string of TOML. What does not print is escaped, so that none of it reaches a terminal or begins a line.
pub(super) fn quoted(text: &str) -> String {
    let characters = text.chars().map(|c| match c {
        '\'' => "'".to_owned(),
        // TOML has none of Rust's own escapes beyond \t, \n, \r, quotes and backslashes.
        c if c == '\0' || c.escape_debug().len() > 2 => format!("\\U{:08x}", u32::from(c)),
        c => c.escape_debug().to_string(),
    });
    format!("\"{}\"", characters.collect::<String>())
}

/// The first line of a text, with escapes for what does not print, and `…` if the text goes on.
pub(super) fn one_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let mut shown: String = line
        .chars()
        .take(QUOTE_MAX)
        .flat_map(|c| match c {
            '"' | '\'' | '\\' => vec![c],
            c => c.escape_debug().collect(),
        })
        .collect();
    if line.chars().nth(QUOTE_MAX).is_some() || line.len() < text.trim_end().len() {
        shown.push('…');
    }
    shown
}
