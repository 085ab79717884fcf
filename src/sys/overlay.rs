//! OverlayFS: its mount options, the extended attributes of its upper layer, and its way to
//! copy files up.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use super::file;
use crate::model::OverlayDirs;

const OVERLAYFS_SUPER_MAGIC: u64 = 0x794c_7630;

/// Whether an open directory is on an overlay.
pub fn is_overlay(fd: impl AsFd) -> io::Result<bool> {
    let magic = rustix::fs::fstatfs(fd)?.f_type;
    Ok(u64::try_from(magic) == Ok(OVERLAYFS_SUPER_MAGIC))
}

/// One of the overlay's own attributes on a file of its upper layer. Overlays
/// mounted with `userxattr` keep them in the `user` namespace.
///
/// A container cannot set the `trusted` ones (the overlay hides them), but it can set the
/// `user` ones on an overlay that does not use them. So the `user` ones are only read if the
/// mount has the option `userxattr`.
fn attribute(fd: impl AsFd, name: &str, user: bool) -> io::Result<Option<Box<[u8]>>> {
    let namespace = if user { "user" } else { "trusted" };
    file::xattr(fd, &format!("{namespace}.overlay.{name}"))
}

/// Whether a directory of the upper layer hides the layers below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opacity {
    /// The layers below show through.
    Transparent,
    /// Nothing of the layers below is visible in this directory.
    Opaque,
    /// As `Transparent`, but empty regular files may be whiteouts.
    HoldsFileWhiteouts,
}

pub fn opacity(directory: impl AsFd, user: bool) -> io::Result<Opacity> {
    Ok(match attribute(directory, "opaque", user)?.as_deref() {
        Some(b"y") => Opacity::Opaque,
        Some(b"x") => Opacity::HoldsFileWhiteouts,
        Some(_) | None => Opacity::Transparent,
    })
}

/// Whether an empty regular file is a whiteout.
pub fn is_file_whiteout(fd: impl AsFd, user: bool) -> io::Result<bool> {
    Ok(attribute(fd, "whiteout", user)?.is_some())
}

/// Whether an upper file has only metadata, and its content is in a layer below.
pub fn is_metacopy(fd: impl AsFd, user: bool) -> io::Result<bool> {
    Ok(attribute(fd, "metacopy", user)?.is_some())
}

/// Whether a directory was renamed with `redirect_dir`: its content comes from another path
/// of the layers below, and is not in the upper layer.
pub fn is_redirected(fd: impl AsFd, user: bool) -> io::Result<bool> {
    Ok(redirect(fd, user)?.is_some())
}

/// The place in the layers below of a renamed entry's content: a path from the root if it
/// begins with a slash, else another name in the same directory.
pub fn redirect(fd: impl AsFd, user: bool) -> io::Result<Option<Box<[u8]>>> {
    attribute(fd, "redirect", user)
}

/// Why the overlay opens a file in its work directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyUp {
    /// It is an unnamed file, to be filled.
    Begins,
    /// The copy-up is over: the file has its name in the upper layer, and is opened by the
    /// place where it was made.
    Over,
    /// It has a name in the work directory. An overlay makes such files where it cannot make
    /// unnamed ones, and then nothing shows the end of the copy-up.
    Named,
}

/// Examines a file that the overlay is about to open in its work directory.
pub fn copy_up(file: std::os::fd::BorrowedFd<'_>, stat: &file::Stat) -> io::Result<CopyUp> {
    if stat.links == 0 {
        return Ok(CopyUp::Begins);
    }
    // An unnamed file's own entry never gets a name, even when a link is made to the file.
    // No name in a work directory ends like this otherwise.
    let is_unnamed = file::name_of(file)?.ends_with(b" (deleted)");
    Ok(if is_unnamed { CopyUp::Over } else { CopyUp::Named })
}

/// Whether another process or another machine keeps the files of a directory.
pub fn is_remote(directory: &Path) -> io::Result<bool> {
    const FUSE: u64 = 0x6573_5546;
    const NFS: u64 = 0x6969;
    const SMB2: u64 = 0xfe53_4d42;
    const CIFS: u64 = 0xff53_4d42;
    const CEPH: u64 = 0x00c3_6400;
    const V9FS: u64 = 0x0102_1997;
    let magic = rustix::fs::statfs(directory)?.f_type;
    let magic = u64::try_from(magic).unwrap_or_default() & 0xffff_ffff;
    Ok([FUSE, NFS, SMB2, CIFS, CEPH, V9FS].contains(&magic))
}

