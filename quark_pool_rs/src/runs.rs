//! Sorted runs: the samples of a range of ids, ordered by one score column.
//!
//! A run holds its samples best first: key descending, then tie hash, then id. FORMAT.md specifies its layout.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::parts::{Context, Run, RunLocation};
use crate::rng::hash;
use crate::segment::{MAX_RUN_SPAN, run_column};
use crate::snapshot::Snapshot;

/// This many runs of one level are merged into one of the next.
const TIER: usize = 8;

/// A key that orders like the score. -0.0 equals 0.0. The score must not be NaN.
#[inline]
pub fn score_key(score: f32) -> u32 {
    let bits = if score == 0.0 { 0 } else { score.to_bits() };
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// The score of a key.
pub fn key_score(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key ^ 1 << 31 } else { !key })
}

/// Among equal scores, the sample with the smaller hash ranks higher.
#[inline]
pub fn tie_hash(tie_seed: u64, id: u64) -> u64 {
    hash(tie_seed, id)
}

/// Stable sort by the upper halves: a radix sort by 11 bits at a time, the lowest first.
fn sort_words(words: &mut Vec<u64>) {
    const BITS: u32 = 11;
    let digit = |word: u64, pass: u32| (word >> (32 + BITS * pass)) as usize & ((1 << BITS) - 1);
    let mut sorted = vec![0; words.len()];
    for pass in 0..3 {
        let mut ends = [0_usize; 1 << BITS];
        for &word in &*words {
            ends[digit(word, pass)] += 1;
        }
        if ends.contains(&words.len()) {
            continue;
        }
        let mut end = 0;
        for count in &mut ends {
            (*count, end) = (end, end + *count);
        }
        for &word in &*words {
            let at = &mut ends[digit(word, pass)];
            sorted[*at] = word;
            *at += 1;
        }
        std::mem::swap(words, &mut sorted);
    }
}

/// Row numbers best first, then the rows without a score; and the number of rows with a score.
pub fn sort_scores(scores: &[f32], first_id: u64, tie_seed: u64) -> (Vec<u32>, usize) {
    // (inverted key, row) in one word. Ties are few and are resolved afterwards.
    let mut words: Vec<u64> = Vec::with_capacity(scores.len());
    let mut unscored = Vec::new();
    for (row, &score) in scores.iter().enumerate() {
        if score.is_nan() {
            unscored.push(row as u32);
        } else {
            words.push(u64::from(!score_key(score)) << 32 | row as u64);
        }
    }
    sort_words(&mut words);
    for block in words.chunk_by_mut(|a, b| a >> 32 == b >> 32) {
        if block.len() > 1 {
            block.sort_by_cached_key(|word| tie_hash(tie_seed, first_id + (word & 0xffff_ffff)));
        }
    }
    let scored = words.len();
    let order = words.iter().map(|&word| word as u32).chain(unscored).collect();
    (order, scored)
}

/// The runs to merge and the level of the result: the last [`TIER`] if they have the same level and do not span more
/// than a run can.
///
/// `runs` are (level, first id) in the order in which the runs were created. All ids are below `end`.
pub fn plan_merge(runs: &[(u8, u64)], end: u64) -> Option<(Range<usize>, u8)> {
    let start = runs.len().checked_sub(TIER)?;
    let (level, first) = runs[start];
    let fits = end.checked_sub(first).is_some_and(|span| span <= MAX_RUN_SPAN);
    let is_due = fits && runs[start..].iter().all(|run| run.0 == level);
    is_due.then(|| (start..runs.len(), level + 1))
}

/// The run of a batch that is not committed yet.
#[derive(Debug, Clone, Copy)]
pub struct OwnRun<'a> {
    /// First sample id.
    pub first: u64,
    /// All scores of the batch.
    pub scores: &'a [f32],
    /// Rows with a score, best first.
    pub order: &'a [u32],
}

impl OwnRun<'_> {
    /// The run of an empty batch.
    pub const NONE: Self = Self { first: 0, scores: &[], order: &[] };

    /// Ids are below this.
    pub fn end(&self) -> u64 {
        self.first + self.scores.len() as u64
    }

    /// Keys and ids, best first.
    fn entries(self) -> (Vec<u32>, Vec<u64>) {
        let entry =
            |&row: &u32| (score_key(self.scores[row as usize]), self.first + u64::from(row));
        self.order.iter().map(entry).unzip()
    }
}

