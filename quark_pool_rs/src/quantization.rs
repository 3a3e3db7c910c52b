//! The quantiles of a ranking: their members, sizes and lowest scores.
//!
//! A ranking is by a score column, which has sorted runs, or by values that are computed on demand (a combination of
//! columns, a part of the samples, ranks within a prompt). Rules: `quark/pool/base.py`.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::sync::Arc;

use rayon::prelude::*;

use crate::columns::column;
use crate::error::{PoolError, Result};
use crate::format::RUN_DIR;
use crate::memory::ensure;
use crate::parts::{Column, Extent};
use crate::processor::{self, Kernel};
use crate::ranking::{Cut, Piece, Quantile, RemainderRule, Runs, TieRule};
use crate::runs::{LazyView, key_score, score_key};
use crate::selection::{count_ranked, cut_values, label_in_groups};
use crate::snapshot::Snapshot;
use crate::threads::parallel;

/// Number of scores that are labeled at a time. Their keys stay in the first-level cache.
const CHUNK: usize = 1024;
/// Number of scores that are compared with the cuts at once.
const LANES: usize = 32;
/// With more cuts than this, a binary search is faster than counting.
const MAX_VECTOR_CUTS: usize = 24;

/// Keys as signed numbers, for which more processors have vector comparisons.
#[inline]
fn signed_key(key: u32) -> i32 {
    (key ^ 1 << 31) as i32
}

/// The values of a ranking.
enum Source {
    /// A score column, from its runs.
    Column(usize),
    /// [N] computed values.
    Values(Vec<f32>),
    /// [N] computed values with [N] labels that do not follow from cuts.
    Labelled(Vec<f32>, Vec<i16>),
}

/// A quantile and an index in it, below the quantile's count.
pub type Position = (i16, u64);

/// The ranking of one snapshot, cut into quantiles.
pub struct Quantization {
    snapshot: Arc<Snapshot>,
    source: Source,
    /// The boundaries between quantile k and k + 1, lowest first.
    cuts: Vec<Cut>,
    quantiles: Vec<Quantile>,
}

impl Quantization {
    /// Cut a column into `num_quantiles`.
    ///
    /// # Errors
    /// `Invalid`, `UnknownColumn`, `Corrupted`, `Io`.
    pub fn new(
        snapshot: Arc<Snapshot>,
        score: &str,
        num_quantiles: u64,
        ties: TieRule,
        remainder: RemainderRule,
    ) -> Result<Self> {
        check_number(num_quantiles)?;
        let name = snapshot.column(score)?.name.clone();
        let column = snapshot.columns.iter().position(|c| c.name == name).expect("found above");
        let (cuts, quantiles) = {
            let runs = Runs::new(&snapshot, column);
            let total = runs.total();
            let cuts = runs.cuts(above(total, num_quantiles, remainder), ties)?;
            let quantiles = runs.quantiles(&cuts);
            (cuts, quantiles)
        };
        Ok(Self { snapshot, source: Source::Column(column), cuts, quantiles })
    }

    /// Rank by computed values: [N] in id order, NaN for samples that are not ranked.
    ///
    /// Needs 8 bytes for each ranked sample besides the values, and at most 12 more while cutting.
    ///
    /// # Errors
    /// `Invalid`, `Memory`.
    pub fn of_values(
        snapshot: Arc<Snapshot>,
        mut values: Vec<f32>,
        num_quantiles: u64,
        ties: TieRule,
        remainder: RemainderRule,
    ) -> Result<Self> {
        check_number(num_quantiles)?;
        check_length(&snapshot, &values)?;
        ensure_ranking(values.len())?;
        values[..snapshot.num_removed as usize].fill(f32::NAN);
        let total = count_ranked(&values);
        let above: Vec<u64> = above(total, num_quantiles, remainder).collect();
        let cuts = cut_values(&values, snapshot.context.settings.tie_seed, &above, ties);
        let source = Source::Values(values);
        let mut quantization = Self { snapshot, source, cuts, quantiles: Vec::new() };
        let labels = quantization.labels()?;
        quantization.quantiles = members(&labels, quantization.values(), num_quantiles);
        Ok(quantization)
    }

