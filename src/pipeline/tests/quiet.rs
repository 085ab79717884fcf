//! Findings of normal operation that become one line, each with an attack beside it that
//! does not go into that line.

use super::*;

fn program(pid: u32, exe: &str, ancestors: &[(u32, &str)]) -> Process {
    let named = |(pid, exe): &(u32, &str)| Ancestor {
        identity: ProcessIdentity { pid: *pid, start_time: 1 },
        exe: Some((*exe).to_owned()),
        argv: None,
        is_proven_inside: false,
    };
    Process {
        exe: Some(exe.to_owned()),
        ancestors: ancestors.iter().map(named).collect(),
        ..process(pid)
    }
}

fn script_of(path: &str, content: &str, process: Process) -> Fact {
    let state = FileState { format: Format::Script, ..state_of(content) };
    let (path, filesystem, lower) = (at(path), Filesystem::Overlay, None);
    let script = Script::File { path, filesystem, state, lower };
    let process = Arc::new(process);
    Fact::File(FileFact::Interpreted { script, process, writer: None, denied: false })
}

fn run(path: &str, content: &str, process: Process, by: Option<Process>) -> Fact {
    let mut fact = exec(at(path), content);
    if let Fact::File(FileFact::Executed { process: runner, writer, .. }) = &mut fact {
        (*runner, *writer) = (Arc::new(process), by.map(Arc::new));
    }
    fact
}

fn loaded(path: &str, content: &str, process: Process, by: Option<Process>) -> Fact {
    Fact::File(FileFact::Loaded {
        path: at(path),
        filesystem: Filesystem::Overlay,
        state: state_of(content),
        lower: None,
        process: Arc::new(process),
        by_linker: false,
        is_shared: false,
        writer: by.map(Arc::new),
        denied: false,
    })
}

impl Node {
    /// Kind, severity, path, files and count of each finding.
    fn lines(&mut self) -> Vec<String> {
        self.publish();
        let line = |finding: &&Finding| {
            let path = finding.file.as_ref().map_or(String::new(), |file| file.path.to_string());
            let (kind, severity) = (finding.kind, finding.severity);
            let files = finding.files.unwrap_or(1);
            format!("{kind} {severity} {path} {files} {}", finding.count)
        };
        self.newest().iter().map(line).collect()
    }
}

#[test]
fn w06_r32_scripts_under_generated_names_are_one_line_and_the_evil_one_is_another() {
    let mut node = Node::running();
    let shell = |pid| program(pid, "/bin/busybox", &[(1, "/bin/busybox")]);
    for number in 0..60 {
        let path = format!("/home/runner/_work/_temp/{number}.sh");
        node.see(Source::Trace, script_of(&path, &path, shell(1000 + number)));
    }
    node.see(Source::Trace, script_of("/tmp/evil.sh", "evil", shell(2000)));
    let python = program(2001, "/usr/bin/python3", &[]);
    node.see(Source::Trace, script_of("/home/runner/_work/_temp/61.sh", "other", python));
    assert_eq!(
        node.lines(),
        [
            "exec.interpreted medium /home/runner/_work/_temp/0.sh 60 60",
            "exec.interpreted medium /tmp/evil.sh 1 1",
            "exec.interpreted medium /home/runner/_work/_temp/61.sh 1 1",
        ]
    );
    assert_eq!(node.members().len(), 60, "all are listed");
    // Worse than usual: executed, and critical.
    node.see(Source::Gate, exec(at("/home/runner/_work/_temp/7.sh"), "elf"));
    assert!(node.lines()[3].starts_with("exec.new critical"));

    let mut restarted = node.restarted();
    let again = script_of("/home/runner/_work/_temp/99.sh", "more", shell(3000));
    restarted.see(Source::Trace, again);
    assert_eq!(restarted.newest()[0].files, Some(61));
}

#[test]
fn r18_one_content_under_generated_names_is_one_finding_and_another_content_is_not() {
    let mut node = Node::running();
    for number in 0..30_u32 {
        let path = format!("/tmp/a{number:03}Qx{number:03}z");
        node.see(Source::Gate, exec(at(&path), "same"));
    }
    node.see(Source::Gate, exec(at("/tmp/a999Qx999z"), "other"));
    node.see(Source::Gate, exec(at("/tmp/x"), "same"));
    let lines = node.lines();
    assert_eq!(lines[0], "exec.new critical /tmp/a000Qx000z 30 30");
    assert_eq!(lines[1], "exec.new critical /tmp/a999Qx999z 1 1");
    assert_eq!(lines[2], "exec.new critical /tmp/x 1 1");
    assert_eq!(node.members().len(), 30);
}

#[test]
fn w07_what_a_transaction_has_brought_is_used_in_one_line_and_what_was_changed_since_is_not() {
    let mut node = Node::running();
    node.see(Source::Change, dpkg("/usr/bin/dpkg"));
    let python = || program(70, "/bin/busybox", &[]);
    let unpacks = || Some((*descendant(52, &[50])).clone());
    for number in 0..16 {
        let path = format!("/usr/lib/numpy/lib{number}.so");
        // Half of them before the transaction is reported.
        let writer = if number < 8 { unpacks() } else { None };
        if number >= 8 {
            let writer = unpacks().map(Arc::new);
            node.see(Source::Change, written_by(&path, &path, writer));
        }
        node.see(Source::Trace, loaded(&path, &path, python(), writer));
    }
    node.see(Source::Gate, run("/usr/bin/jq", "jq", process(71), unpacks()));
    let lines = node.lines();
    let used = |lines: &[String]| -> Vec<String> {
        lines.iter().filter(|line| !line.starts_with("package.")).cloned().collect()
    };
    assert_eq!(
        used(&lines),
        ["library.loaded low /usr/lib/numpy/lib0.so 16 16", "exec.new low /usr/bin/jq 1 1"]
    );
    let transaction =
        node.newest().iter().find(|one| one.kind.name() == "package.transaction").unwrap().id;
    for finding in node.newest().iter().filter(|one| one.kind != Kind::PackageTransaction) {
        assert_eq!(finding.transaction, Some(transaction));
        assert!(finding.detail.as_deref().unwrap().contains("package manager"), "{finding:?}");
    }
    // Another process has changed a file since, or put one beside it.
    let evil = || Some(program(80, "/bin/busybox", &[(1, "/bin/busybox")]));
    node.see(Source::Gate, run("/usr/bin/jq", "evil", process(72), evil()));
    node.see(Source::Trace, loaded("/usr/lib/numpy/lib3.so", "evil", process(73), evil()));
    node.see(Source::Gate, run("/usr/bin/jq2", "beside", process(74), None));
    let lines = used(&node.lines());
    assert_eq!(
        lines[2..],
        [
            "exec.new critical /usr/bin/jq 1 1",
            "library.loaded high /usr/lib/numpy/lib3.so 1 1",
            "exec.new critical /usr/bin/jq2 1 1",
        ]
    );
}

