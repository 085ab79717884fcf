//! Findings that are aggregated.

use super::*;

#[test]
fn a39_twenty_thousand_copies_are_one_finding_and_the_evil_one_is_another() {
    let mut node = Node::running();
    for number in 0..20_000 {
        node.see(Source::Change, present(at(&format!("/tmp/t{number}")), "ls"));
        if number == 10_000 {
            node.see(Source::Gate, exec(at("/tmp/x"), "evil"));
            assert_eq!(node.findings.last().unwrap().kind, Kind::ExecNew, "published at once");
        }
    }
    node.publish();
    assert_eq!(node.kinds(), [(Kind::ExecNew, 1, 1), (Kind::FileRelocated, 1, 20_000)]);
    assert_eq!(node.members().len(), 20_000);
    assert!(node.findings.len() < 200, "{} revisions", node.findings.len());
    let relocated = node.newest()[0].clone();
    assert_eq!(relocated.file.as_ref().unwrap().path, at("/tmp/t0"));

    // A scan and a restart find the same again.
    let mut restarted = node.restarted();
    for node in [&mut node, &mut restarted] {
        let reported = node.findings.len();
        for number in 0..20_000 {
            node.see(Source::Scan, present(at(&format!("/tmp/t{number}")), "ls"));
        }
        node.publish();
        assert_eq!(node.findings.len(), reported, "nothing is reported twice");
        node.see(Source::Change, present(at("/tmp/more"), "ls"));
        node.publish();
        assert_eq!(node.findings.last().unwrap().files, Some(20_001));
        assert_eq!(node.findings.last().unwrap().id, relocated.id);
    }

    // One of them is run: that is a finding, linked to the one about the copies.
    node.see(Source::Gate, exec(at("/tmp/t7"), "ls"));
    let run = node.findings.last().unwrap();
    assert_eq!((run.kind, run.story), (Kind::ExecRelocated, Some(relocated.id)));
}

#[test]
fn one_copy_is_about_one_file_and_two_are_counted() {
    let mut node = Node::running();
    node.play("write c1 /tmp/a ls").publish();
    assert_eq!(node.findings.iter().map(|finding| finding.files).collect::<Vec<_>>(), [None]);
    assert!(node.members().is_empty());
    node.play("write c1 /tmp/b ls").publish();
    assert_eq!(node.findings.last().unwrap().files, Some(2));
    assert_eq!(node.members().len(), 2);
    // A removed copy is marked as gone. When it comes back, it is no additional file.
    node.play("gone c1 /tmp/b").publish();
    assert_eq!(node.members().values().filter(|member| member.removed).count(), 1);
    node.play("write c1 /tmp/b ls").publish();
    assert_eq!(node.findings.last().unwrap().files, Some(2));
    assert_eq!(node.members().values().filter(|member| member.removed).count(), 0);
}

#[test]
fn many_files_of_a_directory_are_aggregated_and_none_is_lost() {
    let mut node = Node::running();
    for number in 0..500 {
        node.see(Source::Change, present(at(&format!("/opt/t/{number}")), &number.to_string()));
    }
    node.publish();
    assert_eq!(node.kinds(), [(Kind::FileAdded, 33, 500)]);
    let members = node.members();
    assert_eq!(members.len(), 500 - 32);
    let paths: HashSet<_> = members.into_keys().map(|(_, path)| path).collect();
    let alone = node.newest().into_iter().filter(|finding| finding.files.is_none());
    let alone: HashSet<_> =
        alone.map(|finding| finding.file.as_ref().unwrap().path.clone()).collect();
    assert_eq!(paths.union(&alone).count(), 500);

    let mut restarted = node.restarted();
    for number in 0..500 {
        restarted.see(Source::Scan, present(at(&format!("/opt/t/{number}")), &number.to_string()));
    }
    restarted.publish();
    assert_eq!(restarted.findings, []);
}

