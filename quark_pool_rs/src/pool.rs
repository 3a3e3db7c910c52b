//! The conductor: create, open, append.
//!
//! A [`Pool`] shows one [`Snapshot`] at a time and, if it is the writer, moves to the next one with every
//! append. The order of the steps of an append is the commit argument of FORMAT.md; do not change one
//! without the other.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::checksum::{Digest256, sum128};
use crate::compaction::{Group, merge_prompts, merge_segments, plan, runs_within};
use crate::datafile::FileEntry;
use crate::error::{PoolError, Result};
use crate::format::{
    HEAD, LOCK, MANIFEST_DIR, MAX_COLUMN_BYTES, MAX_KEY_BYTES, MIN_LOG_BYTES, PROMPT_DIR,
    PoolSettings, RUN_DIR, SCORE_DIR, SEGMENT_DIR, check_column_name, check_json_object,
    is_data_name, kept_scores_name, log_name, parse_log_name, prompts_name, run_name, scores_name,
    segment_name,
};
use crate::manifest::{
    ColumnCut, ColumnMerges, Commit, CommitScore, ExtentEntry, Kind, MergeEntry, PromptEntry,
    RunEntry, RunSource, ScoreChange, SegmentEntry, Upkeep, encode_head, encode_record,
};
use crate::processor::{self, Kernel};
use crate::ranking::{OwnRun, merge_runs, plan_merge, sort_scores};
use crate::recovery::{LogEnd, needed_since, recover, tidy};
use crate::retention::Limits;
use crate::segment::{
    PromptRow, SegmentRows, Tokens, encode_prompts, encode_run, encode_scores, encode_segment,
    prompt_column,
};
use crate::snapshot::{Column, Home, RunPlace, Snapshot};
use crate::storage::{Lock, Output, Storage};

/// N samples to append in one commit; all slices that say [N] have the same length.
#[derive(Debug, Clone)]
pub struct Batch<'a> {
    /// Idempotency key.
    pub key: &'a str,
    /// Token ids of the U prompts, one prompt after another.
    pub prompt_tokens: &'a [u32],
    /// [U + 1] where each prompt begins.
    pub prompt_offsets: &'a [i64],
    /// [U]
    pub prompt_texts: &'a [&'a str],
    /// [U] one JSON object each.
    pub prompt_metadata: &'a [&'a str],
    /// [N] index of each sample's prompt.
    pub prompt_index: &'a [u32],
    /// Token ids of the N completions, one completion after another.
    pub completion_tokens: &'a [u32],
    /// [N + 1] where each completion begins.
    pub completion_offsets: &'a [i64],
    /// [N] if the pool stores text.
    pub completion_texts: Option<&'a [&'a str]>,
    /// [N]
    pub finish: &'a [u8],
    /// For all samples.
    pub round: u32,
    /// For all samples.
    pub chunk: u32,
    /// For all samples.
    pub policy_step: u32,
    /// [N] -1 none.
    pub reward_tokens: &'a [i16],
    /// One JSON object for all samples.
    pub settings: &'a str,
    /// [N]
    pub seeds: &'a [u64],
    /// [N] NaN = not computed.
    pub logprob_policy: &'a [f32],
    /// [N] NaN = not computed.
    pub logprob_reference: &'a [f32],
    /// Name and [N] values, NaN = not scored.
    pub scores: &'a [(&'a str, &'a [f32])],
}

impl Batch<'_> {
    /// Refuse arrays that do not fit together, at the door.
    fn check(&self, settings: &PoolSettings) -> Result<()> {
        let refuse = |message: String| Err(PoolError::Invalid(message));
        let n = self.prompt_index.len();
        if self.key.is_empty() || self.key.len() > MAX_KEY_BYTES {
            return refuse(format!(
                "the key has {} bytes; a key has 1 to {MAX_KEY_BYTES}",
                self.key.len()
            ));
        }
        if n == 0 {
            return refuse("the batch has no samples".to_owned());
        }
        if n > 1 << 31 {
            return refuse(format!("the batch has {n} samples; at most 2^31 go into one append"));
        }
        let lengths = [
            ("completion_offsets", self.completion_offsets.len().wrapping_sub(1)),
            ("finish_reasons", self.finish.len()),
            ("reward_tokens", self.reward_tokens.len()),
            ("seeds", self.seeds.len()),
            ("logprob_policy", self.logprob_policy.len()),
            ("logprob_reference", self.logprob_reference.len()),
            ("completion_texts", self.completion_texts.map_or(n, <[_]>::len)),
        ];
        for (name, len) in lengths {
            if len != n {
                return refuse(format!("{name} is for {len} samples, prompt_index for {n}"));
            }
        }
        match (settings.store_text, self.completion_texts) {
            (true, None) => {
                return refuse("the pool stores text: completion_texts is missing".into());
            }
            (false, Some(_)) => {
                return refuse("the pool stores no text: completion_texts must be None".into());
            }
            _ => {}
        }

        let num_prompts = self.prompt_texts.len();
        if self.prompt_metadata.len() != num_prompts || self.prompt_offsets.len() != num_prompts + 1
        {
            return refuse(
                "texts, metadata and tokens are for different numbers of prompts".into(),
            );
        }
        if let Some((row, index)) =
            self.prompt_index.iter().enumerate().find(|&(_, &i)| i as usize >= num_prompts)
        {
            return refuse(format!(
                "prompt_index[{row}] is {index}, but there are {num_prompts} prompts"
            ));
        }
        check_offsets("prompt tokens", self.prompt_offsets, self.prompt_tokens.len())?;
        check_offsets("completion_offsets", self.completion_offsets, self.completion_tokens.len())?;
        check_tokens("prompt", self.prompt_tokens, settings.vocab_size)?;
        check_tokens("completion", self.completion_tokens, settings.vocab_size)?;
        let bytes = |texts: &[&str]| texts.iter().map(|t| t.len()).sum::<usize>();
        for (what, len) in [
            ("prompt texts", bytes(self.prompt_texts)),
            ("prompt metadata", bytes(self.prompt_metadata)),
            ("completion texts", self.completion_texts.map_or(0, bytes)),
        ] {
            if len > MAX_COLUMN_BYTES {
                return refuse(format!(
                    "{what} have {len} bytes; at most 2^31 - 1 go into one append"
                ));
            }
        }
        for metadata in self.prompt_metadata {
            // By far the most frequent value needs no parser.
            if *metadata != "{}" {
                check_json_object("a prompt's metadata", metadata)?;
            }
        }
        check_json_object("settings", self.settings)?;

        for (i, (name, values)) in self.scores.iter().enumerate() {
            check_column_name(name)?;
            if values.len() != n {
                return refuse(format!(
                    "score {name:?} has {} values for {n} samples",
                    values.len()
                ));
            }
            if self.scores[..i].iter().any(|(other, _)| other == name) {
                return refuse(format!("score {name:?} is given twice"));
            }
        }
        Ok(())
    }
}

