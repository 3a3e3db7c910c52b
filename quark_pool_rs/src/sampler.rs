//! Chooses the samples of a minibatch: a pure function of (quantization, settings, step).
//!
//! Batch `step` takes the slots `step * B .. (step + 1) * B` of an endless sequence, so it can be drawn without the
//! earlier ones. Rules: `quark/pool/base.py`.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::ops::Range;
use std::sync::{Arc, Mutex};

use crate::aging::Aged;
use crate::bucketing::{Draw, deal};
use crate::error::{PoolError, Result};
use crate::gather::completion_lengths;
use crate::memory::ensure;
use crate::quantization::{Position, Quantization};
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

/// Settings of a sampler; see `quark/pool/base.py`.
#[derive(Debug, Clone)]
pub struct Settings {
    /// B, over all processes.
    pub batch_size: usize,
    /// Seed of all randomness.
    pub seed: u64,
    /// How quantiles are chosen.
    pub mode: SamplingMode,
    /// Draw from these quantiles only; None for all.
    pub quantiles: Option<Vec<i64>>,
    /// Rank among the processes that share a batch.
    pub rank: usize,
    /// Number of these processes.
    pub world_size: usize,
    /// Weights by age in rounds relative to the newest of the quantile, 2^20 for the newest; None for equal weights.
    pub weights: Option<Vec<u32>>,
    /// Maximum number of times that a sample is drawn.
    pub max_uses: Option<u64>,
    /// Bucket by length across this many batches; 1 turns it off.
    pub bucket_window: usize,
}

impl Settings {
    /// All of every batch, of all quantiles.
    pub fn new(batch_size: usize, seed: u64, mode: SamplingMode) -> Self {
        Self {
            batch_size,
            seed,
            mode,
            quantiles: None,
            rank: 0,
            world_size: 1,
            weights: None,
            max_uses: None,
            bucket_window: 1,
        }
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
        if self.weights.is_some() && self.mode != SamplingMode::Stratified {
            return Err(PoolError::invalid(
                "age weights apply within quantiles: the mode has to be stratified",
            ));
        }
        if self.max_uses.is_some() && self.mode == SamplingMode::Iid {
            return Err(PoolError::invalid(
                "draws with replacement cannot keep to max_uses: the mode is iid",
            ));
        }
        if self.max_uses == Some(0) {
            return Err(PoolError::invalid("max_uses is 0; at least 1 is needed"));
        }
        if self.bucket_window == 0 || self.bucket_window > (1 << 31) / self.batch_size {
            return Err(PoolError::invalid(format!(
                "bucket_window is {}; it goes from 1 to as many batches as have 2^31 samples",
                self.bucket_window
            )));
        }
        Ok(())
    }
}

/// Memory of a slot while it is drawn, scored and bucketed.
const BYTES_PER_SLOT: u128 = 256;

/// Separate streams of randomness.
#[derive(Clone, Copy)]
enum Stream {
    Stratified = 1,
    IidQuantile = 2,
    IidSample = 3,
    Shuffle = 4,
    Aged = 5,
    Buckets = 6,
}

/// A stateless stream of minibatches.
pub struct Sampler {
    quantization: Arc<Quantization>,
    settings: Settings,
    /// Label and size of the non-empty quantiles, ascending.
    strata: Vec<(i16, u64)>,
    /// Cumulative number of samples, each stratum included.
    ends: Vec<u64>,
    /// The sequences to walk: each stratum, or all of them as one.
    walks: Vec<Walk>,
    schedule: Schedule,
    /// The members of each stratum, if draws depend on age.
    aged: Vec<Aged>,
    /// The last bucketed window and its draws.
    dealt: Mutex<Option<Dealt>>,
}

/// Number of a window, its draws.
type Dealt = (u64, Arc<[Draw]>);

