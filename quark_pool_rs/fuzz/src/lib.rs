//! The targets as a library, for libFuzzer.
#[path = "../../tests/common/mod.rs"]
pub mod common;
pub mod targets;
