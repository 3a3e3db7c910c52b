//! Writes commits: data files, then the record that lists them, each durable before the next.
//!
//! FORMAT.md proves that an append is atomic from the order of its steps. Do not change one without the other.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::path::Path;

use crate::batch::Batch;
use crate::checksum::Digest256;
use crate::columns::{Found, NumberArrays};
use crate::compaction::{Group, merge_prompts, merge_segments, runs_within};
use crate::encoding::FileEntry;
use crate::error::{PoolError, Result};
use crate::format::{
    HEAD, LOCK, MANIFEST_DIR, MAX_PAYLOAD_BYTES, MIN_LOG_BYTES, PROMPT_DIR, RUN_DIR, SCORE_DIR,
    SEGMENT_DIR, is_data_name, kept_scores_name, log_name, prompts_name, run_name, scores_name,
    segment_name,
};
use crate::interning::KnownPrompts;
use crate::log::{Kind, encode_head, encode_record};
use crate::manifest::{
    ColumnCut, ColumnMerges, Commit, CommitScore, ExtentEntry, MergeEntry, PromptEntry, RunEntry,
    RunSource, ScoreChange, SegmentEntry, Upkeep,
};
use crate::memory::ensure;
use crate::parts::{Column, RunLocation};
use crate::recovery::{LogEnd, copy_log};
use crate::runs::{OwnRun, merge_runs, plan_merge, sort_scores};
use crate::segment::{SegmentRows, encode_prompts, encode_run, encode_scores, encode_segment};
use crate::snapshot::Snapshot;
use crate::storage::{Lock, Output, Storage};

/// The holder of the lock, and the end of the log.
pub(crate) struct Writer {
    log: Box<dyn Output>,
    end: LogEnd,
    /// The content of the disk is unknown after a failed sync. The pool has to be reopened.
    pub(crate) is_poisoned: bool,
    /// Whether appends merge small files. Off after a merge has failed.
    pub(crate) merges_small_files: bool,
    /// Read at the first append.
    prompts: Option<KnownPrompts>,
    // Last, so that it is released after everything else.
    _lock: Box<dyn Lock>,
}

/// The result of an append: the commit, its digest, and hash and id of each new prompt.
pub(crate) type Published = (Commit, Digest256, Vec<([u8; 16], u32)>);

/// One commit in progress. Its new files are removed if it ends without being published.
pub(crate) struct Transaction<'a> {
    writer: &'a mut Writer,
    snapshot: &'a Snapshot,
    /// Names of the files that were written.
    files: Vec<String>,
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        // After a failed sync, a record on disk may name the files.
        if self.writer.is_poisoned || std::thread::panicking() {
            return;
        }
        for name in &self.files {
            // Files left behind are not listed, and are removed when the pool is next opened for writing.
            let _ = self.snapshot.storage().remove(Path::new(name));
        }
    }
}

