//! The content store: layers as they came from the registry.
//!
//! Plain threads that may block read them. Where containerd's own file can be opened, it is
//! read directly, several times faster than containerd sends it. Otherwise it is streamed, at
//! most a few messages ahead. Nothing here is verified: the reader of a blob must compare its
//! digest.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use containerd_client::services::v1::{PluginsRequest, ReadContentRequest};
use rustix::fs::{Advice, FileType, Mode, OFlags, fadvise};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use super::connection::{Connection, found, interrupted, words};
use super::manifests::brief;
use crate::baseline::Blobs;
use crate::model::{Blob, ManifestDigest};

/// Messages (of 1 MiB, as containerd sends them) that wait for the reader.
const AHEAD: usize = 2;
/// How long containerd may take for the next message.
const PATIENCE: Duration = Duration::from_secs(30);
/// A blob is rarely read a second time: what was read leaves the page cache, in
/// steps of this size.
const STEP: u64 = 8 << 20;

/// Reads blobs from the content stores of this node's containerds.
#[derive(Clone)]
pub struct ContentBlobs {
    runtime: tokio::runtime::Handle,
    stores: Arc<Mutex<HashMap<Arc<str>, Store>>>,
}

impl fmt::Debug for ContentBlobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ContentBlobs")
    }
}

/// One containerd's content store.
#[derive(Clone, Debug)]
struct Store {
    connection: Connection,
    /// Where its files are, if containerd reports that.
    root: Option<PathBuf>,
}

/// Why a blob cannot be read.
enum BlobError {
    /// The connection failed. Another one may serve.
    Interrupted(String),
    Refused(String),
}

impl From<Status> for BlobError {
    fn from(status: Status) -> BlobError {
        if interrupted(&status) {
            BlobError::Interrupted(words(&status))
        } else {
            BlobError::Refused(words(&status))
        }
    }
}

impl ContentBlobs {
    /// `runtime` drives the connections; each is made when it is first needed.
    pub fn new(runtime: tokio::runtime::Handle) -> ContentBlobs {
        ContentBlobs { runtime, stores: Arc::default() }
    }

    /// Runs a future on the runtime, and waits for it.
    fn wait<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, String> {
        let (sender, receiver) = oneshot::channel();
        self.runtime.spawn(async move {
            let _ = sender.send(future.await);
        });
        receiver.blocking_recv().map_err(|_| "driftd is being stopped".to_owned())
    }

    fn store(&self, endpoint: &Arc<str>) -> Result<Store, String> {
        if let Some(store) = self.stores().get(endpoint) {
            return Ok(store.clone());
        }
        let socket = PathBuf::from(&**endpoint);
        let store = self.wait(async move { Store::open(&socket).await })??;
        self.stores().insert(Arc::clone(endpoint), store.clone());
        Ok(store)
    }

    fn stores(&self) -> std::sync::MutexGuard<'_, HashMap<Arc<str>, Store>> {
        self.stores.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stream(&self, store: &Store, blob: &Blob) -> Result<Stream, BlobError> {
        let (sender, receiver) = mpsc::channel(AHEAD);
        let (connection, blob) = (store.connection.clone(), blob.clone());
        self.runtime.spawn(async move {
            if let Err(err) = send(&connection, &blob, &sender).await {
                let _ = sender.send(Err(err)).await;
            }
        });
        let mut stream = Stream { receiver, part: Vec::new(), read: 0 };
        // A missing blob is reported with the first message.
        match stream.receiver.blocking_recv() {
            Some(Ok(part)) => stream.part = part,
            Some(Err(err)) => return Err(err),
            None => (),
        }
        Ok(stream)
    }
}

