//! The commands of the pipeline, and the marks of containers: placed on command, or before
//! their runtime starts them.
//!
//! It knows every wing but `code`; nothing but `watch` itself knows it.

pub(crate) mod arm;
pub(crate) mod commands;
pub(crate) mod marker;
