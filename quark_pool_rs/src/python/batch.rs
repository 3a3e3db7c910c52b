//! Arrays in and out.

use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;

use crate::gather::Gathered;
use crate::pool::Batch;

/// A batch to append, as `quark.pool.native` lays it out: contiguous arrays of the right types.
#[derive(FromPyObject)]
pub(super) struct BatchArrays<'py> {
    key: PyBackedStr,
    prompt_tokens: PyReadonlyArray1<'py, u32>,
    prompt_offsets: PyReadonlyArray1<'py, i64>,
    prompt_texts: Vec<PyBackedStr>,
    prompt_metadata: Vec<PyBackedStr>,
    prompt_index: PyReadonlyArray1<'py, u32>,
    completion_tokens: PyReadonlyArray1<'py, u32>,
    completion_offsets: PyReadonlyArray1<'py, i64>,
    completion_texts: Option<Vec<PyBackedStr>>,
    finish_reasons: PyReadonlyArray1<'py, u8>,
    round: u32,
    chunk: u32,
    policy_step: u32,
    reward_tokens: PyReadonlyArray1<'py, i16>,
    settings: PyBackedStr,
    seeds: PyReadonlyArray1<'py, u64>,
    logprob_policy: PyReadonlyArray1<'py, f32>,
    logprob_reference: PyReadonlyArray1<'py, f32>,
    scores: Vec<(PyBackedStr, PyReadonlyArray1<'py, f32>)>,
}

impl BatchArrays<'_> {
    /// Call `work` with the same as slices.
    pub(super) fn with<T>(&self, work: impl FnOnce(&Batch<'_>) -> PyResult<T>) -> PyResult<T> {
        let prompt_texts = texts(&self.prompt_texts);
        let prompt_metadata = texts(&self.prompt_metadata);
        let completion_texts = self.completion_texts.as_deref().map(texts);
        let scores = self
            .scores
            .iter()
            .map(|(name, values)| Ok((&**name, values.as_slice()?)))
            .collect::<PyResult<Vec<_>>>()?;
        work(&Batch {
            key: &self.key,
            prompt_tokens: self.prompt_tokens.as_slice()?,
            prompt_offsets: self.prompt_offsets.as_slice()?,
            prompt_texts: &prompt_texts,
            prompt_metadata: &prompt_metadata,
            prompt_index: self.prompt_index.as_slice()?,
            completion_tokens: self.completion_tokens.as_slice()?,
            completion_offsets: self.completion_offsets.as_slice()?,
            completion_texts: completion_texts.as_deref(),
            finish: self.finish_reasons.as_slice()?,
            round: self.round,
            chunk: self.chunk,
            policy_step: self.policy_step,
            reward_tokens: self.reward_tokens.as_slice()?,
            settings: &self.settings,
            seeds: self.seeds.as_slice()?,
            logprob_policy: self.logprob_policy.as_slice()?,
            logprob_reference: self.logprob_reference.as_slice()?,
            scores: &scores,
        })
    }
}

fn texts(texts: &[PyBackedStr]) -> Vec<&str> {
    texts.iter().map(|text| &**text).collect()
}

/// Prompts [B, P], prompt lengths [B], completions [B, T], completion lengths [B].
pub(super) type GatheredArrays<'py> = (
    Bound<'py, PyArray2<i64>>,
    Bound<'py, PyArray1<i32>>,
    Bound<'py, PyArray2<i64>>,
    Bound<'py, PyArray1<i32>>,
);

/// A gathered batch as arrays that own its memory.
pub(super) fn to_arrays(py: Python<'_>, gathered: Gathered) -> PyResult<GatheredArrays<'_>> {
    let rows = gathered.prompt_lengths.len();
    let matrix = |values: Vec<i64>, width| PyArray1::from_vec(py, values).reshape([rows, width]);
    Ok((
        matrix(gathered.prompts, gathered.prompt_width)?,
        PyArray1::from_vec(py, gathered.prompt_lengths),
        matrix(gathered.completions, gathered.completion_width)?,
        PyArray1::from_vec(py, gathered.completion_lengths),
    ))
}
