//! What a reader sees: the pool as it was at one commit.
//!
//! A snapshot never changes and shares its open files with its neighbours. It knows which parts there are and how
//! each kind of commit changes them; where a sample lies is told in `lookup`, what scores mean for a ranking in `ranking`.
#![expect(
    clippy::indexing_slicing,
    reason = "positions in a record are checked where it is applied"
)]

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::checksum::{Digest256, hex};
use crate::datafile::LazyFile;
use crate::encoding::FileEntry;
use crate::error::Result;
use crate::manifest::{
    AppendEntry, ColumnCut, ColumnMerges, ColumnState, Commit, ExtentEntry, PromptEntry, RunSource,
    ScoreChange, SegmentEntry, State, Upkeep,
};
use crate::parts::{
    Column, Context, Extent, ExtentLocation, PromptTable, Run, RunLocation, Segment,
};
use crate::storage::Storage;

/// The pool at one commit.
#[derive(Clone)]
pub struct Snapshot {
    /// What all snapshots share.
    pub context: Arc<Context>,
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
    pub(crate) first_ids: Vec<u64>,
    /// By first prompt id.
    pub prompts: Vec<Arc<PromptTable>>,
    pub(crate) first_prompts: Vec<u32>,
    /// In order of appearance.
    pub columns: Vec<Column>,
    /// Columns that are being written.
    pub drafts: Vec<Column>,
}

impl Snapshot {
    /// The empty pool.
    pub fn empty(context: Arc<Context>, digest: Digest256) -> Self {
        Self {
            context,
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
        context: Arc<Context>,
        generation: u64,
        digest: Digest256,
        state: State,
    ) -> Result<Self, String> {
        let mut snapshot =
            Self { generation, oldest: state.oldest, ..Self::empty(context, digest) };
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
            pool: self.context.settings.clone(),
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
                    // The column may have begun after the draft.
                    Some(column) => *column = Column { version: column.version + 1, ..draft },
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
        let at = self.first_ids.partition_point(|&id| id <= first) - 1;
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
        let lies_there = |run: &Arc<Run>| match &run.location {
            RunLocation::Extent(extent) => extent.is_in_segment() && ids.contains(&extent.first()),
            RunLocation::Merged(_) => false,
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
            return Ok(Extent { entry, location: ExtentLocation::File(file) });
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
        Ok(Extent { entry, location: ExtentLocation::Segment(segment, index) })
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
        &*self.context.storage
    }
}
