//! Headers as they are stored: a UTF-8 JSON array of `[name, value]`.
//!
//! A value is a string, null, or `{"b64": ".."}` for bytes that are not UTF-8. Reading also takes
//! an object of strings, which is what people write in plain SQL.

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
        Ok(text) => json!(text),
        Err(_) => json!({ "b64": STANDARD.encode(bytes) }),
    }
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
