//! Reads every byte of a pool and reports all damage.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use crate::columns::column;
use crate::datafile::DataFile;
use crate::encoding::{ColumnSpec, FileEntry};
use crate::error::{PoolError, Result};
use crate::format::{
    HEAD, LOCK, MANIFEST_DIR, PROMPT_DIR, PoolSettings, RUN_DIR, SCORE_DIR, SEGMENT_DIR, log_name,
};
use crate::log::{Chain, Kind, Record, decode_head, read_chain};
use crate::manifest::{
    ColumnCut, ColumnState, Commit, ExtentEntry, MergeEntry, PromptEntry, RunEntry, RunSource,
    ScoreChange, SegmentEntry, State, Upkeep,
};
use crate::parts::{Column, PromptTable, RunLocation, Segment};
use crate::recovery::{log_starts, read_settled, recover};
use crate::runs::{OwnRun, merge_runs, score_key, tie_hash};
use crate::segment::{
    Tokens, prompt_column, prompt_columns, run_columns, score_columns, segment_columns,
    text_position,
};
use crate::snapshot::Snapshot;
use crate::storage::Storage;

/// Result of an offline check.
#[derive(Debug)]
pub struct Report {
    /// Newest generation, if the pool opens.
    pub generation: Option<u64>,
    /// Number of samples, without removed ones.
    pub num_samples: u64,
    /// Files that were read, logs included.
    pub num_files: u64,
    /// Bytes that were read.
    pub num_bytes: u64,
    /// All problems found.
    pub problems: Vec<PoolError>,
}

/// Check a pool without changing it.
///
/// # Errors
/// `NotFound` if there is no pool, `Io` if that could not be determined. All else is in the report.
pub fn verify(storage: &Arc<dyn Storage>) -> Result<Report> {
    let is_sound =
        |report: &Result<Report>| report.as_ref().is_ok_and(|report| report.problems.is_empty());
    read_settled(&**storage, || verify_once(storage), is_sound)
}

fn verify_once(storage: &Arc<dyn Storage>) -> Result<Report> {
    let mut report = Report {
        generation: None,
        num_samples: 0,
        num_files: 0,
        num_bytes: 0,
        problems: Vec::new(),
    };
    check_places(&**storage, &mut report)?;
    let recovered = recover(storage, None);
    let oldest = recovered.as_ref().map_or(0, |(snapshot, _)| snapshot.oldest);
    let mut superseded = match check_logs(&**storage, oldest, &mut report) {
        // Already reported above.
        Err(PoolError::Corrupted { .. }) => Vec::new(),
        result => result?,
    };
    let snapshot = match recovered {
        Ok((snapshot, _)) => snapshot,
        Err(error @ PoolError::NotFound { .. }) if report.problems.is_empty() => return Err(error),
        Err(error) => {
            report.problems.push(error);
            return Ok(report);
        }
    };
    match recover(storage, Some(oldest)) {
        Ok((first, _)) => {
            collect_state(&first.to_state(), &mut superseded);
        }
        // Expired meanwhile, so it is not needed.
        Err(PoolError::UnknownSnapshot { .. }) => {}
        Err(error) => report.problems.push(error),
    }
    superseded.sort_by(|a, b| a.0.name.cmp(&b.0.name));
    superseded.dedup_by(|a, b| a.0.name == b.0.name);
    report.generation = Some(snapshot.generation);
    report.num_samples = snapshot.num_samples - snapshot.num_removed;
    for table in &snapshot.prompts {
        check_prompts(&snapshot, table, &mut report);
    }
    for segment in &snapshot.segments {
        check_segment(&snapshot, segment, &mut report);
    }
    let mut live: HashSet<String> = HashSet::new();
    live.extend(snapshot.prompts.iter().map(|table| table.entry.file.name.clone()));
    live.extend(snapshot.segments.iter().map(|segment| segment.entry.file.name.clone()));
    for column in snapshot.columns.iter().chain(&snapshot.drafts) {
        check_scores(&snapshot, column, &mut live, &mut report);
        check_runs(&snapshot, column, &mut live, &mut report);
    }
    for (file, rows, columns) in superseded {
        if live.insert(file.name.clone()) {
            count(&file, &mut report);
            match DataFile::open(snapshot.storage(), &file, &columns, rows) {
                Ok(file) => file.check_all(|error| report.problems.push(error)),
                Err(error) => report.problems.push(error),
            }
        }
    }
    // A block may be needed by more than one check.
    let mut said = HashSet::new();
    report.problems.retain(|problem| said.insert(problem.to_string()));
    Ok(report)
}