/// Mounts an overlay without a mount point, which ends with the descriptor.
pub fn mount_unseen(lower: &Path, upper: &Path, work: &Path) -> io::Result<OwnedFd> {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
        fsopen,
    };
    let overlay = fsopen(c"overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (name, directory) in [(c"lowerdir", lower), (c"upperdir", upper), (c"workdir", work)] {
        fsconfig_set_string(overlay.as_fd(), name, directory)?;
    }
    fsconfig_create(overlay.as_fd())?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    Ok(fsmount(overlay.as_fd(), flags, MountAttrFlags::empty())?)
}

/// A mounted overlay, as /proc/PID/mountinfo describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub dirs: OverlayDirs,
    /// Its attributes are in the `user` namespace.
    pub userxattr: bool,
    /// A directory of the layers below can be renamed: its content then comes from another
    /// path.
    pub redirects: bool,
    /// Where files are made before they are moved into the upper layer; `None` if the mount
    /// has only a relative path.
    pub workdir: Option<PathBuf>,
    /// Its files can be opened by handle (`nfs_export=on`).
    pub is_exported: bool,
}

/// Whether directories of overlays can be renamed if the mount has no option for it.
pub fn redirects_by_default() -> bool {
    std::fs::read("/sys/module/overlay/parameters/redirect_dir")
        .is_ok_and(|value| value.starts_with(b"Y"))
}

/// Finds the overlay with this device in a process's mountinfo.
///
/// The procfs crate cannot be used: it fails on names that are not UTF-8, which a container
/// can mount.
pub fn find_in_mountinfo(mountinfo: &[u8], device: u64) -> Option<Mount> {
    let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    mountinfo.split(|&byte| byte == b'\n').find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
        // ID, parent, device, root, mount point, options, tags…, "-", type, source, options
        if *fields.get(2)? != device.as_bytes() {
            return None;
        }
        parse_options(overlay_options(&fields)?)
    })
}

/// The directories of an overlay, from its line of mountinfo, with or without an upper layer.
pub fn directories(line: &[u8]) -> Vec<PathBuf> {
    let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let Some(options) = overlay_options(&fields) else { return Vec::new() };
    let Options { upperdir, lowerdirs, .. } = Options::read(options);
    upperdir.into_iter().chain(lowerdirs).collect()
}

/// The same for the overlay with this device, in a process's mountinfo.
pub fn directories_of(mountinfo: &[u8], device: u64) -> Vec<PathBuf> {
    let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let mut lines = mountinfo.split(|&byte| byte == b'\n');
    let is_it = |line: &&[u8]| line.split(|&byte| byte == b' ').nth(2) == Some(device.as_bytes());
    lines.find(is_it).map(directories).unwrap_or_default()
}

/// Finds the overlay that writes to this directory.
pub fn find_by_upperdir(mountinfo: &[u8], upperdir: &Path) -> Option<Mount> {
    mountinfo.split(|&byte| byte == b'\n').find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
        parse_options(overlay_options(&fields)?).filter(|mount| mount.dirs.upperdir == upperdir)
    })
}

/// The options of a mountinfo line's superblock, if it is an overlay's.
fn overlay_options<'a>(fields: &[&'a [u8]]) -> Option<&'a [u8]> {
    let dash = fields.iter().skip(6).position(|field| *field == b"-")? + 6;
    (*fields.get(dash + 1)? == b"overlay").then_some(*fields.get(dash + 3)?)
}

/// The mount points of FUSE filesystems: a read there asks a process.
pub fn fuse_mount_points(mountinfo: &[u8]) -> Vec<PathBuf> {
    let lines = mountinfo.split(|&byte| byte == b'\n');
    lines
        .filter_map(|line| {
            let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
            let dash = fields.iter().skip(6).position(|field| *field == b"-")? + 6;
            let kind = fields.get(dash + 1)?;
            (*kind == b"fuse" || kind.starts_with(b"fuse."))
                .then_some(into_path(unescape_octal(fields.get(4)?)))
        })
        .collect()
}

/// A mount in one namespace: a directory of its filesystem, and its mount point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub root: Vec<u8>,
    pub mount_point: Vec<u8>,
}

