//! Patterns of images: which repositories, tags and manifests a rule is for.
//!
//! Names are completed as Docker and containerd complete them, on both sides: `nginx` is
//! `docker.io/library/nginx`. So a rule for `nginx` is not for the `nginx` of another registry.

use std::borrow::Cow;

use globset::{GlobBuilder, GlobMatcher};

use crate::model::{ImageReference, ManifestDigest};

#[derive(Clone, Debug)]
pub(super) enum ImagePattern {
    Manifest(ManifestDigest),
    Name {
        repository: Repository,
        /// `None`: any tag, or none.
        tag: Option<String>,
    },
}

#[derive(Clone, Debug)]
pub(super) enum Repository {
    Whole(String),
    Like(Box<GlobMatcher>),
}

impl ImagePattern {
    pub(super) fn new(text: &str) -> Result<ImagePattern, String> {
        if text.starts_with("sha256:") {
            let digest = text.parse().map(ImagePattern::Manifest);
            return digest.map_err(|_| format!("`image`: `{text}` is no digest"));
        }
        if text.is_empty() || text.contains('@') {
            return Err(format!("`image`: `{text}` is neither a name nor a digest"));
        }
        let (repository, tag) = split(text);
        let repository = complete(repository).into_owned();
        let repository = match repository.contains(['*', '?', '[', '{']) {
            false => Repository::Whole(repository),
            true => {
                let glob = GlobBuilder::new(&repository).literal_separator(true).build();
                let glob =
                    glob.map_err(|err| format!("`image`: the pattern `{text}` is wrong: {err}"))?;
                Repository::Like(Box::new(glob.compile_matcher()))
            }
        };
        Ok(ImagePattern::Name { repository, tag: tag.map(ToOwned::to_owned) })
    }

    /// The whole name of the repository, if the pattern names exactly one.
    pub(super) fn whole_name(&self) -> Option<&str> {
        match self {
            ImagePattern::Name { repository: Repository::Whole(name), .. } => Some(name),
            _ => None,
        }
    }

    pub(super) fn matches(&self, image: &ImageReference) -> bool {
        match self {
            ImagePattern::Manifest(digest) => image.manifest_digest == Some(*digest),
            ImagePattern::Name { repository, tag } => {
                let Some(name) = image.name.as_deref() else { return false };
                let (of_image, tag_of_image) = split(name);
                let of_image = complete(of_image);
                let is_it = match repository {
                    Repository::Whole(whole) => *whole == of_image,
                    Repository::Like(glob) => glob.is_match(&*of_image),
                };
                is_it && tag.as_deref().is_none_or(|tag| tag_of_image == Some(tag))
            }
        }
    }
}

/// The whole name of an image's repository.
pub(super) fn whole_name(image: &str) -> Cow<'_, str> {
    complete(split(image).0)
}

/// The repository and the tag of an image's name. A digest behind it is left out.
fn split(name: &str) -> (&str, Option<&str>) {
    let name = name.split_once('@').map_or(name, |(name, _)| name);
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    match name[last..].rfind(':') {
        Some(colon) => (&name[..last + colon], Some(&name[last + colon + 1..])),
        None => (name, None),
    }
}

/// The whole name of a repository.
fn complete(repository: &str) -> Cow<'_, str> {
    let (first, rest) = repository.split_once('/').unwrap_or(("", repository));
    let is_registry = first.contains(['.', ':', '*', '?', '[', '{']) || first == "localhost";
    match (is_registry, first) {
        (true, "index.docker.io") => format!("docker.io/{rest}").into(),
        (true, _) => repository.into(),
        (false, "") => format!("docker.io/library/{repository}").into(),
        (false, _) => format!("docker.io/{repository}").into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pattern: &str, name: &str, expected: bool) {
        let image = ImageReference { name: Some(name.to_owned()), ..ImageReference::default() };
        assert_eq!(
            ImagePattern::new(pattern).unwrap().matches(&image),
            expected,
            "{pattern} {name}"
        );
    }

    #[test]
    fn a_name_is_complete_on_both_sides() {
        check("nginx", "docker.io/library/nginx:1.27", true);
        check("nginx:1.27", "docker.io/library/nginx:1.27", true);
        check("nginx:1.27", "docker.io/library/nginx:1.26", false);
        check("docker.io/library/nginx", "nginx:latest", true);
        check("grafana/grafana", "docker.io/grafana/grafana:11", true);
        check("nginx", "evil.example/nginx", false);
        check("nginx", "evil.example/library/nginx", false);
        check("registry.example/app", "registry.example/app:7@sha256:00", true);
        check("registry.example/app", "registry.example/app-canary:7", false);
        check("registry.example:5000/app", "registry.example:5000/app:7", true);
        check("localhost/app:1", "localhost/app:1", true);
    }

    #[test]
    fn a_star_stays_between_two_slashes() {
        check("registry.example/*", "registry.example/app:7", true);
        check("registry.example/*", "registry.example/team/app:7", false);
        check("registry.example/**", "registry.example/team/app:7", true);
        check("*.example/app", "evil.example.net/app", false);
    }

    #[test]
    fn an_image_without_a_name_is_no_named_one() {
        let pattern = ImagePattern::new("nginx").unwrap();
        assert!(!pattern.matches(&ImageReference::default()));
        for wrong in ["sha256:12", "app@sha256:12", "registry.example/["] {
            let err = ImagePattern::new(wrong).unwrap_err();
            assert!(err.contains(&format!("`{wrong}`")), "{err}");
        }
    }
}