#[test]
fn a37_a_tree_of_programs_is_a_bounded_number_of_findings() {
    let mut node = Node::running();
    for number in 0..5000 {
        let path = format!("/opt/{}/{number}", number / 10);
        node.see(Source::Change, present(at(&path), &number.to_string()));
    }
    node.publish();
    assert_eq!(node.kinds(), [(Kind::FileAdded, 256 + 64 + 1, 5000)]);
    // Each program that was built and then is run has a finding of its own.
    for number in 0..300 {
        let path = format!("/opt/{}/{number}", number / 10);
        node.see(Source::Gate, exec(at(&path), &number.to_string()));
    }
    assert_eq!(node.kinds()[0], (Kind::ExecNew, 300, 300));
    assert!(node.findings.iter().rev().take(300).all(|finding| finding.story.is_some()));
}

#[test]
fn what_a_package_manager_writes_is_one_transaction() {
    let mut node = Node::running();
    node.see(Source::Change, dpkg("/usr/bin/dpkg"));
    assert_eq!(node.findings, [], "nothing is written yet");
    node.see(Source::Change, written_by("/usr/bin/nmap", "nmap", Some(descendant(50, &[]))));
    let transaction = node.findings[0].clone();
    assert_eq!((transaction.kind, transaction.files), (Kind::PackageTransaction, Some(1)));
    assert_eq!(transaction.process.as_ref().unwrap().identity.pid, 50);
    node.see(Source::Change, written_by("/usr/bin/ncat", "ncat", Some(descendant(52, &[51, 50]))));
    let gone = Fact::File(FileFact::Absent {
        path: at("/usr/bin/curl"),
        writer: Some(descendant(50, &[])),
    });
    node.see(Source::Change, gone);
    // The writer is not known: it may be any process.
    node.see(Source::Change, written_by("/usr/bin/evil", "evil", None));
    node.see(Source::Change, written_by("/usr/bin/other", "other", Some(descendant(60, &[1]))));
    node.publish();
    assert_eq!(node.kinds(), [(Kind::FileAdded, 2, 2), (Kind::PackageTransaction, 1, 3)]);

    // Its program is run: the finding names the transaction.
    node.see(Source::Gate, exec(at("/usr/bin/nmap"), "nmap"));
    let run = node.findings.last().unwrap();
    assert_eq!((run.kind, run.transaction), (Kind::ExecNew, Some(transaction.id)));
    // Other content at the same path was not brought by it.
    node.see(Source::Gate, exec(at("/usr/bin/ncat"), "worse"));
    assert_eq!(node.findings.last().unwrap().transaction, None);

    let mut restarted = node.restarted();
    for (path, content) in [("/usr/bin/nmap", "nmap"), ("/usr/bin/ncat", "ncat")] {
        restarted.see(Source::Scan, present(at(path), content));
    }
    restarted.see(
        Source::Scan,
        Fact::File(FileFact::Absent { path: at("/usr/bin/curl"), writer: None }),
    );
    restarted.publish();
    assert_eq!(restarted.findings, []);
}

#[test]
fn a_program_that_is_run_before_it_settles_is_brought_by_its_transaction() {
    let mut node = Node::running();
    node.see(Source::Change, dpkg("/usr/bin/dpkg"));
    node.see(Source::Gate, exec(at("/usr/bin/nmap"), "nmap"));
    node.see(Source::Change, written_by("/usr/bin/nmap", "nmap", Some(descendant(50, &[]))));
    node.publish();
    assert_eq!(node.kinds(), [(Kind::ExecNew, 1, 1), (Kind::PackageTransaction, 1, 1)]);
    let run = node.newest()[0];
    assert_eq!(run.transaction, Some(node.newest()[1].id));
}

#[test]
fn scripts_of_a_package_belong_to_its_transaction_and_what_they_give_away_stands_alone() {
    let mut node = Node::running();
    node.see(Source::Change, dpkg("/usr/bin/dpkg"));
    let script = |path: &str, process: Arc<Process>| {
        let mut fact = exec(at(path), "script");
        if let Fact::File(FileFact::Executed { process: runner, state, .. }) = &mut fact {
            (*runner, state.format) = (process, Format::Script);
        }
        fact
    };
    let own = descendant(51, &[50]);
    node.see(Source::Gate, script("/var/lib/dpkg/info/nmap.postinst", own.clone()));
    node.publish();
    assert_eq!(node.kinds(), [(Kind::PackageTransaction, 1, 1)]);
    let mut privileged = state_of("ls");
    privileged.mode = 0o4755;
    let (path, writer) = (at("/bin/ls"), Some(own.clone()));
    node.see(
        Source::Change,
        Fact::File(FileFact::Present {
            path,
            state: privileged,
            lower: None,
            writer,
            changed: None,
        }),
    );
    node.publish();
    assert_eq!(node.kinds(), [(Kind::FilePrivileged, 1, 1), (Kind::PackageTransaction, 1, 2)]);
    let reported = node.newest();
    let privileged = reported.iter().find(|finding| finding.kind == Kind::FilePrivileged).unwrap();
    assert_eq!(privileged.transaction, Some(reported[0].id));
    // The same scripts, run by another process or from another place.
    node.see(Source::Gate, script("/tmp/nmap.postinst", own));
    node.see(Source::Gate, script("/var/lib/dpkg/info/x.postinst", descendant(60, &[1])));
    assert_eq!(node.kinds()[0], (Kind::ExecScript, 2, 2));
}