#[test]
fn w07_r13_libraries_of_one_directory_and_process_are_one_line_and_a_preload_is_another() {
    let mut node = Node::running();
    let app = || program(70, "/usr/bin/curl", &[(1, "/bin/busybox")]);
    for number in 0..12 {
        let name = ["cuda", "nvml", "ptx", "gl"][number % 4];
        let path = format!("/usr/lib/drivers/lib{name}.so.{}", number / 4);
        let mut fact = loaded(&path, &path, app(), None);
        if let Fact::File(FileFact::Loaded { filesystem, .. }) = &mut fact {
            *filesystem = Filesystem::Volume;
        }
        node.see(Source::Trace, fact);
    }
    // A worker that had ended when it was examined, in another directory.
    for number in 0..12 {
        let name = ["cuda", "nvml", "ptx", "gl"][number % 4];
        let path = format!("/opt/drivers/lib{name}.so.{}", number / 4);
        let mut worker = program(71, "/usr/bin/curl", &[]);
        worker.identity.start_time = 0;
        let mut fact = loaded(&path, &path, worker, None);
        if let Fact::File(FileFact::Loaded { filesystem, .. }) = &mut fact {
            *filesystem = Filesystem::Volume;
        }
        node.see(Source::Trace, fact);
    }
    node.see(Source::Trace, loaded("/tmp/evil.so", "evil", app(), None));
    node.see(Source::Trace, loaded("/usr/lib/drivers/evil.so", "evil", app(), None));
    let lines = node.lines();
    let medium = lines.iter().filter(|line| line.starts_with("library.loaded medium"));
    assert!(medium.count() <= 3, "{lines:#?}");
    let high: Vec<_> = lines.iter().filter(|line| line.contains(" high ")).collect();
    assert_eq!(
        high,
        [
            "library.loaded high /tmp/evil.so 1 1",
            "library.loaded high /usr/lib/drivers/evil.so 1 1"
        ]
    );
}

#[test]
fn r15_code_that_a_program_makes_for_itself_is_one_line_under_any_name_and_a_library_is_not() {
    let mut node = Node::running();
    let generated = |name: &str, pid: u32, exe: &str| {
        let path = format!("/tmp/{name}");
        let mut fact = loaded(&path, &path, program(pid, exe, &[(1, "/bin/busybox")]), None);
        if let Fact::File(FileFact::Loaded { state, is_shared, .. }) = &mut fact {
            (state.format, state.deleted, *is_shared) = (Format::Unknown, true, true);
            state.content = Content::Unhashed(model::Unhashed::Gone);
        }
        fact
    };
    // mkstemp's names, of three workers.
    for (number, name) in
        ["ffiAbCdEf", "ffiqwerty", "ffi0a1b2c", "ffiZZZZZZ", "ffihousex"].into_iter().enumerate()
    {
        let pid = 70 + u32::try_from(number % 3).unwrap();
        node.see(Source::Trace, generated(name, pid, "/usr/bin/curl"));
    }
    assert_eq!(node.lines(), ["library.loaded info /tmp/ffiAbCdEf 5 5"]);
    node.see(Source::Trace, generated("ffiabcdef", 80, "/bin/ls"));
    let shell = || Some(program(90, "/bin/busybox", &[(1, "/bin/busybox")]));
    let app = program(70, "/usr/bin/curl", &[(1, "/bin/busybox")]);
    node.see(Source::Trace, loaded("/tmp/ffievilxx", "evil", app, shell()));
    assert_eq!(
        node.lines()[1..],
        ["library.loaded info /tmp/ffiabcdef 1 1", "library.loaded high /tmp/ffievilxx 1 1"]
    );
}

#[test]
fn w08_what_the_images_linker_has_built_is_one_line_and_what_others_bring_is_not() {
    let mut node = Node::running();
    let make = [(60, "/usr/bin/make"), (1, "/bin/busybox"), (100, "/usr/bin/shim")];
    let linked = |exe: &str| Some(program(61, exe, &make));
    let runs = |pid| program(pid, "/bin/busybox", &make);
    for number in 0..25 {
        let path = format!("/src/conftest{}", ["a", "b", "c"][number % 3].repeat(number + 1));
        node.see(Source::Gate, run(&path, &path, runs(200), linked("/usr/bin/ld")));
    }
    assert_eq!(node.lines(), ["exec.new medium /src/conftesta 25 25"]);
    // Another linker; another tree of processes; an interactive process; an unknown writer.
    node.see(Source::Gate, run("/src/evil", "1", runs(300), linked("/tmp/ld")));
    let other = program(301, "/bin/busybox", &[(2, "/bin/sh"), (100, "/usr/bin/shim")]);
    node.see(Source::Gate, run("/src/evil", "2", other, linked("/usr/bin/ld")));
    let types = Process { tty: Some("pts/0".to_owned()), ..runs(302) };
    node.see(Source::Gate, run("/src/evil", "3", types, linked("/usr/bin/ld")));
    node.see(Source::Gate, run("/src/evil", "4", runs(303), None));
    node.see(Source::Gate, run("/src/evil", "5", runs(304), linked("/usr/bin/curl")));
    let lines = node.lines();
    assert_eq!(lines.len(), 6, "{lines:#?}");
    assert!(lines[1..].iter().all(|line| line.starts_with("exec.new critical")), "{lines:#?}");
}

