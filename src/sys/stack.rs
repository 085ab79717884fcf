//! The arguments on a new program's stack, as execve(2) writes them: their number, the
//! address of each, and above these the arguments themselves.
//!
//! ```text
//! stack pointer ──> argc  argv[0] … argv[argc - 1]  0  envp … 0  auxv …
//!                   (a gap of random length)
//!                   argv[0]\0argv[1]\0…  environment …
//! ```
//!
//! A copy of the stack ends where the process has no page yet: in the gap, if the gap
//! contains a page that was never written. Then the arguments are not in the copy.

use super::procfs::MAX_ARGUMENTS;

/// The width of a program's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    Four,
    Eight,
}

impl Word {
    fn bytes(self) -> usize {
        match self {
            Word::Four => 4,
            Word::Eight => 8,
        }
    }

    fn at(self, bytes: &[u8], index: usize) -> Option<u64> {
        let bytes = bytes.get(index.checked_mul(self.bytes())?..)?;
        match self {
            Word::Four => bytes.first_chunk().copied().map(u32::from_ne_bytes).map(u64::from),
            Word::Eight => bytes.first_chunk().copied().map(u64::from_ne_bytes),
        }
    }
}

/// The arguments in a copy of the stack from `pointer` upwards, in the form of
/// `/proc/PID/cmdline`: the first [`MAX_ARGUMENTS`], each with its NUL. `None` if there are
/// none, if one of them is not complete in the copy, or if they are not adjacent, as the
/// kernel writes them. Pure.
pub fn arguments(copy: &[u8], pointer: u64, word: Word) -> Option<&[u8]> {
    let count = usize::try_from(word.at(copy, 0)?).ok()?.min(MAX_ARGUMENTS);
    if count == 0 {
        return None;
    }
    let offset = |address: u64| usize::try_from(address.checked_sub(pointer)?).ok();
    let start = offset(word.at(copy, 1)?)?;
    let mut end = start;
    for index in 1..=count {
        if offset(word.at(copy, index)?)? != end {
            return None;
        }
        end += copy.get(end..)?.iter().position(|&byte| byte == 0)? + 1;
    }
    copy.get(start..end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sys::procfs::split_arguments;

    const POINTER: u64 = 0x7ffc_0000_1230;

    /// A stack as the kernel writes it, with `gap` bytes below the strings.
    fn stack(arguments: &[&[u8]], gap: usize, pointer: u64, word: Word) -> Vec<u8> {
        let words = 1 + arguments.len() + 1 + 1 + 2;
        let mut address = pointer + (words * word.bytes() + gap) as u64;
        let mut stack = Vec::new();
        let mut put = |value: u64| match word {
            Word::Four => stack.extend(u32::try_from(value).unwrap().to_ne_bytes()),
            Word::Eight => stack.extend(value.to_ne_bytes()),
        };
        put(arguments.len() as u64);
        for argument in arguments {
            put(address);
            address += argument.len() as u64 + 1;
        }
        // No environment; the end of the auxiliary vector.
        (0..4).for_each(|_| put(0));
        stack.resize(stack.len() + gap, 0);
        for argument in arguments {
            stack.extend(*argument);
            stack.push(0);
        }
        stack.extend(b"A=1\0/bin/x\0");
        stack
    }

    #[track_caller]
    fn check(copy: &[u8], word: Word, expected: Option<&[u8]>) {
        let pointer = if word == Word::Four { 0xff00_0010 } else { POINTER };
        assert_eq!(arguments(copy, pointer, word), expected);
    }

    #[test]
    fn arguments_are_read_of_programs_of_either_width() {
        let list: [&[u8]; 4] = [b"sh", b"-c", b"", b"\xff x"];
        let expected = b"sh\0-c\0\0\xff x\0";
        check(&stack(&list, 5000, POINTER, Word::Eight), Word::Eight, Some(expected));
        check(&stack(&list, 0, 0xff00_0010, Word::Four), Word::Four, Some(expected));
        let split = split_arguments(expected).unwrap();
        assert_eq!(split, [b"sh".to_vec(), b"-c".to_vec(), Vec::new(), b"\xff x".to_vec()]);
    }

    #[test]
    fn arguments_that_are_not_complete_in_the_copy_are_not_returned() {
        let whole = stack(&[b"/bin/x", b"one"], 100, POINTER, Word::Eight);
        let end = whole.len() - b"A=1\0/bin/x\0".len();
        check(&whole[..end], Word::Eight, Some(b"/bin/x\0one\0"));
        for length in 0..end {
            check(&whole[..length], Word::Eight, None);
        }
    }

    #[test]
    fn arguments_after_the_last_returned_one_do_not_matter() {
        let list = vec![&b"a"[..]; MAX_ARGUMENTS + 100];
        let expected = b"a\0".repeat(MAX_ARGUMENTS);
        check(&stack(&list, 16, POINTER, Word::Eight), Word::Eight, Some(&expected));
    }

    #[test]
    fn what_the_kernel_has_not_written_so_is_refused() {
        let good = stack(&[b"a", b"b"], 0, POINTER, Word::Eight);
        let with = |index: usize, value: u64| {
            let mut bad = good.clone();
            bad[index * 8..][..8].copy_from_slice(&value.to_ne_bytes());
            bad
        };
        let first = u64::from_ne_bytes(*good[8..].first_chunk().unwrap());
        check(&with(0, 0), Word::Eight, None);
        check(&with(0, u64::MAX), Word::Eight, None);
        for address in [0, POINTER - 1, POINTER + (1 << 20), u64::MAX] {
            check(&with(1, address), Word::Eight, None);
            check(&with(2, address), Word::Eight, None);
        }
        // Not the next one, but the same again.
        check(&with(2, first), Word::Eight, None);
        // A program of the other width.
        check(&good, Word::Four, None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_arguments_or_refused(copy: Vec<u8>, pointer: u64, is_wide: bool) {
            let word = if is_wide { Word::Eight } else { Word::Four };
            if let Some(found) = arguments(&copy, pointer, word) {
                prop_assert_eq!(found.last(), Some(&0));
            }
        }

        #[test]
        fn any_arguments_are_read_back(
            list in proptest::collection::vec(proptest::collection::vec(1_u8.., 0..40), 1..140),
            gap in 0..8192_usize,
        ) {
            let borrowed: Vec<&[u8]> = list.iter().map(Vec::as_slice).collect();
            let copy = stack(&borrowed, gap, POINTER, Word::Eight);
            let found = arguments(&copy, POINTER, Word::Eight).and_then(split_arguments).unwrap();
            prop_assert_eq!(&found[..], &list[..list.len().min(MAX_ARGUMENTS)]);
        }
    }
}
