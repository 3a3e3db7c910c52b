//! Merges small segments and prompt files into few large ones.
//!
//! This module chooses the files and concatenates their rows. `pool` writes and commits. Samples keep ids and values,
//! so reads and draws do not change. A compaction merges what it can. An append merges a few files where there are too
//! many. Rules: FORMAT.md, "A compaction" and "Small files".
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::ops::Range;

use crate::columns::{NumberArrays, column};
use crate::encoding::FileEntry;
use crate::error::Result;
use crate::format::{prompts_name, segment_name};
use crate::manifest::{PromptEntry, SegmentEntry};
use crate::memory::ensure;
use crate::parts::{Column, Extent, Run, RunLocation, Segment};
use crate::runs::sort_scores;
use crate::segment::{
    PromptRow, SegmentRows, Tokens, encode_prompts, encode_segment, prompt_column, text_position,
};
use crate::snapshot::Snapshot;

/// Size limit of a file: a merge holds all rows in memory, and Arrow's offsets are i32.
const MAX_BYTES: u64 = 1 << 30;
/// Size limit of a file that an append merges: the append waits for it.
const MAX_BYTES_OF_APPEND: u64 = 1 << 27;
/// Small files of a kind that a pool has at most after an append.
pub(crate) const MAX_SMALL_FILES: usize = 256;

/// The files that one step merges, as positions in the snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Group {
    /// Segments.
    Segments(Range<usize>),
    /// Prompt files.
    Prompts(Range<usize>),
}

/// The oldest files that are worth merging, with at most `max_rows` rows.
///
/// The largest file of a group at least doubles, so that a row is rewritten only a few times however often a pool is
/// compacted. The same snapshot gives the same group.
pub fn plan(snapshot: &Snapshot, max_rows: u64) -> Option<Group> {
    choose(&segments(snapshot), max_rows, MAX_BYTES)
        .map(Group::Segments)
        .or_else(|| choose(&prompt_files(snapshot), max_rows, MAX_BYTES).map(Group::Prompts))
}

/// The files that an append merges: none while there are at most `max_small` small ones of each kind.
///
/// The same snapshot gives the same group.
pub(crate) fn due(snapshot: &Snapshot, max_small: usize) -> Option<Group> {
    let are_too_many = |lengths: &mut dyn Iterator<Item = u64>| {
        lengths.filter(|&length| length <= MAX_BYTES_OF_APPEND / 2).nth(max_small).is_some()
    };
    if are_too_many(&mut snapshot.segments.iter().map(|segment| segment.entry.file.length))
        && let Some(range) = choose_few(&segments(snapshot), max_small)
    {
        return Some(Group::Segments(range));
    }
    if are_too_many(&mut snapshot.prompts.iter().map(|table| table.entry.file.length)) {
        return choose_few(&prompt_files(snapshot), max_small).map(Group::Prompts);
    }
    None
}

fn segments(snapshot: &Snapshot) -> Vec<Candidate<Vec<&str>>> {
    let segments = snapshot.segments.iter().map(|segment| Candidate {
        rows: segment.entry.count,
        bytes: segment.entry.file.length,
        like: placed_scores(snapshot, &segment.entry),
    });
    segments.collect()
}

fn prompt_files(snapshot: &Snapshot) -> Vec<Candidate<()>> {
    let prompts = snapshot.prompts.iter().map(|table| Candidate {
        rows: u64::from(table.entry.count),
        bytes: table.entry.file.length,
        like: (),
    });
    prompts.collect()
}

/// A candidate for a merge.
struct Candidate<L> {
    rows: u64,
    bytes: u64,
    /// Only files of the same kind are merged.
    like: L,
}

/// The oldest stretch of files that are alike, as long as the limits allow, with twice the rows of its largest file.
fn choose<L: PartialEq>(
    files: &[Candidate<L>],
    max_rows: u64,
    max_bytes: u64,
) -> Option<Range<usize>> {
    let mut start = 0;
    while start < files.len() {
        let (mut rows, mut bytes, mut largest, mut end) = (0, 0, 0, start);
        while let Some(file) = files.get(end)
            && file.like == files[start].like
            && rows + file.rows <= max_rows
            && bytes + file.bytes <= max_bytes
        {
            rows += file.rows;
            bytes += file.bytes;
            largest = largest.max(file.rows);
            end += 1;
        }
        if end > start + 1 && rows >= 2 * largest {
            return Some(start..end);
        }
        start += 1;
    }
    None
}

/// The oldest stretch of an eighth of `max_small` files that are alike and of similar size, so that a row goes through
/// few merges. A stretch of any length where there is none.
fn choose_few<L: PartialEq>(files: &[Candidate<L>], max_small: usize) -> Option<Range<usize>> {
    let num = (max_small / 8).max(2);
    let windows = files.windows(num).position(|window| {
        let rows: u64 = window.iter().map(|file| file.rows).sum();
        let bytes: u64 = window.iter().map(|file| file.bytes).sum();
        let largest = window.iter().map(|file| file.rows).max().unwrap_or(0);
        let are_alike = window.iter().all(|file| file.like == window[0].like);
        // The mean is at least half of the largest.
        are_alike && bytes <= MAX_BYTES_OF_APPEND && 2 * rows >= num as u64 * largest
    });
    windows.map(|start| start..start + num).or_else(|| choose(files, u64::MAX, MAX_BYTES_OF_APPEND))
}

