//! The commands of the pipeline, and the marks of containers: placed on command, or before
//! their runtime starts them.
//!
//! It knows every wing but `code`; nothing but `watch` itself knows it.

pub(in crate::watch) mod arm;
pub(in crate::watch) mod commands;
