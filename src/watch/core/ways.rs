//! Remembers the other paths by which a container reaches its files: links, and mounts.
//!
//! It only keeps them and maps paths; `files::ways` finds them. A way makes a file sensitive
//! that lies elsewhere: `/etc/cron.d` may be a link to `/tmp/x`.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::model::RootfsPath;
use crate::sys::overlay;

/// More ways of one container are not followed. Each link is still reported itself.
pub(crate) const MAX_WAYS: usize = 64;

/// The ways of one container.
#[derive(Debug, Default)]
pub(crate) struct Ways(Mutex<All>);

#[derive(Debug, Default)]
pub(crate) struct All {
    pub(crate) ways: Vec<Way>,
    /// Ways in the image itself: its links, and the homes of its users. `None` if they have
    /// not been read yet.
    pub(crate) of_image: Option<Vec<(RootfsPath, RootfsPath)>>,
    /// Counts the walks of the whole upper layer.
    pub(crate) walk: u64,
    /// Sensitive places where something was mounted when the container was first examined:
    /// its runtime mounted it.
    pub(crate) mounted: Option<HashSet<Vec<u8>>>,
}

#[derive(Debug)]
pub(crate) struct Way {
    pub(crate) from: RootfsPath,
    pub(crate) to: RootfsPath,
    /// The path of the link in the upper layer; `None` for a mount.
    pub(crate) link: Option<RootfsPath>,
    /// The last walk that found it.
    pub(crate) walk: u64,
}

impl Ways {
    /// Whether the links and homes of the image are known.
    pub(crate) fn knows_image(&self) -> bool {
        self.all().of_image.is_some()
    }

    pub(crate) fn set_of_image(&self, ways: Vec<(RootfsPath, RootfsPath)>) {
        self.all().of_image = Some(ways);
    }

    /// Remembers where something is mounted, and returns the earlier places.
    pub(crate) fn replace_mounted(&self, mounted: HashSet<Vec<u8>>) -> Option<HashSet<Vec<u8>>> {
        self.all().mounted.replace(mounted)
    }

    fn all(&self) -> MutexGuard<'_, All> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The other path by which a file is reached.
    pub(crate) fn leading_to(&self, path: &RootfsPath) -> Option<RootfsPath> {
        let all = self.all();
        all.ways.iter().find_map(|way| {
            let rest = overlay::strip_directory(path.as_bytes(), way.to.as_bytes())?;
            let from = way.from.as_bytes();
            RootfsPath::new([from, b"/".as_slice(), rest].concat()).ok()
        })
    }

    /// The path of the image that leads to `path`, if `is_wanted` accepts it.
    pub(crate) fn known_as(
        &self,
        path: &RootfsPath,
        is_wanted: impl Fn(&RootfsPath) -> bool,
    ) -> Option<RootfsPath> {
        let all = self.all();
        all.of_image.iter().flatten().find_map(|(from, to)| {
            let rest = overlay::strip_directory(path.as_bytes(), to.as_bytes())?;
            let known_as = [from.as_bytes(), b"/".as_slice(), rest].concat();
            RootfsPath::new(known_as).ok().filter(|known_as| is_wanted(known_as))
        })
    }

    /// True if the way is new.
    pub(crate) fn add(&self, from: &RootfsPath, to: RootfsPath, link: Option<&RootfsPath>) -> bool {
        let mut all = self.all();
        let walk = all.walk;
        if let Some(way) = all.ways.iter_mut().find(|way| way.from == *from && way.to == to) {
            way.walk = walk;
            return false;
        }
        // A way that leads to a directory above itself would make the whole container
        // sensitive.
        if from.is_within(&to) || to.is_within(from) || all.ways.len() >= MAX_WAYS {
            return false;
        }
        all.ways.push(Way { from: from.clone(), to, link: link.cloned(), walk });
        true
    }

    /// This link does not exist any more.
    pub(crate) fn forget(&self, link: &RootfsPath) {
        self.all().ways.retain(|way| way.link.as_ref() != Some(link));
    }

    /// A walk of the whole upper layer begins. It finds every link that still exists.
    pub(crate) fn begin_walk(&self) {
        self.all().walk += 1;
    }

    /// The walk has ended: links that it has not found are forgotten.
    pub(crate) fn end_walk(&self) {
        let mut all = self.all();
        let walk = all.walk;
        all.ways.retain(|way| way.link.is_none() || way.walk == walk);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> RootfsPath {
        RootfsPath::new(text).unwrap()
    }

    #[test]
    fn x15_what_lies_behind_a_link_is_reached_by_it() {
        let ways = Ways::default();
        let reached = |text: &str| ways.leading_to(&path(text)).map(|path| path.to_string());
        let link = path("/etc/cron.d");
        assert!(ways.add(&link, path("/tmp/cr"), Some(&link)));
        assert!(!ways.add(&link, path("/tmp/cr"), Some(&link)), "known");
        assert_eq!(reached("/tmp/cr/a").as_deref(), Some("/etc/cron.d/a"));
        assert_eq!(reached("/tmp/cr").as_deref(), Some("/etc/cron.d"));
        assert_eq!(reached("/tmp/crx/a"), None);
        // A way that leads to a directory above itself makes nothing else sensitive.
        for above in ["/", "/etc"] {
            assert!(!ways.add(&path("/etc/cron.daily"), path(above), None));
        }
        // A walk has not found the link, or the link was removed.
        ways.begin_walk();
        ways.end_walk();
        assert_eq!(reached("/tmp/cr/a"), None);
        ways.add(&link, path("/tmp/cr"), Some(&link));
        ways.forget(&link);
        assert_eq!(reached("/tmp/cr/a"), None);
        // A mount is in no upper layer.
        ways.add(&link, path("/tmp/cr"), None);
        ways.begin_walk();
        ways.end_walk();
        assert!(reached("/tmp/cr/a").is_some());
    }

    #[test]
    fn the_number_of_remembered_links_is_bounded() {
        let ways = Ways::default();
        for number in 0..1000 {
            ways.add(&path(&format!("/home/{number}")), path(&format!("/tmp/{number}")), None);
        }
        assert_eq!(ways.all().ways.len(), MAX_WAYS);
    }
}