impl Blobs for ContentBlobs {
    fn open(&self, blob: &Blob) -> Result<Box<dyn Read + Send>, String> {
        if let Some(reason) = no_archive(&blob.media_type) {
            return Err(reason);
        }
        let digest: ManifestDigest = blob
            .digest
            .parse()
            .map_err(|_| format!("its digest {} is no SHA-256", brief(&blob.digest)))?;
        let mut is_second_try = false;
        loop {
            let store = self.store(&blob.endpoint)?;
            if let Some(file) = store.root.as_deref().and_then(|root| open_file(root, digest, blob))
            {
                return Ok(Box::new(file));
            }
            match self.stream(&store, blob) {
                Ok(stream) => return Ok(Box::new(stream)),
                Err(BlobError::Interrupted(_)) if !is_second_try => {
                    // containerd was restarted since the connection was made.
                    self.stores().remove(&blob.endpoint);
                    is_second_try = true;
                }
                Err(BlobError::Interrupted(reason) | BlobError::Refused(reason)) => {
                    return Err(reason);
                }
            }
        }
    }
}

impl Store {
    async fn open(socket: &Path) -> Result<Store, String> {
        let connection = Connection::open(socket).await.map_err(|err| err.to_string())?;
        // Any namespace will do: the plugins are the same in all of them.
        let plugins = async {
            let namespace = connection.namespace("default")?;
            let request = PluginsRequest { filters: vec!["id==content".into()] };
            Ok::<_, Status>(namespace.introspection().plugins(request).await?.into_inner().plugins)
        };
        let root = plugins.await.ok().and_then(|plugins| {
            let mut stores =
                plugins.into_iter().filter(|plugin| plugin.r#type == "io.containerd.content.v1");
            let root = PathBuf::from(stores.next()?.exports.get("root")?);
            root.is_absolute().then_some(root)
        });
        Ok(Store { connection, root })
    }
}

/// Why a blob of this type cannot be compared with a directory. `None` if it can be.
pub(super) fn no_archive(media_type: &str) -> Option<String> {
    if media_type.ends_with("+encrypted") {
        Some("it is encrypted: only what was unpacked from it can be read".into())
    } else if media_type.contains(".erofs.") {
        Some("it is an EROFS image, not an archive".into())
    } else {
        None
    }
}

/// Why a blob of this type may be missing.
pub(super) fn missing(media_type: &str) -> String {
    let why = if media_type.contains(".foreign.") || media_type.contains(".nondistributable.") {
        "it is a layer that registries do not distribute"
    } else {
        "discard_unpacked_layers removes it after the unpack, and lazy snapshotters never fetch it"
    };
    format!("it is not in containerd's content store ({why})")
}

/// Opens containerd's own file, if it is a regular file of the right size. If it is not,
/// containerd is asked for the blob: driftd may be in another mount namespace.
fn open_file(root: &Path, digest: ManifestDigest, blob: &Blob) -> Option<DropBehind> {
    let path = root.join("blobs/sha256").join(digest.hex());
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).ok()?;
    let stat = rustix::fs::fstat(&file).ok()?;
    let is_as_expected = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && u64::try_from(stat.st_size) == Ok(blob.size);
    if !is_as_expected {
        return None;
    }
    let _ = fadvise(&file, 0, None, Advice::Sequential);
    Some(DropBehind { file: file.into(), read: 0, dropped: 0 })
}

/// A file whose content leaves the page cache as it is read.
struct DropBehind {
    file: File,
    read: u64,
    dropped: u64,
}

impl DropBehind {
    fn drop_behind(&mut self) {
        if let Some(length) = NonZeroU64::new(self.read - self.dropped) {
            let _ = fadvise(&self.file, self.dropped, Some(length), Advice::DontNeed);
            self.dropped = self.read;
        }
    }
}

impl Read for DropBehind {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.file.read(buffer)?;
        self.read += length as u64;
        if self.read - self.dropped >= STEP {
            self.drop_behind();
        }
        Ok(length)
    }
}

impl Drop for DropBehind {
    fn drop(&mut self) {
        self.drop_behind();
    }
}

