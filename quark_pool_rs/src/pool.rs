//! Entry points: create, open, append.
//!
//! A [`Pool`] shows one [`Snapshot`] at a time. A writer moves to the next one with every append. `writer` writes
//! the commits.

use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::batch::Batch;
use crate::compaction::{Group, MAX_SMALL_FILES, due, plan};
use crate::error::{PoolError, Result};
use crate::format::{
    HEAD, LOCK, MANIFEST_DIR, PROMPT_DIR, PoolSettings, RUN_DIR, SCORE_DIR, SEGMENT_DIR,
    check_column_name, check_json_object, is_data_name, log_name, parse_log_name,
};
use crate::log::{Kind, encode_head, encode_record};
use crate::manifest::{ScoreChange, Upkeep};
use crate::parts::{Column, Context};
use crate::recovery::{needed_since, recover, tidy};
use crate::retention::Limits;
use crate::snapshot::Snapshot;
use crate::storage::{Entry, Lock, Storage};
use crate::writer::{Transaction, Writer, lock, to_json};

/// How to open a pool.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenOptions<'a> {
    /// Take the writer's lock. The text says who holds it.
    pub writer: Option<&'a str>,
    /// Show this generation instead of the newest.
    pub snapshot: Option<u64>,
}

/// An open pool that threads can share. Readers do not wait for each other, and wait only briefly for a commit.
pub struct Pool {
    storage: Arc<dyn Storage>,
    shown: RwLock<Shown>,
    writer: Mutex<Option<Writer>>,
    is_writable: bool,
    /// The process that opened it.
    process: u32,
    max_small_files: usize,
}

struct Shown {
    snapshot: Arc<Snapshot>,
    /// Ids that were appended under each idempotency key.
    keys: HashMap<String, Range<u64>>,
}

