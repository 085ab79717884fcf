//! Every file of `tests/replay` is played, and meets what it expects; without root.

use std::fs;
use std::path::Path;

use driftd::replay::{Happened, Script, play};

fn check(text: &str) -> Result<Vec<String>, String> {
    let mut happened = Vec::new();
    let script = Script::parse(text).map_err(|wrong| wrong.to_string())?;
    let mut each = |_, one: &Happened| {
        happened.push(match one {
            Happened::Finding(finding) => finding.kind.name().to_owned(),
            Happened::Response(response) => response.outcome.action.clone(),
            Happened::Loss { name, .. } => name.clone(),
            Happened::Session { entry, .. } => (*entry).to_owned(),
        });
    };
    let unmet = play(&script, &mut each).map_err(|wrong| wrong.to_string())?;
    let unmet: Vec<String> = unmet.iter().map(ToString::to_string).collect();
    if unmet.is_empty() { Ok(happened) } else { Err(unmet.join("\n")) }
}

#[test]
fn every_replay_meets_its_expectations() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/replay");
    let mut files: Vec<_> =
        fs::read_dir(directory).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 5, "{files:?}");
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains("\nexpect "), "{} expects nothing", file.display());
        if let Err(problem) = check(&text) {
            panic!("{}: {problem}", file.display());
        }
    }
}

const NODE: &str = "image i\n  /bin/sh 755 elf sh\nstart c i\n";

#[test]
fn an_expectation_that_is_not_met_names_its_line_and_what_there_is() {
    let of = |steps: &str| check(&format!("{NODE}{steps}")).unwrap_err();
    assert_eq!(
        of("exec c /tmp/x evil\nexpect exec.modified c /tmp/x"),
        "line 5: there is no such finding; there are: [exec.new (critical, 1 times) /tmp/x]"
    );
    assert_eq!(
        of("exec c /tmp/x evil\nexpect nothing"),
        "line 5: nothing was expected, and there is exec.new (critical, 1 times) /tmp/x"
    );
    assert_eq!(
        of("exec c /tmp/x evil\nexpect no exec.new"),
        "line 5: there is exec.new (critical, 1 times) /tmp/x"
    );
    assert_eq!(of("expect response kill c"), "line 4: there was no such response in 0");
    assert!(
        of("lost content_queue_full c\nexpect complete").starts_with("line 5: the view's problems")
    );
    assert_eq!(of("expect incomplete"), "line 4: the view's problems are []");
}

#[test]
fn a_wrong_line_is_named_with_what_is_wrong() {
    let cases = [
        ("fly c", "line 4: `fly` is no step (docs/replay.md lists them)"),
        ("exec c", "line 4: a path is missing"),
        ("exec c /x evil more", "line 4: `more` is too much"),
        ("exec c /x evil colour=red", "line 4: `exec` has no option `colour`"),
        ("delete c /x -- a", "line 4: `delete` takes no arguments behind `--`"),
        ("exec c /x evil times=1 times=2", "line 4: `times` stands there twice"),
        ("exec c /x evil times=no", "line 4: times=no cannot be read"),
        ("exec c /x evil on=moon", "line 4: `moon` is none of overlay, tmpfs, volume, "),
        ("exec d /x evil", "line 4: no container `d`"),
        ("stop c\nexec c /x evil", "line 5: container `c` does not run"),
        ("start d j", "line 4: no image `j`"),
        ("wait soon", "line 4: "),
        ("lost my_mind", "line 4: `my_mind` is none of "),
        ("expect exec.nothing", "line 4: `exec.nothing` is none of "),
        ("exec c \"/x", "line 4: a quotation mark has no partner"),
        (
            "  /bin/x 755 elf x",
            "line 4: an indented line belongs below an `image` or `policy` line",
        ),
        ("set respond.kill = 1", "line 4: "),
        ("time yesterday", "line 4: yesterday: "),
        ("image j\n  /bin/x 755", "line 1: j: no entry of a layer: `/bin/x 755`"),
    ];
    for (steps, expected) in cases {
        let problem = check(&format!("{NODE}{steps}\n")).expect_err(steps);
        assert!(problem.starts_with(expected), "{steps}: {problem}");
    }
}

#[test]
fn the_same_file_always_gives_the_same() {
    let text = format!("{NODE}exec c /tmp/x evil\nwrite c /tmp/y evil format=elf\nwait 1m");
    assert_eq!(check(&text), check(&text));
    assert_eq!(check(&text).unwrap()[0], "exec.new");
}
