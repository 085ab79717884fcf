//! What a hook gets, and how it has ended. Values.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use crate::config::Hook;
use crate::model::{ContainerId, Finding, printable};

/// Bytes of what a program writes that are kept: the last ones.
pub const MAX_OUTPUT: usize = 4096;
/// Names that are longer are no names of containers.
const MAX_NAME: usize = 256;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The hook of a response.
#[derive(Clone, Debug, PartialEq)]
pub struct HookCall {
    pub name: String,
    /// `None` if the settings do not have it.
    pub settings: Option<Arc<Hook>>,
    /// The rule that asks for it.
    pub rule: Option<String>,
    pub finding: Finding,
}

/// The response that it is a part of, as the program reads it.
#[derive(Clone, Debug, Serialize)]
pub struct Request<'a> {
    pub container: &'a ContainerId,
    pub reason: &'a str,
    pub requested_by: &'a str,
    pub requested_at: Timestamp,
}

/// The JSON on the standard input of the program.
#[derive(Serialize)]
struct Input<'a> {
    schema: &'static str,
    hook: &'a str,
    rule: Option<&'a str>,
    request: &'a Request<'a>,
    finding: &'a Finding,
}

/// A program that is to be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    pub hook: String,
    pub program: PathBuf,
    pub arguments: Vec<String>,
    pub environment: BTreeMap<String, String>,
    pub input: Vec<u8>,
    pub timeout: Duration,
    pub user: Option<String>,
}

impl HookCall {
    /// What the runner gets. The error says why the hook is not run.
    pub fn order(&self, request: &Request<'_>) -> Result<Order, String> {
        let Some(settings) = &self.settings else {
            return Err("the settings do not have it any more".to_owned());
        };
        let ContainerId { namespace, id } = request.container;
        // These two are the only text of a container that is not in the input.
        for (what, name) in [("namespace", namespace), ("ID", id)] {
            if !is_plain(name) {
                return Err(format!(
                    "the {what} of the container has other characters than letters, digits, `.`, \
                     `_` and `-`"
                ));
            }
        }
        let rule = self.rule.as_deref();
        let input = Input {
            schema: "driftd.hook/v1",
            hook: &self.name,
            rule,
            request,
            finding: &self.finding,
        };
        let mut input = serde_json::to_vec(&input).map_err(|err| err.to_string())?;
        input.push(b'\n');
        let (finding, name) = (self.finding.id.to_string(), self.name.as_str());
        let named = [
            ("PATH", PATH),
            ("DRIFTD_HOOK", name),
            ("DRIFTD_FINDING", &finding),
            ("DRIFTD_NAMESPACE", namespace),
            ("DRIFTD_CONTAINER", id),
        ];
        let named = named.into_iter().chain(rule.map(|rule| ("DRIFTD_RULE", rule)));
        Ok(Order {
            hook: self.name.clone(),
            program: settings.program.clone(),
            arguments: settings.arguments.clone(),
            environment: named.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
            input,
            timeout: settings.timeout,
            user: settings.user.clone(),
        })
    }
}

fn is_plain(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    name.len() <= MAX_NAME
        && name.bytes().all(is_plain)
        && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
}

/// How a hook has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Exited(i32),
    Signal(i32),
    /// It ran longer than it may, and was killed.
    TimedOut,
    /// The runner was stopped, and has killed it.
    Stopped,
    /// Nothing has happened, and why.
    NotStarted(String),
    /// The runner has ended without a report.
    RunnerGone,
    /// The runner is there, and has not reported an end in time.
    NoReport,
}

/// How a hook has ended, with the last that it has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    pub end: End,
    pub output: Vec<u8>,
}

impl From<End> for Ended {
    fn from(end: End) -> Ended {
        Ended { end, output: Vec::new() }
    }
}

impl Ended {
    pub fn is_done(&self) -> bool {
        self.end == End::Exited(0)
    }

    /// Whether it is not known what the program has done.
    pub fn is_unknown(&self) -> bool {
        match self.end {
            End::Exited(_) | End::NotStarted(_) => false,
            End::Signal(_) | End::TimedOut | End::Stopped | End::RunnerGone | End::NoReport => true,
        }
    }

