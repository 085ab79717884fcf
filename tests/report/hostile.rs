//! Text that a container, an image or a user has chosen stays text.

use std::collections::BTreeMap;

use driftd::history::Record;
use driftd::model::{ContainerId, Kind, Process, printable};
use pulldown_cmark::{Event, Options, Parser, Tag};

use crate::incident::{at, commands, finding, path, response, session};
use crate::program::Recorded;

/// Breaks out of elements, attributes, style sheets, tables, code spans and terminals.
pub(crate) const EVIL: &str = "</title></style><script>document.title='run'</script>\
    <img src=x onerror=alert(1)>\"'><a href=javascript:alert(1)>&lt;&#x3c; | `x` ``` [a](http://h/)\n\
    # h\n| a | b |\r\u{1b}[2J\u{202e}\u{0}\u{9b}31m <!-- ]]> {{ 7*7 }} {% raw %} \\| *b* _i_ ~~~ @me http://203.0.113.9/";

fn evil_process() -> Process {
    let mut process = crate::incident::process(7, EVIL, &[EVIL, "", "\\x7c"]);
    let escaped = || Some(printable(EVIL.as_bytes()));
    (process.exe, process.tty, process.root) = (escaped(), Some(EVIL.into()), escaped());
    process.argv = Some(vec![printable(EVIL.as_bytes()), String::new()]);
    for ancestor in &mut process.ancestors {
        (ancestor.exe, ancestor.argv) = (escaped(), Some(vec![printable(EVIL.as_bytes())]));
    }
    process
}

pub(crate) fn records() -> Vec<Record> {
    let mut drift = finding(1, Kind::ExecModified, at("10:00:05"), "/x");
    drift.file.as_mut().unwrap().path =
        path([b"/tmp/\xff".as_slice(), EVIL.replace('\0', "").as_bytes()].concat());
    drift.expected = crate::incident::sample_finding().expected;
    drift.expected.as_mut().unwrap().layer = EVIL.into();
    (drift.process, drift.writer) = (Some(evil_process()), Some(evil_process()));
    (drift.detail, drift.invoked_as) = (Some(EVIL.into()), Some(EVIL.into()));
    (drift.source, drift.node) = (EVIL.into(), EVIL.into());
    drift.image.name = Some(EVIL.into());
    drift.verdict.rule = Some(EVIL.into());
    drift.container_runtime = Some(EVIL.into());
    let container = drift.container.as_mut().unwrap();
    container.id = ContainerId::new("default", EVIL);
    container.labels = BTreeMap::from([(EVIL.to_owned(), EVIL.to_owned())]).into();
    let pod = container.pod.as_mut().unwrap();
    (pod.name, pod.namespace, pod.uid) = (EVIL.into(), EVIL.into(), EVIL.into());
    let container = container.clone();

    let mut visit = session(0xa1, at("10:00:00"), None);
    visit.container = container.clone();
    (visit.requested_by, visit.client) = (Some(EVIL.into()), Some(EVIL.into()));
    (visit.exec_id, visit.discovered) = (Some(EVIL.into()), EVIL.into());
    (visit.image.name, visit.node) = (Some(EVIL.into()), EVIL.into());
    visit.process = evil_process();
    let mut typed = commands(&mut visit, &[("10:00:04", "x")]);
    typed[0].argv = Some(vec![printable(EVIL.as_bytes())]);
    drift.session = Some(visit.id);

    let mut answered = response(EVIL, at("10:00:06"), false, EVIL);
    (answered.requested_by, answered.reason) = (EVIL.into(), EVIL.into());
    answered.container = container.id.clone();
    vec![
        Record::Session { session: Box::new(visit), commands: typed },
        Record::Finding(Box::new(drift)),
        Record::Response(Box::new(answered)),
        Record::Gap {
            name: EVIL.into(),
            container: Some(container.id),
            detail: EVIL.into(),
            at: at("10:00:07"),
            until: None,
        },
    ]
}

