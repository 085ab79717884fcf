//! `driftd top`: the node live, in a terminal.
//!
//! A thin loop: inputs from the keyboard and the daemon go into `state`, which is pure, and its
//! effects are carried out here. `view` draws the state.

mod known;
mod link;
mod message;
mod question;
mod screen;
mod signals;
mod size;
mod state;
#[cfg(test)]
mod tests;
mod text;
mod typed;
mod view;

use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use ratatui::crossterm::event::Event;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::client::{Server, talk};
use super::exit::Exit;
use super::findings::severity_parser;
use super::output::colour;
use crate::api::proto;
use crate::model::Severity;
use link::Request;
use message::{Effect, Input};
use screen::Screen;
use state::State;

#[derive(Debug, clap::Args)]
#[command(after_help = "`?` shows the keys. p, r, k and x pause, resume or kill what is chosen, \
                        after a word and a reason were typed. The exit code is 0 when it was \
                        asked to end.")]
pub(super) struct Top {
    /// Begin with findings of this severity and above
    #[arg(long, value_name = "SEVERITY", ignore_case = true, value_parser = severity_parser())]
    severity: Option<Severity>,
}

impl Top {
    pub(super) fn run(self, socket: &Path) -> anyhow::Result<Exit> {
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        if !io::stdout().is_terminal() || !io::stdin().is_terminal() || is_dumb {
            eprintln!(
                "error: driftd top needs a terminal for input and output (without one, try: \
                 driftd status, driftd findings --follow)"
            );
            return Ok(Exit::Usage);
        }
        let server = Server::Daemon(socket);
        // A daemon that cannot be reached at the start is reported on the usual screen.
        talk(server, |_| async { live(server, self.severity).await })
    }
}

/// Shows the node until the user or a signal ends it.
async fn live(server: Server<'_>, floor: Option<Severity>) -> anyhow::Result<Exit> {
    // Before the terminal is changed, so that none of them leaves it so.
    let asked_to_end = signals::asked_to_end()?;
    let mut screen = Screen::enter(colour()).context("cannot use the terminal")?;
    let state = State::new(screen.size()?, Timestamp::now(), floor);
    let (news, inputs) = mpsc::channel(256);
    let (wishes, wished) = watch::channel(state.known.wish().clone());
    let (shows, to_show) = mpsc::channel(8);
    let (responses, to_respond) = mpsc::channel(8);
    let outputs = Outputs { wishes, shows, responses };
    // All of it is one task: a panic anywhere ends the whole, and leaves the terminal as it was.
    tokio::select! {
        result = run(&mut screen, state, inputs, &outputs) => result,
        _ = asked_to_end => Ok(Exit::Clean),
        never = link::poll(server, news.clone()) => match never {},
        never = link::follow(server, wished, news.clone()) => match never {},
        never = link::ask(server, to_show, news.clone()) => match never {},
        never = link::ask(server, to_respond, news.clone()) => match never {},
    }
}

struct Outputs {
    wishes: watch::Sender<message::Wish>,
    shows: mpsc::Sender<Request>,
    responses: mpsc::Sender<Request>,
}

impl Outputs {
    fn show(&self, id: String, state: &mut State) {
        if self.shows.try_send(Request::Show(id.clone())).is_err() {
            state.handle(Input::Shown(id, Err(BUSY.to_owned())));
        }
    }

    fn respond(&self, request: Box<proto::RespondRequest>, state: &mut State) {
        if self.responses.try_send(Request::Respond(request)).is_err() {
            state.handle(Input::Answered(Err(BUSY.to_owned())));
        }
    }
}

const BUSY: &str = "too much is asked for already: this was not sent";

/// Most inputs that are taken before the screen is drawn.
const BATCH: usize = 256;

async fn run(
    screen: &mut Screen,
    mut state: State,
    mut inputs: mpsc::Receiver<Input>,
    outputs: &Outputs,
) -> anyhow::Result<Exit> {
    let mut keys = screen::keyboard()?;
    let mut continued = signals::continued()?;
    let mut clock = interval(Duration::from_secs(1));
    clock.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        screen.draw(&state).context("cannot draw on the terminal")?;
        let mut batch = Vec::new();
        tokio::select! {
            event = keys.recv() => {
                let event = event.context("the keyboard's thread has ended")?;
                batch.extend(input_of(event.context("cannot read the keyboard")?));
            }
            _ = inputs.recv_many(&mut batch, BATCH) => (),
            Some(()) = continued.recv() => screen.resume()?,
            _ = clock.tick() => batch.push(Input::Time(Timestamp::now())),
        }
        for input in batch {
            match state.handle(input) {
                None => (),
                Some(Effect::Quit) => return Ok(Exit::Clean),
                Some(Effect::Suspend) => screen.suspend()?,
                Some(Effect::Redraw) => screen.redraw()?,
                Some(Effect::Follow(wish)) => drop(outputs.wishes.send_replace(wish)),
                Some(Effect::Show(id)) => outputs.show(id, &mut state),
                Some(Effect::Respond(request)) => outputs.respond(request, &mut state),
            }
        }
    }
}

fn input_of(event: Event) -> Option<Input> {
    match event {
        Event::Key(key) => Some(Input::Key(key)),
        Event::Paste(text) => Some(Input::Pasted(text)),
        Event::Resize(width, height) => Some(Input::Resized { width, height }),
        Event::FocusGained | Event::FocusLost | Event::Mouse(_) => None,
    }
}
