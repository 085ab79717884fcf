//! Text in columns of a terminal: cut, filled and broken into lines. Pure.
//!
//! Every text that is drawn passes through here, so that it takes exactly the columns that it
//! was given, whatever it holds.

use unicode_width::UnicodeWidthChar as _;

use crate::model::is_printable;

/// The columns of a character. `None` if it takes none, or drives a terminal: then its escape
/// is drawn.
fn columns(character: char) -> Option<usize> {
    character.width().filter(|width| *width > 0 && is_printable(character))
}

/// What is drawn for each character, with its columns.
fn drawn(text: &str) -> impl Iterator<Item = (char, usize)> {
    text.chars().flat_map(|character| {
        let escape = columns(character).is_none().then(|| character.escape_default());
        let plain = columns(character).map(|width| (character, width));
        plain.into_iter().chain(escape.into_iter().flatten().map(|one| (one, 1)))
    })
}

/// How many columns a text takes.
pub(super) fn width(text: &str) -> usize {
    drawn(text).map(|(_, width)| width).sum()
}

/// The beginning of a text, at most this wide. A cut is marked.
pub(super) fn cut(text: &str, most: usize) -> String {
    let is_cut = width(text) > most;
    let room = if is_cut { most.saturating_sub(1) } else { most };
    let mut taken = 0;
    let mut cut: String = drawn(text)
        .take_while(|(_, width)| {
            taken += width;
            taken <= room
        })
        .map(|(character, _)| character)
        .collect();
    if is_cut && most > 0 {
        cut.push('…');
    }
    cut
}

/// The end of a text, at most this wide. A cut is marked.
pub(super) fn cut_front(text: &str, most: usize) -> String {
    match width(text) > most {
        true if most > 0 => format!("…{}", end(text, most - 1)),
        _ => end(text, most),
    }
}

/// The beginning of a text, filled up with spaces.
pub(super) fn fit(text: &str, columns: usize) -> String {
    let mut text = cut(text, columns);
    let free = columns.saturating_sub(width(&text));
    text.extend(std::iter::repeat_n(' ', free));
    text
}

/// The end of a text that is being typed, at most this wide.
pub(super) fn end(text: &str, most: usize) -> String {
    let all: Vec<(char, usize)> = drawn(text).collect();
    let mut taken = 0;
    let kept = all.iter().rev().take_while(|(_, width)| {
        taken += width;
        taken <= most
    });
    let kept = kept.count();
    characters(&all[all.len() - kept..])
}

/// A text as lines of at most this many columns, broken behind a space where one is near. Nothing
/// is left out.
pub(super) fn wrap(text: &str, columns: usize) -> Vec<String> {
    let columns = columns.max(2);
    let mut lines = Vec::new();
    for paragraph in text.lines() {
        let (mut line, mut taken): (Vec<(char, usize)>, usize) = (Vec::new(), 0);
        for one in drawn(paragraph) {
            if taken + one.1 > columns {
                let space = line.iter().rposition(|(character, _)| *character == ' ');
                let near = space.map(|at| at + 1).filter(|at| sum(&line[..*at]) > columns / 2);
                let rest = line.split_off(near.unwrap_or(line.len()));
                lines.push(characters(&line));
                (taken, line) = (sum(&rest), rest);
            }
            line.push(one);
            taken += one.1;
        }
        lines.push(characters(&line));
    }
    lines
}

fn sum(line: &[(char, usize)]) -> usize {
    line.iter().map(|(_, width)| width).sum()
}

fn characters(line: &[(char, usize)]) -> String {
    line.iter().map(|(character, _)| character).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_takes_the_columns_that_it_was_given() {
        assert_eq!(cut("curl", 4), "curl");
        assert_eq!(cut("curls", 4), "cur…");
        assert_eq!(cut("curl", 0), "");
        assert_eq!(fit("ab", 4), "ab  ");
        // A wide character that has no room leaves a space.
        assert_eq!(fit("中中中", 4), "中… ");
        assert_eq!(fit("中中", 4), "中中");
        assert_eq!(end("abcdef", 3), "def");
        assert_eq!(cut_front("abcdef", 3), "…ef");
        assert_eq!(cut_front("abcdef", 0), "");
        assert_eq!(cut_front("abc", 3), "abc");
        assert_eq!(end("a中中", 3), "中");
        assert_eq!(wrap("abcd\n\nef", 3), ["abc", "d", "", "ef"]);
        assert_eq!(wrap("中中", 3), ["中", "中"]);
        assert_eq!(wrap("one two threefour", 8), ["one two ", "threefou", "r"]);
        assert_eq!(wrap("a bcdefghij", 8), ["a bcdefg", "hij"]);
    }

    #[test]
    fn what_drives_a_terminal_or_takes_no_columns_is_drawn_as_its_escape() {
        assert_eq!(cut("a\u{1b}[2Jb", 20), "a\\u{1b}[2Jb");
        assert_eq!(cut("\u{202e}x", 20), "\\u{202e}x");
        // A vowel of Hangul that has no columns of its own.
        assert_eq!(cut("\u{1161}x", 20), "\\u{1161}x");
        assert_eq!(wrap("\u{9b}31m", 4), ["\\u{9", "b}31", "m"]);
    }

    proptest::proptest! {
        #[test]
        fn no_text_takes_more_or_less(text: String, columns in 0_usize..40) {
            let fitted = fit(&text, columns);
            proptest::prop_assert_eq!(width(&fitted), columns);
            proptest::prop_assert!(fitted.chars().all(is_printable));
            proptest::prop_assert!(width(&end(&text, columns)) <= columns);
            let whole: String = wrap(&text, columns).concat();
            let kept = text.lines().map(|line| cut(line, usize::MAX)).collect::<String>();
            proptest::prop_assert_eq!(whole, kept);
            for line in wrap(&text, columns) {
                proptest::prop_assert!(width(&line) <= columns.max(2));
                proptest::prop_assert!(line.chars().all(is_printable));
            }
        }
    }
}
