//! `SHA256SUMS` in the form that `sha256sum --check` reads. Pure.
//!
//! driftd chooses all names in a case, so none needs an escape.

use std::collections::BTreeMap;

use crate::model::{Sha256Hash, printable};

/// The text for these files.
pub(super) fn text(files: &BTreeMap<String, Sha256Hash>) -> String {
    files.iter().map(|(name, digest)| format!("{}  {name}\n", digest.hex())).collect()
}

/// Reads the text. The error names what is wrong with it.
pub(super) fn parse(text: &str) -> Result<BTreeMap<String, Sha256Hash>, String> {
    let mut files = BTreeMap::new();
    if !text.is_empty() && !text.ends_with('\n') {
        return Err("its last line is cut".to_owned());
    }
    for (number, line) in text.lines().enumerate() {
        let wrong = || format!("line {} is no digest and name", number + 1);
        let (digest, name) = line.split_once("  ").ok_or_else(wrong)?;
        let digest = digest.parse().map_err(|_| wrong())?;
        if !is_name(name) {
            return Err(format!("`{}` is no name in a case", printable(name.as_bytes())));
        }
        if files.insert(name.to_owned(), digest).is_some() {
            return Err(format!("`{name}` is there twice"));
        }
    }
    Ok(files)
}

/// Whether driftd may have chosen this name: relative, and of plain characters.
pub(super) fn is_name(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let is_part =
        |part: &str| !part.is_empty() && !part.starts_with('.') && part.bytes().all(is_plain);
    name.len() < 256 && name.split('/').all(is_part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_nothing_else_is_accepted() {
        let files: BTreeMap<String, Sha256Hash> = [("manifest.json", 1), ("objects/ab", 2)]
            .map(|(name, byte)| (name.to_owned(), Sha256Hash([byte; 32])))
            .into();
        let whole = text(&files);
        assert_eq!(parse(&whole).unwrap(), files);
        assert_eq!(parse("").unwrap(), BTreeMap::new());
        for wrong in [
            whole.trim_end().to_owned(),
            whole.clone() + &whole,
            whole.replace("objects/ab", "../ab"),
            whole.replace("objects/ab", "/etc/passwd"),
            whole.replace("objects/ab", "objects/.part"),
            whole.replace("objects/ab", "objects/a\u{1b}b"),
            whole.replace("  ", " "),
            whole[1..].to_owned(),
        ] {
            assert!(parse(&wrong).is_err(), "{wrong}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_sums_or_none(text: String) {
            let _ = parse(&text);
        }
    }
}
