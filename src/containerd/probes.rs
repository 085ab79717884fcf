//! The programs that run in a container by rule: health checks and hooks, as its image, its
//! engine or its pod declares them. Pure.
//!
//! All of this is text that the author of an image or a pod wrote. Text that cannot be read or
//! is too long declares nothing, so that what it runs is reported as a session. It is never
//! cut, because half a command is another command.
//!
//! A health check is `None` where none is mentioned, and empty where it is declared that there
//! is none.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::model::{DeclaredProbe, ProbeSource};

/// Set by nerdctl on each container that has a health check, its image's included.
pub(super) const NERDCTL_LABEL: &str = "nerdctl/healthcheck";

/// More than any health check has.
const ARGUMENTS: usize = 256;
const BYTES: usize = 16 << 10;

pub(super) type HealthCheck = Option<Vec<DeclaredProbe>>;

/// A health check as Docker writes it, in its own files and in image configs.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Settings {
    #[serde(default)]
    healthcheck: Option<Check>,
    #[serde(default)]
    shell: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Check {
    /// A kind, followed by its arguments.
    #[serde(default)]
    test: Option<Vec<String>>,
}

impl Settings {
    fn health_check(self) -> HealthCheck {
        let test = self.healthcheck?.test?;
        let (kind, command) = test.split_first()?;
        match kind.as_str() {
            "CMD" => healthy_if(command.to_vec()),
            "CMD-SHELL" if !command.is_empty() => {
                let shell = self.shell.filter(|shell| !shell.is_empty());
                let shell = shell.unwrap_or_else(|| vec!["/bin/sh".into(), "-c".into()]);
                healthy_if([&shell, command].concat())
            }
            // NONE, and kinds that Docker refuses to run.
            _ => Some(Vec::new()),
        }
    }
}

/// The health check in Docker's `config.v2.json`. Docker copies the image's into it.
pub(super) fn of_docker(config: &str) -> HealthCheck {
    #[derive(Deserialize)]
    struct Container {
        #[serde(rename = "Config")]
        settings: Settings,
    }
    read::<Container>(config.as_bytes())?.settings.health_check()
}

/// The health check in an image's config: Docker's extension to the OCI's.
pub(super) fn of_image(config: &[u8]) -> HealthCheck {
    #[derive(Deserialize)]
    struct Image {
        #[serde(rename = "config")]
        settings: Settings,
    }
    read::<Image>(config)?.settings.health_check()
}

/// The health check in nerdctl's label. nerdctl knows no other shell than `/bin/sh`, and takes
/// a test without a kind for a command.
pub(super) fn of_nerdctl(label: &str) -> HealthCheck {
    let test = read::<Check>(label.as_bytes())?.test?;
    let (kind, command) = test.split_first()?;
    match kind.as_str() {
        "" | "NONE" => Some(Vec::new()),
        "CMD" => healthy_if(command.to_vec()),
        "CMD-SHELL" if command.is_empty() => Some(Vec::new()),
        "CMD-SHELL" => healthy_if(vec!["/bin/sh".into(), "-c".into(), command.join(" ")]),
        _ => healthy_if(test),
    }
}

fn healthy_if(argv: Vec<String>) -> HealthCheck {
    Some(declared(argv, ProbeSource::Healthcheck).into_iter().collect())
}

/// The handler that a kubelet runs before it stops a container. No runtime learns of the other
/// programs that a kubelet runs: its probes, and what follows a start.
pub(super) fn of_kubelet(handler: &str) -> Option<DeclaredProbe> {
    #[derive(Deserialize)]
    struct Handler {
        #[serde(default)]
        exec: Option<Exec>,
    }
    #[derive(Deserialize)]
    struct Exec {
        #[serde(default)]
        command: Option<Vec<String>>,
    }
    let argv = read::<Handler>(handler.as_bytes())?.exec?.command?;
    declared(argv, ProbeSource::LifecycleHook)
}

fn declared(argv: Vec<String>, source: ProbeSource) -> Option<DeclaredProbe> {
    let bytes: usize = argv.iter().map(String::len).sum();
    let is_command = argv.first().is_some_and(|program| !program.is_empty());
    let is_short = argv.len() <= ARGUMENTS && bytes <= BYTES;
    (is_command && is_short).then_some(DeclaredProbe { argv, source })
}

