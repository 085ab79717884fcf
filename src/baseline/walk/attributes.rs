//! The extended attributes of a layer's file.

use std::os::fd::BorrowedFd;

use rustix::fs::{fgetxattr, flistxattr};
use rustix::io::Errno;

use super::error::EntryError;

/// The extended attributes of a file that overlayfs and exec use.
#[derive(Default)]
pub(super) struct Attributes {
    pub(super) opaque: bool,
    pub(super) whiteout: bool,
    pub(super) capability: Option<Box<[u8]>>,
    /// An attribute by which overlayfs takes the content from elsewhere. Snapshotters make
    /// no such layers.
    pub(super) unsupported: Option<&'static str>,
}

impl Attributes {
    pub(super) fn read(file: BorrowedFd<'_>) -> Result<Attributes, EntryError> {
        let mut attributes = Attributes::default();
        let mut names = [0_u8; 1024];
        let length = match flistxattr(file, &mut names) {
            Ok(length) => length,
            Err(Errno::NOTSUP) => return Ok(attributes),
            Err(Errno::RANGE) => {
                let mut names = vec![0; 64 * 1024];
                let length = flistxattr(file, &mut names[..]).map_err(EntryError::at("list"))?;
                return attributes.take(file, &names[..length]).map(|()| attributes);
            }
            Err(errno) => return Err(EntryError::at("list the attributes of")(errno)),
        };
        attributes.take(file, &names[..length])?;
        Ok(attributes)
    }

    fn take(&mut self, file: BorrowedFd<'_>, names: &[u8]) -> Result<(), EntryError> {
        // Not `user.overlay.*`: only overlays mounted with `userxattr`, which a root
        // containerd does not do, read those, and anyone may set them. An image
        // could hide its own files from its baseline with them.
        for name in names.split(|&byte| byte == 0) {
            match name {
                b"trusted.overlay.opaque" => {
                    self.opaque |= value_of(file, name)?.as_deref() == Some(b"y");
                }
                b"trusted.overlay.whiteout" => self.whiteout = true,
                b"security.capability" => self.capability = value_of(file, name)?,
                b"trusted.overlay.redirect" => self.unsupported = Some("trusted.overlay.redirect"),
                b"trusted.overlay.metacopy" => self.unsupported = Some("trusted.overlay.metacopy"),
                _ => (),
            }
        }
        Ok(())
    }
}

fn value_of(file: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Box<[u8]>>, EntryError> {
    let mut value = [0_u8; 1024];
    match fgetxattr(file, name, &mut value) {
        Ok(length) => Ok(Some(value[..length].into())),
        Err(Errno::NODATA) => Err(EntryError::Changed),
        Err(errno) => Err(EntryError::Failed("read the attributes of", errno)),
    }
}