fn check_offsets(what: &str, offsets: &[i64], len: usize) -> Result<()> {
    let fits = len <= MAX_COLUMN_BYTES
        && offsets.first() == Some(&0)
        && offsets.last() == Some(&(len as i64))
        && offsets.is_sorted();
    if fits {
        Ok(())
    } else {
        Err(PoolError::invalid(format!(
            "{what}: offsets begin at 0, never fall and end at the number of tokens, here {len} (at most 2^31 - 1)"
        )))
    }
}

/// The largest of some numbers; 0 of none.
struct Largest<'a>(&'a [u32]);

impl Kernel for Largest<'_> {
    type Output = u32;

    #[inline(always)]
    fn run(self) -> u32 {
        self.0.iter().fold(0, |largest, &number| largest.max(number))
    }
}

fn check_tokens(what: &str, tokens: &[u32], vocab_size: u32) -> Result<()> {
    // The largest is found many at a time; where the wrong one is matters only if there is one.
    if processor::run(Largest(tokens)) < vocab_size {
        return Ok(());
    }
    match tokens.iter().position(|&id| id >= vocab_size) {
        None => Ok(()),
        Some(at) => Err(PoolError::invalid(format!(
            "{what} token {at} has the id {}, outside the vocabulary of {vocab_size}",
            tokens[at]
        ))),
    }
}

/// How to open a pool.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenOptions<'a> {
    /// Take the writer's lock; the text says who holds it.
    pub writer: Option<&'a str>,
    /// Show this generation instead of the newest.
    pub snapshot: Option<u64>,
}

/// An open pool. Threads may share it: readers do not wait for each other, and only briefly for a commit.
pub struct Pool {
    storage: Arc<dyn Storage>,
    shown: RwLock<Shown>,
    writer: Mutex<Option<Writer>>,
    is_writable: bool,
}

struct Shown {
    snapshot: Arc<Snapshot>,
    /// Ids that were appended under each idempotency key.
    keys: HashMap<String, Range<u64>>,
}

struct Writer {
    log: Box<dyn Output>,
    end: LogEnd,
    is_poisoned: bool,
    /// Read at the first append that brings prompts.
    prompt_ids: Option<ByHash<u32>>,
    process: u32,
    // Last, so that it is released after everything else.
    _lock: Box<dyn Lock>,
}

impl Pool {
    /// Make an empty pool and open it for writing.
    ///
    /// # Errors
    /// `Exists` if anything but the remains of an unfinished creation is there, `Io`.
    pub fn create(
        storage: Arc<dyn Storage>,
        settings: &PoolSettings,
        holder: &str,
    ) -> Result<Self> {
        let root = Path::new("");
        let disk = &*storage;
        let io = |action, path: &str| PoolError::io(action, disk.locate(Path::new(path)));
        // What an unfinished creation leaves: samples are none of it, even where no log tells of them any more.
        let data = [SEGMENT_DIR, PROMPT_DIR, RUN_DIR, SCORE_DIR];
        let is_ours = |name: &str| [LOCK, MANIFEST_DIR].contains(&name) || data.contains(&name);
        let exists = || PoolError::Exists { path: disk.locate(root) };
        let has = |directory: &str, is_other: &dyn Fn(&str) -> bool| {
            let entries = disk.list(Path::new(directory)).unwrap_or_default();
            entries.iter().any(|entry| is_other(&entry.name))
        };
        if has("", &|name| !is_ours(name)) || data.iter().any(|directory| has(directory, &|_| true))
        {
            return Err(exists());
        }
        disk.create_dir(root).map_err(io("create", ""))?;
        let lock = lock(disk, holder)?;
        match recover(&storage, None) {
            Err(PoolError::NotFound { .. }) => {}
            Err(error) => return Err(error),
            Ok(_) => return Err(exists()),
        }
        for directory in [MANIFEST_DIR, SEGMENT_DIR, PROMPT_DIR, RUN_DIR, SCORE_DIR] {
            disk.create_dir(Path::new(directory)).map_err(io("create", directory))?;
        }
        let home = Arc::new(Home { storage: storage.clone(), settings: settings.clone() });
        let payload = to_json(&Snapshot::empty(home.clone(), [0; 32]).to_state());
        let (record, digest) = encode_record(Kind::State, 0, &[0; 32], &payload);
        let name = log_name(0);
        let path = Path::new(&name);
        let _ = disk.remove(path);
        let mut log = disk.create(path).map_err(io("create", &name))?;
        log.write_all(&record).map_err(io("write", &name))?;
        log.sync().map_err(io("sync", &name))?;
        // The pool is there when the name of its log is, so that name comes last.
        disk.sync_dir(root).map_err(io("sync", ""))?;
        disk.sync_parent().map_err(io("sync the directory of", ""))?;
        disk.sync_dir(Path::new(MANIFEST_DIR)).map_err(io("sync", MANIFEST_DIR))?;
        disk.overwrite(Path::new(HEAD), &encode_head(0, &digest)).map_err(io("write", HEAD))?;
        drop(log);
        drop(lock);
        Self::open(storage, OpenOptions { writer: Some(holder), snapshot: None })
    }

