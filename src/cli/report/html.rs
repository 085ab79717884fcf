//! A report as one HTML page.
//!
//! Pure. The page needs no network and no script, and its security policy allows nothing but
//! its own style sheet. askama escapes every value.

use askama::Template as _;
use base64::Engine as _;
use sha2::{Digest as _, Sha256};

use super::page::Page;
use super::phrase::Part;

const STYLE: &str = include_str!("report.css");

#[derive(askama::Template)]
#[template(path = "report.html")]
struct Html<'a> {
    page: &'a Page,
    title: String,
    policy: String,
    style: &'static str,
    version: &'static str,
}

pub(super) fn html(page: &Page) -> anyhow::Result<String> {
    let title: String = page
        .title
        .parts
        .iter()
        .map(|part| match part {
            Part::Own(text) | Part::Quoted(text) => text.as_str(),
            Part::Link { id, .. } => id.as_str(),
        })
        .collect();
    let version = env!("CARGO_PKG_VERSION");
    Ok(Html { page, title, policy: security_policy(), style: STYLE, version }.render()?)
}

/// Names the style sheet by its hash: no other style is applied, and nothing is loaded or run.
fn security_policy() -> String {
    let hash = base64::engine::general_purpose::STANDARD.encode(Sha256::digest(STYLE));
    format!("default-src 'none'; style-src 'sha256-{hash}'; base-uri 'none'; form-action 'none'")
}
