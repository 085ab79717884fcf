//! The signals that ask `driftd top` to end, and the one that continues it.

use std::io;
use std::time::Duration;

use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use super::screen::abandon;

/// How long the end may take. It takes longer only while the terminal takes no output.
const GRACE: Duration = Duration::from_secs(2);

/// Waits for a signal in a thread of its own, because the loop may wait for the terminal.
pub(super) fn asked_to_end() -> io::Result<oneshot::Receiver<()>> {
    let runtime = Builder::new_current_thread().enable_io().build()?;
    let entered = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut quit = signal(SignalKind::quit())?;
    drop(entered);
    let (asked, to_end) = oneshot::channel();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => (),
                _ = terminate.recv() => (),
                _ = hangup.recv() => (),
                _ = quit.recv() => (),
            }
        });
        // Fails if the loop has ended already.
        let _ = asked.send(());
        std::thread::sleep(GRACE);
        abandon();
    })?;
    Ok(to_end)
}

pub(super) fn continued() -> io::Result<Signal> {
    signal(SignalKind::from_raw(nix::sys::signal::Signal::SIGCONT as i32))
}
