//! The classes. Each method takes what it needs, releases the interpreter and calls the core.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytemuck::Pod;
use numpy::{Element, PyArray1, PyArrayMethods, PyReadonlyArray1};
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyRange};

use super::batch::{BatchArrays, BufferArrays};
use super::errors::detached;
use super::records;
use super::sampler::{PySampler, SamplerSettings};
use crate::columns::{COLUMNS, SampleColumn, Value};
use crate::describe::{ColumnDescription, describe};
use crate::fork::fork;
use crate::format::{FORMAT_VERSION, PoolSettings};
use crate::gather::{gather, pack};
use crate::manifest::AppendEntry;
use crate::memory::ensure;
use crate::parts::Segment;
use crate::pool::{OpenOptions, Pool};
use crate::quantization::Quantization;
use crate::ranking::{RemainderRule, TieRule};
use crate::retention::Limits;
use crate::rows::rows;
use crate::snapshot::Snapshot;
use crate::storage::{FileStorage, Storage};

fn storage(path: PathBuf) -> Arc<dyn Storage> {
    Arc::new(FileStorage::new(path))
}

/// The pool; `quark.pool.native.NativePool` dresses it.
#[pyclass(frozen, name = "Pool", module = "quark._pool_rs")]
pub(super) struct PyPool(Pool);

