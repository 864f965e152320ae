//! Text within a limit.

/// Shortens `text` to at most `max` bytes, at the end of a character.
pub fn truncate(text: &mut String, max: usize) {
    let end = (0..=max.min(text.len())).rfind(|&at| text.is_char_boundary(at));
    text.truncate(end.unwrap_or_default());
}