fn count(file: &FileEntry, report: &mut Report) {
    report.num_files += 1;
    report.num_bytes += file.length;
}

/// Check that a pool's directories and its two files that are written in place are what they should be.
fn check_places(storage: &dyn Storage, report: &mut Report) -> Result<()> {
    let io = |action, path| PoolError::io(action, storage.locate(path));
    for directory in [MANIFEST_DIR, SEGMENT_DIR, PROMPT_DIR, RUN_DIR, SCORE_DIR].map(Path::new) {
        match storage.list(directory).map_err(io("list", directory)) {
            Ok(_) => {}
            // An interrupted creation may lack some.
            Err(PoolError::Io { source, .. })
                if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
            Err(problem @ PoolError::Corrupted { .. }) => report.problems.push(problem),
            Err(error) => return Err(error),
        }
    }
    for file in [HEAD, LOCK] {
        let path = Path::new(file);
        match storage.read(path).map_err(io("read", path)) {
            Ok(bytes) if file == HEAD && decode_head(&bytes).is_none() => {
                let what = "it does not match its sum";
                report.problems.push(PoolError::corrupted(HEAD, 0, what));
            }
            Err(PoolError::Io { source, .. })
                if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
            Ok(_) => {}
            Err(problem) => report.problems.push(problem),
        }
    }
    Ok(())
}

/// A file that a record names, its rows and its columns.
type Named = (FileEntry, u64, Vec<ColumnSpec>);

/// Every record of every log that a snapshot needs; returns all merged runs and files of scores that they name.
fn check_logs(storage: &dyn Storage, oldest: u64, report: &mut Report) -> Result<Vec<Named>> {
    let mut starts = log_starts(storage)?;
    // Older logs are left over from an unfinished collection.
    starts.drain(..starts.partition_point(|&first| first <= oldest).saturating_sub(1));
    let mut named = Vec::new();
    let mut previous: Option<(u64, [u8; 32])> = None;
    for (i, &first) in starts.iter().enumerate() {
        let name = log_name(first);
        let path = Path::new(&name);
        let bytes = match storage.read(path) {
            Ok(bytes) => bytes,
            Err(error) => {
                report.problems.push(PoolError::io("read", storage.locate(path))(error));
                continue;
            }
        };
        report.num_files += 1;
        report.num_bytes += bytes.len() as u64;
        let chain = read_chain(&bytes, first);
        collect_named(&chain, &name, oldest, &mut named, report);
        let is_newest = i + 1 == starts.len();
        if let Some((offset, what)) = chain.broken
            && (!is_newest || chain.survivor.is_some())
        {
            report.problems.push(PoolError::corrupted(&name, offset as u64, what));
        }
        let Some(state) = chain.records.first() else { continue };
        let follows = match previous {
            None => first <= oldest,
            Some((generation, digest)) => first == generation && state.previous == digest,
        };
        if !follows {
            let what = "its first state does not continue the log before it";
            report.problems.push(PoolError::corrupted(&name, 0, what));
        }
        previous = chain.records.last().map(|last| {
            let repeats = last.kind == Kind::State && last.generation > 0;
            (last.generation, if repeats { last.previous } else { last.digest })
        });
    }
    Ok(named)
}

fn named_segment(entry: &SegmentEntry, settings: &PoolSettings) -> Named {
    let columns = segment_columns(settings, &entry.scores, entry.count);
    (entry.file.clone(), entry.count, columns)
}

fn named_prompts(entry: &PromptEntry, settings: &PoolSettings) -> Named {
    (entry.file.clone(), u64::from(entry.count), prompt_columns(settings.token_bytes))
}

fn collect_state(state: &State, named: &mut Vec<Named>) {
    named.extend(state.segments.iter().map(|segment| named_segment(segment, &state.pool)));
    named.extend(state.prompts.iter().map(|prompts| named_prompts(prompts, &state.pool)));
    for column in state.columns.iter().chain(&state.drafts) {
        collect_column(column, &state.pool, named);
    }
}

fn collect_named(
    chain: &Chain<'_>,
    log: &str,
    oldest: u64,
    named: &mut Vec<Named>,
    report: &mut Report,
) {
    let mut settings = None;
    for (at, record) in chain.records.iter().enumerate() {
        // Every log begins with a state, which has the pool's settings.
        if at > 0 && record.generation <= oldest {
            continue;
        }
        let is_needed = record.generation > oldest;
        if let Err(source) = collect_record(record, is_needed, &mut settings, named) {
            let kind = if record.kind == Kind::State { "state" } else { "commit" };
            let what = format!("a {kind} does not parse: {source}");
            report.problems.push(PoolError::corrupted(log, record.offset as u64, what));
        }
    }
}

