//! The order of the samples by one score column, and its cut into quantiles.
//!
//! The whole order is never built. A cut is found by selection over the sorted runs, and a quantile is a slice of
//! each run. `quark/pool/base.py` defines the rules.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::error::{PoolError, Result};
use crate::format::RUN_DIR;
use crate::runs::{LazyView, tie_hash};
use crate::snapshot::Snapshot;
use crate::threads::parallel;

/// A search in a run for the first entry that is not above a bound. All entries before it are.
#[derive(Debug, Clone)]
struct Partition {
    /// The remaining range.
    range: Range<usize>,
    /// Estimated distance of the entry from the end.
    from_end: Option<usize>,
}

impl Partition {
    /// The entry to read next; None when the search is done.
    fn next(&self) -> Option<usize> {
        let Range { start, end } = self.range;
        (start < end).then(|| match self.from_end {
            Some(step) => end.saturating_sub(step).max(start),
            None => start + (end - start) / 2,
        })
    }

    fn learn(&mut self, at: usize, is_above: bool) {
        if is_above {
            (self.range.start, self.from_end) = (at + 1, None);
        } else {
            self.range.end = at;
            self.from_end = self.from_end.map(|step| step.saturating_mul(4));
        }
    }
}

/// How a boundary inside a block of equal scores is resolved; see `quark/pool/base.py`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TieRule {
    /// By the tie hash.
    Hash,
    /// Older samples rank higher.
    OlderFirst,
    /// The block is not cut.
    Together,
}

/// Which quantiles get the remaining samples if N is not a multiple of K; see `quark/pool/base.py`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemainderRule {
    /// Sizes differ by at most one.
    Spread,
    /// The lowest quantile gets all of them.
    Lowest,
}

/// The boundary between two quantiles: it decides which samples are above it.
#[derive(Debug, Clone)]
pub(crate) struct Cut {
    pub(crate) key: u32,
    pub(crate) tie: Tie,
    /// For each run, the number of entries that are certainly above, and where those that are certainly below begin.
    /// The two differ only in a block that is cut by age.
    pub(crate) splits: Vec<(usize, usize)>,
}

/// Which samples of the block with the cut's key are above it.
#[derive(Debug, Clone)]
pub(crate) enum Tie {
    None,
    All,
    HashBelow(u64),
    /// The ids of the block in ascending order, and how many of them are above.
    Oldest(Arc<[u64]>, usize),
}

impl Cut {
    /// Whether the sample is above the cut.
    #[inline]
    pub(crate) fn is_beneath(&self, key: u32, id: u64, tie_seed: u64) -> bool {
        if key != self.key {
            return key > self.key;
        }
        match &self.tie {
            Tie::None => false,
            Tie::All => true,
            Tie::HashBelow(bound) => tie_hash(tie_seed, id) < *bound,
            Tie::Oldest(ids, count) => ids.get(*count).is_none_or(|&bound| id < bound),
        }
    }
}

/// Samples of a quantile that are stored together.
#[derive(Debug, Clone)]
pub(crate) enum Piece {
    Slice { run: usize, start: usize },
    Ids { ids: Arc<[u64]>, start: usize, key: u32 },
}

/// A quantile as pieces.
#[derive(Debug, Clone, Default)]
pub(crate) struct Quantile {
    pub(crate) pieces: Vec<Piece>,
    /// Cumulative number of samples, each piece included.
    pub(crate) ends: Vec<u64>,
}

impl Quantile {
    pub(crate) fn len(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    pub(crate) fn push(&mut self, piece: Piece, len: usize) {
        if len > 0 {
            self.ends.push(self.len() + len as u64);
            self.pieces.push(piece);
        }
    }
}

/// The runs of a column, for selection.
pub(crate) struct Runs<'a> {
    pub(crate) views: Vec<LazyView<'a>>,
    tie_seed: u64,
}

impl<'a> Runs<'a> {
    pub(crate) fn new(snapshot: &'a Snapshot, column: usize) -> Self {
        let runs = snapshot.columns[column].runs.iter();
        Self {
            views: runs.map(|run| LazyView::new(&snapshot.context, run)).collect(),
            tie_seed: snapshot.context.settings.tie_seed,
        }
    }

    pub(crate) fn total(&self) -> u64 {
        self.views.iter().map(|view| view.len() as u64).sum()
    }

    /// The cuts with these numbers of samples above them, or more if ties stay together.
    pub(crate) fn cuts(
        &self,
        above: impl IntoIterator<Item = u64>,
        ties: TieRule,
    ) -> Result<Vec<Cut>> {
        let mut cuts = Vec::new();
        for above in above {
            cuts.push(self.cut(above, ties, cuts.last())?);
        }
        Ok(cuts)
    }

