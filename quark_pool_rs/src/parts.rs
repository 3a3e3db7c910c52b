//! What a snapshot is made of: segments, prompt files, score columns, their extents and runs.
//!
//! A part knows its entry of the manifest and opens its file when it is first needed. Snapshots share parts.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::ops::Range;
use std::sync::Arc;

use crate::datafile::{DataFile, LazyFile};
use crate::encoding::Kind;
use crate::error::{PoolError, Result};
use crate::format::PoolSettings;
use crate::manifest::{
    ColumnState, ExtentEntry, MergeEntry, PromptEntry, RunEntry, RunSource, SegmentEntry,
};
use crate::segment::{prompt_columns, run_columns, score_columns, score_position, segment_columns};
use crate::storage::Storage;

/// The disk and the settings, which all snapshots of a pool share.
pub struct Context {
    /// The disk.
    pub storage: Arc<dyn Storage>,
    /// What the pool was created with.
    pub settings: PoolSettings,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Context").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// A segment.
#[derive(Debug)]
pub struct Segment {
    /// From the manifest.
    pub entry: Arc<SegmentEntry>,
    pub(crate) file: LazyFile,
}

impl Segment {
    pub(crate) fn new(entry: Arc<SegmentEntry>) -> Arc<Self> {
        Arc::new(Self { file: LazyFile::new(entry.file.clone()), entry })
    }

    /// Its file, opened if need be.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    #[inline(always)]
    pub fn open(&self, context: &Context) -> Result<&DataFile> {
        let columns = || segment_columns(&context.settings, &self.entry.scores, self.entry.count);
        self.file.get(&*context.storage, columns, self.entry.count)
    }
}

/// A prompt file.
#[derive(Debug)]
pub struct PromptTable {
    /// From the manifest.
    pub entry: Arc<PromptEntry>,
    pub(crate) file: LazyFile,
}

impl PromptTable {
    pub(crate) fn new(entry: Arc<PromptEntry>) -> Arc<Self> {
        Arc::new(Self { file: LazyFile::new(entry.file.clone()), entry })
    }

    /// Its file, opened if need be.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    #[inline(always)]
    pub fn open(&self, context: &Context) -> Result<&DataFile> {
        let columns = || prompt_columns(context.settings.token_bytes);
        self.file.get(&*context.storage, columns, u64::from(self.entry.count))
    }
}

/// Where the scores of some ids lie.
#[derive(Debug, Clone)]
pub struct Extent {
    /// From the manifest.
    pub entry: Arc<ExtentEntry>,
    pub(crate) location: ExtentLocation,
}

#[derive(Debug, Clone)]
pub(crate) enum ExtentLocation {
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
    fn open(&self, context: &Context) -> Result<(&DataFile, usize)> {
        Ok(match &self.location {
            ExtentLocation::Segment(segment, index) => {
                (segment.open(context)?, score_position(&context.settings, *index))
            }
            ExtentLocation::File(file) => {
                let columns = || score_columns(&context.settings, self.entry.count);
                (file.get(&*context.storage, columns, self.entry.count)?, 0)
            }
        })
    }

    /// Scores of some rows.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    #[inline(always)]
    pub fn scores<'a>(&'a self, context: &Context, rows: Range<usize>) -> Result<&'a [f32]> {
        let (file, position) = self.open(context)?;
        file.values(position, rows)
    }

    /// Ask the processor for a score that will soon be read.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    #[inline(always)]
    pub fn prefetch_score(&self, context: &Context, row: usize) -> Result<()> {
        let (file, position) = self.open(context)?;
        file.prefetch_row(position, row);
        Ok(())
    }

    /// Ask the processor for an entry of the order that will soon be read.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    #[inline(always)]
    pub fn prefetch_order(&self, context: &Context, rank: usize) -> Result<()> {
        let (file, position) = self.open(context)?;
        file.prefetch_row(position + 1, rank);
        Ok(())
    }

    /// The row number at a rank.
    ///
    /// # Errors
    /// `Corrupted`, `Io`; `Corrupted` if there is no such row.
    #[inline(always)]
    pub fn row(&self, context: &Context, rank: usize) -> Result<usize> {
        let (file, position) = self.open(context)?;
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
    pub fn order(&self, context: &Context, ranks: Range<usize>) -> Result<Vec<u32>> {
        let (file, position) = self.open(context)?;
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
        matches!(self.location, ExtentLocation::Segment(..))
    }

    /// The file's name, for messages.
    pub fn file_name(&self) -> &str {
        match &self.location {
            ExtentLocation::Segment(segment, _) => &segment.entry.file.name,
            ExtentLocation::File(file) => &file.entry.name,
        }
    }

    /// The file of scores that came after their samples, opened if need be.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    pub fn own_file(&self, context: &Context) -> Option<Result<&DataFile>> {
        matches!(self.location, ExtentLocation::File(_))
            .then(|| self.open(context).map(|(file, _)| file))
    }
}