    /// Open a pool.
    ///
    /// # Errors
    /// `NotFound`, `Corrupted`, `Version`, `UnknownSnapshot`, `Locked`, `Io`; `Invalid` for a writer of
    /// an old snapshot.
    pub fn open(storage: Arc<dyn Storage>, options: OpenOptions<'_>) -> Result<Self> {
        if options.writer.is_some() && options.snapshot.is_some() {
            return Err(PoolError::invalid("an old snapshot can only be read, not written"));
        }
        // Decides whether there is a pool at all before a lock file is made.
        let (mut snapshot, _) = recover(&storage, options.snapshot)?;
        let mut writer = None;
        if let Some(holder) = options.writer {
            let lock = lock(&*storage, holder)?;
            let end;
            (snapshot, end) = recover(&storage, None)?;
            tidy(&*storage, &snapshot, &end)?;
            let path = Path::new(&end.name);
            let log = storage.append(path).map_err(PoolError::io("open", storage.locate(path)))?;
            writer = Some(Writer {
                log,
                end,
                is_poisoned: false,
                prompt_ids: None,
                process: std::process::id(),
                _lock: lock,
            });
        }
        Ok(Self {
            storage,
            is_writable: writer.is_some(),
            shown: RwLock::new(Shown::new(snapshot)),
            writer: Mutex::new(writer),
        })
    }

    /// What the handle sees.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shown.read().unwrap_or_else(PoisonError::into_inner).snapshot.clone()
    }

    /// Whether the handle was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.is_writable
    }

    /// Move a reader to the newest commit. A writer is always there.
    ///
    /// # Errors
    /// As [`Pool::open`].
    pub fn refresh(&self) -> Result<()> {
        if self.is_writable {
            return Ok(());
        }
        let (snapshot, _) = recover(&self.storage, None)?;
        snapshot.adopt_open_files(&self.snapshot());
        *self.shown.write().unwrap_or_else(PoisonError::into_inner) = Shown::new(snapshot);
        Ok(())
    }

    /// Ids that were appended under `key`, as far as the handle sees; retention may have removed them since.
    pub fn find(&self, key: &str) -> Option<Range<u64>> {
        let shown = self.shown.read().unwrap_or_else(PoisonError::into_inner);
        shown.keys.get(key).cloned()
    }

    /// Release the lock. Snapshots stay readable; appends are refused.
    pub fn close(&self) {
        *self.lock_writer() = None;
    }

    fn lock_writer(&self) -> MutexGuard<'_, Option<Writer>> {
        self.writer.lock().unwrap_or_else(|poison| {
            // A panic in the middle of an append leaves a state that nobody knows.
            let mut guard = poison.into_inner();
            if let Some(writer) = guard.as_mut() {
                writer.is_poisoned = true;
            }
            guard
        })
    }

    /// Commit `batch` and return its ids; when this returns, the samples survive a power cut.
    ///
    /// # Errors
    /// `Invalid`, `ReadOnly`, `Poisoned`, `Io`, and `Corrupted` if a run or prompt that is needed is.
    pub fn append(&self, batch: &Batch<'_>) -> Result<Range<u64>> {
        let mut guard = self.lock_writer();
        let writer = self.able_writer(&mut guard)?;
        let snapshot = self.snapshot();
        batch.check(&snapshot.home.settings)?;
        if let Some(ids) = self.find(batch.key) {
            return Ok(ids);
        }
        let (commit, digest, new_prompts) = writer.append(&snapshot, batch)?;
        let ids = commit.segment.first..commit.segment.first + commit.segment.count;
        drop(snapshot);

        let mut shown = self.shown.write().unwrap_or_else(PoisonError::into_inner);
        shown.keys.insert(batch.key.to_owned(), ids.clone());
        Arc::make_mut(&mut shown.snapshot)
            .apply(commit, digest)
            .expect("our own commit follows our own snapshot");
        if let Some(prompt_ids) = &mut writer.prompt_ids {
            for (hash, id) in new_prompts {
                prompt_ids.entry(hash).or_insert(id);
            }
        }
        Ok(ids)
    }
}

/// Scores of samples that are already there.
///
/// They go to a draft, chunk by chunk, each a durable commit; [`Pool::publish_scores`] makes the draft the
/// column in one more. Until then every reader sees the scores that were there before.
impl Pool {
    /// Ids below this have scores in the draft of a column; None where there is no draft.
    pub fn draft_end(&self, name: &str) -> Option<u64> {
        let snapshot = self.snapshot();
        let draft = snapshot.drafts.iter().find(|draft| draft.name == name)?;
        Some(snapshot.draft_end(Some(draft)))
    }

    /// Commit more scores of a draft: those of the samples from `first` on, where the draft ends.
    ///
    /// `source` says what makes the scores, as one JSON object; it is the same for all of a draft.
    ///
    /// # Errors
    /// As [`Pool::append`].
    pub fn draft_scores(&self, name: &str, source: &str, first: u64, scores: &[f32]) -> Result<()> {
        check_column_name(name)?;
        check_json_object("the source of the scores", source)?;
        self.change_scores(|writer, snapshot, files| {
            let draft = snapshot.drafts.iter().find(|draft| draft.name == name);
            if let Some(draft) = draft.filter(|draft| draft.source != source) {
                return Err(PoolError::invalid(format!(
                    "the unfinished scores {name:?} are made by {}: finish or discard them first",
                    draft.source
                )));
            }
            let end = snapshot.draft_end(draft);
            let (count, num_samples) = (scores.len() as u64, snapshot.num_samples);
            let is_inside =
                0 < count && count <= (1 << 31) && first <= num_samples && count <= num_samples - first;
            if first != end || !is_inside {
                return Err(PoolError::invalid(format!(
                    "{count} scores from sample {first} on: the draft of {name:?} goes on at {end}, and \
                     the pool has {num_samples} samples"
                )));
            }
            writer.write_scores(snapshot, name, source, first, scores, files)
        })
    }

