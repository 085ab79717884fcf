//! The names of one directory, compact, so that a directory with very many of them
//! takes bounded memory: the later half is dropped and listed again when it is due.

/// The names in one directory, in order.
#[derive(Default)]
pub(super) struct Names {
    /// All names, without separators.
    bytes: Vec<u8>,
    /// Where each begins, how long it is, and its kind; the next one is the last.
    pub(super) left: Vec<(u32, u8, Kind)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    Regular,
    Special,
}

impl Names {
    pub(super) fn push(&mut self, name: &[u8], kind: Kind) {
        let start = u32::try_from(self.bytes.len());
        let length = u8::try_from(name.len());
        // One listing ends far below 4 GiB, and no file system has longer names.
        if let (Ok(start), Ok(length)) = (start, length) {
            self.bytes.extend_from_slice(name);
            self.left.push((start, length, kind));
        }
    }

    pub(super) fn name(&self, (start, length, _): (u32, u8, Kind)) -> &[u8] {
        &self.bytes[start as usize..][..usize::from(length)]
    }

    pub(super) fn pop(&mut self) -> Option<(&[u8], Kind)> {
        let next = self.left.pop()?;
        Some((self.name(next), next.2))
    }

    pub(super) fn sort(&mut self) {
        let mut left = std::mem::take(&mut self.left);
        left.sort_unstable_by(|a, b| self.name(*b).cmp(self.name(*a)));
        self.left = left;
    }

    /// Keeps the first half, in order.
    pub(super) fn halve(&mut self) {
        self.sort();
        let mut half = Names::default();
        for name in self.left.split_off(self.left.len() / 2) {
            half.push(self.name(name), name.2);
        }
        *self = half;
    }

    pub(super) fn memory(&self) -> usize {
        self.bytes.len() + self.left.len() * size_of::<(u32, u8, Kind)>()
    }
}
