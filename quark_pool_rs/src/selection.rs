//! Cutting values that no run orders: passes over all of them, in parallel, and a sort of those near the cuts.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::cmp::Reverse;
use std::sync::Arc;

use rayon::prelude::*;

use crate::ranking::{Cut, Tie, TieRule};
use crate::runs::{score_key, tie_hash};
use crate::threads::parallel;

/// Values that one task reads at a time.
const CHUNK: usize = 1 << 16;
/// Of half a key.
const NUM_BINS: usize = 1 << 16;
/// Values that are not NaN.
pub(crate) fn count_ranked(values: &[f32]) -> u64 {
    let count = |part: &[f32]| part.iter().filter(|v| !v.is_nan()).count() as u64;
    parallel(|| values.par_chunks(CHUNK).map(count).sum())
}

/// The cuts that have so many values above them, or more where ties stay together.
///
/// A histogram of the upper halves of all keys finds the bins that the cuts lie in, and what is in those is
/// sorted. What equals a cut's key is looked at once more.
pub(crate) fn cut_values(values: &[f32], tie_seed: u64, above: &[u64], ties: TieRule) -> Vec<Cut> {
    let bins = histogram(values);
    let places: Vec<(u32, u64)> = above.iter().map(|&above| find(&bins, above)).collect();
    let mut is_cut = vec![false; NUM_BINS];
    for &(bin, _) in &places {
        is_cut[bin as usize] = true;
    }
    // Best first.
    let keys = parallel(|| {
        let ranked = values.par_iter().filter(|value| !value.is_nan());
        let keys = ranked.map(|&value| score_key(value)).filter(|key| is_cut[(key >> 16) as usize]);
        let mut keys: Vec<u32> = keys.collect();
        keys.par_sort_unstable_by_key(|&key| Reverse(key));
        keys
    });
    // The last block that was cut: several cuts may lie in one.
    let mut block: (Option<u32>, Arc<[u64]>) = Default::default();
    let cut = |(&above, &(bin, in_bin)): (&u64, &(u32, u64))| {
        if above == 0 {
            return Cut { key: u32::MAX, tie: Tie::None, splits: Vec::new() };
        }
        let end = keys.partition_point(|key| key >> 16 > bin) + in_bin as usize;
        let key = keys[end - 1];
        if ties == TieRule::Together || keys.get(end) != Some(&key) {
            return Cut { key, tie: Tie::All, splits: Vec::new() };
        }
        if block.0 != Some(key) {
            block = (Some(key), block_of(values, key, tie_seed, ties));
        }
        let wanted = end - keys.partition_point(|&other| other > key);
        let tie = match ties {
            TieRule::OlderFirst => Tie::Oldest(block.1.clone(), wanted),
            _ => Tie::HashBelow(block.1[wanted]),
        };
        Cut { key, tie, splits: Vec::new() }
    };
    above.iter().zip(&places).map(cut).collect()
}

/// How many values have each upper half of a key.
fn histogram(values: &[f32]) -> Vec<u64> {
    let empty = || vec![0_u64; NUM_BINS];
    let count = |part: &[f32]| {
        let mut bins = empty();
        for &value in part.iter().filter(|value| !value.is_nan()) {
            bins[(score_key(value) >> 16) as usize] += 1;
        }
        bins
    };
    let add = |mut sum: Vec<u64>, other: Vec<u64>| {
        for (sum, count) in sum.iter_mut().zip(other) {
            *sum += count;
        }
        sum
    };
    // One per task, and no more tasks than pay for it.
    parallel(|| {
        let size = values.len().div_ceil(4 * rayon::current_num_threads()).max(CHUNK);
        values.par_chunks(size).map(count).reduce(empty, add)
    })
}

/// The bin, counted from the highest down, in which the `above`-th entry lies, and which one of the bin it is.
fn find(bins: &[u64], above: u64) -> (u32, u64) {
    let mut before = 0;
    for (bin, &count) in bins.iter().enumerate().rev() {
        if before + count >= above {
            return (bin as u32, above - before);
        }
        before += count;
    }
    (0, above - before)
}

/// What orders values that are equal, best first.
#[inline]
fn tie_order(id: u64, tie_seed: u64, ties: TieRule) -> u64 {
    if ties == TieRule::OlderFirst { id } else { tie_hash(tie_seed, id) }
}

/// The [`tie_order`] of all values with one key, ascending.
fn block_of(values: &[f32], key: u32, tie_seed: u64, ties: TieRule) -> Arc<[u64]> {
    let is_in_block = |value: f32| !value.is_nan() && score_key(value) == key;
    let order = |(row, _): (usize, &f32)| tie_order(row as u64, tie_seed, ties);
    let mut block: Vec<u64> = parallel(|| {
        values.par_iter().enumerate().filter(|&(_, &value)| is_in_block(value)).map(order).collect()
    });
    parallel(|| block.par_sort_unstable());
    block.into()
}

/// [N] quantile of each value among those of its group, -1 for NaN; see `Quantization::per_prompt`.
pub(crate) fn label_in_groups(
    values: &[f32],
    groups: &[u32],
    num_quantiles: u64,
    tie_seed: u64,
    ties: TieRule,
) -> Vec<i16> {
    let entry = |(row, (&value, &group)): (usize, (&f32, &u32))| {
        (group, !score_key(value), tie_order(row as u64, tie_seed, ties), row as u64)
    };
    // Best first in each group.
    let entries = parallel(|| {
        let ranked =
            values.par_iter().zip(groups).enumerate().filter(|(_, (value, _))| !value.is_nan());
        let mut entries: Vec<(u32, u32, u64, u64)> = ranked.map(entry).collect();
        entries.par_sort_unstable();
        entries
    });
    let mut labels = vec![-1; values.len()];
    for group in entries.chunk_by(|a, b| a.0 == b.0) {
        let n = group.len() as u64;
        let mut last = None;
        for (place, &(_, key, _, row)) in (0_u64..).zip(group) {
            let worse = n - 1 - place;
            let own =
                (u128::from(2 * worse + 1) * u128::from(num_quantiles) / u128::from(2 * n)) as i16;
            let label = match last {
                Some((same, label)) if ties == TieRule::Together && same == key => label,
                _ => own,
            };
            last = Some((key, label));
            labels[row as usize] = label;
        }
    }
    labels
}