/// The samples of a batch, [B] each.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// Samples.
    pub ids: Vec<u64>,
    /// Their quantiles, 0 lowest.
    pub quantiles: Vec<i16>,
    /// The values that they were ranked by.
    pub scores: Vec<f32>,
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
        let aged = match &settings.weights {
            None => Vec::new(),
            Some(weights) => {
                let labels: Vec<i16> = strata.iter().map(|&(label, _)| label).collect();
                Aged::of(&quantization, &labels, weights, stream(Stream::Aged))?
            }
        };
        let walks: Vec<Walk> = if settings.mode == SamplingMode::Shuffle {
            vec![Walk { key: stream(Stream::Shuffle), size: ends[ends.len() - 1] }]
        } else {
            let key = stream(Stream::Stratified);
            let size = |i: usize, count| aged.get(i).map_or(count, Aged::size);
            let walk =
                |(i, &(label, count))| Walk { key: hash(key, label as u64), size: size(i, count) };
            strata.iter().enumerate().map(walk).collect()
        };
        if walks.iter().any(|walk| walk.size == 0) {
            return Err(PoolError::invalid("the weight of the newest round is too small"));
        }
        let schedule = settings.max_uses.map_or_else(
            || Schedule::endless(walks.len()),
            |uses| {
                let turns = |walk: &Walk| u128::from(uses) * u128::from(walk.size);
                Schedule::limited(&walks.iter().map(turns).collect::<Vec<_>>())
            },
        );
        let dealt = Mutex::default();
        Ok(Self { quantization, settings, strata, ends, walks, schedule, aged, dealt })
    }

    /// What is sampled from.
    pub fn quantization(&self) -> &Arc<Quantization> {
        &self.quantization
    }

    /// Number of batches until the samples are used up; None without a limit.
    pub fn num_batches(&self) -> Option<u128> {
        self.schedule.num_slots().map(|slots| slots / self.settings.batch_size as u128)
    }

    /// Batch `step`, of this rank.
    ///
    /// # Errors
    /// `Invalid` beyond the last batch, `Corrupted`, `Io`.
    pub fn draw(&self, step: u64) -> Result<Drawn> {
        let Settings { batch_size, rank, world_size, bucket_window, .. } = self.settings;
        if let Some(number) = self.num_batches()
            && u128::from(step) >= number
        {
            return Err(PoolError::invalid(format!(
                "there is no batch {step}: with max_uses = {} the samples are used up after {number} batches of {batch_size}",
                self.settings.max_uses.unwrap_or_default()
            )));
        }
        if bucket_window > 1 {
            let window = bucket_window as u64;
            let draws = self.window(step / window)?;
            let first = (step % window) as usize * batch_size;
            let mine = draws[first..first + batch_size].iter().skip(rank).step_by(world_size);
            return self.scored(mine.map(|&(quantile, id)| (id, quantile)).unzip());
        }
        let first = u128::from(step) * batch_size as u128;
        self.drawn(first..first + batch_size as u128, rank, world_size)
    }

    /// The draws of a window, bucketed by length.
    fn window(&self, number: u64) -> Result<Arc<[Draw]>> {
        let kept = self.dealt.lock().expect("no panic while it is held").clone();
        if let Some((of, draws)) = kept
            && of == number
        {
            return Ok(draws);
        }
        let size = self.settings.bucket_window as u128;
        let first = u128::from(number) * size;
        let last = self.num_batches().map_or(first + size, |end| end.min(first + size));
        let batch_size = self.settings.batch_size as u128;
        let Drawn { ids, quantiles, .. } =
            self.drawn(first * batch_size..last * batch_size, 0, 1)?;
        let lengths = completion_lengths(self.quantization.snapshot(), &ids)?;
        let mut draws: Vec<Draw> = quantiles.into_iter().zip(ids).collect();
        let key = hash(hash(self.settings.seed, Stream::Buckets as u64), number);
        deal(&mut draws, &lengths, self.settings.batch_size, key);
        let draws: Arc<[Draw]> = draws.into();
        *self.dealt.lock().expect("no panic while it is held") = Some((number, draws.clone()));
        Ok(draws)
    }

    /// Some slots: every `stride`-th from `skip` on.
    fn drawn(&self, slots: Range<u128>, skip: usize, stride: usize) -> Result<Drawn> {
        let Settings { batch_size, bucket_window, .. } = self.settings;
        ensure((slots.end - slots.start) * BYTES_PER_SLOT, || match bucket_window {
            1 => format!("batch_size is {batch_size}"),
            _ => format!("batch_size is {batch_size} and bucket_window {bucket_window}"),
        })?;
        if !self.aged.is_empty() {
            return self.scored(self.drawn_by_age(slots, skip, stride));
        }
        let mut positions = self.positions(slots);
        if stride > 1 {
            positions = positions.into_iter().skip(skip).step_by(stride).collect();
        }
        let (mut ids, mut scores) = (vec![0; positions.len()], vec![0.0; positions.len()]);
        self.quantization.samples_at(&positions, &mut ids, &mut scores)?;
        let quantiles = positions.into_iter().map(|(quantile, _)| quantile).collect();
        Ok(Drawn { ids, quantiles, scores })
    }

    fn scored(&self, (ids, quantiles): (Vec<u64>, Vec<i16>)) -> Result<Drawn> {
        let mut scores = vec![0.0; ids.len()];
        self.quantization.scores_of(&ids, &mut scores)?;
        Ok(Drawn { ids, quantiles, scores })
    }

    fn drawn_by_age(&self, slots: Range<u128>, skip: usize, stride: usize) -> (Vec<u64>, Vec<i16>) {
        let len = ((slots.end - slots.start) as usize).saturating_sub(skip).div_ceil(stride);
        let (mut ids, mut quantiles) = (vec![0; len], vec![0; len]);
        self.schedule.visit(slots, &self.walks, |steps| {
            let mine =
                |&(slot, _): &(usize, u64)| slot >= skip && (slot - skip).is_multiple_of(stride);
            for (slot, position) in steps.slots().filter(mine) {
                ids[(slot - skip) / stride] = self.aged[steps.stratum].id(steps.epoch, position);
                quantiles[(slot - skip) / stride] = self.strata[steps.stratum].0;
            }
        });
        (ids, quantiles)
    }

    fn positions(&self, slots: Range<u128>) -> Vec<Position> {
        let mut positions = vec![(0, 0); (slots.end - slots.start) as usize];
        match self.settings.mode {
            SamplingMode::Stratified => {
                self.schedule.visit(slots, &self.walks, |steps| {
                    let (label, _) = self.strata[steps.stratum];
                    for (slot, position) in steps.slots() {
                        positions[slot] = (label, position);
                    }
                });
            }
            SamplingMode::Shuffle => {
                self.schedule.visit(slots, &self.walks, |steps| {
                    for (slot, position) in steps.slots() {
                        let stratum = self.ends.partition_point(|&end| end <= position);
                        let (label, size) = self.strata[stratum];
                        positions[slot] = (label, position - (self.ends[stratum] - size));
                    }
                });
            }
            SamplingMode::Iid => {
                let quantiles = hash(self.settings.seed, Stream::IidQuantile as u64);
                let samples = hash(self.settings.seed, Stream::IidSample as u64);
                for (position, slot) in positions.iter_mut().zip(slots) {
                    let stratum = below(hash(quantiles, slot as u64), self.strata.len() as u64);
                    let (label, size) = self.strata[stratum as usize];
                    *position = (label, below(hash(samples, slot as u64), size));
                }
            }
        }
        positions
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
