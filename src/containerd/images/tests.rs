//! Tests of the images' memory: waiting for an unpack, and archives of layers.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::error::ImageError;
use super::names::{ImageState, Key, UNPACK_PATIENCE};
use super::state::{Facts, Images, learn_blobs};
use crate::baseline::{ImageName, RecordRequest};
use crate::containerd::manifests::Descriptor;
use crate::containerd::recording::Recording;
use crate::model::{ChainId, DiffId, LayerId, ManifestDigest};

/// No recording may be requested.
struct NoRecorder;

impl Recording for NoRecorder {
    fn submit(&self, job: RecordRequest) {
        panic!("{job:?}");
    }

    fn unrecorded(&self, layers: &[LayerId]) -> Vec<LayerId> {
        layers.to_vec()
    }

    fn image_names(&self, _endpoint: &str, _listed: Vec<(ImageName, ChainId)>) {}

    fn image_removed(&self, _namespace: &str, _name: &str) {}
}

fn descriptor(digest: &str) -> Descriptor {
    Descriptor::of(containerd_client::types::Descriptor {
        digest: digest.into(),
        ..Default::default()
    })
}

fn facts(diff_ids: &[DiffId], archives: &[&str]) -> Facts {
    Facts {
        manifest_digest: ManifestDigest([7; 32]),
        diff_ids: diff_ids.to_vec(),
        chain: ChainId::of_layers(diff_ids),
        blobs: archives.iter().map(|digest| descriptor(digest)).collect(),
        health_check: None,
    }
}

#[test]
fn an_image_waits_for_its_unpack_as_long_as_that_goes_on() {
    let images = Images::new("e".into(), Arc::new(NoRecorder), Arc::default());
    let facts = facts(&[DiffId([1; 32]), DiffId([2; 32])], &[]);
    let (bottom, top) = (facts.chain[0], facts.chain[1]);
    let key = Key { namespace: "default".into(), name: "web".into() };
    {
        let mut state = images.state();
        state.facts.insert("target".into(), Arc::new(facts));
        let mut image = ImageState::new();
        image.target = Some(descriptor("target"));
        state.names.insert(key.clone(), image);
    }
    let long_ago = || {
        let since = Instant::now().checked_sub(UNPACK_PATIENCE).unwrap();
        images.state().names.get_mut(&key).unwrap().waits_since = since;
    };
    assert!(!images.wait_for(&key, top), "it may be about to be unpacked");
    long_ago();
    assert!(images.wait_for(&key, top), "nothing unpacks it");
    // A layer below: more will come.
    assert_eq!(images.waiting_for("default", bottom), [""; 0]);
    assert!(!images.wait_for(&key, top));
    assert_eq!(images.waiting_for("other", top), [""; 0], "another namespace's");
    assert_eq!(images.waiting_for("default", top), ["web"]);
    // Its archives are missing. The time that it has waited stays.
    long_ago();
    let err = ImageError::NotUnpacked { chain_id: top, reason: Some("gone".into()) };
    images.conclude(&key, &Err(err), &descriptor("target"));
    assert_eq!(images.problems()[0].reason, "gone");
    assert!(images.wait_for(&key, top));
    assert!(!images.wait_for(&key, bottom), "the name points at another image now");
}

#[test]
fn the_archive_that_is_named_for_a_layer_does_not_depend_on_the_order() {
    let diff_ids = [DiffId([1; 32])];
    let (gzip, zstd) = (facts(&diff_ids, &["sha256:b"]), facts(&diff_ids, &["sha256:a"]));
    let namespace: Arc<str> = "default".into();
    let named = |order: [&Facts; 2]| {
        let mut blobs = HashMap::new();
        for facts in order {
            learn_blobs(&mut blobs, &"e".into(), &namespace, facts);
        }
        blobs[&(Arc::clone(&namespace), gzip.chain[0])].digest.clone()
    };
    assert_eq!(named([&gzip, &zstd]), "sha256:a");
    assert_eq!(named([&zstd, &gzip]), "sha256:a");
}