    /// Rank each sample among those of its own prompt. Of n samples, the one with r worse ones gets the quantile
    /// floor((r + 1/2) K / n), so that a prompt with few samples favors neither end.
    ///
    /// `values` as in [`Self::of_values`].
    ///
    /// # Errors
    /// `Invalid`, `Corrupted`, `Io`, `Memory`.
    pub fn per_prompt(
        snapshot: Arc<Snapshot>,
        mut values: Vec<f32>,
        num_quantiles: u64,
        ties: TieRule,
    ) -> Result<Self> {
        check_number(num_quantiles)?;
        check_length(&snapshot, &values)?;
        ensure_ranking(values.len())?;
        values[..snapshot.num_removed as usize].fill(f32::NAN);
        let mut prompts = vec![0_u32; values.len()];
        snapshot.copy_column(column::PROMPT, &mut prompts)?;
        let tie_seed = snapshot.context.settings.tie_seed;
        let labels = label_in_groups(&values, &prompts, num_quantiles, tie_seed, ties);
        let quantiles = members(&labels, &values, num_quantiles);
        Ok(Self { snapshot, source: Source::Labelled(values, labels), cuts: Vec::new(), quantiles })
    }

    /// The same quantiles with some of their samples. The others lose their label and are not drawn.
    ///
    /// `is_kept` is [N] in id order. The cuts stay the same.
    ///
    /// # Errors
    /// `Invalid`, `Corrupted`, `Io`.
    pub fn only(&self, is_kept: &[bool]) -> Result<Self> {
        let snapshot = self.snapshot.clone();
        if is_kept.len() as u64 != snapshot.num_samples {
            let (found, wanted) = (is_kept.len(), snapshot.num_samples);
            let message = format!("there are {found} marks for {wanted} samples");
            return Err(PoolError::invalid(message));
        }
        let mut labels = self.labels()?;
        for (label, _) in labels.iter_mut().zip(is_kept).filter(|(_, kept)| !**kept) {
            *label = -1;
        }
        let values = match &self.source {
            Source::Column(column) => {
                let mut scores = vec![0.0; labels.len()];
                snapshot.copy_scores(&snapshot.columns[*column], &mut scores)?;
                scores
            }
            Source::Values(values) | Source::Labelled(values, _) => values.clone(),
        };
        let quantiles = members(&labels, &values, self.quantiles.len() as u64);
        Ok(Self { snapshot, source: Source::Labelled(values, labels), cuts: Vec::new(), quantiles })
    }

