//! `driftd report`: an incident that was recorded, as HTML, Markdown and JSON, and the page as
//! a browser shows it. Needs Chromium, and no root and no daemon.

mod browser;
mod chromium;
mod forms;
mod hostile;
mod incident;
mod many;
mod program;