impl Writer {
    /// A writer for a log that was recovered and cleaned up under the lock.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn new(storage: &dyn Storage, lock: Box<dyn Lock>, end: LogEnd) -> Result<Self> {
        let path = Path::new(&end.name);
        let log = storage.append(path).map_err(PoolError::io("open", storage.locate(path)))?;
        Ok(Self {
            log,
            end,
            is_poisoned: false,
            merges_small_files: true,
            prompts: None,
            _lock: lock,
        })
    }

    /// Remember prompts that were committed.
    pub(crate) fn learn(&mut self, new: Vec<([u8; 16], u32)>) {
        if let Some(prompts) = &mut self.prompts {
            prompts.add(new);
        }
    }

    /// Make the names of new files durable.
    fn sync_directories(&mut self, storage: &dyn Storage, directories: &[&str]) -> Result<()> {
        for directory in directories {
            let path = Path::new(directory);
            let synced = storage.sync_dir(path);
            self.poison_on_error(synced.map_err(PoolError::io("sync", storage.locate(path))))?;
        }
        Ok(())
    }

    fn poison_on_error<T>(&mut self, result: Result<T>) -> Result<T> {
        self.is_poisoned |= result.is_err();
        result
    }

    /// Append the record and sync it.
    fn publish(
        &mut self,
        storage: &dyn Storage,
        kind: Kind,
        generation: u64,
        payload: &[u8],
    ) -> Result<Digest256> {
        self.own_log(storage)?;
        let (record, digest) = encode_record(kind, generation, &self.end.digest, payload);
        let path = storage.locate(Path::new(&self.end.name));
        if let Err(error) = self.log.write_all(&record) {
            if self.log.truncate(self.end.valid_bytes).is_err() {
                self.is_poisoned = true;
            }
            return Err(PoolError::io("write", path)(error));
        }
        let synced = self.log.sync().map_err(PoolError::io("sync", path));
        self.poison_on_error(synced)?;
        self.end.valid_bytes += record.len() as u64;
        self.end.digest = digest;
        // HEAD is only a lower bound. The commit is durable without it.
        let _ = storage.overwrite(Path::new(HEAD), &encode_head(generation, &digest));
        Ok(digest)
    }

    /// Make sure that no copy of the pool shares the log. Otherwise a record written here would appear in the copy.
    fn own_log(&mut self, storage: &dyn Storage) -> Result<()> {
        let log = storage.locate(Path::new(&self.end.name));
        if !self.log.is_shared().map_err(PoolError::io("look at", log))? {
            return Ok(());
        }
        let copy = copy_log(storage, &self.end)?;
        let replaced = copy.replace(storage);
        self.log = self.poison_on_error(replaced)?;
        self.sync_directories(storage, &[MANIFEST_DIR])
    }

    /// Begin a new log if the old one takes longer to read than the state.
    fn begin_log_if_due(&mut self, snapshot: &Snapshot) -> Result<()> {
        if self.end.valid_bytes > MIN_LOG_BYTES.max(3 * self.end.state_bytes) {
            self.begin_log(snapshot)?;
        }
        Ok(())
    }

    pub(crate) fn begin_log(&mut self, snapshot: &Snapshot) -> Result<()> {
        let storage = snapshot.storage();
        let name = log_name(snapshot.generation);
        let path = Path::new(&name);
        let io = |action| PoolError::io(action, storage.locate(path));
        let payload = to_json(&snapshot.to_state())?;
        let (record, digest) =
            encode_record(Kind::State, snapshot.generation, &snapshot.digest, &payload);
        // Left over from an earlier attempt.
        let _ = storage.remove(path);
        let mut log = storage.create(path).map_err(io("create"))?;
        if let Err(error) = log.write_all(&record) {
            let _ = storage.remove(path);
            return Err(io("write")(error));
        }
        let synced = log.sync().map_err(io("sync"));
        self.poison_on_error(synced)?;
        let named = storage.sync_dir(Path::new(MANIFEST_DIR)).map_err(io("sync the directory of"));
        self.poison_on_error(named)?;
        self.log = log;
        self.end = LogEnd {
            name,
            valid_bytes: record.len() as u64,
            state_bytes: record.len() as u64,
            digest,
            is_acknowledged: true,
            stale_logs: Vec::new(),
        };
        Ok(())
    }
}

impl<'a> Transaction<'a> {
    /// A transaction on top of `snapshot`. Begins a new log first if one is due.
    ///
    /// # Errors
    /// As `Pool::append`.
    pub(crate) fn begin(writer: &'a mut Writer, snapshot: &'a Snapshot) -> Result<Self> {
        writer.begin_log_if_due(snapshot)?;
        Ok(Self::within_log(writer, snapshot))
    }

    /// A transaction in the current log.
    pub(crate) fn within_log(writer: &'a mut Writer, snapshot: &'a Snapshot) -> Self {
        Self { writer, snapshot, files: Vec::new() }
    }

    /// Commit: append the record and make it durable.
    ///
    /// # Errors
    /// As `Pool::append`.
    pub(crate) fn publish(
        mut self,
        kind: Kind,
        value: &impl serde::Serialize,
    ) -> Result<Digest256> {
        let payload = to_json(value)?;
        let generation = self.snapshot.generation + 1;
        let digest = self.writer.publish(self.snapshot.storage(), kind, generation, &payload)?;
        self.files.clear();
        Ok(digest)
    }