fn read<T: DeserializeOwned>(json: &[u8]) -> Option<T> {
    serde_json::from_slice(json).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(found: HealthCheck, expected: Option<&[&str]>) {
        let argv = |probe: DeclaredProbe| {
            assert_eq!(probe.source, ProbeSource::Healthcheck);
            probe.argv
        };
        let found: Option<Vec<String>> =
            found.map(|probes| probes.into_iter().flat_map(argv).collect());
        let expected = expected.map(|argv| argv.iter().map(|&text| text.to_owned()).collect());
        assert_eq!(found, expected);
    }

    const OFF: Option<&[&str]> = Some(&[]);

    #[test]
    fn dockers_health_check_is_a_command_or_a_shells() {
        let docker = |settings: &str| of_docker(&format!(r#"{{"ID":"c","Config":{settings}}}"#));
        let test = |test: &str| docker(&format!(r#"{{"Healthcheck":{{"Test":{test}}}}}"#));
        check(test(r#"["CMD","curl","-f","http://x/"]"#), Some(&["curl", "-f", "http://x/"]));
        check(test(r#"["CMD-SHELL","a || b"]"#), Some(&["/bin/sh", "-c", "a || b"]));
        check(test(r#"["NONE"]"#), OFF);
        check(test(r#"["SOMETHING","x"]"#), OFF);
        check(test(r#"["CMD"]"#), OFF);
        check(test(r#"["CMD",""]"#), OFF);
        check(test(r#"["CMD-SHELL"]"#), OFF);
        check(test("[]"), None);
        check(test("null"), None);
        check(test("7"), None);
        check(docker("{}"), None);
        check(docker(r#"{"Healthcheck":null}"#), None);
        check(
            docker(
                r#"{"Shell":["/bin/bash","-euc"],"Healthcheck":{"Interval":1,"Test":["CMD-SHELL","x"]}}"#,
            ),
            Some(&["/bin/bash", "-euc", "x"]),
        );
        check(
            docker(r#"{"Shell":[],"Healthcheck":{"Test":["CMD-SHELL","x"]}}"#),
            Some(&["/bin/sh", "-c", "x"]),
        );
    }

    #[test]
    fn an_image_declares_one_as_docker_does() {
        let image = br#"{"os":"linux","config":{"Healthcheck":{"Test":["CMD","/check"]}}}"#;
        check(of_image(image), Some(&["/check"]));
        check(of_image(br#"{"config":{}}"#), None);
        check(of_image(b"{}"), None);
        check(of_image(b"\xff"), None);
    }

    #[test]
    fn nerdctls_label_is_a_health_check_too() {
        let label = r#"{"Test":["CMD","/check","now"],"Interval":30000000000,"Retries":3}"#;
        check(of_nerdctl(label), Some(&["/check", "now"]));
        check(of_nerdctl(r#"{"Test":["CMD-SHELL","a","b"]}"#), Some(&["/bin/sh", "-c", "a b"]));
        check(of_nerdctl(r#"{"Test":["/check","now"]}"#), Some(&["/check", "now"]));
        check(of_nerdctl(r#"{"Test":["NONE"]}"#), OFF);
        check(of_nerdctl(r#"{"Test":[""]}"#), OFF);
        check(of_nerdctl(r#"{"Test":["CMD-SHELL"]}"#), OFF);
        check(of_nerdctl("{}"), None);
        check(of_nerdctl("CMD /check"), None);
    }

    #[test]
    fn a_kubelets_hook_is_a_command_or_nothing() {
        let argv = |handler: &str| of_kubelet(handler).map(|probe| probe.argv.join(" "));
        let handler = r#"{"exec":{"command":["/bin/bash","-c","sleep 20"]}}"#;
        assert_eq!(argv(handler).as_deref(), Some("/bin/bash -c sleep 20"));
        assert_eq!(of_kubelet(handler).unwrap().source, ProbeSource::LifecycleHook);
        assert_eq!(argv(r#"{"httpGet":{"path":"/stop","port":80}}"#), None);
        assert_eq!(argv(r#"{"exec":{}}"#), None);
        assert_eq!(argv("{}"), None);
        assert_eq!(argv("stop"), None);
    }

    #[test]
    fn a_command_that_is_too_long_is_not_cut() {
        let test = |arguments: Vec<String>| {
            let test: Vec<String> = [vec!["CMD".to_owned()], arguments].concat();
            of_nerdctl(&serde_json::json!({ "Test": test }).to_string())
        };
        let found = test(vec!["x".into(); ARGUMENTS]).unwrap();
        assert_eq!(found[0].argv.len(), ARGUMENTS);
        check(test(vec!["x".into(); ARGUMENTS + 1]), OFF);
        assert_eq!(test(vec!["x".repeat(BYTES)]).unwrap().len(), 1);
        check(test(vec!["x".repeat(BYTES + 1)]), OFF);
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_readers_panic(text: String, bytes: Vec<u8>) {
            let _ = (of_docker(&text), of_image(&bytes), of_nerdctl(&text), of_kubelet(&text));
        }

        #[test]
        fn whatever_is_declared_has_a_program_and_is_short(
            mut test in proptest::collection::vec("(CMD|CMD-SHELL|NONE|[a-z ]{0,3})", 0..5),
            shell in proptest::option::of(proptest::collection::vec("[a-z]{0,2}", 0..3)),
        ) {
            test.truncate(4);
            let settings = serde_json::json!({ "Shell": shell, "Healthcheck": { "Test": test } });
            let all = [
                of_docker(&serde_json::json!({ "Config": settings }).to_string()),
                of_image(serde_json::json!({ "config": settings }).to_string().as_bytes()),
                of_nerdctl(&settings["Healthcheck"].to_string()),
            ];
            for probe in all.into_iter().flatten().flatten() {
                assert!(!probe.argv[0].is_empty() && probe.argv.len() < 8, "{probe:?}");
            }
        }
    }
}
