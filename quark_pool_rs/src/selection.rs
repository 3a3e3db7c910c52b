//! Cutting values that no run orders: passes over all of them, in parallel, and no sort of the whole.

use rayon::prelude::*;

use crate::ranking::{Cut, Tie, TieRule, score_key, tie_hash};
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
/// Two histograms find the keys: one of the upper halves of all keys, one of the lower halves of those
/// that share the upper half with a cut. What equals a cut's key is looked at once more.
pub(crate) fn cut_values(values: &[f32], tie_seed: u64, above: &[u64], ties: TieRule) -> Vec<Cut> {
    let upper = histograms(values, 1, |key| Some((0, key >> 16)));
    let bins: Vec<(u32, u64)> = above.iter().map(|&above| find(&upper[0], above)).collect();
    let mut slots: Vec<u32> = bins.iter().map(|&(bin, _)| bin).collect();
    slots.sort_unstable();
    slots.dedup();
    let lower = histograms(values, slots.len(), |key| {
        slots.binary_search(&(key >> 16)).ok().map(|slot| (slot, key & 0xffff))
    });
    let cut = |(&above, &(bin, in_bin)): (&u64, &(u32, u64))| {
        if above == 0 {
            return Cut { key: u32::MAX, tie: Tie::None, splits: Vec::new() };
        }
        let bins = &lower[slots.binary_search(&bin).expect("collected above")];
        let (low, wanted) = find(bins, in_bin);
        let key = bin << 16 | low;
        let tie = if ties == TieRule::Together || wanted == bins[low as usize] {
            Tie::All
        } else {
            cut_block(values, key, wanted as usize, tie_seed, ties)
        };
        Cut { key, tie, splits: Vec::new() }
    };
    above.iter().zip(&bins).map(cut).collect()
}

/// Counts of what `place` (histogram, bin) says of each key.
fn histograms(
    values: &[f32],
    number: usize,
    place: impl Fn(u32) -> Option<(usize, u32)> + Sync,
) -> Vec<Vec<u64>> {
    let empty = || vec![vec![0_u64; NUM_BINS]; number];
    let count = |mut bins: Vec<Vec<u64>>, part: &[f32]| {
        for &value in part.iter().filter(|value| !value.is_nan()) {
            if let Some((which, bin)) = place(score_key(value)) {
                bins[which][bin as usize] += 1;
            }
        }
        bins
    };
    let add = |mut sum: Vec<Vec<u64>>, other: Vec<Vec<u64>>| {
        for (a, b) in sum.iter_mut().flatten().zip(other.into_iter().flatten()) {
            *a += b;
        }
        sum
    };
    // One histogram per task, and no more tasks than pay for it.
    parallel(|| {
        let size = values.len().div_ceil(4 * rayon::current_num_threads()).max(CHUNK);
        values.par_chunks(size).map(|part| count(empty(), part)).reduce(empty, add)
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

/// Which of the values with one key are above: `wanted` of them, fewer than there are.
fn cut_block(values: &[f32], key: u32, wanted: usize, tie_seed: u64, ties: TieRule) -> Tie {
    let is_in_block = |value: f32| !value.is_nan() && score_key(value) == key;
    let ids: Vec<u64> = parallel(|| {
        let rows = values.par_iter().enumerate().filter(|&(_, &value)| is_in_block(value));
        rows.map(|(row, _)| row as u64).collect()
    });
    if ties == TieRule::OlderFirst {
        return Tie::Oldest(ids.into(), wanted);
    }
    let mut hashes: Vec<u64> =
        parallel(|| ids.par_iter().map(|&id| tie_hash(tie_seed, id)).collect());
    Tie::HashBelow(*hashes.select_nth_unstable(wanted).1)
}

/// [N] quantile of each value among those of its group, -1 for NaN; see `Quantization::per_prompt`.
pub(crate) fn label_in_groups(
    values: &[f32],
    groups: &[u32],
    num_quantiles: u64,
    tie_seed: u64,
    ties: TieRule,
) -> Vec<i16> {
    let order = |id: u64| if ties == TieRule::OlderFirst { id } else { tie_hash(tie_seed, id) };
    let entry = |(row, (&value, &group)): (usize, (&f32, &u32))| {
        (group, !score_key(value), order(row as u64), row as u64)
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
