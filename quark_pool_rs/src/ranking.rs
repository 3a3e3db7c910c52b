//! The order of the samples by one score column, and its cut into quantiles.
//!
//! A run holds its samples best first: key descending, then tie hash, then id. The whole order is never
//! built: a cut is found by selection over the runs, and a quantile is a slice of each. Rules:
//! `quark/pool/base.py`; layout of runs: FORMAT.md.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::error::{PoolError, Result};
use crate::format::RUN_DIR;
use crate::parts::{Home, Run, RunPlace};
use crate::rng::hash;
use crate::segment::{MAX_RUN_SPAN, run_column};
use crate::snapshot::Snapshot;
use crate::threads::parallel;

/// Runs of one level that become one of the next.
const TIER: usize = 8;

/// Orders as the score does; -0.0 equals 0.0. The score is not NaN.
#[inline]
pub fn score_key(score: f32) -> u32 {
    let bits = if score == 0.0 { 0 } else { score.to_bits() };
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// The score of a key.
pub fn key_score(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key ^ 1 << 31 } else { !key })
}

/// Between equal scores the sample with the smaller hash ranks higher.
#[inline]
pub fn tie_hash(tie_seed: u64, id: u64) -> u64 {
    hash(tie_seed, id)
}

/// Sort by the upper halves and keep the order of equal ones: by 11 bits at a time, the lowest first.
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

/// Row numbers best first, then the rows without a score; and how many have one.
pub fn sort_scores(scores: &[f32], first_id: u64, tie_seed: u64) -> (Vec<u32>, usize) {
    // (inverted key, row) in one word: ties are few, and settled afterwards.
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

/// Which runs become one, and of which level: the last [`TIER`] if they have the same one, and do not span more
/// than a run can.
///
/// `runs` are (level, first id) in the order in which the runs were made; `end` is beyond all ids.
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
    /// Of no batch.
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
    home: &'a Home,
    run: &'a Run,
}

impl LazyView<'_> {
    fn len(&self) -> usize {
        self.run.entry.entries as usize
    }

    #[inline]
    pub(crate) fn key(&self, at: usize) -> Result<u32> {
        match &self.run.place {
            RunPlace::Extent(extent) => {
                let row = extent.row(self.home, at)?;
                Ok(score_key(extent.scores(self.home, row..row + 1)?[0]))
            }
            RunPlace::Merged(file) => {
                let file = self.run.open_merged(self.home, file)?;
                if self.home.settings.has_compact_orders() {
                    Ok(self.entry_of(file.value(run_column::ENTRY, at)?).0)
                } else {
                    file.value(run_column::KEY, at)
                }
            }
        }
    }

    #[inline]
    pub(crate) fn id(&self, at: usize) -> Result<u64> {
        match &self.run.place {
            RunPlace::Extent(extent) => Ok(extent.first() + extent.row(self.home, at)? as u64),
            RunPlace::Merged(file) => {
                let file = self.run.open_merged(self.home, file)?;
                if self.home.settings.has_compact_orders() {
                    Ok(self.entry_of(file.value(run_column::ENTRY, at)?).1)
                } else {
                    file.value(run_column::ID, at)
                }
            }
        }
    }

    /// Key and id, where one look tells both.
    #[inline]
    pub(crate) fn entry(&self, at: usize) -> Result<Option<(u32, u64)>> {
        match &self.run.place {
            RunPlace::Merged(file) if self.home.settings.has_compact_orders() => {
                let file = self.run.open_merged(self.home, file)?;
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

    /// Ask the processor for what [`Self::id`] reads.
    #[inline]
    pub(crate) fn prefetch_id(&self, at: usize) -> Result<()> {
        self.prefetch(at, run_column::ID)
    }

    /// Ask the processor for what [`Self::key`] reads first.
    #[inline]
    fn prefetch_key(&self, at: usize) -> Result<()> {
        self.prefetch(at, run_column::KEY)
    }

    #[inline]
    fn prefetch(&self, at: usize, column: usize) -> Result<()> {
        match &self.run.place {
            RunPlace::Extent(extent) => extent.prefetch_order(self.home, at)?,
            RunPlace::Merged(file) => {
                let is_compact = self.home.settings.has_compact_orders();
                let column = if is_compact { run_column::ENTRY } else { column };
                self.run.open_merged(self.home, file)?.prefetch_row(column, at);
            }
        }
        Ok(())
    }

    /// Ask the processor for what [`Self::key`] reads last, if that depends on what it reads first.
    fn prefetch_key_of_row(&self, at: usize) -> Result<()> {
        match &self.run.place {
            RunPlace::Extent(extent) => {
                extent.prefetch_score(self.home, extent.row(self.home, at)?)
            }
            RunPlace::Merged(_) => Ok(()),
        }
    }

    /// All keys and ids, best first.
    pub(crate) fn entries(&self) -> Result<(Vec<u32>, Vec<u64>)> {
        let len = self.len();
        match &self.run.place {
            RunPlace::Extent(extent) => {
                let order = extent.order(self.home, 0..len)?;
                let scores = extent.scores(self.home, 0..extent.count())?;
                Ok(OwnRun { first: extent.first(), scores, order: &order }.entries())
            }
            RunPlace::Merged(file) => {
                let file = self.run.open_merged(self.home, file)?;
                if self.home.settings.has_compact_orders() {
                    let words: &[u64] = file.values(run_column::ENTRY, 0..len)?;
                    return Ok(words.iter().map(|&word| self.entry_of(word)).unzip());
                }
                let keys = file.values(run_column::KEY, 0..len)?.to_vec();
                Ok((keys, file.values(run_column::ID, 0..len)?.to_vec()))
            }
        }
    }
}

/// The search in a run for the first entry that is not above something; all entries before it are.
#[derive(Debug, Clone)]
struct Partition {
    /// What is left to look at.
    range: Range<usize>,
    /// The entry is probably about so far before the end.
    from_end: Option<usize>,
}

impl Partition {
    /// The entry to look at next, unless it is found.
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

/// Keys and ids of some runs and the batch's own as one run.
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
        parts.push(LazyView { home: &snapshot.home, run }.entries()?);
    }
    // The smallest first, so that the large ones are copied few times.
    loop {
        parts.sort_by_key(|(keys, _)| Reverse(keys.len()));
        match (parts.pop(), parts.pop()) {
            (Some(a), Some(b)) => parts.push(merge_two(&a, &b, snapshot.home.settings.tie_seed)),
            (last, _) => return Ok(last.unwrap_or_default()),
        }
    }
}

/// Two runs as one. Which one the next entry comes from cannot be foreseen, so it is computed, not branched on.
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

/// How a block of equal scores is cut; see `quark/pool/base.py`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TieRule {
    /// By the tie hash.
    Hash,
    /// Older samples rank higher.
    OlderFirst,
    /// Not at all.
    Together,
}