    /// The runs with the slices of quantiles; computed values have none.
    fn runs(&self) -> Option<Runs<'_>> {
        match self.source {
            Source::Column(column) => Some(Runs::new(&self.snapshot, column)),
            Source::Values(_) | Source::Labelled(..) => None,
        }
    }

    /// [N] computed values.
    fn values(&self) -> &[f32] {
        match &self.source {
            Source::Column(_) => &[],
            Source::Values(values) | Source::Labelled(values, _) => values,
        }
    }

    /// The ranked snapshot.
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// [K] samples per quantile.
    pub fn counts(&self) -> Vec<u64> {
        self.quantiles.iter().map(Quantile::len).collect()
    }

    /// Number of samples without a score; removed samples do not count.
    pub fn num_unranked(&self) -> u64 {
        let ranked: u64 = self.quantiles.iter().map(Quantile::len).sum();
        self.snapshot.num_samples - self.snapshot.num_removed - ranked
    }

    /// [K] lowest score in each quantile, NaN where it is empty.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    pub fn lower_bounds(&self) -> Result<Vec<f32>> {
        let runs = self.runs();
        let bound = |quantile: &Quantile| {
            let mut lowest = None;
            let mut before = 0;
            for (piece, &end) in quantile.pieces.iter().zip(&quantile.ends) {
                let key = match piece {
                    Piece::Slice { run, start } => {
                        view(runs.as_ref(), *run).key(start + (end - before) as usize - 1)?
                    }
                    Piece::Ids { key, .. } => *key,
                };
                lowest = Some(lowest.map_or(key, |l: u32| l.min(key)));
                before = end;
            }
            Ok(lowest.map_or(f32::NAN, key_score))
        };
        self.quantiles.iter().map(bound).collect()
    }

    /// The id and score at each position. All three slices have the same length.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    pub fn samples_at(
        &self,
        positions: &[Position],
        ids: &mut [u64],
        scores: &mut [f32],
    ) -> Result<()> {
        let runs = self.runs();
        // In stages, so that the reads of the second stage are prefetched.
        let mut entries = Vec::with_capacity(positions.len());
        for &(quantile, index) in positions {
            let quantile = &self.quantiles[quantile as usize];
            let at = quantile.ends.partition_point(|&end| end <= index);
            let before = if at == 0 { 0 } else { quantile.ends[at - 1] };
            let offset = (index - before) as usize;
            let piece = &quantile.pieces[at];
            if let Piece::Slice { run, start } = piece {
                view(runs.as_ref(), *run).prefetch_id(start + offset)?;
            }
            entries.push((piece, offset));
        }
        let mut unread = Vec::new();
        let out = ids.iter_mut().zip(&mut *scores).enumerate();
        for ((piece, offset), (i, (id, score))) in entries.into_iter().zip(out) {
            match piece {
                Piece::Slice { run, start } => {
                    let view = view(runs.as_ref(), *run);
                    match view.entry(start + offset)? {
                        // 0.0 and -0.0 have the same key. The score has the sign.
                        Some((key, known)) if key == score_key(0.0) => *id = known,
                        Some((key, known)) => {
                            (*id, *score) = (known, key_score(key));
                            continue;
                        }
                        None => *id = view.id(start + offset)?,
                    }
                }
                Piece::Ids { ids, start, .. } => *id = ids[start + offset],
            }
            unread.push(i);
        }
        // These ids come from runs, so an unknown id is damage.
        if let Some(wrong) = ids.iter().find(|&&id| self.snapshot.check_id(id).is_err()) {
            let what = format!("a sorted run names sample {wrong}, which is not there");
            return Err(PoolError::corrupted(RUN_DIR, 0, what));
        }
        let other: Vec<u64> = unread.iter().map(|&i| ids[i]).collect();
        let mut found = vec![0.0; other.len()];
        self.scores_of(&other, &mut found)?;
        for (i, score) in unread.into_iter().zip(found) {
            scores[i] = score;
        }
        Ok(())
    }

    #[inline]
    fn label(&self, score: f32, id: u64, tie_seed: u64) -> i16 {
        if score.is_nan() {
            return -1;
        }
        let key = score_key(score);
        let is_beneath = |cut: &Cut| cut.is_beneath(key, id, tie_seed);
        self.cuts.partition_point(is_beneath) as i16
    }

    /// [N] the quantile of each sample in id order, -1 without a score.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    pub fn labels(&self) -> Result<Vec<i16>> {
        let mut labels = vec![0; self.snapshot.num_samples as usize];
        self.labels_into(&mut labels)?;
        Ok(labels)
    }

    /// The same into `out`, which has the length of the snapshot.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    ///
    /// # Panics
    /// If `out` has another length.
    pub fn labels_into(&self, out: &mut [i16]) -> Result<()> {
        assert_eq!(out.len() as u64, self.snapshot.num_samples, "labels of other samples");
        match &self.source {
            Source::Labelled(_, known) => out.copy_from_slice(known),
            Source::Values(values) => {
                let label = |(i, (labels, values)): (usize, (&mut [i16], &[f32]))| {
                    self.label_chunk(values, (i * CHUNK) as u64, labels);
                };
                parallel(|| {
                    let chunks = out.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK));
                    chunks.enumerate().for_each(label);
                });
            }
            Source::Column(column) => {
                self.label_column(&self.snapshot.columns[*column], out)?;
            }
        }
        Ok(())
    }

    fn label_column(&self, column: &Column, labels: &mut [i16]) -> Result<()> {
        // One slice of the output per extent; samples between extents have no score.
        let mut rest = labels;
        let mut done = 0;
        let mut parts = Vec::with_capacity(column.extents.len());
        for extent in &column.extents {
            let skip = (extent.first() - done) as usize;
            let (between, tail) = std::mem::take(&mut rest).split_at_mut(skip);
            between.fill(-1);
            let (part, tail) = tail.split_at_mut(extent.count());
            done = extent.first() + extent.count() as u64;
            rest = tail;
            parts.push((extent, part));
        }
        rest.fill(-1);
        let label = |(extent, part): (&Extent, &mut [i16])| {
            let scores = extent.scores(&self.snapshot.context, 0..extent.count())?;
            let chunks = part.chunks_mut(CHUNK).zip(scores.chunks(CHUNK));
            for ((labels, scores), first) in chunks.zip((extent.first()..).step_by(CHUNK)) {
                self.label_chunk(scores, first, labels);
            }
            Ok(())
        };
        parallel(|| parts.into_par_iter().try_for_each(label))
    }

    /// Labels of scores with consecutive ids: loops that the compiler vectorizes, then a second check of the few scores
    /// that equal a cut's.
    fn label_chunk(&self, scores: &[f32], first: u64, labels: &mut [i16]) {
        let tie_seed = self.snapshot.context.settings.tie_seed;
        let mut bounds = [0; MAX_VECTOR_CUTS];
        let Some(bounds) = bounds.get_mut(..self.cuts.len()) else {
            for ((label, &score), id) in labels.iter_mut().zip(scores).zip(first..) {
                *label = self.label(score, id, tie_seed);
            }
            return;
        };
        for (bound, cut) in bounds.iter_mut().zip(&self.cuts) {
            *bound = signed_key(cut.key);
        }
        if processor::run(Count { scores, bounds, labels: &mut *labels }) {
            for ((label, &score), id) in labels.iter_mut().zip(scores).zip(first..) {
                if bounds.contains(&signed_key(score_key(score))) {
                    *label = self.label(score, id, tie_seed);
                }
            }
        }
    }

    /// [M] the quantiles of some samples into `out`.
    ///
    /// # Errors
    /// `UnknownSample`, `Corrupted`, `Io`.
    pub fn labels_of(&self, ids: &[u64], out: &mut [i16]) -> Result<()> {
        if let Source::Labelled(_, labels) = &self.source {
            for (out, &id) in out.iter_mut().zip(ids) {
                self.snapshot.check_id(id)?;
                *out = labels[id as usize];
            }
            return Ok(());
        }
        let tie_seed = self.snapshot.context.settings.tie_seed;
        let mut scores = vec![0.0; ids.len()];
        self.scores_of(ids, &mut scores)?;
        for ((out, &score), &id) in out.iter_mut().zip(&scores).zip(ids) {
            *out = self.label(score, id, tie_seed);
        }
        Ok(())
    }

    /// [M] the scores that the ranking used into `out`.
    ///
    /// # Errors
    /// `UnknownSample`, `Corrupted`, `Io`.
    pub fn scores_of(&self, ids: &[u64], out: &mut [f32]) -> Result<()> {
        if let Source::Column(column) = self.source {
            return self.snapshot.scores_of(&self.snapshot.columns[column], ids, out);
        }
        for (out, &id) in out.iter_mut().zip(ids) {
            self.snapshot.check_id(id)?;
            *out = self.values()[id as usize];
        }
        Ok(())
    }
}

