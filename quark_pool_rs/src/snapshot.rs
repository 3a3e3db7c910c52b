//! What a reader sees: the pool as it was at one commit.
//!
//! A snapshot never changes and shares its open files with its neighbours. It knows where each sample,
//! prompt, score and run lies; what they mean for a ranking is told in `ranking`.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use rayon::prelude::*;

use crate::checksum::{Digest256, hex};
use crate::datafile::{DataFile, FileEntry, Kind, LazyFile};
use crate::error::{PoolError, Result};
use crate::format::PoolSettings;
use crate::manifest::{
    AppendEntry, ColumnCut, ColumnMerges, ColumnState, Commit, ExtentEntry, MergeEntry,
    PromptEntry, RunEntry, RunSource, ScoreChange, SegmentEntry, State, Upkeep,
};
use crate::segment::{
    Tokens, column, prompt_column, prompt_columns, run_columns, score_columns, score_position,
    segment_columns,
};
use crate::storage::Storage;

/// The disk and the settings, which all snapshots of a pool share.
pub struct Home {
    /// The disk.
    pub storage: Arc<dyn Storage>,
    /// What the pool was created with.
    pub settings: PoolSettings,
}

impl std::fmt::Debug for Home {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Home").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// A segment.
#[derive(Debug)]
pub struct Segment {
    /// From the manifest.
    pub entry: Arc<SegmentEntry>,
    file: LazyFile,
}

impl Segment {
    fn new(entry: Arc<SegmentEntry>) -> Arc<Self> {
        Arc::new(Self { file: LazyFile::new(entry.file.clone()), entry })
    }

    /// Its file, opened if need be.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    #[inline(always)]
    pub fn open(&self, home: &Home) -> Result<&DataFile> {
        let columns = || segment_columns(&home.settings, &self.entry.scores, self.entry.count);
        self.file.get(&*home.storage, columns, self.entry.count)
    }
}

/// A prompt file.
#[derive(Debug)]
pub struct PromptTable {
    /// From the manifest.
    pub entry: Arc<PromptEntry>,
    file: LazyFile,
}

impl PromptTable {
    fn new(entry: Arc<PromptEntry>) -> Arc<Self> {
        Arc::new(Self { file: LazyFile::new(entry.file.clone()), entry })
    }

    /// Its file, opened if need be.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    #[inline(always)]
    pub fn open(&self, home: &Home) -> Result<&DataFile> {
        let columns = || prompt_columns(home.settings.token_bytes);
        self.file.get(&*home.storage, columns, u64::from(self.entry.count))
    }
}

/// Where the scores of some ids lie.
#[derive(Debug, Clone)]
pub struct Extent {
    /// From the manifest.
    pub entry: Arc<ExtentEntry>,
    place: ExtentPlace,
}

#[derive(Debug, Clone)]
enum ExtentPlace {
    /// In the segment of the samples, at this position among its score columns.
    Segment(Arc<Segment>, usize),
    /// In a file of its own.
    File(Arc<LazyFile>),
}

impl Extent {
    /// First sample id.
    pub fn first(&self) -> u64 {
        self.entry.first
    }

    /// Samples.
    pub fn count(&self) -> usize {
        self.entry.count as usize
    }

    /// Ids are below this.
    pub fn end(&self) -> u64 {
        self.entry.first + self.entry.count
    }

    /// The file, opened if need be, and the position of the scores in it; their order is the next one.
    #[inline(always)]
    fn open(&self, home: &Home) -> Result<(&DataFile, usize)> {
        Ok(match &self.place {
            ExtentPlace::Segment(segment, index) => {
                (segment.open(home)?, score_position(home.settings.store_text, *index))
            }
            ExtentPlace::File(file) => {
                let columns = || score_columns(&home.settings, self.entry.count);
                (file.get(&*home.storage, columns, self.entry.count)?, 0)
            }
        })
    }