/// Which quantiles get the samples that do not divide; see `quark/pool/base.py`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemainderRule {
    /// Sizes differ by at most one.
    Spread,
    /// All to the lowest.
    Lowest,
}

/// The place between two quantiles: which samples are above it.
#[derive(Debug, Clone)]
pub(crate) struct Cut {
    pub(crate) key: u32,
    pub(crate) tie: Tie,
    /// Entries of each run that are above for sure, and where the ones below for sure begin. They
    /// differ only in a block that is cut by age.
    pub(crate) splits: Vec<(usize, usize)>,
}

/// Which samples of the block with the cut's key are above it.
#[derive(Debug, Clone)]
pub(crate) enum Tie {
    None,
    All,
    HashBelow(u64),
    /// The ids of the block in ascending order, and how many of them.
    Oldest(Arc<[u64]>, usize),
}

impl Cut {
    /// Whether the cut lies beneath a sample.
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

/// Some samples of a quantile that lie together.
#[derive(Debug, Clone)]
pub(crate) enum Piece {
    Slice { run: usize, start: usize },
    Ids { ids: Arc<[u64]>, start: usize, key: u32 },
}

/// A quantile as pieces.
#[derive(Debug, Clone, Default)]
pub(crate) struct Quantile {
    pub(crate) pieces: Vec<Piece>,
    /// Samples in the pieces up to and with each.
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
            views: runs.map(|run| LazyView { home: &snapshot.home, run }).collect(),
            tie_seed: snapshot.home.settings.tie_seed,
        }
    }

    pub(crate) fn total(&self) -> u64 {
        self.views.iter().map(|view| view.len() as u64).sum()
    }

    /// The cuts that have so many samples above them, or more where ties stay together.
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

    /// One of them; `last` is the one before.
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
    /// What costs is each place that is looked at: it is in no cache. So the runs are searched in step, and
    /// what all of them read next is on its way at once.
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
        // The searches disagree where a run is not in order, which no sum tells.
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
                // Cuts of one block share its ids.
                Some(Cut { key: same, tie: Tie::Oldest(ids, _), .. }) if *same == key => {
                    ids.clone()
                }
                _ => self.ids_by_age(&block)?,
            };
            let splits = starts.into_iter().zip(ends).collect();
            return Ok(Cut { key, tie: Tie::Oldest(ids, wanted as usize), splits });
        }
        // The least bound that leaves `wanted` samples with smaller hashes: the hash is bijective in the
        // id, so no two samples share one.
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

    /// The ids of so much of each run, in ascending order.
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

    /// What lies between neighbouring cuts.
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
/// The first keys that are tried come from the longest run, from around where they are likely to be, and only
/// then is the middle taken.
struct Search<'a> {
    runs: &'a Runs<'a>,
    above: u64,
    /// Of each run: before are the entries that are above for sure, behind the ones below.
    ranges: Vec<Range<usize>>,
    /// The least and the greatest key that it can be.
    keys: (u32, u32),
}

/// One in so many entries of the longest run is how far from the guess the first keys are.
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
                // The middle of what is left of a run halves that; the middle of the keys may halve nothing.
                self.runs.views[at].key(range.start + range.len() / 2)?
            } else {
                middle
            };
            self.attempt(if low < key && key <= high { key } else { middle }, None)?;
        }
        Ok(self.keys.0)
    }

    /// Whether at least `above` samples have the key or a greater one; and leave out what that rules out.
    ///
    /// `near` says that few entries, so many in so many, are expected between here and the end of the ranges.
    fn attempt(&mut self, key: u32, near: Option<(usize, usize)>) -> Result<bool> {
        let partition = |(view, range): (&LazyView<'_>, &Range<usize>)| {
            let share = |few: usize, of| few as u128 * view.len() as u128 / of as u128;
            let from_end = near.map(|(few, of)| share(few, of) as usize + 1);
            Partition { range: range.clone(), from_end }
        };
        let partitions = self.runs.views.iter().zip(&self.ranges).map(partition);
        let splits = self.runs.splits(partitions, |view, at| Ok(view.key(at)? >= key))?;
        let is_reached = splits.iter().map(|&at| at as u64).sum::<u64>() >= self.above;
        // A split bounds the later ones: those of greater keys come before it.
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
