//! A durable, append-only pool of scored text samples that stays ranked by reward.
//!
//! A pool is a directory of immutable Arrow files and one small log (`FORMAT.md`). One process writes,
//! any number read. An append is a commit: when it returns, its samples survive a power cut. Ranking by
//! a score column and cutting the ranking into quantiles costs about the same however large the pool is.
//!
//! It is not a database: there is no query language, no update of a sample, and the oldest alone can go.
//!
//! ```
//! use std::sync::Arc;
//!
//! use quark_pool_rs::{
//!     Batch, FileStorage, Given, OpenOptions, Pool, PoolSettings, Quantization, RemainderRule, Sampler,
//!     SamplerSettings, SamplingMode, TieRule, gather,
//! };
//!
//! # fn main() -> quark_pool_rs::Result<()> {
//! # let folder = tempfile::tempdir().expect("a temporary folder");
//! # let path = folder.path().join("pool");
//! let storage = Arc::new(FileStorage::new(path));
//! let settings = PoolSettings::new("00c0ffee".to_owned(), 50_000, true, 7, "{}")?;
//! let pool = Pool::create(storage.clone(), &settings, "the example")?;
//!
//! // Two completions of one prompt. When `append` returns, they survive a power cut.
//! let ids = pool.append(&Batch {
//!     key: "round 0, chunk 0",
//!     prompt_tokens: &[464, 3807],
//!     prompt_offsets: &[0, 2],
//!     prompt_texts: &["The movie"],
//!     prompt_metadata: &["{}"],
//!     prompt_index: &[0, 0],
//!     completion_tokens: &[373, 1049, 373, 7818, 13],
//!     completion_offsets: &[0, 2, 5],
//!     completion_texts: Some(&[" was great", " was awful."]),
//!     round: 0,
//!     chunk: 0,
//!     policy_step: 0,
//!     settings: r#"{"temperature": 1}"#,
//!     given: Given {
//!         finish_reasons: &[1, 1],
//!         reward_tokens: &[-1, -1],
//!         seeds: &[1, 2],
//!         logprob_policy: &[-3.5, -4.25],
//!         logprob_reference: &[-3.5, -4.25],
//!         logprob_sampled: &[-3.5, -4.25],
//!     },
//!     scores: &[("reward", &[0.9, 0.1])],
//! })?;
//! assert_eq!(ids, 0..2);
//! pool.close();
//!
//! // A reader cuts the ranking by reward into two quantiles and draws a minibatch.
//! let reader = Pool::open(storage, OpenOptions::default())?;
//! let (ties, remainder) = (TieRule::Hash, RemainderRule::Spread);
//! let quantiles = Arc::new(Quantization::new(reader.snapshot(), "reward", 2, ties, remainder)?);
//! assert_eq!(quantiles.labels()?, [1, 0]);
//! let sampler = Sampler::new(quantiles, SamplerSettings::new(2, 0, SamplingMode::Stratified))?;
//! let drawn = sampler.draw(0)?;
//! let batch = gather(&reader.snapshot(), &drawn.ids, 0)?;
//! assert_eq!((batch.prompt_width, batch.completion_width), (2, 3));
//! # Ok(())
//! # }
//! ```
//!
//! Rooms, each using only those below it:
//!
//! ```text
//! python                                      the binding, behind the feature `python`
//! pool  fork  verify  describe                append, open | a second pool | offline check | statistics
//! writer                                      data files, then the record that lists them
//! compaction  retention                       one file of many small ones | which of the oldest may go
//! interning  batch                            which prompts are there already | what an append brings
//! sampler  stream                             which samples a batch holds | the next ones ahead
//! aging  bucketing                            newer ones more often | batches of like length
//! gather  schedule                            padded or packed batches | whose turn a slot is
//! quantization  selection  ranking            quantiles | cuts of values | cuts of sorted runs
//! runs                                        samples in sorted order
//! recovery                                    from a directory to a snapshot
//! lookup  rows                                samples, prompts and scores by id | columns of some samples
//! snapshot                                    what a reader sees
//! parts                                       what that is made of
//! segment  manifest                           files of columns | payloads of records
//! columns                                     the table of a sample's columns
//! datafile                                    an open Arrow file with checksums
//! encoding  log                               bytes of an Arrow file | records and HEAD
//! storage                                     what the pool asks of a disk
//! beneath                                     the only file-system room
//! mapping  checksum  rng  threads             maps | sums | counter-based randomness | what computes together
//! format  processor  memory  error            limits | loops in the processor's widest vectors | whether there is memory
//! ```

#![warn(clippy::indexing_slicing)]

mod aging;
pub mod batch;
mod beneath;
mod bucketing;
pub mod checksum;
pub mod columns;
pub mod compaction;
pub mod datafile;
pub mod describe;
pub mod encoding;
pub mod error;
pub mod fork;
pub mod format;
pub mod gather;
mod interning;
pub mod log;
pub mod lookup;
pub mod manifest;
pub mod mapping;
mod memory;
pub mod parts;
pub mod pool;
mod processor;
#[cfg(feature = "python")]
mod python;
pub mod quantization;
pub mod ranking;
pub mod recovery;
pub mod retention;
pub mod rng;
pub mod rows;
pub mod runs;
pub mod sampler;
mod schedule;
pub mod segment;
mod selection;
pub mod snapshot;
pub mod storage;
pub mod stream;
mod threads;
pub mod verify;
mod writer;

pub use batch::Batch;
pub use columns::Given;
pub use error::{PoolError, Result};
pub use fork::fork;
pub use format::PoolSettings;
pub use gather::{Gathered, gather};
pub use lookup::Sample;
pub use pool::{OpenOptions, Pool};
pub use quantization::Quantization;
pub use ranking::{RemainderRule, TieRule};
pub use retention::Limits;
pub use sampler::{Drawn, Sampler, SamplingMode, Settings as SamplerSettings};
pub use snapshot::Snapshot;
pub use storage::{FileStorage, Storage};
pub use verify::verify;
