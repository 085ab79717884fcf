//! Reads baselines from the daemon, or from a directory without a daemon.
//!
//! The other files of this folder do not know which of both it is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_stream::StreamExt as _;

use crate::api::{baselines, proto};
use crate::baseline::{Store, diff};
use crate::cli::client::{Client, call, explain, talk};
use crate::health::Health;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Reading {
    /// Read this directory of baselines without a daemon (nothing in it is
    /// changed: it may be a running daemon's)
    #[arg(long, value_name = "DIRECTORY")]
    store: Option<PathBuf>,
}

impl Reading {
    pub(super) fn open(&self, socket: &Path) -> anyhow::Result<Source> {
        Ok(match &self.store {
            None => Source::Daemon(socket.into()),
            Some(directory) => {
                let store = Store::open_to_read(directory, Arc::new(Health::default()))?;
                Source::Store(Box::new(store))
            }
        })
    }
}

#[derive(Debug)]
pub(super) enum Source {
    Daemon(PathBuf),
    Store(Box<Store>),
}

impl Source {
    /// All baselines, or the one that `image` names.
    pub(super) fn list(&self, image: &str) -> anyhow::Result<Vec<proto::Baseline>> {
        match self {
            Source::Store(store) => Ok(baselines::list(store, image)?),
            Source::Daemon(socket) => {
                let request = proto::ListBaselinesRequest { image: image.to_owned() };
                Ok(call(socket.as_path(), request, Client::list_baselines)?.baselines)
            }
        }
    }

    /// Every file of an image, sorted by path.
    pub(super) fn files(
        &self,
        image: &str,
        mut each: impl FnMut(proto::BaselineFile) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        match self {
            Source::Store(store) => {
                let image = baselines::open(store, image)?;
                image.files().map(baselines::file_to_proto).try_for_each(each)
            }
            Source::Daemon(socket) => talk(socket.as_path(), |mut client| async move {
                let request = proto::ExportBaselineRequest { image: image.to_owned() };
                let mut files =
                    client.export_baseline(request).await.map_err(explain)?.into_inner();
                while let Some(file) = files.next().await {
                    each(file.map_err(explain)?)?;
                }
                Ok(())
            }),
        }
    }

    /// The differences from image `a` to image `b`.
    pub(super) fn differences(
        &self,
        a: &str,
        b: &str,
    ) -> anyhow::Result<Vec<proto::BaselineDifference>> {
        match self {
            Source::Store(store) => {
                let (a, b) = (baselines::open(store, a)?, baselines::open(store, b)?);
                Ok(diff(&a, &b).map(baselines::difference_to_proto).collect())
            }
            Source::Daemon(socket) => talk(socket.as_path(), |mut client| async move {
                let request = proto::DiffBaselinesRequest { a: a.to_owned(), b: b.to_owned() };
                let mut stream =
                    client.diff_baselines(request).await.map_err(explain)?.into_inner();
                let mut differences = Vec::new();
                while let Some(difference) = stream.next().await {
                    differences.push(difference.map_err(explain)?);
                }
                Ok(differences)
            }),
        }
    }
}