/// Finds a mount by its ID, which statx(2) returns for an open file.
pub fn find_place(mountinfo: &[u8], mount: u64) -> Option<Place> {
    let mount = mount.to_string();
    mountinfo.split(|&byte| byte == b'\n').find_map(|line| {
        let mut fields = line.split(|&byte| byte == b' ');
        if fields.next()? != mount.as_bytes() {
            return None;
        }
        let root = unescape_octal(fields.nth(2)?);
        Some(Place { root, mount_point: unescape_octal(fields.next()?) })
    })
}

impl Place {
    /// The path inside the filesystem of the file at `name`.
    pub fn inside(&self, name: &[u8]) -> Option<Vec<u8>> {
        let below = strip_directory(name, &self.mount_point)?;
        let mut path = self.root.clone();
        path.push(b'/');
        path.extend_from_slice(below);
        Some(path)
    }
}

/// The rest of `name` below `directory`; `None` if it is not there.
pub fn strip_directory<'a>(name: &'a [u8], directory: &[u8]) -> Option<&'a [u8]> {
    let directory = directory.strip_suffix(b"/").unwrap_or(directory);
    let below = name.strip_prefix(directory)?;
    (below.is_empty() || below.starts_with(b"/")).then_some(below)
}

/// An overlay's mount options as the kernel prints them: octal escapes from seq_file, and
/// in a `lowerdir` list a backslash before `:` and `\`.
struct Options {
    upperdir: Option<PathBuf>,
    lowerdirs: Vec<PathBuf>,
    userxattr: bool,
    redirects: Option<bool>,
    workdir: Option<PathBuf>,
    is_exported: bool,
}

impl Options {
    fn read(options: &[u8]) -> Options {
        let mut upperdir = None;
        let mut lowerdirs: Vec<PathBuf> = Vec::new();
        let mut userxattr = false;
        let mut redirects = None;
        let mut workdir = None;
        let mut is_exported = false;
        for option in options.split(|&byte| byte == b',') {
            let value = |name: &str| option.strip_prefix(name.as_bytes()).map(unescape_octal);
            if let Some(value) = value("upperdir=") {
                upperdir = Some(into_path(value));
            } else if let Some(value) = value("lowerdir+=").or_else(|| value("datadir+=")) {
                lowerdirs.push(into_path(value));
            } else if let Some(value) = value("lowerdir=") {
                lowerdirs.extend(split_lowerdirs(&value));
            } else if let Some(value) = value("workdir=") {
                workdir = Some(into_path(value)).filter(|workdir| workdir.is_absolute());
            } else if option == b"nfs_export=on" {
                is_exported = true;
            } else if option == b"userxattr" {
                userxattr = true;
            } else if let Some(mode) = value("redirect_dir=") {
                redirects = Some(mode == b"on");
            }
        }
        // containerd shortens a long list: it mounts from the directory of all snapshots,
        // with `lowerdir=12/fs:11/fs`.
        if let Some(snapshots) = upperdir.as_deref().and_then(Path::parent).and_then(Path::parent) {
            for lowerdir in &mut lowerdirs {
                if lowerdir.is_relative() {
                    *lowerdir = snapshots.join(&lowerdir);
                }
            }
        }
        Options { upperdir, lowerdirs, userxattr, redirects, workdir, is_exported }
    }
}

fn parse_options(options: &[u8]) -> Option<Mount> {
    let Options { upperdir, lowerdirs, userxattr, redirects, workdir, is_exported } =
        Options::read(options);
    let redirects = redirects.unwrap_or_else(redirects_by_default) && !userxattr;
    Some(Mount {
        dirs: OverlayDirs { upperdir: upperdir?, lowerdirs },
        userxattr,
        redirects,
        workdir,
        is_exported,
    })
}

fn into_path(bytes: Vec<u8>) -> PathBuf {
    std::ffi::OsString::from_vec(bytes).into()
}

