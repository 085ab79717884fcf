//! The page as Chromium shows it: wide, narrow, dark and printed. The pictures stay in
//! `target/tmp/report/`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::chromium::{Chromium, Visit};
use crate::incident::{CONTAINER, many};
use crate::program::Recorded;
use crate::{hostile, incident};

/// Where a person finds what the tests have made.
fn artifact(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("report");
    fs::create_dir_all(&dir).unwrap();
    dir.join(name)
}

/// Writes a page where a browser can open it.
fn page(name: &str, text: &str) -> PathBuf {
    let file = artifact(name);
    fs::write(&file, text).unwrap();
    file
}

/// A visit that loads nothing but the page, and about which the browser complains not once.
fn quiet(file: &Path) -> Visit {
    Visit { requests: vec![format!("file://{}", file.display())], complaints: vec![] }
}

/// Keeps a picture, and checks that it shows something.
#[track_caller]
fn keep_picture(browser: &mut Chromium, name: &str) {
    let png = browser.picture();
    fs::write(artifact(name), &png).unwrap();
    let mut reader = png::Decoder::new(std::io::Cursor::new(&png)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    let samples = info.color_type.samples();
    let background = pixels[..samples].to_vec();
    // Every 101st pixel is enough, and no column is missed.
    let seen = || pixels[..info.buffer_size()].chunks(samples).step_by(101);
    let colours: BTreeSet<&[u8]> = seen().collect();
    let other = seen().filter(|pixel| **pixel != *background).count();
    let part = other * 100 / seen().count();
    assert!(colours.len() > 50 && part > 2, "{name}: {} colours, {part} %", colours.len());
}

#[test]
fn a_browser_shows_the_page_without_network_and_scripts() {
    let recorded = Recorded::of(incident::records());
    let file = page("incident.html", &recorded.report(&[CONTAINER]));
    let mut browser = Chromium::start();
    for (width, name) in [(1200, "wide.png"), (390, "narrow.png")] {
        assert_eq!(browser.visit(&file, width), quiet(&file));
        let overflow = browser.value("document.documentElement.scrollWidth - innerWidth");
        assert_eq!(overflow, 0, "nothing sticks out at {width}");
        keep_picture(&mut browser, name);
    }
    let dark = json!({ "features": [{ "name": "prefers-color-scheme", "value": "dark" }] });
    browser.call("Emulation.setEmulatedMedia", &dark);
    assert_eq!(browser.visit(&file, 1200), quiet(&file));
    let colour = "getComputedStyle(document.body).backgroundColor";
    assert_eq!(browser.value(colour), "rgb(15, 20, 25)");
    keep_picture(&mut browser, "dark.png");

    // Printed from a dark screen, it is light all the same.
    let pdf = browser.print();
    assert!(pdf.starts_with(b"%PDF-") && pdf.len() > 10_000, "{} bytes", pdf.len());
    fs::write(artifact("printed.pdf"), pdf).unwrap();
}

/// What a reader needs who does not see the page, as an expression with an empty list if all
/// of it is there.
const ACCESSIBLE: &str = r"[
    ['one h1', document.querySelectorAll('h1').length === 1],
    ['language', document.documentElement.lang === 'en'],
    ['headings without a step left out', [...document.querySelectorAll('h1,h2,h3')].every(
        (one, at, all) => at === 0 || one.tagName[1] - all[at - 1].tagName[1] < 2)],
    ['tables with captions', [...document.querySelectorAll('table')].every(one => one.caption)],
    ['headers with a scope', [...document.querySelectorAll('th')].every(one => one.scope === 'col')],
    ['as many cells as headers', [...document.querySelectorAll('tbody tr')].every(
        one => one.cells.length === one.closest('table').tHead.rows[0].cells.length)],
    ['links to what is there', [...document.querySelectorAll('a')].every(
        one => document.getElementById(one.hash.slice(1)))],
    ['ids once', new Set([...document.querySelectorAll('[id]')].map(one => one.id)).size
        === document.querySelectorAll('[id]').length],
    ['labels that exist', [...document.querySelectorAll('[aria-labelledby]')].every(
        one => one.getAttribute('aria-labelledby').split(' ').every(id => document.getElementById(id)))],
    ['a described drawing', document.querySelector('svg desc').textContent.includes('3 sessions')],
    ['titled shapes', [...document.querySelectorAll('svg circle, svg .session')].every(
        one => one.parentNode.querySelector('title'))],
].filter(([, holds]) => !holds).map(([name]) => name)";

#[test]
fn readers_who_do_not_see_the_page_have_all_of_it() {
    let recorded = Recorded::of(incident::records());
    let file = page("accessible.html", &recorded.report(&[CONTAINER]));
    let mut browser = Chromium::start();
    browser.visit(&file, 1200);
    assert_eq!(browser.value(ACCESSIBLE), json!([]));
    browser.call("Accessibility.enable", &json!({}));
    let tree = browser.call("Accessibility.getFullAXTree", &json!({}));
    let is_drawing =
        |node: &&Value| node["role"]["value"] == "image" || node["role"]["value"] == "img";
    let drawing = tree["nodes"].as_array().unwrap().iter().find(is_drawing).unwrap();
    let name = drawing["name"]["value"].as_str().unwrap();
    assert!(name.contains("Time line") && name.contains("2 responses, 3 gaps"), "{name}");

    // Every text has a contrast of 4.5 to its background, on a light and on a dark screen.
    for scheme in ["light", "dark"] {
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        browser.call("Emulation.setEmulatedMedia", &media);
        assert_eq!(browser.value(FAINT), json!([]), "{scheme}");
    }
}