fn collect_record(
    record: &Record<'_>,
    is_needed: bool,
    of_log: &mut Option<PoolSettings>,
    named: &mut Vec<Named>,
) -> serde_json::Result<()> {
    if record.kind == Kind::State {
        let state: State = serde_json::from_slice(record.payload)?;
        if is_needed {
            collect_state(&state, named);
        }
        *of_log = Some(state.pool);
        return Ok(());
    }
    let Some(settings) = of_log else { return Ok(()) };
    match record.kind {
        Kind::State => {}
        Kind::Commit => {
            let commit: Commit = serde_json::from_slice(record.payload)?;
            named.push(named_segment(&commit.segment, settings));
            named.extend(commit.prompts.iter().map(|p| named_prompts(p, settings)));
            for score in &commit.scores {
                collect_merges(&score.merges, settings, named);
            }
        }
        Kind::Upkeep => match serde_json::from_slice(record.payload)? {
            Upkeep::MergeSegments { segment, columns, .. } => {
                named.push(named_segment(&segment, settings));
                for column in &columns {
                    collect_merges(&column.merges, settings, named);
                }
            }
            Upkeep::MergePrompts { prompts, .. } => named.push(named_prompts(&prompts, settings)),
            Upkeep::Retain { segment, columns, drafts, .. } => {
                named.extend(segment.iter().map(|segment| named_segment(segment, settings)));
                for ColumnCut { extent, run, .. } in columns.into_iter().chain(drafts) {
                    if let Some(extent) = extent {
                        collect_extent(&extent, settings, named);
                    }
                    if let Some(run) = run {
                        collect_run(&run, settings, named);
                    }
                }
            }
            Upkeep::GiveUp { .. } => {}
        },
        Kind::Scores => match serde_json::from_slice(record.payload)? {
            ScoreChange::Draft { extent, merges, .. } => {
                collect_extent(&extent, settings, named);
                collect_merges(&merges, settings, named);
            }
            ScoreChange::Publish { .. } | ScoreChange::Discard { .. } => {}
        },
    }
    Ok(())
}

fn collect_column(column: &ColumnState, settings: &PoolSettings, named: &mut Vec<Named>) {
    for run in &column.runs {
        collect_run(run, settings, named);
    }
    for extent in &column.extents {
        collect_extent(extent, settings, named);
    }
}

fn collect_extent(extent: &ExtentEntry, settings: &PoolSettings, named: &mut Vec<Named>) {
    if let Some(file) = &extent.file {
        named.push((file.clone(), extent.count, score_columns(settings, extent.count)));
    }
}

fn collect_run(run: &RunEntry, settings: &PoolSettings, named: &mut Vec<Named>) {
    if let RunSource::File(file) = &run.source {
        named.push((file.clone(), run.entries, run_columns(settings)));
    }
}

fn collect_merges(merges: &[MergeEntry], settings: &PoolSettings, named: &mut Vec<Named>) {
    for merge in merges {
        collect_run(&merge.run, settings, named);
    }
}

fn check_prompts(snapshot: &Snapshot, table: &PromptTable, report: &mut Report) {
    count(&table.entry.file, report);
    let problems = &mut report.problems;
    let file = match table.open(&snapshot.context) {
        Ok(file) => file,
        Err(error) => return problems.push(error),
    };
    let before = problems.len();
    file.check_all(|error| problems.push(error));
    if problems.len() > before {
        return;
    }
    for row in 0..file.rows() {
        let result = file.span(prompt_column::TOKENS, row).and_then(|span| {
            file.text(prompt_column::TEXT, row)?;
            file.text(prompt_column::METADATA, row)?;
            check_tokens(snapshot, file, prompt_column::TOKENS, span)
        });
        if let Err(error) = result {
            return problems.push(error);
        }
    }
}

fn check_tokens(
    snapshot: &Snapshot,
    file: &DataFile,
    column: usize,
    span: std::ops::Range<usize>,
) -> Result<()> {
    let settings = &snapshot.context.settings;
    let tokens = Tokens::read(file, column, settings.token_bytes, span)?.to_vec();
    match tokens.into_iter().find(|&id| id >= settings.vocab_size) {
        None => Ok(()),
        Some(id) => Err(PoolError::corrupted(
            file.name(),
            0,
            format!("token id {id} is outside the vocabulary of {}", settings.vocab_size),
        )),
    }
}