#[pymethods]
impl PyPool {
    #[staticmethod]
    #[pyo3(signature = (path, *, uuid, vocab_size, store_text, tie_seed, metadata, holder, format = FORMAT_VERSION))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn create(
        py: Python<'_>,
        path: PathBuf,
        uuid: String,
        vocab_size: u32,
        store_text: bool,
        tie_seed: u64,
        metadata: &str,
        holder: &str,
        format: u32,
    ) -> PyResult<Self> {
        detached(py, || {
            let settings = PoolSettings::new(uuid, vocab_size, store_text, tie_seed, metadata)?;
            Pool::create(storage(path), &settings.of_version(format)?, holder).map(Self)
        })
    }

    #[staticmethod]
    #[pyo3(signature = (path, *, holder, snapshot))]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        holder: Option<&str>,
        snapshot: Option<u64>,
    ) -> PyResult<Self> {
        let options = OpenOptions { writer: holder, snapshot };
        detached(py, || Pool::open(storage(path), options).map(Self))
    }

    #[getter]
    fn is_writable(&self) -> bool {
        self.0.is_writable()
    }

    #[getter]
    fn snapshot(&self) -> records::Snapshot {
        records::Snapshot::of(&self.0.snapshot())
    }

    /// The oldest generation that can be shown.
    #[getter]
    fn oldest_generation(&self) -> u64 {
        self.0.snapshot().oldest
    }

    /// Make another pool that holds what the handle shows.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn fork(&self, py: Python<'_>, path: PathBuf, uuid: &str) -> PyResult<()> {
        let snapshot = self.0.snapshot();
        detached(py, || {
            // How the directory is reached is its user's affair.
            let name = path.file_name().map_or(Path::new(".."), Path::new);
            let parent = path.parent().unwrap_or(Path::new(""));
            fork(&snapshot, &FileStorage::new(parent), name, uuid)
        })
    }

    /// The appends of what the handle shows, by first id.
    fn appends(&self) -> Vec<records::Append> {
        let snapshot = self.0.snapshot();
        let of_segment = |segment: &Arc<Segment>| {
            let entry = segment.entry.clone();
            let record = |(append, ids): (AppendEntry, Range<u64>)| records::Append {
                file: entry.file.name.clone(),
                file_first: entry.first,
                key: append.key,
                first: ids.start,
                num_samples: ids.end - ids.start,
                round: append.round,
                chunk: append.chunk,
            };
            entry.appends().map(record).collect::<Vec<_>>()
        };
        snapshot.segments.iter().flat_map(of_segment).collect()
    }

    /// Whether there were small files to make one of.
    fn compact_once(&self, py: Python<'_>, max_samples: u64) -> PyResult<bool> {
        detached(py, || self.0.compact_once(max_samples))
    }

    /// Remove the oldest appends.
    fn retain(
        &self,
        py: Python<'_>,
        max_samples: Option<u64>,
        max_rounds: Option<u64>,
        before_round: Option<u32>,
        dry_run: bool,
    ) -> PyResult<records::Retained> {
        let limits = Limits { max_samples, max_rounds, before_round };
        let retained = detached(py, || self.0.retain(&limits, dry_run))?;
        Ok(records::Retained {
            first: retained.first,
            num_appends: retained.appends,
            num_samples: retained.samples,
        })
    }

    /// Give old snapshots up.
    fn gc(&self, py: Python<'_>, keep: u64, dry_run: bool) -> PyResult<records::Collected> {
        let collected = detached(py, || self.0.collect(keep, dry_run))?;
        Ok(records::Collected {
            oldest_generation: collected.oldest,
            num_files: collected.files,
            num_bytes: collected.bytes,
        })
    }

    /// What the pool was created with.
    #[getter]
    fn settings(&self) -> records::Settings {
        let settings = self.0.snapshot().context.settings.clone();
        records::Settings {
            uuid: settings.uuid,
            vocab_size: settings.vocab_size,
            store_text: settings.store_text,
            tie_seed: settings.tie_seed,
            metadata: settings.metadata,
        }
    }

    /// Version of the pool's format.
    #[getter]
    fn format(&self) -> u32 {
        self.0.snapshot().context.settings.format
    }

    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn append<'py>(
        &self,
        py: Python<'py>,
        batch: BatchArrays<'py>,
    ) -> PyResult<Bound<'py, PyRange>> {
        range(py, batch.with(|batch| detached(py, || self.0.append(batch)))?)
    }

    /// Ids below this are in the draft of a column; None without a draft.
    fn draft_end(&self, name: &str) -> Option<u64> {
        self.0.draft_end(name)
    }

    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn draft_scores(
        &self,
        py: Python<'_>,
        name: &str,
        source: &str,
        first: u64,
        scores: PyReadonlyArray1<'_, f32>,
    ) -> PyResult<()> {
        let scores = scores.as_slice()?;
        detached(py, || self.0.draft_scores(name, source, first, scores))
    }

    fn publish_scores(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        detached(py, || self.0.publish_scores(name))
    }

    fn discard_scores(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        detached(py, || self.0.discard_scores(name))
    }

    fn find<'py>(&self, py: Python<'py>, key: &str) -> PyResult<Option<Bound<'py, PyRange>>> {
        self.0.find(key).map(|ids| range(py, ids)).transpose()
    }

    fn refresh(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.0.refresh())
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }

    /// The snapshot that the handle shows now.
    fn view(&self) -> PyView {
        PyView(self.0.snapshot())
    }

    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn samples<'py>(&self, py: Python<'py>, ids: Vec<u64>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let snapshot = self.0.snapshot();
        let samples = detached(py, || snapshot.samples(&ids))?;
        samples
            .into_iter()
            .map(|sample| {
                let dict = PyDict::new(py);
                dict.set_item("id", sample.id)?;
                dict.set_item("prompt_text", sample.prompt_text)?;
                dict.set_item("prompt_tokens", PyArray1::from_vec(py, sample.prompt_tokens))?;
                dict.set_item("prompt_metadata", sample.prompt_metadata)?;
                dict.set_item(
                    "completion_tokens",
                    PyArray1::from_vec(py, sample.completion_tokens),
                )?;
                dict.set_item("completion_text", sample.completion_text)?;
                dict.set_item("settings", &*sample.settings)?;
                for (name, value) in sample.numbers.shown() {
                    dict.set_item(name, value)?;
                }
                let scores = PyDict::new(py);
                for (name, score) in sample.scores {
                    scores.set_item(name, score)?;
                }
                dict.set_item("scores", scores)?;
                Ok(dict)
            })
            .collect()
    }

    /// Columns of the segments for the ids of some spans, as an Arrow file.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn rows<'py>(
        &self,
        py: Python<'py>,
        spans: Vec<Span>,
        names: Vec<String>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let snapshot = self.0.snapshot();
        let bytes = detached(py, || {
            let spans: Vec<_> = spans.iter().map(|span| span.start..span.stop).collect();
            rows(&snapshot, &spans, &names)
        })?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Some samples, padded.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn gather<'py>(
        &self,
        py: Python<'py>,
        ids: PyReadonlyArray1<'py, u64>,
        pad_id: i64,
    ) -> PyResult<records::Padded> {
        let snapshot = self.0.snapshot();
        let ids = ids.as_slice()?;
        records::Padded::new(py, detached(py, || gather(&snapshot, ids, pad_id))?)
    }

    /// Some samples, packed.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn pack<'py>(
        &self,
        py: Python<'py>,
        ids: PyReadonlyArray1<'py, u64>,
    ) -> PyResult<records::Packed> {
        let snapshot = self.0.snapshot();
        let ids = ids.as_slice()?;
        Ok(records::Packed::new(py, detached(py, || pack(&snapshot, ids))?))
    }

    /// Some samples in the caller's memory, padded if there is a `pad_id`.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn gather_into<'py>(
        &self,
        py: Python<'py>,
        ids: PyReadonlyArray1<'py, u64>,
        pad_id: Option<i64>,
        mut buffers: BufferArrays<'py>,
    ) -> PyResult<records::Filled> {
        let snapshot = self.0.snapshot();
        let ids = ids.as_slice()?;
        buffers.with(|mut buffers| {
            buffers.quantiles.fill(-1);
            buffers.scores.fill(f32::NAN);
            detached(py, || buffers.fill(&snapshot, ids, pad_id))
        })
    }

    fn info(&self, py: Python<'_>) -> PyResult<records::Info> {
        let snapshot = self.0.snapshot();
        let description = detached(py, || describe(&snapshot))?;
        let column = |column: ColumnDescription| records::ScoreColumn {
            name: column.name,
            version: column.version,
            source: column.source,
            num_scored: column.scored,
            num_unscored: column.unscored,
            num_runs: column.num_runs,
            mean: column.mean,
            std: column.std,
            min: column.min,
            max: column.max,
        };
        Ok(records::Info {
            snapshot: records::Snapshot::of(&snapshot),
            num_removed: description.num_removed,
            num_prompts: description.num_prompts,
            num_segments: description.num_segments,
            num_bytes: description.num_bytes,
            score_columns: description.columns.into_iter().map(column).collect(),
            drafts: records::Draft::all(&snapshot),
        })
    }
}

