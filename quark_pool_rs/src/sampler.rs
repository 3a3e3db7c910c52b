//! Which samples a minibatch holds: a pure function of (quantization, settings, step).
//!
//! Batch `step` takes the slots `step * B .. (step + 1) * B` of an endless sequence, so it can be drawn
//! without the ones before it. Rules: `quark/pool/base.py`.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{PoolError, Result};
use crate::quantization::Quantization;
use crate::rng::{below, hash};
use crate::schedule::{Schedule, Walk};

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

/// What a sampler is told; see `quark/pool/base.py`.
#[derive(Debug, Clone)]
pub struct Settings {
    /// B, of all processes together.
    pub batch_size: usize,
    /// Of everything random.
    pub seed: u64,
    /// How quantiles are chosen.
    pub mode: SamplingMode,
    /// These alone; None takes all.
    pub quantiles: Option<Vec<i64>>,
    /// Which of the processes that share a batch.
    pub rank: usize,
    /// How many there are.
    pub world_size: usize,
}

impl Settings {
    /// All of every batch, of all quantiles.
    pub fn new(batch_size: usize, seed: u64, mode: SamplingMode) -> Self {
        Self { batch_size, seed, mode, quantiles: None, rank: 0, world_size: 1 }
    }

    fn check(&self) -> Result<()> {
        if self.batch_size == 0 || self.batch_size > 1 << 31 {
            return Err(PoolError::invalid(format!(
                "batch_size is {}; it goes from 1 to 2^31",
                self.batch_size
            )));
        }
        if self.rank >= self.world_size || self.world_size > self.batch_size {
            return Err(PoolError::invalid(format!(
                "rank {} of {} in a batch of {}: ranks go from 0 to world_size - 1, and each needs a sample",
                self.rank, self.world_size, self.batch_size
            )));
        }
        Ok(())
    }
}

/// Streams of randomness that must not meet.
#[derive(Clone, Copy)]
enum Stream {
    Stratified = 1,
    IidQuantile = 2,
    IidSample = 3,
    Shuffle = 4,
}

/// Quantile and index in it.
type Place = (i16, u64);

/// A stateless stream of minibatches.
pub struct Sampler {
    quantization: Arc<Quantization>,
    settings: Settings,
    /// Label and size of the non-empty quantiles, ascending.
    strata: Vec<(i16, u64)>,
    /// Samples in the strata up to and with each.
    ends: Vec<u64>,
    /// What is walked: each stratum, or all of them as one.
    walks: Vec<Walk>,
    schedule: Schedule,
}

impl Sampler {
    /// Minibatches of a quantization.
    ///
    /// # Errors
    /// `Invalid` when there is nothing to draw from, a quantile does not exist, or a setting is out of range.
    pub fn new(quantization: Arc<Quantization>, settings: Settings) -> Result<Self> {
        settings.check()?;
        let strata = strata(&quantization, settings.quantiles.as_deref())?;
        let ends: Vec<u64> = strata
            .iter()
            .scan(0, |sum, (_, count)| {
                *sum += count;
                Some(*sum)
            })
            .collect();
        let stream = |stream: Stream| hash(settings.seed, stream as u64);
        let walks: Vec<Walk> = match settings.mode {
            SamplingMode::Shuffle => {
                vec![Walk { key: stream(Stream::Shuffle), size: ends[ends.len() - 1] }]
            }
            _ => strata
                .iter()
                .map(|&(label, size)| {
                    let key = hash(stream(Stream::Stratified), label as u64);
                    Walk { key, size }
                })
                .collect(),
        };
        let schedule = Schedule::endless(walks.len());
        Ok(Self { quantization, settings, strata, ends, walks, schedule })
    }

    /// What is sampled from.
    pub fn quantization(&self) -> &Arc<Quantization> {
        &self.quantization
    }

    /// Samples of a batch that are this rank's.
    pub fn num_rows(&self) -> usize {
        (self.settings.batch_size - self.settings.rank).div_ceil(self.settings.world_size)
    }

    /// Ids and quantiles of batch `step`, of this rank.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    pub fn draw(&self, step: u64) -> Result<(Vec<u64>, Vec<i16>)> {
        let first = u128::from(step) * self.settings.batch_size as u128;
        let mut places = self.places(first..first + self.settings.batch_size as u128);
        if self.settings.world_size > 1 {
            let mine = places.into_iter().skip(self.settings.rank);
            places = mine.step_by(self.settings.world_size).collect();
        }
        let mut ids = vec![0; places.len()];
        self.quantization.ids_at(&places, &mut ids)?;
        Ok((ids, places.into_iter().map(|(quantile, _)| quantile).collect()))
    }

    fn places(&self, slots: Range<u128>) -> Vec<Place> {
        let mut places = Vec::with_capacity((slots.end - slots.start) as usize);
        match self.settings.mode {
            SamplingMode::Stratified => {
                self.schedule.visit(slots, &self.walks, |stratum, step| {
                    places.push((self.strata[stratum].0, step.place));
                });
            }
            SamplingMode::Shuffle => {
                self.schedule.visit(slots, &self.walks, |_, step| {
                    let stratum = self.ends.partition_point(|&end| end <= step.place);
                    let (label, size) = self.strata[stratum];
                    places.push((label, step.place - (self.ends[stratum] - size)));
                });
            }
            SamplingMode::Iid => {
                let quantiles = hash(self.settings.seed, Stream::IidQuantile as u64);
                let samples = hash(self.settings.seed, Stream::IidSample as u64);
                places.extend(slots.map(|slot| {
                    let stratum = below(hash(quantiles, slot as u64), self.strata.len() as u64);
                    let (label, size) = self.strata[stratum as usize];
                    (label, below(hash(samples, slot as u64), size))
                }));
            }
        }
        places
    }
}

/// Label and size of the non-empty quantiles, all or some.
fn strata(quantization: &Quantization, quantiles: Option<&[i64]>) -> Result<Vec<(i16, u64)>> {
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
        return Err(PoolError::invalid("there is nothing to draw from: no sample is ranked there"));
    }
    Ok(strata)
}