    /// Make a complete draft the column of its name.
    ///
    /// # Errors
    /// As [`Pool::append`]; `Invalid` where the draft does not cover every sample.
    pub fn publish_scores(&self, name: &str) -> Result<()> {
        self.change_scores(|_, snapshot, _| {
            let draft = snapshot.drafts.iter().find(|draft| draft.name == name);
            let num_samples = snapshot.num_samples;
            if draft.map(Column::end) != Some(num_samples) {
                return Err(PoolError::invalid(format!(
                    "the draft of {name:?} covers {} of {num_samples} samples",
                    draft.map_or(0, Column::end)
                )));
            }
            Ok(ScoreChange::Publish { name: name.to_owned() })
        })
    }

    /// Give a draft up.
    ///
    /// # Errors
    /// As [`Pool::append`]; `Invalid` where there is no such draft.
    pub fn discard_scores(&self, name: &str) -> Result<()> {
        self.change_scores(|_, snapshot, _| {
            if !snapshot.drafts.iter().any(|draft| draft.name == name) {
                return Err(PoolError::invalid(format!("there is no draft of {name:?}")));
            }
            Ok(ScoreChange::Discard { name: name.to_owned() })
        })
    }

    fn change_scores(
        &self,
        write: impl FnOnce(&mut Writer, &Snapshot, &mut NewFiles<'_>) -> Result<ScoreChange>,
    ) -> Result<()> {
        let mut guard = self.lock_writer();
        let writer = self.able_writer(&mut guard)?;
        let snapshot = self.snapshot();
        writer.begin_log_if_due(&snapshot)?;
        let mut files = NewFiles { storage: snapshot.storage(), names: Vec::new() };
        let published = write(writer, &snapshot, &mut files).and_then(|change| {
            let generation = snapshot.generation + 1;
            let digest =
                writer.publish(files.storage, Kind::Scores, generation, &to_json(&change))?;
            Ok((change, digest))
        });
        if published.is_err() && !writer.is_poisoned {
            files.undo();
        }
        let (change, digest) = published?;
        drop(snapshot);
        let mut shown = self.shown.write().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut shown.snapshot)
            .apply_scores(change, digest)
            .expect("our own change follows our own snapshot");
        Ok(())
    }

    /// The writer, if it may write.
    fn able_writer<'w>(
        &self,
        guard: &'w mut MutexGuard<'_, Option<Writer>>,
    ) -> Result<&'w mut Writer> {
        let writer = guard.as_mut().ok_or_else(|| {
            PoolError::ReadOnly(if self.is_writable {
                "the pool is closed".to_owned()
            } else {
                "the pool was opened for reading: open it with writable=True".to_owned()
            })
        })?;
        if writer.process != std::process::id() {
            return Err(PoolError::Locked {
                holder: format!("by the process {} that this one was forked from", writer.process),
            });
        }
        if writer.is_poisoned {
            return Err(PoolError::Poisoned);
        }
        Ok(writer)
    }
}

/// What a collection removed, or would.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Collected {
    /// The oldest generation that can be shown now.
    pub oldest: u64,
    /// Files.
    pub files: u64,
    /// Their bytes; those that a fork or an open map still holds come back when that lets go.
    pub bytes: u64,
}

/// Upkeep: giving up old snapshots, and making one file of many.
impl Pool {
    /// Keep the newest `keep` snapshots, and remove the logs and data files that none of them needs.
    ///
    /// Giving up is a commit of its own, and counts among the kept ones. Where there are no more snapshots
    /// than that already, only leftovers are removed. With `dry_run` nothing is changed.
    ///
    /// # Errors
    /// As [`Pool::append`]; `Corrupted`, with nothing removed, where a log does not say what is needed.
    pub fn collect(&self, keep: u64, dry_run: bool) -> Result<Collected> {
        if keep == 0 {
            return Err(PoolError::invalid("keep is 0; the newest snapshot always stays"));
        }
        let mut guard = self.lock_writer();
        let writer = self.able_writer(&mut guard)?;
        let snapshot = self.snapshot();
        let newest = snapshot.generation;
        let is_due = newest - snapshot.oldest >= keep;
        let oldest = if is_due { newest + 2 - keep } else { snapshot.oldest };
        // Before anything changes: if a log cannot be read, all stays as it is. The commit to come shows
        // the files that the newest one does.
        needed_since(&self.storage, oldest.min(newest), newest)?;
        drop(snapshot);
        if is_due && !dry_run {
            self.give_up(writer, oldest)?;
        }
        let newest = self.snapshot().generation;
        let (mut starts, files) = needed_since(&self.storage, oldest.min(newest), newest)?;
        if oldest > newest {
            // A dry run: all logs would make room for a new one.
            starts.clear();
        }
        sweep(&*self.storage, &starts, &files, dry_run, oldest)
    }

    /// Say which snapshot is the oldest, durably, and begin a log that does without the others.
    fn give_up(&self, writer: &mut Writer, oldest: u64) -> Result<()> {
        self.keep_up(writer, Upkeep::GiveUp { oldest })?;
        writer.begin_log(&self.snapshot())
    }