    /// Scores of some rows.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    #[inline(always)]
    pub fn scores<'a>(&'a self, home: &Home, rows: Range<usize>) -> Result<&'a [f32]> {
        let (file, position) = self.open(home)?;
        file.values(position, rows)
    }

    /// Ask the processor for a score that will soon be read.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    #[inline(always)]
    pub fn prefetch_score(&self, home: &Home, row: usize) -> Result<()> {
        let (file, position) = self.open(home)?;
        file.prefetch_row(position, row);
        Ok(())
    }

    /// Ask the processor for an entry of the order that will soon be read.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    #[inline(always)]
    pub fn prefetch_order(&self, home: &Home, rank: usize) -> Result<()> {
        let (file, position) = self.open(home)?;
        file.prefetch_row(position + 1, rank);
        Ok(())
    }

    /// The row number at a rank.
    ///
    /// # Errors
    /// `Corrupted`, `Io`; `Corrupted` if there is no such row.
    #[inline(always)]
    pub fn row(&self, home: &Home, rank: usize) -> Result<usize> {
        let (file, position) = self.open(home)?;
        let row = if file.kind(position + 1) == Kind::U16 {
            usize::from(file.value::<u16>(position + 1, rank)?)
        } else {
            file.value::<u32>(position + 1, rank)? as usize
        };
        if row < self.count() { Ok(row) } else { Err(self.no_row(row)) }
    }

    /// Row numbers, best first.
    ///
    /// # Errors
    /// `Corrupted`, `Io`; `Corrupted` if there is no such row.
    pub fn order(&self, home: &Home, ranks: Range<usize>) -> Result<Vec<u32>> {
        let (file, position) = self.open(home)?;
        let order: Vec<u32> = if file.kind(position + 1) == Kind::U16 {
            file.values::<u16>(position + 1, ranks)?.iter().map(|&row| u32::from(row)).collect()
        } else {
            file.values(position + 1, ranks)?.to_vec()
        };
        match order.iter().find(|&&row| row as usize >= self.count()) {
            None => Ok(order),
            Some(&row) => Err(self.no_row(row as usize)),
        }
    }

    #[cold]
    fn no_row(&self, row: usize) -> PoolError {
        let what = format!("an order names row {row}, which is not there");
        PoolError::corrupted(self.file_name(), 0, what)
    }

    /// Whether the scores lie in the segment of their samples.
    pub fn is_in_segment(&self) -> bool {
        matches!(self.place, ExtentPlace::Segment(..))
    }

    /// The file's name, for messages.
    pub fn file_name(&self) -> &str {
        match &self.place {
            ExtentPlace::Segment(segment, _) => &segment.entry.file.name,
            ExtentPlace::File(file) => &file.entry.name,
        }
    }

    /// The file of scores that came after their samples, opened if need be.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    pub fn own_file(&self, home: &Home) -> Option<Result<&DataFile>> {
        matches!(self.place, ExtentPlace::File(_)).then(|| self.open(home).map(|(file, _)| file))
    }
}

/// A run of a score column.
#[derive(Debug)]
pub struct Run {
    /// From the manifest.
    pub entry: Arc<RunEntry>,
    /// Where it lies.
    pub place: RunPlace,
}

/// Where a run lies.
#[derive(Debug)]
pub enum RunPlace {
    /// In the order column of an extent.
    Extent(Extent),
    /// In a file of its own.
    Merged(LazyFile),
}

impl Run {
    /// The file of a merged run, opened if need be.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    #[inline(always)]
    pub fn open_merged<'a>(&self, home: &Home, file: &'a LazyFile) -> Result<&'a DataFile> {
        file.get(&*home.storage, || run_columns(&home.settings), self.entry.entries)
    }

    /// Its samples have no smaller ids.
    pub fn first(&self) -> u64 {
        match &self.place {
            RunPlace::Extent(extent) => extent.first(),
            RunPlace::Merged(_) => self.entry.first,
        }
    }
}

/// A score column.
#[derive(Debug, Clone)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// 1 for the first scores of the name; re-scoring counts up.
    pub version: u32,
    /// What made the scores if they came after their samples: one JSON object; else empty.
    pub source: String,
    /// By first id.
    pub extents: Vec<Extent>,
    /// In the order in which they were made.
    pub runs: Vec<Arc<Run>>,
    /// Samples whose score is not NaN.
    pub scored: u64,
}

impl Column {
    fn new(name: String, version: u32, source: String) -> Self {
        Self { name, version, source, extents: Vec::new(), runs: Vec::new(), scored: 0 }
    }

    fn to_state(&self) -> ColumnState {
        ColumnState {
            name: self.name.clone(),
            version: self.version,
            source: self.source.clone(),
            extents: self.extents.iter().map(|e| e.entry.clone()).collect(),
            runs: self.runs.iter().map(|r| r.entry.clone()).collect(),
        }
    }

    /// Ids below this have been covered.
    pub fn end(&self) -> u64 {
        self.extents.last().map_or(0, Extent::end)
    }

    fn push_extent(&mut self, extent: Extent) -> Result<(), String> {
        if extent.entry.scored > extent.entry.count || extent.first() < self.end() {
            return Err("an extent that does not fit its column".to_owned());
        }
        self.scored += extent.entry.scored;
        self.extents.push(extent);
        Ok(())
    }

    fn run(&self, entry: Arc<RunEntry>) -> Result<Arc<Run>, String> {
        let place = match &entry.source {
            RunSource::File(file) => RunPlace::Merged(LazyFile::new(file.clone())),
            RunSource::Extent(first) => {
                let at = self.extents.binary_search_by_key(first, Extent::first);
                let extent =
                    at.map(|i| self.extents[i].clone()).map_err(|_| "a run of no extent")?;
                if extent.entry.scored != entry.entries {
                    return Err("a run that does not fit its extent".to_owned());
                }
                RunPlace::Extent(extent)
            }
        };
        Ok(Arc::new(Run { entry, place }))
    }

    /// Add an extent with its own run, then carry out the merges.
    fn grow(&mut self, extent: Extent, merges: Vec<MergeEntry>) -> Result<(), String> {
        let (first, scored) = (extent.first(), extent.entry.scored);
        self.push_extent(extent)?;
        if scored > 0 {
            let source = RunSource::Extent(first);
            let entry = RunEntry { level: 0, entries: scored, first: 0, source };
            let run = self.run(Arc::new(entry))?;
            self.runs.push(run);
        }
        self.merge(merges)
    }