/// The score columns that are still read from a segment. The others were re-scored into files of their own.
fn placed_scores<'a>(snapshot: &'a Snapshot, entry: &SegmentEntry) -> Vec<&'a str> {
    let is_read = |column: &&Column| {
        let at = column.extents.binary_search_by_key(&entry.first, Extent::first);
        at.is_ok_and(|i| column.extents[i].is_in_segment())
    };
    snapshot.columns.iter().filter(is_read).map(|column| column.name.as_str()).collect()
}

/// Encode one segment with the rows of several: its bytes and its entry for the manifest.
///
/// `first` is the first sample of an append in the first segment. Earlier samples are left out.
///
/// # Errors
/// `Corrupted`, `Io`, `Memory`.
pub fn merge_segments(
    snapshot: &Snapshot,
    range: Range<usize>,
    first: u64,
    generation: u64,
) -> Result<(Vec<u8>, SegmentEntry)> {
    let settings = &snapshot.context.settings;
    let segments = &snapshot.segments[range];
    let skipped = |segment: &Segment| first.saturating_sub(segment.entry.first) as usize;
    let rows = |segment: &Segment| skipped(segment)..segment.entry.count as usize;
    let count = segments.iter().map(|segment| rows(segment).len() as u64).sum();
    ensure_merge(segments.iter().map(|segment| segment.entry.file.length), count)?;
    let files = segments.iter().map(|s| s.open(&snapshot.context)).collect::<Result<Vec<_>>>()?;

    let (mut tokens, mut offsets, mut texts) = (Vec::new(), vec![0], Vec::new());
    for (file, segment) in files.iter().zip(segments) {
        for row in rows(segment) {
            let span = file.span(column::COMPLETION, row)?;
            Tokens::read(file, column::COMPLETION, settings.token_bytes, span)?
                .append_to(&mut tokens);
            offsets.push(tokens.len() as i32);
            if settings.store_text {
                texts.push(file.text(text_position(settings), row)?);
            }
        }
    }
    let mut scores = Vec::new();
    for name in placed_scores(snapshot, &segments[0].entry) {
        let column = snapshot.column(name)?;
        let mut values = Vec::with_capacity(count as usize);
        for segment in segments {
            let at = column.extents.partition_point(|e| e.first() < segment.entry.first);
            let extent = &column.extents[at];
            values.extend_from_slice(extent.scores(&snapshot.context, rows(segment))?);
        }
        let (order, _) = sort_scores(&values, first, settings.tie_seed);
        scores.push((name, values, order));
    }

    let parts: Vec<_> = files.iter().zip(segments).map(|(&file, s)| (file, rows(s))).collect();
    let rows = SegmentRows {
        tokens: &tokens,
        offsets,
        numbers: NumberArrays::read(&parts, settings)?,
        texts: settings.store_text.then_some(&texts),
        scores: scores.iter().map(|(n, v, order)| (*n, v.as_slice(), order.clone())).collect(),
    };
    let (bytes, file) = encode_segment(segment_name(first, generation), settings, rows);
    let appends = segments.iter().flat_map(|segment| segment.entry.appends());
    let mut appends = appends.skip_while(|(append, _)| append.first < first);
    let (earliest, _) = appends.next().expect("an append begins there");
    let entry = SegmentEntry {
        key: earliest.key,
        first,
        count,
        round: earliest.round,
        chunk: earliest.chunk,
        further: appends.map(|(append, _)| append).collect(),
        scores: scores.iter().map(|(name, ..)| (*name).to_owned()).collect(),
        file,
    };
    Ok((bytes, entry))
}

/// Encode one prompt file with the rows of several: its bytes and its entry for the manifest.
///
/// # Errors
/// `Corrupted`, `Io`, `Memory`.
pub fn merge_prompts(
    snapshot: &Snapshot,
    range: Range<usize>,
    generation: u64,
) -> Result<(Vec<u8>, PromptEntry)> {
    let settings = &snapshot.context.settings;
    let tables = &snapshot.prompts[range];
    let first = tables[0].entry.first;
    let count = tables.iter().map(|table| u64::from(table.entry.count)).sum();
    ensure_merge(tables.iter().map(|table| table.entry.file.length), count)?;
    let mut rows = Vec::new();
    for table in tables {
        let file = table.open(&snapshot.context)?;
        let hashes: &[[u8; 16]] = file.values(prompt_column::HASH, 0..file.rows())?;
        for (row, &hash) in hashes.iter().enumerate() {
            let prompt = first + rows.len() as u32;
            rows.push((
                snapshot.prompt_tokens(prompt)?.to_vec(),
                file.text(prompt_column::TEXT, row)?,
                file.text(prompt_column::METADATA, row)?,
                hash,
            ));
        }
    }
    let prompts: Vec<PromptRow<'_>> = rows
        .iter()
        .map(|(tokens, text, metadata, hash)| PromptRow { tokens, text, metadata, hash: *hash })
        .collect();
    let name = prompts_name(first, generation);
    let (bytes, file): (_, FileEntry) = encode_prompts(name, settings.token_bytes, &prompts);
    Ok((bytes, PromptEntry { first, count: prompts.len() as u32, file }))
}

