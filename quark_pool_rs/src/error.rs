//! All errors of the pool.
//!
//! Each variant is a case that a caller would handle differently. Our own mistakes are panics.

use std::io;
use std::path::{Path, PathBuf};

/// An error, described in a sentence with its numbers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// An argument does not fit.
    #[error("{0}")]
    Invalid(String),
    /// More memory than the system gives.
    #[error("{what}: it takes {bytes} bytes of memory, more than the system gives")]
    Memory {
        /// The argument that asks for it.
        what: String,
        /// How many.
        bytes: u128,
    },
    /// No such score column.
    #[error("the pool has no score column {name:?}; it has {known}")]
    UnknownColumn {
        /// The name that was asked for.
        name: String,
        /// The names there are, for people.
        known: String,
    },
    /// An id that the snapshot lacks.
    #[error("{}", unknown_sample(*id, *num_removed, *num_samples))]
    UnknownSample {
        /// The id that was asked for.
        id: u64,
        /// Ids below this were removed.
        num_removed: u64,
        /// Ids are below this.
        num_samples: u64,
    },
    /// There is no pool.
    #[error("{path} is not a pool")]
    NotFound {
        /// Where a pool was looked for.
        path: PathBuf,
    },
    /// Something is in the way.
    #[error("{path} exists")]
    Exists {
        /// What is in the way.
        path: PathBuf,
    },
    /// A snapshot that the pool does not have.
    #[error("the pool has no snapshot {generation}; it has those from {oldest} to {newest}")]
    UnknownSnapshot {
        /// The generation that was asked for.
        generation: u64,
        /// The oldest one there is.
        oldest: u64,
        /// The newest one there is.
        newest: u64,
    },
    /// Bytes on disk are not what was committed.
    #[error("{file} is damaged at offset {offset}: {what}")]
    Corrupted {
        /// File, relative to the pool.
        file: String,
        /// Byte offset of the damage, or of the unit that holds it.
        offset: u64,
        /// Expected and found.
        what: String,
    },
    /// A format that this build cannot read.
    #[error(
        "the pool has format version {found}; this build reads versions up to {supported}: use the quark that wrote it, or a newer one"
    )]
    Version {
        /// Version in the manifest.
        found: u32,
        /// The version of this build.
        supported: u32,
    },
    /// Another writer is at work.
    #[error("the pool is open for writing elsewhere: {holder}")]
    Locked {
        /// Who holds the lock, as far as known.
        holder: String,
    },
    /// A sync failed earlier.
    #[error(
        "an earlier sync failed, so the state of the files is unknown: reopen the pool to continue"
    )]
    Poisoned,
    /// A stream of batches in a child of the process that made it.
    #[error(
        "this stream of batches was made before the process forked, and its thread stayed in the parent: make a new one here"
    )]
    Forked,
    /// The handle cannot write.
    #[error("{0}")]
    ReadOnly(String),
    /// The operating system refused.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// The action, as a verb.
        action: &'static str,
        /// The path that it concerned.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

fn unknown_sample(id: u64, num_removed: u64, num_samples: u64) -> String {
    if id < num_removed {
        format!(
            "sample {id} was removed by retention: the pool holds the samples {num_removed} to {}",
            num_samples - 1
        )
    } else {
        format!("sample {id} is not in the pool, which holds {num_samples} samples")
    }
}

/// The result type of this crate.
pub type Result<T, E = PoolError> = std::result::Result<T, E>;

impl PoolError {
    /// An argument does not fit.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid(message.into())
    }

    /// Damage at a place.
    pub fn corrupted(file: impl Into<String>, offset: u64, what: impl Into<String>) -> Self {
        Self::Corrupted { file: file.into(), offset, what: what.into() }
    }

    /// For `map_err` on system calls. A wrong kind of file in the pool is damage.
    pub fn io(action: &'static str, path: PathBuf) -> impl FnOnce(io::Error) -> Self {
        move |source| match Misplaced::of(&source) {
            Some(misplaced) => {
                Self::corrupted(misplaced.entry.to_string_lossy(), 0, misplaced.what.clone())
            }
            None => Self::Io { action, path, source },
        }
    }
}

/// A wrong kind of entry in a pool, such as a link in place of a file. Its [`io::Error`] is an `InvalidInput`.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct Misplaced {
    /// Where, relative to the pool.
    entry: PathBuf,
    what: String,
}

impl Misplaced {
    /// A link.
    pub fn link(entry: &Path) -> Self {
        let what = "it is a link, and nothing in a pool may be one: put what it leads to in its place, or open a \
                    copy of the pool made with `cp -rL`";
        Self { entry: entry.to_owned(), what: what.to_owned() }
    }

    /// Anything else.
    pub fn other(entry: &Path, found: &str, expected: &str) -> Self {
        Self { entry: entry.to_owned(), what: format!("it is {found}, not {expected}") }
    }

    fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref().and_then(|inner| inner.downcast_ref())
    }
}

impl From<Misplaced> for io::Error {
    fn from(misplaced: Misplaced) -> Self {
        Self::new(io::ErrorKind::InvalidInput, misplaced)
    }
}