    /// Carry out merges of runs, one after another.
    fn merge(&mut self, merges: Vec<MergeEntry>) -> Result<(), String> {
        for merge in merges {
            let run = self.run(Arc::new(merge.run))?;
            let merged = self.runs.get(merge.start..merge.end).ok_or("a merge of absent runs")?;
            if merged.iter().map(|r| r.entry.entries).sum::<u64>() != run.entry.entries {
                return Err("a merge loses or invents entries".to_owned());
            }
            self.runs.splice(merge.start..merge.end, [run]);
        }
        Ok(())
    }

    /// Leave out the samples before `first`; `extent` and `run` are what is left of those that are cut.
    fn remove_before(
        &mut self,
        first: u64,
        extent: Option<Extent>,
        num_runs: usize,
        run: Option<RunEntry>,
    ) -> Result<(), String> {
        let gone = self.extents.partition_point(|extent| extent.end() <= first);
        let cut = self.extents.get(gone).filter(|old| old.first() < first);
        let fits = match (cut, &extent) {
            (None, None) => true,
            (Some(old), Some(new)) => {
                (new.first(), new.end(), new.is_in_segment())
                    == (first, old.end(), old.is_in_segment())
                    && new.entry.scored <= new.entry.count
            }
            _ => false,
        };
        if !fits || num_runs > self.runs.len() {
            return Err("a retention that does not fit a column".to_owned());
        }
        let num_extents = gone + usize::from(cut.is_some());
        self.extents.splice(..num_extents, extent);
        self.scored = self.extents.iter().map(|extent| extent.entry.scored).sum();
        let run = run.map(|run| self.run(Arc::new(run))).transpose()?;
        self.runs.splice(..num_runs, run);
        let is_gone = |run: &Arc<Run>| match &run.place {
            RunPlace::Extent(extent) => extent.first() < first,
            RunPlace::Merged(_) => false,
        };
        let ranked: u64 = self.runs.iter().map(|run| run.entry.entries).sum();
        if ranked != self.scored || self.runs.iter().any(is_gone) {
            return Err("a retention loses or invents entries of runs".to_owned());
        }
        Ok(())
    }

    /// Files that hold nothing but scores or runs.
    fn own_files(&self) -> impl Iterator<Item = &LazyFile> {
        let scores = self.extents.iter().filter_map(|extent| match &extent.place {
            ExtentPlace::File(file) => Some(&**file),
            ExtentPlace::Segment(..) => None,
        });
        let runs = self.runs.iter().filter_map(|run| match &run.place {
            RunPlace::Merged(file) => Some(file),
            RunPlace::Extent(_) => None,
        });
        scores.chain(runs)
    }
}

/// The pool at one commit.
#[derive(Clone)]
pub struct Snapshot {
    /// What all snapshots share.
    pub home: Arc<Home>,
    /// Commits so far.
    pub generation: u64,
    /// Of the generation's record.
    pub digest: Digest256,
    /// The oldest generation that the pool can show.
    pub oldest: u64,
    /// Ids are below this.
    pub num_samples: u64,
    /// Ids below this were removed.
    pub num_removed: u64,
    /// The appends that brought them.
    pub removed: Arc<Vec<AppendEntry>>,
    /// Prompt ids are below this.
    pub num_prompts: u32,
    /// Interned sampling settings.
    pub sampling_settings: Vec<Arc<str>>,
    /// By first id.
    pub segments: Vec<Arc<Segment>>,
    /// First ids, one after another in memory for the search.
    first_ids: Vec<u64>,
    /// By first prompt id.
    pub prompts: Vec<Arc<PromptTable>>,
    first_prompts: Vec<u32>,
    /// In order of appearance.
    pub columns: Vec<Column>,
    /// Columns that are being written.
    pub drafts: Vec<Column>,
}

impl Snapshot {
    /// The empty pool.
    pub fn empty(home: Arc<Home>, digest: Digest256) -> Self {
        Self {
            home,
            generation: 0,
            digest,
            oldest: 0,
            num_samples: 0,
            num_removed: 0,
            removed: Arc::default(),
            num_prompts: 0,
            sampling_settings: Vec::new(),
            segments: Vec::new(),
            first_ids: Vec::new(),
            prompts: Vec::new(),
            first_prompts: Vec::new(),
            columns: Vec::new(),
            drafts: Vec::new(),
        }
    }

