//! `driftd sessions`: how each session in a container began, and for which user.
//!
//! Owns the short texts about sessions that `show` and `timeline` print as well.

use jiff::Timestamp;

use super::client::{Client, Server, explain, talk};
use super::describe::{command_line, number, pod};
use super::exit::Exit;
use super::follow::{follow, print, print_gap, refuse};
use super::output::{Field, Listed, Listing, Style, age, safe, short, span, time};
use super::pages::{OfContainer, Part, page, print_pages};
use super::when::{self, When};
use crate::api::proto::follow_findings_response::Event;
use crate::api::{convert, proto};
use crate::model::{self, Entry, Interactive, Session, SessionState};

#[derive(Debug, clap::Args)]
pub(super) struct Sessions {
    #[command(flatten)]
    container: OfContainer,
    /// Only sessions that have not ended
    #[arg(long)]
    open: bool,
    /// Only sessions that were open after this time: 2h, yesterday, 2026-11-27, 14:30, RFC 3339
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = when::parse)]
    since: Option<When>,
    /// Only sessions that began before this time
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = when::parse)]
    until: Option<When>,
    /// Keep printing sessions as they open, change and close, until interrupted
    #[arg(long, conflicts_with_all = ["limit", "page"])]
    follow: bool,
    #[command(flatten)]
    part: Part,
    #[command(flatten)]
    listing: Listing,
}

impl Sessions {
    pub(super) fn is_following(&self) -> bool {
        self.follow
    }

    pub(super) fn run(self, server: Server<'_>) -> anyhow::Result<Exit> {
        if self.follow {
            return match refuse(&self.listing) {
                Some(refused) => Ok(refused),
                None => self.follow(server),
            };
        }
        let filter = proto::SessionFilter {
            container: self.container.to_proto(),
            state: match self.open {
                true => proto::SessionState::Open.into(),
                false => proto::SessionState::Unspecified.into(),
            },
            since: when::to_proto(self.since.as_ref())?,
            until: when::to_proto(self.until.as_ref())?,
        };
        talk(server, |client| self.print(client, filter))?;
        Ok(Exit::Clean)
    }

    async fn print(
        &self,
        mut client: Client,
        filter: proto::SessionFilter,
    ) -> anyhow::Result<usize> {
        let nothing = "no session was seen (is the view complete? see: driftd status)";
        print_pages(&self.listing, &self.part, nothing, async |page_size, page_token| {
            let filter = Some(filter.clone());
            let request = proto::ListSessionsRequest { filter, page_size, page_token };
            let found = client.list_sessions(request).await.map_err(explain)?.into_inner();
            page(found.sessions, found.next_page_token, convert::session_from_proto)
        })
        .await
    }

    fn follow(self, server: Server<'_>) -> anyhow::Result<Exit> {
        let request = proto::FollowFindingsRequest {
            filter: Some(proto::FindingFilter {
                container: self.container.to_proto(),
                ..Default::default()
            }),
            after_cursor: self.part.after.to_proto(),
            sessions: true,
            as_json: true,
        };
        let timestamp =
            |when: Option<&When>| when.map(When::timestamp).transpose().map_err(anyhow::Error::msg);
        let (since, until) = (timestamp(self.since.as_ref())?, timestamp(self.until.as_ref())?);
        let listing = &self.listing;
        follow(server, request, |cursor, event| match event {
            Event::Session(session) => {
                let session = convert::session_from_proto(session)?;
                if !self.is_wanted(&session, since, until) {
                    return Ok(());
                }
                print(&session, &session.id.to_string(), cursor, listing, || {
                    line(&session, listing.no_trunc)
                })
            }
            Event::Gap(gap) => print_gap(&gap, cursor, listing),
            // `driftd findings --follow` prints these.
            Event::Finding(_) => Ok(()),
        })
    }

    fn is_wanted(
        &self,
        session: &Session,
        since: Option<Timestamp>,
        until: Option<Timestamp>,
    ) -> bool {
        let is_open = session.state == SessionState::Open;
        let ended = session.ended_at.filter(|_| !is_open);
        (is_open || !self.open)
            && since.is_none_or(|since| ended.is_none_or(|ended| ended >= since))
            && until.is_none_or(|until| session.started_at <= until)
    }
}

