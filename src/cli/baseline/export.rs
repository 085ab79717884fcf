//! `driftd baseline export`: an image's files in formats that other programs read.
//!
//! The same baseline always gives the same bytes: nothing here may read the clock.

use std::collections::BTreeSet;
use std::io::{self, Write};

use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Value, json};

use super::file::{FileJson, file_json};
use super::known::{BaselineJson, named};
use super::source::Source;
use crate::api::proto;
use crate::cli::exit::Exit;
use crate::cli::output::json_line;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum ExportFormat {
    /// Hashes of regular files, for `b3sum --check` in a root filesystem
    #[default]
    B3sum,
    /// One JSON object per line: every file with all that is known of it
    Jsonl,
    /// A CycloneDX 1.6 BOM of the image: its regular files with their hashes
    Cyclonedx,
    /// An unsigned in-toto statement about the image, with every file
    InToto,
}

/// The type of our statement's predicate. It is a name only, and nothing can be fetched
/// there: `docs/baseline-exports.md` defines it.
const PREDICATE_TYPE: &str = "urn:driftd:baseline:v1";

/// Files that were left out, or that not every reader understands.
#[derive(Debug, Default, PartialEq, Eq)]
struct Shortfall {
    not_utf8: u64,
    end_in_return: u64,
}

pub(super) fn run(source: &Source, image: &str, format: ExportFormat) -> anyhow::Result<Exit> {
    let baseline = named(source, image)?;
    // By its chain ID from here on, because the name may move to another image meanwhile.
    let files = |each: &mut dyn FnMut(proto::BaselineFile) -> anyhow::Result<()>| {
        source.files(&baseline.chain_id, each)
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    let mut shortfall = Shortfall::default();
    match format {
        ExportFormat::B3sum => files(&mut |file| {
            if let Some(line) = b3sum_line(&file, &mut shortfall) {
                out.write_all(line.as_bytes())?;
            }
            Ok(())
        })?,
        ExportFormat::Jsonl => files(&mut |file| {
            let line = FileLine { schema: "driftd.baseline_file/v1", file: file_json(file)? };
            Ok(out.write_all(json_line(&line)?.as_bytes())?)
        })?,
        ExportFormat::Cyclonedx => {
            let mut list = Embedded::start(&mut out, &bom(&baseline), "components")?;
            files(&mut |file| match file.blake3.is_empty() {
                true => Ok(()),
                false => list.item(&component(&file_json(file)?)),
            })?;
            list.end("")?;
        }
        ExportFormat::InToto => {
            let (statement, predicate) = statement(&baseline)?;
            out.write_all(open_object(&statement)?.as_bytes())?;
            out.write_all(b",\"predicate\":")?;
            let mut list = Embedded::start(&mut out, &predicate, "files")?;
            files(&mut |file| list.item(&file_json(file)?))?;
            list.end("}")?;
        }
    }
    out.flush()?;
    shortfall.warn();
    Ok(Exit::Clean)
}

// ---- b3sum

/// A line as `b3sum` itself prints it, so that `b3sum --check` reads it back;
/// `None` for what has no hash, and for a name that b3sum could not read.
fn b3sum_line(file: &proto::BaselineFile, shortfall: &mut Shortfall) -> Option<String> {
    if file.blake3.is_empty() {
        return None;
    }
    // b3sum refuses the replacement character: several names would become one.
    let path = str::from_utf8(&file.path).ok();
    let Some(path) = path.filter(|path| !path.contains(char::REPLACEMENT_CHARACTER)) else {
        shortfall.not_utf8 += 1;
        return None;
    };
    let mut escaped = path.replace('\\', "\\\\").replace('\n', "\\n");
    // Old versions know no escape for a carriage return, new ones take it off the
    // end of a line. Anywhere else, all read it as it is.
    if path.ends_with('\r') {
        shortfall.end_in_return += 1;
        escaped = escaped.replace('\r', "\\r");
    }
    let mark = if escaped == path { "" } else { "\\" };
    Some(format!("{mark}{}  .{escaped}\n", file.blake3))
}

impl Shortfall {
    fn warn(&self) {
        let Shortfall { not_utf8, end_in_return } = self;
        if *not_utf8 > 0 {
            eprintln!(
                "warning: {not_utf8} files were left out, because b3sum cannot check names that \
                 are not UTF-8 or hold U+FFFD (use -o jsonl)"
            );
        }
        if *end_in_return > 0 {
            eprintln!(
                "warning: {end_in_return} names end in a carriage return, which b3sum reads only \
                 if it is newer than 1.2 or so (use -o jsonl)"
            );
        }
    }
}

// ---- JSON

#[derive(Serialize)]
struct FileLine {
    schema: &'static str,
    #[serde(flatten)]
    file: FileJson,
}

/// A JSON object without its closing brace.
fn open_object(object: &Value) -> anyhow::Result<String> {
    let mut text = serde_json::to_string(object)?;
    anyhow::ensure!(text.len() > 2 && text.pop() == Some('}'), "an object with fields");
    Ok(text)
}

/// Writes a JSON object whose last field is a list that is too long to be held in memory. Each
/// item has a line.
struct Embedded<'a, W> {
    out: &'a mut W,
    is_empty: bool,
}