    /// Make the names of new files durable.
    fn sync_directories(&mut self, directories: &[&str]) -> Result<()> {
        self.writer.sync_directories(self.snapshot.storage(), directories)
    }

    /// Commit a batch.
    ///
    /// # Errors
    /// As `Pool::append`.
    pub(crate) fn append(mut self, batch: &Batch<'_>) -> Result<Published> {
        let snapshot = self.snapshot;
        let generation = snapshot.generation + 1;
        let settings = &snapshot.context.settings;
        let first = snapshot.num_samples;
        if first.checked_add(batch.prompt_index.len() as u64).is_none_or(|end| end > 1 << 62) {
            return Err(PoolError::invalid("the pool is full"));
        }
        // Memory for the columns, the bytes of the files, and the orders of the scores.
        ensure(3 * batch.num_bytes(), || {
            format!("an append of {} samples", batch.prompt_index.len())
        })?;

        // Prompts. Those that the pool already has keep their id.
        let known = match self.writer.prompts.take() {
            Some(known) => known,
            None => KnownPrompts::read(snapshot)?,
        };
        let (ids, new_prompts) = self.writer.prompts.insert(known).intern(snapshot, batch)?;
        let prompts = if new_prompts.is_empty() {
            None
        } else {
            let name = prompts_name(snapshot.num_prompts, generation);
            let (bytes, file) = encode_prompts(name, settings.token_bytes, &new_prompts);
            self.write_file(&file, &bytes)?;
            let count = new_prompts.len() as u32;
            Some(PromptEntry { first: snapshot.num_prompts, count, file })
        };

        // The segment, with the order of its scores.
        let known = snapshot.sampling_settings.iter().position(|s| **s == *batch.settings);
        let ranked: Vec<_> = batch
            .scores
            .iter()
            .map(|&(name, scores)| (name, scores, sort_scores(scores, first, settings.tie_seed)))
            .collect();
        let for_all = |value: u32| vec![value; batch.prompt_index.len()];
        let found = Found {
            prompt: batch.prompt_index.iter().map(|&i| ids[i as usize]).collect(),
            round: for_all(batch.round),
            chunk: for_all(batch.chunk),
            policy_step: for_all(batch.policy_step),
            settings: for_all(known.unwrap_or(snapshot.sampling_settings.len()) as u32),
        };
        let rows = SegmentRows {
            tokens: batch.completion_tokens,
            offsets: batch.completion_offsets.iter().map(|&at| at as i32).collect(),
            numbers: NumberArrays::new(found, &batch.given),
            texts: batch.completion_texts,
            scores: ranked.iter().map(|(n, s, (order, _))| (*n, *s, order.clone())).collect(),
        };
        let (bytes, file) = encode_segment(segment_name(first, generation), settings, rows);
        self.write_file(&file, &bytes)?;
        drop(bytes);

        // Runs. If a tier is full, its runs are merged into one run of the next tier.
        let mut scores = Vec::with_capacity(ranked.len());
        for (name, values, (order, scored)) in &ranked {
            let own = OwnRun { first, scores: values, order: &order[..*scored] };
            let number = snapshot.columns.iter().position(|c| c.name == *name);
            let merges = match number {
                Some(at) => self.merge_tiers(&snapshot.columns[at], at, own)?,
                None => Vec::new(),
            };
            let (name, scored) = ((*name).to_owned(), *scored as u64);
            scores.push(CommitScore { name, scored, merges });
        }

        // Names.
        let mut directories = vec![SEGMENT_DIR];
        directories.extend(prompts.is_some().then_some(PROMPT_DIR));
        directories.extend(scores.iter().any(|s| !s.merges.is_empty()).then_some(RUN_DIR));
        self.sync_directories(&directories)?;

        // The record.
        let commit = Commit {
            segment: SegmentEntry {
                key: batch.key.to_owned(),
                first,
                count: batch.prompt_index.len() as u64,
                round: batch.round,
                chunk: batch.chunk,
                further: Vec::new(),
                scores: batch.scores.iter().map(|(name, _)| (*name).to_owned()).collect(),
                file,
            },
            prompts,
            sampling_settings: match known {
                Some(_) => Vec::new(),
                None => vec![batch.settings.into()],
            },
            scores,
        };
        let digest = self.publish(Kind::Commit, &commit)?;
        let new_prompts = new_prompts.iter().zip(snapshot.num_prompts..);
        Ok((commit, digest, new_prompts.map(|(prompt, id)| (prompt.hash, id)).collect()))
    }

