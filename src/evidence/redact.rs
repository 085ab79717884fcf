//! Environments without their values: the names, and how long the values are. Pure.
//!
//! Secrets are passed to containers in variables. A case keeps their values only if a user asks
//! for that.

use serde::Serialize;
use serde_json::Value;

use crate::model::printable;

/// How many variables of one process are listed.
const MOST: usize = 4096;

/// A variable without its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Variable {
    name: String,
    /// How long its value is.
    bytes: u64,
}

/// The variables of the text of `/proc/PID/environ`. A text without `=` is a value that has lost
/// its name: programs overwrite their environment. Only its length is kept.
pub(super) fn variables(environ: &[u8]) -> Vec<Variable> {
    let texts = environ.split(|&byte| byte == 0).filter(|text| !text.is_empty());
    let variable = |text: &[u8]| match text.iter().position(|&byte| byte == b'=') {
        Some(at) if is_name(&text[..at]) => {
            Variable { name: printable(&text[..at]), bytes: (text.len() - at - 1) as u64 }
        }
        _ => Variable { name: String::new(), bytes: text.len() as u64 },
    };
    texts.take(MOST).map(variable).collect()
}

/// Whether this is the name of a variable, and no part of a value with a `=` in it.
fn is_name(name: &[u8]) -> bool {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.-%()".contains(byte);
    !name.is_empty() && name.len() <= 256 && name.iter().all(is_plain)
}

/// A specification with the lengths of all variables in the place of their values.
pub(super) fn specification(document: &mut Value) {
    match document {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::Array(texts) if key == "env" => texts.iter_mut().for_each(redact),
                    other => specification(other),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(specification),
        _ => (),
    }
}

fn redact(variable: &mut Value) {
    let Value::String(text) = variable else {
        *variable = Value::Null;
        return;
    };
    *text = match text.split_once('=') {
        Some((name, value)) if is_name(name.as_bytes()) => {
            format!("{name}=({} bytes)", value.len())
        }
        _ => format!("({} bytes)", text.len()),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_value_of_a_variable_is_kept() {
        let environ = b"HOME=/root\0TOKEN=a=b\0EMPTY=\0s3cret\0my secret=x\0\xff=y\0";
        let all: Vec<(String, u64)> =
            variables(environ).into_iter().map(|one| (one.name, one.bytes)).collect();
        let expected = [("HOME", 5), ("TOKEN", 3), ("EMPTY", 0), ("", 6), ("", 11), ("", 3)];
        assert_eq!(all, expected.map(|(name, bytes)| (name.to_owned(), bytes)));
        let mut document = serde_json::json!({
            "process": {"args": ["sh"], "env": ["TOKEN=hunter2", "hunter2", 7]},
            "hooks": {"prestart": [{"path": "/h", "env": ["KEY=hunter2"]}]},
            "env": {"a": ["x"]},
        });
        specification(&mut document);
        assert_eq!(
            document,
            serde_json::json!({
                "process": {"args": ["sh"], "env": ["TOKEN=(7 bytes)", "(7 bytes)", null]},
                "hooks": {"prestart": [{"path": "/h", "env": ["KEY=(7 bytes)"]}]},
                "env": {"a": ["x"]},
            })
        );
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_an_environment(environ: Vec<u8>) {
            let _ = variables(&environ);
        }
    }
}