impl<'a, W: Write> Embedded<'a, W> {
    fn start(out: &'a mut W, head: &Value, field: &str) -> anyhow::Result<Embedded<'a, W>> {
        write!(out, "{},\"{field}\":[", open_object(head)?)?;
        Ok(Embedded { out, is_empty: true })
    }

    fn item<T: Serialize>(&mut self, item: &T) -> anyhow::Result<()> {
        let separator = if self.is_empty { "\n" } else { ",\n" };
        self.is_empty = false;
        self.out.write_all(separator.as_bytes())?;
        Ok(serde_json::to_writer(&mut *self.out, item)?)
    }

    fn end(self, closing: &str) -> anyhow::Result<()> {
        Ok(writeln!(self.out, "\n]}}{closing}")?)
    }
}

// ---- CycloneDX

/// The BOM without its components.
fn bom(baseline: &BaselineJson) -> Value {
    let digest = baseline.manifest_digest.as_deref();
    let name = baseline.name();
    let mut image = json!({
        "type": "container",
        "bom-ref": baseline.chain_id,
        "name": name,
        "version": digest.unwrap_or(&baseline.chain_id),
    });
    if let Some(hex) = digest.and_then(|digest| digest.strip_prefix("sha256:")) {
        image["hashes"] = json!([{"alg": "SHA-256", "content": hex}]);
    }
    if let (Some(name), Some(digest)) = (baseline.names.first(), digest) {
        image["purl"] = purl(name, digest).into();
    }
    let property = |name: &str, value: &str| json!({"name": name, "value": value});
    let mut properties = vec![property("driftd:chain_id", &baseline.chain_id)];
    properties.extend(baseline.names.iter().map(|name| property("driftd:image", name)));
    if let Some(known_by) = &baseline.known_by {
        properties.push(property("driftd:known_by", known_by));
    }
    for proof in &baseline.proofs {
        properties.push(property("driftd:layer", &proof.layer));
    }
    image["properties"] = properties.into();
    json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": serial_number(&image),
        "version": 1,
        "metadata": {
            "tools": {"components": [{
                "type": "application",
                "name": "driftd",
                "version": env!("CARGO_PKG_VERSION"),
            }]},
            "component": image,
        },
    })
}

/// The serial number, a UUID made of the content: the same BOM has the same number. Version 8
/// leaves the bits to us.
fn serial_number(image: &Value) -> String {
    let hash = blake3::hash(image.to_string().as_bytes());
    let mut bytes: [u8; 16] = *hash.as_bytes().first_chunk().expect("a hash has 32 bytes");
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = crate::model::finding::hex(&bytes);
    let groups = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    format!("urn:uuid:{}", groups.join("-"))
}

/// An image's package URL, of the type `oci`.
fn purl(name: &str, digest: &str) -> String {
    let (repository, tag) = match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, Some(tag)),
        _ => (name, None),
    };
    let (repository, tag) = match repository.rsplit_once('@') {
        // NAME@sha256:…
        Some((repository, _)) => (repository, None),
        None => (repository, tag),
    };
    let last = repository.rsplit('/').next().unwrap_or(repository).to_lowercase();
    let mut purl = format!("pkg:oci/{}@{}", percent(&last), percent(digest));
    purl.push_str(&format!("?repository_url={}", percent(repository)));
    if let Some(tag) = tag {
        purl.push_str(&format!("&tag={}", percent(tag)));
    }
    purl
}

fn percent(text: &str) -> String {
    percent_bytes(text.as_bytes())
}

