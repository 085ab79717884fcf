//! Text from outside, escaped for terminals and logs, and read back.
//!
//! All text that a container can choose passes through here before it is shown. The two
//! directions are exact: no two byte strings have the same escaped form.

use std::fmt::Write as _;

/// Bytes as text that is safe on a terminal and in a log. Printable characters stay;
/// control and invisible characters, invalid UTF-8 and the backslash are escaped, so that
/// [`bytes_of_printable`] gives the same bytes again.
pub fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                ' '..='~' if character != '\\' => text.push(character),
                '\\' => text.push_str("\\\\"),
                _ if is_printable(character) => text.push(character),
                _ => write!(text, "{}", character.escape_default())
                    .expect("writing to a String cannot fail"),
            }
        }
        for byte in chunk.invalid() {
            write!(text, "\\x{byte:02x}").expect("writing to a String cannot fail");
        }
    }
    text
}

/// The bytes that [`printable`] turned into `text`.
pub fn bytes_of_printable(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        bytes.extend_from_slice(&rest.as_bytes()[..at]);
        rest = &rest[at..];
        let length = escape(rest, &mut bytes).unwrap_or_else(|| {
            // Cut text: the backslash begins no escape.
            bytes.push(b'\\');
            1
        });
        rest = &rest[length..];
    }
    bytes.extend_from_slice(rest.as_bytes());
    bytes
}

/// Reads the escape at the beginning of `text`, and returns its length.
fn escape(text: &str, bytes: &mut Vec<u8>) -> Option<usize> {
    let byte = match text.as_bytes().get(1)? {
        b'\\' => b'\\',
        b't' => b'\t',
        b'r' => b'\r',
        b'n' => b'\n',
        b'x' => {
            bytes.push(u8::from_str_radix(text.get(2..4)?, 16).ok()?);
            return Some(4);
        }
        b'u' => {
            let (digits, _) = text.get(2..)?.strip_prefix('{')?.split_once('}')?;
            let character = char::from_u32(u32::from_str_radix(digits, 16).ok()?)?;
            bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
            return Some(digits.len() + 4);
        }
        _ => return None,
    };
    bytes.push(byte);
    Some(2)
}

/// Whether a character is shown as it is: letters and symbols of any script are. Characters
/// that move the cursor, or that reorder, combine with or hide other text, are not.
pub fn is_printable(character: char) -> bool {
    match character {
        ' '..='~' => true,
        // Invisible, although Unicode calls them letters and a symbol.
        '\u{115f}' | '\u{1160}' | '\u{2800}' | '\u{3164}' | '\u{ffa0}' => false,
        // The standard library escapes controls, formats, separators and unassigned
        // characters.
        _ => character.is_alphanumeric() || character.escape_debug().len() == 1,
    }
}

/// Cuts text to at most `most` bytes, between two characters.
pub fn shorten(text: &mut String, most: usize) {
    let mut end = most.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn printing_never_merges_two_names(one: Vec<u8>, other: Vec<u8>) {
            proptest::prop_assert_eq!(printable(&one) == printable(&other), one == other);
            proptest::prop_assert_eq!(bytes_of_printable(&printable(&one)), one);
        }
    }
}
