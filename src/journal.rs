//! The log: the messages of the daemon, and a line for each finding (async).
//!
//! Under systemd the log goes to journald's socket, each line with its priority and its
//! fields, so that `journalctl -u driftd -p warning` and `DRIFTD_KIND=exec.new` select lines.
//! Elsewhere it is text on standard error. One thread writes the log, and no other thread
//! waits for it: journald or the reader of standard error may be stuck.
//!
//! A finding is logged once the history has committed it, and again if it becomes more severe.
//! The number of lines is limited by container and severity, because a container can cause
//! many findings. A line counts those that were left out; the history has them all.

use std::collections::{HashMap, VecDeque};
use std::fmt::{self, Write as _};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::watch;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use crate::history::{Filter, Reader, Record};
use crate::model::{ContainerId, Finding, FindingId, Severity, printable};
use crate::sys::process::{is_the_journal, priority_prefix};

/// Where journald receives entries in its native protocol.
const SOCKET: &str = "/run/systemd/journal/socket";
/// The tracing target of the lines about findings.
const FINDINGS: &str = "driftd::findings";
/// Longer values are cut, because an entry must fit into one datagram.
const LONGEST_VALUE: usize = 4096;
/// How many records, and bytes of their JSON, are read from the history at once.
const PAGE: usize = 256;
const PAGE_BYTES: usize = 64 << 10;

/// How many lines may wait for a reader that has stopped. The room for them is taken at once.
const WAITING_LINES: usize = 8192;

/// Starts the log; it ends when the guard is dropped. `DRIFTD_LOG` selects what is logged, in
/// tracing's filter syntax.
pub fn start_log() -> WorkerGuard {
    use std::io::IsTerminal as _;
    use tracing_subscriber::EnvFilter;
    use tracing_subscriber::filter::LevelFilter;
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .with_env_var("DRIFTD_LOG")
        .from_env_lossy();
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    let non_blocking = NonBlockingBuilder::default().buffered_lines_limit(WAITING_LINES);
    if is_the_journal()
        && let Ok(socket) = UnixDatagram::unbound()
    {
        let (writer, guard) = non_blocking.finish(Journal(socket));
        log.event_format(Entry).with_writer(OneEntry(writer)).init();
        return guard;
    }
    let (writer, guard) = non_blocking.finish(io::stderr());
    log.with_writer(writer).with_ansi(io::stderr().is_terminal()).init();
    guard
}

/// Passes whole entries to the thread that writes the log.
struct OneEntry(tracing_appender::non_blocking::NonBlocking);

impl<'a> MakeWriter<'a> for OneEntry {
    type Writer = tracing_appender::non_blocking::NonBlocking;
    fn make_writer(&'a self) -> Self::Writer {
        self.0.clone()
    }
}

/// Sends entries to journald, or to standard error if journald refuses one.
struct Journal(UnixDatagram);