    /// Commit upkeep.
    fn keep_up(&self, writer: &mut Writer, upkeep: Upkeep) -> Result<()> {
        let generation = self.snapshot().generation + 1;
        let payload = to_json(&upkeep);
        let digest = writer.publish(&*self.storage, Kind::Upkeep, generation, &payload)?;
        let mut shown = self.shown.write().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut shown.snapshot)
            .apply_upkeep(upkeep, digest)
            .expect("our own upkeep follows our own snapshot");
        Ok(())
    }

    /// Make one file of the oldest small ones, if there are any, in one commit; whether there were.
    ///
    /// Nothing that is read changes. Calling it until it returns false leaves few files; the ones that they
    /// took the place of stay for older snapshots until a collection.
    ///
    /// # Errors
    /// As [`Pool::append`]; `Corrupted` where a file that is to be read is.
    pub fn compact_once(&self, max_rows: u64) -> Result<bool> {
        let mut guard = self.lock_writer();
        let writer = self.able_writer(&mut guard)?;
        let snapshot = self.snapshot();
        let Some(group) = plan(&snapshot, max_rows) else { return Ok(false) };
        writer.begin_log_if_due(&snapshot)?;
        let mut files = NewFiles { storage: &*self.storage, names: Vec::new() };
        let result = writer
            .write_group(&snapshot, group, &mut files)
            .and_then(|upkeep| self.keep_up(writer, upkeep));
        if result.is_err() && !writer.is_poisoned {
            files.undo();
        }
        result.map(|()| true)
    }

    /// Remove the oldest appends, as many as the limits say, in one commit; the newest always stays.
    ///
    /// Older snapshots go on showing them, and their files stay until those are given up. With `dry_run`, or
    /// where nothing has to go, nothing is changed.
    ///
    /// # Errors
    /// As [`Pool::append`]; `Invalid` for limits that are none; `Corrupted` where a file that is to be read is.
    pub fn retain(&self, limits: &Limits, dry_run: bool) -> Result<Retained> {
        limits.check()?;
        let mut guard = self.lock_writer();
        let writer = self.able_writer(&mut guard)?;
        let snapshot = self.snapshot();
        let appends = snapshot.segments.iter().flat_map(|segment| segment.entry.appends());
        let appends: Vec<_> = appends.map(|(append, ids)| (ids, append.round)).collect();
        let num_gone = limits.num_gone(&appends);
        let first = appends.get(num_gone).map_or(snapshot.num_removed, |(ids, _)| ids.start);
        let samples = first - snapshot.num_removed;
        let retained = Retained { first, appends: num_gone as u64, samples };
        if dry_run || num_gone == 0 {
            return Ok(retained);
        }
        writer.begin_log_if_due(&snapshot)?;
        let mut files = NewFiles { storage: &*self.storage, names: Vec::new() };
        let result = writer
            .write_retention(&snapshot, first, &mut files)
            .and_then(|upkeep| self.keep_up(writer, upkeep));
        if result.is_err() && !writer.is_poisoned {
            files.undo();
        }
        result.map(|()| retained)
    }
}

/// What a retention removed, or would.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retained {
    /// The oldest sample that is left.
    pub first: u64,
    /// Appends that went.
    pub appends: u64,
    /// Their samples.
    pub samples: u64,
}

impl Shown {
    fn new(snapshot: Snapshot) -> Self {
        let keys = snapshot.appends().map(|(append, ids)| (append.key, ids)).collect();
        Self { snapshot: Arc::new(snapshot), keys }
    }
}

/// Remove all logs but `starts` and all data files but `files`. The snapshots that needed them are given up
/// durably, and what is interrupted here the next collection goes on with.
fn sweep(
    storage: &dyn Storage,
    starts: &[u64],
    files: &HashSet<String>,
    dry_run: bool,
    oldest: u64,
) -> Result<Collected> {
    let mut collected = Collected { oldest, files: 0, bytes: 0 };
    for directory in [MANIFEST_DIR, SEGMENT_DIR, PROMPT_DIR, RUN_DIR, SCORE_DIR] {
        let path = Path::new(directory);
        let before = collected.files;
        for entry in storage.list(path).map_err(PoolError::io("list", storage.locate(path)))? {
            let name = format!("{directory}/{}", entry.name);
            let is_garbage = entry.is_file
                && match parse_log_name(&entry.name) {
                    Some(start) if directory == MANIFEST_DIR => !starts.contains(&start),
                    _ => is_data_name(&name) && !files.contains(&name),
                };
            if !is_garbage {
                continue;
            }
            let file = Path::new(&name);
            let io = |action| PoolError::io(action, storage.locate(file));
            collected.bytes += storage.file_len(file).map_err(io("measure"))?;
            collected.files += 1;
            if !dry_run {
                storage.remove(file).map_err(io("remove"))?;
            }
        }
        if !dry_run && collected.files > before {
            storage.sync_dir(path).map_err(PoolError::io("sync", storage.locate(path)))?;
        }
    }
    Ok(collected)
}

fn lock(storage: &dyn Storage, holder: &str) -> Result<Box<dyn Lock>> {
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

fn to_json(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("manifest values have string keys and no unserializable part")
}

/// What an append published: the commit, its digest, and hash and id of each new prompt.
type Published = (Commit, Digest256, Vec<([u8; 16], u32)>);

/// Files of one append, to be removed again if a write fails.
struct NewFiles<'a> {
    storage: &'a dyn Storage,
    names: Vec<String>,
}

impl NewFiles<'_> {
    fn undo(&self) {
        for name in &self.names {
            // What stays is unlisted and goes when the pool is next opened for writing.
            let _ = self.storage.remove(Path::new(name));
        }
    }
}

impl Writer {
    fn append(&mut self, snapshot: &Snapshot, batch: &Batch<'_>) -> Result<Published> {
        self.begin_log_if_due(snapshot)?;
        let mut files = NewFiles { storage: snapshot.storage(), names: Vec::new() };
        let result = self.write_and_publish(snapshot, batch, &mut files);
        if result.is_err() && !self.is_poisoned {
            files.undo();
        }
        result
    }