/// Labels scores by how many cuts are below each.
struct Count<'a> {
    scores: &'a [f32],
    /// Signed keys of the cuts.
    bounds: &'a [i32],
    labels: &'a mut [i16],
}

impl Kernel for Count<'_> {
    /// Whether a score equals a cut's.
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let Self { scores, bounds, labels } = self;
        let (blocks, rest) = scores.as_chunks::<LANES>();
        let (label_blocks, label_rest) = labels.as_chunks_mut::<LANES>();
        let mut ties = [0; LANES];
        for (labels, scores) in label_blocks.iter_mut().zip(blocks) {
            count_block(scores, bounds, labels, &mut ties);
        }
        if !rest.is_empty() {
            let (mut scores, mut labels) = ([f32::NAN; LANES], [0; LANES]);
            scores[..rest.len()].copy_from_slice(rest);
            count_block(&scores, bounds, &mut labels, &mut ties);
            label_rest.copy_from_slice(&labels[..rest.len()]);
        }
        ties != [0; LANES]
    }
}

/// As many scores as stay in registers while all cuts are compared.
#[inline(always)]
fn count_block(
    scores: &[f32; LANES],
    bounds: &[i32],
    labels: &mut [i16; LANES],
    ties: &mut [i32; LANES],
) {
    let (mut keys, mut counts) = ([0; LANES], [0; LANES]);
    for ((key, count), &score) in keys.iter_mut().zip(&mut counts).zip(scores) {
        *key = signed_key(score_key(score));
        // Stays below -1 for any number of cuts.
        *count = if score.is_nan() { i32::MIN } else { 0 };
    }
    for &bound in bounds {
        for ((count, tie), &key) in counts.iter_mut().zip(&mut *ties).zip(&keys) {
            *count += i32::from(key > bound);
            // All bits set, as vector comparisons return.
            *tie |= -i32::from(key == bound);
        }
    }
    for (label, &count) in labels.iter_mut().zip(&counts) {
        *label = count.max(-1) as i16;
    }
}

