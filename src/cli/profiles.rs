//! `driftd policy profiles`: the profiles of a directory, and the options that name them.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;

use super::exit::Exit;
use super::output::{Field, Listed, Listing, Style, list, safe};
use crate::config::{Config, PolicyFiles};
use crate::policy;

#[derive(Debug, clap::Args)]
pub(super) struct Profiles {
    /// A profile that is switched on too (may be given more than once)
    #[arg(long = "profile", value_name = "NAME")]
    pub(super) names: Vec<String>,
    /// The directory of the profiles
    #[arg(long, value_name = "DIRECTORY", default_value_os_t = PolicyFiles::default().profile_dir)]
    pub(super) profile_dir: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(super) struct ListProfiles {
    /// The directory of the profiles [default: the one in the settings]
    directory: Option<PathBuf>,
    /// The settings that name the directory
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    listing: Listing,
}

impl Profiles {
    /// The same files with these profiles.
    pub(super) fn with(self, files: PolicyFiles) -> PolicyFiles {
        if self.names.is_empty() {
            return files;
        }
        PolicyFiles { profiles: self.names, profile_dir: self.profile_dir, ..files }
    }
}

/// One profile.
#[derive(Debug, Serialize)]
struct ProfileJson {
    schema: &'static str,
    name: String,
    about: Option<String>,
    rules: Vec<ProfileRuleJson>,
    /// Whether the settings switch it on.
    on: bool,
    /// Why it cannot be used; null if it can.
    fault: Option<String>,
}

#[derive(Debug, Serialize)]
struct ProfileRuleJson {
    id: String,
    reason: String,
}

impl ListProfiles {
    pub(super) fn run(self) -> anyhow::Result<Exit> {
        let settings = Config::load(self.config.as_deref())?.policy;
        let directory = self.directory.unwrap_or(settings.profile_dir);
        let names = policy::profile_names(&directory)
            .with_context(|| format!("cannot read {}", safe(&directory.to_string_lossy())))?;
        let profiles: Vec<ProfileJson> = names
            .into_iter()
            .map(|name| {
                let on = settings.profiles.contains(&name);
                ProfileJson::of(&directory, name, on)
            })
            .collect();
        list(&profiles, &self.listing)?;
        self.listing.note_if_empty(profiles.len(), "there is no profile");
        Ok(Exit::Clean)
    }
}

impl ProfileJson {
    fn of(directory: &Path, name: String, on: bool) -> ProfileJson {
        let names = [name.clone()];
        let read = policy::read_profiles(directory, &names)
            .and_then(|files| policy::parse(directory, files));
        let (about, rules, fault) = match read {
            Ok(loaded) => {
                let rules = loaded.rules.rules().iter().map(|rule| ProfileRuleJson {
                    id: rule.id.to_string(),
                    reason: rule.reason.clone(),
                });
                (loaded.about.first().cloned(), rules.collect(), None)
            }
            Err(refused) => (None, Vec::new(), Some(refused.to_string())),
        };
        ProfileJson { schema: "driftd.profile/v1", name, about, rules, on, fault }
    }
}

impl Listed for ProfileJson {
    type Json<'a> = &'a ProfileJson;

    fn json(&self) -> &ProfileJson {
        self
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn header(_: bool) -> Vec<&'static str> {
        vec!["PROFILE", "RULES", "ON", "ABOUT"]
    }

    fn row(&self, _: &Style) -> Vec<Field> {
        let about = self.fault.as_deref().or(self.about.as_deref()).unwrap_or_default();
        vec![
            safe(&self.name).into(),
            self.rules.len().to_string().into(),
            if self.on { "yes" } else { "no" }.to_owned().into(),
            safe(about).into(),
        ]
    }
}
