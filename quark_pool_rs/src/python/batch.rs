//! Arrays of the caller's.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::collections::HashMap;

use numpy::{PyArray1, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::exceptions::{PyKeyError, PyTypeError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyDict;

use super::records::Filled;
use crate::batch::Batch;
use crate::columns::{COLUMNS, Given, Numbers, SampleColumn};
use crate::encoding::Kind;
use crate::error::Result;
use crate::gather::{ListsMut, Padding, TokensMut, check_room, locate};
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
    round: u32,
    chunk: u32,
    policy_step: u32,
    settings: PyBackedStr,
    numbers: Bound<'py, PyDict>,
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
        let numbers = COLUMNS
            .iter()
            .filter_map(|column| Some((column.given?, column.kind?)))
            .map(|(name, kind)| {
                let array = self.numbers.get_item(name)?;
                let array = array.ok_or_else(|| PyKeyError::new_err(name))?;
                Ok((name, NumberArray::extract(kind, &array)?))
            })
            .collect::<PyResult<HashMap<_, _>>>()?;
        let numbers_of = |column: &SampleColumn| match column.given.and_then(|n| numbers.get(n)) {
            Some(array) => array.as_numbers(),
            None => Err(PyKeyError::new_err(column.name)),
        };
        let given = Given::collect(numbers_of, |column| PyTypeError::new_err(column.name))?;
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
            round: self.round,
            chunk: self.chunk,
            policy_step: self.policy_step,
            settings: &self.settings,
            given,
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

/// Numbers of a batch, of the type of their column.
enum NumberArray<'py> {
    U8(PyReadonlyArray1<'py, u8>),
    I16(PyReadonlyArray1<'py, i16>),
    U16(PyReadonlyArray1<'py, u16>),
    U32(PyReadonlyArray1<'py, u32>),
    U64(PyReadonlyArray1<'py, u64>),
    F32(PyReadonlyArray1<'py, f32>),
}

impl<'py> NumberArray<'py> {
    fn extract(kind: Kind, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        Ok(match kind {
            Kind::U8 => Self::U8(array.extract()?),
            Kind::I16 => Self::I16(array.extract()?),
            Kind::U16 => Self::U16(array.extract()?),
            Kind::U32 => Self::U32(array.extract()?),
            Kind::U64 => Self::U64(array.extract()?),
            Kind::F32 => Self::F32(array.extract()?),
            Kind::ListU16 | Kind::ListU32 | Kind::Text | Kind::Bytes16 => {
                return Err(PyTypeError::new_err("a column of numbers"));
            }
        })
    }

    fn as_numbers(&self) -> PyResult<Numbers<'_>> {
        Ok(match self {
            Self::U8(array) => Numbers::U8(array.as_slice()?),
            Self::I16(array) => Numbers::I16(array.as_slice()?),
            Self::U16(array) => Numbers::U16(array.as_slice()?),
            Self::U32(array) => Numbers::U32(array.as_slice()?),
            Self::U64(array) => Numbers::U64(array.as_slice()?),
            Self::F32(array) => Numbers::F32(array.as_slice()?),
        })
    }
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
    /// Write some samples, padded if there is a `pad_id`.
    pub(super) fn fill(
        &mut self,
        snapshot: &Snapshot,
        ids: &[u64],
        pad_id: Option<i64>,
    ) -> Result<Filled> {
        let room = self.ids.len().min(self.quantiles.len()).min(self.scores.len());
        check_room("ids, quantiles and scores", room, ids.len())?;
        let located = locate(snapshot, ids)?;
        self.ids[..ids.len()].copy_from_slice(ids);
        Ok(Filled {
            num_rows: ids.len(),
            prompts: self.prompts.fill(&located.prompts, Padding::Left, pad_id)?,
            completions: self.completions.fill(&located.completions, Padding::Right, pad_id)?,
        })
    }
}