/// Only the quantiles of a column have slices.
#[inline]
fn view<'a, 'r>(runs: Option<&'r Runs<'a>>, run: usize) -> &'r LazyView<'a> {
    &runs.expect("slices are of runs").views[run]
}

fn check_number(num_quantiles: u64) -> Result<()> {
    if num_quantiles == 0 || num_quantiles > i16::MAX as u64 {
        return Err(PoolError::invalid(format!(
            "num_quantiles is {num_quantiles}; it goes from 1 to {}",
            i16::MAX
        )));
    }
    Ok(())
}

/// Refuse to rank values if their labels, orders and members do not fit into memory.
fn ensure_ranking(count: usize) -> Result<()> {
    ensure(24 * count as u128, || format!("ranking {count} samples"))
}

fn check_length(snapshot: &Snapshot, values: &[f32]) -> Result<()> {
    if values.len() as u64 != snapshot.num_samples {
        return Err(PoolError::invalid(format!(
            "there are {} values for {} samples",
            values.len(),
            snapshot.num_samples
        )));
    }
    Ok(())
}

/// How many of `total` ranked samples are above each cut, lowest cut first.
fn above(total: u64, num_quantiles: u64, remainder: RemainderRule) -> impl Iterator<Item = u64> {
    (1..num_quantiles).map(move |k| match remainder {
        RemainderRule::Spread => {
            total - (u128::from(k) * u128::from(total) / u128::from(num_quantiles)) as u64
        }
        RemainderRule::Lowest => (num_quantiles - k) * (total / num_quantiles),
    })
}

/// The members of each quantile, by age.
fn members(labels: &[i16], values: &[f32], num_quantiles: u64) -> Vec<Quantile> {
    let ranked = || (0_u64..).zip(labels).filter(|&(_, &label)| label >= 0);
    let mut counts = vec![0; num_quantiles as usize];
    for (_, &label) in ranked() {
        counts[label as usize] += 1;
    }
    let mut members: Vec<Vec<u64>> = counts.into_iter().map(Vec::with_capacity).collect();
    for (id, &label) in ranked() {
        members[label as usize].push(id);
    }
    let quantile = |ids: Vec<u64>| {
        let lowest = ids.iter().map(|&id| score_key(values[id as usize])).min();
        let mut quantile = Quantile::default();
        let (len, key) = (ids.len(), lowest.unwrap_or_default());
        quantile.push(Piece::Ids { ids: ids.into(), start: 0, key }, len);
        quantile
    };
    parallel(|| members.into_par_iter().map(quantile).collect())
}
