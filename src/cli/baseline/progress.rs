//! The progress bar of recording and verifying. It is hidden where stderr is no terminal.
//!
//! `record`, `verify` and the recording of archives show it.

use std::io::{self, IsTerminal as _};

use indicatif::{HumanCount, ProgressBar, ProgressStyle};

use crate::cli::output::size;

const TEMPLATE: &str = "{spinner} {prefix} {wide_bar} {pos}/{len} layers {msg}";

pub(super) struct Bar(ProgressBar);

/// How far the work on one image is.
pub(super) struct Done {
    pub(super) layers: u32,
    pub(super) layers_total: u32,
    pub(super) files: u64,
    pub(super) bytes: u64,
}

impl Bar {
    pub(super) fn new() -> Bar {
        if !io::stderr().is_terminal() {
            return Bar(ProgressBar::hidden());
        }
        let style =
            ProgressStyle::with_template(TEMPLATE).expect("the template is written correctly");
        Bar(ProgressBar::new(0).with_style(style))
    }

    pub(super) fn set_image(&self, name: String) {
        self.0.set_prefix(name);
    }

    /// `more` is appended to the counts.
    pub(super) fn show(&self, done: &Done, more: &str) {
        self.0.set_length(done.layers_total.into());
        self.0.set_position(done.layers.into());
        self.0.set_message(format!("{} files, {}{more}", HumanCount(done.files), size(done.bytes)));
        self.0.tick();
    }

    pub(super) fn clear(self) {
        self.0.finish_and_clear();
    }
}