#[test]
fn w08_a_linker_that_is_known_from_records_alone_has_built_it_too() {
    let mut node = Node::running();
    let make = [(60, "/usr/bin/make"), (1, "/bin/busybox"), (100, "/usr/bin/shim")];
    let recorded = || {
        let mut linker = program(61, "/usr/bin/ld", &make);
        linker.identity.start_time = 0;
        linker.ancestors.iter_mut().for_each(|one| one.identity.start_time = 0);
        Some(linker)
    };
    // The records do not always reach the process that has started the container.
    let cut_off = || {
        let mut linker = recorded()?;
        linker.ancestors.truncate(1);
        Some(linker)
    };
    for number in 0..5 {
        let path = format!("/src/conftest{number}");
        let linker = if number % 2 == 0 { recorded() } else { cut_off() };
        node.see(Source::Gate, run(&path, &path, program(200, "/bin/busybox", &make), linker));
    }
    assert_eq!(node.lines(), ["exec.new medium /src/conftest0 5 5"]);
    // Another tree of processes is another one all the same.
    let other = program(301, "/bin/busybox", &[(2, "/bin/sh"), (100, "/usr/bin/shim")]);
    node.see(Source::Gate, run("/src/evil", "2", other, recorded()));
    assert_eq!(node.lines()[1..], ["exec.new critical /src/evil 1 1"]);
}

#[test]
fn w08_one_tree_is_known_although_records_end_early_and_what_is_outside_is_no_common_origin() {
    let mut node = Node::running();
    let init = (node.init.pid, "/bin/busybox");
    let all = [(60, "/usr/bin/make"), init, (100, "/usr/bin/shim"), (101, "/usr/bin/containerd")];
    let recorded = |mut process: Process| {
        process.identity.start_time = 0;
        process.ancestors.iter_mut().for_each(|one| one.identity.start_time = 0);
        process
    };
    let proven = |mut process: Process, number: usize| {
        process.ancestors[..number].iter_mut().for_each(|one| one.is_proven_inside = true);
        process
    };
    let linker = |above| program(61, "/usr/bin/ld", above);
    let runs = |pid, above| program(pid, "/bin/busybox", above);
    for (path, process, writer) in [
        // The records of the writer, or of the process that runs it, end early.
        ("/src/aa", runs(200, &all[..3]), recorded(linker(&all[..1]))),
        ("/src/ab", recorded(runs(201, &all[..1])), linker(&all[..3])),
        // The records go on outside.
        ("/src/ac", recorded(runs(202, &all)), recorded(linker(&all))),
        // The parents of the process are unknown, and it is above the writer.
        ("/src/ad", runs(60, &[]), recorded(linker(&all[..1]))),
        // Both end early, and the records prove that they are inside until then.
        (
            "/src/ae",
            proven(recorded(runs(203, &all[..1])), 1),
            proven(recorded(linker(&all[..1])), 1),
        ),
    ] {
        node.see(Source::Gate, run(path, path, process, Some(writer)));
    }
    assert_eq!(node.lines(), ["exec.new medium /src/aa 5 5"]);
    // Processes that came in from outside, and nothing but that in common with the build.
    let session = [(300, "/bin/sh"), (100, "/usr/bin/shim"), (101, "/usr/bin/containerd")];
    for (path, process, writer) in [
        ("/src/ba", runs(301, &session[..2]), recorded(linker(&all))),
        ("/src/bb", recorded(runs(302, &session)), linker(&all[..3])),
        ("/src/bc", recorded(runs(303, &session)), recorded(linker(&all))),
        ("/src/bd", runs(304, &[]), linker(&all[..3])),
        // The records do not prove that what both have in common is inside.
        ("/src/be", recorded(runs(305, &all[..1])), recorded(linker(&all[..1]))),
    ] {
        node.see(Source::Gate, run(path, path, process, Some(writer)));
    }
    let lines = node.lines();
    assert_eq!(lines.len(), 6, "{lines:#?}");
    assert!(lines[1..].iter().all(|line| line.starts_with("exec.new critical")), "{lines:#?}");
}

#[test]
fn w08_a_copy_of_what_the_linker_has_built_is_built_here_and_another_content_there_is_not() {
    let mut node = Node::running();
    let make = [(60, "/usr/bin/make"), (1, "/bin/busybox"), (100, "/usr/bin/shim")];
    let links = || Some(Arc::new(program(61, "/usr/bin/ld", &make)));
    let copies = || Some(program(62, "/usr/bin/install", &make));
    let runs = |pid| program(pid, "/bin/busybox", &make);
    node.see(Source::Change, written_by("/src/hello", "hello", links()));
    node.see(Source::Change, written_by("/src/build/_fast.so", "fast", links()));
    node.see(Source::Gate, run("/src/hello", "hello", runs(200), None));
    // Run before its write is reported, and then copied.
    let linked = links().map(|one| (*one).clone());
    node.see(Source::Gate, run("/src/quick", "quick", runs(203), linked));
    node.see(Source::Gate, run("/usr/local/bin/quick", "quick", runs(204), copies()));
    node.see(Source::Gate, run("/usr/local/bin/hello", "hello", runs(201), copies()));
    node.see(Source::Trace, loaded("/opt/venv/_fast.so", "fast", runs(202), copies()));
    let used = |node: &mut Node| -> Vec<String> {
        node.lines().into_iter().filter(|line| !line.starts_with("file.")).collect()
    };
    let built = ["exec.new medium /src/hello 4 4", "library.loaded medium /opt/venv/_fast.so 1 1"];
    assert_eq!(used(&mut node), built);
    // Another content in its place; and a copy by another tree of processes.
    node.see(Source::Gate, run("/usr/local/bin/hello", "evil", runs(300), copies()));
    let other = program(301, "/bin/busybox", &[(2, "/bin/sh"), (100, "/usr/bin/shim")]);
    node.see(Source::Gate, run("/usr/local/bin/other", "hello", other, copies()));
    let lines = used(&mut node);
    assert_eq!(lines[..2], built);
    assert_eq!(
        lines[2..],
        [
            "exec.new critical /usr/local/bin/hello 1 1",
            "exec.new critical /usr/local/bin/other 1 1"
        ]
    );
}