    /// What a state record says.
    ///
    /// # Errors
    /// Why the state contradicts itself.
    pub fn from_state(
        home: Arc<Home>,
        generation: u64,
        digest: Digest256,
        state: State,
    ) -> Result<Self, String> {
        let mut snapshot = Self { generation, oldest: state.oldest, ..Self::empty(home, digest) };
        snapshot.sampling_settings = state.sampling_settings;
        if let (Some(oldest), Some(newest)) = (state.removed.first(), state.removed.last()) {
            let end = state.segments.first().map_or(0, |segment| segment.first);
            let is_sorted = state.removed.is_sorted_by(|a, b| a.first < b.first);
            if oldest.first != 0 || !is_sorted || newest.first >= end || end > 1 << 62 {
                return Err("what was removed does not end where the segments begin".to_owned());
            }
            (snapshot.num_removed, snapshot.num_samples) = (end, end);
            snapshot.removed = state.removed;
        }
        for segment in state.segments {
            snapshot.push_segment(segment)?;
        }
        for prompts in state.prompts {
            snapshot.push_prompts(prompts)?;
        }
        for column in state.columns {
            let column = snapshot.column_from_state(column)?;
            snapshot.columns.push(column);
        }
        for draft in state.drafts {
            let draft = snapshot.column_from_state(draft)?;
            snapshot.drafts.push(draft);
        }
        Ok(snapshot)
    }

    fn column_from_state(&self, state: ColumnState) -> Result<Column, String> {
        let mut column = Column::new(state.name, state.version, state.source);
        for entry in state.extents {
            let extent = self.extent(&column.name, entry)?;
            column.push_extent(extent)?;
        }
        for run in state.runs {
            let run = column.run(run)?;
            column.runs.push(run);
        }
        let ranked: u64 = column.runs.iter().map(|r| r.entry.entries).sum();
        if ranked != column.scored {
            return Err("the runs of a column do not hold its scored samples".to_owned());
        }
        Ok(column)
    }

    /// What a state record is to say.
    pub fn to_state(&self) -> State {
        State {
            pool: self.home.settings.clone(),
            chain: if self.generation == 0 { String::new() } else { hex(&self.digest) },
            oldest: self.oldest,
            sampling_settings: self.sampling_settings.clone(),
            removed: self.removed.clone(),
            segments: self.segments.iter().map(|s| s.entry.clone()).collect(),
            prompts: self.prompts.iter().map(|p| p.entry.clone()).collect(),
            columns: self.columns.iter().map(Column::to_state).collect(),
            drafts: self.drafts.iter().map(Column::to_state).collect(),
        }
    }

    /// Move to the next generation.
    ///
    /// # Errors
    /// Why the commit does not follow; the snapshot is then of no use any more.
    pub fn apply(&mut self, commit: Commit, digest: Digest256) -> Result<(), String> {
        let Commit { segment, prompts, sampling_settings, scores } = commit;
        let (first, count) = (segment.first, segment.count);
        if !scores.iter().map(|s| &s.name).eq(&segment.scores) {
            return Err("the scores of a commit are not those of its segment".to_owned());
        }
        self.push_segment(Arc::new(segment))?;
        if let Some(prompts) = prompts {
            self.push_prompts(Arc::new(prompts))?;
        }
        self.sampling_settings.extend(sampling_settings);
        for score in scores {
            let entry = ExtentEntry { first, count, scored: score.scored, file: None };
            let extent = self.extent(&score.name, Arc::new(entry))?;
            let at = self.columns.iter().position(|c| c.name == score.name);
            let at = at.unwrap_or_else(|| {
                self.columns.push(Column::new(score.name, 1, String::new()));
                self.columns.len() - 1
            });
            self.columns[at].grow(extent, score.merges)?;
        }
        self.generation += 1;
        self.digest = digest;
        Ok(())
    }

    /// Move to the next generation by a change of scores.
    ///
    /// # Errors
    /// Why the change does not follow; the snapshot is then of no use any more.
    pub fn apply_scores(&mut self, change: ScoreChange, digest: Digest256) -> Result<(), String> {
        match change {
            ScoreChange::Draft { name, source, extent, merges } => {
                if extent.file.is_none() {
                    return Err("a draft of scores without a file".to_owned());
                }
                let extent = self.extent(&name, Arc::new(extent))?;
                let at = self.drafts.iter().position(|d| d.name == name).unwrap_or_else(|| {
                    let of = self.columns.iter().find(|c| c.name == name);
                    let version = of.map_or(1, |column| column.version + 1);
                    self.drafts.push(Column::new(name, version, source.clone()));
                    self.drafts.len() - 1
                });
                let end = self.draft_end(Some(&self.drafts[at]));
                if end != extent.first() || self.drafts[at].source != source {
                    return Err("scores that do not go on with their draft".to_owned());
                }
                self.drafts[at].grow(extent, merges)?;
            }
            ScoreChange::Publish { name } => {
                let draft = self.take_draft(&name)?;
                if draft.end() != self.num_samples {
                    return Err("a draft is published before it is complete".to_owned());
                }
                match self.columns.iter_mut().find(|c| c.name == name) {
                    Some(column) => *column = draft,
                    None => self.columns.push(draft),
                }
            }
            ScoreChange::Discard { name } => {
                self.take_draft(&name)?;
            }
        }
        self.generation += 1;
        self.digest = digest;
        Ok(())
    }