impl Pool {
    /// Create an empty pool and open it for writing.
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
        // An unfinished creation never leaves samples, so samples here are data even if no log lists them.
        let data = [SEGMENT_DIR, PROMPT_DIR, RUN_DIR, SCORE_DIR];
        let is_ours = |entry: &Entry| match &*entry.name {
            LOCK => entry.is_file,
            name => entry.is_dir && (name == MANIFEST_DIR || data.contains(&name)),
        };
        let exists = || PoolError::Exists { path: disk.locate(root) };
        let list = |directory: &str| match disk.list(Path::new(directory)) {
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                Ok(Vec::new())
            }
            listed => listed.map_err(io("list", directory)),
        };
        let mut is_empty = list("")?.iter().all(is_ours);
        for directory in data {
            is_empty = is_empty && list(directory)?.is_empty();
        }
        if !is_empty {
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
        let context = Arc::new(Context { storage: storage.clone(), settings: settings.clone() });
        let payload = to_json(&Snapshot::empty(context.clone(), [0; 32]).to_state())?;
        let (record, digest) = encode_record(Kind::State, 0, &[0; 32], &payload);
        let name = log_name(0);
        let path = Path::new(&name);
        let _ = disk.remove(path);
        let mut log = disk.create(path).map_err(io("create", &name))?;
        log.write_all(&record).map_err(io("write", &name))?;
        log.sync().map_err(io("sync", &name))?;
        // A pool exists as soon as its log has its name, so the log is named last.
        disk.sync_dir(root).map_err(io("sync", ""))?;
        disk.sync_parent().map_err(io("sync the directory of", ""))?;
        disk.sync_dir(Path::new(MANIFEST_DIR)).map_err(io("sync", MANIFEST_DIR))?;
        disk.overwrite(Path::new(HEAD), &encode_head(0, &digest)).map_err(io("write", HEAD))?;
        drop(log);
        Self::open_locked(storage, lock)
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
        // Checks that there is a pool before a lock file is created.
        let (snapshot, _) = recover(&storage, options.snapshot)?;
        match options.writer {
            None => Ok(Self::new(storage, snapshot, None)),
            Some(holder) => {
                let lock = lock(&*storage, holder)?;
                Self::open_locked(storage, lock)
            }
        }
    }

    /// Open a pool for writing, under its lock.
    fn open_locked(storage: Arc<dyn Storage>, lock: Box<dyn Lock>) -> Result<Self> {
        let (snapshot, end) = recover(&storage, None)?;
        tidy(&*storage, &snapshot, &end)?;
        let writer = Writer::new(&*storage, lock, end)?;
        Ok(Self::new(storage, snapshot, Some(writer)))
    }

    fn new(storage: Arc<dyn Storage>, snapshot: Snapshot, writer: Option<Writer>) -> Self {
        Self {
            storage,
            is_writable: writer.is_some(),
            process: std::process::id(),
            max_small_files: MAX_SMALL_FILES,
            shown: RwLock::new(Shown::new(snapshot)),
            writer: Mutex::new(writer),
        }
    }

    /// Merge small segments or prompt files where an append leaves more of them than `max`, instead of 256.
    #[must_use]
    pub fn with_max_small_files(mut self, max: usize) -> Self {
        self.max_small_files = max;
        self
    }

    /// The snapshot that the handle shows.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shown.read().unwrap_or_else(PoisonError::into_inner).snapshot.clone()
    }

    /// Whether the handle was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.is_writable
    }

    /// Move a reader to the newest commit, never back. A writer always shows it.
    ///
    /// # Errors
    /// As [`Pool::open`].
    pub fn refresh(&self) -> Result<()> {
        if self.is_writable {
            return Ok(());
        }
        let (snapshot, _) = recover(&self.storage, None)?;
        snapshot.adopt_open_files(&self.snapshot());
        let found = Shown::new(snapshot);
        let mut shown = self.shown.write().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have found a newer commit since this one looked.
        if found.snapshot.generation >= shown.snapshot.generation {
            *shown = found;
        }
        Ok(())
    }

    /// Ids that were appended under `key` up to this snapshot. Retention may have removed them since.
    pub fn find(&self, key: &str) -> Option<Range<u64>> {
        let shown = self.shown.read().unwrap_or_else(PoisonError::into_inner);
        shown.keys.get(key).cloned()
    }

    /// Release the lock. Snapshots stay readable, and appends are refused.
    pub fn close(&self) {
        if let Ok(mut writer) = self.lock_writer() {
            *writer = None;
        }
    }

    /// The writer, once no other thread uses it.
    ///
    /// # Errors
    /// `ReadOnly`; `Locked` in a process that was forked from the one that opened the pool.
    fn lock_writer(&self) -> Result<MutexGuard<'_, Option<Writer>>> {
        if !self.is_writable {
            let what = "the pool was opened for reading: open it with writable=True";
            return Err(PoolError::ReadOnly(what.to_owned()));
        }
        // Checked before the lock, because a thread of the parent may have held the lock during the fork.
        if self.process != std::process::id() {
            return Err(PoolError::Locked {
                holder: format!("by the process {} that this one was forked from", self.process),
            });
        }
        Ok(self.writer.lock().unwrap_or_else(|poison| {
            // A panic in the middle of an append leaves an unknown state.
            let mut guard = poison.into_inner();
            if let Some(writer) = guard.as_mut() {
                writer.is_poisoned = true;
            }
            guard
        }))
    }

    /// Commit `batch` and return its ids. When this returns, the samples survive a power cut.
    ///
    /// Where there are more than 256 small segments or prompt files, some are merged in further commits.
    ///
    /// # Errors
    /// `Invalid`, `ReadOnly`, `Poisoned`, `Io`; `Corrupted` if a run or prompt that the append needs is damaged.
    pub fn append(&self, batch: &Batch<'_>) -> Result<Range<u64>> {
        let mut guard = self.lock_writer()?;
        let writer = able_writer(&mut guard)?;
        if let Some(ids) = self.find(batch.key) {
            return Ok(ids);
        }
        let snapshot = self.snapshot();
        batch.check(&snapshot.context.settings)?;
        let (commit, digest, new_prompts) = Transaction::begin(writer, &snapshot)?.append(batch)?;
        let ids = commit.segment.first..commit.segment.first + commit.segment.count;
        drop(snapshot);

        let mut shown = self.shown.write().unwrap_or_else(PoisonError::into_inner);
        shown.keys.insert(batch.key.to_owned(), ids.clone());
        Arc::make_mut(&mut shown.snapshot)
            .apply(commit, digest)
            .expect("our own commit follows our own snapshot");
        drop(shown);
        writer.learn(new_prompts);
        self.merge_small_files(writer);
        Ok(ids)
    }
}

