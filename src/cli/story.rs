//! A session from its beginning to its end, with its commands and findings, for `driftd show`.
//!
//! Owns the JSON `driftd.session_story/v1` and the text for people. Fetches all commands of the
//! session.

use std::fmt::Write as _;

use jiff::Timestamp;
use serde::Serialize;

use super::client::{Client, explain};
use super::describe::{Lines, pod, program, shell_word, subject};
use super::output::{age, safe, short, time};
use super::pages::{fetch_all, page};
use super::sessions::{entry, result};
use super::timeline;
use crate::api::{convert, proto};
use crate::model::{Command, Entry, Finding, Interactive, Session, SessionState};

#[derive(Serialize)]
pub(super) struct Story {
    schema: &'static str,
    session: Session,
    /// In the order in which they were started.
    commands: Vec<Command>,
    /// Oldest first.
    findings: Vec<Finding>,
}

impl Story {
    pub(super) async fn fetch(
        client: &mut Client,
        reply: proto::GetSessionResponse,
    ) -> anyhow::Result<Story> {
        let session = reply.session.ok_or_else(|| anyhow::anyhow!("driftd returned no session"))?;
        let session = convert::session_from_proto(session)?;
        let findings = reply.findings.into_iter().map(convert::finding_from_proto);
        let findings = findings.collect::<Result<_, _>>()?;
        let fetch = async |page_size, page_token| {
            let request = proto::ListCommandsRequest {
                session: session.id.to_string(),
                page_size,
                page_token,
            };
            let found = client.list_commands(request).await.map_err(explain)?.into_inner();
            page(found.commands, found.next_page_token, convert::command_from_proto)
        };
        let commands: Vec<Command> = fetch_all(fetch).await?;
        Ok(Story { schema: "driftd.session_story/v1", session, commands, findings })
    }

    pub(super) fn text(&self, now: Timestamp) -> String {
        let session = &self.session;
        let state = session.state.name();
        let mut lines =
            Lines(format!("SESSION {state}, {}\n{}\n\n", entry(session.entry), sentence(session)));
        lines.add("Session", &format!("{} (revision {})", session.id, session.revision));
        lines.add(
            "Started",
            &format!("{} ({})", time(session.started_at), { age(now, session.started_at) }),
        );
        lines.add("Ended", &end(session));
        add_origin(&mut lines, session);
        lines.add("Node", &safe(&session.node));
        lines.add("Container", &session.container.id.to_string());
        if session.container.pod.is_some() {
            lines.add("Pod", &pod(session.container.pod.as_ref()));
        }
        lines.add("Image", &safe(session.image.name.as_deref().unwrap_or("unknown")));
        if let Some(digest) = session.image.manifest_digest {
            lines.add("", &digest.to_string());
        }
        lines.add_process(&session.process);
        for ancestor in &session.host {
            let program = program(ancestor.exe.as_deref(), ancestor.argv.as_deref());
            lines.add("  on host", &format!("pid {}, {program}", ancestor.identity.pid));
        }
        lines.0 + &self.commands_text() + &self.findings_text() + &self.next_steps()
    }

    fn commands_text(&self) -> String {
        let session = &self.session;
        let kept = self.commands.len() as u64;
        let mut text = match session.commands.max(kept) {
            0 => return "\nCommands: none was seen\n".to_owned(),
            total if total > kept => format!("\nCommands: {total}, of which {kept} are kept\n"),
            total => format!("\nCommands: {total}\n"),
        };
        for command in &self.commands {
            let end = result(command.started_at, command.ended_at, command.exit);
            let end = end.unwrap_or_else(|| match session.state {
                SessionState::Open => "runs".to_owned(),
                SessionState::Closed => "its end was not seen".to_owned(),
            });
            writeln!(
                text,
                "  {:>3}  {}  {} ({end})",
                command.number,
                time(command.started_at),
                timeline::program(command)
            )
            .expect("writing to a String cannot fail");
        }
        text
    }

    fn findings_text(&self) -> String {
        let kept = self.findings.len() as u64;
        let mut text = match self.session.findings_total.max(kept) {
            0 => return "\nFindings: none\n".to_owned(),
            total if total > kept => format!("\nFindings: {total}, of which these are kept\n"),
            total => format!("\nFindings: {total}\n"),
        };
        for finding in &self.findings {
            writeln!(
                text,
                "  {:<8}  {:<19}  {}  {}",
                finding.severity.name().to_uppercase(),
                finding.kind,
                subject(finding),
                short(&finding.id.to_string())
            )
            .expect("writing to a String cannot fail");
        }
        text
    }