fn check_segment(snapshot: &Snapshot, segment: &Segment, report: &mut Report) {
    count(&segment.entry.file, report);
    let problems = &mut report.problems;
    let file = match segment.open(&snapshot.context) {
        Ok(file) => file,
        Err(error) => return problems.push(error),
    };
    let before = problems.len();
    file.check_all(|error| problems.push(error));
    if problems.len() > before {
        return;
    }
    for row in 0..file.rows() {
        let result = file.span(column::COMPLETION, row).and_then(|span| {
            check_tokens(snapshot, file, column::COMPLETION, span)?;
            if snapshot.context.settings.store_text {
                file.text(text_position(&snapshot.context.settings), row)?;
            }
            snapshot.locate_prompt(file.value(column::PROMPT, row)?)?;
            let settings: u32 = file.value(column::SETTINGS, row)?;
            if settings as usize >= snapshot.sampling_settings.len() {
                let what = format!("row {row} names sampling settings {settings}");
                return Err(PoolError::corrupted(file.name(), 0, what));
            }
            Ok(())
        });
        if let Err(error) = result {
            return problems.push(error);
        }
    }
}

/// The files with scores that were added after their samples.
fn check_scores(
    snapshot: &Snapshot,
    column: &Column,
    live: &mut HashSet<String>,
    report: &mut Report,
) {
    for extent in &column.extents {
        if let (Some(entry), Some(file)) = (&extent.entry.file, extent.own_file(&snapshot.context))
        {
            live.insert(entry.name.clone());
            count(entry, report);
            match file {
                Ok(file) => file.check_all(|error| report.problems.push(error)),
                Err(error) => report.problems.push(error),
            }
            let result = check_order(snapshot, extent, extent.entry.scored as usize);
            report.problems.extend(result.err());
        }
    }
}

fn check_runs(
    snapshot: &Snapshot,
    column: &Column,
    live: &mut HashSet<String>,
    report: &mut Report,
) {
    for run in &column.runs {
        let result = match &run.location {
            RunLocation::Extent(extent) => {
                check_order(snapshot, extent, run.entry.entries as usize)
            }
            RunLocation::Merged(file) => {
                live.insert(file.entry.name.clone());
                count(&file.entry, report);
                run.open_merged(&snapshot.context, file).and_then(|file| {
                    file.check_all(|error| report.problems.push(error));
                    check_merged(
                        snapshot,
                        column,
                        file.name(),
                        &merge_runs(snapshot, std::slice::from_ref(run), OwnRun::NONE)?,
                    )
                })
            }
        };
        if let Err(error) = result {
            report.problems.push(error);
        }
    }
}

fn check_order(snapshot: &Snapshot, extent: &crate::parts::Extent, scored: usize) -> Result<()> {
    let context = &snapshot.context;
    let order = extent.order(context, 0..extent.count())?;
    let scores = extent.scores(context, 0..extent.count())?;
    let wrong = |what: String| Err(PoolError::corrupted(extent.file_name(), 0, what));
    let mut last = None;
    for (at, &row) in order.iter().enumerate() {
        let Some(&score) = scores.get(row as usize) else {
            return wrong(format!("an order names row {row}"));
        };
        if score.is_nan() != (at >= scored) {
            return wrong(format!(
                "rank {at} of an order is on the wrong side of its {scored} scores"
            ));
        }
        let tie_seed = context.settings.tie_seed;
        let hash = tie_hash(tie_seed, extent.first() + u64::from(row));
        let rank = if score.is_nan() {
            (u32::MAX, 0, u64::from(row))
        } else {
            (!score_key(score), hash, u64::from(row))
        };
        if last.is_some_and(|last| last >= rank) {
            return wrong(format!("rank {at} of an order is not in order"));
        }
        last = Some(rank);
    }
    Ok(())
}

fn check_merged(
    snapshot: &Snapshot,
    column: &Column,
    file: &str,
    (keys, ids): &(Vec<u32>, Vec<u64>),
) -> Result<()> {
    let wrong = |what: String| Err(PoolError::corrupted(file, 0, what));
    let mut scores = vec![0.0; ids.len()];
    if ids.iter().any(|&id| snapshot.check_id(id).is_err()) {
        return wrong("a run names a sample that is not there".to_owned());
    }
    snapshot.scores_of(column, ids, &mut scores)?;
    let mut last = None;
    for (at, ((&key, &id), score)) in keys.iter().zip(ids).zip(scores).enumerate() {
        if score.is_nan() || score_key(score) != key {
            return wrong(format!("entry {at} of a run has not the score of sample {id}"));
        }
        let rank = (!key, tie_hash(snapshot.context.settings.tie_seed, id), id);
        if last.is_some_and(|last| last >= rank) {
            return wrong(format!("entry {at} of a run is not in order"));
        }
        last = Some(rank);
    }
    Ok(())
}