    /// Write the file that replaces a group, and the runs that lay in the group.
    pub(crate) fn write_group(&mut self, group: Group) -> Result<Upkeep> {
        let snapshot = self.snapshot;
        let generation = snapshot.generation + 1;
        match group {
            Group::Prompts(range) => {
                let (bytes, prompts) = merge_prompts(snapshot, range.clone(), generation)?;
                self.write_file(&prompts.file, &bytes)?;
                self.sync_directories(&[PROMPT_DIR])?;
                Ok(Upkeep::MergePrompts { start: range.start, end: range.end, prompts })
            }
            Group::Segments(range) => {
                let first = snapshot.segments[range.start].entry.first;
                let (bytes, segment) = merge_segments(snapshot, range.clone(), first, generation)?;
                self.write_file(&segment.file, &bytes)?;
                drop(bytes);
                let mut columns = Vec::new();
                for (number, column) in snapshot.columns.iter().enumerate() {
                    let mut merges = Vec::new();
                    for at in runs_within(column, &segment) {
                        let run = &column.runs[at..=at];
                        let first = run[0].first();
                        let (keys, ids) = merge_runs(snapshot, run, OwnRun::NONE)?;
                        // The position among the runs makes the name unique within its generation.
                        let name = run_name(number, at as u8, generation);
                        let level = run[0].entry.level;
                        let run = self.write_run(name, level, first, (keys, ids))?;
                        merges.push(MergeEntry { start: at, end: at + 1, run });
                    }
                    if !merges.is_empty() {
                        columns.push(ColumnMerges { name: column.name.clone(), merges });
                    }
                }
                let mut directories = vec![SEGMENT_DIR];
                directories.extend((!columns.is_empty()).then_some(RUN_DIR));
                self.sync_directories(&directories)?;
                Ok(Upkeep::MergeSegments { start: range.start, end: range.end, segment, columns })
            }
        }
    }

    /// Write the remaining rows of files that hold samples on both sides of `first`.
    pub(crate) fn write_retention(&mut self, first: u64) -> Result<Upkeep> {
        let snapshot = self.snapshot;
        let at = snapshot.segments.partition_point(|s| s.entry.first <= first) - 1;
        let mut segment = None;
        if snapshot.segments[at].entry.first < first {
            let generation = snapshot.generation + 1;
            let (bytes, entry) = merge_segments(snapshot, at..at + 1, first, generation)?;
            self.write_file(&entry.file, &bytes)?;
            segment = Some(entry);
        }
        let all = snapshot.columns.iter().chain(&snapshot.drafts).enumerate();
        let mut columns = all
            .map(|(number, column)| self.cut_column(column, number, first))
            .collect::<Result<Vec<_>>>()?;
        let drafts = columns.split_off(snapshot.columns.len());
        let is_in = |directory| self.files.iter().any(|name| name.starts_with(directory));
        let directories = [SEGMENT_DIR, SCORE_DIR, RUN_DIR].into_iter().filter(|d| is_in(*d));
        let directories: Vec<_> = directories.collect();
        self.sync_directories(&directories)?;
        let upkeep = Upkeep::Retain { first, segment, columns, drafts };
        // Applied before it becomes a record, because it relies on numbers in the manifest that may be wrong.
        let tried = snapshot.clone().apply_upkeep(upkeep.clone(), [0; 32]);
        tried.map_err(|what| PoolError::corrupted(MANIFEST_DIR, 0, what))?;
        Ok(upkeep)
    }

