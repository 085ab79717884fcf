//! Decides which executed files of the image's layers are read and reported.
//!
//! Every change to a file moves its ctime. So a file that has not changed since its layer
//! equalled the baseline is the image's own, and costs the gate one comparison. Every other
//! file is judged by its content, once. The pipeline sets how far the layers are trusted and
//! judges the files; this file only remembers both.

use std::collections::HashMap;

use jiff::Timestamp;

use crate::model::{FileState, FileTime, LayerFile};

/// How far the files of a container's layers are trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// Not compared with the baseline yet: no file is trusted.
    #[default]
    Unknown,
    /// A file that has not changed after this time equals the baseline.
    UpTo(FileTime),
    /// There is no baseline to compare them with.
    NoBaseline,
}

/// The judgement of a reported file of the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the image's own.
    Image,
    Drift,
    /// It was not judged and will not be: report it again.
    Lost,
}

/// More files than this are not remembered.
const MAX_REPORTED: usize = 4096;

/// In seconds. A ctime moves in ticks of the clock. It identifies a file's content only if it
/// was older than a tick when the file was read.
const TICK: i64 = 1;

/// The files of one container's layers that were reported, and how far the layers are trusted.
#[derive(Debug, Default)]
pub(crate) struct LayerFiles {
    trust: Trust,
    reported: HashMap<LayerFile, Reported>,
}

#[derive(Debug)]
struct Reported {
    state: FileState,
    /// The ctime was old enough to identify the content.
    is_settled: bool,
    /// `None` until the pipeline judges the file: it may wait for the baseline.
    is_image: Option<bool>,
}

impl LayerFiles {
    /// Whether it is known which files are trusted.
    pub(crate) fn is_known(&self) -> bool {
        self.trust != Trust::Unknown
    }

    /// Judgements by another baseline, or of another time, are void. Files that wait for
    /// their judgement continue to wait.
    pub(crate) fn set_trust(&mut self, trust: Trust) {
        self.trust = trust;
        self.reported.retain(|_, reported| reported.is_image.is_none());
    }

    /// Whether the execution of this file must be reported. `is_young`: the file has changed
    /// since the container was made, and then no trusted time excuses it.
    pub(crate) fn is_doubtful(&self, file: &LayerFile, is_young: bool) -> bool {
        match self.trust {
            Trust::NoBaseline => return false,
            Trust::UpTo(time) if file.changed <= time && !is_young => return false,
            Trust::UpTo(_) | Trust::Unknown => (),
        }
        match self.reported.get(file) {
            None | Some(Reported { is_image: Some(false), .. }) => true,
            Some(Reported { is_image: Some(true), is_settled, .. }) => !is_settled,
            // However often it runs until then, one report is enough to judge it.
            Some(Reported { is_image: None, .. }) => false,
        }
    }

    /// Whether this file need not be read or reported until it changes, and no judgement of
    /// it is awaited.
    pub(crate) fn is_certain(&self, file: &LayerFile, is_young: bool) -> bool {
        match self.trust {
            Trust::NoBaseline => true,
            Trust::UpTo(time) if file.changed <= time && !is_young => true,
            Trust::UpTo(_) | Trust::Unknown => self
                .reported
                .get(file)
                .is_some_and(|reported| reported.is_settled && reported.is_image == Some(true)),
        }
    }

    /// The state of the file, if it was read before.
    pub(crate) fn known(&self, file: &LayerFile) -> Option<FileState> {
        let reported = self.reported.get(file).filter(|reported| reported.is_settled);
        reported.map(|reported| reported.state.clone())
    }

    /// Notes that the file is reported as `state`. It was read after `at`.
    pub(crate) fn note_reported(&mut self, file: LayerFile, state: FileState, at: Timestamp) {
        if self.reported.get(&file).is_some_and(|reported| reported.is_settled) {
            return;
        }
        if self.reported.len() >= MAX_REPORTED {
            self.reported.clear();
        }
        let is_settled = file.changed.seconds.saturating_add(TICK) < at.as_second();
        self.reported.insert(file, Reported { state, is_settled, is_image: None });
    }

