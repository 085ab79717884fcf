//! Text of a process in JSON: unchanged if it is UTF-8; otherwise escaped, with its bytes
//! in base64 under a second key. In memory it is what [`printable`] makes of it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Deserializer};

use super::printable::{bytes_of_printable, printable};

/// A value under one key.
pub(super) trait Shown: Clone {
    /// The text, and the bytes in base64 if the text alone does not give them.
    fn to_json(&self) -> (Self, Option<Self>);
    /// `bytes` is `None` if the JSON has no key for the bytes: an earlier version wrote it,
    /// and `text` is printable already.
    fn of_json(text: Self, bytes: Option<Option<Self>>) -> Self;
}

impl Shown for String {
    fn to_json(&self) -> (String, Option<String>) {
        if !self.contains('\\') {
            return (self.clone(), None);
        }
        match String::from_utf8(bytes_of_printable(self)) {
            Ok(text) => (text, None),
            Err(err) => (self.clone(), Some(BASE64.encode(err.as_bytes()))),
        }
    }

    fn of_json(text: String, bytes: Option<Option<String>>) -> String {
        match bytes {
            None => text,
            Some(None) => printable(text.as_bytes()),
            Some(Some(bytes)) => BASE64.decode(bytes).map_or(text, |bytes| printable(&bytes)),
        }
    }
}

impl Shown for Vec<String> {
    /// If one argument needs its bytes, the bytes of all are there.
    fn to_json(&self) -> (Vec<String>, Option<Vec<String>>) {
        let (texts, bytes): (Vec<String>, Vec<Option<String>>) =
            self.iter().map(Shown::to_json).unzip();
        if bytes.iter().all(Option::is_none) {
            return (texts, None);
        }
        let whole = |text: &String| BASE64.encode(bytes_of_printable(text));
        (texts, Some(self.iter().map(whole).collect()))
    }

    fn of_json(texts: Vec<String>, bytes: Option<Option<Vec<String>>>) -> Vec<String> {
        match bytes {
            None => texts,
            Some(None) => texts.iter().map(|text| printable(text.as_bytes())).collect(),
            Some(Some(bytes)) => {
                let mut bytes = bytes.into_iter();
                let one = |text| String::of_json(text, Some(bytes.next()));
                texts.into_iter().map(one).collect()
            }
        }
    }
}

impl<T: Shown> Shown for Option<T> {
    fn to_json(&self) -> (Option<T>, Option<Option<T>>) {
        match self.as_ref().map(Shown::to_json) {
            Some((text, bytes)) => (Some(text), bytes.map(Some)),
            None => (None, None),
        }
    }

    fn of_json(text: Option<T>, bytes: Option<Option<Option<T>>>) -> Option<T> {
        Some(T::of_json(text?, bytes.map(Option::flatten)))
    }
}

/// `Some(None)` for a key with the value null; serde's default for a missing key is `None`.
fn is_there<'de, D, T>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Option::deserialize(deserializer).map(Some)
}

/// Makes a module for a field of this name, for `#[serde(flatten, with = "…")]`.
macro_rules! keys {
    ($name:ident, $text:literal, $bytes:literal) => {
        pub(super) mod $name {
            use serde::{Deserialize, Deserializer, Serialize, Serializer};

            use crate::model::text::{Shown, is_there};

            #[derive(Serialize, Deserialize)]
            #[serde(bound(deserialize = "T: Deserialize<'de>"))]
            struct Json<T> {
                #[serde(rename = $text)]
                text: T,
                #[serde(rename = $bytes, default, deserialize_with = "is_there")]
                bytes: Option<Option<T>>,
            }

            pub(in super::super) fn serialize<T, S>(value: &T, to: S) -> Result<S::Ok, S::Error>
            where
                T: Shown + Serialize,
                S: Serializer,
            {
                let (text, bytes) = value.to_json();
                Json { text, bytes: Some(bytes) }.serialize(to)
            }

            pub(in super::super) fn deserialize<'de, T, D>(from: D) -> Result<T, D::Error>
            where
                T: Shown + Deserialize<'de>,
                D: Deserializer<'de>,
            {
                let Json { text, bytes } = Json::deserialize(from)?;
                Ok(T::of_json(text, bytes))
            }
        }
    };
}

keys!(exe, "exe", "exe_bytes");
keys!(argv, "argv", "argv_bytes");
keys!(root, "root", "root_bytes");

#[cfg(test)]
mod tests {
    use crate::model::{Ancestor, ProcessIdentity, printable};

    fn ancestor(exe: &[u8], argv: &[&[u8]]) -> Ancestor {
        Ancestor {
            identity: ProcessIdentity { pid: 7, start_time: 8 },
            exe: Some(printable(exe)),
            argv: Some(argv.iter().map(|argument| printable(argument)).collect()),
            is_proven_inside: false,
        }
    }

    #[track_caller]
    fn check(exe: &[u8], argv: &[&[u8]], expected: &str) {
        let ancestor = ancestor(exe, argv);
        let json = serde_json::to_string(&ancestor).unwrap();
        assert_eq!(json, format!(r#"{{"pid":7,"start_time":8,{expected}}}"#));
        assert_eq!(serde_json::from_str::<Ancestor>(&json).unwrap(), ancestor);
    }

    #[test]
    fn u12_text_of_a_process_is_raw_in_json_and_bytes_stand_beside_what_is_no_text() {
        check(
            b"/bin/sh",
            &[b"sh", "木☃".as_bytes(), b""],
            r#""exe":"/bin/sh","exe_bytes":null,"argv":["sh","木☃",""],"argv_bytes":null"#,
        );
        check(
            b"/tmp/a\\b\n",
            &[b"\x1b[2J", "\u{202e}".as_bytes(), br"\x41\u{41}\\"],
            concat!(
                r#""exe":"/tmp/a\\b\n","exe_bytes":null,"#,
                r#""argv":["\u001b[2J","#,
                "\"\u{202e}\",",
                r#""\\x41\\u{41}\\\\"],"argv_bytes":null"#
            ),
        );
        check(
            b"/tmp/\xff",
            &[b"a", b"\xfe\n"],
            r#""exe":"/tmp/\\xff","exe_bytes":"L3RtcC//","argv":["a","\\xfe\\n"],"argv_bytes":["YQ==","/go="]"#,
        );
        let gone = Ancestor { exe: None, argv: None, ..ancestor(b"", &[]) };
        let json = serde_json::to_string(&gone).unwrap();
        assert_eq!(
            json,
            r#"{"pid":7,"start_time":8,"exe":null,"exe_bytes":null,"argv":null,"argv_bytes":null}"#
        );
        assert_eq!(serde_json::from_str::<Ancestor>(&json).unwrap(), gone);
    }

    #[test]
    fn what_was_kept_without_bytes_is_escaped_already() {
        let json = r#"{"pid":7,"start_time":8,"exe":"/tmp/\\xff","argv":["\\u{1b}[2J"]}"#;
        let kept: Ancestor = serde_json::from_str(json).unwrap();
        assert_eq!(kept, ancestor(b"/tmp/\xff", &[b"\x1b[2J"]));
    }
}