    /// One cut; `last` is the previous one.
    fn cut(&self, above: u64, ties: TieRule, last: Option<&Cut>) -> Result<Cut> {
        if above == 0 {
            return Ok(Cut {
                key: u32::MAX,
                tie: Tie::None,
                splits: vec![(0, 0); self.views.len()],
            });
        }
        // The key of the last sample above: the greatest that at least `above` samples reach.
        let mut search = Search {
            runs: self,
            above,
            ranges: self.views.iter().map(|view| 0..view.len()).collect(),
            keys: (0, u32::MAX),
        };
        search.begin_near_guess()?;
        self.cut_block(search.finish()?, above, ties, last)
    }

    /// First entry of each run for which `is_above` is false.
    ///
    /// Each read is a cache miss. The runs are searched in lockstep, so that the next reads of all runs are prefetched
    /// together.
    fn splits(
        &self,
        partitions: impl IntoIterator<Item = Partition>,
        is_above: impl Fn(&LazyView<'a>, usize) -> Result<bool>,
    ) -> Result<Vec<usize>> {
        let mut partitions: Vec<_> = partitions.into_iter().collect();
        let mut looks = Vec::with_capacity(partitions.len());
        loop {
            looks.clear();
            for (run, (view, partition)) in self.views.iter().zip(&partitions).enumerate() {
                if let Some(at) = partition.next() {
                    view.prefetch_key(at)?;
                    looks.push((run, at));
                }
            }
            if looks.is_empty() {
                return Ok(partitions.into_iter().map(|partition| partition.range.start).collect());
            }
            for &(run, at) in &looks {
                self.views[run].prefetch_key_of_row(at)?;
            }
            for &(run, at) in &looks {
                partitions[run].learn(at, is_above(&self.views[run], at)?);
            }
        }
    }

    /// The cut inside the block of samples with key `key`.
    fn cut_block(&self, key: u32, above: u64, ties: TieRule, last: Option<&Cut>) -> Result<Cut> {
        let all = || self.views.iter().map(|v| Partition { range: 0..v.len(), from_end: None });
        let starts = self.splits(all(), |view, at| Ok(view.key(at)? > key))?;
        let ends = self.splits(all(), |view, at| Ok(view.key(at)? >= key))?;
        let sum = |splits: &[usize]| splits.iter().map(|&at| at as u64).sum::<u64>();
        // The two searches disagree if a run is not in order. No checksum detects that.
        let is_ordered = starts.iter().zip(&ends).all(|(start, end)| start <= end)
            && (sum(&starts)..=sum(&ends)).contains(&above);
        if !is_ordered {
            let what = "a sorted run is not in order; verifying the pool tells which";
            return Err(PoolError::corrupted(RUN_DIR, 0, what));
        }
        let wanted = above - sum(&starts);
        let exact = |tie, splits: Vec<usize>| Cut {
            key,
            tie,
            splits: splits.into_iter().map(|at| (at, at)).collect(),
        };
        if ties == TieRule::Together || above == sum(&ends) {
            return Ok(exact(Tie::All, ends));
        }
        let block: Vec<Range<usize>> =
            starts.iter().zip(&ends).map(|(&start, &end)| start..end).collect();
        if ties == TieRule::OlderFirst {
            let ids = match last {
                // Cuts in one block share its ids.
                Some(Cut { key: same, tie: Tie::Oldest(ids, _), .. }) if *same == key => {
                    ids.clone()
                }
                _ => self.ids_by_age(&block)?,
            };
            let splits = starts.into_iter().zip(ends).collect();
            return Ok(Cut { key, tie: Tie::Oldest(ids, wanted as usize), splits });
        }
        // The least bound such that `wanted` samples have smaller hashes. The hash is bijective in the id, so
        // no two samples share one.
        let before = |bound: u64| {
            let block = block.iter().map(|r| Partition { range: r.clone(), from_end: None });
            self.splits(block, |view, at| Ok(tie_hash(self.tie_seed, view.id(at)?) < bound))
        };
        let (mut low, mut high) = (0_u64, u64::MAX);
        while low < high {
            let middle = low + (high - low) / 2;
            if sum(&before(middle)?) - sum(&starts) >= wanted {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        let splits = before(low)?;
        Ok(exact(Tie::HashBelow(low), splits))
    }

    /// The ids in these ranges of the runs, in ascending order.
    fn ids_by_age(&self, block: &[Range<usize>]) -> Result<Arc<[u64]>> {
        let mut ids = Vec::with_capacity(block.iter().map(Range::len).sum());
        for (view, range) in self.views.iter().zip(block) {
            for at in range.clone() {
                ids.push(view.id(at)?);
            }
        }
        parallel(|| ids.par_sort_unstable());
        Ok(ids.into())
    }

    /// The quantiles between neighboring cuts.
    pub(crate) fn quantiles(&self, cuts: &[Cut]) -> Vec<Quantile> {
        let nothing = Cut { key: u32::MAX, tie: Tie::None, splits: vec![(0, 0); self.views.len()] };
        let everything = Cut {
            key: 0,
            tie: Tie::All,
            splits: self.views.iter().map(|view| (view.len(), view.len())).collect(),
        };
        let bottoms = std::iter::once(&everything).chain(cuts);
        let tops = cuts.iter().chain([&nothing]);
        bottoms.zip(tops).map(|(bottom, top)| between(top, bottom)).collect()
    }
}

/// The search for the greatest key that at least `above` samples reach.
///
/// It first tries keys from the longest run, near the estimated position. After that it bisects.
struct Search<'a> {
    runs: &'a Runs<'a>,
    above: u64,
    /// For each run: entries before the range are certainly above, entries behind it certainly below.
    ranges: Vec<Range<usize>>,
    /// The least and the greatest possible key.
    keys: (u32, u32),
}

/// The first keys are this fraction of the longest run away from the estimate.
const GUESS_SHARE: usize = 1 << 8;

impl Search<'_> {
    fn guide(&self) -> usize {
        (0..self.ranges.len()).max_by_key(|&i| self.ranges[i].len()).unwrap_or(0)
    }

    fn begin_near_guess(&mut self) -> Result<()> {
        let at = self.guide();
        let Some(guide) = self.runs.views.get(at).filter(|view| view.len() >= GUESS_SHARE) else {
            return Ok(());
        };
        let total = u128::from(self.runs.total());
        let guess = (u128::from(self.above) * guide.len() as u128 / total) as usize;
        let reach = guide.len() / GUESS_SHARE;
        let below = guide.key((guess + reach).min(guide.len() - 1))?;
        if self.attempt(below, None)? {
            let above = guide.key(guess.saturating_sub(reach))?;
            self.attempt(above, Some((2 * reach, guide.len())))?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<u32> {
        while self.keys.0 < self.keys.1 {
            let (low, high) = self.keys;
            let at = self.guide();
            let range = &self.ranges[at];
            let middle = low + (high - low).div_ceil(2);
            let key = if range.len() > 1 {
                // The middle of the run's range halves it. The middle of the keys might not.
                self.runs.views[at].key(range.start + range.len() / 2)?
            } else {
                middle
            };
            self.attempt(if low < key && key <= high { key } else { middle }, None)?;
        }
        Ok(self.keys.0)
    }

    /// Whether at least `above` samples have the key or a greater one. Narrows the ranges accordingly.
    ///
    /// `near` is (few, of): about `few` in `of` entries are expected between here and the end of the ranges.
    fn attempt(&mut self, key: u32, near: Option<(usize, usize)>) -> Result<bool> {
        let partition = |(view, range): (&LazyView<'_>, &Range<usize>)| {
            let share = |few: usize, of| few as u128 * view.len() as u128 / of as u128;
            let from_end = near.map(|(few, of)| share(few, of) as usize + 1);
            Partition { range: range.clone(), from_end }
        };
        let partitions = self.runs.views.iter().zip(&self.ranges).map(partition);
        let splits = self.runs.splits(partitions, |view, at| Ok(view.key(at)? >= key))?;
        let is_reached = splits.iter().map(|&at| at as u64).sum::<u64>() >= self.above;
        // A split bounds later ones, because entries with greater keys come before it.
        for (range, split) in self.ranges.iter_mut().zip(splits) {
            if is_reached {
                range.end = split;
            } else {
                range.start = split;
            }
        }
        if is_reached {
            self.keys.0 = self.keys.0.max(key);
        } else {
            self.keys.1 = self.keys.1.min(key.wrapping_sub(1));
        }
        Ok(is_reached)
    }
}

/// The samples below `top` and above `bottom`.
fn between(top: &Cut, bottom: &Cut) -> Quantile {
    let mut quantile = Quantile::default();
    let ids = |ids: &Arc<[u64]>, range: Range<usize>, key| {
        (Piece::Ids { ids: ids.clone(), start: range.start, key }, range.len())
    };
    let mut age_cut = Vec::new();
    match (&top.tie, &bottom.tie) {
        (Tie::Oldest(block, from), Tie::Oldest(_, to)) if top.key == bottom.key => {
            age_cut.push(ids(block, *from..*to, top.key));
        }
        (upper, lower) => {
            if let Tie::Oldest(block, from) = upper
                && (bottom.key < top.key || matches!(lower, Tie::All))
            {
                age_cut.push(ids(block, *from..block.len(), top.key));
            }
            if let Tie::Oldest(block, to) = lower
                && top.key != bottom.key
            {
                age_cut.push(ids(block, 0..*to, bottom.key));
            }
        }
    }
    for (piece, len) in age_cut {
        quantile.push(piece, len);
    }
    for (run, (&(_, start), &(end, _))) in top.splits.iter().zip(&bottom.splits).enumerate() {
        quantile.push(Piece::Slice { run, start }, end.saturating_sub(start));
    }
    quantile
}