#[test]
fn what_only_calls_itself_a_package_manager_is_none() {
    for (before, exe) in
        [("write c1 /usr/bin/dpkg evil", "/usr/bin/dpkg"), ("exec c1 /tmp/dpkg evil", "/tmp/dpkg")]
    {
        let mut node = Node::running();
        node.play(before);
        node.see(Source::Change, dpkg(exe));
        node.see(Source::Change, written_by("/usr/bin/x", "x", Some(descendant(50, &[]))));
        assert!(
            node.findings.iter().all(|finding| finding.kind != Kind::PackageTransaction),
            "{exe}"
        );
    }
}

#[test]
fn a42_the_programs_of_a_foreign_root_are_aggregated_after_the_first_ones() {
    let mut node = Node::running();
    let run = |path: &str, content: &str, root: Option<&str>| {
        let mut fact = exec(at(path), content);
        if let Fact::File(FileFact::Executed { process: runner, .. }) = &mut fact {
            *runner = Arc::new(Process { root: root.map(Into::into), ..process(42) });
        }
        fact
    };
    for number in 0..100 {
        let (path, content) = (format!("/tmp/alpine/bin/{number}"), number.to_string());
        let reported = node.findings.len();
        node.see(Source::Gate, run(&path, &content, Some("/tmp/alpine")));
        assert_eq!(node.findings.len(), reported + 1, "each is published at once");
        // Written files are reported when they settle. These have been run before.
        node.see(Source::Change, present(at(&path), &content));
    }
    assert_eq!(node.kinds(), [(Kind::ExecNew, 9, 100)]);
    // The same file again raises the count, not the number of files.
    node.see(Source::Gate, run("/tmp/alpine/bin/50", "50", Some("/tmp/alpine")));
    node.publish();
    assert_eq!(node.kinds(), [(Kind::ExecNew, 9, 100)]);
    assert_eq!(node.findings.last().unwrap().count, 93);
    // A program that is run elsewhere has a finding of its own.
    node.see(Source::Gate, run("/tmp/x", "evil", None));
    assert_eq!(node.kinds(), [(Kind::ExecNew, 10, 101)]);
}

#[test]
fn the_removal_of_a_guard_is_never_one_of_many() {
    let mut image = IMAGE.to_owned();
    for number in 0..500 {
        image.push_str(&format!("/sbin/{number} 755 elf {number}\n"));
    }
    image.push_str("/sbin/tcpdump 755 elf tcpdump\n");
    let mut node = Node::running();
    let baseline = Arc::new(ImageBaseline::from_text(&[&image]));
    let chain_id = ImageBaseline::from_text(&[IMAGE]).chain_id();
    let ready = BaselineEvent::Ready { chain_id, baseline, unchanged_since: None };
    node.give(Input::Baseline(ready, ImageReference::default()));
    for number in 0..500 {
        node.see(
            Source::Scan,
            Fact::File(FileFact::Absent { path: at(&format!("/sbin/{number}")), writer: None }),
        );
    }
    node.see(
        Source::Scan,
        Fact::File(FileFact::Absent { path: at("/sbin/tcpdump"), writer: None }),
    );
    node.publish();
    assert_eq!(node.kinds(), [(Kind::FileRemoved, 34, 501)]);
    let guard =
        node.newest().into_iter().find(|finding| finding.severity == Severity::Medium).unwrap();
    assert_eq!(guard.file.as_ref().unwrap().path, at("/sbin/tcpdump"));
}
