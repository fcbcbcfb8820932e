//! Headers as they are stored: a UTF-8 JSON array of `[name, value]`.
//!
//! A value is a string, null, or `{"b64": ".."}` for bytes that are not UTF-8, and for text that is
//! shorter so: JSON has six characters for a zero byte. Reading also takes an object of strings,
//! which is what people write in plain SQL.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use outbox_core::message::Headers;
use serde_json::{Map, Value, json};

/// The headers as bytes; `None` without any.
pub(crate) fn encode(headers: &Headers) -> Option<Vec<u8>> {
    if headers.is_empty() {
        return None;
    }
    let pairs = headers.iter().map(|(name, value)| json!([name, value.map(encode_value)]));
    Some(Value::Array(pairs.collect()).to_string().into_bytes())
}

fn encode_value(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) if string_len(text) <= base64_len(text) => json!(text),
        _ => json!({ "b64": STANDARD.encode(bytes) }),
    }
}

/// How many bytes this is as a JSON string.
fn string_len(text: &str) -> usize {
    let escaped = text.bytes().map(|byte| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 2,
        0..0x20 => 6,
        _ => 1,
    });
    escaped.sum::<usize>() + 2
}

/// How many bytes this is as `{"b64":".."}`.
fn base64_len(text: &str) -> usize {
    text.len().div_ceil(3) * 4 + 10
}

/// The pairs of stored headers; `None` when they are malformed.
pub(crate) fn decode(stored: &[u8]) -> Option<Vec<(String, Option<Vec<u8>>)>> {
    match serde_json::from_slice(stored).ok()? {
        Value::Null => Some(Vec::new()),
        Value::Array(pairs) => pairs.into_iter().map(decode_pair).collect(),
        Value::Object(pairs) => pairs
            .into_iter()
            .map(|(name, value)| match value {
                Value::String(text) => Some((name, Some(text.into_bytes()))),
                _ => None,
            })
            .collect(),
        _ => None,
    }
}

fn decode_pair(pair: Value) -> Option<(String, Option<Vec<u8>>)> {
    let Value::Array(pair) = pair else { return None };
    let [Value::String(name), value]: [Value; 2] = pair.try_into().ok()? else { return None };
    let value = match value {
        Value::Null => None,
        Value::String(text) => Some(text.into_bytes()),
        Value::Object(bytes) => Some(decode_base64(&bytes)?),
        _ => return None,
    };
    Some((name, value))
}

fn decode_base64(object: &Map<String, Value>) -> Option<Vec<u8>> {
    let Some(Value::String(text)) = object.get("b64") else { return None };
    if object.len() == 1 { STANDARD.decode(text).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(name: &str, value: &[u8]) -> (String, Option<Vec<u8>>) {
        (name.to_owned(), Some(value.to_vec()))
    }

    #[test]
    fn headers_come_back_in_order_with_any_bytes_and_null() {
        let mut headers = Headers::default();
        assert_eq!(encode(&headers), None);
        headers.append("a", Some(b"1".to_vec())).unwrap();
        headers.append("b", Some(vec![0xff, 0])).unwrap();
        headers.append("a", None).unwrap();
        headers.append("c", Some("\"é\n".into())).unwrap();
        let stored = encode(&headers).unwrap();
        let text = String::from_utf8(stored.clone()).unwrap();
        assert_eq!(text, r#"[["a","1"],["b",{"b64":"/wA="}],["a",null],["c","\"é\n"]]"#);
        let expected = [
            pair("a", b"1"),
            pair("b", &[0xff, 0]),
            ("a".to_owned(), None),
            pair("c", "\"é\n".as_bytes()),
        ];
        assert_eq!(decode(&stored).unwrap(), expected);
    }

    #[test]
    fn headers_within_the_default_limits_fit_the_column() {
        let values: [&[u8]; 9] =
            [b"\0", b"\x1f", b"\"", b"\\", b"\n", b"\x7f", b"\xff", b"a", "\u{2028}".as_bytes()];
        for value in values {
            for count in [1, 2, 63, 64] {
                for name in ["n".to_owned(), "\"".repeat(128)] {
                    let bytes = 16_384 / count - name.len();
                    let value: Vec<u8> = value.iter().copied().cycle().take(bytes).collect();
                    let mut headers = Headers::default();
                    for _ in 0..count {
                        headers.append(name.as_str(), Some(value.clone())).unwrap();
                    }
                    let stored = encode(&headers).unwrap();
                    assert!(stored.len() <= 65_536, "{} of {:?}", stored.len(), &value[..1]);
                    assert_eq!(decode(&stored).unwrap(), vec![pair(&name, &value); count]);
                }
            }
        }
    }

    #[test]
    fn text_is_stored_in_its_shorter_form() {
        let all: String = ('\0'..='\u{ff}').collect();
        for text in ["", "a", "\0", "\0\0", "\0\0\0", "\"\"\"\"", "\u{7f}\u{2028}é", &all] {
            assert_eq!(string_len(text), json!(text).to_string().len(), "{text:?}");
            let base64 = json!({ "b64": STANDARD.encode(text) }).to_string();
            assert_eq!(base64_len(text), base64.len(), "{text:?}");
            let stored = encode_value(text.as_bytes()).to_string().len();
            assert_eq!(stored, string_len(text).min(base64.len()), "{text:?}");
        }
    }

    #[test]
    fn an_object_of_strings_is_read() {
        assert_eq!(decode(br#"{"tenant": "7"}"#).unwrap(), [pair("tenant", b"7")]);
        assert_eq!(decode(b"[]").unwrap(), []);
        assert_eq!(decode(b"null").unwrap(), []);
    }

    #[test]
    fn anything_else_is_malformed() {
        for bad in [
            "",
            "x",
            "1",
            "null x",
            r#"[["a", "1"]]]"#,
            r#"{"a": 1}"#,
            r#"["a"]"#,
            r#"[["a"]]"#,
            r#"[["a", 1]]"#,
            r#"[["a", "1", "2"]]"#,
            r#"[[1, "a"]]"#,
            r#"[["a", {"b64": "?"}]]"#,
            r#"[["a", {"x": "AA=="}]]"#,
            r#"[["a", {"b64": "AA==", "c": 1}]]"#,
        ] {
            assert_eq!(decode(bad.as_bytes()), None, "{bad}");
        }
    }
}