    /// Move to the next generation by upkeep.
    ///
    /// # Errors
    /// Why it does not follow; the snapshot is then of no use any more.
    pub fn apply_upkeep(&mut self, upkeep: Upkeep, digest: Digest256) -> Result<(), String> {
        self.generation += 1;
        self.digest = digest;
        match upkeep {
            Upkeep::GiveUp { oldest } => {
                if oldest < self.oldest || oldest > self.generation {
                    return Err(format!("snapshots before {oldest} are given up"));
                }
                self.oldest = oldest;
                Ok(())
            }
            Upkeep::MergeSegments { start, end, segment, columns } => {
                self.replace_segments(start..end, &Arc::new(segment), columns)
            }
            Upkeep::MergePrompts { start, end, prompts } => {
                let replaced = self.prompts.get(start..end).ok_or("a merge of absent prompts")?;
                let count = replaced.iter().map(|table| u64::from(table.entry.count)).sum::<u64>();
                let first = replaced.first().map(|table| table.entry.first);
                if first != Some(prompts.first) || count != u64::from(prompts.count) {
                    return Err("a merge loses or invents prompts".to_owned());
                }
                self.first_prompts.splice(start..end, [prompts.first]);
                self.prompts.splice(start..end, [PromptTable::new(Arc::new(prompts))]);
                Ok(())
            }
            Upkeep::Retain { first, segment, columns, drafts } => {
                self.remove_segments(first, segment)?;
                // Apart from what they refer to, so that they can change.
                let mut all = std::mem::take(&mut self.columns);
                let mut all_drafts = std::mem::take(&mut self.drafts);
                self.cut_columns(first, &mut all, columns)?;
                self.cut_columns(first, &mut all_drafts, drafts)?;
                (self.columns, self.drafts) = (all, all_drafts);
                Ok(())
            }
        }
    }

    /// Leave out the appends before `first`; `segment` is what is left of the one that is cut.
    fn remove_segments(&mut self, first: u64, segment: Option<SegmentEntry>) -> Result<(), String> {
        if first <= self.num_removed || first >= self.num_samples {
            return Err(format!("the samples before {first} are removed"));
        }
        let at = self.finder().index(first);
        let old = self.segments[at].entry.clone();
        let appends = self.segments[..=at].iter().flat_map(|segment| segment.entry.appends());
        let gone: Vec<_> = appends.take_while(|(_, ids)| ids.start < first).collect();
        let fits = match &segment {
            None => old.first == first,
            Some(new) => {
                let left = old.appends().skip_while(|(_, ids)| ids.start < first);
                old.first < first
                    && (new.first, new.count) == (first, old.first + old.count - first)
                    && new.appends().eq(left)
            }
        };
        if !fits || gone.last().is_some_and(|(_, ids)| ids.end != first) {
            return Err("a retention cuts an append, or invents samples".to_owned());
        }
        self.segments.drain(..at);
        self.first_ids.drain(..at);
        if let Some(segment) = segment {
            self.segments[0] = Segment::new(Arc::new(segment));
            self.first_ids[0] = first;
        }
        self.num_removed = first;
        Arc::make_mut(&mut self.removed).extend(gone.into_iter().map(|(append, _)| append));
        Ok(())
    }

    fn cut_columns(
        &self,
        first: u64,
        columns: &mut [Column],
        cuts: Vec<ColumnCut>,
    ) -> Result<(), String> {
        if !columns.iter().map(|column| &column.name).eq(cuts.iter().map(|cut| &cut.name)) {
            return Err("a retention of other columns".to_owned());
        }
        for (column, ColumnCut { name, extent, runs, run }) in columns.iter_mut().zip(cuts) {
            let extent = extent.map(|entry| self.extent(&name, Arc::new(entry))).transpose()?;
            column.remove_before(first, extent, runs, run)?;
        }
        Ok(())
    }

    /// Ids below this have scores in a draft, or need none.
    pub fn draft_end(&self, draft: Option<&Column>) -> u64 {
        draft.map_or(0, Column::end).max(self.num_removed)
    }

    /// Each append with the ids that it got, those whose samples were removed first.
    pub fn appends(&self) -> impl Iterator<Item = (AppendEntry, Range<u64>)> {
        let ends = self.removed.iter().skip(1).map(|append| append.first);
        let removed = self.removed.iter().cloned().zip(ends.chain([self.num_removed]));
        let removed = removed.map(|(append, end)| {
            let first = append.first;
            (append, first..end)
        });
        removed.chain(self.segments.iter().flat_map(|segment| segment.entry.appends()))
    }

