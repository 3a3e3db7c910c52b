//! The classes. Each method takes what it needs, releases the interpreter and calls the core.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytemuck::Pod;
use numpy::{Element, PyArray1, PyArrayMethods, PyReadonlyArray1};
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::batch::{
    BatchArrays, BufferArrays, GatheredArrays, PackedArrays, to_arrays, to_packed_arrays,
};
use super::errors::detached;
use super::sampler::{PySampler, SamplerSettings};
use crate::describe::describe;
use crate::fork::fork;
use crate::format::{FORMAT_VERSION, PoolSettings};
use crate::gather::{gather, pack};
use crate::manifest::AppendEntry;
use crate::memory::ensure;
use crate::parts::{Column, Segment};
use crate::pool::{OpenOptions, Pool};
use crate::quantization::Quantization;
use crate::ranking::{RemainderRule, TieRule};
use crate::retention::Limits;
use crate::rows::rows;
use crate::segment::column;
use crate::snapshot::Snapshot;
use crate::storage::{FileStorage, Storage};

/// Generation, hash, number of samples.
type SnapshotTuple = (u64, String, u64);
/// A row of `PyPool::appends`.
type AppendTuple = (String, u64, String, u64, u64, u32, u32);

fn snapshot_tuple(snapshot: &Snapshot) -> SnapshotTuple {
    (snapshot.generation, snapshot.hash(), snapshot.num_samples)
}

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
    fn snapshot(&self) -> SnapshotTuple {
        snapshot_tuple(&self.0.snapshot())
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

    /// Per append: its file, the first id in that file, key, first id, samples, round, chunk.
    fn appends(&self) -> Vec<AppendTuple> {
        let snapshot = self.0.snapshot();
        let of_segment = |segment: &Arc<Segment>| {
            let entry = segment.entry.clone();
            let row = |(append, ids): (AppendEntry, Range<u64>)| {
                let (file, begin) = (entry.file.name.clone(), entry.first);
                let count = ids.end - ids.start;
                (file, begin, append.key, ids.start, count, append.round, append.chunk)
            };
            entry.appends().map(row).collect::<Vec<_>>()
        };
        snapshot.segments.iter().flat_map(of_segment).collect()
    }

    /// Whether there were small files to make one of.
    fn compact_once(&self, py: Python<'_>, max_samples: u64) -> PyResult<bool> {
        detached(py, || self.0.compact_once(max_samples))
    }

    /// The oldest sample that is left, appends and samples that went (or would).
    fn retain(
        &self,
        py: Python<'_>,
        max_samples: Option<u64>,
        max_rounds: Option<u64>,
        before_round: Option<u32>,
        dry_run: bool,
    ) -> PyResult<(u64, u64, u64)> {
        let limits = Limits { max_samples, max_rounds, before_round };
        let retained = detached(py, || self.0.retain(&limits, dry_run))?;
        Ok((retained.first, retained.appends, retained.samples))
    }

    /// The oldest generation that is left, files and bytes that went (or would).
    fn gc(&self, py: Python<'_>, keep: u64, dry_run: bool) -> PyResult<(u64, u64, u64)> {
        let collected = detached(py, || self.0.collect(keep, dry_run))?;
        Ok((collected.oldest, collected.files, collected.bytes))
    }

    /// uuid, `vocab_size`, `store_text`, `tie_seed`, metadata
    #[getter]
    fn settings(&self) -> (String, u32, bool, u64, String) {
        let snapshot = self.0.snapshot();
        let s = &snapshot.home.settings;
        (s.uuid.clone(), s.vocab_size, s.store_text, s.tie_seed, s.metadata.clone())
    }

    /// Whether the pool's version has a place for `logprob_sampled`.
    #[getter]
    fn has_sampled_logprobs(&self) -> bool {
        self.0.snapshot().home.settings.has_sampled_logprobs()
    }

    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn append(&self, py: Python<'_>, batch: BatchArrays<'_>) -> PyResult<(u64, u64)> {
        batch.with(|batch| detached(py, || self.0.append(batch).map(|ids| (ids.start, ids.end))))
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

    fn find(&self, key: &str) -> Option<(u64, u64)> {
        self.0.find(key).map(|ids| (ids.start, ids.end))
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

    fn samples<'py>(&self, py: Python<'py>, ids: Vec<u64>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let snapshot = self.0.snapshot();
        let samples = detached(py, || {
            ids.into_iter().map(|id| snapshot.sample(id)).collect::<crate::error::Result<Vec<_>>>()
        })?;
        samples
            .into_iter()
            .map(|sample| {
                let dict = PyDict::new(py);
                dict.set_item("id", sample.id)?;
                dict.set_item("prompt_id", sample.prompt_id)?;
                dict.set_item("prompt_text", sample.prompt_text)?;
                dict.set_item("prompt_tokens", PyArray1::from_vec(py, sample.prompt_tokens))?;
                dict.set_item("prompt_metadata", sample.prompt_metadata)?;
                dict.set_item(
                    "completion_tokens",
                    PyArray1::from_vec(py, sample.completion_tokens),
                )?;
                dict.set_item("completion_text", sample.completion_text)?;
                dict.set_item("finish_reason", sample.finish)?;
                dict.set_item("round", sample.round)?;
                dict.set_item("chunk", sample.chunk)?;
                dict.set_item("policy_step", sample.policy_step)?;
                dict.set_item("reward_token", sample.reward_token)?;
                dict.set_item("settings", &*sample.settings)?;
                dict.set_item("seed", sample.seed)?;
                dict.set_item("logprob_policy", sample.logprob_policy)?;
                dict.set_item("logprob_reference", sample.logprob_reference)?;
                dict.set_item("logprob_sampled", sample.logprob_sampled)?;
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
        spans: Vec<(u64, u64)>,
        names: Vec<String>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let snapshot = self.0.snapshot();
        let bytes = detached(py, || {
            let spans: Vec<_> = spans.into_iter().map(|(start, end)| start..end).collect();
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
    ) -> PyResult<GatheredArrays<'py>> {
        let snapshot = self.0.snapshot();
        let ids = ids.as_slice()?;
        to_arrays(py, detached(py, || gather(&snapshot, ids, pad_id))?)
    }

    /// Some samples, packed.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn pack<'py>(
        &self,
        py: Python<'py>,
        ids: PyReadonlyArray1<'py, u64>,
    ) -> PyResult<PackedArrays<'py>> {
        let snapshot = self.0.snapshot();
        let ids = ids.as_slice()?;
        Ok(to_packed_arrays(py, detached(py, || pack(&snapshot, ids))?))
    }

    /// Some samples in the caller's memory, padded if there is a `pad_id`: widths, or numbers of token ids.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn gather_into<'py>(
        &self,
        py: Python<'py>,
        ids: PyReadonlyArray1<'py, u64>,
        pad_id: Option<i64>,
        mut buffers: BufferArrays<'py>,
    ) -> PyResult<(usize, usize)> {
        let snapshot = self.0.snapshot();
        let ids = ids.as_slice()?;
        buffers.with(|mut buffers| {
            buffers.quantiles.fill(-1);
            buffers.scores.fill(f32::NAN);
            detached(py, || buffers.fill(&snapshot, ids, pad_id))
        })
    }

    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let snapshot = self.0.snapshot();
        let description = detached(py, || describe(&snapshot))?;
        let dict = PyDict::new(py);
        dict.set_item("snapshot", snapshot_tuple(&snapshot))?;
        dict.set_item("num_removed", description.num_removed)?;
        dict.set_item("num_prompts", description.num_prompts)?;
        dict.set_item("num_segments", description.num_segments)?;
        dict.set_item("num_bytes", description.num_bytes)?;
        let columns: Vec<_> = description
            .columns
            .into_iter()
            .map(|c| {
                (
                    (c.name, c.version, c.source),
                    (c.scored, c.unscored, c.num_runs),
                    (c.mean, c.std, c.min, c.max),
                )
            })
            .collect();
        dict.set_item("score_columns", columns)?;
        dict.set_item("drafts", drafts(&snapshot))?;
        Ok(dict)
    }
}

