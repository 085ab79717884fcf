//! driftd reports when running containers no longer match their images.
//!
//! The rooms, in the order in which data flows; ARCHITECTURE.md has the map.

pub mod model;

pub mod sys;

pub mod containerd;
pub mod watch;

pub mod baseline;
pub mod budget;
pub mod detect;
pub mod inventory;
pub mod policy;

pub mod pipeline;

pub mod hooks;
pub mod replay;
pub mod respond;

pub mod evidence;

pub mod history;

pub mod api;

pub mod health;
pub mod pulse;
pub mod threads;

pub mod config;
pub mod daemon;
pub mod gate;
pub mod guardian;
pub mod journal;

pub mod cli;
