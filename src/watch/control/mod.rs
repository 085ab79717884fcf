//! The commands of the pipeline, and the marks of containers: placed on command, or before
//! their runtime starts them.
//!
//! It uses every wing but `code`. Only `watch` itself uses it.

pub(crate) mod arm;
pub(crate) mod commands;
pub(crate) mod marker;
