//! The question before a response: a word that has to be typed, and then a reason. Pure.
//!
//! The only place that makes a request for a response. Nothing but the exact word, followed by
//! a reason, leads to one.

use ratatui::crossterm::event::{KeyCode, KeyEvent};

use super::typed::Typed;
use crate::api::{convert, proto};
use crate::cli::containers::ContainerJson;
use crate::cli::output::short;
use crate::model::{ContainerId, FindingId};
use crate::respond::Action;

/// What a response is meant for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) container: ContainerId,
    pub(super) by: By,
    /// In words, safe for a terminal.
    pub(super) about: String,
}

/// How the request names the run of the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// By a finding: the daemon refuses if that run is over.
    Finding(FindingId),
    /// By the init process that it had when the question was asked.
    Init(Option<u32>),
}

#[derive(Debug, PartialEq, Eq)]
enum Stage {
    Confirm,
    Reason,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Question {
    action: Action,
    target: Target,
    stage: Stage,
    typed: Typed,
}

/// What follows a key.
#[derive(Debug, PartialEq)]
pub(super) enum Step {
    Asking,
    /// The question is over, and nothing is done: why.
    Dropped(&'static str),
    Confirmed(Box<proto::RespondRequest>),
}

/// The longest ID that a person is asked to type.
const LONGEST: usize = 24;

impl Question {
    pub(super) fn new(action: Action, target: Target) -> Question {
        Question { action, target, stage: Stage::Confirm, typed: Typed::default() }
    }

    pub(super) fn action(&self) -> Action {
        self.action
    }

    pub(super) fn target(&self) -> &Target {
        &self.target
    }

    /// The word that confirms: the short ID of the container, or the action's name where an ID
    /// is not one that can be typed.
    pub(super) fn word(&self) -> String {
        let id = short(&self.target.container.id);
        let can_be_typed = !id.is_empty()
            && id.len() <= LONGEST
            && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
        if can_be_typed { id } else { self.action.name().to_owned() }
    }

    /// Whether the word was typed, and the reason is missing.
    pub(super) fn is_confirmed(&self) -> bool {
        self.stage == Stage::Reason
    }

    pub(super) fn typed(&self) -> &str {
        self.typed.text()
    }

    pub(super) fn key(&mut self, key: KeyEvent) -> Step {
        match (key.code, &self.stage) {
            (KeyCode::Esc, _) => Step::Dropped("nothing was done"),
            (KeyCode::Enter, Stage::Confirm) if self.typed.text() == self.word() => {
                (self.stage, self.typed) = (Stage::Reason, Typed::default());
                Step::Asking
            }
            (KeyCode::Enter, Stage::Confirm) => Step::Dropped("not confirmed: nothing was done"),
            // A response without a reason is refused by the daemon.
            (KeyCode::Enter, Stage::Reason) if self.typed.text().trim().is_empty() => Step::Asking,
            (KeyCode::Enter, Stage::Reason) => Step::Confirmed(Box::new(self.request())),
            (_, _) => {
                self.typed.key(key);
                Step::Asking
            }
        }
    }

    /// A reason may be pasted. The word has to be typed.
    pub(super) fn paste(&mut self, text: &str) {
        if self.stage == Stage::Reason {
            self.typed.paste(text);
        }
    }

    /// Whether the run is the one that is shown, and no finding names it.
    pub(super) fn is_of_shown_run(&self) -> bool {
        matches!(self.target.by, By::Init(_))
    }

    /// Whether the container runs no more as it did when the question was asked. A finding needs
    /// no such check: it names its run.
    pub(super) fn is_outdated(&self, containers: &[ContainerJson]) -> bool {
        let By::Init(pid) = self.target.by else { return false };
        let now = containers.iter().find(|one| one.id == self.target.container);
        now.is_none_or(|container| container.pid != pid)
    }

    fn request(&self) -> proto::RespondRequest {
        let ContainerId { namespace, id } = &self.target.container;
        let (container, finding) = match self.target.by {
            By::Finding(finding) => (String::new(), finding.to_string()),
            By::Init(_) => (format!("{namespace}/{id}"), String::new()),
        };
        proto::RespondRequest {
            container,
            finding,
            action: convert::action_to_proto(self.action).into(),
            reason: self.typed.text().trim().to_owned(),
            no_restart: false,
            pid: 0,
            hook: String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::crossterm::event::KeyModifiers;

    fn question(id: &str, by: By) -> Question {
        let container = ContainerId::new("k8s.io", id);
        Question::new(Action::Kill, Target { container, by, about: "a container".into() })
    }

    fn press(question: &mut Question, code: KeyCode) -> Step {
        question.key(KeyEvent::new(code, KeyModifiers::NONE))
    }

    fn enter(question: &mut Question, text: &str) -> Step {
        for character in text.chars() {
            assert_eq!(press(question, KeyCode::Char(character)), Step::Asking);
        }
        press(question, KeyCode::Enter)
    }

    #[test]
    fn only_the_word_and_a_reason_lead_to_a_request() {
        let not_confirmed = Step::Dropped("not confirmed: nothing was done");
        for wrong in ["", "y", "yes", "kill", "WEB", "web ", " web", "we", "webb"] {
            let mut asked = question("web", By::Init(Some(7)));
            assert_eq!(enter(&mut asked, wrong), not_confirmed, "{wrong:?}");
        }
        let mut asked = question("web", By::Init(Some(7)));
        asked.paste("web\n");
        assert_eq!(press(&mut asked, KeyCode::Enter), not_confirmed, "it was not typed");
        let mut asked = question("web", By::Init(Some(7)));
        assert_eq!(enter(&mut asked, "web"), Step::Asking);
        assert!(asked.is_confirmed());
        assert_eq!(enter(&mut asked, "  "), Step::Asking, "a reason is needed");
        assert_eq!(press(&mut asked, KeyCode::Esc), Step::Dropped("nothing was done"));

        let mut asked = question("web", By::Init(Some(7)));
        assert_eq!(enter(&mut asked, "web"), Step::Asking);
        asked.paste("ran a\ndropped program\n");
        let expected = proto::RespondRequest {
            container: "k8s.io/web".into(),
            action: proto::Action::Kill.into(),
            reason: "ran a dropped program".into(),
            ..Default::default()
        };
        assert_eq!(press(&mut asked, KeyCode::Enter), Step::Confirmed(Box::new(expected)));
    }

    #[test]
    fn a_finding_names_its_run_and_not_the_container() {
        let id: FindingId = "00112233445566778899aabbccddeeff".parse().unwrap();
        let mut asked = question(&"4f1c".repeat(16), By::Finding(id));
        assert_eq!(enter(&mut asked, "4f1c4f1c4f1c"), Step::Asking);
        let Step::Confirmed(request) = enter(&mut asked, "a miner") else { panic!("{asked:?}") };
        assert_eq!((request.container.as_str(), request.finding), ("", id.to_string()));
        assert!(!asked.is_outdated(&[]));
        assert!(question("web", By::Init(Some(7))).is_outdated(&[]));
    }

    #[test]
    fn where_an_id_cannot_be_typed_the_word_is_the_action() {
        for id in ["web\u{1b}[2J", "a b", "größe", "", &"x".repeat(LONGEST + 1)] {
            assert_eq!(question(id, By::Init(None)).word(), "kill", "{id:?}");
        }
        assert_eq!(question("my_web-1.2", By::Init(None)).word(), "my_web-1.2");
        assert_eq!(question(&"4f1c".repeat(16), By::Init(None)).word(), "4f1c4f1c4f1c");
    }
}