#[test]
fn w08_scripts_that_the_images_archiver_has_unpacked_are_one_line_and_others_are_not() {
    let mut node = Node::running();
    let tree = [(1, "/bin/busybox"), (100, "/usr/bin/shim")];
    let unpacks = |pid, exe: &str| Some(program(pid, exe, &tree));
    let executed = |path: &str, content: &str, process: Process, by: Option<Process>| {
        let mut fact = run(path, content, process, by);
        if let Fact::File(FileFact::Executed { state, .. }) = &mut fact {
            state.format = Format::Script;
        }
        fact
    };
    let shell = |pid| program(pid, "/bin/busybox", &tree);
    for number in 0..20 {
        let path = format!("/src/{}", ["configure", "depcomp"][number % 2].repeat(number + 1));
        let pid = 200 + u32::try_from(number).unwrap();
        node.see(Source::Gate, executed(&path, &path, shell(pid), unpacks(50, "/usr/bin/tar")));
    }
    let line = |files| format!("exec.script high /src/configure {files} {files}");
    assert_eq!(node.lines(), [line(20)]);
    // What such a script has written, by itself or by a child; and one that an interpreter
    // was given by name.
    let configure = [(200, "/bin/busybox"), (1, "/bin/busybox"), (100, "/usr/bin/shim")];
    let writes = || Some(program(300, "/bin/cat", &configure));
    node.see(Source::Gate, executed("/src/config.status", "status", shell(301), writes()));
    let awk = program(302, "/usr/bin/awk", &configure);
    let mut interpreted = script_of("/src/confAb12Cd/subs.awk", "awk", awk);
    if let Fact::File(FileFact::Interpreted { writer, .. }) = &mut interpreted {
        *writer = writes().map(Arc::new);
    }
    node.see(Source::Trace, interpreted);
    assert_eq!(node.lines(), [line(22)]);
    // Written so recently that the writer is not known yet; and text through a pipe.
    let awk = program(303, "/usr/bin/awk", &configure);
    node.see(Source::Trace, script_of("/src/defines.awk", "defines", awk));
    let piped = |process: Process| {
        let (script, process) = (model::Script::Pipe { from: None }, Arc::new(process));
        Fact::File(FileFact::Interpreted { script, process, writer: None, denied: false })
    };
    node.see(Source::Trace, piped(program(304, "/bin/busybox", &configure)));
    assert_eq!(node.lines(), [line(23)]);
    // Again: it is known, and what it writes now belongs to it as well.
    node.see(Source::Gate, executed("/src/configure", "/src/configure", shell(400), None));
    let again = [(400, "/bin/busybox"), (1, "/bin/busybox"), (100, "/usr/bin/shim")];
    let writes = Some(program(401, "/bin/cat", &again));
    node.see(Source::Gate, executed("/src/libtool", "libtool", shell(402), writes));
    assert_eq!(node.lines(), ["exec.script high /src/configure 24 25"]);
    assert_eq!(node.members().len(), 24, "all are listed");

    // Another archive; another program; another tree of processes; a person; a program.
    node.see(Source::Gate, executed("/src/evil1", "1", shell(500), unpacks(51, "/usr/bin/tar")));
    node.see(Source::Gate, executed("/src/evil2", "2", shell(501), unpacks(50, "/usr/bin/curl")));
    node.see(Source::Gate, executed("/src/evil3", "3", shell(502), unpacks(50, "/tmp/tar")));
    let other = program(503, "/bin/busybox", &[(2, "/bin/sh"), (100, "/usr/bin/shim")]);
    node.see(Source::Gate, executed("/src/evil4", "4", other, unpacks(50, "/usr/bin/tar")));
    let types = Process { tty: Some("pts/0".to_owned()), ..shell(504) };
    node.see(Source::Gate, executed("/src/evil5", "5", types, unpacks(50, "/usr/bin/tar")));
    node.see(Source::Gate, run("/src/evil6", "6", shell(505), unpacks(50, "/usr/bin/tar")));
    node.see(Source::Trace, script_of("/src/evil7", "7", shell(506)));
    node.see(Source::Trace, piped(shell(507)));
    let lines = node.lines();
    let expected: Vec<String> = (1..=5)
        .map(|number| format!("exec.script high /src/evil{number} 1 1"))
        .chain(["exec.new critical /src/evil6 1 1".to_owned()])
        .chain(["exec.interpreted medium /src/evil7 1 1".to_owned()])
        .chain(["exec.interpreted medium  1 1".to_owned()])
        .collect();
    assert_eq!(lines[1..], expected);
}

#[test]
fn w08_sources_that_a_build_unpacks_again_are_one_line_and_another_archive_is_not() {
    let mut node = Node::running();
    let argv = ["/usr/bin/tar", "xf", "/usr/src/hello.tar"];
    let named = |pid, exe| (ProcessIdentity { pid, start_time: 9 }, exe);
    let main = (init(7), "/bin/busybox");
    let build = named(20, "/bin/busybox");
    let mut number = 0;
    let mut unpack = |node: &mut Node, tar: Process| {
        number += 1;
        let above: Vec<_> =
            tar.ancestors.iter().map(|one| (one.identity, "/bin/busybox")).collect();
        let mut fact = run(
            &format!("/src/configure{number}"),
            &number.to_string(),
            installer(100 + number, &["/bin/busybox", "configure"], &above),
            Some(tar),
        );
        if let Fact::File(FileFact::Executed { state, .. }) = &mut fact {
            state.format = Format::Script;
        }
        node.see(Source::Gate, fact);
    };
    // A loop, its next round, and the same loop after it was started again.
    unpack(&mut node, installer(40, &argv, &[build, main]));
    unpack(&mut node, installer(50, &argv, &[build, main]));
    unpack(&mut node, installer(60, &argv, &[named(21, "/bin/busybox"), main]));
    // By the kernel's records alone.
    let recorded = (ProcessIdentity { pid: main.0.pid, start_time: 0 }, main.1);
    let nameless = Process { uid: None, ..installer(70, &argv, &[build, recorded]) };
    unpack(&mut node, nameless);
    assert_eq!(node.lines(), ["exec.script high /src/configure1 4 4"]);
    // Another archive, another program above, a process from outside, a person, an orphan.
    let other = ["/usr/bin/tar", "xf", "/tmp/evil.tar"];
    unpack(&mut node, installer(80, &other, &[build, main]));
    unpack(&mut node, installer(81, &argv, &[named(23, "/usr/bin/curl"), main]));
    unpack(&mut node, installer(82, &argv, &[build, named(30, "/usr/bin/containerd-shim")]));
    let mut typed = installer(83, &argv, &[build, main]);
    typed.tty = Some("pts/0".to_owned());
    unpack(&mut node, typed);
    unpack(&mut node, installer(84, &argv, &[main]));
    let other_user = Process { uid: Some(7), ..installer(85, &argv, &[build, main]) };
    unpack(&mut node, other_user);
    assert_eq!(node.lines().len(), 7, "{:#?}", node.lines());
}