    fn write_and_publish(
        &mut self,
        snapshot: &Snapshot,
        batch: &Batch<'_>,
        files: &mut NewFiles<'_>,
    ) -> Result<Published> {
        let generation = snapshot.generation + 1;
        let settings = &snapshot.home.settings;
        let first = snapshot.num_samples;
        if first.checked_add(batch.prompt_index.len() as u64).is_none_or(|end| end > 1 << 62) {
            return Err(PoolError::invalid("the pool is full"));
        }

        // Prompts: the ones that the pool has keep their id.
        let (ids, new_prompts) = self.intern_prompts(snapshot, batch)?;
        let prompts = if new_prompts.is_empty() {
            None
        } else {
            let name = prompts_name(snapshot.num_prompts, generation);
            let (bytes, file) = encode_prompts(name, settings.token_bytes, &new_prompts);
            self.write_file(files, &file, &bytes)?;
            let count = new_prompts.len() as u32;
            Some(PromptEntry { first: snapshot.num_prompts, count, file })
        };

        // The segment, with the order of its own scores.
        let known = snapshot.sampling_settings.iter().position(|s| **s == *batch.settings);
        let ranked: Vec<_> = batch
            .scores
            .iter()
            .map(|&(name, scores)| (name, scores, sort_scores(scores, first, settings.tie_seed)))
            .collect();
        let for_all = |value: u32| vec![value; batch.prompt_index.len()];
        let rows = SegmentRows {
            prompts: batch.prompt_index.iter().map(|&i| ids[i as usize]).collect(),
            tokens: batch.completion_tokens,
            offsets: batch.completion_offsets.iter().map(|&at| at as i32).collect(),
            finish: batch.finish,
            round: for_all(batch.round),
            chunk: for_all(batch.chunk),
            policy_step: for_all(batch.policy_step),
            reward_tokens: batch.reward_tokens,
            settings: for_all(known.unwrap_or(snapshot.sampling_settings.len()) as u32),
            seeds: batch.seeds,
            logprob_policy: batch.logprob_policy,
            logprob_reference: batch.logprob_reference,
            texts: batch.completion_texts,
            scores: ranked.iter().map(|(n, s, (order, _))| (*n, *s, order.clone())).collect(),
        };
        let (bytes, file) = encode_segment(segment_name(first, generation), settings, rows);
        self.write_file(files, &file, &bytes)?;
        drop(bytes);

        // Runs: where a tier is full, its runs become one of the next tier.
        let mut scores = Vec::with_capacity(ranked.len());
        for (name, values, (order, scored)) in &ranked {
            let own = OwnRun { first, scores: values, order: &order[..*scored] };
            let number = snapshot.columns.iter().position(|c| c.name == *name);
            let merges = match number {
                Some(at) => self.merge_tiers(snapshot, &snapshot.columns[at], at, own, files)?,
                None => Vec::new(),
            };
            let (name, scored) = ((*name).to_owned(), *scored as u64);
            scores.push(CommitScore { name, scored, merges });
        }

        // Names.
        let mut directories = vec![SEGMENT_DIR];
        directories.extend(prompts.is_some().then_some(PROMPT_DIR));
        directories.extend(scores.iter().any(|s| !s.merges.is_empty()).then_some(RUN_DIR));
        self.sync_directories(files.storage, &directories)?;

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
        let digest = self.publish(files.storage, Kind::Commit, generation, &to_json(&commit))?;
        let new_prompts = new_prompts.iter().zip(snapshot.num_prompts..);
        Ok((commit, digest, new_prompts.map(|(prompt, id)| (prompt.hash, id)).collect()))
    }

    /// Write the file that takes the place of a group, and the runs whose place it takes.
    fn write_group(
        &mut self,
        snapshot: &Snapshot,
        group: Group,
        files: &mut NewFiles<'_>,
    ) -> Result<Upkeep> {
        let generation = snapshot.generation + 1;
        match group {
            Group::Prompts(range) => {
                let (bytes, prompts) = merge_prompts(snapshot, range.clone(), generation)?;
                self.write_file(files, &prompts.file, &bytes)?;
                self.sync_directories(files.storage, &[PROMPT_DIR])?;
                Ok(Upkeep::MergePrompts { start: range.start, end: range.end, prompts })
            }
            Group::Segments(range) => {
                let first = snapshot.segments[range.start].entry.first;
                let (bytes, segment) = merge_segments(snapshot, range.clone(), first, generation)?;
                self.write_file(files, &segment.file, &bytes)?;
                drop(bytes);
                let mut columns = Vec::new();
                for (number, column) in snapshot.columns.iter().enumerate() {
                    let mut merges = Vec::new();
                    for at in runs_within(column, &segment) {
                        let run = &column.runs[at..=at];
                        let first = run[0].first();
                        let (keys, ids) = merge_runs(snapshot, run, OwnRun::NONE)?;
                        // The place among the runs makes the name the only one of its generation.
                        let name = run_name(number, at as u8, generation);
                        let level = run[0].entry.level;
                        let run =
                            self.write_run(snapshot, name, level, first, (keys, ids), files)?;
                        merges.push(MergeEntry { start: at, end: at + 1, run });
                    }
                    if !merges.is_empty() {
                        columns.push(ColumnMerges { name: column.name.clone(), merges });
                    }
                }
                let mut directories = vec![SEGMENT_DIR];
                directories.extend((!columns.is_empty()).then_some(RUN_DIR));
                self.sync_directories(files.storage, &directories)?;
                Ok(Upkeep::MergeSegments { start: range.start, end: range.end, segment, columns })
            }
        }
    }

    /// Write what is left of the files that hold samples before `first` and others, too.
    fn write_retention(
        &mut self,
        snapshot: &Snapshot,
        first: u64,
        files: &mut NewFiles<'_>,
    ) -> Result<Upkeep> {
        let at = snapshot.segments.partition_point(|s| s.entry.first <= first) - 1;
        let mut segment = None;
        if snapshot.segments[at].entry.first < first {
            let generation = snapshot.generation + 1;
            let (bytes, entry) = merge_segments(snapshot, at..at + 1, first, generation)?;
            self.write_file(files, &entry.file, &bytes)?;
            segment = Some(entry);
        }
        let all = snapshot.columns.iter().chain(&snapshot.drafts).enumerate();
        let mut columns = all
            .map(|(number, column)| self.cut_column(snapshot, column, number, first, files))
            .collect::<Result<Vec<_>>>()?;
        let drafts = columns.split_off(snapshot.columns.len());
        let is_in = |directory| files.names.iter().any(|name| name.starts_with(directory));
        let directories = [SEGMENT_DIR, SCORE_DIR, RUN_DIR].into_iter().filter(|d| is_in(*d));
        let directories: Vec<_> = directories.collect();
        self.sync_directories(files.storage, &directories)?;
        let upkeep = Upkeep::Retain { first, segment, columns, drafts };
        // Tried before it becomes a record: it counts on numbers that the manifest says of the files.
        let tried = snapshot.clone().apply_upkeep(upkeep.clone(), [0; 32]);
        tried.map_err(|what| PoolError::corrupted(MANIFEST_DIR, 0, what))?;
        Ok(upkeep)
    }