/// A blob that containerd sends.
struct Stream {
    receiver: mpsc::Receiver<Result<Vec<u8>, BlobError>>,
    part: Vec<u8>,
    /// How many bytes of `part` were read.
    read: usize,
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.read == self.part.len() {
            match self.receiver.blocking_recv() {
                Some(Ok(part)) => (self.part, self.read) = (part, 0),
                Some(Err(BlobError::Interrupted(reason) | BlobError::Refused(reason))) => {
                    return Err(io::Error::other(format!("containerd: {reason}")));
                }
                None => return Ok(0),
            }
        }
        let length = buffer.len().min(self.part.len() - self.read);
        buffer[..length].copy_from_slice(&self.part[self.read..self.read + length]);
        self.read += length;
        Ok(length)
    }
}

async fn send(
    connection: &Connection,
    blob: &Blob,
    sender: &mpsc::Sender<Result<Vec<u8>, BlobError>>,
) -> Result<(), BlobError> {
    let late = |_| BlobError::Interrupted(format!("nothing came for {} s", PATIENCE.as_secs()));
    let gone = || BlobError::Refused(missing(&blob.media_type));
    // A deadline would apply to the whole blob.
    let namespace = connection.namespace(&blob.namespace)?.without_deadline();
    let request = ReadContentRequest { digest: blob.digest.clone(), offset: 0, size: 0 };
    let mut content = namespace.content();
    let answer = tokio::time::timeout(PATIENCE, content.read(request)).await.map_err(late)?;
    let Some(answer) = found(answer)? else { return Err(gone()) };
    let mut stream = answer.into_inner();
    loop {
        let message = tokio::time::timeout(PATIENCE, stream.message()).await.map_err(late)?;
        match found(message)? {
            Some(Some(part)) if part.data.is_empty() => (),
            Some(Some(part)) => {
                if sender.send(Ok(part.data)).await.is_err() {
                    // The reader needs no more.
                    return Ok(());
                }
            }
            Some(None) => return Ok(()),
            None => return Err(gone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_that_is_no_archive_has_a_reason() {
        let check = |media_type: &str, expected: Option<&str>| {
            let reason = no_archive(media_type);
            assert_eq!(reason.as_deref(), expected, "{media_type}");
        };
        check("application/vnd.oci.image.layer.v1.tar+zstd", None);
        check("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", None);
        check(
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            Some("it is encrypted: only what was unpacked from it can be read"),
        );
        check("application/vnd.erofs.layer.v1", Some("it is an EROFS image, not an archive"));
    }

    #[test]
    fn only_a_regular_file_of_the_right_size_is_read_directly() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = directory.path().join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        let digest = |number: u8| ManifestDigest([number; 32]);
        let blob = |number: u8| Blob {
            endpoint: "/none".into(),
            namespace: "default".into(),
            digest: digest(number).to_string(),
            media_type: "application/vnd.oci.image.layer.v1.tar".into(),
            size: 4,
        };
        std::fs::write(blobs.join(digest(1).hex()), b"blob").unwrap();
        std::fs::write(blobs.join(digest(2).hex()), b"other").unwrap();
        std::os::unix::fs::symlink(digest(1).hex(), blobs.join(digest(3).hex())).unwrap();
        let fifo = blobs.join(digest(4).hex());
        rustix::fs::mknodat(rustix::fs::CWD, fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
        let open = |number| open_file(directory.path(), digest(number), &blob(number));
        let mut content = String::new();
        open(1).unwrap().read_to_string(&mut content).unwrap();
        assert_eq!(content, "blob");
        for number in 2..=5 {
            assert!(open(number).is_none(), "{number}");
        }
    }

    #[test]
    fn a_containerd_that_is_not_there_is_a_reason() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let blobs = ContentBlobs::new(runtime.handle().clone());
        let blob = Blob {
            endpoint: "/no/such/socket".into(),
            namespace: "default".into(),
            digest: ManifestDigest([0; 32]).to_string(),
            media_type: String::new(),
            size: 0,
        };
        assert!(blobs.open(&blob).is_err());
        runtime.shutdown_background();
        assert_eq!(blobs.open(&blob).err().as_deref(), Some("driftd is being stopped"));
    }
}
