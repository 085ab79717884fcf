//! (stub)

pub mod exit;