/// A run whose blocks are checked as they are touched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LazyView<'a> {
    context: &'a Context,
    run: &'a Run,
}

impl<'a> LazyView<'a> {
    pub(crate) fn new(context: &'a Context, run: &'a Run) -> Self {
        Self { context, run }
    }

    pub(crate) fn len(&self) -> usize {
        self.run.entry.entries as usize
    }

    #[inline]
    pub(crate) fn key(&self, at: usize) -> Result<u32> {
        match &self.run.location {
            RunLocation::Extent(extent) => {
                let row = extent.row(self.context, at)?;
                Ok(score_key(extent.scores(self.context, row..row + 1)?[0]))
            }
            RunLocation::Merged(file) => {
                let file = self.run.open_merged(self.context, file)?;
                if self.context.settings.has_compact_orders() {
                    Ok(self.entry_of(file.value(run_column::ENTRY, at)?).0)
                } else {
                    file.value(run_column::KEY, at)
                }
            }
        }
    }

    #[inline]
    pub(crate) fn id(&self, at: usize) -> Result<u64> {
        match &self.run.location {
            RunLocation::Extent(extent) => {
                Ok(extent.first() + extent.row(self.context, at)? as u64)
            }
            RunLocation::Merged(file) => {
                let file = self.run.open_merged(self.context, file)?;
                if self.context.settings.has_compact_orders() {
                    Ok(self.entry_of(file.value(run_column::ENTRY, at)?).1)
                } else {
                    file.value(run_column::ID, at)
                }
            }
        }
    }

    /// Key and id, if one read gives both.
    #[inline]
    pub(crate) fn entry(&self, at: usize) -> Result<Option<(u32, u64)>> {
        match &self.run.location {
            RunLocation::Merged(file) if self.context.settings.has_compact_orders() => {
                let file = self.run.open_merged(self.context, file)?;
                Ok(Some(self.entry_of(file.value(run_column::ENTRY, at)?)))
            }
            _ => Ok(None),
        }
    }

    /// Key and id of an entry of a compact run.
    #[inline]
    fn entry_of(&self, word: u64) -> (u32, u64) {
        ((word >> 32) as u32, self.run.entry.first.wrapping_add(word & 0xffff_ffff))
    }

    /// Prefetch what [`Self::id`] reads.
    #[inline]
    pub(crate) fn prefetch_id(&self, at: usize) -> Result<()> {
        self.prefetch(at, run_column::ID)
    }

    /// Prefetch what [`Self::key`] reads first.
    #[inline]
    pub(crate) fn prefetch_key(&self, at: usize) -> Result<()> {
        self.prefetch(at, run_column::KEY)
    }

    #[inline]
    fn prefetch(&self, at: usize, column: usize) -> Result<()> {
        match &self.run.location {
            RunLocation::Extent(extent) => extent.prefetch_order(self.context, at)?,
            RunLocation::Merged(file) => {
                let is_compact = self.context.settings.has_compact_orders();
                let column = if is_compact { run_column::ENTRY } else { column };
                self.run.open_merged(self.context, file)?.prefetch_row(column, at);
            }
        }
        Ok(())
    }

    /// Prefetch what [`Self::key`] reads last, if its location depends on what it reads first.
    pub(crate) fn prefetch_key_of_row(&self, at: usize) -> Result<()> {
        match &self.run.location {
            RunLocation::Extent(extent) => {
                extent.prefetch_score(self.context, extent.row(self.context, at)?)
            }
            RunLocation::Merged(_) => Ok(()),
        }
    }

    /// All keys and ids, best first.
    pub(crate) fn entries(&self) -> Result<(Vec<u32>, Vec<u64>)> {
        let len = self.len();
        match &self.run.location {
            RunLocation::Extent(extent) => {
                let order = extent.order(self.context, 0..len)?;
                let scores = extent.scores(self.context, 0..extent.count())?;
                Ok(OwnRun { first: extent.first(), scores, order: &order }.entries())
            }
            RunLocation::Merged(file) => {
                let file = self.run.open_merged(self.context, file)?;
                if self.context.settings.has_compact_orders() {
                    let words: &[u64] = file.values(run_column::ENTRY, 0..len)?;
                    return Ok(words.iter().map(|&word| self.entry_of(word)).unzip());
                }
                let keys = file.values(run_column::KEY, 0..len)?.to_vec();
                Ok((keys, file.values(run_column::ID, 0..len)?.to_vec()))
            }
        }
    }
}

