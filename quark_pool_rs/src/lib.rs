//! A durable, append-only pool of scored text samples that stays ranked by reward.
//!
//! A pool is a directory of immutable Arrow files and one small log (`FORMAT.md`). One process writes,
//! any number read. An append is a commit: when it returns, its samples survive a power cut. Ranking by
//! a score column and cutting the ranking into quantiles costs about the same however large the pool is.
//!
//! It is not a database: there is no query language, no update of a sample, and the oldest alone can go.
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
