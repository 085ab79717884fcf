//! The state of `driftd top`: what is known, where the person is, and what is being asked.
//! Pure: inputs go in, and at most one effect comes out of each.
//!
//! Must not: ask the daemon, draw, or respond to anything that was not confirmed.

use jiff::Timestamp;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::known::{Feed, Known};
use super::message::{Effect, Input, Wish};
use super::question::{By, Question, Step, Target};
use super::size::Size;
use super::text::wrap;
use super::typed::Typed;
use crate::cli::containers::ContainerJson;
use crate::cli::describe::subject;
use crate::cli::output::{safe, short};
use crate::cli::sessions::in_short;
use crate::model::{Finding, Session, Severity};
use crate::respond::Action;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pane {
    Containers,
    Findings,
    Sessions,
    Losses,
}

impl Pane {
    pub(super) const ALL: [Pane; 4] =
        [Pane::Containers, Pane::Findings, Pane::Sessions, Pane::Losses];

    fn next(self, by: usize) -> Pane {
        let at = Pane::ALL.iter().position(|pane| *pane == self).unwrap_or(0);
        Pane::ALL[(at + by) % Pane::ALL.len()]
    }
}

/// A finding, a session or a loss that is shown whole, over the panes.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) id: String,
    pub(super) what: Subject,
    /// `None` until it has come.
    pub(super) text: Option<Result<String, String>>,
    /// The first line that is shown.
    pub(super) scroll: usize,
}

/// What a key acts on.
#[derive(Debug)]
pub(super) enum Subject {
    Finding(Box<Finding>),
    Session(Box<Session>),
    /// It can only be read.
    Loss,
}

/// The result of something that the person has asked for, until Escape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Note {
    pub(super) is_error: bool,
    pub(super) text: String,
}

pub(super) struct State {
    pub(super) known: Known,
    pub(super) size: Size,
    pub(super) now: Timestamp,
    pub(super) focus: Pane,
    pub(super) opened: Option<Box<Opened>>,
    pub(super) help: bool,
    pub(super) question: Option<Question>,
    /// The filter, while it is being typed.
    pub(super) filter: Option<Typed>,
    pub(super) note: Option<Note>,
    /// The chosen line of each pane, by what it is about: other lines may come before it.
    /// `None` stays at the first line.
    chosen: [Option<String>; 4],
    /// Responses whose outcome has not come, and whether the person was warned about that.
    unanswered: usize,
    warned: bool,
}

impl State {
    pub(super) fn new(size: Size, now: Timestamp, floor: Option<Severity>) -> State {
        let mut known = Known::default();
        known.wish_for(Wish { floor, ..Wish::default() });
        State {
            known,
            size,
            now,
            focus: Pane::Findings,
            opened: None,
            help: false,
            question: None,
            filter: None,
            note: None,
            chosen: [const { None }; 4],
            unanswered: 0,
            warned: false,
        }
    }

    pub(super) fn handle(&mut self, input: Input) -> Option<Effect> {
        match input {
            Input::Key(key) if key.kind == KeyEventKind::Release => None,
            Input::Key(key) => self.key(key),
            Input::Pasted(text) => {
                match (&mut self.question, &mut self.filter) {
                    (Some(question), _) => question.paste(&text),
                    (None, Some(filter)) => filter.paste(&text),
                    (None, None) => (),
                }
                None
            }
            Input::Resized { width, height } => {
                self.size = Size { width, height };
                self.scroll(0);
                None
            }
            Input::Time(now) => {
                self.now = now;
                None
            }
            Input::Polled(result) => {
                if let Some(text) = self.known.take_poll(result, self.now) {
                    self.note = Some(match self.note.take().filter(|note| note.is_error) {
                        // It may be about a response that the end of the daemon broke off.
                        Some(note) => Note { text: format!("{}; {text}", note.text), ..note },
                        None => Note { is_error: false, text },
                    });
                }
                self.drop_outdated_question();
                None
            }
            Input::Followed(wish, followed) => {
                self.known.take_followed(wish, followed, self.now);
                self.renew_opened()
            }
            Input::Shown(id, text) => {
                if let Some(opened) = &mut self.opened
                    && opened.id == id
                {
                    opened.text = Some(text);
                    self.scroll(0);
                }
                None
            }
            Input::Answered(result) => {
                self.unanswered = self.unanswered.saturating_sub(1);
                self.note = Some(match result {
                    Ok(answered) => Note { is_error: !answered.succeeded, text: answered.text },
                    Err(text) => Note { is_error: true, text },
                });
                None
            }
        }
    }

