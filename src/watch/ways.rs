//! Other ways by which a container reaches its files: a directory where persistence is
//! watched for, or one above it, that has become a link, or that something was mounted
//! over. What lies behind it is then as good as in the place itself.

use std::collections::HashSet;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;

use super::code;
use super::shared::Shared;
use super::state;
use super::table::Watched;
use crate::model::{Fact, RootfsPath, Source};
use crate::sys::file;
use crate::sys::mounts::{self, Mount};
use crate::sys::overlay;
use crate::sys::procfs::Handle;

/// More of one container are not followed. Each link is reported itself.
const MAX_WAYS: usize = 64;

/// The ways of one container.
#[derive(Debug, Default)]
pub(super) struct Ways(Mutex<All>);

#[derive(Debug, Default)]
struct All {
    ways: Vec<Way>,
    /// Moves with each walk of everything.
    walk: u64,
    /// Sensitive places where something was mounted when the container was first looked
    /// at: by its runtime.
    mounted: Option<HashSet<Vec<u8>>>,
}

#[derive(Debug)]
struct Way {
    from: RootfsPath,
    to: RootfsPath,
    /// The link as it is called in the upper layer; `None` for a mount.
    link: Option<RootfsPath>,
    /// The walk that saw it last.
    walk: u64,
}

impl Ways {
    fn all(&self) -> MutexGuard<'_, All> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The path by which a file is reached as well.
    pub(super) fn leading_to(&self, path: &RootfsPath) -> Option<RootfsPath> {
        let all = self.all();
        all.ways.iter().find_map(|way| {
            let rest = overlay::strip_directory(path.as_bytes(), way.to.as_bytes())?;
            let from = way.from.as_bytes();
            RootfsPath::new([from, b"/".as_slice(), rest].concat()).ok()
        })
    }

    /// True if it is news.
    fn add(&self, from: &RootfsPath, to: RootfsPath, link: Option<&RootfsPath>) -> bool {
        let mut all = self.all();
        let walk = all.walk;
        if let Some(way) = all.ways.iter_mut().find(|way| way.from == *from && way.to == to) {
            way.walk = walk;
            return false;
        }
        // One that leads back to above itself would make the whole container sensitive.
        if from.is_within(&to) || to.is_within(from) || all.ways.len() >= MAX_WAYS {
            return false;
        }
        all.ways.push(Way { from: from.clone(), to, link: link.cloned(), walk });
        true
    }

    /// There is no link of this name any more.
    pub(super) fn forget(&self, link: &RootfsPath) {
        self.all().ways.retain(|way| way.link.as_ref() != Some(link));
    }

    /// A walk of everything begins, which sees all links that are there.
    pub(super) fn begin_walk(&self) {
        self.all().walk += 1;
    }

    pub(super) fn end_walk(&self) {
        let mut all = self.all();
        let walk = all.walk;
        all.ways.retain(|way| way.link.is_none() || way.walk == walk);
    }
}

/// A link that leads away from a sensitive place.
pub(super) fn note_link(shared: &Shared, watched: &Watched, link: &RootfsPath, target: &[u8]) {
    let from = watched.ways.leading_to(link).unwrap_or_else(|| link.clone());
    // By its text, also where nothing is there yet, and where the kernel says that it ends.
    let by_text = link.resolve(target);
    let at_last = || {
        let init = Handle::open_exactly(watched.init).ok()?;
        let found = code::open_in(watched, &init, link.as_bytes())?;
        let owner = shared.table.owner(&file::stat(&found).ok()?)?;
        if owner.container != watched.container {
            return None;
        }
        let name = file::name_of(found.as_fd()).ok()?;
        let below_root = overlay::strip_directory(&name, &watched.root_name);
        RootfsPath::new(below_root.unwrap_or(&name)).ok()
    };
    let mut is_news = false;
    for to in [by_text, at_last()].into_iter().flatten() {
        is_news |= watched.ways.add(&from, to, Some(link));
    }
    if is_news {
        // What lies there already has been taken for data.
        watched.ask_for_walk();
        shared.wake_scan();
    }
}

/// What a container, and not its runtime, has mounted over a sensitive place.
pub(super) fn note_mounts(
    shared: &Shared,
    watched: &Arc<Watched>,
    init: &Handle,
    mounts: impl Iterator<Item = Mount>,
) {
    let sensitive: Vec<(RootfsPath, Mount)> = mounts
        .filter_map(|mount| Some((RootfsPath::new(&mount.mount_point).ok()?, mount)))
        .filter(|(at, _)| {
            shared.is_sensitive(watched, at) || shared.leads_to_sensitive(watched, at)
        })
        .collect();
    let there = || sensitive.iter().map(|(_, mount)| mount.mount_point.clone()).collect();
    let before = watched.ways.all().mounted.replace(there());
    for (at, mount) in sensitive {
        // A runtime mounts nothing of the container's own root.
        let is_own = mount.device == watched.device && mount.root != b"/";
        let is_new = before.as_ref().is_some_and(|before| !before.contains(&mount.mount_point));
        let to = RootfsPath::new(&mount.root).ok().filter(|_| is_own);
        if to.is_some_and(|to| watched.ways.add(&at, to, None)) {
            watched.ask_for_walk();
            shared.wake_scan();
        } else if !is_new {
            continue;
        }
        let root = init.open_root();
        let stat = root
            .and_then(|root| mounts::reach(&root, &mount.mount_point))
            .and_then(|reached| file::stat(&reached));
        // Behind a filesystem that would have to be asked there may be anything.
        let state = stat.map_or_else(|_| state::of_mount(), |stat| state::unopened(&stat));
        let fact = Fact::Present { path: at, state, lower: None, writer: None };
        shared.observe(watched, Timestamp::now(), Source::Change, fact);
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
        // One that leads to above itself makes nothing else sensitive.
        for above in ["/", "/etc"] {
            assert!(!ways.add(&path("/etc/cron.daily"), path(above), None));
        }
        // A walk that has not seen it, and somebody who has removed it.
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
    fn no_number_of_links_takes_more_than_its_room() {
        let ways = Ways::default();
        for number in 0..1000 {
            ways.add(&path(&format!("/home/{number}")), path(&format!("/tmp/{number}")), None);
        }
        assert_eq!(ways.all().ways.len(), MAX_WAYS);
    }
}