/// How a session began, in few words.
pub(super) fn entry(entry: Entry) -> &'static str {
    match entry {
        Entry::RuntimeExec => "runtime exec",
        Entry::RuntimeDirect => "runtime by hand",
        Entry::Namespace => "joined namespaces",
        Entry::SharedPidNamespace => "shared pid namespace",
        Entry::Attach => "attached",
        Entry::ReverseShell => "reverse shell",
    }
}

/// The user of a session, as far as it is known.
pub(super) fn user(session: &Session) -> String {
    match (&session.requested_by, session.login, session.process.uid) {
        (Some(name), _, _) => safe(name),
        (None, Some(login), _) => format!("login uid {}", login.uid),
        (None, None, Some(uid)) => format!("uid {uid}"),
        (None, None, None) => String::new(),
    }
}

/// The terminal, or what makes the session interactive without one.
fn terminal(session: &Session) -> String {
    let tty = session.process.tty.as_deref().map(safe);
    tty.or_else(|| session.interactive.map(interactive)).unwrap_or_default()
}

fn interactive(how: Interactive) -> String {
    how.name().replace('_', " ")
}

/// How a process ended, in few words.
pub(super) fn exit(exit: model::Exit) -> String {
    match (exit.code, exit.signal) {
        (_, Some(signal)) => format!("signal {signal}"),
        (Some(code), None) => format!("exit {code}"),
        (None, None) => "ended".to_owned(),
    }
}

/// How a process or session ended, and after how long, as far as it is known.
pub(super) fn result(
    started_at: Timestamp,
    ended_at: Option<Timestamp>,
    how: Option<model::Exit>,
) -> Option<String> {
    let how = how.map(exit);
    let after = ended_at.map(|ended_at| format!("after {}", span(ended_at, started_at)));
    match (how, after) {
        (Some(how), Some(after)) => Some(format!("{how} {after}")),
        (Some(how), None) => Some(how),
        (None, Some(after)) => Some(format!("ended {after}")),
        (None, None) => None,
    }
}

fn duration(session: &Session, now: Timestamp) -> String {
    match (session.state, session.ended_at) {
        (_, Some(ended_at)) => span(ended_at, session.started_at),
        (SessionState::Open, None) => span(now, session.started_at),
        (SessionState::Closed, None) => String::new(),
    }
}

fn line(session: &Session, no_trunc: bool) -> String {
    let id = |id: String| if no_trunc { id } else { short(&id) };
    let container = &session.container.id;
    let at = match session.state {
        SessionState::Open => session.started_at,
        SessionState::Closed => session.ended_at.unwrap_or(session.started_at),
    };
    format!(
        "{} {:<6} {}/{} {} ({}, {}) {}\n",
        time(at),
        session.state.name(),
        safe(&container.namespace),
        id(safe(&container.id)),
        in_short(session),
        number(session.commands, "command"),
        number(session.findings_total, "finding"),
        id(session.id.to_string()),
    )
}

/// How the session began, its user and the first command.
pub(super) fn in_short(session: &Session) -> String {
    let mut parts = vec![entry(session.entry).to_owned()];
    parts.extend(match &session.process.tty {
        Some(tty) => Some(format!("terminal {}", safe(tty))),
        None => session.interactive.map(interactive),
    });
    let user = user(session);
    parts.extend((!user.is_empty()).then_some(user));
    format!("{}: {}", parts.join(", "), command_line(&session.process))
}

impl Listed for Session {
    type Json<'a> = &'a Session;

    fn json(&self) -> &Session {
        self
    }

    fn name(&self) -> String {
        self.id.to_string()
    }

