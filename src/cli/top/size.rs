//! The size of the terminal, and how much of it each part has. Pure.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) width: u16,
    pub(super) height: u16,
}

/// The smallest terminal.
pub(super) const LEAST: Size = Size { width: 80, height: 24 };
/// Lines above the panes, and below them.
pub(super) const ABOVE: u16 = 2;
pub(super) const BELOW: u16 = 2;

impl Size {
    pub(super) fn is_too_small(self) -> bool {
        self.width < LEAST.width || self.height < LEAST.height
    }

    /// Columns and lines for the text of a finding that is shown whole, below its title.
    pub(super) fn opened(self) -> (usize, usize) {
        let height = self.height.saturating_sub(ABOVE + BELOW + 1);
        (usize::from(self.width), usize::from(height))
    }
}