    /// A question about a container that has ended, or was started again, stands for a run that
    /// the person did not mean.
    fn drop_outdated_question(&mut self) {
        let containers = self.known.all_containers();
        if self.question.as_ref().is_some_and(|question| question.is_outdated(containers)) {
            self.question = None;
            self.note = error("the container ended or was started again: nothing was done");
        }
    }

    /// The opened finding has changed: its text is asked for again.
    fn renew_opened(&mut self) -> Option<Effect> {
        let Some(opened) = &mut self.opened else { return None };
        let Subject::Finding(shown) = &mut opened.what else { return None };
        let newest = self.known.findings().iter().find(|one| one.id == shown.id)?;
        if newest.revision <= shown.revision {
            return None;
        }
        **shown = newest.clone();
        Some(Effect::Show(opened.id.clone()))
    }

    fn key(&mut self, key: KeyEvent) -> Option<Effect> {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            match key.code {
                KeyCode::Char('c') => return self.quit(),
                KeyCode::Char('z') => return Some(Effect::Suspend),
                KeyCode::Char('l') => return Some(Effect::Redraw),
                _ => (),
            }
        }
        // What is not visible cannot be confirmed.
        if self.size.is_too_small() {
            return if key.code == KeyCode::Char('q') { self.quit() } else { None };
        }
        if self.question.is_some() {
            return self.key_of_question(key);
        }
        if self.filter.is_some() {
            return self.key_of_filter(key);
        }
        if key.modifiers.intersects(KeyModifiers::CONTROL | KeyModifiers::ALT) {
            return None;
        }
        match key.code {
            KeyCode::Char('q') => return self.quit(),
            _ if self.help => self.help = false,
            KeyCode::Char('?') => self.help = true,
            KeyCode::Char('p') => self.ask(Action::Pause),
            KeyCode::Char('r') => self.ask(Action::Resume),
            KeyCode::Char('k') => self.ask(Action::Kill),
            KeyCode::Char('x') => self.ask(Action::KillProcess),
            KeyCode::Esc if self.note.is_some() => self.note = None,
            code if self.opened.is_some() => self.key_of_opened(code),
            code => return self.key_of_panes(code),
        }
        None
    }

    /// Quits; with a response on its way only the second time, because it might not be sent.
    fn quit(&mut self) -> Option<Effect> {
        if self.unanswered == 0 || self.warned {
            return Some(Effect::Quit);
        }
        self.warned = true;
        self.note = error("driftd has not answered yet: once more quits without the outcome");
        None
    }

    fn key_of_question(&mut self, key: KeyEvent) -> Option<Effect> {
        let question = self.question.as_mut()?;
        match question.key(key) {
            Step::Asking => None,
            Step::Dropped(reason) => {
                self.note = error(&format!("{}: {reason}", question.action().name()));
                self.question = None;
                None
            }
            // The container that is shown may be another one by now.
            Step::Confirmed(_) if question.is_of_shown_run() && self.known.listed != Feed::Live => {
                self.note = error("the containers are not current: nothing was done");
                self.question = None;
                None
            }
            Step::Confirmed(request) => {
                let (action, container) = (question.action().name(), &question.target().container);
                let text = format!("{action} {container}: driftd is asked for it");
                self.note = Some(Note { is_error: false, text });
                self.question = None;
                (self.unanswered, self.warned) = (self.unanswered + 1, false);
                Some(Effect::Respond(request))
            }
        }
    }

    fn key_of_filter(&mut self, key: KeyEvent) -> Option<Effect> {
        match key.code {
            KeyCode::Esc => self.filter = None,
            KeyCode::Enter => {
                let text = self.filter.take()?.text().trim().to_owned();
                return self.wish_for(Wish { text, ..self.known.wish().clone() });
            }
            _ => self.filter.as_mut()?.key(key),
        }
        None
    }

    fn key_of_panes(&mut self, code: KeyCode) -> Option<Effect> {
        match code {
            KeyCode::Tab | KeyCode::Right => self.focus = self.focus.next(1),
            KeyCode::BackTab | KeyCode::Left => self.focus = self.focus.next(Pane::ALL.len() - 1),
            KeyCode::Down | KeyCode::Char('j' | 'J') => self.choose(|at| at.saturating_add(1)),
            KeyCode::Up | KeyCode::Char('K') => self.choose(|at| at.saturating_sub(1)),
            KeyCode::PageDown => self.choose(|at| at.saturating_add(10)),
            KeyCode::PageUp => self.choose(|at| at.saturating_sub(10)),
            KeyCode::Home | KeyCode::Char('g') => self.choose(|_| 0),
            KeyCode::End | KeyCode::Char('G') => self.choose(|_| usize::MAX),
            KeyCode::Enter => return self.open(),
            KeyCode::Char('/') => self.filter = Some(Typed::of(&self.known.wish().text)),
            KeyCode::Char('s') => {
                let wish = self.known.wish();
                let floor = raised(wish.floor);
                return self.wish_for(Wish { floor, ..wish.clone() });
            }
            KeyCode::Esc => {
                let floor = self.known.wish().floor;
                return self.wish_for(Wish { floor, ..Wish::default() });
            }
            _ => (),
        }
        None
    }

    fn key_of_opened(&mut self, code: KeyCode) {
        let page = isize::try_from(self.size.opened().1).unwrap_or(1);
        match code {
            KeyCode::Esc | KeyCode::Enter => self.opened = None,
            KeyCode::Down | KeyCode::Char('j' | 'J') => self.scroll(1),
            KeyCode::Up | KeyCode::Char('K') => self.scroll(-1),
            KeyCode::PageDown | KeyCode::Char(' ') => self.scroll(page),
            KeyCode::PageUp => self.scroll(-page),
            KeyCode::Home | KeyCode::Char('g') => self.scroll(isize::MIN),
            KeyCode::End | KeyCode::Char('G') => self.scroll(isize::MAX),
            _ => (),
        }
    }

    /// Asks for other findings, if the wish is another one.
    fn wish_for(&mut self, wish: Wish) -> Option<Effect> {
        let number = self.known.wish().number;
        let wish = Wish { number, ..wish };
        if wish == *self.known.wish() {
            return None;
        }
        let wish = Wish { number: number + 1, ..wish };
        self.known.wish_for(wish.clone());
        Some(Effect::Follow(wish))
    }

    /// The keys of a pane's lines, in their order.
    fn keys(&self, pane: Pane) -> Vec<String> {
        let known = &self.known;
        match pane {
            Pane::Containers => known.containers().iter().map(|one| one.id.to_string()).collect(),
            Pane::Findings => known.findings().iter().map(|one| one.id.to_string()).collect(),
            Pane::Sessions => known.sessions().iter().map(|one| one.id.to_string()).collect(),
            // Their texts change with every count.
            Pane::Losses => (0..known.losses().len()).map(|at| at.to_string()).collect(),
        }
    }

    /// Which line of a pane is chosen. The first one if the chosen one has gone.
    pub(super) fn chosen(&self, pane: Pane) -> usize {
        let Some(chosen) = &self.chosen[pane as usize] else { return 0 };
        self.keys(pane).iter().position(|key| key == chosen).unwrap_or(0)
    }

    fn choose(&mut self, moved: impl Fn(usize) -> usize) {
        let (pane, keys) = (self.focus, self.keys(self.focus));
        let at = moved(self.chosen(pane)).min(keys.len().saturating_sub(1));
        // At the first line, it stays there whatever comes.
        self.chosen[pane as usize] = keys.into_iter().nth(at).filter(|_| at > 0);
    }

    fn container(&self) -> Option<&ContainerJson> {
        self.known.containers().get(self.chosen(Pane::Containers)).copied()
    }

    fn finding(&self) -> Option<&Finding> {
        self.known.findings().get(self.chosen(Pane::Findings))
    }

    fn session(&self) -> Option<&Session> {
        self.known.sessions().get(self.chosen(Pane::Sessions)).copied()
    }

    /// Opens what is chosen. For a container: only its findings are shown.
    fn open(&mut self) -> Option<Effect> {
        let (id, what) = match self.focus {
            Pane::Containers => {
                let id = &self.container()?.id;
                let container = format!("{}/{}", id.namespace, id.id);
                self.focus = Pane::Findings;
                self.chosen[Pane::Findings as usize] = None;
                return self.wish_for(Wish { container, ..self.known.wish().clone() });
            }
            Pane::Findings => {
                let finding = self.finding()?.clone();
                (finding.id.to_string(), Subject::Finding(Box::new(finding)))
            }
            Pane::Sessions => {
                let session = self.session()?.clone();
                (session.id.to_string(), Subject::Session(Box::new(session)))
            }
            Pane::Losses => {
                let losses = self.known.losses();
                let loss = losses.get(self.chosen(Pane::Losses))?;
                let (id, text) = (loss.name.clone(), Some(Ok(loss.text.clone())));
                let opened = Opened { id, what: Subject::Loss, text, scroll: 0 };
                self.opened = Some(Box::new(opened));
                return None;
            }
        };
        let opened = Opened { id: id.clone(), what, text: None, scroll: 0 };
        self.opened = Some(Box::new(opened));
        Some(Effect::Show(id))
    }

    fn scroll(&mut self, by: isize) {
        let (width, height) = self.size.opened();
        let Some(opened) = &mut self.opened else { return };
        let text = match &opened.text {
            Some(Ok(text) | Err(text)) => text.as_str(),
            None => "",
        };
        let last = wrap(text, width).len().saturating_sub(height);
        opened.scroll = opened.scroll.saturating_add_signed(by).min(last);
    }

    /// Asks whether to respond, if what is chosen can be responded to.
    fn ask(&mut self, action: Action) {
        let target = match (&self.opened, self.focus) {
            (Some(opened), _) => match &opened.what {
                Subject::Finding(finding) => Some(of_finding(finding, action)),
                Subject::Session(session) => Some(of_session(session, action)),
                Subject::Loss => None,
            },
            (None, Pane::Containers) => self.container().map(|one| of_container(one, action)),
            (None, Pane::Findings) => self.finding().map(|one| of_finding(one, action)),
            (None, Pane::Sessions) => self.session().map(|one| of_session(one, action)),
            (None, Pane::Losses) => None,
        };
        match target {
            Some(Ok(target)) => {
                self.note = None;
                self.question = Some(Question::new(action, target));
            }
            Some(Err(reason)) => self.note = error(reason),
            None => self.note = error("choose a container, a finding or a session first"),
        }
    }
}