/// A run of a score column.
#[derive(Debug)]
pub struct Run {
    /// From the manifest.
    pub entry: Arc<RunEntry>,
    /// Where it lies.
    pub location: RunLocation,
}

/// Where a run lies.
#[derive(Debug)]
pub enum RunLocation {
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
    pub fn open_merged<'a>(&self, context: &Context, file: &'a LazyFile) -> Result<&'a DataFile> {
        file.get(&*context.storage, || run_columns(&context.settings), self.entry.entries)
    }

    /// Its samples have no smaller ids.
    pub fn first(&self) -> u64 {
        match &self.location {
            RunLocation::Extent(extent) => extent.first(),
            RunLocation::Merged(_) => self.entry.first,
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
    pub(crate) fn new(name: String, version: u32, source: String) -> Self {
        Self { name, version, source, extents: Vec::new(), runs: Vec::new(), scored: 0 }
    }

    pub(crate) fn to_state(&self) -> ColumnState {
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

    pub(crate) fn push_extent(&mut self, extent: Extent) -> Result<(), String> {
        if extent.entry.scored > extent.entry.count || extent.first() < self.end() {
            return Err("an extent that does not fit its column".to_owned());
        }
        self.scored += extent.entry.scored;
        self.extents.push(extent);
        Ok(())
    }

    pub(crate) fn run(&self, entry: Arc<RunEntry>) -> Result<Arc<Run>, String> {
        let location = match &entry.source {
            RunSource::File(_) if entry.first > self.end() => {
                return Err("a run that begins beyond its column".to_owned());
            }
            RunSource::File(file) => RunLocation::Merged(LazyFile::new(file.clone())),
            RunSource::Extent(first) => {
                let at = self.extents.binary_search_by_key(first, Extent::first);
                let extent =
                    at.map(|i| self.extents[i].clone()).map_err(|_| "a run of no extent")?;
                if extent.entry.scored != entry.entries {
                    return Err("a run that does not fit its extent".to_owned());
                }
                RunLocation::Extent(extent)
            }
        };
        Ok(Arc::new(Run { entry, location }))
    }

    /// Add an extent with its own run, then carry out the merges.
    pub(crate) fn grow(&mut self, extent: Extent, merges: Vec<MergeEntry>) -> Result<(), String> {
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
    pub(crate) fn merge(&mut self, merges: Vec<MergeEntry>) -> Result<(), String> {
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
    pub(crate) fn remove_before(
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
        let is_gone = |run: &Arc<Run>| match &run.location {
            RunLocation::Extent(extent) => extent.first() < first,
            RunLocation::Merged(_) => false,
        };
        let ranked: u64 = self.runs.iter().map(|run| run.entry.entries).sum();
        if ranked != self.scored || self.runs.iter().any(is_gone) {
            return Err("a retention loses or invents entries of runs".to_owned());
        }
        Ok(())
    }

    /// Files that hold nothing but scores or runs.
    pub(crate) fn own_files(&self) -> impl Iterator<Item = &LazyFile> {
        let scores = self.extents.iter().filter_map(|extent| match &extent.location {
            ExtentLocation::File(file) => Some(&**file),
            ExtentLocation::Segment(..) => None,
        });
        let runs = self.runs.iter().filter_map(|run| match &run.location {
            RunLocation::Merged(file) => Some(file),
            RunLocation::Extent(_) => None,
        });
        scores.chain(runs)
    }
}
