//! Texts of log entries.

use std::net::IpAddr;

/// Shortens `text` to at most `max` bytes, at the end of a character.
pub fn truncate(text: &mut String, max: usize) {
    let end = (0..=max.min(text.len())).rfind(|&at| text.is_char_boundary(at));
    text.truncate(end.unwrap_or_default());
}

/// The text of an address, as `Display` has it. That takes a thousand instructions for IPv4, five times as many.
pub fn ip_text(ip: IpAddr) -> String {
    let IpAddr::V4(ip) = ip else { return ip.to_string() };
    let mut text = String::with_capacity("255.255.255.255".len());
    for (index, octet) in ip.octets().into_iter().enumerate() {
        if index > 0 {
            text.push('.');
        }
        text.push_str(itoa::Buffer::new().format(octet));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_address_is_written_as_it_is_displayed(ip: IpAddr) {
            prop_assert_eq!(ip_text(ip), ip.to_string());
        }
    }
}