#[test]
fn w07_libraries_of_a_process_that_has_ended_are_one_line() {
    let mut node = Node::running();
    let gone = |pid: u32| {
        let mut gone = program(pid, "/usr/bin/python3", &[(1, "/bin/busybox")]);
        (gone.exe, gone.identity.start_time) = (None, 0);
        gone
    };
    for number in 0..16 {
        let path = format!("/opt/venv/fast/m{}.so", "a".repeat(number + 1));
        node.see(Source::Trace, loaded(&path, &path, gone(70), None));
    }
    node.see(Source::Trace, loaded("/opt/evil.so", "evil", gone(70), None));
    node.see(Source::Trace, loaded("/opt/venv/fast/evil.so", "evil", gone(71), None));
    assert_eq!(
        node.lines(),
        [
            "library.loaded high /opt/venv/fast/ma.so 16 16",
            "library.loaded high /opt/evil.so 1 1",
            "library.loaded high /opt/venv/fast/evil.so 1 1",
        ]
    );
}

#[test]
fn r29_a_script_that_a_package_manager_runs_from_memory_is_its_transactions_and_a_program_is_not() {
    let mut node = Node::running();
    node.see(Source::Change, dpkg("/usr/bin/dpkg"));
    let memory = |format, pid, parent: (u32, &str)| {
        let mut fact = exec(at("/memfd:postinst"), &format!("{format:?} {pid}"));
        if let Fact::File(FileFact::Executed { filesystem, state, process, .. }) = &mut fact {
            (*filesystem, state.format) = (Filesystem::Anonymous, format);
            let ancestors = [parent, (50, "/usr/bin/dpkg")];
            *process = Arc::new(program(pid, "/bin/busybox", &ancestors));
        }
        fact
    };
    let dpkg = (50, "/usr/bin/dpkg");
    node.see(Source::Gate, memory(Format::Script, 51, dpkg));
    let in_tmp = program(52, "/bin/busybox", &[dpkg]);
    node.see(Source::Trace, script_of("/tmp/config.x", "text", in_tmp));
    assert_eq!(node.lines(), ["package.transaction medium  2 2"]);
    node.see(Source::Gate, memory(Format::Elf, 53, dpkg));
    // Executed by a further descendant of the package manager.
    node.see(Source::Gate, memory(Format::Script, 54, (55, "/bin/busybox")));
    let lines = node.lines();
    assert_eq!(lines.len(), 3, "{lines:#?}");
    assert!(lines[1..].iter().all(|line| line.starts_with("exec.fileless critical")), "{lines:#?}");
}

#[test]
fn w10_copies_of_many_programs_are_few_lines_and_a_new_one_among_them_is_its_own() {
    let contents: Vec<String> = (0..100).map(|number| format!("c{number}")).collect();
    let image = contents.iter().map(|name| format!("/usr/lib/{name} 755 elf {name}\n"));
    let image: String = IMAGE.to_owned() + &image.collect::<String>();
    let mut node = Node::running();
    let baseline = Arc::new(ImageBaseline::from_text(&[&image]));
    node.state.inventory.entry(&id("c1")).baseline.state = BaselineState::Ready(baseline);
    for content in &contents {
        node.see(Source::Change, present(at(&format!("/copy/{content}")), content));
    }
    node.see(Source::Change, present(at("/copy/new"), "evil"));
    let lines = node.lines();
    assert_eq!(lines.len(), 6, "{lines:#?}");
    assert_eq!(lines[4], "file.relocated info /copy/c4 96 96");
    assert_eq!(lines[5], "file.added low /copy/new 1 1");
}

#[test]
fn r31_copies_of_the_image_that_are_run_are_few_lines_and_one_in_disguise_is_its_own() {
    let contents: Vec<String> = (0..20).map(|number| format!("c{number}")).collect();
    let image = contents.iter().map(|name| format!("/usr/lib/{name} 755 elf {name}\n"));
    let image: String = IMAGE.to_owned() + &image.collect::<String>();
    let mut node = Node::running();
    let baseline = Arc::new(ImageBaseline::from_text(&[&image]));
    node.state.inventory.entry(&id("c1")).baseline.state = BaselineState::Ready(baseline);
    let words = ["a", "e", "i", "o"];
    for (number, content) in contents.iter().enumerate() {
        let path = format!("/run/{}/run", words[number % 4].repeat(number / 4 + 1));
        node.see(Source::Gate, exec(at(&path), content));
    }
    let plain = "exec.relocated medium /run/a/run 20 20";
    assert_eq!(node.lines(), [plain]);
    // The applets of one program, and another program in disguise.
    for applet in ["curl", "ls"] {
        node.see(Source::Gate, exec(at(&format!("/run/{applet}")), "busybox"));
    }
    node.see(Source::Gate, exec(at("/run/dpkg"), "c3"));
    node.see(Source::Gate, exec(at("/opt/curl"), "busybox"));
    node.see(Source::Gate, exec(at("/run/new"), "evil"));
    assert_eq!(
        node.lines(),
        [
            plain,
            "exec.relocated high /run/curl 2 2",
            "exec.relocated high /run/dpkg 1 1",
            "exec.relocated high /opt/curl 1 1",
            "exec.new critical /run/new 1 1",
        ]
    );
}

#[test]
fn r23_many_programs_that_gain_a_privilege_are_few_lines() {
    let mut node = Node::running();
    for number in 0..300_u32 {
        let mut state = state_of(&format!("c{number}"));
        state.mode = 0o4755;
        let path = at(&format!("/opt/p{number}"));
        node.see(
            Source::Change,
            Fact::File(FileFact::Present { path, state, lower: None, writer: None, changed: None }),
        );
    }
    let privileged: Vec<String> =
        node.lines().into_iter().filter(|line| line.starts_with("file.privileged")).collect();
    assert_eq!(privileged.len(), 9, "{privileged:#?}");
    assert_eq!(privileged[8], "file.privileged high /opt/p8 292 292");
}

