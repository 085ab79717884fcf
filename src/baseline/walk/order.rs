//! Passes entries on in the order of paths, although many threads read them.
//!
//! Entries that are ready wait in memory for those before them; when they take too much,
//! the walk waits for the first batch.

use std::collections::VecDeque;

use crossbeam_channel::{Receiver, bounded};

use super::batch::{Batch, BatchResult};
use super::error::WalkEnd;
use super::walker::Walk;
use crate::baseline::layer::LayerEntry;
use crate::model::FileTime;

/// Batches that are being read, in the order in which their entries are passed on.
pub(super) struct BatchQueue<'w, 'a, E> {
    walk: &'w Walk<'a>,
    found: &'w mut dyn FnMut(LayerEntry) -> Result<(), E>,
    /// With what each costs. A thread that has failed sends `None`.
    reading: VecDeque<(Receiver<Option<BatchResult>>, usize)>,
    cost: usize,
    newest_change: FileTime,
}

impl<'w, 'a, E> BatchQueue<'w, 'a, E> {
    pub(super) fn new(
        walk: &'w Walk<'a>,
        found: &'w mut dyn FnMut(LayerEntry) -> Result<(), E>,
    ) -> BatchQueue<'w, 'a, E> {
        let newest_change = FileTime { seconds: i64::MIN, nanoseconds: 0 };
        BatchQueue { walk, found, reading: VecDeque::new(), cost: 0, newest_change }
    }

    pub(super) fn dispatch(
        &mut self,
        scope: &rayon::Scope<'w>,
        batch: Batch,
    ) -> Result<(), WalkEnd<E>> {
        let (sender, receiver) = bounded(1);
        self.cost += batch.cost;
        self.reading.push_back((receiver, batch.cost));
        let walk = self.walk;
        scope.spawn(move |_| {
            // Once the walk has ended, nothing receives the result.
            let _ = sender.send(walk.read_batch(batch));
        });
        while self.cost > self.walk.bounds.waiting
            || self.reading.front().is_some_and(|(first, _)| !first.is_empty())
        {
            self.pass_on_next()?;
        }
        Ok(())
    }

    /// Waits for the first batch and passes its entries on.
    fn pass_on_next(&mut self) -> Result<(), WalkEnd<E>> {
        let Some((first, cost)) = self.reading.pop_front() else { return Ok(()) };
        self.cost -= cost;
        // A thread that panicked sends nothing; the scope passes the panic on.
        let read = first.recv().ok().flatten().ok_or(WalkEnd::Failed)?;
        for entry in read.entries {
            (self.found)(entry).map_err(WalkEnd::Refused)?;
        }
        for (path, before) in read.ends {
            self.walk.check_unchanged(&path, &before).map_err(|err| self.walk.fail(err))?;
        }
        self.newest_change =
            read.newest_change.map_or(self.newest_change, |newest| newest.max(self.newest_change));
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<FileTime, WalkEnd<E>> {
        while !self.reading.is_empty() {
            self.pass_on_next()?;
        }
        Ok(self.newest_change)
    }
}
