//! Decodes responses in every format, independently of the daemon's encoders.

use super::Response;

pub const FORMATS: [&str; 6] = ["raw", "hex", "base64", "base64url", "json", "jwk"];

/// Decodes lowercase hexadecimal digits.
pub fn decode_hex(text: &str) -> Vec<u8> {
    assert!(text.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')), "{text}");
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// Decodes base64 digits bit by bit, unlike the daemon's library. `last_two` are the last two digits of the alphabet.
pub fn decode_base64(text: &str, last_two: &str, is_padded: bool) -> Vec<u8> {
    let alphabet = format!("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789{last_two}");
    let digits = text.trim_end_matches('=');
    let padding = text.len() - digits.len();
    assert_eq!(
        padding,
        if is_padded { digits.len().next_multiple_of(4) - digits.len() } else { 0 },
        "{text}"
    );
    let mut bytes = Vec::new();
    let (mut bits, mut bit_count) = (0_u32, 0);
    for digit in digits.chars() {
        bits = bits << 6 | u32::try_from(alphabet.find(digit).expect("a digit")).unwrap();
        bit_count += 6;
        if bit_count >= 8 {
            bit_count -= 8;
            bytes.push(u8::try_from(bits >> bit_count & 0xff).unwrap());
        }
        bits &= 0xfff;
    }
    assert_eq!(bits & ((1 << bit_count) - 1), 0, "unused bits are zero");
    bytes
}

/// Decodes the key in a JSON object: the `json` format or a JWK.
fn decode_object(json: &serde_json::Value) -> Vec<u8> {
    let members = json.as_object().unwrap();
    if members.contains_key("kty") {
        assert_eq!(members.len(), 3);
        assert_eq!(json["kty"], "oct");
        assert_eq!(decode_base64(json["kid"].as_str().unwrap(), "-_", false).len(), 16);
        return decode_base64(json["k"].as_str().unwrap(), "-_", false);
    }
    assert_eq!(members.len(), 3);
    assert_eq!(json["encoding"], "base64");
    let key = decode_base64(json["key"].as_str().unwrap(), "+/", true);
    assert_eq!(json["length"], key.len());
    key
}

fn decode_line(format: &str, line: &str) -> Vec<u8> {
    match format {
        "hex" => decode_hex(line),
        "base64" => decode_base64(line, "+/", true),
        "base64url" => decode_base64(line, "-_", false),
        other => panic!("{other}"),
    }
}

/// Decodes the only key of a response in `format`.
pub fn decode_key(format: &str, response: &Response) -> Vec<u8> {
    assert_eq!(response.status, 200, "{format}: {:?}", response.text());
    match format {
        "raw" => response.body.clone(),
        "json" | "jwk" => decode_object(&response.json()),
        _ => decode_line(format, response.text().strip_suffix('\n').expect("one newline at the end")),
    }
}

/// Decodes the keys of a batch.
pub fn decode_batch(format: &str, response: &Response) -> Vec<Vec<u8>> {
    assert_eq!(response.status, 200, "{format}: {:?}", response.text());
    match format {
        "json" => response.json().as_array().unwrap().iter().map(decode_object).collect(),
        "jwk" => {
            let json = response.json();
            assert_eq!(json.as_object().unwrap().len(), 1);
            json["keys"].as_array().unwrap().iter().map(decode_object).collect()
        }
        _ => {
            let text = response.text();
            let lines = text.strip_suffix('\n').expect("a newline at the end").split('\n');
            lines.map(|line| decode_line(format, line)).collect()
        }
    }
}
