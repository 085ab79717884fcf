//! A second chance for a trial: on a real node with two busy processors, what a trial
//! waits for may come in an order that it has not thought of. A trial that fails is run
//! once more, on a container of its own again. What it said the first time is printed
//! at the end: whoever reads it has a fault to find, in driftd or in the trial.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use libtest_mimic::Failed;

use crate::node::lock;

/// More trials of one run have no second chance: then something is broken.
const CHANCES: usize = 3;

/// Trials that failed the first time, with what they said.
static FAILED_ONCE: Mutex<Vec<(&'static str, String)>> = Mutex::new(Vec::new());

/// Runs a trial, and once more if it fails. With `DRIFTD_ONCE` set, each has one chance.
pub(crate) fn chance(
    name: &'static str,
    test: impl Fn() -> Result<(), Failed>,
) -> Result<(), Failed> {
    let attempt =
        || catch_unwind(AssertUnwindSafe(&test)).unwrap_or_else(|panic| Err(said(&*panic).into()));
    let Err(first) = attempt() else { return Ok(()) };
    let has_another = {
        let mut failed = lock(&FAILED_ONCE);
        let has_another = failed.len() < CHANCES && std::env::var_os("DRIFTD_ONCE").is_none();
        if has_another {
            failed.push((name, first.message().unwrap_or_default().to_owned()));
        }
        has_another
    };
    if has_another { attempt() } else { Err(first) }
}

/// What a panic said.
fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned()
}

/// Prints which trials failed the first time, and why.
pub(crate) fn report() {
    for (name, message) in &*lock(&FAILED_ONCE) {
        eprintln!("\n{name} failed the first time:\n{message}");
    }
    for (name, _) in &*lock(&FAILED_ONCE) {
        eprintln!("run twice: {name}");
    }
}
