//! Writes text of a fixed number of columns into the buffer, in styles that need no colour to be
//! understood.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};

use crate::cli::top::text::{cut, fit, width};
use crate::model::Severity;

pub(super) struct Paint<'a> {
    buffer: &'a mut Buffer,
    colour: bool,
}

impl<'a> Paint<'a> {
    pub(super) fn new(buffer: &'a mut Buffer, colour: bool) -> Paint<'a> {
        Paint { buffer, colour }
    }

    /// Fills one line of an area.
    pub(super) fn line(&mut self, area: Rect, line: u16, text: &str, style: Style) {
        if line < area.height {
            let text = fit(text, usize::from(area.width));
            self.buffer.set_string(area.x, area.y + line, text, style);
        }
    }

    /// Writes text at a column of an area, as much as fits, and returns the column behind it.
    pub(super) fn text(
        &mut self,
        area: Rect,
        column: u16,
        line: u16,
        text: &str,
        style: Style,
    ) -> u16 {
        let room = area.width.saturating_sub(column);
        if line >= area.height || room == 0 {
            return column;
        }
        let text = cut(text, usize::from(room));
        self.buffer.set_string(area.x + column, area.y + line, &text, style);
        column + u16::try_from(width(&text)).unwrap_or(room)
    }

    /// Makes an area empty.
    pub(super) fn clear(&mut self, area: Rect) {
        for line in 0..area.height {
            self.line(area, line, "", Style::reset());
        }
    }

    /// Marks one line of an area.
    pub(super) fn mark(&mut self, area: Rect, line: u16, style: Style) {
        if line < area.height {
            self.buffer.set_style(Rect { y: area.y + line, height: 1, ..area }, style);
        }
    }

    pub(super) fn good(&self) -> Style {
        self.coloured(Color::Green)
    }

    pub(super) fn bad(&self) -> Style {
        self.coloured(Color::Red).add_modifier(Modifier::BOLD)
    }

    pub(super) fn of_severity(&self, severity: Severity) -> Style {
        match severity {
            Severity::Critical | Severity::High => self.coloured(Color::Red),
            Severity::Medium => self.coloured(Color::Yellow),
            Severity::Low => self.coloured(Color::Cyan),
            Severity::Info => Style::new(),
        }
    }

    fn coloured(&self, colour: Color) -> Style {
        if self.colour { Style::new().fg(colour) } else { Style::new() }
    }
}