/// One snapshot, also where its pool moves on: what a ranking by values is made from
/// (`quark.pool.scope.Columns`).
#[pyclass(frozen, name = "View", module = "quark._pool_rs")]
pub(super) struct PyView(Arc<Snapshot>);

#[pymethods]
impl PyView {
    #[getter]
    fn snapshot(&self) -> SnapshotTuple {
        snapshot_tuple(&self.0)
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

    /// Name, source and end of each.
    #[getter]
    fn drafts(&self) -> Vec<(String, String, u64)> {
        drafts(&self.0)
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
        match name {
            "prompt_id" => copied(py, snapshot, column::PROMPT, 0_u32),
            "finish_reason" => copied(py, snapshot, column::FINISH, 0_u8),
            "round" => copied(py, snapshot, column::ROUND, 0_u32),
            "chunk" => copied(py, snapshot, column::CHUNK, 0_u32),
            "policy_step" => copied(py, snapshot, column::POLICY_STEP, 0_u32),
            "reward_token" => copied(py, snapshot, column::REWARD_TOKEN, -1_i16),
            "seed" => copied(py, snapshot, column::SEED, 0_u64),
            "logprob_policy" => copied(py, snapshot, column::LOGPROB_POLICY, f32::NAN),
            "logprob_reference" => copied(py, snapshot, column::LOGPROB_REFERENCE, f32::NAN),
            "logprob_sampled" => copied(py, snapshot, column::LOGPROB_SAMPLED, f32::NAN),
            _ => Err(PyKeyError::new_err(name.to_owned())),
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

/// Name, source and end of the score columns in the making.
fn drafts(snapshot: &Snapshot) -> Vec<(String, String, u64)> {
    let draft = |draft: &Column| {
        (draft.name.clone(), draft.source.clone(), snapshot.draft_end(Some(draft)))
    };
    snapshot.drafts.iter().map(draft).collect()
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
    fn snapshot(&self) -> SnapshotTuple {
        snapshot_tuple(self.0.snapshot())
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