    /// Put one segment in the place of several, with the scores that lay in them.
    fn replace_segments(
        &mut self,
        range: Range<usize>,
        entry: &Arc<SegmentEntry>,
        columns: Vec<ColumnMerges>,
    ) -> Result<(), String> {
        let replaced = self.segments.get(range.clone()).ok_or("a merge of absent segments")?;
        let appends = replaced.iter().flat_map(|segment| segment.entry.appends());
        let count = replaced.iter().map(|segment| segment.entry.count).sum::<u64>();
        let is_same = replaced.first().is_some_and(|first| first.entry.first == entry.first);
        if !is_same || count != entry.count || !appends.eq(entry.appends()) {
            return Err("a merge loses or invents samples".to_owned());
        }
        let num_replaced = range.len();
        self.first_ids.splice(range.clone(), [entry.first]);
        self.segments.splice(range, [Segment::new(entry.clone())]);

        let ids = entry.first..entry.first + entry.count;
        for at in 0..self.columns.len() {
            let column = &self.columns[at];
            let lies_there =
                |extent: &Extent| extent.is_in_segment() && ids.contains(&extent.first());
            let Some(start) = column.extents.iter().position(lies_there) else { continue };
            let end = start + column.extents[start..].iter().take_while(|e| lies_there(e)).count();
            if end - start != num_replaced {
                return Err("a merge of segments with different scores".to_owned());
            }
            let scored = column.extents[start..end].iter().map(|e| e.entry.scored).sum();
            let merged = ExtentEntry { first: entry.first, count, scored, file: None };
            let extent = self.extent(&column.name, Arc::new(merged))?;
            self.columns[at].extents.splice(start..end, [extent]);
        }
        for ColumnMerges { name, merges } in columns {
            let column = self.columns.iter_mut().find(|column| column.name == name);
            column.ok_or("a merge of an absent column's runs")?.merge(merges)?;
        }
        // The new segment has an order of its own, which no run is.
        let lies_there = |run: &Arc<Run>| match &run.place {
            RunPlace::Extent(extent) => extent.is_in_segment() && ids.contains(&extent.first()),
            RunPlace::Merged(_) => false,
        };
        if self.columns.iter().any(|column| column.runs.iter().any(lies_there)) {
            return Err("a run is left in a segment that is gone".to_owned());
        }
        Ok(())
    }

    fn take_draft(&mut self, name: &str) -> Result<Column, String> {
        let at = self.drafts.iter().position(|draft| draft.name == name);
        at.map(|at| self.drafts.remove(at)).ok_or_else(|| format!("there is no draft of {name:?}"))
    }

    /// Use the files that an earlier snapshot of the same pool has open.
    pub fn adopt_open_files(&self, earlier: &Self) {
        // By name: compaction and retention move them to other places.
        let name = |file: &LazyFile| file.entry.name.clone();
        let open: HashMap<_, _> = earlier.lazy_files().map(|file| (name(file), file)).collect();
        for file in self.lazy_files() {
            if let Some(other) = open.get(&file.entry.name) {
                file.adopt(other);
            }
        }
    }

    fn lazy_files(&self) -> impl Iterator<Item = &LazyFile> {
        let segments = self.segments.iter().map(|segment| &segment.file);
        let prompts = self.prompts.iter().map(|table| &table.file);
        segments.chain(prompts).chain(self.columns.iter().flat_map(Column::own_files))
    }

    fn push_segment(&mut self, entry: Arc<SegmentEntry>) -> Result<(), String> {
        if entry.first != self.num_samples || entry.count == 0 || entry.count > 1 << 31 {
            return Err(format!(
                "a segment of {} samples begins at {}, not at {}",
                entry.count, entry.first, self.num_samples
            ));
        }
        let ids = entry.first + 1..entry.first + entry.count;
        if !entry.further.is_sorted_by(|a, b| a.first < b.first)
            || entry.further.iter().any(|append| !ids.contains(&append.first))
        {
            return Err("the appends of a segment do not follow one another".to_owned());
        }
        self.num_samples += entry.count;
        self.first_ids.push(entry.first);
        self.segments.push(Segment::new(entry));
        Ok(())
    }

    fn push_prompts(&mut self, entry: Arc<PromptEntry>) -> Result<(), String> {
        if entry.first != self.num_prompts || entry.count == 0 {
            return Err(format!(
                "a prompt file begins at {}, not at {}",
                entry.first, self.num_prompts
            ));
        }
        self.num_prompts =
            self.num_prompts.checked_add(entry.count).ok_or("there are too many prompts")?;
        self.first_prompts.push(entry.first);
        self.prompts.push(PromptTable::new(entry));
        Ok(())
    }

    fn extent(&self, column: &str, entry: Arc<ExtentEntry>) -> Result<Extent, String> {
        let end = entry.first.checked_add(entry.count);
        if end.is_none_or(|end| end > self.num_samples) {
            return Err("an extent beyond the last sample".to_owned());
        }
        if let Some(file) = &entry.file {
            let file = Arc::new(LazyFile::new(file.clone()));
            return Ok(Extent { entry, place: ExtentPlace::File(file) });
        }
        let segment = self
            .first_ids
            .binary_search(&entry.first)
            .map(|i| self.segments[i].clone())
            .map_err(|_| "an extent of no segment")?;
        let index = segment
            .entry
            .scores
            .iter()
            .position(|name| name == column)
            .ok_or("an extent of a segment without the column")?;
        if entry.count != segment.entry.count {
            return Err("an extent that does not fit its segment".to_owned());
        }
        Ok(Extent { entry, place: ExtentPlace::Segment(segment, index) })
    }