    pub(crate) fn judge(&mut self, file: &LayerFile, verdict: Verdict) {
        match (verdict, self.reported.get_mut(file)) {
            (Verdict::Image, Some(reported)) => reported.is_image = Some(true),
            (Verdict::Drift, Some(reported)) => reported.is_image = Some(false),
            (Verdict::Lost, Some(_)) => {
                self.reported.remove(file);
            }
            // Forgotten for lack of room: it is reported again.
            (Verdict::Image | Verdict::Drift | Verdict::Lost, None) => (),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Content, CouldChange, FileType, Format, Unhashed};

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
            could_change: CouldChange::No,
            deleted: false,
        }
    }

    fn reported(seconds: &[i64]) -> LayerFiles {
        let mut files = LayerFiles::default();
        for changed in seconds {
            files.note_reported(file(*changed), state(), Timestamp::from_second(1000).unwrap());
        }
        files
    }

    fn trusted_up_to(seconds: i64) -> LayerFiles {
        let mut files = LayerFiles::default();
        files.set_trust(Trust::UpTo(at(seconds)));
        files
    }

    #[test]
    fn only_a_file_that_changed_after_the_time_is_read() {
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
    fn without_a_known_time_every_file_is_read_and_without_a_baseline_none() {
        let mut files = LayerFiles::default();
        assert!(files.is_doubtful(&file(1), false));
        files.set_trust(Trust::NoBaseline);
        assert!(!files.is_doubtful(&file(1), true));
    }

    #[test]
    fn a_file_is_read_once_for_each_change() {
        let mut files = reported(&[1]);
        assert!(!files.is_doubtful(&file(1), false), "it waits for its judgement");
        assert_eq!(files.known(&file(1)), Some(state()));
        files.judge(&file(1), Verdict::Image);
        assert!(!files.is_doubtful(&file(1), false));
        assert!(files.is_doubtful(&file(2), false), "changed since");
        files.note_reported(file(2), state(), Timestamp::from_second(1000).unwrap());
        files.judge(&file(2), Verdict::Drift);
        assert!(files.is_doubtful(&file(2), false), "every execution of drift is reported");
        assert_eq!(files.known(&file(2)), Some(state()), "none of them reads it again");
    }

    #[test]
    fn a_file_is_certain_only_when_it_is_judged_to_be_the_images() {
        let mut files = reported(&[1]);
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
    fn a_file_with_a_lost_judgement_is_reported_again() {
        let mut files = reported(&[1]);
        files.judge(&file(1), Verdict::Lost);
        assert!(files.is_doubtful(&file(1), false));
    }

    #[test]
    fn another_baseline_voids_judgements() {
        let mut files = reported(&[1, 2]);
        files.judge(&file(1), Verdict::Image);
        files.set_trust(Trust::Unknown);
        assert!(files.is_doubtful(&file(1), false));
        assert!(!files.is_doubtful(&file(2), false), "it still waits");
    }

    #[test]
    fn a_file_that_changed_a_moment_ago_is_not_known_by_its_ctime() {
        let mut files = reported(&[999]);
        files.judge(&file(999), Verdict::Image);
        assert!(files.is_doubtful(&file(999), false));
        assert_eq!(files.known(&file(999)), None);
        files.note_reported(file(999), state(), Timestamp::from_second(1001).unwrap());
        files.judge(&file(999), Verdict::Image);
        assert!(!files.is_doubtful(&file(999), false), "read again, it is");
    }

    #[test]
    fn the_number_of_remembered_files_is_bounded() {
        let mut files = LayerFiles::default();
        for changed in 0..i64::try_from(3 * MAX_REPORTED).unwrap() {
            files.note_reported(file(changed), state(), Timestamp::now());
            assert!(files.reported.len() <= MAX_REPORTED);
        }
    }
}