impl io::Write for Journal {
    fn write(&mut self, entry: &[u8]) -> io::Result<usize> {
        if self.0.send_to(entry, SOCKET).is_err() {
            // journald is being restarted, or the entry is too large.
            let _ = io::Write::write_all(&mut io::stderr(), plain(entry).as_bytes());
        }
        Ok(entry.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An entry as a line for standard error, with the priority in the form that systemd reads.
fn plain(entry: &[u8]) -> String {
    let entry = String::from_utf8_lossy(entry);
    let value = |name: &str| entry.lines().find_map(|line| line.strip_prefix(name));
    format!(
        "<{}>{}\n",
        value("PRIORITY=").unwrap_or("6"),
        value("MESSAGE=").unwrap_or("(an empty line)")
    )
}

/// Formats an event as an entry of journald's native protocol. Each field is one line, because
/// no value contains a line break.
struct Entry;

impl<S, N> FormatEvent<S, N> for Entry
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        writer.write_str(&entry(*event.metadata().level(), event.metadata().target(), &fields))
    }
}

/// The fields of an event, as text.
#[derive(Debug, Default)]
struct Fields {
    message: String,
    priority: Option<u8>,
    others: Vec<(&'static str, String)>,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let value = format!("{value:?}");
        match field.name() {
            "message" => self.message = value,
            name => self.others.push((name, value)),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            name => self.others.push((name, value.to_owned())),
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "priority" => self.priority = u8::try_from(value).ok(),
            name => self.others.push((name, value.to_string())),
        }
    }
}

fn entry(level: Level, target: &str, fields: &Fields) -> String {
    let priority = fields.priority.unwrap_or(match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    });
    let mut message = fields.message.clone();
    let others = fields.others.iter().filter(|(_, value)| !value.is_empty());
    // The message of a finding contains its fields already.
    if target != FINDINGS {
        for (name, value) in others.clone() {
            let _ = write!(message, " {name}={value}");
        }
    }
    let mut entry = format!("PRIORITY={priority}\nMESSAGE={}\n", one_line(&message));
    let _ = write!(entry, "SYSLOG_IDENTIFIER=driftd\nTARGET={target}\n");
    for (name, value) in others {
        let _ = writeln!(entry, "DRIFTD_{}={}", name.to_ascii_uppercase(), one_line(value));
    }
    entry
}