#[test]
fn w10_accounts_that_one_command_changes_are_one_line_and_a_line_by_a_shell_is_its_own() {
    let mut node = Node::running();
    let files = ["/etc/passwd", "/etc/shadow", "/etc/group", "/etc/gshadow"];
    node.state.policy.persistence =
        model::PathGlobs::new(files.iter().map(|&file| file.to_owned()).collect()).unwrap();
    let write = |path: &str, content: &str, writer: Process| {
        let state = FileState { format: Format::Data, mode: 0o644, ..state_of(content) };
        let writer = Some(Arc::new(writer));
        Fact::File(FileFact::Present { path: at(path), state, lower: None, writer, changed: None })
    };
    for file in files {
        node.see(Source::Change, write(file, file, program(60, "/usr/sbin/useradd", &[])));
    }
    let one = "file.persistence high /etc/passwd 4 4";
    assert_eq!(node.lines(), [one]);
    // A scan knows no process.
    node.see(Source::Scan, {
        let state = FileState { format: Format::Data, mode: 0o644, ..state_of("/etc/passwd") };
        let path = at("/etc/passwd");
        Fact::File(FileFact::Present { path, state, lower: None, writer: None, changed: None })
    });
    assert_eq!(node.lines(), [one]);
    node.see(Source::Change, write("/etc/passwd", "evil", program(61, "/bin/busybox", &[])));
    node.see(Source::Change, write("/etc/shadow", "evil", program(62, "/tmp/useradd", &[])));
    assert_eq!(
        node.lines()[1..],
        ["file.persistence high /etc/passwd 1 1", "file.persistence high /etc/shadow 1 1"]
    );
}

#[test]
fn w19_a_site_hook_that_a_package_manager_brings_is_its_transactions_and_one_beside_it_is_not() {
    let mut node = Node::running();
    let places = [
        "**/{site,dist}-packages/*.pth",
        "**/{site-packages,python*}/sitecustomize.py",
        "/etc/cron.d/*",
    ];
    node.state.policy.persistence =
        model::PathGlobs::new(places.map(str::to_owned).into()).unwrap();
    let write = |path: &str, content: &str, writer: Process| {
        let state = FileState { format: Format::Data, mode: 0o644, ..state_of(content) };
        let writer = Some(Arc::new(writer));
        Fact::File(FileFact::Present { path: at(path), state, lower: None, writer, changed: None })
    };
    node.see(Source::Change, dpkg("/usr/bin/dpkg"));
    let brought = [
        "/usr/lib/python3/dist-packages/distutils-precedence.pth",
        "/usr/lib/python3/dist-packages/__editable__.app-1.0.pth",
        "/usr/lib/python3.11/sitecustomize.py",
    ];
    for path in brought {
        node.see(Source::Change, write(path, path, (*descendant(52, &[50])).clone()));
    }
    assert_eq!(node.lines().len(), 1, "{:#?}", node.lines());
    assert!(node.lines()[0].starts_with("package.transaction"), "{:#?}", node.lines());
    let listed = node.members();
    let members: Vec<String> = listed.keys().map(|(_, path)| path.to_string()).collect();
    assert_eq!(members.len(), brought.len(), "{members:#?}");
    // It is seen once more.
    node.see(Source::Change, write(brought[0], brought[0], (*descendant(52, &[50])).clone()));
    assert_eq!(node.lines().len(), 1, "{:#?}", node.lines());
    // A cron job has a finding of its own, whatever process brings it.
    let job = "/etc/cron.d/job";
    node.see(Source::Change, write(job, job, (*descendant(52, &[50])).clone()));
    // Another process puts a file beside them, and changes what was brought.
    let shell = || program(80, "/bin/busybox", &[(1, "/bin/busybox")]);
    let beside = "/usr/lib/python3/dist-packages/x.pth";
    node.see(Source::Change, write(beside, "evil", shell()));
    node.see(Source::Change, write(brought[0], "evil", shell()));
    node.see(Source::Change, write(brought[2], "evil", program(81, "/usr/bin/curl", &[])));
    let lines = node.lines();
    let persistence: Vec<&String> =
        lines.iter().filter(|line| line.starts_with("file.persistence")).collect();
    let expected = [job, beside, brought[0], brought[2]]
        .map(|path| format!("file.persistence high {path} 1 1"));
    assert_eq!(persistence, expected.iter().collect::<Vec<_>>());
}

#[test]
fn w07_what_a_package_lays_where_programs_obey_it_is_one_line_and_what_others_lay_there_is_not() {
    let mut node = Node::running();
    let places = ["/etc/init.d/*", "/etc/rc*.d/*", "/etc/passwd"];
    node.state.policy.persistence =
        model::PathGlobs::new(places.iter().map(|&place| place.to_owned()).collect()).unwrap();
    node.see(Source::Change, dpkg("/usr/bin/dpkg"));
    let write = |path: &str, content: &str, writer: Option<Arc<Process>>| {
        let state = FileState { format: Format::Data, mode: 0o644, ..state_of(content) };
        Fact::File(FileFact::Present { path: at(path), state, lower: None, writer, changed: None })
    };
    for (number, path) in
        ["/etc/init.d/cached", "/etc/rc2.d/cached", "/etc/passwd"].iter().enumerate()
    {
        let number = u32::try_from(number).unwrap();
        node.see(Source::Change, write(path, path, Some(descendant(51 + number, &[50]))));
    }
    let mut privileged = state_of("agent");
    privileged.mode = 0o4755;
    let (path, writer) = (at("/usr/bin/agent"), Some(descendant(55, &[50])));
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
    let lines = |node: &mut Node| -> Vec<String> {
        node.lines().into_iter().filter(|line| line.starts_with("file.p")).collect()
    };
    let installed =
        ["file.persistence high /etc/init.d/cached 3 3", "file.privileged high /usr/bin/agent 1 1"];
    assert_eq!(lines(&mut node), installed);
    let transaction =
        node.newest().iter().find(|one| one.kind == Kind::PackageTransaction).unwrap().id;
    for finding in node.newest().iter().filter(|one| one.kind != Kind::PackageTransaction) {
        assert_eq!(finding.transaction, Some(transaction), "{finding:?}");
    }
    let other = || Some(Arc::new(program(80, "/bin/busybox", &[(1, "/bin/busybox")])));
    node.see(Source::Change, write("/etc/init.d/cached", "evil", other()));
    node.see(Source::Change, write("/etc/rc3.d/evil", "evil", None));
    let lines = lines(&mut node);
    assert_eq!(lines[..2], installed);
    assert_eq!(
        lines[2..],
        [
            "file.persistence high /etc/init.d/cached 1 1",
            "file.persistence high /etc/rc3.d/evil 1 1"
        ]
    );
}

