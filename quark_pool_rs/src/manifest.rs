//! The published state: the payloads of the records in a log.
//!
//! This module parses bytes and touches no file. Layout: FORMAT.md, "Manifest".

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, de::Error};

use crate::encoding::FileEntry;
use crate::format::{PROMPT_DIR, PoolSettings, RUN_DIR, SCORE_DIR, SEGMENT_DIR, is_data_name};

/// A file of one kind. This is the only check of the names in a manifest, so the name of every [`FileEntry`] that
/// was read is a safe path in the pool.
fn file_in<'de, D: Deserializer<'de>>(
    directory: &str,
    deserializer: D,
) -> Result<FileEntry, D::Error> {
    let file = FileEntry::deserialize(deserializer)?;
    let is_there = file.name.strip_prefix(directory).is_some_and(|name| name.starts_with('/'));
    if is_there && is_data_name(&file.name) {
        return Ok(file);
    }
    // Shortened, because a stranger may have chosen it.
    let shown: String = file.name.chars().take(100).collect();
    Err(D::Error::custom(format!("a name that no file in {directory} has: {shown:?}")))
}

fn segment_file<'de, D: Deserializer<'de>>(deserializer: D) -> Result<FileEntry, D::Error> {
    file_in(SEGMENT_DIR, deserializer)
}

fn prompt_file<'de, D: Deserializer<'de>>(deserializer: D) -> Result<FileEntry, D::Error> {
    file_in(PROMPT_DIR, deserializer)
}

fn merged_run_file<'de, D: Deserializer<'de>>(deserializer: D) -> Result<FileEntry, D::Error> {
    file_in(RUN_DIR, deserializer)
}

fn score_file<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<FileEntry>, D::Error> {
    /// Present or null.
    struct Scores(FileEntry);
    impl<'de> Deserialize<'de> for Scores {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            file_in(SCORE_DIR, deserializer).map(Self)
        }
    }
    Ok(Option::<Scores>::deserialize(deserializer)?.map(|Scores(file)| file))
}

/// A segment and the append that it stores, or the appends whose segments were merged into it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentEntry {
    /// Idempotency key of the first append.
    pub key: String,
    /// First sample id.
    pub first: u64,
    /// Samples.
    pub count: u64,
    /// Round of the first append.
    pub round: u32,
    /// Chunk of the first append.
    pub chunk: u32,
    /// The appends after the first, by first id.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub further: Vec<AppendEntry>,
    /// Score columns in the file, in its order.
    pub scores: Vec<String>,
    /// The file.
    #[serde(deserialize_with = "segment_file")]
    pub file: FileEntry,
}

/// A further append in a merged segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AppendEntry {
    /// Idempotency key.
    pub key: String,
    /// First sample id.
    pub first: u64,
    /// Its round.
    pub round: u32,
    /// Its chunk.
    pub chunk: u32,
}

impl SegmentEntry {
    /// Each append with the ids of its samples, by first id.
    pub fn appends(&self) -> impl Iterator<Item = (AppendEntry, Range<u64>)> {
        let Self { key, first, round, chunk, .. } = self;
        let earliest =
            AppendEntry { key: key.clone(), first: *first, round: *round, chunk: *chunk };
        let starts = self.further.iter().map(|append| append.first);
        let ends = starts.chain([self.first + self.count]);
        let all = std::iter::once(earliest).chain(self.further.iter().cloned());
        all.zip(ends).map(|(append, end)| {
            let first = append.first;
            (append, first..end)
        })
    }
}

/// A prompt file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptEntry {
    /// First prompt id.
    pub first: u32,
    /// Prompts.
    pub count: u32,
    /// The file.
    #[serde(deserialize_with = "prompt_file")]
    pub file: FileEntry,
}

/// Values of a score column for some ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExtentEntry {
    /// First sample id.
    pub first: u64,
    /// Samples.
    pub count: u64,
    /// Number of scores that are not NaN.
    pub scored: u64,
    /// The file with the values if they were added after their samples; else they are in the segment at `first`.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "score_file")]
    pub file: Option<FileEntry>,
}

/// Where a run is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RunSource {
    /// The order column of the extent that begins at this id.
    Extent(u64),
    /// A merged run.
    #[serde(deserialize_with = "merged_run_file")]
    File(FileEntry),
}

/// A run of a score column.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunEntry {
    /// Tier.
    pub level: u8,
    /// Entries.
    pub entries: u64,
    /// Ids in a file of its own are relative to this.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub first: u64,
    /// Where.
    pub source: RunSource,
}

/// A score column.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ColumnState {
    /// Its name.
    pub name: String,
    /// 1 for the first scores under this name; each re-scoring adds 1.
    pub version: u32,
    /// Describes the scorer as one JSON object, if the scores were added after their samples; else empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// By first id.
    pub extents: Vec<Arc<ExtentEntry>>,
    /// In order of creation.
    pub runs: Vec<Arc<RunEntry>>,
}

/// Payload of a state record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The settings that the pool was created with.
    pub pool: PoolSettings,
    /// Hexadecimal digest of the last commit before this state, empty for generation 0.
    pub chain: String,
    /// The oldest generation that can be opened: the start of a fork, or the oldest that a collection kept.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub oldest: u64,
    /// Interned sampling settings.
    pub sampling_settings: Vec<Arc<str>>,
    /// Appends before the first segment, whose samples were removed, by first id.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub removed: Arc<Vec<AppendEntry>>,
    /// By first id.
    pub segments: Vec<Arc<SegmentEntry>>,
    /// By first prompt id.
    pub prompts: Vec<Arc<PromptEntry>>,
    /// In order of appearance.
    pub columns: Vec<ColumnState>,
    /// Columns that are still being written. No reader sees them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drafts: Vec<ColumnState>,
}

