//! Which executed files of the image's layers are looked at.
//!
//! A change to a file cannot avoid its ctime, so a file that has not changed
//! since its layer equalled the baseline is the image's own, and costs the gate
//! one comparison. Every other one is judged by its content, once.

use std::collections::HashMap;

use jiff::Timestamp;

use crate::model::{FileState, FileTime, LayerFile};

/// Up to when the files of a container's layers are trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// Nobody has looked yet: none of them is.
    #[default]
    Unknown,
    /// What has not changed after this is what the baseline says.
    UpTo(FileTime),
    /// There is nothing they could be compared with.
    NoBaseline,
}

/// What came of a file of the layers that was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the image's own.
    Image,
    Drift,
    /// Nobody has judged it, and nobody will: tell it again.
    Lost,
}

/// More files than this are not remembered.
const MAX_TOLD: usize = 4096;

/// A ctime moves in ticks of the clock. A file is known by its ctime only if that
/// was older than any tick when the file was read.
const TICK: i64 = 1;

/// What is known of the layers' files under one container.
#[derive(Debug, Default)]
pub(crate) struct LayerFiles {
    trust: Trust,
    told: HashMap<LayerFile, Told>,
}

#[derive(Debug)]
struct Told {
    state: FileState,
    is_settled: bool,
    /// `None` while the pipeline has not said: it may wait for the baseline.
    is_image: Option<bool>,
}

impl LayerFiles {
    /// Whether it is known which of them are trusted.
    pub(crate) fn is_known(&self) -> bool {
        self.trust != Trust::Unknown
    }

    /// Judgements by another baseline, or of another time, are void. What still
    /// waits for its judgement goes on waiting.
    pub(crate) fn set_trust(&mut self, trust: Trust) {
        self.trust = trust;
        self.told.retain(|_, told| told.is_image.is_none());
    }

    /// Whether the execution of this file is to be told. `is_young`: it has
    /// changed since there is a container, and no other time can excuse that.
    pub(crate) fn is_doubtful(&self, file: &LayerFile, is_young: bool) -> bool {
        match self.trust {
            Trust::NoBaseline => return false,
            Trust::UpTo(time) if file.changed <= time && !is_young => return false,
            Trust::UpTo(_) | Trust::Unknown => (),
        }
        match self.told.get(file) {
            None | Some(Told { is_image: Some(false), .. }) => true,
            Some(Told { is_image: Some(true), is_settled, .. }) => !is_settled,
            // However often it runs until then, once is enough to judge it.
            Some(Told { is_image: None, .. }) => false,
        }
    }

    /// Whether nothing more is to be said of this file until it changes: it need not be
    /// looked at, and no judgement of it is waited for.
    pub(crate) fn is_certain(&self, file: &LayerFile, is_young: bool) -> bool {
        match self.trust {
            Trust::NoBaseline => true,
            Trust::UpTo(time) if file.changed <= time && !is_young => true,
            Trust::UpTo(_) | Trust::Unknown => self
                .told
                .get(file)
                .is_some_and(|told| told.is_settled && told.is_image == Some(true)),
        }
    }

    /// What the file is, if it was read before.
    pub(crate) fn known(&self, file: &LayerFile) -> Option<FileState> {
        self.told.get(file).filter(|told| told.is_settled).map(|told| told.state.clone())
    }

    /// The file is told, as `state`; it was read after `at`.
    pub(crate) fn tell(&mut self, file: LayerFile, state: FileState, at: Timestamp) {
        if self.told.get(&file).is_some_and(|told| told.is_settled) {
            return;
        }
        if self.told.len() >= MAX_TOLD {
            self.told.clear();
        }
        let is_settled = file.changed.seconds.saturating_add(TICK) < at.as_second();
        self.told.insert(file, Told { state, is_settled, is_image: None });
    }

