//! Decodes responses in every format, independently of the daemon's encoders.

use super::Response;

pub const FORMATS: [&str; 6] = ["raw", "hex", "base64", "base64url", "json", "jwk"];

/// The bytes of hexadecimal digits.
pub fn unhex(text: &str) -> Vec<u8> {
    assert!(text.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')), "{text}");
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// The bytes of base64 digits, with these last two of the alphabet, and with or without padding. Decodes bit by bit,
/// unlike the daemon's library.
pub fn unbase64(text: &str, last: &str, is_padded: bool) -> Vec<u8> {
    let alphabet = format!("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789{last}");
    let digits = text.trim_end_matches('=');
    let padding = text.len() - digits.len();
    assert_eq!(
        padding,
        if is_padded { digits.len().next_multiple_of(4) - digits.len() } else { 0 },
        "{text}"
    );
    let mut bytes = Vec::new();
    let (mut bits, mut held) = (0_u32, 0);
    for digit in digits.chars() {
        bits = bits << 6 | u32::try_from(alphabet.find(digit).expect("a digit")).unwrap();
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push(u8::try_from(bits >> held & 0xff).unwrap());
        }
        bits &= 0xfff;
    }
    assert_eq!(bits & ((1 << held) - 1), 0, "unused bits are zero");
    bytes
}

/// The key of one JSON object.
fn key_of_object(json: &serde_json::Value) -> Vec<u8> {
    let members = json.as_object().unwrap();
    if members.contains_key("kty") {
        assert_eq!(members.len(), 3);
        assert_eq!(json["kty"], "oct");
        assert_eq!(unbase64(json["kid"].as_str().unwrap(), "-_", false).len(), 16);
        return unbase64(json["k"].as_str().unwrap(), "-_", false);
    }
    assert_eq!(members.len(), 3);
    assert_eq!(json["encoding"], "base64");
    let key = unbase64(json["key"].as_str().unwrap(), "+/", true);
    assert_eq!(json["length"], key.len());
    key
}

fn key_of_line(format: &str, line: &str) -> Vec<u8> {
    match format {
        "hex" => unhex(line),
        "base64" => unbase64(line, "+/", true),
        "base64url" => unbase64(line, "-_", false),
        other => panic!("{other}"),
    }
}

/// The only key of a response in `format`.
pub fn key(format: &str, response: &Response) -> Vec<u8> {
    assert_eq!(response.status, 200, "{format}: {:?}", response.text());
    match format {
        "raw" => response.body.clone(),
        "json" | "jwk" => key_of_object(&response.json()),
        _ => key_of_line(format, response.text().strip_suffix('\n').expect("one newline at the end")),
    }
}

/// The keys of a batch.
pub fn batch(format: &str, response: &Response) -> Vec<Vec<u8>> {
    assert_eq!(response.status, 200, "{format}: {:?}", response.text());
    match format {
        "json" => response.json().as_array().unwrap().iter().map(key_of_object).collect(),
        "jwk" => {
            let json = response.json();
            assert_eq!(json.as_object().unwrap().len(), 1);
            json["keys"].as_array().unwrap().iter().map(key_of_object).collect()
        }
        _ => {
            let text = response.text();
            let lines = text.strip_suffix('\n').expect("a newline at the end").split('\n');
            lines.map(|line| key_of_line(format, line)).collect()
        }
    }
}