/// One snapshot, also where its pool moves on: what a ranking by values is made from
/// (`quark.pool.scope.Columns`).
#[pyclass(frozen, name = "View", module = "quark._pool_rs")]
pub(super) struct PyView(Arc<Snapshot>);

#[pymethods]
impl PyView {
    #[getter]
    fn snapshot(&self) -> records::Snapshot {
        records::Snapshot::of(&self.0)
    }

    /// Ids below this were removed.
    #[getter]
    fn num_removed(&self) -> u64 {
        self.0.num_removed
    }

    #[getter]
    fn score_columns(&self) -> Vec<String> {
        self.0.columns.iter().map(|column| column.name.clone()).collect()
    }

    /// Score columns in the making.
    #[getter]
    fn drafts(&self) -> Vec<records::Draft> {
        records::Draft::all(&self.0)
    }

    fn __len__(&self) -> usize {
        self.0.num_samples as usize
    }

    fn quantize(
        &self,
        py: Python<'_>,
        num_quantiles: u64,
        score: &str,
        ties: &str,
        remainder: &str,
    ) -> PyResult<PyQuantization> {
        let (ties, remainder) = (tie_rule(ties)?, remainder_rule(remainder)?);
        let snapshot = self.0.clone();
        detached(py, || Quantization::new(snapshot, score, num_quantiles, ties, remainder))
            .map(|quantization| PyQuantization(Arc::new(quantization)))
    }

    /// A ranking by [N] values of the caller's, of the whole or within each prompt.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn quantize_values(
        &self,
        py: Python<'_>,
        num_quantiles: u64,
        values: PyReadonlyArray1<'_, f32>,
        per_prompt: bool,
        ties: &str,
        remainder: &str,
    ) -> PyResult<PyQuantization> {
        let (ties, remainder) = (tie_rule(ties)?, remainder_rule(remainder)?);
        let (snapshot, values) = (self.0.clone(), values.as_slice()?);
        detached(py, || {
            let values = values.to_vec();
            if per_prompt {
                Quantization::per_prompt(snapshot, values, num_quantiles, ties)
            } else {
                Quantization::of_values(snapshot, values, num_quantiles, ties, remainder)
            }
        })
        .map(|quantization| PyQuantization(Arc::new(quantization)))
    }

    /// A provenance column in id order.
    fn column<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let snapshot = &self.0;
        let is_meant = |column: &&SampleColumn| column.kind.is_some() && column.shown == Some(name);
        let Some(at) = COLUMNS.iter().position(|column| is_meant(&column)) else {
            return Err(PyKeyError::new_err(name.to_owned()));
        };
        match COLUMNS[at].blank {
            Value::U8(blank) => copied(py, snapshot, at, blank),
            Value::I16(blank) => copied(py, snapshot, at, blank),
            Value::U16(blank) => copied(py, snapshot, at, blank),
            Value::U32(blank) => copied(py, snapshot, at, blank),
            Value::U64(blank) => copied(py, snapshot, at, blank),
            Value::F32(blank) => copied(py, snapshot, at, blank),
        }
    }

    fn scores<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let snapshot = &self.0;
        let scores = detached(py, || {
            ensure_all::<f32>(snapshot)?;
            let mut scores = vec![0.0; snapshot.num_samples as usize];
            snapshot.copy_scores(snapshot.column(name)?, &mut scores)?;
            Ok(scores)
        })?;
        Ok(PyArray1::from_vec(py, scores))
    }
}

