//! Arrays in and out.

use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;

use crate::batch::Batch;
use crate::error::Result;
use crate::gather::{Gathered, ListsMut, Packed, Padding, TokensMut, check_room, locate};
use crate::snapshot::Snapshot;

/// A batch to append, as `quark.pool.native` lays it out: contiguous arrays of the right types.
#[derive(FromPyObject)]
pub(super) struct BatchArrays<'py> {
    key: PyBackedStr,
    prompt_tokens: PyReadonlyArray1<'py, u32>,
    prompt_offsets: PyReadonlyArray1<'py, i64>,
    prompt_texts: Option<Vec<PyBackedStr>>,
    prompt_metadata: Option<Vec<PyBackedStr>>,
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
    logprob_sampled: PyReadonlyArray1<'py, f32>,
    scores: Vec<(PyBackedStr, PyReadonlyArray1<'py, f32>)>,
}

impl BatchArrays<'_> {
    /// Call `work` with the same as slices.
    pub(super) fn with<T>(&self, work: impl FnOnce(&Batch<'_>) -> PyResult<T>) -> PyResult<T> {
        let prompt_offsets = self.prompt_offsets.as_slice()?;
        let num_prompts = prompt_offsets.len().saturating_sub(1);
        let prompt_texts = texts_or(self.prompt_texts.as_deref(), "", num_prompts);
        let prompt_metadata = texts_or(self.prompt_metadata.as_deref(), "{}", num_prompts);
        let completion_texts = self.completion_texts.as_deref().map(texts);
        let scores = self
            .scores
            .iter()
            .map(|(name, values)| Ok((&**name, values.as_slice()?)))
            .collect::<PyResult<Vec<_>>>()?;
        work(&Batch {
            key: &self.key,
            prompt_tokens: self.prompt_tokens.as_slice()?,
            prompt_offsets,
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
            logprob_sampled: self.logprob_sampled.as_slice()?,
            scores: &scores,
        })
    }
}

fn texts(texts: &[PyBackedStr]) -> Vec<&str> {
    texts.iter().map(|text| &**text).collect()
}

/// The texts of `column`, or `otherwise` as often as there should be some.
fn texts_or<'t>(
    column: Option<&'t [PyBackedStr]>,
    otherwise: &'t str,
    count: usize,
) -> Vec<&'t str> {
    column.map_or_else(|| vec![otherwise; count], texts)
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

/// Prompts, prompt offsets [B + 1], completions, completion offsets [B + 1].
pub(super) type PackedArrays<'py> = (
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
);

/// A packed batch as arrays that own its memory.
pub(super) fn to_packed_arrays(py: Python<'_>, packed: Packed) -> PackedArrays<'_> {
    (
        PyArray1::from_vec(py, packed.prompts),
        PyArray1::from_vec(py, packed.prompt_offsets),
        PyArray1::from_vec(py, packed.completions),
        PyArray1::from_vec(py, packed.completion_offsets),
    )
}

/// Token ids of the caller's buffers, of either type.
enum TokenArray<'py> {
    I64(PyReadwriteArray1<'py, i64>),
    I32(PyReadwriteArray1<'py, i32>),
}

impl<'a, 'py> FromPyObject<'a, 'py> for TokenArray<'py> {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        // Asked first, as an attempt that fails costs more than a batch.
        if object.cast::<PyArray1<i32>>().is_ok() {
            object.extract().map(Self::I32)
        } else {
            object.extract().map(Self::I64)
        }
    }
}

impl TokenArray<'_> {
    fn as_slice(&mut self) -> PyResult<TokensMut<'_>> {
        Ok(match self {
            Self::I64(array) => TokensMut::I64(array.as_slice_mut()?),
            Self::I32(array) => TokensMut::I32(array.as_slice_mut()?),
        })
    }
}

/// A `quark.pool.batch.BatchBuffers`.
#[derive(FromPyObject)]
pub(super) struct BufferArrays<'py> {
    ids: PyReadwriteArray1<'py, u64>,
    quantiles: PyReadwriteArray1<'py, i16>,
    scores: PyReadwriteArray1<'py, f32>,
    prompt_tokens: TokenArray<'py>,
    prompt_lengths: PyReadwriteArray1<'py, i32>,
    prompt_offsets: PyReadwriteArray1<'py, i64>,
    completion_tokens: TokenArray<'py>,
    completion_lengths: PyReadwriteArray1<'py, i32>,
    completion_offsets: PyReadwriteArray1<'py, i64>,
}

/// The same as slices.
pub(super) struct Buffers<'a> {
    pub(super) ids: &'a mut [u64],
    pub(super) quantiles: &'a mut [i16],
    pub(super) scores: &'a mut [f32],
    prompts: ListsMut<'a>,
    completions: ListsMut<'a>,
}

impl BufferArrays<'_> {
    /// Call `work` with the same as slices.
    pub(super) fn with<T>(&mut self, work: impl FnOnce(Buffers<'_>) -> PyResult<T>) -> PyResult<T> {
        work(Buffers {
            ids: self.ids.as_slice_mut()?,
            quantiles: self.quantiles.as_slice_mut()?,
            scores: self.scores.as_slice_mut()?,
            prompts: ListsMut {
                name: "prompt_tokens",
                tokens: self.prompt_tokens.as_slice()?,
                lengths: self.prompt_lengths.as_slice_mut()?,
                offsets: self.prompt_offsets.as_slice_mut()?,
            },
            completions: ListsMut {
                name: "completion_tokens",
                tokens: self.completion_tokens.as_slice()?,
                lengths: self.completion_lengths.as_slice_mut()?,
                offsets: self.completion_offsets.as_slice_mut()?,
            },
        })
    }
}

impl Buffers<'_> {
    /// Write some samples, padded if there is a `pad_id`; see `ListsMut::fill` for what is returned.
    pub(super) fn fill(
        &mut self,
        snapshot: &Snapshot,
        ids: &[u64],
        pad_id: Option<i64>,
    ) -> Result<(usize, usize)> {
        let room = self.ids.len().min(self.quantiles.len()).min(self.scores.len());
        check_room("ids, quantiles and scores", room, ids.len())?;
        let located = locate(snapshot, ids)?;
        self.ids[..ids.len()].copy_from_slice(ids);
        Ok((
            self.prompts.fill(&located.prompts, Padding::Left, pad_id)?,
            self.completions.fill(&located.completions, Padding::Right, pad_id)?,
        ))
    }
}
