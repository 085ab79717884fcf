//! Images in archives, as a directory and as a tar file.

use std::fs;
use std::io::Write as _;

use super::*;

/// The files of an archive, before it is known how they are packed.
#[derive(Clone, Default)]
struct Files(Vec<(String, Vec<u8>)>);

impl Files {
    fn put(&mut self, name: &str, content: impl AsRef<[u8]>) {
        self.0.push((name.into(), content.as_ref().into()));
    }

    /// A blob, and the descriptor of it.
    fn blob(&mut self, content: impl AsRef<[u8]>) -> String {
        let digest = Sha256Hash(Sha256::digest(content.as_ref()).into());
        self.put(&format!("blobs/sha256/{digest}"), &content);
        format!(r#"{{"digest":"sha256:{digest}","size":{}}}"#, content.as_ref().len())
    }

    /// A manifest with a config of these layers.
    fn image(&mut self, layers: &[&[u8]]) -> String {
        let diff_ids: Vec<String> =
            layers.iter().map(|layer| format!("\"{}\"", diff_id(layer))).collect();
        let blobs: Vec<String> = layers.iter().map(|layer| self.blob(layer)).collect();
        let config = self.blob(config(&diff_ids));
        self.blob(format!(r#"{{"config":{config},"layers":[{}]}}"#, blobs.join(",")))
    }

    fn index(&mut self, entries: &[String]) {
        self.put("index.json", format!(r#"{{"manifests":[{}]}}"#, entries.join(",")));
    }

    fn in_directory(&self) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in &self.0 {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        directory
    }

    fn in_tar(&self) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, content) in &self.0 {
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, format!("./{name}"), &content[..]).unwrap();
        }
        archive.into_inner().unwrap()
    }
}

fn config(diff_ids: &[String]) -> String {
    format!(r#"{{"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#, diff_ids.join(","))
}

fn diff_id(layer: &[u8]) -> DiffId {
    DiffId(Sha256::digest(layer).into())
}

/// A descriptor with more fields.
fn with(descriptor: &str, fields: &str) -> String {
    format!("{},{fields}}}", descriptor.strip_suffix('}').unwrap())
}

fn open_bytes(bytes: &[u8]) -> Result<Archive, Error> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    open(file.path())
}

/// Opens an archive as a directory and as a file: both give the same images.
#[track_caller]
fn opened(files: &Files) -> (tempfile::TempDir, [Archive; 2]) {
    let directory = files.in_directory();
    let archives = [open(directory.path()).unwrap(), open_bytes(&files.in_tar()).unwrap()];
    assert_eq!(archives[0].images(), archives[1].images());
    (directory, archives)
}

#[track_caller]
fn check_bad(files: &Files, expected: &str) {
    let directory = files.in_directory();
    for error in [open(directory.path()), open_bytes(&files.in_tar())].map(Result::unwrap_err) {
        assert!(error.to_string().ends_with(expected), "{error}");
    }
}

fn contents(archive: &Archive, image: &ArchiveImage) -> Vec<Vec<u8>> {
    let read = |(_, blob): &(DiffId, ArchiveBlob)| {
        let mut bytes = Vec::new();
        archive.layer(blob).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    };
    image.layers.iter().map(read).collect()
}

#[test]
fn an_oci_layout_gives_its_images_and_their_layers() {
    let mut files = Files::default();
    let first = files.image(&[b"one", b"two"]);
    let second = files.image(&[b"three"]);
    let name = |name| format!(r#""annotations":{{"org.opencontainers.image.ref.name":"{name}"}}"#);
    files.index(&[
        with(&first, &name("a:1")),
        with(&second, &name("b:1")),
        with(&first, &name("c:1")),
    ]);
    let (_directory, archives) = opened(&files);
    for archive in archives {
        let [one, other] = archive.images() else { panic!("{:?}", archive.images()) };
        assert_eq!(one.names, ["a:1", "c:1"]);
        assert_eq!(other.names, ["b:1"]);
        assert_eq!(contents(&archive, one), [&b"one"[..], b"two"]);
        assert_eq!(one.layers[1].0, diff_id(b"two"));
        assert_eq!(one.chain_id(), ChainId::of_layers(&[diff_id(b"one"), diff_id(b"two")]).pop());
        let digest: serde_json::Value = serde_json::from_str(&first).unwrap();
        assert_eq!(one.manifest_digest.unwrap().to_string(), digest["digest"]);
    }
}

#[test]
fn this_platforms_image_is_taken_and_attestations_are_none() {
    let (os, architecture) = oci::host();
    let platform = |os: &str, architecture: &str| {
        format!(r#""platform":{{"os":"{os}","architecture":"{architecture}"}}"#)
    };
    for nested in [false, true] {
        let mut files = Files::default();
        let other = files.image(&[b"other"]);
        let ours = files.image(&[b"ours"]);
        let attestation = files.image(&[b"provenance"]);
        let entries = [
            with(&attestation, &platform("unknown", "unknown")),
            with(&other, &platform("plan9", "mips")),
            with(&ours, &platform(os, architecture)),
        ];
        if nested {
            let index = files.blob(format!(r#"{{"manifests":[{}]}}"#, entries.join(",")));
            files.index(&[index]);
        } else {
            files.index(&entries);
        }
        let (_directory, archives) = opened(&files);
        for archive in archives {
            let [image] = archive.images() else { panic!("{:?}", archive.images()) };
            assert_eq!(contents(&archive, image), [b"ours"]);
            assert_eq!(image.names, [""; 0]);
        }
    }
}

#[test]
fn docker_save_is_read_in_its_old_layout() {
    let mut files = Files::default();
    let config = config(&[format!("\"{}\"", diff_id(b"one")), format!("\"{}\"", diff_id(b"one"))]);
    let name = format!("{}.json", Sha256Hash(Sha256::digest(&config).into()));
    files.put(&name, &config);
    files.put("1/layer.tar", b"one");
    files.put(
        "manifest.json",
        format!(
            r#"[{{"Config":"{name}","RepoTags":["a:1"],"Layers":["1/layer.tar","2/layer.tar"]}}]"#
        ),
    );
    // A layer that is there already is a link to where it is.
    let mut archive = tar::Builder::new(files.in_tar());
    let packed = archive.get_mut();
    packed.truncate(packed.len() - 1024);
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    archive.append_link(&mut header, "2/layer.tar", "../1/layer.tar").unwrap();
    let archive = open_bytes(&archive.into_inner().unwrap()).unwrap();
    let [image] = archive.images() else { panic!("{:?}", archive.images()) };
    assert_eq!((&image.names[..], image.manifest_digest), (&["a:1".to_owned()][..], None));
    assert_eq!(contents(&archive, image), [b"one", b"one"]);
    assert_eq!(image.layers[0].1.to_string(), "1/layer.tar");

    files.0[0].1.push(b' ');
    let error = open_bytes(&files.in_tar()).unwrap_err().to_string();
    assert!(error.contains("has another digest than its name states"), "{error}");
}

#[test]
fn documents_that_are_not_what_their_digest_says_are_refused() {
    let mut files = Files::default();
    let image = files.image(&[b"one"]);
    files.index(&[image]);
    for changed in 1..3 {
        let mut files = files.clone();
        files.0[changed].1.push(b' ');
        let digest = Sha256Hash(Sha256::digest(&files.0[changed].1).into());
        check_bad(&files, &format!("has another digest than its name states: sha256:{digest}"));
    }
    for lost in 1..3 {
        let mut files = files.clone();
        files.0.remove(lost);
        check_bad(&files, ["", "as its config", "though an index names it"][lost]);
    }
    let mut files = Files::default();
    let layer = files.blob(b"one");
    let config = files.blob(config(&[]));
    let manifest = files.blob(format!(r#"{{"config":{config},"layers":[{layer}]}}"#));
    files.index(&[manifest]);
    check_bad(&files, "names 0 layers where its manifest names 1");
}

#[test]
fn what_holds_no_image_is_refused() {
    let error = open(Path::new("/nonexistent/archive")).unwrap_err().to_string();
    assert_eq!(error, "cannot read /nonexistent/archive");
    check_bad(&Files::default(), "it has no index.json and no manifest.json");
    let mut files = Files::default();
    files.index(&[]);
    let (os, architecture) = oci::host();
    check_bad(&files, &format!("has no image for {os}/{architecture}"));
    let mut files = Files::default();
    files.put("index.json", vec![b' '; 9 << 20]);
    check_bad(&files, "index.json is larger than 8 MiB");
    let mut files = Files::default();
    files.put("manifest.json", b"{}");
    let error = open_bytes(&files.in_tar()).unwrap_err().to_string();
    assert!(error.contains("manifest.json is no list of images"), "{error}");
    let error = open_bytes(b"\x1f\x8b\x08 compressed").unwrap_err().to_string();
    assert!(error.contains("(decompress it first: gzip -dk /"), "{error}");
}

#[test]
fn an_archive_cut_short_is_refused() {
    let mut files = Files::default();
    let image = files.image(&[&[7; 5000]]);
    files.index(&[image]);
    let whole = files.in_tar();
    let error = open_bytes(&whole[..3000]).unwrap_err().to_string();
    assert!(error.contains("is cut short: the archive is truncated"), "{error}");
}

#[test]
fn nothing_leads_out_of_a_layout() {
    let mut files = Files::default();
    let image = files.image(&[b"one"]);
    files.index(&[image]);
    let directory = files.in_directory();
    let outside = tempfile::NamedTempFile::new().unwrap();
    let index = directory.path().join("index.json");
    fs::remove_file(&index).unwrap();
    std::os::unix::fs::symlink(outside.path(), &index).unwrap();
    let error = open(directory.path()).unwrap_err().to_string();
    assert!(
        error.contains("index.json cannot be opened: Too many levels of symbolic links"),
        "{error}"
    );
    fs::remove_file(&index).unwrap();
    // A process that opens a FIFO to read waits for a writer.
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &index,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let error = open(directory.path()).unwrap_err().to_string();
    assert!(error.ends_with("index.json is no regular file"), "{error}");

    for target in ["/etc/passwd", "../etc/passwd", "a/../../x"] {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        archive.append_link(&mut header, "index.json", target).unwrap();
        let error = open_bytes(&archive.into_inner().unwrap()).unwrap_err().to_string();
        assert!(error.ends_with("index.json is a link out of the archive"), "{error}");
    }
    let mut files = Files::default();
    files.put("manifest.json", br#"[{"Config":"../../etc/passwd","Layers":[]}]"#);
    check_bad(&files, "../../etc/passwd is a name outside of the archive");
}
