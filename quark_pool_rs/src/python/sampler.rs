//! `Sampler`, for Python. Each method takes what it needs, releases the interpreter and calls the core.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::batch::BufferArrays;
use super::errors::detached;
use super::records;
use crate::gather::{Gathered, Packed, gather, pack};
use crate::quantization::Quantization;
use crate::sampler::{Drawn, Sampler, SamplingMode, Settings};
use crate::stream::Stream;

/// A `quark.pool.native._SamplerSettings`.
#[derive(FromPyObject)]
pub(super) struct SamplerSettings {
    batch_size: usize,
    seed: u64,
    mode: String,
    quantiles: Option<Vec<i64>>,
    rank: usize,
    world_size: usize,
    weights: Option<Vec<u32>>,
    max_uses: Option<u64>,
    bucket_window: usize,
}

/// A stateless stream of minibatches.
#[pyclass(frozen, name = "Sampler", module = "quark._pool_rs")]
pub(super) struct PySampler(Arc<Sampler>);

impl PySampler {
    pub(super) fn new(
        py: Python<'_>,
        quantization: Arc<Quantization>,
        settings: &SamplerSettings,
    ) -> PyResult<Self> {
        let mode = match &*settings.mode {
            "stratified" => SamplingMode::Stratified,
            "iid" => SamplingMode::Iid,
            "shuffle" => SamplingMode::Shuffle,
            mode => return Err(PyValueError::new_err(format!("unknown sampling mode {mode:?}"))),
        };
        let settings = Settings {
            batch_size: settings.batch_size,
            seed: settings.seed,
            mode,
            quantiles: settings.quantiles.clone(),
            rank: settings.rank,
            world_size: settings.world_size,
            weights: settings.weights.clone(),
            max_uses: settings.max_uses,
            bucket_window: settings.bucket_window,
        };
        detached(py, || Sampler::new(quantization, settings)).map(|s| Self(Arc::new(s)))
    }
}

#[pymethods]
impl PySampler {
    #[getter]
    fn num_batches(&self) -> Option<u128> {
        self.0.num_batches()
    }

    fn draw(&self, py: Python<'_>, step: u64) -> PyResult<records::Drawn> {
        Ok(records::Drawn::new(py, detached(py, || self.0.draw(step))?))
    }

    /// Batches from `start` on, padded if there is a `pad_id`, at most `depth` ahead of who asks.
    fn stream(
        &self,
        py: Python<'_>,
        start: u64,
        stop: u64,
        pad_id: Option<i64>,
        depth: usize,
    ) -> PyResult<PyStream> {
        let sampler = self.0.clone();
        let make = move |step| {
            let rows = sampler.draw(step)?;
            let snapshot = sampler.quantization().snapshot();
            let tokens = match pad_id {
                Some(pad_id) => Tokens::Padded(gather(snapshot, &rows.ids, pad_id)?),
                None => Tokens::Packed(pack(snapshot, &rows.ids)?),
            };
            Ok((rows, tokens))
        };
        let stream = detached(py, || Stream::new(start..stop, depth, make))?;
        Ok(PyStream(Mutex::new(stream)))
    }

    /// Padded.
    fn batch(&self, py: Python<'_>, step: u64, pad_id: i64) -> PyResult<records::PaddedBatch> {
        let (rows, tokens) = detached(py, || {
            let rows = self.0.draw(step)?;
            let tokens = gather(self.0.quantization().snapshot(), &rows.ids, pad_id)?;
            Ok((rows, tokens))
        })?;
        padded_batch(py, rows, tokens)
    }

    /// Packed.
    fn packed(&self, py: Python<'_>, step: u64) -> PyResult<records::PackedBatch> {
        let (rows, tokens) = detached(py, || {
            let rows = self.0.draw(step)?;
            let tokens = pack(self.0.quantization().snapshot(), &rows.ids)?;
            Ok((rows, tokens))
        })?;
        packed_batch(py, rows, tokens)
    }

    /// In the caller's memory, padded if there is a `pad_id`.
    fn batch_into(
        &self,
        py: Python<'_>,
        step: u64,
        pad_id: Option<i64>,
        mut buffers: BufferArrays<'_>,
    ) -> PyResult<records::Filled> {
        buffers.with(|mut buffers| {
            detached(py, || {
                let Drawn { ids, quantiles, scores } = self.0.draw(step)?;
                let snapshot = self.0.quantization().snapshot();
                let filled = buffers.fill(snapshot, &ids, pad_id)?;
                buffers.quantiles[..ids.len()].copy_from_slice(&quantiles);
                buffers.scores[..ids.len()].copy_from_slice(&scores);
                Ok(filled)
            })
        })
    }
}

/// Batches that a thread prepares.
#[pyclass(frozen, name = "Stream", module = "quark._pool_rs")]
pub(super) struct PyStream(Mutex<Stream<(Drawn, Tokens)>>);

#[pymethods]
impl PyStream {
    /// The next batch; None after the last one.
    fn next<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let next = detached(py, || self.0.lock().unwrap_or_else(PoisonError::into_inner).take())?;
        let Some((rows, tokens)) = next else { return Ok(None) };
        Ok(Some(match tokens {
            Tokens::Padded(padded) => padded_batch(py, rows, padded)?.into_pyobject(py)?.into_any(),
            Tokens::Packed(packed) => packed_batch(py, rows, packed)?.into_pyobject(py)?.into_any(),
        }))
    }

    /// End the thread and wait for it.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.lock().unwrap_or_else(PoisonError::into_inner).close());
    }
}

/// Token ids of a batch.
enum Tokens {
    Padded(Gathered),
    Packed(Packed),
}

fn padded_batch(py: Python<'_>, drawn: Drawn, tokens: Gathered) -> PyResult<records::PaddedBatch> {
    Ok(records::PaddedBatch {
        drawn: Py::new(py, records::Drawn::new(py, drawn))?,
        tokens: Py::new(py, records::Padded::new(py, tokens)?)?,
    })
}

fn packed_batch(py: Python<'_>, drawn: Drawn, tokens: Packed) -> PyResult<records::PackedBatch> {
    Ok(records::PackedBatch {
        drawn: Py::new(py, records::Drawn::new(py, drawn))?,
        tokens: Py::new(py, records::Packed::new(py, tokens))?,
    })
}