    fn next_steps(&self) -> String {
        let container = shell_word(&short(&safe(&self.session.container.id.id)));
        let mut text = format!("\nNext:\n  driftd timeline {container}\n");
        if let Some(finding) = self.findings.first() {
            let id = short(&finding.id.to_string());
            writeln!(text, "  driftd show {id}").expect("writing to a String cannot fail");
        }
        let id = short(&self.session.id.to_string());
        // A finding stands for that run of the container only. The container's name would
        // stand for a later run as well.
        let target = match self.findings.iter().find(|finding| finding.run.is_some()) {
            Some(finding) => format!("--finding {}", short(&finding.id.to_string())),
            None => container,
        };
        for action in ["pause", "kill"] {
            writeln!(text, "  driftd respond {action} {target} --reason 'session {id}'")
                .expect("writing to a String cannot fail");
        }
        text
    }
}

/// How the session began, in a sentence.
pub(super) fn sentence(session: &Session) -> String {
    let came = match session.entry {
        Entry::RuntimeExec => "The container's runtime was asked to run something in it",
        Entry::RuntimeDirect => "A container runtime was run by hand to get into it",
        Entry::Namespace => "A process of the host's has joined the container's namespaces",
        Entry::SharedPidNamespace => "Another container was put into its pid namespace",
        Entry::Attach => "A client was connected to the terminal of its init",
        Entry::ReverseShell => "A shell within it was given a connection for input and output",
    };
    let how = match session.interactive {
        Some(Interactive::Terminal) => ", with a terminal",
        Some(Interactive::TerminalLater) => ", and a terminal was opened later",
        // The sentence says so already.
        Some(Interactive::Socket) if session.entry == Entry::ReverseShell => "",
        Some(Interactive::Socket) => ", with a connection",
        None => ", without a terminal",
    };
    format!("{came}{how}.")
}

/// When and how the session ended, as far as it is known.
pub(super) fn end(session: &Session) -> String {
    match session.state {
        SessionState::Open => "not yet".to_owned(),
        SessionState::Closed => {
            let how = result(session.started_at, session.ended_at, session.exit);
            match (session.ended_at, how) {
                (Some(at), Some(how)) => format!("{} ({how})", time(at)),
                (None, Some(how)) => format!("not seen ({how})"),
                (_, None) => "not seen".to_owned(),
            }
        }
    }
}

fn add_origin(lines: &mut Lines, session: &Session) {
    for (index, (what, name)) in origin(session).into_iter().enumerate() {
        let line = match name {
            Some(name) => format!("{what} {name}"),
            None => what,
        };
        lines.add(if index == 0 { "Origin" } else { "" }, &line);
    }
}

/// Where the session came from, as far as it is known: what is known, and the name that
/// belongs to it, which others have chosen.
pub(super) fn origin(session: &Session) -> Vec<(String, Option<String>)> {
    let mut origin = Vec::new();
    origin.extend(
        session.requested_by.as_deref().map(|name| ("requested by".to_owned(), Some(safe(name)))),
    );
    origin.extend(session.login.map(|login| {
        let audit = login.audit_session.map(|number| format!(" (audit session {number})"));
        (format!("login uid {} on the node{}", login.uid, audit.unwrap_or_default()), None)
    }));
    origin.extend(session.client.as_deref().map(|client| {
        let exec = session.exec_id.as_deref().map(|id| format!(" as {}", safe(id)));
        ("through".to_owned(), Some(format!("{}{}", safe(client), exec.unwrap_or_default())))
    }));
    origin.push(("seen by the".to_owned(), Some(safe(&session.discovered))));
    origin
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::findings::tests::samples as findings;
    use crate::cli::sessions::tests::{assert_clean, samples};

    fn story(session: Session, commands: Vec<Command>, findings: Vec<Finding>) -> Story {
        Story { schema: "driftd.session_story/v1", session, commands, findings }
    }

    #[test]
    fn a_session_is_shown_as_a_story() {
        let now = "2026-11-20T10:08:30Z".parse().unwrap();
        let [closed, open, hostile]: [Session; 3] = samples().try_into().unwrap();
        let command: Command =
            serde_json::from_str(include_str!("../../tests/data/command.json")).unwrap();
        let second = Command {
            number: 2,
            argv: Some(vec!["\u{1b}[2J\n".into(), "it's".into()]),
            ended_at: None,
            exit: None,
            ..command.clone()
        };
        let commands = vec![command, second];
        let [drift, mut own, _]: [Finding; 3] = findings().try_into().unwrap();
        own.id = closed.finding.unwrap();
        let of_closed = story(closed, commands.clone(), vec![own, drift]);
        insta::assert_snapshot!(of_closed.text(now));
        insta::assert_snapshot!(story(open, vec![], vec![]).text(now));
        let mut many = hostile;
        (many.commands, many.findings_total) = (9000, 300);
        let hostile = story(many, commands, findings()).text(now);
        assert_clean(&hostile);
        insta::assert_snapshot!(hostile);
        let json = serde_json::to_value(of_closed).unwrap();
        assert_eq!(json["session"]["schema"], "driftd.session/v1");
        assert_eq!(json["commands"][1]["schema"], "driftd.command/v1");
        assert_eq!(json["findings"][0]["schema"], "driftd.finding/v1");
    }
}
