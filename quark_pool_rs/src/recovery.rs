//! From a directory to a snapshot, and the cleanup before a writer writes.
//!
//! [`recover`] only reads. It distinguishes a torn tail, which a crash leaves, from damage, which it always reports.
//! [`tidy`] writes, and may be interrupted anywhere. Rules: FORMAT.md, "Recovery".

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::checksum::{Digest256, hex};
use crate::encoding::FileEntry;
use crate::error::{PoolError, Result};
use crate::format::{
    FORMAT_VERSION, HEAD, MANIFEST_DIR, PROMPT_DIR, RUN_DIR, SCORE_DIR, SEGMENT_DIR, is_data_name,
    log_name, parse_log_name,
};
use crate::log::{Chain, Kind, Record, decode_head, encode_head, read_chain};
use crate::manifest::{Commit, ScoreChange, State, Upkeep};
use crate::parts::Context;
use crate::snapshot::Snapshot;
use crate::storage::{Output, Storage};

/// The log that the next commit goes to.
#[derive(Debug, Clone)]
pub struct LogEnd {
    /// Name with its directory.
    pub name: String,
    /// Bytes that are a valid chain.
    pub valid_bytes: u64,
    /// Bytes of its first record.
    pub state_bytes: u64,
    /// Digest of its last record.
    pub digest: Digest256,
    /// Whether it holds only acknowledged records, as far as HEAD can tell. Otherwise its end may be torn, or was read
    /// from memory after a failed sync, which no later sync makes durable.
    pub is_acknowledged: bool,
    /// Newer logs without a valid first record.
    pub stale_logs: Vec<String>,
}

/// A log that was read, with its origin.
struct Log {
    name: String,
    first: u64,
    bytes: Vec<u8>,
}

/// The newest snapshot, or that of generation `at`, and the end of the log.
///
/// # Errors
/// `NotFound`, `Corrupted`, `Version`, `UnknownSnapshot`, `Io`.
pub fn recover(storage: &Arc<dyn Storage>, at: Option<u64>) -> Result<(Snapshot, LogEnd)> {
    read_settled(&**storage, || recover_once(storage, at), Result::is_ok)
}

/// The result of `read`. If it fails and the logs have changed meanwhile, read again: a writer that expires
/// snapshots may remove their files while we read.
pub(crate) fn read_settled<T>(
    storage: &dyn Storage,
    read: impl Fn() -> T,
    is_fine: impl Fn(&T) -> bool,
) -> T {
    loop {
        let before = log_starts(storage);
        let result = read();
        let is_changed = |before: Vec<u64>| log_starts(storage).is_ok_and(|now| now != before);
        if is_fine(&result) || !before.is_ok_and(is_changed) {
            return result;
        }
    }
}

fn recover_once(storage: &Arc<dyn Storage>, at: Option<u64>) -> Result<(Snapshot, LogEnd)> {
    // Read HEAD first, so that everything read later is at least as new.
    let head = match storage.read(Path::new(HEAD)) {
        Ok(bytes) => decode_head(&bytes),
        // If the root is not a directory, there is no log either, which means that there is no pool.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::InvalidInput
                    | io::ErrorKind::NotADirectory
            ) =>
        {
            None
        }
        Err(error) => return Err(PoolError::io("read", storage.locate(Path::new(HEAD)))(error)),
    };
    let starts = log_starts(&**storage)?;
    let mut stale_logs = Vec::new();
    let mut cause = None;
    for &first in starts.iter().rev() {
        let log = read_log(&**storage, first)?;
        let chain = read_chain(&log.bytes, first);
        refuse_survivor(&log, &chain)?;
        if chain.records.is_empty() {
            cause = cause.or(chain.broken.map(|(offset, what)| (log.name.clone(), offset, what)));
            stale_logs.push(log.name);
            continue;
        }
        let (Some(first), Some(&last)) = (chain.records.first(), chain.records.last()) else {
            unreachable!("not empty")
        };
        check_head(head, &log, &chain)?;
        let end = LogEnd {
            name: log.name.clone(),
            valid_bytes: last.end() as u64,
            state_bytes: first.end() as u64,
            digest: last.digest,
            is_acknowledged: chain.broken.is_none()
                && chain.records.len() > 1
                && head == Some((last.generation, commit_digest(&last))),
            stale_logs,
        };
        let newest = last.generation;
        let mut snapshot = replay(storage, &log, &chain.records, newest)?;
        let oldest = snapshot.oldest;
        if let Some(at) = at {
            if !(oldest..=newest).contains(&at) {
                return Err(PoolError::UnknownSnapshot { generation: at, oldest, newest });
            }
            snapshot = if at < log.first {
                older(storage, &starts, at)?
            } else {
                replay(storage, &log, &chain.records, at)?
            };
            snapshot.oldest = oldest;
        }
        return Ok((snapshot, end));
    }
    match (head, cause) {
        (Some((generation, _)), cause) => {
            let (name, offset, what) =
                cause.unwrap_or_else(|| (MANIFEST_DIR.to_owned(), 0, "there is no log"));
            Err(PoolError::corrupted(
                name,
                offset as u64,
                format!("{what}, but generation {generation} was acknowledged"),
            ))
        }
        // An unfinished creation is not a pool.
        (None, _) => Err(PoolError::NotFound { path: storage.locate(Path::new("")) }),
    }
}