    /// Write what is left of a column's extent and run that hold samples on both sides of `first`.
    ///
    /// Runs hold the samples of one stretch of extents after another, so that the counts tell which are cut.
    fn cut_column(
        &mut self,
        snapshot: &Snapshot,
        column: &Column,
        number: usize,
        first: u64,
        files: &mut NewFiles<'_>,
    ) -> Result<ColumnCut> {
        let generation = snapshot.generation + 1;
        let gone = column.extents.partition_point(|extent| extent.end() <= first);
        let mut num_gone: u64 = column.extents[..gone].iter().map(|e| e.entry.scored).sum();
        let mut extent = None;
        if let Some(old) = column.extents.get(gone).filter(|old| old.first() < first) {
            let scores = old.scores(&snapshot.home, 0..old.count())?;
            let kept = &scores[(first - old.first()) as usize..];
            let (order, scored) = sort_scores(kept, first, snapshot.home.settings.tie_seed);
            num_gone += old.entry.scored - (scored as u64).min(old.entry.scored);
            let mut file = None;
            if !old.is_in_segment() {
                let name = kept_scores_name(first, number, generation);
                let (bytes, entry) = encode_scores(name, &snapshot.home.settings, kept, order);
                self.write_file(files, &entry, &bytes)?;
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
        // Without a score that goes, too, an order is that of another extent now.
        let is_cut = |place: &RunPlace| match place {
            RunPlace::Extent(extent) => extent.first() < first,
            RunPlace::Merged(_) => before < num_gone,
        };
        let mut run = None;
        if let Some(old) = column.runs.get(runs).filter(|run| is_cut(&run.place)) {
            let level = old.entry.level;
            run = Some(match old.place {
                RunPlace::Extent(_) => {
                    let entries = before + old.entry.entries - num_gone;
                    RunEntry { level, entries, first: 0, source: RunSource::Extent(first) }
                }
                RunPlace::Merged(_) => {
                    let (keys, ids) =
                        merge_runs(snapshot, &column.runs[runs..=runs], OwnRun::NONE)?;
                    let kept = keys.into_iter().zip(ids).filter(|&(_, id)| id >= first);
                    let name = run_name(number, level, generation);
                    self.write_run(snapshot, name, level, first, kept.unzip(), files)?
                }
            });
            runs += 1;
        }
        Ok(ColumnCut { name: column.name.clone(), extent, runs, run })
    }

    /// Write the file of a draft's next scores, and the runs that it makes due.
    fn write_scores(
        &mut self,
        snapshot: &Snapshot,
        name: &str,
        source: &str,
        first: u64,
        scores: &[f32],
        files: &mut NewFiles<'_>,
    ) -> Result<ScoreChange> {
        let generation = snapshot.generation + 1;
        let (order, scored) = sort_scores(scores, first, snapshot.home.settings.tie_seed);
        let ranked = order[..scored].to_vec();
        let settings = &snapshot.home.settings;
        let (bytes, file) = encode_scores(scores_name(first, generation), settings, scores, order);
        self.write_file(files, &file, &bytes)?;
        drop(bytes);
        let own = OwnRun { first, scores, order: &ranked };
        let number = snapshot.drafts.iter().position(|draft| draft.name == name);
        let merges = match number {
            // Only part of a file's name, which the generation makes unique.
            Some(at) => {
                let number = snapshot.columns.len() + at;
                self.merge_tiers(snapshot, &snapshot.drafts[at], number, own, files)?
            }
            None => Vec::new(),
        };
        let mut directories = vec![SCORE_DIR];
        directories.extend((!merges.is_empty()).then_some(RUN_DIR));
        self.sync_directories(files.storage, &directories)?;
        let extent = ExtentEntry {
            first,
            count: scores.len() as u64,
            scored: scored as u64,
            file: Some(file),
        };
        let (name, source) = (name.to_owned(), source.to_owned());
        Ok(ScoreChange::Draft { name, source, extent, merges })
    }

    /// Write the file of a merged run of samples from `first` on.
    fn write_run(
        &mut self,
        snapshot: &Snapshot,
        name: String,
        level: u8,
        first: u64,
        (keys, ids): (Vec<u32>, Vec<u64>),
        files: &mut NewFiles<'_>,
    ) -> Result<RunEntry> {
        let settings = &snapshot.home.settings;
        let first = if settings.has_compact_orders() { first } else { 0 };
        let entries = ids.len() as u64;
        let (bytes, file) = encode_run(name, settings, first, keys, ids);
        self.write_file(files, &file, &bytes)?;
        Ok(RunEntry { level, entries, first, source: RunSource::File(file) })
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

    /// Write and sync a new data file.
    fn write_file(
        &mut self,
        files: &mut NewFiles<'_>,
        entry: &FileEntry,
        bytes: &[u8],
    ) -> Result<()> {
        let path = Path::new(&entry.name);
        let storage = files.storage;
        let io = |action| PoolError::io(action, storage.locate(path));
        let mut output = match storage.create(path) {
            // Left by an append that failed and could not clean up.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                storage.remove(path).and_then(|()| storage.create(path))
            }
            result => result,
        }
        .map_err(io("create"))?;
        files.names.push(entry.name.clone());
        output.write_all(bytes).and_then(|()| output.seal()).map_err(io("write"))?;
        let synced = output.sync().map_err(io("sync"));
        self.poison_on_error(synced)
    }

    /// Ids of the batch's prompts, and the ones that are new.
    fn intern_prompts<'b>(
        &mut self,
        snapshot: &Snapshot,
        batch: &Batch<'b>,
    ) -> Result<(Vec<u32>, Vec<PromptRow<'b>>)> {
        if self.prompt_ids.is_none() {
            self.prompt_ids = Some(read_prompt_ids(snapshot)?);
        }
        let known = self.prompt_ids.as_ref().expect("set above");
        let mut ids = Vec::with_capacity(batch.prompt_texts.len());
        let mut new: Vec<PromptRow<'b>> = Vec::new();
        let mut new_ids: ByHash<usize> = HashMap::default();
        let mut content = Vec::new();
        for (i, span) in batch.prompt_offsets.windows(2).enumerate() {
            let tokens = &batch.prompt_tokens[span[0] as usize..span[1] as usize];
            let (text, metadata) = (batch.prompt_texts[i], batch.prompt_metadata[i]);
            let hash = hash_prompt(tokens, text, metadata, &mut content);
            let prompt = PromptRow { tokens, text, metadata, hash };
            if let Some(&id) = known.get(&prompt.hash)
                && is_same_prompt(snapshot, id, &prompt)?
            {
                ids.push(id);
                continue;
            }
            let at = match new_ids.get(&prompt.hash) {
                Some(&at)
                    if new[at].tokens == tokens
                        && new[at].text == text
                        && new[at].metadata == metadata =>
                {
                    at
                }
                _ => {
                    new_ids.entry(prompt.hash).or_insert(new.len());
                    new.push(prompt);
                    new.len() - 1
                }
            };
            let id = u32::try_from(at).ok().and_then(|at| snapshot.num_prompts.checked_add(at));
            ids.push(id.ok_or_else(|| PoolError::invalid("the pool has no prompt ids left"))?);
        }
        Ok((ids, new))
    }

    /// Where a tier of a column is full with the new run, its runs become one of the next tier.
    fn merge_tiers(
        &mut self,
        snapshot: &Snapshot,
        column: &Column,
        number: usize,
        own: OwnRun<'_>,
        files: &mut NewFiles<'_>,
    ) -> Result<Vec<MergeEntry>> {
        let scored = own.order.len() as u64;
        let mut merges = Vec::new();
        let runs = &column.runs;
        let mut levels: Vec<(u8, u64)> =
            runs.iter().map(|run| (run.entry.level, run.first())).collect();
        if scored == 0 {
            return Ok(merges);
        }
        levels.push((0, own.first));
        // A cascade merges everything once: only its last step is carried out.
        let mut due = None;
        while let Some((range, level)) = plan_merge(&levels, own.end()) {
            let first = levels[range.start].1;
            levels.splice(range.clone(), [(level, first)]);
            due = Some((range.start, level, first));
        }
        if let Some((start, level, first)) = due {
            let (keys, ids) = merge_runs(snapshot, &runs[start..], own)?;
            let name = run_name(number, level, snapshot.generation + 1);
            let run = self.write_run(snapshot, name, level, first, (keys, ids), files)?;
            merges.push(MergeEntry { start, end: runs.len() + 1, run });
        }
        Ok(merges)
    }

    /// Append the record and make it durable.
    fn publish(
        &mut self,
        storage: &dyn Storage,
        kind: Kind,
        generation: u64,
        payload: &[u8],
    ) -> Result<Digest256> {
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
        // HEAD is only a lower bound: the commit is durable without it.
        let _ = storage.overwrite(Path::new(HEAD), &encode_head(generation, &digest));
        Ok(digest)
    }

    fn begin_log_if_due(&mut self, snapshot: &Snapshot) -> Result<()> {
        if self.end.valid_bytes > MIN_LOG_BYTES.max(3 * self.end.state_bytes) {
            self.begin_log(snapshot)?;
        }
        Ok(())
    }

    fn begin_log(&mut self, snapshot: &Snapshot) -> Result<()> {
        let storage = snapshot.storage();
        let name = log_name(snapshot.generation);
        let path = Path::new(&name);
        let io = |action| PoolError::io(action, storage.locate(path));
        let payload = to_json(&snapshot.to_state());
        let (record, digest) =
            encode_record(Kind::State, snapshot.generation, &snapshot.digest, &payload);
        // One that an earlier attempt left.
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

fn hash_prompt(tokens: &[u32], text: &str, metadata: &str, bytes: &mut Vec<u8>) -> [u8; 16] {
    bytes.clear();
    for len in [tokens.len(), text.len(), metadata.len()] {
        bytes.extend_from_slice(&(len as u64).to_le_bytes());
    }
    bytes.extend_from_slice(bytemuck::cast_slice(tokens));
    bytes.extend_from_slice(text.as_bytes());
    bytes.extend_from_slice(metadata.as_bytes());
    sum128(bytes)
}

/// Two prompts may share a hash, so content decides.
fn is_same_prompt(snapshot: &Snapshot, id: u32, prompt: &PromptRow<'_>) -> Result<bool> {
    let (table, row) = snapshot.locate_prompt(id)?;
    let file = table.open(&snapshot.home)?;
    let span = file.span(prompt_column::TOKENS, row)?;
    let token_bytes = snapshot.home.settings.token_bytes;
    let is_same = match Tokens::read(file, prompt_column::TOKENS, token_bytes, span)? {
        Tokens::Narrow(ids) => {
            ids.len() == prompt.tokens.len()
                && ids.iter().zip(prompt.tokens).all(|(&a, &b)| u32::from(a) == b)
        }
        Tokens::Wide(ids) => ids == prompt.tokens,
    };
    let bytes = |column| file.items::<u8>(column, file.span(column, row)?);
    Ok(is_same
        && bytes(prompt_column::TEXT)? == prompt.text.as_bytes()
        && bytes(prompt_column::METADATA)? == prompt.metadata.as_bytes())
}

/// A map by hashes of content, which need no other hash.
type ByHash<V> = HashMap<[u8; 16], V, BuildHasherDefault<OwnBits>>;

/// The first bytes of a hash, as they are.
#[derive(Debug, Default)]
struct OwnBits(u64);

impl Hasher for OwnBits {
    fn write(&mut self, bytes: &[u8]) {
        for (to, &byte) in (0..).step_by(8).zip(bytes.iter().take(8)) {
            self.0 ^= u64::from(byte) << to;
        }
    }

    // The length, which an array writes first, is the same for all.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

fn read_prompt_ids(snapshot: &Snapshot) -> Result<ByHash<u32>> {
    let mut ids = ByHash::default();
    for table in &snapshot.prompts {
        let file = table.open(&snapshot.home)?;
        let hashes: &[[u8; 16]] = file.values(prompt_column::HASH, 0..file.rows())?;
        // By what is there, not by what the manifest says is there.
        ids.reserve(hashes.len());
        for (hash, id) in hashes.iter().zip(table.entry.first..) {
            ids.entry(*hash).or_insert(id);
        }
    }
    Ok(ids)
}