#[test]
fn w07_what_a_scan_finds_while_a_transaction_goes_on_is_one_line_and_what_comes_later_is_not() {
    let mut node = Node::running();
    let places = vec!["/etc/rc*.d/*".to_owned()];
    node.state.policy.persistence = model::PathGlobs::new(places).unwrap();
    node.see(Source::Change, dpkg("/usr/bin/dpkg"));
    node.see(Source::Change, written_by("/usr/bin/new", "new", Some(descendant(51, &[50]))));
    let during = node.newest()[0].first_seen;
    let written_at = |path: &str, writer: Option<Arc<Process>>, changed: Timestamp| {
        let state = FileState { format: Format::Data, mode: 0o644, ..state_of(path) };
        let changed = model::file::FileTime { seconds: changed.as_second(), nanoseconds: 0 };
        let (path, changed) = (at(path), Some(changed));
        Fact::File(FileFact::Present { path, state, lower: None, writer, changed })
    };
    let write = |path: &str, writer| written_at(path, writer, during);
    let lines = |node: &mut Node| -> Vec<String> {
        node.lines().into_iter().filter(|line| line.starts_with("file.persistence")).collect()
    };
    for number in 0..4 {
        node.see(Source::Scan, write(&format!("/etc/rc{number}.d/S01cached"), None));
    }
    // The writer of this one is known, and is another.
    let other = || Some(Arc::new(program(80, "/bin/busybox", &[(1, "/bin/busybox")])));
    node.see(Source::Scan, write("/etc/rc5.d/evil", other()));
    let later = during.checked_add(jiff::SignedDuration::from_secs(60)).unwrap();
    node.see(Source::Scan, written_at("/etc/rc6.d/evil", None, later));
    assert_eq!(
        lines(&mut node),
        [
            "file.persistence high /etc/rc0.d/S01cached 4 4",
            "file.persistence high /etc/rc5.d/evil 1 1",
            "file.persistence high /etc/rc6.d/evil 1 1",
        ]
    );
}

/// An image with Python, and a package manager of it that runs below init.
fn node_with_python() -> Node {
    let image = IMAGE.to_owned() + "/usr/bin/python3.11 755 elf python\n";
    let mut node = Node::running();
    let baseline = Arc::new(ImageBaseline::from_text(&[&image]));
    node.state.inventory.entry(&id("c1")).baseline.state = BaselineState::Ready(baseline);
    node
}

fn installer(pid: u32, argv: &[&str], above: &[(ProcessIdentity, &str)]) -> Process {
    let above = above.iter().map(|(identity, exe)| Ancestor {
        identity: *identity,
        exe: Some((*exe).to_owned()),
        argv: None,
        is_proven_inside: false,
    });
    Process {
        exe: Some(argv[0].to_owned()),
        argv: Some(texts(argv)),
        ancestors: above.collect(),
        ..process(pid)
    }
}

fn manages(process: &Process) -> Fact {
    Fact::PackageManager { process: Arc::new(process.clone()) }
}

#[test]
fn w10_what_a_copy_of_the_images_interpreter_installs_is_a_transaction_and_what_another_does_is_not()
 {
    let copy = "/opt/venv/bin/python3";
    let argv = [copy, "-m", "pip", "install", "x"];
    let mut node = node_with_python();
    node.see(Source::Gate, run(copy, "python", process(60), None));
    node.see(Source::Change, manages(&installer(60, &argv, &[])));
    node.see(Source::Change, written_by("/opt/venv/x.so", "x", Some(descendant(61, &[60]))));
    // What it brought may install further packages.
    let pip = "/opt/venv/bin/pip";
    node.see(Source::Change, written_by(pip, "pip", Some(descendant(61, &[60]))));
    let by_script = [copy, pip, "install", "y"];
    node.see(Source::Gate, run(copy, "python", process(70), None));
    node.see(Source::Change, manages(&installer(70, &by_script, &[])));
    node.see(Source::Change, written_by("/opt/venv/y.so", "y", Some(descendant(71, &[70]))));
    assert_eq!(
        node.lines(),
        [
            "exec.relocated medium /opt/venv/bin/python3 1 2",
            "package.transaction medium  2 2",
            "package.transaction medium  1 1",
        ]
    );

    // Another program of the image under an interpreter's name: it is in disguise.
    let mut node = node_with_python();
    let disguised = "/opt/x/node";
    node.see(Source::Gate, run(disguised, "busybox", process(60), None));
    node.see(Source::Change, manages(&installer(60, &[disguised, "-m", "pip", "install"], &[])));
    node.see(Source::Change, written_by("/opt/x/y", "x", Some(descendant(61, &[60]))));
    let lines = node.lines();
    assert_eq!(lines[0], "exec.relocated high /opt/x/node 1 1");
    assert!(!lines.iter().any(|line| line.starts_with("package")), "{lines:#?}");
    // The copy was overwritten, and is not read yet.
    let mut node = node_with_python();
    node.see(Source::Gate, run(copy, "python", process(60), None));
    node.see(Source::Change, manages(&installer(70, &argv, &[])));
    node.see(Source::Change, written_by("/opt/x/y", "x", Some(descendant(71, &[70]))));
    node.see(Source::Gate, run(copy, "evil", process(70), None));
    assert!(!node.lines().iter().any(|line| line.starts_with("package")), "{:#?}", node.lines());
    // The same process executes something else.
    let mut node = node_with_python();
    node.see(Source::Gate, run(copy, "python", process(60), None));
    node.see(Source::Change, manages(&installer(60, &argv, &[])));
    node.see(Source::Gate, run("/opt/evil", "evil", process(60), None));
    node.see(Source::Change, written_by("/opt/x/y", "x", Some(descendant(61, &[60]))));
    assert!(!node.lines().iter().any(|line| line.starts_with("package")), "{:#?}", node.lines());

    // Content that is not the image's, by the same names; before and after it was reported.
    for is_reported in [false, true] {
        let mut node = node_with_python();
        node.see(Source::Gate, run(copy, "python", process(60), None));
        if is_reported {
            node.see(Source::Gate, run(copy, "evil", process(60), None));
        } else {
            node.see(Source::Change, manages(&installer(59, &argv, &[])));
        }
        let other = if is_reported { copy } else { "/opt/evil/python3" };
        let argv = [other, "-m", "pip", "install", "x"];
        node.see(Source::Change, manages(&installer(60, &argv, &[])));
        node.see(Source::Gate, run(other, "evil", process(60), None));
        node.see(Source::Change, written_by("/opt/venv/x.so", "x", Some(descendant(61, &[60]))));
        let kinds = node.kinds();
        assert!(kinds.iter().all(|(kind, ..)| *kind != Kind::PackageTransaction), "{kinds:?}");
        assert!(kinds.contains(&(Kind::ExecNew, 1, 1)), "{kinds:?}");
    }
    // A script that no package manager has brought.
    let mut node = node_with_python();
    node.see(Source::Gate, run(copy, "python", process(60), None));
    node.see(Source::Change, manages(&installer(60, &by_script, &[])));
    node.see(Source::Change, written_by("/opt/venv/x.so", "x", Some(descendant(61, &[60]))));
    assert!(node.kinds().iter().all(|(kind, ..)| *kind != Kind::PackageTransaction));
}

