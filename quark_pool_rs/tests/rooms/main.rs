//! What single rooms promise, tried through the crate's public functions against plain counting and sorting.
//! One program for all of them, as each program is linked anew.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::float_cmp,
    reason = "tests may, and ties are exact"
)]

#[path = "../common/mod.rs"]
mod common;
mod contradictions;
mod doors;
mod file_system;
mod gathering;
mod ranking;
mod sampling;
mod strangers;