/// The texts whose colour is too close to that of what is behind them.
const FAINT: &str = r"(() => {
    const part = one => { const c = one / 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
    const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
    const numbers = text => text.match(/[\d.]+/g).map(Number);
    const behind = one => {
        for (; one; one = one.parentElement) {
            const colour = numbers(getComputedStyle(one).backgroundColor);
            if (colour.length === 3 || colour[3] > 0) return colour;
        }
        return [255, 255, 255];
    };
    const faint = new Set();
    const all = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (all.nextNode()) {
        const one = all.currentNode.parentElement;
        if (!all.currentNode.textContent.trim() || one.closest('title, desc, style, .number')) continue;
        const style = getComputedStyle(one);
        const colour = numbers(one.closest('svg') ? style.fill : style.color);
        const [a, b] = [light(colour), light(behind(one))].sort((a, b) => b - a);
        if ((a + 0.05) / (b + 0.05) < 4.5) faint.add(`${one.tagName}.${one.className.baseVal ?? one.className}`);
    }
    return [...faint];
})()";

#[test]
fn a_browser_takes_hostile_text_for_text() {
    let recorded = Recorded::of(hostile::records());
    let file = page("hostile.html", &recorded.report(&["a1"]));
    let mut browser = Chromium::start();
    for width in [1200, 390] {
        assert_eq!(browser.visit(&file, width), quiet(&file));
        assert_eq!(browser.value("document.documentElement.scrollWidth - innerWidth"), 0);
    }
    let elements = "document.querySelectorAll('script, img, iframe, form, input, link').length";
    assert_eq!(browser.value(elements), 0);
    assert_eq!(browser.value("document.querySelectorAll('style').length"), 1);
    assert_eq!(browser.value("document.title"), "Incident report: session a10000000000");
    let text = browser.value("document.body.innerText");
    assert!(text.as_str().unwrap().contains("<script>document.title='run'</script>"), "{text}");
    keep_picture(&mut browser, "hostile.png");
}

#[test]
fn what_would_get_into_the_page_is_refused_by_its_policy() {
    let recorded = Recorded::of(incident::records());
    let text = recorded.report(&[CONTAINER]);
    let evil = "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x'>\
                <p id='styled' style='color: rgb(1, 2, 3)'>x</p><style>h1 { display: none }</style>\
                <iframe src='about:blank'></iframe>";
    let file = page("refused.html", &text.replace("</main>", &format!("{evil}</main>")));
    let mut browser = Chromium::start();
    let visit = browser.visit(&file, 1200);
    let about = |what: &str| visit.complaints.iter().any(|complaint| complaint.contains(what));
    assert!(about("script") && about("style") && about("img") || about("image"), "{visit:#?}");
    assert_ne!(browser.value("document.title"), "run");
    let colour = "getComputedStyle(document.getElementById('styled')).color";
    assert_ne!(browser.value(colour), "rgb(1, 2, 3)");
    assert_eq!(browser.value("getComputedStyle(document.querySelector('h1')).display"), "block");
}

#[test]
fn ten_thousand_findings_are_one_usable_page() {
    let recorded = Recorded::of(many(10_000));
    let file = page("many.html", &recorded.report(&[CONTAINER]));
    let mut browser = Chromium::start();
    assert_eq!(browser.visit(&file, 1200), quiet(&file));
    let elements = browser.value("document.querySelectorAll('*').length");
    assert!(elements.as_u64().unwrap() < 20_000, "{elements} elements");
    // No number is wider than its dot, and no dot covers another one of its lane.
    let wide = "[...document.querySelectorAll('svg .number')].filter(one => {
        const dot = one.parentNode.querySelector('circle');
        return one.getBBox().width > dot.getBBox().width + 1;
    }).length";
    assert_eq!(browser.value(wide), 0);
    keep_picture(&mut browser, "many.png");
}

/// Texts of the drawing that cover each other or leave it.
const COVERED: &str = r"(() => {
    const svg = document.querySelector('svg');
    const [, , width, height] = svg.getAttribute('viewBox').split(' ').map(Number);
    const texts = [...svg.querySelectorAll('text, .response')].filter(
        one => one.tagName === 'rect' || one.textContent);
    const boxes = texts.map(one => one.getBBox());
    const wrong = [];
    boxes.forEach((a, at) => {
        if (a.x < 0 || a.x + a.width > width || a.y + a.height > height) wrong.push(texts[at].textContent);
        boxes.slice(at + 1).forEach((b, next) => {
            const apart = a.x + a.width <= b.x || b.x + b.width <= a.x
                || a.y + a.height <= b.y || b.y + b.height <= a.y;
            if (!apart) wrong.push(texts[at].textContent + ' / ' + texts[at + 1 + next].textContent);
        });
    });
    return wrong;
})()";

#[test]
fn a_busy_time_line_is_legible() {
    let recorded = Recorded::of(incident::busy());
    let file = page("busy.html", &recorded.report(&[CONTAINER]));
    let mut browser = Chromium::start();
    assert_eq!(browser.visit(&file, 1200), quiet(&file));
    keep_picture(&mut browser, "busy.png");
    assert_eq!(browser.value(COVERED), json!([]));
    for (name, records) in [("one", incident::many(1)), ("moment", incident::many(2))] {
        let recorded = Recorded::of(records);
        let file = page(&format!("{name}.html"), &recorded.report(&[CONTAINER]));
        assert_eq!(browser.visit(&file, 1200), quiet(&file));
        assert_eq!(browser.value(COVERED), json!([]), "{name}");
    }
}