    fn header(wide: bool) -> Vec<&'static str> {
        let mut header = vec![
            "STARTED",
            "STATE",
            "DURATION",
            "CONTAINER",
            "ENTRY",
            "USER",
            "TTY",
            "COMMANDS",
            "FINDINGS",
            "COMMAND",
        ];
        if wide {
            header.extend(["POD", "IMAGE", "CLIENT", "EXIT", "SEEN BY"]);
        }
        header.push("ID");
        header
    }

    fn row(&self, style: &Style) -> Vec<Field> {
        let mut row: Vec<Field> = vec![
            age(style.now, self.started_at).into(),
            self.state.name().into(),
            duration(self, style.now).into(),
            style.id(&self.container.id.id).into(),
            entry(self.entry).into(),
            user(self).into(),
            terminal(self).into(),
            self.commands.to_string().into(),
            self.findings_total.to_string().into(),
            command_line(&self.process).into(),
        ];
        if style.wide {
            row.extend([
                Field::from(pod(self.container.pod.as_ref())),
                safe(self.image.name.as_deref().unwrap_or_default()).into(),
                self.client.as_deref().map(safe).unwrap_or_default().into(),
                self.exit.map(exit).unwrap_or_default().into(),
                safe(&self.discovered).into(),
            ]);
        }
        row.push(style.id(&self.id.to_string()).into());
        row
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cli::output::table;
    use crate::model::Login;

    pub(in crate::cli) fn sample() -> Session {
        serde_json::from_str(include_str!("../../tests/data/session.json")).unwrap()
    }

    /// One that has ended, an open one, and one whose every text is hostile.
    pub(in crate::cli) fn samples() -> Vec<Session> {
        let mut open = sample();
        open.id = "20000000000000000000000000000000".parse().unwrap();
        (open.state, open.ended_at, open.exit) = (SessionState::Open, None, None);
        (open.entry, open.interactive) = (Entry::Namespace, None);
        (open.requested_by, open.client, open.exec_id) = (None, None, None);
        (open.process.tty, open.login) = (None, Some(Login { uid: 1000, audit_session: None }));
        (open.findings_total, open.findings, open.finding) = (0, vec![], None);

        let evil = "\u{1b}[31m\n\u{202e}x".to_owned();
        let mut hostile = open.clone();
        hostile.id = "30000000000000000000000000000000".parse().unwrap();
        hostile.state = SessionState::Closed;
        (hostile.entry, hostile.interactive) = (Entry::ReverseShell, Some(Interactive::Socket));
        hostile.requested_by = Some(evil.clone());
        hostile.client = Some(evil.clone());
        hostile.exec_id = Some(evil.clone());
        hostile.discovered = evil.clone();
        hostile.node = evil.clone();
        hostile.image.name = Some(evil.clone());
        hostile.container.id = model::ContainerId::new("default", &format!("web{evil}"));
        hostile.container.pod.as_mut().unwrap().name = evil.clone();
        hostile.process.exe = Some(evil.clone());
        hostile.process.argv = Some(vec![evil.clone(), "it's".into()]);
        for ancestor in hostile.process.ancestors.iter_mut().chain(&mut hostile.host) {
            ancestor.exe = Some(evil.clone());
            ancestor.argv = Some(vec![evil.clone()]);
        }
        vec![sample(), open, hostile]
    }

    #[track_caller]
    pub(in crate::cli) fn assert_clean(text: &str) {
        let is_dirty = |one: char| one != '\n' && one.is_control() || one == '\u{202e}';
        assert!(!text.contains(is_dirty), "{text:?}");
    }

    #[test]
    fn sessions_as_people_see_them() {
        let style = |wide| Style {
            wide,
            no_trunc: false,
            colour: false,
            width: None,
            now: "2026-11-20T10:08:30Z".parse().unwrap(),
        };
        insta::assert_snapshot!(table(&samples(), &style(false)));
        insta::assert_snapshot!(table(&samples(), &style(true)));
        let narrow = Style { width: Some(150), ..style(true) };
        insta::assert_snapshot!(table(&samples(), &narrow));
        let lines: String = samples().iter().map(|session| line(session, false)).collect();
        assert_clean(&lines);
        assert_clean(&table(&samples(), &style(true)));
        insta::assert_snapshot!(lines);
    }

    #[test]
    fn an_end_is_described_as_far_as_it_is_known() {
        let start = Timestamp::UNIX_EPOCH;
        let end = Some(Timestamp::from_second(90).unwrap());
        let code = Some(model::Exit { code: Some(2), signal: None });
        let signal = Some(model::Exit { code: None, signal: Some(15) });
        assert_eq!(result(start, end, code).as_deref(), Some("exit 2 after 1m"));
        assert_eq!(result(start, end, signal).as_deref(), Some("signal 15 after 1m"));
        assert_eq!(result(start, end, None).as_deref(), Some("ended after 1m"));
        assert_eq!(result(start, None, code).as_deref(), Some("exit 2"));
        assert_eq!(result(start, None, None), None);
    }
}
