//! Which samples a minibatch holds: a pure function of (quantization, settings, seed, step).
//!
//! Batch `step` takes the slots `step * B .. (step + 1) * B` of an endless sequence, so it can be drawn
//! without the ones before it.

use std::sync::Arc;

use crate::error::{PoolError, Result};
use crate::quantization::Quantization;
use crate::rng::{Permutation, below, hash};

/// How a sampler chooses the quantiles of a batch; see `quark/pool/base.py`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SamplingMode {
    /// The non-empty quantiles in turn, each walked without replacement.
    Stratified,
    /// Quantile uniform over the non-empty ones, sample uniform in it, with replacement.
    Iid,
    /// Epochs over all ranked samples.
    Shuffle,
}

/// Streams of randomness that must not meet.
#[derive(Clone, Copy)]
enum Stream {
    Stratified = 1,
    IidQuantile = 2,
    IidSample = 3,
    Shuffle = 4,
}

/// A stateless stream of minibatches.
pub struct Sampler {
    quantization: Arc<Quantization>,
    batch_size: usize,
    seed: u64,
    mode: SamplingMode,
    /// Label and size of the non-empty quantiles, ascending.
    strata: Vec<(i16, u64)>,
    /// Samples in the strata up to and with each.
    ends: Vec<u64>,
}

impl Sampler {
    /// Minibatches of `batch_size` of a quantization, of all its quantiles or of some.
    ///
    /// # Errors
    /// `Invalid` when there is nothing to draw from, a quantile does not exist, or the batch size is 0 or
    /// beyond 2^31.
    pub fn new(
        quantization: Arc<Quantization>,
        batch_size: usize,
        seed: u64,
        mode: SamplingMode,
        quantiles: Option<&[i64]>,
    ) -> Result<Self> {
        if batch_size == 0 || batch_size > 1 << 31 {
            return Err(PoolError::invalid(format!(
                "batch_size is {batch_size}; it goes from 1 to 2^31"
            )));
        }
        let counts = quantization.counts();
        let known = 0..counts.len() as i64;
        if let Some(wrong) = quantiles.unwrap_or_default().iter().find(|k| !known.contains(k)) {
            return Err(PoolError::invalid(format!(
                "there is no quantile {wrong}; they go from 0 to {}",
                known.end - 1
            )));
        }
        let is_wanted = |label: i16| quantiles.is_none_or(|only| only.contains(&i64::from(label)));
        let strata: Vec<(i16, u64)> =
            (0..).zip(counts).filter(|&(label, count)| count > 0 && is_wanted(label)).collect();
        if strata.is_empty() {
            return Err(PoolError::invalid(
                "there is nothing to draw from: no sample is ranked there",
            ));
        }
        let ends = strata
            .iter()
            .scan(0, |sum, (_, count)| {
                *sum += count;
                Some(*sum)
            })
            .collect();
        Ok(Self { quantization, batch_size, seed, mode, strata, ends })
    }

    /// What is sampled from.
    pub fn quantization(&self) -> &Arc<Quantization> {
        &self.quantization
    }

    /// Ids and quantiles of batch `step`.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    pub fn draw(&self, step: u64) -> Result<(Vec<u64>, Vec<i16>)> {
        let first = u128::from(step) * self.batch_size as u128;
        let places = self.places(first);
        let mut ids = vec![0; places.len()];
        self.quantization.ids_at(&places, &mut ids)?;
        Ok((ids, places.into_iter().map(|(quantile, _)| quantile).collect()))
    }

    fn stream(&self, stream: Stream) -> u64 {
        hash(self.seed, stream as u64)
    }

    /// Quantile and index in it for each slot from `first` on.
    fn places(&self, first: u128) -> Vec<(i16, u64)> {
        let slots = first..first + self.batch_size as u128;
        match self.mode {
            SamplingMode::Stratified => self.stratified(slots),
            SamplingMode::Iid => {
                let quantiles = self.stream(Stream::IidQuantile);
                let samples = self.stream(Stream::IidSample);
                slots
                    .map(|slot| {
                        let stratum = below(hash(quantiles, slot as u64), self.strata.len() as u64);
                        let (label, size) = self.strata[stratum as usize];
                        (label, below(hash(samples, slot as u64), size))
                    })
                    .collect()
            }
            SamplingMode::Shuffle => {
                let total = *self.ends.last().expect("not empty");
                let key = self.stream(Stream::Shuffle);
                let mut walk = Walk::new(key, total);
                slots
                    .map(|slot| {
                        let at = walk.place(slot);
                        let stratum = self.ends.partition_point(|&end| end <= at);
                        let (label, size) = self.strata[stratum];
                        (label, at - (self.ends[stratum] - size))
                    })
                    .collect()
            }
        }
    }

    fn stratified(&self, slots: std::ops::Range<u128>) -> Vec<(i16, u64)> {
        let key = self.stream(Stream::Stratified);
        let mut walks: Vec<Walk> = self
            .strata
            .iter()
            .map(|&(label, size)| Walk::new(hash(key, label as u64), size))
            .collect();
        let strata = self.strata.len() as u128;
        slots
            .map(|slot| {
                let stratum = (slot % strata) as usize;
                (self.strata[stratum].0, walks[stratum].place(slot / strata))
            })
            .collect()
    }
}

/// An endless walk over `0 .. n`: every epoch visits each once, in an order of its own.
struct Walk {
    key: u64,
    n: u64,
    epoch: u128,
    permutation: Permutation,
}

impl Walk {
    fn new(key: u64, n: u64) -> Self {
        Self { key, n, epoch: 0, permutation: Permutation::new(n, hash(key, 0)) }
    }

    #[inline]
    fn place(&mut self, step: u128) -> u64 {
        let epoch = step / u128::from(self.n);
        if epoch != self.epoch {
            self.epoch = epoch;
            self.permutation = Permutation::new(self.n, hash(self.key, epoch as u64));
        }
        self.permutation.apply((step % u128::from(self.n)) as u64)
    }
}