/// First generations of the logs, ascending.
pub(crate) fn log_starts(storage: &dyn Storage) -> Result<Vec<u64>> {
    let directory = Path::new(MANIFEST_DIR);
    match storage.list(directory) {
        Ok(entries) => Ok(entries.iter().filter_map(|e| parse_log_name(&e.name)).collect()),
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            Err(PoolError::NotFound { path: storage.locate(Path::new("")) })
        }
        Err(error) => Err(PoolError::io("list", storage.locate(directory))(error)),
    }
}

fn read_log(storage: &dyn Storage, first: u64) -> Result<Log> {
    let name = log_name(first);
    let path = Path::new(&name);
    let bytes = storage.read(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => PoolError::corrupted(&name, 0, "the file is missing"),
        _ => PoolError::io("read", storage.locate(path))(source),
    })?;
    Ok(Log { name, first, bytes })
}

fn refuse_survivor(log: &Log, chain: &Chain<'_>) -> Result<()> {
    match (chain.broken, chain.survivor) {
        (Some((offset, what)), Some((survivor, generation))) => Err(PoolError::corrupted(
            &log.name,
            offset as u64,
            format!("{what}, but generation {generation} follows at offset {survivor}"),
        )),
        _ => Ok(()),
    }
}

/// HEAD is a lower bound of the acknowledged commits, with the digest of its commit.
fn check_head(head: Option<(u64, Digest256)>, log: &Log, chain: &Chain<'_>) -> Result<()> {
    let Some((generation, digest)) = head else { return Ok(()) };
    let last = chain.records.last().expect("a chain that is used is not empty");
    if generation > last.generation {
        let what = chain.broken.map_or("the log ends", |(_, what)| what);
        return Err(PoolError::corrupted(
            &log.name,
            last.end() as u64,
            format!("{what}, but generation {generation} was acknowledged"),
        ));
    }
    match chain.records.iter().find(|r| r.generation == generation) {
        Some(record) if commit_digest(record) != digest => Err(PoolError::corrupted(
            &log.name,
            record.offset as u64,
            format!("generation {generation} is not the one that was acknowledged"),
        )),
        _ => Ok(()),
    }
}

/// Digest of the generation that a record creates. A later state only repeats the previous commit.
fn commit_digest(record: &Record<'_>) -> Digest256 {
    let repeats = record.kind == Kind::State && record.generation > 0;
    if repeats { record.previous } else { record.digest }
}

/// The snapshot of a generation before the newest log.
fn older(storage: &Arc<dyn Storage>, starts: &[u64], at: u64) -> Result<Snapshot> {
    let first = starts.iter().rev().copied().find(|&first| first <= at);
    let first = first.ok_or_else(|| {
        PoolError::corrupted(MANIFEST_DIR, 0, format!("the log of generation {at} is missing"))
    })?;
    let log = read_log(&**storage, first)?;
    let chain = read_chain(&log.bytes, first);
    replay(storage, &log, &chain.records, at)
}