#[expect(clippy::ptr_arg, reason = "serde's signature")]
fn is_empty(appends: &Vec<AppendEntry>) -> bool {
    appends.is_empty()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Payload of a scores record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ScoreChange {
    /// More scores of a draft. The first change for a name begins the draft.
    Draft {
        /// Name of the future column.
        name: String,
        /// Describes the scorer. It is the same in every change of one draft.
        source: String,
        /// Follows the draft's last extent.
        extent: ExtentEntry,
        /// Merges to apply in order, after the extent's own run was added.
        merges: Vec<MergeEntry>,
    },
    /// The draft becomes the column of its name: a new one, or the next version of an existing one.
    Publish {
        /// Name of the draft.
        name: String,
    },
    /// The draft is discarded.
    Discard {
        /// Name of the draft.
        name: String,
    },
}

/// Payload of an upkeep record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Upkeep {
    /// Older snapshots expire.
    GiveUp {
        /// The oldest generation that is kept.
        oldest: u64,
    },
    /// One segment replaces several.
    MergeSegments {
        /// Position of the first of them.
        start: usize,
        /// Position after the last.
        end: usize,
        /// Holds the same samples.
        segment: SegmentEntry,
        /// For each column with runs in these segments: merges that move the runs to files of their own.
        columns: Vec<ColumnMerges>,
    },
    /// One prompt file replaces several.
    MergePrompts {
        /// Position of the first of them.
        start: usize,
        /// Position after the last.
        end: usize,
        /// Holds the same prompts.
        prompts: PromptEntry,
    },
    /// The oldest samples are removed.
    Retain {
        /// The first sample that stays. It is the first of an append.
        first: u64,
        /// The rest of its segment, if the segment also held older appends.
        segment: Option<SegmentEntry>,
        /// One for each column, in order.
        columns: Vec<ColumnCut>,
        /// One for each draft, in order.
        drafts: Vec<ColumnCut>,
    },
}

/// A column without its oldest samples.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ColumnCut {
    /// The column.
    pub name: String,
    /// The rest of the extent with the first sample, if the extent began earlier.
    pub extent: Option<ExtentEntry>,
    /// Number of oldest runs to remove.
    pub runs: usize,
    /// The rest of the last of these runs, if it held samples that stay.
    pub run: Option<RunEntry>,
}

impl ColumnCut {
    /// Files that it brings.
    pub fn files(&self) -> impl Iterator<Item = &FileEntry> {
        let scores = self.extent.as_ref().and_then(|extent| extent.file.as_ref());
        scores.into_iter().chain(self.run.as_ref().and_then(run_file))
    }
}

/// Merges of a column's runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ColumnMerges {
    /// The column.
    pub name: String,
    /// One after another.
    pub merges: Vec<MergeEntry>,
}

/// Score column of a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommitScore {
    /// Name of the column. A new column comes after the others.
    pub name: String,
    /// Samples whose score is not NaN.
    pub scored: u64,
    /// Merges to apply in order, after the append's own run was added.
    pub merges: Vec<MergeEntry>,
}

/// Runs `start .. end` of a column are replaced by one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeEntry {
    /// Position of the first run to remove.
    pub start: usize,
    /// Position after the last run to remove.
    pub end: usize,
    /// The run to put at `start`.
    pub run: RunEntry,
}

/// Payload of a commit record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Commit {
    /// The new segment.
    pub segment: SegmentEntry,
    /// The new prompts, if any.
    pub prompts: Option<PromptEntry>,
    /// New sampling settings, if any.
    pub sampling_settings: Vec<Arc<str>>,
    /// One per score column of the segment.
    pub scores: Vec<CommitScore>,
}

impl Commit {
    /// The new files of the commit.
    pub fn files(&self) -> impl Iterator<Item = &FileEntry> {
        let prompts = self.prompts.iter().map(|prompts| &prompts.file);
        let runs = self.scores.iter().flat_map(|score| &score.merges).filter_map(merged_file);
        std::iter::once(&self.segment.file).chain(prompts).chain(runs)
    }
}

impl ScoreChange {
    /// The new files of the change.
    pub fn files(&self) -> Vec<&FileEntry> {
        match self {
            Self::Draft { extent, merges, .. } => {
                extent.file.iter().chain(merges.iter().filter_map(merged_file)).collect()
            }
            Self::Publish { .. } | Self::Discard { .. } => Vec::new(),
        }
    }
}

impl Upkeep {
    /// Files that it brings.
    pub fn files(&self) -> Vec<&FileEntry> {
        match self {
            Self::GiveUp { .. } => Vec::new(),
            Self::MergePrompts { prompts, .. } => vec![&prompts.file],
            Self::MergeSegments { segment, columns, .. } => {
                let merges = columns.iter().flat_map(|column| &column.merges);
                std::iter::once(&segment.file).chain(merges.filter_map(merged_file)).collect()
            }
            Self::Retain { segment, columns, drafts, .. } => {
                let segment = segment.iter().map(|segment| &segment.file);
                segment.chain(columns.iter().chain(drafts).flat_map(ColumnCut::files)).collect()
            }
        }
    }
}

fn merged_file(merge: &MergeEntry) -> Option<&FileEntry> {
    run_file(&merge.run)
}

fn run_file(run: &RunEntry) -> Option<&FileEntry> {
    match &run.source {
        RunSource::File(file) => Some(file),
        RunSource::Extent(_) => None,
    }
}