/// New scores for existing samples.
///
/// They go to a draft in chunks, each a durable commit. [`Pool::publish_scores`] turns the draft into the column in
/// one more commit. Until then every reader sees the old scores.
impl Pool {
    /// Ids below this have scores in the draft of a column; None without a draft.
    pub fn draft_end(&self, name: &str) -> Option<u64> {
        let snapshot = self.snapshot();
        let draft = snapshot.drafts.iter().find(|draft| draft.name == name)?;
        Some(snapshot.draft_end(Some(draft)))
    }

    /// Commit more scores of a draft, for the samples from `first` on. `first` is the end of the draft.
    ///
    /// `source` describes the scorer as one JSON object. It must not change within a draft.
    ///
    /// # Errors
    /// As [`Pool::append`].
    pub fn draft_scores(&self, name: &str, source: &str, first: u64, scores: &[f32]) -> Result<()> {
        check_column_name(name)?;
        check_json_object("the source of the scores", source)?;
        self.change_scores(|transaction, snapshot| {
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
            transaction.write_scores(name, source, first, scores)
        })
    }

    /// Turn a complete draft into the column of its name.
    ///
    /// # Errors
    /// As [`Pool::append`]; `Invalid` if the draft does not cover every sample.
    pub fn publish_scores(&self, name: &str) -> Result<()> {
        self.change_scores(|_, snapshot| {
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

    /// Discard a draft.
    ///
    /// # Errors
    /// As [`Pool::append`]; `Invalid` if there is no such draft.
    pub fn discard_scores(&self, name: &str) -> Result<()> {
        self.change_scores(|_, snapshot| {
            if !snapshot.drafts.iter().any(|draft| draft.name == name) {
                return Err(PoolError::invalid(format!("there is no draft of {name:?}")));
            }
            Ok(ScoreChange::Discard { name: name.to_owned() })
        })
    }

    fn change_scores(
        &self,
        write: impl FnOnce(&mut Transaction<'_>, &Snapshot) -> Result<ScoreChange>,
    ) -> Result<()> {
        let mut guard = self.lock_writer()?;
        let writer = able_writer(&mut guard)?;
        let snapshot = self.snapshot();
        let mut transaction = Transaction::begin(writer, &snapshot)?;
        let change = write(&mut transaction, &snapshot)?;
        let digest = transaction.publish(Kind::Scores, &change)?;
        drop(snapshot);
        let mut shown = self.shown.write().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut shown.snapshot)
            .apply_scores(change, digest)
            .expect("our own change follows our own snapshot");
        Ok(())
    }
}

/// The writer, if it may write.
fn able_writer<'w>(guard: &'w mut MutexGuard<'_, Option<Writer>>) -> Result<&'w mut Writer> {
    match guard.as_mut() {
        None => Err(PoolError::ReadOnly("the pool is closed".to_owned())),
        Some(writer) if writer.is_poisoned => Err(PoolError::Poisoned),
        Some(writer) => Ok(writer),
    }
}

/// Result of a collection, or of its dry run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Collected {
    /// The oldest generation that can still be opened.
    pub oldest: u64,
    /// Number of files removed.
    pub files: u64,
    /// Size of these files in bytes. A fork or an open map can keep the space in use.
    pub bytes: u64,
}

/// Maintenance: expires old snapshots, merges files, and removes old samples.
impl Pool {
    /// Keep the newest `keep` snapshots, and remove the logs and data files that none of them needs.
    ///
    /// Expiring snapshots is a commit of its own and counts among the kept ones. If there are no more than `keep`
    /// snapshots, only leftover files are removed. With `dry_run` nothing is changed.
    ///
    /// # Errors
    /// As [`Pool::append`]; `Corrupted`, with nothing removed, if a damaged log does not show which files are needed.
    pub fn collect(&self, keep: u64, dry_run: bool) -> Result<Collected> {
        if keep == 0 {
            return Err(PoolError::invalid("keep is 0; the newest snapshot always stays"));
        }
        let mut guard = self.lock_writer()?;
        let writer = able_writer(&mut guard)?;
        let snapshot = self.snapshot();
        let newest = snapshot.generation;
        let is_due = newest - snapshot.oldest >= keep;
        let oldest = if is_due { newest + 2 - keep } else { snapshot.oldest };
        // Reads the logs before anything changes. If one cannot be read, nothing is removed. The commit that
        // follows lists the same files as the newest one.
        needed_since(&self.storage, oldest.min(newest), newest)?;
        drop(snapshot);
        if is_due && !dry_run {
            self.give_up(writer, oldest)?;
        }
        let newest = self.snapshot().generation;
        let (mut starts, files) = needed_since(&self.storage, oldest.min(newest), newest)?;
        if oldest > newest {
            // In a dry run, count all logs: a new one would replace them.
            starts.clear();
        }
        sweep(&*self.storage, &starts, &files, dry_run, oldest)
    }

    /// Record durably which snapshot is the oldest, and begin a log without the older ones.
    fn give_up(&self, writer: &mut Writer, oldest: u64) -> Result<()> {
        let snapshot = self.snapshot();
        self.keep_up(Transaction::within_log(writer, &snapshot), Upkeep::GiveUp { oldest })?;
        writer.begin_log(&self.snapshot())
    }

    /// Commit a maintenance record.
    fn keep_up(&self, transaction: Transaction<'_>, upkeep: Upkeep) -> Result<()> {
        let digest = transaction.publish(Kind::Upkeep, &upkeep)?;
        let mut shown = self.shown.write().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut shown.snapshot)
            .apply_upkeep(upkeep, digest)
            .expect("our own upkeep follows our own snapshot");
        Ok(())
    }

    /// Merge the oldest small files into one, in one commit. Returns whether there were any.
    ///
    /// Readers see the same data. Call this until it returns false to leave few files. The merged files remain for
    /// older snapshots until a collection removes them.
    ///
    /// # Errors
    /// As [`Pool::append`]; `Corrupted` if a file to merge is damaged.
    pub fn compact_once(&self, max_rows: u64) -> Result<bool> {
        let mut guard = self.lock_writer()?;
        let writer = able_writer(&mut guard)?;
        let snapshot = self.snapshot();
        let Some(group) = plan(&snapshot, max_rows) else { return Ok(false) };
        self.merge(writer, &snapshot, group)?;
        Ok(true)
    }

    fn merge(&self, writer: &mut Writer, snapshot: &Snapshot, group: Group) -> Result<()> {
        let mut transaction = Transaction::begin(writer, snapshot)?;
        let upkeep = transaction.write_group(group)?;
        self.keep_up(transaction, upkeep)
    }

    /// Merge small files if an append has made too many.
    ///
    /// The append is durable, so it does not fail if this does. The files then stay as they are until the pool is
    /// opened for writing again.
    fn merge_small_files(&self, writer: &mut Writer) {
        while writer.merges_small_files {
            let snapshot = self.snapshot();
            let Some(group) = due(&snapshot, self.max_small_files) else { return };
            writer.merges_small_files = self.merge(writer, &snapshot, group).is_ok();
        }
    }

    /// Remove the oldest appends that exceed the limits, in one commit. The newest append always stays.
    ///
    /// Older snapshots still show them, and their files stay until those snapshots expire. With `dry_run`, or if no
    /// append exceeds a limit, nothing is changed.
    ///
    /// # Errors
    /// As [`Pool::append`]; `Invalid` for limits out of range; `Corrupted` if a file to rewrite is damaged.
    pub fn retain(&self, limits: &Limits, dry_run: bool) -> Result<Retained> {
        limits.check()?;
        let mut guard = self.lock_writer()?;
        let writer = able_writer(&mut guard)?;
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
        let mut transaction = Transaction::begin(writer, &snapshot)?;
        let upkeep = transaction.write_retention(first)?;
        self.keep_up(transaction, upkeep)?;
        Ok(retained)
    }
}

/// Result of a retention, or of its dry run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retained {
    /// The oldest remaining sample.
    pub first: u64,
    /// Number of appends removed.
    pub appends: u64,
    /// Number of their samples.
    pub samples: u64,
}

impl Shown {
    fn new(snapshot: Snapshot) -> Self {
        let keys = snapshot.appends().map(|(append, ids)| (append.key, ids)).collect();
        Self { snapshot: Arc::new(snapshot), keys }
    }
}

/// Remove all logs except `starts` and all data files except `files`. The snapshots that needed them have expired
/// durably. After an interruption, the next collection continues.
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
