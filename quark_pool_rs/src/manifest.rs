//! The published state: records, logs and what they say.
//!
//! Bytes in, values out; no file is touched here. Layout: FORMAT.md, "Manifest" and "HEAD".

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, de::Error};

use crate::checksum::{Digest256, sha256, sum64};
use crate::datafile::FileEntry;
use crate::format::{
    MAX_PAYLOAD_BYTES, PROMPT_DIR, PoolSettings, RUN_DIR, SCORE_DIR, SEGMENT_DIR, is_data_name,
};

/// Length of a record before its payload.
pub const HEADER_BYTES: usize = 96;
const MAGIC: [u8; 8] = *b"\xffQRKMAN\xfe";
const HEAD_MAGIC: [u8; 8] = *b"QRKHEAD1";
const HEAD_BYTES: usize = 64;

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Everything at a generation.
    State = 1,
    /// What one append added.
    Commit = 2,
    /// What became of the scores of samples that were there.
    Scores = 3,
    /// What became of snapshots and files that were there.
    Upkeep = 4,
}

/// A record whose sums were right.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    /// Where it begins in its log.
    pub offset: usize,
    /// State or commit.
    pub kind: Kind,
    /// Generation that it makes.
    pub generation: u64,
    /// Digest of the record before.
    pub previous: Digest256,
    /// Its own.
    pub digest: Digest256,
    /// JSON.
    pub payload: &'a [u8],
}

impl Record<'_> {
    /// Where the record after it begins.
    pub fn end(&self) -> usize {
        self.offset + HEADER_BYTES + self.payload.len()
    }
}

/// The bytes of a record, and its digest.
///
/// # Panics
/// If the payload is longer than the format allows.
pub fn encode_record(
    kind: Kind,
    generation: u64,
    previous: &Digest256,
    payload: &[u8],
) -> (Vec<u8>, Digest256) {
    assert!(payload.len() <= MAX_PAYLOAD_BYTES as usize, "a manifest record outgrew its limit");
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&(kind as u32).to_le_bytes());
    header[12..16].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    header[16..24].copy_from_slice(&generation.to_le_bytes());
    header[24..56].copy_from_slice(previous);
    let digest = sha256(&[&header[..56], payload]);
    header[56..88].copy_from_slice(&digest);
    let sum = frame_sum(&header, payload);
    header[88..96].copy_from_slice(&sum);
    ([&header, payload].concat(), digest)
}

fn frame_sum(header: &[u8; HEADER_BYTES], payload: &[u8]) -> [u8; 8] {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    hasher.update(&header[..88]);
    hasher.update(payload);
    hasher.digest().to_le_bytes()
}

/// The record at `offset`, or why there is none.
///
/// # Errors
/// What does not fit, for people.
pub fn decode_record(log: &[u8], offset: usize) -> Result<Record<'_>, &'static str> {
    let header: Option<&[u8; HEADER_BYTES]> = log.get(offset..).and_then(<[u8]>::first_chunk);
    let header = header.ok_or("a record header is cut short")?;
    if header[..8] != MAGIC {
        return Err("a record does not begin with the magic bytes");
    }
    let payload_len = u32::from_le_bytes(header[12..16].try_into().expect("4 bytes"));
    if payload_len > MAX_PAYLOAD_BYTES {
        return Err("a record claims to be longer than the format allows");
    }
    let start = offset + HEADER_BYTES;
    let payload = log.get(start..start + payload_len as usize).ok_or("a record is cut short")?;
    if frame_sum(header, payload) != header[88..96] {
        return Err("a record does not match its sum");
    }
    let digest: Digest256 = header[56..88].try_into().expect("32 bytes");
    if sha256(&[&header[..56], payload]) != digest {
        return Err("a record does not match its digest");
    }
    let kind = match u32::from_le_bytes(header[8..12].try_into().expect("4 bytes")) {
        1 => Kind::State,
        2 => Kind::Commit,
        3 => Kind::Scores,
        4 => Kind::Upkeep,
        _ => return Err("a record has an unknown kind"),
    };
    Ok(Record {
        offset,
        kind,
        generation: u64::from_le_bytes(header[16..24].try_into().expect("8 bytes")),
        previous: header[24..56].try_into().expect("32 bytes"),
        digest,
        payload,
    })
}

/// A log, read as far as it is a chain.
#[derive(Debug)]
pub struct Chain<'a> {
    /// A state, then commits of samples or scores without gaps.
    pub records: Vec<Record<'a>>,
    /// Why the chain ends before the log does: offset and cause.
    pub broken: Option<(usize, &'static str)>,
    /// A whole record of a later generation after the break: where, and which.
    pub survivor: Option<(usize, u64)>,
}

