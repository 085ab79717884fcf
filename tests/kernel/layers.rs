//! Files of the image's layers, and how they are recognised as the image's own.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use driftd::health::Failure;
use driftd::model::{CouldChange, Fact, FileFact};
use driftd::watch::{SensorCommand, Trust, Verdict};

use crate::common::{changed, wait_for};
use crate::container::{BUSYBOX, Container, flip_a_byte, hash_of};
use crate::node::{Node, attached, path};

#[test]
fn a38_a_layer_file_changed_before_its_container_existed_is_reported_when_executed() {
    let change = |lower: &Path| flip_a_byte(&lower.join("bin/true"));
    let container = Container::of_image(change, &[], "", false);
    let mut node = Node::start();
    node.attach(&container);
    container.drop_program("/tmp/true");
    let (file, blake3) = node.reported_as(&container, "/bin/true").unwrap();
    assert_eq!(blake3, hash_of(container.lower().join("bin/true")));
    assert_ne!(blake3, hash_of(BUSYBOX));
    assert_eq!(file.changed, changed(&container.lower().join("bin/true")));
    assert_eq!(node.reported_as(&container, "/opt/tool/true"), None, "it was left alone");
    // Drift is reported at every execution.
    node.judge(&container, file, Verdict::Drift);
    assert_eq!(node.reported_as(&container, "/bin/true"), Some((file, blake3)));
    // It is not in the upper layer, so no scan reports it.
    assert_eq!(node.scan(&container).names(), ["/tmp/true"]);
    node.assert_no_loss();
}

#[test]
fn a38_a_layer_file_changed_under_a_running_container_is_reported_when_executed() {
    let (container, mut node) = attached();
    container.drop_program("/tmp/true");
    assert_eq!(node.reported_as(&container, "/bin/true"), None);
    flip_a_byte(&container.lower().join("bin/true"));
    let (_, blake3) = node.reported_as(&container, "/bin/true").unwrap();
    assert_eq!(blake3, hash_of(container.lower().join("bin/true")));
    assert_eq!(node.scan(&container).names(), ["/tmp/true"]);
    node.assert_no_loss();
}

#[test]
fn b22_a_program_of_the_image_that_links_itself_is_proven_to_be_unchanged() {
    let (container, mut node) = attached();
    // Its first link copies it up. A scan finds it there.
    container.shell("ln /bin/busybox /tmp/first; rm /tmp/first");
    node.scan(&container);
    for round in 0..20 {
        // Executed once by its process: the kernel merges what one process does.
        let link = format!("/tmp/link{round}");
        let linked = container.command(&["/bin/busybox", "ln", "/bin/busybox", &link]).status();
        assert!(linked.unwrap().success());
        let executed = node.until_executed(&path("/bin/busybox"));
        assert_eq!(executed.state.blake3(), Some(hash_of(BUSYBOX)));
        assert_eq!(executed.state.could_change, CouldChange::No, "round {round}");
    }
    node.assert_no_loss();
}

#[test]
fn a_touched_but_unchanged_layer_file_is_hashed_once() {
    let change = |lower: &Path| {
        let program = lower.join("bin/true");
        fs::set_permissions(&program, fs::metadata(&program).unwrap().permissions()).unwrap();
    };
    let container = Container::of_image(change, &[], "", false);
    let mut node = Node::start();
    node.attach(&container);
    container.drop_program("/tmp/true");
    let reported = node.reported_as(&container, "/bin/true").unwrap();
    assert_eq!(reported.1, hash_of(BUSYBOX));
    assert_eq!(node.reported_as(&container, "/bin/true"), None, "its verdict is still open");
    // Within the clock tick of the touch another change could follow with the same
    // time. Until that tick is over, a verdict does not last.
    wait_for("the verdict to last", || {
        node.judge(&container, reported.0, Verdict::Image);
        match node.reported_as(&container, "/bin/true") {
            Some(again) => {
                assert_eq!(again, reported);
                None
            }
            None => {
                node.judge(&container, reported.0, Verdict::Image);
                node.reported_as(&container, "/bin/true").is_none().then_some(())
            }
        }
    });
    // With another baseline the verdict no longer counts.
    node.send(SensorCommand::Trust { container: container.id.clone(), trust: Trust::Unknown });
    node.scan(&container);
    assert_eq!(node.reported_as(&container, "/bin/true"), Some(reported));
    node.assert_no_loss();
}

#[test]
fn while_a_baseline_may_come_each_image_program_is_reported_once() {
    let container = Container::start();
    let mut node = Node::start();
    node.attach_with(&container, Trust::Unknown);
    container.drop_program("/tmp/true");
    assert_eq!(
        node.reported_as(&container, "/bin/true").map(|reported| reported.1),
        Some(hash_of(BUSYBOX))
    );
    assert_eq!(node.reported_as(&container, "/bin/true"), None);
    node.assert_no_loss();
}

#[test]
fn without_a_baseline_no_image_program_is_reported() {
    let change = |lower: &Path| flip_a_byte(&lower.join("bin/true"));
    let container = Container::of_image(change, &[], "", false);
    let mut node = Node::start();
    node.attach_with(&container, Trust::NoBaseline);
    container.drop_program("/tmp/true");
    assert_eq!(node.reported_as(&container, "/bin/true"), None);
    node.assert_no_loss();
}