#[test]
fn w10_a_copy_that_is_read_after_its_process_was_reported_installs_as_well() {
    let copy = "/opt/venv/bin/python3";
    let mut node = node_with_python();
    node.see(Source::Change, manages(&installer(60, &[copy, "-Im", "ensurepip"], &[])));
    node.see(Source::Gate, run(copy, "python", process(60), None));
    node.see(Source::Change, written_by("/opt/venv/x.so", "x", Some(descendant(61, &[60]))));
    assert_eq!(node.kinds(), [(Kind::ExecRelocated, 1, 1), (Kind::PackageTransaction, 1, 1)]);
}

#[test]
fn w07_the_same_work_once_more_is_the_same_transaction_and_a_persons_is_not() {
    let argv = ["/usr/bin/python3.11", "-m", "pip", "install", "x"];
    let other = ["/usr/bin/python3.11", "-m", "pip", "install", "y"];
    let named = |pid, exe| (ProcessIdentity { pid, start_time: 9 }, exe);
    let shell = named(20, "/bin/busybox");
    let main = (init(7), "/bin/busybox");
    let mut node = node_with_python();
    let install = |node: &mut Node, process: Process, content: &str| {
        node.see(Source::Change, manages(&process));
        let pid = process.identity.pid;
        let path = format!("/opt/{content}");
        node.see(Source::Change, written_by(&path, content, Some(descendant(pid + 1, &[pid]))));
    };
    // The container's own loop installs, removes and installs again.
    install(&mut node, installer(40, &argv, &[shell, main]), "x");
    let again = named(21, "/bin/busybox");
    install(&mut node, installer(50, &argv, &[again, main]), "x");
    install(&mut node, installer(60, &argv, &[again, main]), "y");
    assert_eq!(node.lines(), ["package.transaction medium  2 3"]);
    assert_eq!(node.newest()[0].detail, None);
    // One script installs one thing after the other.
    install(&mut node, installer(70, &other, &[shell, main]), "z");
    assert_eq!(node.lines(), ["package.transaction medium  3 4"]);
    let detail = node.newest()[0].detail.clone().unwrap();
    assert_eq!(detail, "one after the other with: `/usr/bin/python3.11 -m pip install y`");
    // Another program of the container, a process from outside, a terminal, other arguments.
    let server = named(22, "/usr/bin/curl");
    install(&mut node, installer(80, &argv, &[server, main]), "z1");
    let outside = named(30, "/usr/bin/containerd-shim");
    install(&mut node, installer(90, &argv, &[named(23, "/bin/busybox"), outside]), "z2");
    let mut with_terminal = installer(110, &argv, &[shell, main]);
    with_terminal.tty = Some("pts/0".to_owned());
    install(&mut node, with_terminal, "z3");
    install(&mut node, installer(120, &other, &[named(24, "/bin/busybox"), main]), "z4");
    assert_eq!(node.lines().len(), 5, "{:#?}", node.lines());
    // The script has become another program, an orphan, and one that comes much later.
    let third = ["/usr/bin/python3.11", "-m", "pip", "install", "z"];
    install(&mut node, installer(130, &third, &[(shell.0, "/usr/bin/curl"), main]), "z5");
    install(&mut node, installer(140, &argv, &[main]), "z6");
    install(&mut node, installer(150, &argv, &[main]), "z7");
    node.clock += 3600;
    install(&mut node, installer(160, &third, &[shell, main]), "z8");
    assert_eq!(node.lines().len(), 9, "{:#?}", node.lines());
}

#[test]
fn what_an_exception_accepts_continues_no_other_transaction() {
    let argv = ["/usr/bin/python3.11", "-m", "pip", "install", "x"];
    let mut node = node_with_python();
    let rules = "[[rule]]\nid = \"x\"\nreason = \"r\"\nexpires = \"never\"\n\
        effect = \"accept\"\n[rule.match]\nkind = [\"package.transaction\"]\nargv = [\"*install x*\"]\n";
    let files = vec![PolicyFile::new("a.toml", rules)];
    node.state.policy.rules = policy::parse("".as_ref(), files).unwrap().rules.into();
    let above = [(init(7), "/bin/busybox")];
    let install = |node: &mut Node, pid: u32, argv: &[&str]| {
        node.see(Source::Change, manages(&installer(pid, argv, &above)));
        let path = format!("/opt/{pid}");
        node.see(Source::Change, written_by(&path, &path, Some(descendant(pid + 1, &[pid]))));
    };
    install(&mut node, 40, &argv);
    install(&mut node, 50, &["/usr/bin/python3.11", "-m", "pip", "install", "evil"]);
    install(&mut node, 60, &argv);
    let reported = |node: &mut Node| {
        node.publish();
        let all = node.newest().into_iter().filter(|one| !one.verdict.is_accept());
        all.map(|one| (one.kind, one.files)).collect::<Vec<_>>()
    };
    assert_eq!(reported(&mut node), [(Kind::PackageTransaction, Some(1))]);
}

#[test]
fn w08_what_a_build_has_removed_before_it_was_read_is_built_and_what_had_a_writer_is_its_own() {
    let mut node = Node::running();
    let above = [(100, "/bin/busybox"), (99, "/usr/bin/containerd-shim")];
    let linker = |pid| program(pid, "/usr/bin/ld", &above);
    let built = |pid, content: &str, could_change| {
        let path = format!("/tmp/{content}/main");
        let mut fact = run(&path, content, program(pid, &path, &above), Some(linker(pid + 1)));
        if let Fact::File(FileFact::Executed { state, .. }) = &mut fact {
            state.could_change = could_change;
        }
        fact
    };
    node.see(Source::Gate, built(40, "a", CouldChange::No));
    node.see(Source::Gate, built(50, "b", CouldChange::Unproven));
    node.see(Source::Gate, built(60, "c", CouldChange::HadWriter));
    assert_eq!(
        node.lines(),
        ["exec.new medium /tmp/a/main 2 2", "exec.new critical /tmp/c/main 1 1"]
    );
}