    /// For people. What the program has written is escaped.
    pub fn message(&self, timeout: Duration) -> String {
        let mut message = match &self.end {
            End::Exited(status) => format!("exit status {status}"),
            End::Signal(signal) => {
                format!("ended by signal {signal}; what it has done is not known")
            }
            End::TimedOut => format!(
                "killed after {} s (timeout); what it has done is not known",
                timeout.as_secs_f64()
            ),
            End::Stopped => {
                "killed because driftd hooks was stopped; what it has done is not known".to_owned()
            }
            End::NotStarted(why) => format!("not run: {}", printable(why.as_bytes())),
            End::RunnerGone => {
                "driftd hooks ended while it ran; what it has done is not known".to_owned()
            }
            End::NoReport => {
                "driftd hooks has not reported its end; what it has done is not known".to_owned()
            }
        };
        let cut = &self.output[self.output.len().saturating_sub(MAX_OUTPUT)..];
        let output = printable(cut.trim_ascii());
        if !output.is_empty() {
            message += &format!("; it wrote: {output}");
        }
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(settings: Option<Hook>) -> HookCall {
        HookCall {
            name: "page".into(),
            settings: settings.map(Arc::new),
            rule: Some("r".into()),
            finding: serde_json::from_str(include_str!("../../tests/data/finding.json")).unwrap(),
        }
    }

    fn order_in(container: &ContainerId, settings: Option<Hook>) -> Result<Order, String> {
        let requested_at = Timestamp::UNIX_EPOCH;
        let (reason, requested_by) = ("why", "rule r");
        call(settings).order(&Request { container, reason, requested_by, requested_at })
    }

    fn settings() -> Hook {
        let text = "program = \"/usr/bin/page\"\narguments = [\"--all\"]\nuser = \"pager\"";
        toml::from_str(text).unwrap()
    }

    #[test]
    fn what_a_container_has_chosen_is_in_the_input_alone() {
        let order = order_in(&ContainerId::new("k8s.io", "a1.b-c_d"), Some(settings())).unwrap();
        assert_eq!(order.arguments, ["--all"]);
        let finding = call(None).finding;
        let expected = [
            ("DRIFTD_CONTAINER", "a1.b-c_d"),
            ("DRIFTD_FINDING", &finding.id.to_string()),
            ("DRIFTD_HOOK", "page"),
            ("DRIFTD_NAMESPACE", "k8s.io"),
            ("DRIFTD_RULE", "r"),
            ("PATH", PATH),
        ];
        let expected = expected.map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(order.environment, BTreeMap::from(expected));
        let input: serde_json::Value = serde_json::from_slice(&order.input).unwrap();
        assert_eq!(input["schema"], "driftd.hook/v1");
        assert_eq!(input["request"]["container"]["id"], "a1.b-c_d");
        assert_eq!(input["request"]["reason"], "why");
        assert_eq!(input["finding"], serde_json::to_value(&finding).unwrap());
        let is_line_end = |byte: &&u8| **byte == b'\n';
        assert_eq!(order.input.iter().filter(is_line_end).count(), 1, "one line");
    }

    #[test]
    fn a_hook_is_not_run_for_a_container_with_a_hostile_name_or_without_settings() {
        for id in ["", "-x", "a b", "a\n", "$(x)", "../x", &"a".repeat(257)] {
            let why = order_in(&ContainerId::new("default", id), Some(settings())).unwrap_err();
            assert!(why.contains("the ID of the container has other characters"), "{id}: {why}");
        }
        let why = order_in(&ContainerId::new("a/b", "c"), Some(settings())).unwrap_err();
        assert!(why.contains("the namespace of the container"), "{why}");
        let why = order_in(&ContainerId::new("default", "c"), None).unwrap_err();
        assert!(why.contains("the settings do not have it"), "{why}");
    }

    #[test]
    fn what_a_program_writes_is_escaped_and_cut() {
        let output = [&[b'x'; 2 * MAX_OUTPUT][..], b"\x1b[2J\xff\n"].concat();
        let message = Ended { end: End::Exited(2), output }.message(Duration::from_secs(1));
        assert!(message.starts_with("exit status 2; it wrote: xxx"), "{message}");
        assert!(message.ends_with("xxx\\u{1b}[2J\\xff"), "{message}");
        assert!(message.len() < MAX_OUTPUT + 100, "{}", message.len());
        let silent = Ended::from(End::TimedOut);
        let expected = "killed after 1.5 s (timeout); what it has done is not known";
        assert_eq!(silent.message(Duration::from_millis(1500)), expected);
    }
}