/// Read a log as far as it is a chain that begins with the state of `first_generation`.
pub fn read_chain(log: &[u8], first_generation: u64) -> Chain<'_> {
    let mut records: Vec<Record<'_>> = Vec::new();
    let mut offset = 0;
    let mut broken = None;
    while offset < log.len() || records.is_empty() {
        let record = decode_record(log, offset).and_then(|record| {
            let fits = match records.last() {
                None => record.kind == Kind::State && record.generation == first_generation,
                Some(last) => {
                    record.kind != Kind::State
                        && record.generation == last.generation + 1
                        && record.previous == last.digest
                }
            };
            if fits { Ok(record) } else { Err("a record does not follow the one before") }
        });
        match record {
            Ok(record) => {
                offset = record.end();
                records.push(record);
            }
            Err(cause) => {
                broken = Some((offset, cause));
                break;
            }
        }
    }
    let newest = records.last().map(|r| r.generation);
    let survivor = broken.and_then(|(at, _)| {
        let rest = log.get(at + 1..).unwrap_or_default();
        rest.windows(MAGIC.len())
            .enumerate()
            .filter(|(_, window)| *window == MAGIC)
            .filter_map(|(i, _)| decode_record(log, at + 1 + i).ok())
            .find(|record| newest.is_none_or(|g| record.generation > g))
            .map(|record| (record.offset, record.generation))
    });
    Chain { records, broken, survivor }
}

/// The bytes of HEAD.
pub fn encode_head(generation: u64, digest: &Digest256) -> [u8; HEAD_BYTES] {
    let mut bytes = [0; HEAD_BYTES];
    bytes[..8].copy_from_slice(&HEAD_MAGIC);
    bytes[8..16].copy_from_slice(&generation.to_le_bytes());
    bytes[16..48].copy_from_slice(digest);
    let sum = sum64(&bytes[..56]);
    bytes[56..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// What HEAD says, if it says anything.
pub fn decode_head(bytes: &[u8]) -> Option<(u64, Digest256)> {
    let bytes: &[u8; HEAD_BYTES] = bytes.try_into().ok()?;
    let valid = bytes[..8] == HEAD_MAGIC && sum64(&bytes[..56]).to_le_bytes() == bytes[56..];
    valid.then(|| {
        let generation = u64::from_le_bytes(bytes[8..16].try_into().expect("8 bytes"));
        (generation, bytes[16..48].try_into().expect("32 bytes"))
    })
}

/// A file of one kind. Here alone is decided which names a manifest may list: whoever has a [`FileEntry`] that was
/// read can use its name as a path in the pool.
fn file_in<'de, D: Deserializer<'de>>(
    directory: &str,
    deserializer: D,
) -> Result<FileEntry, D::Error> {
    let file = FileEntry::deserialize(deserializer)?;
    let is_there = file.name.strip_prefix(directory).is_some_and(|name| name.starts_with('/'));
    if is_there && is_data_name(&file.name) {
        return Ok(file);
    }
    // Bounded, since a stranger chose it.
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

/// A segment and the append that made it, or the appends whose segments it took the place of.
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

/// An append whose samples lie in a segment with others.
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
    /// Those of them whose score is not NaN.
    pub scored: u64,
    /// Where the values lie if they came after their samples; else in the segment that begins at `first`.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "score_file")]
    pub file: Option<FileEntry>,
}

/// Where a run lies.
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
    /// What the ids in a file of its own are counted from.
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
    /// 1 for the first; each re-scoring counts up.
    pub version: u32,
    /// What made the scores if they came after their samples: one JSON object; else empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// By first id.
    pub extents: Vec<Arc<ExtentEntry>>,
    /// In the order in which they were made.
    pub runs: Vec<Arc<RunEntry>>,
}

/// Payload of a state record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// What the pool was created with.
    pub pool: PoolSettings,
    /// Hexadecimal digest of the last commit before this state, empty for generation 0.
    pub chain: String,
    /// The oldest generation that can be shown: where a fork began, or what a collection kept.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub oldest: u64,
    /// Interned sampling settings.
    pub sampling_settings: Vec<Arc<str>>,
    /// Appends whose samples were removed, those before the first segment, by first id.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub removed: Arc<Vec<AppendEntry>>,
    /// By first id.
    pub segments: Vec<Arc<SegmentEntry>>,
    /// By first prompt id.
    pub prompts: Vec<Arc<PromptEntry>>,
    /// In order of appearance.
    pub columns: Vec<ColumnState>,
    /// Columns that are being written and that nobody reads yet.
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
    /// More scores of a draft; the first of a name begins it.
    Draft {
        /// Name of the column that is to come.
        name: String,
        /// What makes the scores, the same in every change of one draft.
        source: String,
        /// Follows the draft's last extent.
        extent: ExtentEntry,
        /// Merges, one after another, after the extent's own run was added.
        merges: Vec<MergeEntry>,
    },
    /// The draft becomes the column: a new one, or the next version of the one that has its name.
    Publish {
        /// Name of the draft.
        name: String,
    },
    /// The draft is given up.
    Discard {
        /// Name of the draft.
        name: String,
    },
}