#[track_caller]
fn assert_printable(text: &str) {
    let is_dirty = |one: char| one != '\n' && one.is_control() || one == '\u{202e}';
    assert!(!text.contains(is_dirty), "{text:?}");
}

const TAGS: &[&str] = &[
    "a", "article", "b", "body", "caption", "circle", "code", "dd", "defs", "desc", "div", "dl",
    "dt", "footer", "g", "h1", "h2", "h3", "head", "header", "html", "li", "line", "main", "meta",
    "nav", "p", "path", "pattern", "rect", "section", "span", "style", "svg", "table", "tbody",
    "td", "text", "th", "thead", "time", "title", "tr", "tspan", "ul", "!doctype",
];

#[test]
fn hostile_text_is_no_markup_of_the_page() {
    let recorded = Recorded::of(records());
    let page = recorded.report(&["a1"]);
    assert_printable(&page);
    let (before, rest) = page.split_once("<style>").unwrap();
    let (_, after) = rest.split_once("</style>").unwrap();
    assert_eq!(page.matches("<style>").count(), 1);
    for part in before.split('<').skip(1).chain(after.split('<').skip(1)) {
        let name = part.trim_start_matches('/');
        let name: &str =
            name.split(|one: char| !one.is_ascii_alphanumeric() && one != '!').next().unwrap();
        assert!(TAGS.contains(&name), "<{part}");
        // No attribute is a handler, and each link stays on the page.
        let tag = part.split('>').next().unwrap();
        assert!(!tag.contains(" on") && !tag.contains("src="), "<{tag}>");
        for link in tag.split("href=\"").skip(1) {
            assert!(link.starts_with('#'), "<{tag}>");
        }
    }
    let policy = "default-src &#39;none&#39;; style-src &#39;sha256-";
    assert!(page.contains(policy) || page.contains(&policy.replace("&#39;", "'")), "{before}");
    assert!(page.contains(r"/tmp/\xff&#60;/title&#62;"), "the bytes are shown");
}

#[test]
fn hostile_text_is_no_markup_of_markdown() {
    let recorded = Recorded::of(records());
    let text = recorded.report(&["a1", "-o", "md"]);
    assert_printable(&text);
    let mut columns = 0;
    for line in text.lines() {
        let is_row = line.starts_with('|');
        let bars = line.matches('|').count();
        // Each row of a table has as many cells as its header.
        if is_row && columns > 0 {
            assert_eq!(bars, columns, "{line}");
        }
        columns = if is_row { bars } else { 0 };
    }
    let options =
        Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH | Options::ENABLE_FOOTNOTES;
    let (mut headings, mut whole) = (0, 0);
    for event in Parser::new_ext(&text, options) {
        match event {
            Event::Start(Tag::Heading { .. }) => headings += 1,
            Event::Start(
                Tag::Paragraph
                | Tag::List(None)
                | Tag::Item
                | Tag::Strong
                | Tag::Table(_)
                | Tag::TableHead
                | Tag::TableRow
                | Tag::TableCell,
            )
            | Event::End(_) => (),
            Event::Code(code) => whole += usize::from(code.contains("@me http:/")),
            // The report's own words.
            Event::Text(own) => assert!(!own.contains(['<', '[', '`', '@']), "{own}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(headings, 1 + 8 + 2);
    let hostile = text.matches("@me http:/").count();
    assert!(whole > 30 && whole <= hostile, "{whole} of {hostile}");
    // Nothing of it is outside of a code span, and no span is cut.
    let kept = |event: Event<'_>| match event {
        Event::Code(code) => code.matches("@me http:/").count(),
        _ => 0,
    };
    assert_eq!(Parser::new_ext(&text, options).map(kept).sum::<usize>(), hostile);
}

#[test]
fn hostile_text_is_whole_in_json() {
    let recorded = Recorded::of(records());
    let text = recorded.report(&["a1", "-o", "json"]);
    assert_printable(&text);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["gaps"][0]["detail"], EVIL);
    assert_eq!(json["findings"][0]["finding"]["detail"], EVIL);
    assert_eq!(json["container"]["id"], EVIL);
}