    /// Write the remaining rows of a column's extent and run that hold samples on both sides of `first`.
    ///
    /// Runs cover consecutive ranges of extents, so the counts show which ones are cut.
    fn cut_column(&mut self, column: &Column, number: usize, first: u64) -> Result<ColumnCut> {
        let snapshot = self.snapshot;
        let generation = snapshot.generation + 1;
        let gone = column.extents.partition_point(|extent| extent.end() <= first);
        let mut num_gone: u64 = column.extents[..gone].iter().map(|e| e.entry.scored).sum();
        let mut extent = None;
        if let Some(old) = column.extents.get(gone).filter(|old| old.first() < first) {
            let scores = old.scores(&snapshot.context, 0..old.count())?;
            let kept = &scores[(first - old.first()) as usize..];
            let (order, scored) = sort_scores(kept, first, snapshot.context.settings.tie_seed);
            num_gone += old.entry.scored - (scored as u64).min(old.entry.scored);
            let mut file = None;
            if !old.is_in_segment() {
                let name = kept_scores_name(first, number, generation);
                let (bytes, entry) = encode_scores(name, &snapshot.context.settings, kept, order);
                self.write_file(&entry, &bytes)?;
                file = Some(entry);
            }
            let count = kept.len() as u64;
            extent = Some(ExtentEntry { first, count, scored: scored as u64, file });
        }
        let (mut runs, mut before) = (0, 0);
        while let Some(run) = column.runs.get(runs)
            && before + run.entry.entries <= num_gone
        {
            before += run.entry.entries;
            runs += 1;
        }
        // Even if no score is removed, an order belongs to a different extent now.
        let is_cut = |location: &RunLocation| match location {
            RunLocation::Extent(extent) => extent.first() < first,
            RunLocation::Merged(_) => before < num_gone,
        };
        let mut run = None;
        if let Some(old) = column.runs.get(runs).filter(|run| is_cut(&run.location)) {
            let level = old.entry.level;
            run = Some(match old.location {
                RunLocation::Extent(_) => {
                    let entries = before + old.entry.entries - num_gone;
                    RunEntry { level, entries, first: 0, source: RunSource::Extent(first) }
                }
                RunLocation::Merged(_) => {
                    let (keys, ids) =
                        merge_runs(snapshot, &column.runs[runs..=runs], OwnRun::NONE)?;
                    let kept = keys.into_iter().zip(ids).filter(|&(_, id)| id >= first);
                    let name = run_name(number, level, generation);
                    self.write_run(name, level, first, kept.unzip())?
                }
            });
            runs += 1;
        }
        Ok(ColumnCut { name: column.name.clone(), extent, runs, run })
    }

    /// Write the file with a draft's next scores, and the runs that are due afterwards.
    pub(crate) fn write_scores(
        &mut self,
        name: &str,
        source: &str,
        first: u64,
        scores: &[f32],
    ) -> Result<ScoreChange> {
        let snapshot = self.snapshot;
        let generation = snapshot.generation + 1;
        let (order, scored) = sort_scores(scores, first, snapshot.context.settings.tie_seed);
        let ranked = order[..scored].to_vec();
        let settings = &snapshot.context.settings;
        let (bytes, file) = encode_scores(scores_name(first, generation), settings, scores, order);
        self.write_file(&file, &bytes)?;
        drop(bytes);
        let own = OwnRun { first, scores, order: &ranked };
        let number = snapshot.drafts.iter().position(|draft| draft.name == name);
        let merges = match number {
            // Only part of a file name. The generation makes the name unique.
            Some(at) => {
                let number = snapshot.columns.len() + at;
                self.merge_tiers(&snapshot.drafts[at], number, own)?
            }
            None => Vec::new(),
        };
        let mut directories = vec![SCORE_DIR];
        directories.extend((!merges.is_empty()).then_some(RUN_DIR));
        self.sync_directories(&directories)?;
        let extent = ExtentEntry {
            first,
            count: scores.len() as u64,
            scored: scored as u64,
            file: Some(file),
        };
        let (name, source) = (name.to_owned(), source.to_owned());
        Ok(ScoreChange::Draft { name, source, extent, merges })
    }