/// The logs that snapshots from `oldest` on need, and the names of all data files that these list.
///
/// # Errors
/// `Corrupted` if any of these logs is damaged, because the needed files are then unknown; `Io`.
pub fn needed_since(
    storage: &Arc<dyn Storage>,
    oldest: u64,
    newest: u64,
) -> Result<(Vec<u64>, HashSet<String>)> {
    let mut starts = log_starts(&**storage)?;
    starts.drain(..starts.partition_point(|&first| first <= oldest).saturating_sub(1));
    let first = older(storage, &starts, oldest)?;
    let mut files: HashSet<String> = first.files().map(|file| file.name.clone()).collect();
    let mut reached = oldest;
    for &start in &starts {
        let log = read_log(&**storage, start)?;
        let chain = read_chain(&log.bytes, start);
        let is_gap = start > reached;
        if let Some((offset, what)) = chain.broken.or(is_gap.then_some((0, "a log is missing"))) {
            return Err(PoolError::corrupted(&log.name, offset as u64, what));
        }
        for record in chain.records.iter().filter(|record| record.generation > oldest) {
            reached = record.generation;
            let unparsed = |source: serde_json::Error| {
                let what = format!("a commit does not parse: {source}");
                PoolError::corrupted(&log.name, record.offset as u64, what)
            };
            let name = |file: &FileEntry| file.name.clone();
            match record.kind {
                Kind::Commit => {
                    let commit: Commit =
                        serde_json::from_slice(record.payload).map_err(unparsed)?;
                    files.extend(commit.files().map(name));
                }
                Kind::Scores => {
                    let change: ScoreChange =
                        serde_json::from_slice(record.payload).map_err(unparsed)?;
                    files.extend(change.files().into_iter().map(name));
                }
                Kind::Upkeep => {
                    let upkeep: Upkeep =
                        serde_json::from_slice(record.payload).map_err(unparsed)?;
                    files.extend(upkeep.files().into_iter().map(name));
                }
                // Repeats the known state.
                Kind::State => {}
            }
        }
    }
    if reached != newest {
        let what = format!("the logs end at generation {reached}, not at {newest}");
        return Err(PoolError::corrupted(MANIFEST_DIR, 0, what));
    }
    Ok((starts, files))
}

fn replay(
    storage: &Arc<dyn Storage>,
    log: &Log,
    records: &[Record<'_>],
    at: u64,
) -> Result<Snapshot> {
    let wrong = |record: &Record<'_>, what: String| {
        PoolError::corrupted(&log.name, record.offset as u64, what)
    };
    let cut_short = || {
        let end = records.last().map_or(0, Record::end) as u64;
        PoolError::corrupted(&log.name, end, format!("the log ends before generation {at}"))
    };
    let first = records.first().ok_or_else(cut_short)?;
    let state = parse_state(first, &log.name)?;
    let expected = if first.generation == 0 { String::new() } else { hex(&first.previous) };
    if state.chain != expected {
        return Err(wrong(first, "a state does not name the commit before it".to_owned()));
    }
    let context = Arc::new(Context { storage: storage.clone(), settings: state.pool.clone() });
    let mut snapshot = Snapshot::from_state(context, first.generation, commit_digest(first), state)
        .map_err(|what| wrong(first, what))?;
    for record in records.iter().skip(1) {
        if record.generation > at {
            break;
        }
        let unparsed =
            |source: serde_json::Error| wrong(record, format!("a commit does not parse: {source}"));
        let (payload, digest) = (record.payload, record.digest);
        match record.kind {
            Kind::State => Err("a state follows a state".to_owned()),
            Kind::Commit => {
                let commit: Commit = serde_json::from_slice(payload).map_err(unparsed)?;
                snapshot.apply(commit, digest)
            }
            Kind::Scores => {
                let change: ScoreChange = serde_json::from_slice(payload).map_err(unparsed)?;
                snapshot.apply_scores(change, digest)
            }
            Kind::Upkeep => {
                let upkeep: Upkeep = serde_json::from_slice(payload).map_err(unparsed)?;
                snapshot.apply_upkeep(upkeep, digest)
            }
        }
        .map_err(|what| wrong(record, what))?;
    }
    if snapshot.generation == at { Ok(snapshot) } else { Err(cut_short()) }
}

fn parse_state(record: &Record<'_>, log: &str) -> Result<State> {
    /// The fields that every version has.
    #[derive(serde::Deserialize)]
    struct Versioned {
        pool: Version,
    }
    #[derive(serde::Deserialize)]
    struct Version {
        format: u32,
    }
    let state: Result<State, _> = serde_json::from_slice(record.payload);
    let found = match &state {
        Ok(state) => state.pool.format,
        Err(_) => serde_json::from_slice::<Versioned>(record.payload)
            .map_or(FORMAT_VERSION, |v| v.pool.format),
    };
    if !(1..=FORMAT_VERSION).contains(&found) {
        return Err(PoolError::Version { found, supported: FORMAT_VERSION });
    }
    let state = state.map_err(|source| {
        PoolError::corrupted(log, record.offset as u64, format!("a state does not parse: {source}"))
    })?;
    if !matches!(state.pool.token_bytes, 2 | 4) {
        let what = format!("tokens of {} bytes", state.pool.token_bytes);
        return Err(PoolError::corrupted(log, record.offset as u64, what));
    }
    Ok(state)
}

