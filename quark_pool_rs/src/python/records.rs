//! What the classes answer with: small, frozen, each value under its name.

use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;

use crate::columns::{COLUMNS, Value};
use crate::encoding::Kind;
use crate::error::PoolError;
use crate::gather;
use crate::parts::Column;
use crate::sampler;
use crate::snapshot;
use crate::verify;

/// A class with read-only attributes, whose `repr` shows them all.
macro_rules! record {
    (
        $(#[$meta:meta])*
        $name:ident {$(
            $(#[$field_meta:meta])*
            $field:ident: $type:ty,
        )*}
    ) => {
        $(#[$meta])*
        #[pyclass(frozen, get_all, module = "quark._pool_rs")]
        pub(super) struct $name {
            $($(#[$field_meta])* pub(super) $field: $type,)*
        }

        #[pymethods]
        impl $name {
            fn __repr__(this: &Bound<'_, Self>) -> PyResult<String> {
                let mut fields = Vec::new();
                $(fields.push(format!(
                    concat!(stringify!($field), "={}"),
                    this.getattr(stringify!($field))?.repr()?,
                ));)*
                Ok(format!("{}({})", stringify!($name), fields.join(", ")))
            }
        }
    };
}

record! {
    /// What a handle shows.
    #[derive(Clone)]
    Snapshot {
        generation: u64,
        hash: String,
        /// Ids are below this.
        num_samples: u64,
    }
}

impl Snapshot {
    pub(super) fn of(snapshot: &snapshot::Snapshot) -> Self {
        Self {
            generation: snapshot.generation,
            hash: snapshot.hash(),
            num_samples: snapshot.num_samples,
        }
    }
}

record! {
    /// What a pool was created with.
    Settings {
        uuid: String,
        vocab_size: u32,
        store_text: bool,
        tie_seed: u64,
        metadata: String,
    }
}

record! {
    /// A column of a sample, as the table says it.
    #[derive(Clone)]
    SampleColumn {
        name: &'static str,
        dtype: Option<&'static str>,
        given: Option<&'static str>,
        shown: Option<&'static str>,
        since: u32,
        /// The value that stands for a missing one.
        blank: Value,
    }
}

impl SampleColumn {
    /// The table.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        COLUMNS.iter().map(|column| Self {
            name: column.name,
            dtype: column.kind.and_then(dtype),
            given: column.given,
            shown: column.shown,
            since: column.since,
            blank: column.blank,
        })
    }
}

/// The array type of a kind.
fn dtype(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::U8 => Some("uint8"),
        Kind::I16 => Some("int16"),
        Kind::U16 => Some("uint16"),
        Kind::U32 => Some("uint32"),
        Kind::U64 => Some("uint64"),
        Kind::F32 => Some("float32"),
        Kind::ListU16 | Kind::ListU32 | Kind::Text | Kind::Bytes16 => None,
    }
}

impl<'py> IntoPyObject<'py> for Value {
    type Target = PyAny;
    type Output = Bound<'py, PyAny>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Self::Output> {
        Ok(match self {
            Self::U8(number) => number.into_pyobject(py)?.into_any(),
            Self::I16(number) => number.into_pyobject(py)?.into_any(),
            Self::U16(number) => number.into_pyobject(py)?.into_any(),
            Self::U32(number) => number.into_pyobject(py)?.into_any(),
            Self::U64(number) => number.into_pyobject(py)?.into_any(),
            Self::F32(number) => number.into_pyobject(py)?.into_any(),
        })
    }
}

record! {
    /// The samples of one append.
    Append {
        /// Below the pool's directory.
        file: String,
        /// First sample of the file.
        file_first: u64,
        key: String,
        /// First sample of the append.
        first: u64,
        num_samples: u64,
        round: u32,
        chunk: u32,
    }
}

record! {
    /// What a retention removed, or would.
    Retained {
        /// The oldest sample that is left.
        first: u64,
        num_appends: u64,
        num_samples: u64,
    }
}

record! {
    /// What a collection removed, or would.
    Collected {
        oldest_generation: u64,
        num_files: u64,
        num_bytes: u64,
    }
}

record! {
    /// A score column in the making.
    #[derive(Clone)]
    Draft {
        name: String,
        source: String,
        /// Ids below this have scores in it.
        end: u64,
    }
}

impl Draft {
    /// Those of a snapshot.
    pub(super) fn all(snapshot: &snapshot::Snapshot) -> Vec<Self> {
        let draft = |draft: &Column| Self {
            name: draft.name.clone(),
            source: draft.source.clone(),
            end: snapshot.draft_end(Some(draft)),
        };
        snapshot.drafts.iter().map(draft).collect()
    }
}