pub(super) fn unescape_octal(escaped: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(escaped.len());
    let mut rest = escaped;
    while let Some((&byte, after)) = rest.split_first() {
        match after {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', following @ ..]
                if byte == b'\\' =>
            {
                bytes.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
                rest = following;
            }
            _ => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    bytes
}

/// Splits at colons without a backslash before them. `::` before a data-only layer makes an
/// empty name, which is left out.
fn split_lowerdirs(list: &[u8]) -> Vec<PathBuf> {
    let mut dirs = vec![Vec::new()];
    let mut bytes = list.iter().copied();
    while let Some(byte) = bytes.next() {
        let last = dirs.last_mut().expect("it starts with one and only grows");
        match byte {
            b'\\' => last.extend(bytes.next()),
            b':' => dirs.push(Vec::new()),
            byte => last.push(byte),
        }
    }
    dirs.into_iter()
        .filter(|dir| !dir.is_empty())
        .map(|dir| PathBuf::from(OsStr::from_bytes(&dir)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(major: u32, minor: u32) -> u64 {
        rustix::fs::makedev(major, minor)
    }

    #[test]
    fn the_root_overlay_is_found_among_hostile_mounts() {
        let mountinfo = b"612 611 0:52 / / rw,relatime - overlay overlay rw,lowerdir=/s/2/fs:/s/1/fs,upperdir=/s/3/fs,workdir=/s/3/work,uuid=on\n\
            613 612 0:60 / /\xff\\040x rw shared:1 - tmpfs  rw\n";
        let mount = find_in_mountinfo(mountinfo, device(0, 52)).unwrap();
        assert_eq!(
            mount,
            Mount {
                dirs: OverlayDirs {
                    upperdir: "/s/3/fs".into(),
                    lowerdirs: vec!["/s/2/fs".into(), "/s/1/fs".into()],
                },
                userxattr: false,
                redirects: redirects_by_default(),
                workdir: Some("/s/3/work".into()),
                is_exported: false,
            }
        );
        assert_eq!(find_in_mountinfo(mountinfo, device(0, 60)), None);
        assert_eq!(find_in_mountinfo(b"garbage\n\n1 2 0:1", device(0, 1)), None);
    }

    #[test]
    fn mounts_are_found_by_what_they_are() {
        let mountinfo = b"1 0 8:1 / / rw - ext4 /dev/sda rw\n\
            2 1 0:50 / /s/1/fs rw shared:3 - fuse.rawBridge stargz rw\n\
            3 1 0:51 / /a\\040b rw - fuse fuse rw\n\
            4 1 0:52 / /m rw - overlay overlay rw,lowerdir=l/A:l/B,upperdir=/d/o/7/diff\n";
        assert_eq!(fuse_mount_points(mountinfo), [PathBuf::from("/s/1/fs"), PathBuf::from("/a b")]);
        let mount = find_by_upperdir(mountinfo, Path::new("/d/o/7/diff")).unwrap();
        assert_eq!(mount.dirs.lowerdirs, [PathBuf::from("/d/o/l/A"), PathBuf::from("/d/o/l/B")]);
        assert_eq!(find_by_upperdir(mountinfo, Path::new("/d/o/8/diff")), None);
    }

    #[test]
    fn a_file_seen_through_a_bind_mount_has_the_path_it_has_inside() {
        let mountinfo = b"12 11 0:52 /tmp/dir /a\\040b rw - overlay overlay rw\n";
        let place = find_place(mountinfo, 12).unwrap();
        assert_eq!(place.inside(b"/a b/x").as_deref(), Some(b"/tmp/dir//x".as_slice()));
        assert_eq!(place.inside(b"/a bc/x"), None);
        assert_eq!(find_place(mountinfo, 1), None);
        let root = Place { root: b"/".to_vec(), mount_point: b"/".to_vec() };
        assert_eq!(root.inside(b"/x").as_deref(), Some(b"///x".as_slice()));
    }

    #[test]
    fn every_spelling_of_lowerdirs_is_read() {
        let check = |options: &str, expected: &[&str]| {
            let mount = parse_options(format!("{options},upperdir=/s/3/fs").as_bytes()).unwrap();
            let expected: Vec<PathBuf> = expected.iter().map(PathBuf::from).collect();
            assert_eq!(mount.dirs.lowerdirs, expected, "{options}");
        };
        check("lowerdir=/a\\134:b:/c", &["/a:b", "/c"]);
        check("lowerdir=/a\\040b:/c\\054d", &["/a b", "/c,d"]);
        check("lowerdir+=/a:b,lowerdir+=/c", &["/a:b", "/c"]);
        check("lowerdir=2/fs:1/fs", &["/s/2/fs", "/s/1/fs"]);
        check("lowerdir=/a::/data", &["/a", "/data"]);
        check("lowerdir+=/a,datadir+=/data", &["/a", "/data"]);
    }

    #[test]
    fn an_overlay_without_an_upperdir_has_no_directories() {
        assert_eq!(parse_options(b"ro,lowerdir=/a:/b"), None);
        let line = b"4 1 0:52 / /m ro - overlay o ro,lowerdir=/a:/b";
        assert_eq!(directories(line), [PathBuf::from("/a"), PathBuf::from("/b")]);
    }
}