    /// All data files that the snapshot lists, drafts included.
    pub fn files(&self) -> impl Iterator<Item = &FileEntry> {
        let columns = || self.columns.iter().chain(&self.drafts);
        let segments = self.segments.iter().map(|segment| &segment.entry.file);
        let prompts = self.prompts.iter().map(|table| &table.entry.file);
        let scores = columns().flat_map(|c| &c.extents).filter_map(|e| e.entry.file.as_ref());
        let runs = columns().flat_map(|c| &c.runs).filter_map(|run| match &run.entry.source {
            RunSource::File(file) => Some(file),
            RunSource::Extent(_) => None,
        });
        segments.chain(prompts).chain(scores).chain(runs)
    }

    /// Hexadecimal digest.
    pub fn hash(&self) -> String {
        hex(&self.digest)
    }

    /// The disk.
    pub fn storage(&self) -> &dyn Storage {
        &*self.home.storage
    }

    /// Refuse an id that the snapshot lacks.
    ///
    /// # Errors
    /// `UnknownSample`.
    #[inline(always)]
    pub fn check_id(&self, id: u64) -> Result<()> {
        let Self { num_removed, num_samples, .. } = *self;
        if id.wrapping_sub(num_removed) < num_samples - num_removed {
            Ok(())
        } else {
            Err(PoolError::UnknownSample { id, num_removed, num_samples })
        }
    }

    /// Segment and row of a sample that the snapshot has.
    pub fn locate(&self, id: u64) -> (&Segment, usize) {
        self.finder().locate(id)
    }

    /// For looking up many samples.
    pub fn finder(&self) -> Finder<'_> {
        let segments = self.first_ids.len() as u128;
        let size = (self.num_samples - self.num_removed).max(1);
        let per_sample = (segments << 64) / u128::from(size);
        Finder { snapshot: self, per_sample: u64::try_from(per_sample).unwrap_or(u64::MAX) }
    }

    /// Prompt file and row of a prompt.
    ///
    /// # Errors
    /// `Corrupted` if the snapshot lacks it: a segment named it.
    #[inline(always)]
    pub fn locate_prompt(&self, prompt: u32) -> Result<(&PromptTable, usize)> {
        if prompt >= self.num_prompts {
            return Err(PoolError::corrupted(
                "segments",
                0,
                format!("a sample names prompt {prompt} of {}", self.num_prompts),
            ));
        }
        let at = self.first_prompts.partition_point(|&first| first <= prompt) - 1;
        Ok((&self.prompts[at], (prompt - self.first_prompts[at]) as usize))
    }

    /// Token ids of a prompt.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    pub fn prompt_tokens(&self, prompt: u32) -> Result<Tokens<'_>> {
        let (table, row) = self.locate_prompt(prompt)?;
        let file = table.open(&self.home)?;
        let span = file.span(prompt_column::TOKENS, row)?;
        Tokens::read(file, prompt_column::TOKENS, self.home.settings.token_bytes, span)
    }

    /// A score column.
    ///
    /// # Errors
    /// `UnknownColumn`.
    pub fn column(&self, name: &str) -> Result<&Column> {
        self.columns.iter().find(|c| c.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.columns.iter().map(|c| c.name.as_str()).collect();
            PoolError::UnknownColumn {
                name: name.to_owned(),
                known: if names.is_empty() { "none".to_owned() } else { names.join(", ") },
            }
        })
    }

    /// A fixed-width column of the segments in id order into `out`, which has the length of the snapshot.
    /// What `out` says of samples that were removed stays.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    pub fn copy_column<T: Pod + Send + Sync>(&self, column: usize, out: &mut [T]) -> Result<()> {
        let mut rest = &mut out[self.num_removed as usize..];
        let mut parts = Vec::with_capacity(self.segments.len());
        for segment in &self.segments {
            let (part, tail) = rest.split_at_mut(segment.entry.count as usize);
            parts.push((segment, part));
            rest = tail;
        }
        parts.into_par_iter().try_for_each(|(segment, part)| {
            let rows = 0..part.len();
            part.copy_from_slice(segment.open(&self.home)?.values(column, rows)?);
            Ok(())
        })
    }

    /// Scores in id order into `out`, which has the length of the snapshot.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    pub fn copy_scores(&self, column: &Column, out: &mut [f32]) -> Result<()> {
        out.fill(f32::NAN);
        for extent in &column.extents {
            let at = extent.first() as usize;
            out[at..at + extent.count()]
                .copy_from_slice(extent.scores(&self.home, 0..extent.count())?);
        }
        Ok(())
    }

    /// Scores of some samples into `out`, which has the same length.
    ///
    /// # Errors
    /// `UnknownSample`, `Corrupted`, `Io`.
    pub fn scores_of(&self, column: &Column, ids: &[u64], out: &mut [f32]) -> Result<()> {
        // In stages, so that the lines of the second are on their way.
        let finder = self.finder();
        let mut places = Vec::with_capacity(ids.len());
        for &id in ids {
            self.check_id(id)?;
            let extent = finder.extent(column, id);
            if let Some(extent) = extent {
                extent.prefetch_score(&self.home, (id - extent.first()) as usize)?;
            }
            places.push((extent, id));
        }
        for ((extent, id), out) in places.into_iter().zip(out) {
            *out = match extent {
                None => f32::NAN,
                Some(extent) => {
                    let row = (id - extent.first()) as usize;
                    extent.scores(&self.home, row..row + 1)?[0]
                }
            };
        }
        Ok(())
    }

    /// A sample with all its columns.
    ///
    /// # Errors
    /// `UnknownSample`, `Corrupted`, `Io`.
    pub fn sample(&self, id: u64) -> Result<Sample> {
        self.check_id(id)?;
        let settings = &self.home.settings;
        let (segment, row) = self.locate(id);
        let file = segment.open(&self.home)?;
        let prompt_id: u32 = file.value(column::PROMPT, row)?;
        let (table, prompt_row) = self.locate_prompt(prompt_id)?;
        let prompts = table.open(&self.home)?;
        let span = file.span(column::COMPLETION, row)?;
        let number: u32 = file.value(column::SETTINGS, row)?;
        let sampling = self.sampling_settings.get(number as usize).ok_or_else(|| {
            PoolError::corrupted(file.name(), 0, format!("sampling settings {number} are unknown"))
        })?;
        let text =
            |with: bool| with.then(|| file.text(column::TEXT, row).map(str::to_owned)).transpose();
        Ok(Sample {
            id,
            prompt_id,
            prompt_text: prompts.text(prompt_column::TEXT, prompt_row)?.to_owned(),
            prompt_tokens: self.prompt_tokens(prompt_id)?.to_vec(),
            prompt_metadata: prompts.text(prompt_column::METADATA, prompt_row)?.to_owned(),
            completion_tokens: Tokens::read(file, column::COMPLETION, settings.token_bytes, span)?
                .to_vec(),
            completion_text: text(settings.store_text)?,
            finish: file.value(column::FINISH, row)?,
            round: file.value(column::ROUND, row)?,
            chunk: file.value(column::CHUNK, row)?,
            policy_step: file.value(column::POLICY_STEP, row)?,
            reward_token: file.value(column::REWARD_TOKEN, row)?,
            settings: sampling.clone(),
            seed: file.value(column::SEED, row)?,
            logprob_policy: file.value(column::LOGPROB_POLICY, row)?,
            logprob_reference: file.value(column::LOGPROB_REFERENCE, row)?,
            scores: self
                .columns
                .iter()
                .filter_map(|c| self.finder().extent(c, id).map(|extent| (c, extent)))
                .map(|(c, extent)| {
                    let row = (id - extent.first()) as usize;
                    Ok((c.name.clone(), extent.scores(&self.home, row..row + 1)?[0]))
                })
                .collect::<Result<_>>()?,
        })
    }
}