/// A `range` of ids; there are fewer than 2^62.
fn range(py: Python<'_>, ids: Range<u64>) -> PyResult<Bound<'_, PyRange>> {
    PyRange::new(py, ids.start as isize, ids.end as isize)
}

/// A `range` of ids.
#[derive(FromPyObject)]
struct Span {
    start: u64,
    stop: u64,
}

fn tie_rule(name: &str) -> PyResult<TieRule> {
    match name {
        "hash" => Ok(TieRule::Hash),
        "older_first" => Ok(TieRule::OlderFirst),
        "together" => Ok(TieRule::Together),
        _ => Err(PyValueError::new_err(format!("unknown tie rule {name:?}"))),
    }
}

fn remainder_rule(name: &str) -> PyResult<RemainderRule> {
    match name {
        "spread" => Ok(RemainderRule::Spread),
        "lowest" => Ok(RemainderRule::Lowest),
        _ => Err(PyValueError::new_err(format!("unknown remainder rule {name:?}"))),
    }
}

/// Refuse a column of all samples that memory does not hold.
fn ensure_all<T>(snapshot: &Snapshot) -> crate::error::Result<()> {
    let count = snapshot.num_samples;
    let bytes = u128::from(count) * size_of::<T>() as u128;
    ensure(bytes, || format!("a column of {count} samples"))
}

/// A fixed-width column of all segments as an array; `blank` for what was removed.
fn copied<'py, T: Element + Pod + Send + Sync>(
    py: Python<'py>,
    snapshot: &Snapshot,
    position: usize,
    blank: T,
) -> PyResult<Bound<'py, PyAny>> {
    let values = detached(py, || {
        ensure_all::<T>(snapshot)?;
        let mut values = vec![blank; snapshot.num_samples as usize];
        snapshot.copy_column(position, &mut values)?;
        Ok(values)
    })?;
    Ok(PyArray1::from_vec(py, values).into_any())
}

/// The ranking of one snapshot, cut into quantiles.
#[pyclass(frozen, name = "Quantization", module = "quark._pool_rs")]
pub(super) struct PyQuantization(Arc<Quantization>);

#[pymethods]
impl PyQuantization {
    #[getter]
    fn snapshot(&self) -> records::Snapshot {
        records::Snapshot::of(self.0.snapshot())
    }

    #[getter]
    fn counts<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        PyArray1::from_vec(py, self.0.counts().into_iter().map(|count| count as i64).collect())
    }

    #[getter]
    fn lower_bounds<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f32>>> {
        Ok(PyArray1::from_vec(py, detached(py, || self.0.lower_bounds())?))
    }

    #[getter]
    fn num_unranked(&self) -> u64 {
        self.0.num_unranked()
    }

    fn labels<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<i16>>> {
        // NumPy asks for large pages where an array is large, and leaves touching them first to those who fill it.
        let size = self.0.snapshot().num_samples;
        let array = py.import("numpy")?.call_method1("empty", (size, i16::get_dtype(py)))?;
        let array = array.cast_into::<PyArray1<i16>>()?;
        let mut labels = array.readwrite();
        let labels = labels.as_slice_mut()?;
        detached(py, || self.0.labels_into(labels))?;
        Ok(array)
    }

    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn labels_of<'py>(
        &self,
        py: Python<'py>,
        ids: PyReadonlyArray1<'py, u64>,
    ) -> PyResult<Bound<'py, PyArray1<i16>>> {
        let ids = ids.as_slice()?;
        let labels = detached(py, || {
            let mut labels = vec![0; ids.len()];
            self.0.labels_of(ids, &mut labels)?;
            Ok(labels)
        })?;
        Ok(PyArray1::from_vec(py, labels))
    }

    /// The same quantiles with the samples that [N] marks keep.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn only(&self, py: Python<'_>, is_kept: PyReadonlyArray1<'_, bool>) -> PyResult<Self> {
        let is_kept = is_kept.as_slice()?;
        detached(py, || self.0.only(is_kept)).map(|quantization| Self(Arc::new(quantization)))
    }

    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn sampler(&self, py: Python<'_>, settings: SamplerSettings) -> PyResult<PySampler> {
        PySampler::new(py, self.0.clone(), &settings)
    }
}