record! {
    /// Statistics of a score column.
    #[derive(Clone)]
    ScoreColumn {
        name: String,
        version: u32,
        source: String,
        num_scored: u64,
        num_unscored: u64,
        num_runs: u64,
        mean: f64,
        std: f64,
        min: f32,
        max: f32,
    }
}

record! {
    /// Counts and statistics of a snapshot.
    Info {
        snapshot: Snapshot,
        num_removed: u64,
        num_prompts: u64,
        num_segments: u64,
        num_bytes: u64,
        score_columns: Vec<ScoreColumn>,
        drafts: Vec<Draft>,
    }
}

record! {
    /// Something that an offline check found wrong.
    #[derive(Clone)]
    Problem {
        file: String,
        offset: u64,
        what: String,
    }
}

record! {
    /// What an offline check found.
    Report {
        /// None if the pool does not open.
        generation: Option<u64>,
        num_samples: u64,
        num_files: u64,
        num_bytes: u64,
        problems: Vec<Problem>,
    }
}

impl Report {
    pub(super) fn of(report: verify::Report) -> Self {
        let problem = |problem| {
            let (file, offset, what) = match problem {
                PoolError::Corrupted { file, offset, what } => (file, offset, what),
                PoolError::Io { action, path, source } => {
                    (path.display().to_string(), 0, format!("cannot {action} it: {source}"))
                }
                other => (String::new(), 0, other.to_string()),
            };
            Problem { file, offset, what }
        };
        Self {
            generation: report.generation,
            num_samples: report.num_samples,
            num_files: report.num_files,
            num_bytes: report.num_bytes,
            problems: report.problems.into_iter().map(problem).collect(),
        }
    }
}

record! {
    /// Which samples a batch holds, [B] each.
    Drawn {
        ids: Py<PyArray1<u64>>,
        quantiles: Py<PyArray1<i16>>,
        scores: Py<PyArray1<f32>>,
    }
}

impl Drawn {
    pub(super) fn new(py: Python<'_>, drawn: sampler::Drawn) -> Self {
        Self {
            ids: PyArray1::from_vec(py, drawn.ids).unbind(),
            quantiles: PyArray1::from_vec(py, drawn.quantiles).unbind(),
            scores: PyArray1::from_vec(py, drawn.scores).unbind(),
        }
    }
}

record! {
    /// Padded token ids of B samples.
    Padded {
        /// [B, P], padded on the left.
        prompts: Py<PyArray2<i64>>,
        prompt_lengths: Py<PyArray1<i32>>,
        /// [B, T], padded on the right.
        completions: Py<PyArray2<i64>>,
        completion_lengths: Py<PyArray1<i32>>,
    }
}

impl Padded {
    /// Arrays that own the batch's memory.
    pub(super) fn new(py: Python<'_>, gathered: gather::Gathered) -> PyResult<Self> {
        let rows = gathered.prompt_lengths.len();
        let matrix = |values: Vec<i64>, width| {
            Ok::<_, PyErr>(PyArray1::from_vec(py, values).reshape([rows, width])?.unbind())
        };
        Ok(Self {
            prompts: matrix(gathered.prompts, gathered.prompt_width)?,
            prompt_lengths: PyArray1::from_vec(py, gathered.prompt_lengths).unbind(),
            completions: matrix(gathered.completions, gathered.completion_width)?,
            completion_lengths: PyArray1::from_vec(py, gathered.completion_lengths).unbind(),
        })
    }
}

record! {
    /// Token ids of B samples without padding.
    Packed {
        /// One prompt after another.
        prompts: Py<PyArray1<i64>>,
        /// [B + 1]
        prompt_offsets: Py<PyArray1<i64>>,
        /// One completion after another.
        completions: Py<PyArray1<i64>>,
        /// [B + 1]
        completion_offsets: Py<PyArray1<i64>>,
    }
}

impl Packed {
    /// Arrays that own the batch's memory.
    pub(super) fn new(py: Python<'_>, packed: gather::Packed) -> Self {
        Self {
            prompts: PyArray1::from_vec(py, packed.prompts).unbind(),
            prompt_offsets: PyArray1::from_vec(py, packed.prompt_offsets).unbind(),
            completions: PyArray1::from_vec(py, packed.completions).unbind(),
            completion_offsets: PyArray1::from_vec(py, packed.completion_offsets).unbind(),
        }
    }
}

record! {
    /// A drawn batch with padded token ids.
    PaddedBatch {
        drawn: Py<Drawn>,
        tokens: Py<Padded>,
    }
}

record! {
    /// A drawn batch with token ids without padding.
    PackedBatch {
        drawn: Py<Drawn>,
        tokens: Py<Packed>,
    }
}

record! {
    /// How much of the caller's memory a batch took.
    Filled {
        num_rows: usize,
        /// Width of the padded prompts, or their token ids altogether.
        prompts: usize,
        /// The same of the completions.
        completions: usize,
    }
}