/// Merge some runs and the batch's own: keys and ids of the result.
///
/// # Errors
/// `Corrupted`, `Io`.
pub fn merge_runs(
    snapshot: &Snapshot,
    runs: &[Arc<Run>],
    own: OwnRun<'_>,
) -> Result<(Vec<u32>, Vec<u64>)> {
    let mut parts = vec![own.entries()];
    for run in runs {
        parts.push(LazyView::new(&snapshot.context, run).entries()?);
    }
    // Merge the smallest first, so that large runs are copied only a few times.
    loop {
        parts.sort_by_key(|(keys, _)| Reverse(keys.len()));
        match (parts.pop(), parts.pop()) {
            (Some(a), Some(b)) => parts.push(merge_two(&a, &b, snapshot.context.settings.tie_seed)),
            (last, _) => return Ok(last.unwrap_or_default()),
        }
    }
}

/// Merge two runs. The source of the next entry is unpredictable, so it is computed without a branch.
fn merge_two(
    (a_keys, a_ids): &(Vec<u32>, Vec<u64>),
    (b_keys, b_ids): &(Vec<u32>, Vec<u64>),
    tie_seed: u64,
) -> (Vec<u32>, Vec<u64>) {
    let total = a_keys.len() + b_keys.len();
    let (mut keys, mut ids) = (vec![0; total], vec![0; total]);
    let (mut a, mut b) = (0, 0);
    while a < a_keys.len() && b < b_keys.len() {
        let (a_key, b_key) = (a_keys[a], b_keys[b]);
        let (a_id, b_id) = (a_ids[a], b_ids[b]);
        let mut is_a = a_key > b_key;
        if a_key == b_key {
            is_a = (tie_hash(tie_seed, a_id), a_id) < (tie_hash(tie_seed, b_id), b_id);
        }
        keys[a + b] = if is_a { a_key } else { b_key };
        ids[a + b] = if is_a { a_id } else { b_id };
        a += usize::from(is_a);
        b += usize::from(!is_a);
    }
    let done = a + b;
    let (rest_keys, rest_ids) =
        if a < a_keys.len() { (&a_keys[a..], &a_ids[a..]) } else { (&b_keys[b..], &b_ids[b..]) };
    keys[done..].copy_from_slice(rest_keys);
    ids[done..].copy_from_slice(rest_ids);
    (keys, ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::mix64;

    #[test]
    fn a_tier_that_spans_more_than_a_run_can_stays_as_it_is() {
        let tier =
            |first: u64, step: u64| (0..8).map(|i| (3, first + i * step)).collect::<Vec<_>>();
        for first in [0, 1 << 40] {
            let runs = tier(first, 1 << 29);
            assert_eq!(plan_merge(&runs, first + MAX_RUN_SPAN), Some((0..8, 4)));
            assert_eq!(plan_merge(&runs, first + MAX_RUN_SPAN + 1), None);
            // The next ones find a place after it.
            let newer = tier(first + MAX_RUN_SPAN + 1, 5);
            let all = [runs, newer].concat();
            assert_eq!(plan_merge(&all, first + MAX_RUN_SPAN + 41), Some((8..16, 4)));
        }
        assert_eq!(plan_merge(&tier(0, 1)[1..], 8), None);
    }

    #[test]
    fn words_are_sorted_by_their_upper_half_and_else_stay_in_order() {
        for (len, mask) in
            [(0, 0), (1, u64::MAX), (2000, 3 << 62), (5000, u64::MAX), (5000, 7 << 41)]
        {
            let words: Vec<u64> = (0..len).map(|i| mix64(i) & mask >> 32 << 32 | i).collect();
            let (mut ours, mut theirs) = (words.clone(), words);
            sort_words(&mut ours);
            theirs.sort_by_key(|word| word >> 32);
            assert_eq!(ours, theirs);
        }
    }
}