/// Payload of an upkeep record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Upkeep {
    /// Older snapshots are given up.
    GiveUp {
        /// The oldest generation that is kept.
        oldest: u64,
    },
    /// One segment takes the place of several.
    MergeSegments {
        /// Position of the first of them.
        start: usize,
        /// Position after the last.
        end: usize,
        /// Holds the same samples.
        segment: SegmentEntry,
        /// Of each column whose runs lay in these segments: the merges that make them lie elsewhere.
        columns: Vec<ColumnMerges>,
    },
    /// One prompt file takes the place of several.
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
        /// The first sample that stays, which is the first of an append.
        first: u64,
        /// What is left of the segment that it lies in, where that held older appends, too.
        segment: Option<SegmentEntry>,
        /// Of every column, in their order.
        columns: Vec<ColumnCut>,
        /// Of every draft, in their order.
        drafts: Vec<ColumnCut>,
    },
}

/// What is left of a column without its oldest samples.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ColumnCut {
    /// The column.
    pub name: String,
    /// What is left of the extent that the first sample lies in, where that began before it.
    pub extent: Option<ExtentEntry>,
    /// So many of the oldest runs go.
    pub runs: usize,
    /// What is left of the last of those, where it held samples that stay.
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
    /// Name of the column; one that is new comes after the others.
    pub name: String,
    /// Samples whose score is not NaN.
    pub scored: u64,
    /// Merges, one after another, after the append's own run was added.
    pub merges: Vec<MergeEntry>,
}

/// Runs `start .. end` of a column are replaced by one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeEntry {
    /// Position of the first run that goes.
    pub start: usize,
    /// Position after the last run that goes.
    pub end: usize,
    /// The run that comes to `start`.
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
    /// Files that the commit brings.
    pub fn files(&self) -> impl Iterator<Item = &FileEntry> {
        let prompts = self.prompts.iter().map(|prompts| &prompts.file);
        let runs = self.scores.iter().flat_map(|score| &score.merges).filter_map(merged_file);
        std::iter::once(&self.segment.file).chain(prompts).chain(runs)
    }
}

impl ScoreChange {
    /// Files that the change brings.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn log(payloads: &[&str]) -> Vec<u8> {
        let (mut bytes, mut digest) = encode_record(Kind::State, 5, &[0; 32], b"{}");
        for (i, payload) in payloads.iter().enumerate() {
            let (record, next) =
                encode_record(Kind::Commit, 6 + i as u64, &digest, payload.as_bytes());
            bytes.extend(record);
            digest = next;
        }
        bytes
    }

    #[test]
    fn a_log_reads_back() {
        let bytes = log(&["one", "two"]);
        let chain = read_chain(&bytes, 5);
        assert_eq!(chain.records.len(), 3);
        assert_eq!(chain.records[2].payload, b"two");
        assert!(chain.broken.is_none() && chain.survivor.is_none());
        assert!(read_chain(&bytes, 4).records.is_empty());
    }

    #[test]
    fn a_torn_tail_ends_the_chain_and_leaves_no_survivor() {
        let bytes = log(&["one", "two"]);
        let start = read_chain(&bytes, 5).records[2].offset;
        for len in start + 1..bytes.len() {
            let chain = read_chain(&bytes[..len], 5);
            assert_eq!(chain.records.len(), 2);
            assert_eq!(chain.broken.map(|b| b.0), Some(start));
            assert!(chain.survivor.is_none());
        }
    }

    #[test]
    fn every_flipped_byte_before_the_last_record_leaves_a_survivor() {
        let bytes = log(&["one", "two"]);
        let last = read_chain(&bytes, 5).records[2].offset;
        for at in 0..last {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            let chain = read_chain(&damaged, 5);
            assert!(chain.records.len() < 3 && chain.survivor.is_some(), "byte {at}");
        }
    }

    #[test]
    fn head_says_its_generation_or_nothing() {
        let bytes = encode_head(7, &[3; 32]);
        assert_eq!(decode_head(&bytes), Some((7, [3; 32])));
        for at in 0..HEAD_BYTES {
            let mut damaged = bytes;
            damaged[at] ^= 1;
            assert_eq!(decode_head(&damaged), None, "byte {at}");
        }
        assert_eq!(decode_head(&bytes[..63]), None);
    }
}