fn percent_bytes(bytes: &[u8]) -> String {
    let mut encoded = String::with_capacity(bytes.len());
    for &byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'-' | b'_' | b'~' | b'/' => {
                encoded.push(char::from(byte));
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

fn component(file: &FileJson) -> Value {
    let path = serde_json::to_value(&file.path).unwrap_or_default();
    let property = |name: &str, value: &str| json!({"name": name, "value": value});
    let mut properties = vec![
        property("driftd:mode", &file.mode),
        property("driftd:owner", &format!("{}:{}", file.uid, file.gid)),
        property("driftd:size", &file.size.to_string()),
        property("driftd:type", &file.format),
    ];
    if let Some(layer) = &file.layer {
        properties.push(property("driftd:layer", layer));
    }
    if let Some(capability) = &file.capability {
        properties.push(property("driftd:capability", capability));
    }
    // Made of the bytes, because references must differ and two names may have the same text.
    let reference = format!("file:{}", percent_bytes(file.path.as_bytes()));
    if let Some(bytes) = path["path_bytes"].as_str() {
        properties.push(property("driftd:path_bytes", bytes));
    }
    json!({
        "type": "file",
        "bom-ref": reference,
        "name": path["path"],
        "hashes": [{"alg": "BLAKE3", "content": file.blake3}],
        "properties": properties,
    })
}

// ---- in-toto

/// The statement without its predicate, and the predicate without its files.
fn statement(baseline: &BaselineJson) -> anyhow::Result<(Value, Value)> {
    let subject = subjects(baseline)?;
    let statement = json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": subject,
        "predicateType": PREDICATE_TYPE,
    });
    let layers: Vec<Value> = baseline
        .proofs
        .iter()
        .map(|proof| json!({"id": proof.layer, "known_by": proof.known_by, "reason": proof.reason}))
        .collect();
    let predicate = json!({
        "chain_id": baseline.chain_id,
        "manifest_digest": baseline.manifest_digest,
        "known_by": baseline.known_by,
        "layers": layers,
        "totals": {"files": baseline.files, "bytes": baseline.bytes},
    });
    Ok((statement, predicate))
}

/// What the statement is about: the image's manifest under all of its names or, if the
/// manifest is not known, the uncompressed archives of its layers.
fn subjects(baseline: &BaselineJson) -> anyhow::Result<Vec<Value>> {
    let digest = baseline.manifest_digest.as_deref().and_then(|text| text.strip_prefix("sha256:"));
    let subject = |name: &str, hex: &str| json!({"name": name, "digest": {"sha256": hex}});
    let subjects: Vec<Value> = match digest {
        Some(hex) if baseline.names.is_empty() => vec![json!({"digest": {"sha256": hex}})],
        Some(hex) => baseline.names.iter().map(|name| subject(name, hex)).collect(),
        None => {
            let diff_ids = baseline.layers.iter().map(|layer| layer.strip_prefix("sha256:"));
            let all: Option<Vec<&str>> = diff_ids.collect();
            let all = all.ok_or_else(|| {
                anyhow::anyhow!(
                    "neither the image's manifest nor all of its diff IDs are known: there is no \
                     digest that a statement could be about (use -o jsonl)"
                )
            })?;
            // An image may hold a layer twice; a statement names it once.
            let all: BTreeSet<&str> = all.into_iter().collect();
            all.into_iter().map(|hex| subject(&format!("layer sha256:{hex}"), hex)).collect()
        }
    };
    Ok(subjects)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(path: &[u8], expected: Option<&str>) {
        let file = proto::BaselineFile {
            path: path.to_vec(),
            blake3: "ab".into(),
            ..proto::BaselineFile::default()
        };
        let line = b3sum_line(&file, &mut Shortfall::default());
        assert_eq!(line.as_deref(), expected, "{path:?}");
    }

    #[test]
    fn lines_are_those_of_b3sum() {
        check(b"/usr/bin/ls", Some("ab  ./usr/bin/ls\n"));
        check(b"/a\\b\nc\rd", Some("\\ab  ./a\\\\b\\nc\rd\n"));
        check(b"/a\rb", Some("ab  ./a\rb\n"));
        check(b"/end\r", Some("\\ab  ./end\\r\n"));
        check("/ü".as_bytes(), Some("ab  ./ü\n"));
        check(b"/\xff", None);
        check("/\u{fffd}".as_bytes(), None);
    }

    #[test]
    fn an_image_has_its_package_url() {
        let check = |name: &str, expected: &str| {
            assert_eq!(purl(name, "sha256:ab"), format!("pkg:oci/{expected}"), "{name}");
        };
        check(
            "docker.io/library/nginx:1.27",
            "nginx@sha256%3Aab?repository_url=docker.io/library/nginx&tag=1.27",
        );
        check(
            "localhost:5000/Team/App",
            "app@sha256%3Aab?repository_url=localhost%3A5000/Team/App",
        );
        check("r.example/app@sha256:cd", "app@sha256%3Aab?repository_url=r.example/app");
        check("odd name", "odd%20name@sha256%3Aab?repository_url=odd%20name");
    }

    #[test]
    fn a_serial_number_is_a_uuid_of_the_content() {
        let number = serial_number(&json!({"name": "a"}));
        let hex = number.strip_prefix("urn:uuid:").unwrap();
        let lengths: Vec<usize> = hex.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12]);
        assert_eq!(&hex[14..15], "8");
        assert!(matches!(&hex[19..20], "8" | "9" | "a" | "b"), "{number}");
        assert_eq!(number, serial_number(&json!({"name": "a"})));
        assert_ne!(number, serial_number(&json!({"name": "b"})));
    }
}
