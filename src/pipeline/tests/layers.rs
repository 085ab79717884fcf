//! Files of the layers, and layers that were tampered with.

use super::*;
use crate::pipeline::layers::MAX_REPORTED;

#[test]
fn a38_a_layer_changed_on_disk_is_reported_when_it_is_executed() {
    let mut node = Node::running();
    node.commands.clear();
    node.play("layer-exec c1 /bin/ls ls").expect(&[]);
    let verdict = |content, verdict| SensorCommand::Judged {
        container: id("c1"),
        file: layer_file_of(content),
        verdict,
    };
    assert_eq!(node.commands, [verdict("ls", Verdict::Image)]);
    node.commands.clear();
    node.play("layer-exec c1 /bin/ls other\nlayer-exec c1 /bin/ls other")
        .expect(&["exec.modified /bin/ls x2 r2"]);
    assert_eq!(node.commands, [verdict("other", Verdict::Drift), verdict("other", Verdict::Drift)]);
    let finding = node.findings.last().unwrap();
    assert_eq!(finding.expected.as_ref().unwrap().layer, layer(1).to_string());
    assert!(finding.detail.as_ref().unwrap().contains("layer of the image"), "{finding:?}");
}

#[test]
fn a38_a_layer_changed_before_its_baseline_was_ready_is_reported_when_it_is() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nlayer-exec c1 /bin/ls other\nbaseline")
        .expect(&["exec.modified /bin/ls x1 r1"]);
}

#[test]
fn a_file_of_a_layer_without_room_is_judged_again() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1");
    for number in 0..budget::BACKLOG.number {
        node.play(&format!("exec c1 /tmp/x{number} evil"));
    }
    node.commands.clear();
    node.play("layer-exec c1 /bin/ls other");
    assert!(
        matches!(node.commands[..], [SensorCommand::Judged { verdict: Verdict::Lost, .. }]),
        "{:?}",
        node.commands
    );
}

fn program(path: &str, content: &str) -> LayerEntry {
    LayerEntry::File(FileEntry {
        file_type: FileType::Regular,
        format: Format::Elf,
        size: content.len() as u64,
        blake3: Some(blake3_of(content)),
        ..FileEntry::directory(RootfsPath::new(path).unwrap(), 0o755)
    })
}

fn differs(path: &str, expected: Option<LayerEntry>, found: Option<LayerEntry>) -> LayerDifference {
    LayerDifference { path: RootfsPath::new(path).unwrap(), expected, found }
}

fn tampered(number: u8, differences: Vec<LayerDifference>) -> Input {
    let total = differences.len() as u64;
    let compared_with = "directory /lower".to_owned();
    let image = ImageReference { name: Some("img:1".into()), ..ImageReference::default() };
    let layer = layer(number);
    let directories = vec!["/lower".into()];
    Input::Baseline(
        BaselineEvent::Tampered { layer, compared_with, directories, differences, total },
        image,
    )
}

fn changed_ls() -> LayerDifference {
    differs("/bin/ls", Some(program("/bin/ls", "ls")), Some(program("/bin/ls", "evil")))
}

#[test]
fn a38_a_tampered_layer_is_reported_for_every_container_that_shows_it() {
    let mut node = Node::running();
    node.play("start c2\nattached c2\nbaseline");
    node.give(tampered(1, vec![changed_ls()]));
    node.expect(&["baseline.tampered /bin/ls x1 r1", "baseline.tampered /bin/ls x1 r1"]);
    let containers: Vec<_> =
        node.findings.iter().map(|finding| finding.container_id().cloned()).collect();
    assert_eq!(containers, [Some(id("c1")), Some(id("c2"))]);
    let finding = &node.findings[0];
    assert_eq!((finding.severity, finding.source.as_str()), (Severity::Critical, "verify"));
    assert_eq!(finding.file.as_ref().unwrap().blake3, Some(blake3_of("evil")));
    let expected = finding.expected.as_ref().unwrap();
    assert_eq!(expected.blake3, Some(blake3_of("ls")));
    assert_eq!(expected.layer, layer(1).to_string());
    assert!(finding.detail.as_ref().unwrap().contains("directory /lower"));
    assert!(node.requests.is_empty());

    // Compared again, and again after a restart: it is the same finding.
    let known = node.findings.clone();
    node.give(tampered(1, vec![changed_ls()]));
    assert_eq!(node.findings.len(), 2);
    let mut after = Node::new(Respond::default(), known);
    after.play("start c1\nstart c2\nbaseline");
    after.give(tampered(1, vec![changed_ls()]));
    after.expect(&[]);
    // Another change makes another finding.
    let again = Some(program("/bin/ls", "worse"));
    after.give(tampered(1, vec![differs("/bin/ls", Some(program("/bin/ls", "ls")), again)]));
    assert_eq!(after.findings.len(), 2);
}