    pub(crate) fn judge(&mut self, file: &LayerFile, verdict: Verdict) {
        match (verdict, self.told.get_mut(file)) {
            (Verdict::Image, Some(told)) => told.is_image = Some(true),
            (Verdict::Drift, Some(told)) => told.is_image = Some(false),
            (Verdict::Lost, Some(_)) => {
                self.told.remove(file);
            }
            // Forgotten for want of room: it is told anew.
            (Verdict::Image | Verdict::Drift | Verdict::Lost, None) => (),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Content, FileType, Format, Unhashed};

    fn at(seconds: i64) -> FileTime {
        FileTime { seconds, nanoseconds: 5 }
    }

    fn file(changed: i64) -> LayerFile {
        LayerFile { device: 1, inode: 2, changed: at(changed) }
    }

    fn state() -> FileState {
        FileState {
            file_type: FileType::Regular,
            format: Format::Elf,
            mode: 0o755,
            uid: 0,
            gid: 0,
            size: 1,
            capability: None,
            content: Content::Unhashed(Unhashed::Size),
            could_change: false,
            deleted: false,
        }
    }

    fn told(seconds: &[i64]) -> LayerFiles {
        let mut files = LayerFiles::default();
        for changed in seconds {
            files.tell(file(*changed), state(), Timestamp::from_second(1000).unwrap());
        }
        files
    }

    fn trusted_up_to(seconds: i64) -> LayerFiles {
        let mut files = LayerFiles::default();
        files.set_trust(Trust::UpTo(at(seconds)));
        files
    }

    #[test]
    fn only_what_changed_after_the_time_is_looked_at() {
        let files = trusted_up_to(100);
        assert!(!files.is_doubtful(&file(99), false));
        assert!(!files.is_doubtful(&file(100), false));
        assert!(files.is_doubtful(&file(101), false));
        let later = LayerFile { changed: FileTime { nanoseconds: 6, ..at(100) }, ..file(100) };
        assert!(files.is_doubtful(&later, false));
        // A time in the future, from a clock that was set back since, excuses nothing
        // that happened to a running container.
        assert!(files.is_doubtful(&file(99), true));
    }

    #[test]
    fn while_no_time_is_known_everything_is_looked_at_and_without_a_baseline_nothing() {
        let mut files = LayerFiles::default();
        assert!(files.is_doubtful(&file(1), false));
        files.set_trust(Trust::NoBaseline);
        assert!(!files.is_doubtful(&file(1), true));
    }

    #[test]
    fn a_file_is_read_once_for_each_change() {
        let mut files = told(&[1]);
        assert!(!files.is_doubtful(&file(1), false), "it waits for its judgement");
        assert_eq!(files.known(&file(1)), Some(state()));
        files.judge(&file(1), Verdict::Image);
        assert!(!files.is_doubtful(&file(1), false));
        assert!(files.is_doubtful(&file(2), false), "changed since");
        files.tell(file(2), state(), Timestamp::from_second(1000).unwrap());
        files.judge(&file(2), Verdict::Drift);
        assert!(files.is_doubtful(&file(2), false), "every execution of drift is told");
        assert_eq!(files.known(&file(2)), Some(state()), "and none of them reads it again");
    }

    #[test]
    fn a_file_is_certain_only_while_nobody_waits_to_hear_of_it() {
        let mut files = told(&[1]);
        assert!(!files.is_certain(&file(1), false), "its judgement is to come");
        files.judge(&file(1), Verdict::Drift);
        assert!(!files.is_certain(&file(1), false));
        files.judge(&file(1), Verdict::Image);
        assert!(files.is_certain(&file(1), false));
        assert!(!files.is_certain(&file(2), false));
        let files = trusted_up_to(100);
        assert!(files.is_certain(&file(100), false));
        assert!(!files.is_certain(&file(100), true));
        assert!(!files.is_certain(&file(101), false));
        assert!(!LayerFiles::default().is_certain(&file(1), false));
    }

    #[test]
    fn a_judgement_that_was_lost_is_asked_for_again() {
        let mut files = told(&[1]);
        files.judge(&file(1), Verdict::Lost);
        assert!(files.is_doubtful(&file(1), false));
    }

    #[test]
    fn another_baseline_judges_anew() {
        let mut files = told(&[1, 2]);
        files.judge(&file(1), Verdict::Image);
        files.set_trust(Trust::Unknown);
        assert!(files.is_doubtful(&file(1), false));
        assert!(!files.is_doubtful(&file(2), false), "it still waits");
    }

    #[test]
    fn a_file_that_was_changed_a_moment_ago_is_not_known_by_its_ctime() {
        let mut files = told(&[999]);
        files.judge(&file(999), Verdict::Image);
        assert!(files.is_doubtful(&file(999), false));
        assert_eq!(files.known(&file(999)), None);
        files.tell(file(999), state(), Timestamp::from_second(1001).unwrap());
        files.judge(&file(999), Verdict::Image);
        assert!(!files.is_doubtful(&file(999), false), "read again, it is");
    }

    #[test]
    fn no_number_of_files_takes_more_than_its_room() {
        let mut files = LayerFiles::default();
        for changed in 0..i64::try_from(3 * MAX_TOLD).unwrap() {
            files.tell(file(changed), state(), Timestamp::now());
            assert!(files.told.len() <= MAX_TOLD);
        }
    }
}
