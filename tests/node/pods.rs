//! Containers of Kubernetes: images pulled from a registry through the Container Runtime
//! Interface, pods, and their sandboxes.

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::node::{KUBERNETES, Node, Setup, bench, names, wait_for};
use crate::programs::PAUSE;
use crate::{programs, registry, test_on};

const POD_NODE: Setup = Setup { driftd: "", cri: Some(""), own_runtime: false, unwatched: None };

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_on("a_cri_pull_is_recorded_once_under_its_three_names", POD_NODE, three_names),
        test_on("a_pod_has_its_baselines_and_its_drift_is_reported", POD_NODE, pod),
    ]
}

/// Puts the image into the registry, and returns the name to pull it by.
fn published_workbench() -> anyhow::Result<String> {
    registry::publish(&bench()?.workbench, "shop/workbench:1")
}

fn ready_baselines(node: &Node) -> anyhow::Result<Vec<Value>> {
    let mut baselines = node.answer(&["baseline", "ls"])?;
    baselines.retain(|baseline| baseline["state"] == "ready");
    Ok(baselines)
}

fn three_names(node: &Node) -> anyhow::Result<()> {
    let name = published_workbench()?;
    let (repository, _) = name.rsplit_once(':').context("a name has a tag")?;
    let digests = &bench()?.digests;
    let id = node.cri().pull(&name)?;
    assert_eq!(id, digests.config);

    let mut expected =
        [name.clone(), format!("{repository}@{}", digests.manifest), digests.config.clone()];
    expected.sort();
    let listed = node.ctr_in(KUBERNETES, &["images", "list", "-q"])?;
    let mut in_containerd: Vec<&str> = listed.lines().collect();
    in_containerd.sort_unstable();
    assert_eq!(in_containerd, expected);

    // One baseline has all three names. It is the one that the node began with: the same
    // layers in another namespace.
    wait_for("the names", || {
        let baselines = ready_baselines(node)?;
        let of_image: Vec<&Value> = baselines
            .iter()
            .filter(|baseline| {
                names(baseline).iter().any(|known| expected.contains(&(*known).to_owned()))
            })
            .collect();
        ensure!(of_image.len() < 2, "recorded more than once: {of_image:#?}");
        Ok(of_image
            .first()
            .is_some_and(|one| expected.iter().all(|name| names(one).contains(&name.as_str())))
            .then_some(()))
    })?;
    let baselines = ready_baselines(node)?;
    assert_eq!(baselines.len(), 1, "{baselines:#?}");
    Ok(())
}

fn pod(node: &Node) -> anyhow::Result<()> {
    let pause = node.path("pause.tar");
    programs::write_pause(&pause, &bench()?.payload)?;
    node.ctr_in(KUBERNETES, &["images", "import", &pause.to_string_lossy()])?;
    let name = published_workbench()?;
    node.cri().pull(&name)?;

    let (sandbox, container) = node.pod_of(&name)?;
    let known = node.answer(&["containers"])?;
    let by_id = |id: &str| {
        known.iter().find(|one| one["id"] == id).with_context(|| format!("no {id} in {known:#?}"))
    };
    let app = by_id(&container.id)?;
    assert_eq!(app["namespace"], KUBERNETES, "{app:#}");
    assert_eq!(app["pod"]["namespace"], "shop", "{app:#}");
    assert_eq!(app["pod"]["container"], "app", "{app:#}");
    assert_eq!(app["image"]["manifest_digest"], bench()?.digests.manifest.as_str(), "{app:#}");

    // The sandbox is a container of an image of one layer.
    wait_for("the sandbox to be watched", || {
        let known = node.answer(&["containers"])?;
        let sandbox = known.into_iter().find(|one| one["id"] == sandbox.as_str());
        Ok(sandbox.filter(|one| one["watched"] == true && one["baseline"] == "ready"))
    })?;
    let baselines = ready_baselines(node)?;
    let pause = baselines.iter().find(|baseline| names(baseline).contains(&PAUSE));
    let pause = pause.with_context(|| format!("no {PAUSE} in {baselines:#?}"))?;
    assert_eq!(pause["files"], 1, "{pause:#}");

    container.expect_silence()
}