#[test]
fn a_tampered_layer_that_no_container_uses_is_reported_with_its_image() {
    let mut node = Node::running();
    node.give(tampered(9, vec![changed_ls()]));
    node.give(tampered(9, vec![changed_ls()]));
    node.expect(&["baseline.tampered /bin/ls x1 r1"]);
    let finding = node.findings[0].clone();
    assert_eq!((finding.container_id(), finding.image.name.as_deref()), (None, Some("img:1")));
    let mut after = Node::new(Respond::default(), vec![finding]);
    after.give(tampered(9, vec![changed_ls()]));
    after.expect(&[]);
}

#[test]
fn the_same_layer_from_another_directory_is_whole() {
    let mut node = Node::running();
    let mut other = container("c2", Some(8));
    other.layers[0].directory = Some("/other".into());
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(other))));
    node.play("baseline");
    node.give(tampered(1, vec![changed_ls()]));
    let reported: Vec<_> = node.findings.iter().map(Finding::container_id).collect();
    assert_eq!(reported, [Some(&id("c1"))]);
    // The place of the layer is not known any more.
    let Input::Baseline(
        BaselineEvent::Tampered { layer, compared_with, differences, total, .. },
        image,
    ) = tampered(1, vec![changed_ls()])
    else {
        unreachable!()
    };
    let directories = Vec::new();
    let event = BaselineEvent::Tampered { layer, compared_with, directories, differences, total };
    node.give(Input::Baseline(event, image));
    let reported: Vec<_> = node.findings.iter().map(Finding::container_id).collect();
    assert_eq!(reported, [Some(&id("c1")), Some(&id("c2"))]);
}

#[test]
fn a_change_that_a_layer_above_hides_is_reported_without_a_container() {
    let image = ImageBaseline::from_text(&["/bin/ls 755 elf old\n/bin/ps 755 elf ps", IMAGE]);
    let mut node = Node::new(Respond::default(), Vec::new());
    let mut one = container("c1", Some(7));
    let chain_id = image.chain_id();
    let below = Layer { id: layer(1), chain_id, directory: Some("/lower".into()), blob: None };
    one.layers = vec![below.clone(), Layer { id: layer(2), ..below }];
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(one))));
    let event = BaselineEvent::Ready { chain_id, baseline: Arc::new(image), unchanged_since: None };
    node.give(Input::Baseline(event, ImageReference::default()));
    let hidden = differs("/bin/ls", Some(program("/bin/ls", "old")), None);
    let shown = differs("/bin/ps", Some(program("/bin/ps", "ps")), None);
    // A whiteout that was put there hides the program.
    let hiding = LayerEntry::Whiteout(RootfsPath::new("/bin/ps").unwrap());
    node.give(tampered(1, vec![hidden, shown]));
    node.give(tampered(2, vec![differs("/bin/ps", None, Some(hiding))]));
    let reported: Vec<String> = node
        .findings
        .iter()
        .map(|finding| {
            let container = finding.container_id().map_or("-".into(), ToString::to_string);
            let file = finding.file.as_ref().unwrap();
            let expected = finding.expected.as_ref().map_or("-", |expected| &expected.layer[..9]);
            format!("{container} {} {:?} {} {expected}", file.path, file.file_type, file.deleted)
        })
        .collect();
    assert_eq!(
        reported,
        [
            "default/c1 /bin/ps Regular true sha256:01",
            "- /bin/ls Regular true sha256:01",
            "default/c1 /bin/ps CharDevice false sha256:01",
        ]
    );
}

#[test]
fn a_wholly_different_layer_is_reported_by_some_differences_and_in_words() {
    let mut node = Node::running();
    let data = |number: usize| {
        let path = format!("/etc/a{number:04}");
        let mut file = program(&path, "x");
        if let LayerEntry::File(file) = &mut file {
            (file.format, file.mode) = (Format::Data, 0o644);
        }
        differs(&path, None, Some(file))
    };
    let mut differences: Vec<LayerDifference> = (0..500).map(data).collect();
    differences.push(changed_ls());
    let Input::Baseline(
        BaselineEvent::Tampered { layer, compared_with, directories, differences, .. },
        image,
    ) = tampered(1, differences)
    else {
        unreachable!()
    };
    let event =
        BaselineEvent::Tampered { layer, compared_with, directories, differences, total: 70_000 };
    node.give(Input::Baseline(event, image));
    assert_eq!(node.findings.len(), MAX_REPORTED);
    let path = |finding: &Finding| finding.file.as_ref().unwrap().path.to_string();
    assert_eq!(path(&node.findings[0]), "/bin/ls", "programs first");
    let last = node.findings.last().unwrap().detail.as_ref().unwrap();
    assert!(last.ends_with("; 69900 more differences are not reported one by one"), "{last}");
    assert_eq!(node.gaps, ["findings_full"]);
}

#[test]
fn a_setting_may_kill_what_runs_from_a_tampered_layer() {
    let respond = Respond { kill_on: [Kind::BaselineTampered].into(), ..Respond::default() };
    let mut node = Node::new(respond, Vec::new());
    node.play("start c1\nbaseline\nattached c1");
    node.give(tampered(1, vec![changed_ls()]));
    node.give(tampered(9, vec![changed_ls()]));
    assert_eq!(node.requests.len(), 1);
    assert_eq!(node.requests[0].container, id("c1"));
}