fn error(text: &str) -> Option<Note> {
    Some(Note { is_error: true, text: text.to_owned() })
}

/// The next floor; after the highest one, none.
fn raised(floor: Option<Severity>) -> Option<Severity> {
    let floor = floor.unwrap_or(Severity::Info);
    Severity::ALL.iter().copied().find(|severity| *severity > floor)
}

type Asked = Result<Target, &'static str>;

/// What only a finding can be asked for.
const NO_PROCESS: &str = "choose a finding that names a process: x kills that process";

fn of_finding(finding: &Finding, action: Action) -> Asked {
    let container = finding.container_id().ok_or("this finding is about no container")?.clone();
    let about = format!(
        "finding {}, {} {}: {}",
        short(&finding.id.to_string()),
        finding.severity.name().to_uppercase(),
        finding.kind,
        subject(finding)
    );
    let about = match (action, &finding.process) {
        (Action::KillProcess, None) => return Err(NO_PROCESS),
        (Action::KillProcess, Some(process)) => format!("pid {}, {about}", process.identity.pid),
        _ => about,
    };
    Ok(Target { container, by: By::Finding(finding.id), about })
}

fn of_container(container: &ContainerJson, action: Action) -> Asked {
    if action == Action::KillProcess {
        return Err(NO_PROCESS);
    }
    let image = safe(container.image.name.as_deref().unwrap_or("unknown"));
    let about = format!("its run of now, {}, image {image}", container.state());
    Ok(Target { container: container.id.clone(), by: By::Init(container.pid), about })
}

fn of_session(session: &Session, action: Action) -> Asked {
    if action == Action::KillProcess {
        return Err(NO_PROCESS);
    }
    // Without a finding about the session, nothing names the run in which it is.
    let finding =
        session.finding.ok_or("no finding names this session's run: choose the container")?;
    let about = format!("session {}, {}", short(&session.id.to_string()), in_short(session));
    Ok(Target { container: session.container.id.clone(), by: By::Finding(finding), about })
}