/// The text on one line, cut after [`LONGEST_VALUE`] characters.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for (place, character) in text.chars().enumerate() {
        if place == LONGEST_VALUE {
            line.push_str(" (cut)");
            break;
        }
        if character.is_control() {
            let _ = write!(line, "{}", character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

/// Logs the findings that the history commits after a cursor, until the history ends. `since`
/// is the time when this run of the daemon began.
pub async fn follow(
    reader: Reader,
    mut committed: watch::Receiver<u64>,
    mut cursor: u64,
    since: Timestamp,
) {
    let mut choice = Choice::new(since);
    loop {
        committed.mark_unchanged();
        let reader = reader.clone();
        let read = tokio::task::spawn_blocking(move || {
            // A cursor beyond the end is from an earlier history that was replaced.
            let from = if cursor > reader.newest()? { 0 } else { cursor };
            reader.page_after(from, &Filter::default(), PAGE, PAGE_BYTES)
        });
        let mut more = false;
        // The history's own thread logs errors, and the next turn tries again.
        if let Ok(Ok(page)) = read.await {
            for (_, record) in &page.records {
                if let Record::Finding(finding) | Record::Aggregate { finding, .. } = record
                    && choice.takes(finding, Instant::now())
                {
                    log_finding(finding);
                }
            }
            (cursor, more) = (page.cursor, page.more);
        }
        if more {
            continue;
        }
        // Wakes up without a commit as well, to log the counts of windows that are over.
        let commit = tokio::time::timeout(WINDOW, committed.changed()).await;
        for left_out in choice.left_out(Instant::now()) {
            left_out.log();
        }
        if matches!(commit, Ok(Err(_))) {
            return;
        }
    }
}

macro_rules! log_as {
    ($severity:expr, $($fields:tt)*) => {
        match $severity {
            Severity::Critical | Severity::High => {
                tracing::error!(target: FINDINGS, $($fields)*);
            }
            Severity::Medium => tracing::warn!(target: FINDINGS, $($fields)*),
            Severity::Low | Severity::Info => tracing::info!(target: FINDINGS, $($fields)*),
        }
    };
}

/// syslog's number for a severity.
fn priority(severity: Severity) -> u64 {
    match severity {
        Severity::Critical => 2,
        Severity::High => 3,
        Severity::Medium => 4,
        Severity::Low => 5,
        Severity::Info => 6,
    }
}

fn log_finding(finding: &Finding) {
    let text = |text: Option<&str>| printable(text.unwrap_or_default().as_bytes());
    let (container, file) = (finding.container.as_ref(), finding.file.as_ref());
    let id = finding.id.to_string();
    let session = finding.session.map(|session| session.to_string());
    log_as!(
        finding.severity,
        priority = priority(finding.severity),
        finding = id.as_str(),
        kind = finding.kind.name(),
        severity = finding.severity.name(),
        namespace = text(container.map(|container| &*container.id.namespace)),
        container = text(container.map(|container| &*container.id.id)),
        pod = text(container.and_then(|container| container.pod.as_ref()).map(|pod| &*pod.name)),
        path = file.map(|file| printable(file.path.as_bytes())).unwrap_or_default(),
        sha256 =
            file.and_then(|file| file.sha256.as_ref()).map(ToString::to_string).unwrap_or_default(),
        pid = finding
            .process
            .as_ref()
            .map(|process| process.identity.pid.to_string())
            .unwrap_or_default(),
        session = session.unwrap_or_default(),
        "{}",
        sentence(finding)
    );
}

/// A finding on one line.
fn sentence(finding: &Finding) -> String {
    let of = finding.container_id().map_or_else(|| "a layer".to_owned(), ToString::to_string);
    let mut line = format!("{} {} in {}", finding.severity, finding.kind, printable(of.as_bytes()));
    if let Some(file) = &finding.file {
        let _ = write!(line, ": {}", printable(file.path.as_bytes()));
    }
    if let Some(process) = &finding.process {
        let exe = process.exe.as_deref().unwrap_or_default();
        let _ = write!(line, " (pid {} {})", process.identity.pid, printable(exe.as_bytes()));
    }
    let _ = write!(line, "; driftd show {}", finding.id);
    line
}

/// The time window in which lines are counted, by container and severity.
const WINDOW: Duration = Duration::from_secs(10);
/// How many lines are logged in one window.
const LINES: u32 = 20;
/// How many findings are remembered with their severity.
const REMEMBERED: usize = 16_384;

/// Decides which findings are logged. Reads no clock.
#[derive(Debug)]
struct Choice {
    /// An earlier run has logged the findings that were first seen before this.
    since: Timestamp,
    /// The severity with which this run or an earlier one has logged a finding.
    logged: HashMap<FindingId, Severity>,
    /// The keys of `logged`, oldest first.
    order: VecDeque<FindingId>,
    counts: HashMap<(Option<ContainerId>, Severity), Count>,
}

#[derive(Debug)]
struct Count {
    begun: Instant,
    findings: u32,
}

#[derive(Debug, PartialEq, Eq)]
struct LeftOut {
    container: Option<ContainerId>,
    severity: Severity,
    count: u32,
}

impl Choice {
    fn new(since: Timestamp) -> Choice {
        let (logged, order, counts) = Default::default();
        Choice { since, logged, order, counts }
    }

    /// Whether this revision of a finding is logged.
    fn takes(&mut self, finding: &Finding, now: Instant) -> bool {
        let known = self.logged.get(&finding.id).copied();
        let is_due = match known {
            Some(severity) => severity < finding.severity,
            None => finding.revision == 1 || finding.first_seen >= self.since,
        };
        if known.is_some() && !is_due {
            return false;
        }
        if self.logged.insert(finding.id, finding.severity).is_none() {
            self.order.push_back(finding.id);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.logged.remove(&oldest);
        }
        if !is_due {
            return false;
        }
        let key = (finding.container_id().cloned(), finding.severity);
        let count = self.counts.entry(key).or_insert(Count { begun: now, findings: 0 });
        count.findings = count.findings.saturating_add(1);
        count.findings <= LINES
    }

    /// The counts of findings that were left out, from windows that are over.
    fn left_out(&mut self, now: Instant) -> Vec<LeftOut> {
        let mut left_out = Vec::new();
        self.counts.retain(|(container, severity), count| {
            if now.saturating_duration_since(count.begun) < WINDOW {
                return true;
            }
            if count.findings > LINES {
                let (container, severity) = (container.clone(), *severity);
                left_out.push(LeftOut { container, severity, count: count.findings - LINES });
            }
            false
        });
        left_out
    }
}

impl LeftOut {
    fn log(&self) {
        let (namespace, container) = self
            .container
            .as_ref()
            .map(|id| (printable(id.namespace.as_bytes()), printable(id.id.as_bytes())))
            .unwrap_or_default();
        log_as!(
            self.severity,
            priority = priority(self.severity),
            severity = self.severity.name(),
            namespace,
            container,
            "{} more findings of severity {} in {namespace}/{container} within {} s are not \
             logged; see: driftd findings --container {container}",
            self.count,
            self.severity,
            WINDOW.as_secs(),
        );
    }
}

/// Reports why a command failed, on standard error.
pub fn report_failure(err: &anyhow::Error) {
    eprintln!("{}error: {err:#}", priority_prefix(3));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding() -> Finding {
        serde_json::from_str(include_str!("../tests/data/finding.json")).unwrap()
    }

    #[test]
    fn u04_an_entry_has_a_priority_and_no_value_makes_a_field_of_its_own() {
        let fields = Fields {
            message: "a\nPRIORITY=0".into(),
            priority: None,
            others: vec![("path", "/x\nMESSAGE=y".into()), ("pod", String::new())],
        };
        assert_eq!(
            entry(Level::WARN, "driftd::x", &fields),
            "PRIORITY=4\nMESSAGE=a\\nPRIORITY=0 path=/x\\nMESSAGE=y\nSYSLOG_IDENTIFIER=driftd\n\
             TARGET=driftd::x\nDRIFTD_PATH=/x\\nMESSAGE=y\n"
        );
        assert_eq!(plain(entry(Level::ERROR, "x", &fields).as_bytes()).lines().count(), 1);
        let long = Fields { message: "x".repeat(1 << 20), ..Fields::default() };
        assert!(entry(Level::INFO, FINDINGS, &long).len() < 2 * LONGEST_VALUE);
    }

    #[test]
    fn u04_a_finding_is_logged_once_and_again_when_it_is_worse() {
        let mut choice = Choice::new(Timestamp::UNIX_EPOCH);
        let now = Instant::now();
        let mut one = finding();
        one.severity = Severity::Low;
        assert!(choice.takes(&one, now));
        one.revision = 2;
        assert!(!choice.takes(&one, now));
        one.severity = Severity::High;
        assert!(choice.takes(&one, now));
        let mut later = Choice::new(one.first_seen + jiff::SignedDuration::from_secs(1));
        assert!(!later.takes(&one, now), "an earlier run has logged it");
        one.severity = Severity::Critical;
        assert!(later.takes(&one, now), "it is worse than what the earlier run has logged");
        let mut late = finding();
        (late.id, late.revision) = (FindingId([7; 16]), 1);
        assert!(later.takes(&late, now), "first seen before this run, and never logged");
    }

    #[test]
    fn u04_a_flood_is_counted_and_hides_nothing_worse() {
        let mut choice = Choice::new(Timestamp::UNIX_EPOCH);
        let now = Instant::now();
        let of = |number: u32, severity| {
            let mut finding = Finding { severity, ..finding() };
            finding.id.0[..4].copy_from_slice(&number.to_le_bytes());
            finding
        };
        let logged = (0..1000).filter(|number| choice.takes(&of(*number, Severity::Low), now));
        assert_eq!(logged.count(), 20);
        assert!(choice.takes(&of(2000, Severity::Critical), now));
        assert_eq!(choice.left_out(now), []);
        let left_out = choice.left_out(now + WINDOW);
        let container = finding().container_id().cloned();
        assert_eq!(left_out, [LeftOut { container, severity: Severity::Low, count: 980 }]);
        assert!(choice.takes(&of(3000, Severity::Low), now + WINDOW));
    }
}