#[test]
fn a_metadata_only_copy_is_hashed_through_the_merged_view() {
    let container = Container::with(&[], "metacopy=on", false);
    let mut node = Node::start();
    node.attach(&container);
    container.shell("chmod 700 /bin/true");
    let raw = fs::metadata(container.upper().join("bin/true")).unwrap();
    let stored = raw.blocks() * 512;
    assert!(stored < raw.size(), "the kernel copied the content, so this would prove nothing");
    let upper = node.scan(&container);
    assert_eq!(upper.same_as_image, ["/bin/true"]);
    assert_eq!(upper.get("/bin/true").mode, 0o700);
    node.assert_no_loss();
}

#[test]
fn layers_on_two_filesystems_are_recognised_by_their_mount() {
    let container = Container::with(&[], "", true);
    let mut node = Node::start();
    node.attach(&container);
    let blake3 = container.drop_program("/tmp/true");
    container.shell("/bin/true; /tmp/true");
    assert_eq!(node.until_executed(&path("/tmp/true")).state.blake3(), Some(blake3));
    if keeps_births(&container.upper()) {
        assert_eq!(node.executed_paths(), ["/tmp/true"]);
    } else {
        // Before Linux 6.5 a tmpfs keeps no birth times. The times then do not show
        // whether a file is the image's, and every program is compared by content,
        // init's too.
        let mut executed = node.executed_paths();
        executed.dedup();
        assert_eq!(executed, ["/bin/busybox", "/bin/true", "/tmp/true"]);
    }
    assert_eq!(node.scan(&container).names(), ["/tmp/true"]);
}

/// Whether a filesystem keeps the birth time of files.
fn keeps_births(path: &Path) -> bool {
    driftd::sys::file::stat_path(path).unwrap().born.is_some()
}

#[test]
fn x19_a_file_older_than_the_layer_is_not_taken_for_the_images() {
    // Its birth is older than the layer, as after the clock was set back.
    let scratch = tempfile::tempdir().unwrap();
    let old = scratch.path().join("old");
    fs::copy(BUSYBOX, &old).unwrap();
    let container = Container::start();
    // A directory of the upper layer that the overlay has not read yet.
    container.shell("/bin/mkdir /tmp/late");
    let hidden = container.upper().join("tmp/late/true");
    fs::OpenOptions::new().append(true).open(&old).unwrap().write_all(b"other").unwrap();
    fs::rename(&old, &hidden).unwrap();
    let times = |path: &Path| driftd::sys::file::stat_path(path).unwrap().born;
    assert!(times(&hidden) < times(&container.upper()), "the filesystem keeps birth times");
    let mut node = Node::start();
    node.attach(&container);
    container.shell("/tmp/late/true");
    let (state, layer_file) =
        node.until_observed("its execution", |observation| match &observation.fact {
            Fact::File(FileFact::Executed { path: executed, state, layer_file, .. })
                if *executed == path("/tmp/late/true") =>
            {
                Some((state.clone(), *layer_file))
            }
            _ => None,
        });
    assert_eq!(state.blake3(), Some(hash_of(&hidden)));
    assert_eq!(layer_file, None, "it counts as the container's own");
    // The wrong clock is reported, and once.
    node.scan(&container);
    assert_eq!(node.watchers.health.count(Failure::ClockSet), 1);
}

#[test]
fn a36_a_moved_image_directory_is_one_absence_and_its_programs_are_reported_when_executed() {
    let container = Container::with(&[], "redirect_dir=on", false);
    let mut node = Node::start();
    node.attach(&container);
    container.drop_program("/tmp/true");
    container.shell("/opt/tool/true; /tmp/true");
    // By then driftd knows from where the image's program was run.
    node.until_executed(&path("/tmp/true"));
    node.received.clear();
    container.shell("mv /opt/tool /opt/other; /opt/other/true; /bin/true");
    let executed = node.until_executed(&path("/opt/other/true"));
    assert_eq!(executed.state.blake3(), Some(hash_of(BUSYBOX)));
    node.until_absent("/opt/tool");
    let upper = node.scan(&container);
    assert!(upper.complete, "the scan must understand a moved directory");
    assert_eq!(upper.hidden(), ["/opt/tool"]);
    assert_eq!(node.absent_paths(), ["/opt/tool"]);
    assert_eq!(
        node.executed_paths(),
        ["/opt/other/true"],
        "the image's own programs are not reported"
    );
    // Back in its place, it counts as the image's own again.
    node.received.clear();
    container.shell("mv /opt/other /opt/tool; /opt/tool/true; mv /bin/true /opt/true; /opt/true");
    node.until_executed(&path("/opt/true"));
    assert_eq!(node.executed_paths(), ["/opt/true"]);
    node.assert_no_loss();
}

#[test]
fn b09_metadata_only_copies_are_the_images_own_even_after_the_end() {
    let mut container = Container::with(&[], "metacopy=on", false);
    let mut node = Node::start();
    node.attach(&container);
    container.shell(
        "/bin/busybox chown 7:7 /bin/true /opt/tool/true; /bin/true; mv /opt/tool/true /opt/tool/t",
    );
    node.until_present("/bin/true", |state| state.blake3() == Some(hash_of(BUSYBOX)));
    node.until_present("/opt/tool/t", |state| state.blake3() == Some(hash_of(BUSYBOX)));
    node.received.clear();
    container.kill_init();
    node.detach(&container.id);
    node.until_present("/bin/true", |state| state.blake3() == Some(hash_of(BUSYBOX)));
    node.until_present("/opt/tool/t", |state| state.blake3() == Some(hash_of(BUSYBOX)));
    assert_eq!(node.absent_paths(), ["/opt/tool/true"]);
    node.assert_no_loss();
}