/// Where samples of a snapshot are, for looking up many.
#[derive(Clone, Copy)]
pub struct Finder<'a> {
    snapshot: &'a Snapshot,
    /// Segments, in 2^64ths.
    per_sample: u64,
}

impl<'a> Finder<'a> {
    /// Segment and row of a sample that the snapshot has.
    #[inline]
    pub fn locate(&self, id: u64) -> (&'a Segment, usize) {
        let at = self.index(id);
        (&self.snapshot.segments[at], (id - self.snapshot.first_ids[at]) as usize)
    }

    /// Appends are mostly alike in size, so the proportional guess is mostly right.
    #[inline]
    fn index(&self, id: u64) -> usize {
        let firsts = &self.snapshot.first_ids[..];
        let place = u128::from(id - self.snapshot.num_removed);
        let guess = ((place * u128::from(self.per_sample)) >> 64) as usize;
        let starts_before = |i: usize| firsts.get(i).is_some_and(|&first| first <= id);
        if starts_before(guess) && !starts_before(guess + 1) {
            return guess;
        }
        firsts.partition_point(|&first| first <= id) - 1
    }

    /// The extent of a column that covers a sample of the snapshot.
    #[inline]
    fn extent<'c>(&self, column: &'c Column, id: u64) -> Option<&'c Extent> {
        let covers = |e: &&Extent| id.wrapping_sub(e.first()) < e.entry.count;
        // Mostly every segment has the column, so that extents and segments run in step.
        let same = column.extents.get(self.index(id)).filter(covers);
        same.or_else(|| {
            let after = column.extents.partition_point(|e| e.first() <= id);
            after.checked_sub(1).map(|i| &column.extents[i]).filter(covers)
        })
    }
}

/// A sample with all its columns.
#[expect(missing_docs, reason = "the fields are the columns of FORMAT.md")]
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub id: u64,
    pub prompt_id: u32,
    pub prompt_text: String,
    pub prompt_tokens: Vec<u32>,
    pub prompt_metadata: String,
    pub completion_tokens: Vec<u32>,
    pub completion_text: Option<String>,
    pub finish: u8,
    pub round: u32,
    pub chunk: u32,
    pub policy_step: u32,
    pub reward_token: i16,
    pub settings: Arc<str>,
    pub seed: u64,
    pub logprob_policy: f32,
    pub logprob_reference: f32,
    pub scores: Vec<(String, f32)>,
}
