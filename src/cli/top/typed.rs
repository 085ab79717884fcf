//! A line of text that a person types: a filter, a confirmation, a reason. Pure.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use crate::model::is_printable;

/// Most characters of a line.
const MOST: usize = 500;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Typed(String);

impl Typed {
    pub(super) fn of(text: &str) -> Typed {
        Typed(text.to_owned())
    }

    pub(super) fn text(&self) -> &str {
        &self.0
    }

    /// Takes a key that edits the line; other keys change nothing.
    pub(super) fn key(&mut self, key: KeyEvent) {
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('u') if is_control => self.0.clear(),
            KeyCode::Char('w') if is_control => {
                let kept = self.0.trim_end().rfind(' ').map_or(0, |at| at + 1);
                self.0.truncate(kept);
            }
            KeyCode::Backspace => drop(self.0.pop()),
            KeyCode::Char(character)
                if !key.modifiers.intersects(KeyModifiers::CONTROL | KeyModifiers::ALT) =>
            {
                self.push(character);
            }
            _ => (),
        }
    }

    /// Takes pasted text, as one line.
    pub(super) fn paste(&mut self, text: &str) {
        for character in text.trim().chars() {
            self.push(if character.is_whitespace() { ' ' } else { character });
        }
    }

    fn push(&mut self, character: char) {
        if is_printable(character) && self.0.chars().count() < MOST {
            self.0.push(character);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_edited() {
        let mut line = Typed::default();
        let key = |code, modifiers| KeyEvent::new(code, modifiers);
        for character in "one two\u{1b}".chars() {
            line.key(key(KeyCode::Char(character), KeyModifiers::NONE));
        }
        line.key(key(KeyCode::Char('X'), KeyModifiers::SHIFT));
        assert_eq!(line.text(), "one twoX");
        line.key(key(KeyCode::Backspace, KeyModifiers::NONE));
        line.key(key(KeyCode::Char('a'), KeyModifiers::CONTROL));
        line.key(key(KeyCode::Enter, KeyModifiers::NONE));
        assert_eq!(line.text(), "one two");
        line.key(key(KeyCode::Char('w'), KeyModifiers::CONTROL));
        assert_eq!(line.text(), "one ");
        line.paste("\nit is\n\u{1b}[2J drift\r\n");
        assert_eq!(line.text(), "one it is [2J drift");
        line.key(key(KeyCode::Char('u'), KeyModifiers::CONTROL));
        line.paste(&"x".repeat(2 * MOST));
        assert_eq!(line.text().len(), MOST);
    }
}
