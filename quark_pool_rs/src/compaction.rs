//! Merges small segments and prompt files into few large ones.
//!
//! This module chooses the files and concatenates their rows. `pool` writes and commits. Samples keep ids and values,
//! so reads and draws do not change. Rules: FORMAT.md, "A compaction".
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
use crate::parts::{Column, Extent, Run, RunPlace, Segment};
use crate::runs::sort_scores;
use crate::segment::{
    PromptRow, SegmentRows, Tokens, encode_prompts, encode_segment, prompt_column, text_position,
};
use crate::snapshot::Snapshot;

/// Size limit of a file: a merge holds all rows in memory, and Arrow's offsets are i32.
const MAX_BYTES: u64 = 1 << 30;

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
    let segments = snapshot.segments.iter().map(|segment| Candidate {
        rows: segment.entry.count,
        bytes: segment.entry.file.length,
        like: placed_scores(snapshot, &segment.entry),
    });
    let prompts = snapshot.prompts.iter().map(|table| Candidate {
        rows: u64::from(table.entry.count),
        bytes: table.entry.file.length,
        like: (),
    });
    choose(&segments.collect::<Vec<_>>(), max_rows)
        .map(Group::Segments)
        .or_else(|| choose(&prompts.collect::<Vec<_>>(), max_rows).map(Group::Prompts))
}

/// A candidate for a merge.
struct Candidate<L> {
    rows: u64,
    bytes: u64,
    /// Only files of the same kind are merged.
    like: L,
}

fn choose<L: PartialEq>(files: &[Candidate<L>], max_rows: u64) -> Option<Range<usize>> {
    let mut start = 0;
    while start < files.len() {
        let (mut rows, mut bytes, mut largest, mut end) = (0, 0, 0, start);
        while let Some(file) = files.get(end)
            && file.like == files[start].like
            && rows + file.rows <= max_rows
            && bytes + file.bytes <= MAX_BYTES
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
    let settings = &snapshot.home.settings;
    let segments = &snapshot.segments[range];
    let skipped = |segment: &Segment| first.saturating_sub(segment.entry.first) as usize;
    let rows = |segment: &Segment| skipped(segment)..segment.entry.count as usize;
    let count = segments.iter().map(|segment| rows(segment).len() as u64).sum();
    ensure_merge(segments.iter().map(|segment| segment.entry.file.length), count)?;
    let files = segments.iter().map(|s| s.open(&snapshot.home)).collect::<Result<Vec<_>>>()?;

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
            values.extend_from_slice(extent.scores(&snapshot.home, rows(segment))?);
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
    let settings = &snapshot.home.settings;
    let tables = &snapshot.prompts[range];
    let first = tables[0].entry.first;
    let count = tables.iter().map(|table| u64::from(table.entry.count)).sum();
    ensure_merge(tables.iter().map(|table| table.entry.file.length), count)?;
    let mut rows = Vec::new();
    for table in tables {
        let file = table.open(&snapshot.home)?;
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
        let RunPlace::Extent(extent) = &run.place else { return false };
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
        choose(&files, max_rows)
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
}