/// Make the state that [`recover`] found durable, and remove what it ignored. The caller holds the lock.
///
/// # Errors
/// `Io`. The pool can be opened again afterwards.
pub fn tidy(storage: &dyn Storage, snapshot: &Snapshot, end: &LogEnd) -> Result<()> {
    let io = |action, path: &Path| PoolError::io(action, storage.locate(path));
    for name in &end.stale_logs {
        let path = Path::new(name);
        storage.remove(path).map_err(io("remove", path))?;
    }
    // An interrupted creation may have a log but not all directories.
    for directory in [SEGMENT_DIR, PROMPT_DIR, RUN_DIR, SCORE_DIR] {
        let path = Path::new(directory);
        storage.create_dir(path).map_err(io("create", path))?;
    }
    if !end.is_acknowledged {
        copy_log(storage, end)?.replace(storage)?;
    }
    for directory in [MANIFEST_DIR, ""] {
        let directory = Path::new(directory);
        storage.sync_dir(directory).map_err(io("sync", directory))?;
    }
    let _ = storage.overwrite(Path::new(HEAD), &encode_head(snapshot.generation, &snapshot.digest));
    for directory in [SEGMENT_DIR, PROMPT_DIR, RUN_DIR, SCORE_DIR] {
        let path = Path::new(directory);
        for entry in storage.list(path).map_err(io("list", path))? {
            let name = format!("{directory}/{}", entry.name);
            if entry.is_file && is_unfinished(&name, snapshot.generation) {
                // A file that cannot be removed only wastes disk space.
                let _ = storage.remove(Path::new(&name));
            }
        }
    }
    Ok(())
}

/// The valid part of a log, durable under another name and ready to replace the log.
pub(crate) struct LogCopy {
    /// Writes to the copy, whatever its name is.
    pub(crate) output: Box<dyn Output>,
    name: String,
    log: String,
}

impl LogCopy {
    /// Replace the log with the copy. This is durable once the directory is synced.
    ///
    /// # Errors
    /// `Io`. Either of the two may be there after a crash.
    pub(crate) fn replace(self, storage: &dyn Storage) -> Result<Box<dyn Output>> {
        let (fresh, log) = (Path::new(&self.name), Path::new(&self.log));
        storage.rename(fresh, log).map_err(PoolError::io("rename", storage.locate(fresh)))?;
        Ok(self.output)
    }
}

/// Write a copy of the valid part of a log, beside it.
///
/// # Errors
/// `Io`. The log is unchanged.
pub(crate) fn copy_log(storage: &dyn Storage, end: &LogEnd) -> Result<LogCopy> {
    let io = |action, path: &Path| PoolError::io(action, storage.locate(path));
    let (log, name) = (Path::new(&end.name), format!("{}.new", end.name));
    let fresh = Path::new(&name);
    // Remove leftovers of an earlier attempt durably. Otherwise a later rename could publish them.
    if storage.remove(fresh).is_ok() {
        let directory = Path::new(MANIFEST_DIR);
        storage.sync_dir(directory).map_err(io("sync", directory))?;
    }
    let mut bytes = storage.read(log).map_err(io("read", log))?;
    bytes.truncate(end.valid_bytes as usize);
    let mut output = storage.create(fresh).map_err(io("create", fresh))?;
    let written = output.write_all(&bytes).map_err(io("write", fresh));
    let synced = written.and_then(|()| output.sync().map_err(io("sync", fresh)));
    if let Err(error) = synced {
        drop(output);
        let _ = storage.remove(fresh);
        return Err(error);
    }
    Ok(LogCopy { output, log: end.name.clone(), name })
}

/// Whether a data file is of a generation that the pool has not reached.
fn is_unfinished(name: &str, generation: u64) -> bool {
    is_data_name(name)
        && name
            .strip_suffix(".arrow")
            .and_then(|stem| stem.rsplit('-').next())
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .is_some_and(|of| of > generation)
}