    /// Write the file of a merged run whose samples begin at `first`.
    fn write_run(
        &mut self,
        name: String,
        level: u8,
        first: u64,
        (keys, ids): (Vec<u32>, Vec<u64>),
    ) -> Result<RunEntry> {
        let snapshot = self.snapshot;
        let settings = &snapshot.context.settings;
        let first = if settings.has_compact_orders() { first } else { 0 };
        let entries = ids.len() as u64;
        let (bytes, file) = encode_run(name, settings, first, keys, ids);
        self.write_file(&file, &bytes)?;
        Ok(RunEntry { level, entries, first, source: RunSource::File(file) })
    }

    /// Write and sync a new data file.
    fn write_file(&mut self, entry: &FileEntry, bytes: &[u8]) -> Result<()> {
        if !is_data_name(&entry.name) {
            // A column number has four digits. Never commit a name that a reader would refuse.
            return Err(PoolError::invalid("the pool is full: it has 2^16 score columns"));
        }
        let path = Path::new(&entry.name);
        let storage = self.snapshot.storage();
        let io = |action| PoolError::io(action, storage.locate(path));
        let mut output = match storage.create(path) {
            // Left over from an append that failed and could not clean up.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                storage.remove(path).and_then(|()| storage.create(path))
            }
            result => result,
        }
        .map_err(io("create"))?;
        self.files.push(entry.name.clone());
        output.write_all(bytes).and_then(|()| output.seal()).map_err(io("write"))?;
        let synced = output.sync().map_err(io("sync"));
        self.writer.poison_on_error(synced)
    }

    /// If the new run fills a tier of a column, merge the tier into one run of the next tier.
    fn merge_tiers(
        &mut self,
        column: &Column,
        number: usize,
        own: OwnRun<'_>,
    ) -> Result<Vec<MergeEntry>> {
        let snapshot = self.snapshot;
        let scored = own.order.len() as u64;
        let mut merges = Vec::new();
        let runs = &column.runs;
        let mut levels: Vec<(u8, u64)> =
            runs.iter().map(|run| (run.entry.level, run.first())).collect();
        if scored == 0 {
            return Ok(merges);
        }
        levels.push((0, own.first));
        // Only the last step of a cascade is executed. It merges everything at once.
        let mut due = None;
        while let Some((range, level)) = plan_merge(&levels, own.end()) {
            let first = levels[range.start].1;
            levels.splice(range.clone(), [(level, first)]);
            due = Some((range.start, level, first));
        }
        if let Some((start, level, first)) = due {
            let (keys, ids) = merge_runs(snapshot, &runs[start..], own)?;
            let name = run_name(number, level, snapshot.generation + 1);
            let run = self.write_run(name, level, first, (keys, ids))?;
            merges.push(MergeEntry { start, end: runs.len() + 1, run });
        }
        Ok(merges)
    }
}

pub(crate) fn lock(storage: &dyn Storage, holder: &str) -> Result<Box<dyn Lock>> {
    let path = Path::new(LOCK);
    storage.lock(path, holder).map_err(|error| {
        if error.kind() == std::io::ErrorKind::WouldBlock {
            let holder = error.to_string();
            let holder = if holder.is_empty() { "by an unknown process".into() } else { holder };
            PoolError::Locked { holder }
        } else {
            PoolError::io("lock", storage.locate(path))(error)
        }
    })
}

/// The payload of a record.
///
/// # Errors
/// `Invalid` if the payload is too large for a record.
pub(crate) fn to_json(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    let payload = serde_json::to_vec(value)
        .expect("manifest values have string keys and no unserializable part");
    if payload.len() > MAX_PAYLOAD_BYTES as usize {
        return Err(PoolError::invalid(format!(
            "the pool is full: its manifest needs a record of {} bytes; at most 2^28 go into one",
            payload.len()
        )));
    }
    Ok(payload)
}