/// Refuse a merge that does not fit into memory.
fn ensure_merge(lengths: impl Iterator<Item = u64>, rows: u64) -> Result<()> {
    let read: u64 = lengths.sum();
    // The input, the columns made from it, and the bytes of the new file.
    let bytes = 3 * u128::from(read) + u128::from(rows) * size_of::<PromptRow<'_>>() as u128;
    ensure(bytes, || format!("merging files of {read} bytes"))
}

/// The runs of a column that are stored in the segments that this one replaces.
///
/// They stay separate runs, in files of their own, because draws depend on the run of a sample and must not change.
pub fn runs_within(column: &Column, segment: &SegmentEntry) -> Vec<usize> {
    let ids = segment.first..segment.first + segment.count;
    let is_within = |run: &Run| {
        let RunLocation::Extent(extent) = &run.location else { return false };
        extent.is_in_segment() && ids.contains(&extent.first())
    };
    (0..column.runs.len()).filter(|&at| is_within(&column.runs[at])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(rows: &[u64], max_rows: u64) -> Option<Range<usize>> {
        let files: Vec<_> =
            rows.iter().map(|&rows| Candidate { rows, bytes: 0, like: () }).collect();
        choose(&files, max_rows, MAX_BYTES)
    }

    #[test]
    fn files_become_one_where_the_largest_at_least_doubles() {
        assert_eq!(chosen(&[1, 1], 10), Some(0..2));
        assert_eq!(chosen(&[5, 1, 1], 10), Some(1..3));
        assert_eq!(chosen(&[5, 1, 1, 3], 10), Some(0..4));
        assert_eq!(chosen(&[10, 4, 4, 4], 10), Some(1..3));
        assert_eq!(chosen(&[10, 20, 5], 10), None);
        assert_eq!(chosen(&[], 10), None);
    }

    #[test]
    fn a_row_is_written_anew_a_few_times_only() {
        let (mut files, mut written) = (Vec::new(), 0);
        for append in std::iter::repeat_n(1, 4096) {
            files.push(append);
            while let Some(range) = chosen(&files, 1 << 40) {
                let sum = files[range.clone()].iter().sum();
                written += sum;
                files.splice(range, [sum]);
            }
        }
        assert!(written <= 4096 * 13 && files.len() <= 13, "{written} rows, {files:?}");
    }

    /// Files after so many appends of these rows and bytes, and the rows that merges wrote.
    fn grown(appends: u64, bytes: u64, rows: impl Fn(u64) -> u64) -> (Vec<Candidate<()>>, u64) {
        let (mut files, mut written) = (Vec::new(), 0);
        for at in 0..appends {
            let rows = rows(at);
            files.push(Candidate { rows, bytes: bytes * rows, like: () });
            let is_small = |file: &&Candidate<()>| file.bytes <= MAX_BYTES_OF_APPEND / 2;
            while files.iter().filter(is_small).count() > MAX_SMALL_FILES
                && let Some(range) = choose_few(&files, MAX_SMALL_FILES)
            {
                let merged = files[range.clone()].iter();
                let (rows, bytes) = merged.fold((0, 0), |(r, b), f| (r + f.rows, b + f.bytes));
                written += rows;
                files.splice(range, [Candidate { rows, bytes, like: () }]);
            }
        }
        (files, written)
    }

    #[test]
    fn appends_leave_few_files_and_write_a_row_anew_a_few_times() {
        let few = MAX_SMALL_FILES;
        let (files, written) = grown(200_000, 90, |_| 100);
        assert!(files.len() <= few + 30, "{}", files.len());
        assert!(written <= 3 * 200_000 * 100, "{written}");
        // Sizes that differ by up to a thousandfold.
        let (files, written) = grown(20_000, 90, |at| 1 + at.wrapping_mul(0x9e37_79b9) % 1_000);
        assert!(files.len() <= few + 30, "{}", files.len());
        assert!(written <= 3 * 20_000 * 500, "{written}");
        // Growing and falling.
        for rows in [|at: u64| 1 + at % 4_000, |at: u64| 4_000 - at % 4_000] {
            let (files, written) = grown(12_000, 90, rows);
            assert!(files.len() <= few + 30, "{}", files.len());
            assert!(written <= 2 * 12_000 * 2_000, "{written}");
        }
        // Large files are left alone.
        let (files, written) = grown(400, 1, |_| MAX_BYTES_OF_APPEND / 2 + 1);
        assert_eq!((files.len(), written), (400, 0));
    }
}
