//! A second chance for a test. On a real node with two busy processors, events may come in
//! an order that a test does not expect. So a test that fails is run once more, again on a
//! container of its own. The message of its first failure is printed at the end of the run,
//! because there is a fault to find, in driftd or in the test.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use libtest_mimic::Failed;

use crate::node::lock;

/// No more tests of one run have a second chance: then something is broken.
const CHANCES: usize = 3;

/// Tests that failed the first time, with their messages.
static FAILED_ONCE: Mutex<Vec<(&'static str, String)>> = Mutex::new(Vec::new());

/// Runs a test, and once more if it fails. With `DRIFTD_ONCE` set, each has one chance.
pub(crate) fn chance(
    name: &'static str,
    test: impl Fn() -> Result<(), Failed>,
) -> Result<(), Failed> {
    let attempt = || {
        catch_unwind(AssertUnwindSafe(&test))
            .unwrap_or_else(|panic| Err(message_of(&*panic).into()))
    };
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

/// The message of a panic.
fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned()
}

/// Prints which tests failed the first time, and why.
pub(crate) fn report() {
    for (name, message) in &*lock(&FAILED_ONCE) {
        eprintln!("\n{name} failed the first time:\n{message}");
    }
    for (name, _) in &*lock(&FAILED_ONCE) {
        eprintln!("run twice: {name}");
    }
}
