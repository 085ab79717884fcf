//! The terminal: entered, drawn on, and left again as it was, however `driftd top` ends.

use std::io::{self, Stdout};
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{Signal, raise};
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::event::{self, DisableBracketedPaste, EnableBracketedPaste, Event};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode, size,
};
use ratatui::layout::{Position, Rect};
use tokio::sync::mpsc;

use super::size::Size;
use super::state::State;
use super::view;
use crate::cli::exit::Exit;

/// Whether the terminal is in the state that `driftd top` needs. The panic hook reads it too.
static ENTERED: AtomicBool = AtomicBool::new(false);

pub(super) struct Screen {
    /// Not dropped: it would write to a terminal that was left already, and report on standard
    /// error what fails, which panics where the terminal has gone.
    terminal: ManuallyDrop<Terminal<CrosstermBackend<Stdout>>>,
    colour: bool,
}

impl Screen {
    pub(super) fn enter(colour: bool) -> io::Result<Screen> {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            // Before the message, which would be lost on the other screen.
            leave();
            hook(panic);
        }));
        enter()?;
        // From here on, the terminal is left when the value is dropped.
        match Terminal::new(CrosstermBackend::new(io::stdout())) {
            Ok(terminal) => Ok(Screen { terminal: ManuallyDrop::new(terminal), colour }),
            Err(err) => {
                leave();
                Err(err)
            }
        }
    }

    pub(super) fn size(&self) -> io::Result<Size> {
        let (width, height) = size()?;
        Ok(Size { width, height })
    }

    pub(super) fn draw(&mut self, state: &State) -> io::Result<()> {
        let colour = self.colour;
        self.terminal.draw(|frame| view::draw(state, colour, frame)).map(drop)
    }

    /// Draws everything anew the next time. Unlike `Terminal::clear`, this asks the terminal for
    /// nothing: its reply would come from the keyboard, which another thread reads.
    pub(super) fn redraw(&mut self) -> io::Result<()> {
        let area = Rect::from((Position::ORIGIN, self.terminal.size()?));
        self.terminal.resize(area)
    }

    /// Hands the terminal back to the shell until it continues this process.
    pub(super) fn suspend(&mut self) -> io::Result<()> {
        leave();
        raise(Signal::SIGTSTP)?;
        self.resume()
    }

    /// The shell has continued this process, and may have used the terminal before.
    pub(super) fn resume(&mut self) -> io::Result<()> {
        leave();
        enter()?;
        self.redraw()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        leave();
    }
}

fn enter() -> io::Result<()> {
    enable_raw_mode()?;
    ENTERED.store(true, Ordering::SeqCst);
    let entered = execute!(io::stdout(), EnterAlternateScreen, EnableBracketedPaste);
    if entered.is_err() {
        leave();
    }
    entered
}

/// Leaves the terminal as it was, once. A terminal that has gone cannot be left, which is no
/// error.
fn leave() {
    if ENTERED.swap(false, Ordering::SeqCst) {
        let _ = execute!(io::stdout(), DisableBracketedPaste, LeaveAlternateScreen, Show);
        let _ = disable_raw_mode();
    }
}

/// Ends the process although the terminal takes no output: only its mode can be restored.
pub(super) fn abandon() -> ! {
    let _ = disable_raw_mode();
    std::process::exit(Exit::Failed.code().into())
}

/// Reads the keyboard in a thread of its own, which ends with the process.
pub(super) fn keyboard() -> io::Result<mpsc::Receiver<io::Result<Event>>> {
    let (keys, typed) = mpsc::channel(64);
    std::thread::Builder::new().name("keyboard".into()).spawn(move || {
        loop {
            let event = event::read();
            let is_last = event.is_err();
            if keys.blocking_send(event).is_err() || is_last {
                return;
            }
        }
    })?;
    Ok(typed)
}
