//! A second pool with the samples of a snapshot.
//!
//! Data files never change, so the two pools share their bytes by hard links and nothing else: each has its
//! own logs, and a file is gone only when neither names it. Rules: FORMAT.md, "A fork".

use std::path::{Path, PathBuf};

use crate::error::{PoolError, Result};
use crate::format::{
    HEAD, MANIFEST_DIR, PROMPT_DIR, PoolSettings, RUN_DIR, SCORE_DIR, SEGMENT_DIR, log_name,
};
use crate::manifest::{Kind, State, encode_head, encode_record};
use crate::snapshot::Snapshot;
use crate::storage::{Storage, publish_directory};
use crate::writer::to_json;

const DIRECTORIES: [&str; 5] = [MANIFEST_DIR, SEGMENT_DIR, PROMPT_DIR, RUN_DIR, SCORE_DIR];

/// Make a pool at `to`, a path of `storage`, that holds what `snapshot` does and goes on from there.
///
/// The generations go on, too: the snapshot's is the oldest that the new pool can show. When this returns,
/// the new pool survives a power cut; before, there is none at `to`.
///
/// # Errors
/// `Exists`, `Invalid` for a path without a name, `Corrupted` if a file of the snapshot is missing, `Io`.
pub fn fork(snapshot: &Snapshot, storage: &dyn Storage, to: &Path, uuid: &str) -> Result<()> {
    let Some(name) = to.file_name().and_then(|name| name.to_str()) else {
        return Err(PoolError::invalid(format!("{} is no name for a pool", to.display())));
    };
    let parent = to.parent().unwrap_or(Path::new(""));
    let entries = storage.list(parent).map_err(PoolError::io("list", storage.locate(parent)))?;
    if entries.iter().any(|entry| entry.name == name) {
        return Err(PoolError::Exists { path: storage.locate(to) });
    }
    // The new pool's own name, so that no two forks meet and nothing that is there is ever removed.
    let staged = to.with_file_name(format!("{name}.partial-{uuid}"));
    let mut names = Vec::new();
    let result = build(snapshot, storage, &staged, uuid, &mut names)
        .and_then(|()| publish_directory(storage, &staged, to));
    if result.is_err() {
        for name in &names {
            let _ = storage.remove(name);
        }
        for directory in DIRECTORIES {
            let _ = storage.remove_dir(&staged.join(directory));
        }
        let _ = storage.remove_dir(&staged);
    }
    result
}

/// Everything that the new pool consists of, not yet durable.
fn build(
    snapshot: &Snapshot,
    storage: &dyn Storage,
    staged: &Path,
    uuid: &str,
    names: &mut Vec<PathBuf>,
) -> Result<()> {
    let create_dir = |path: &Path| {
        storage.create_dir(path).map_err(PoolError::io("create", storage.locate(path)))
    };
    create_dir(staged)?;
    for directory in DIRECTORIES {
        create_dir(&staged.join(directory))?;
    }
    for file in snapshot.files() {
        let path = staged.join(&file.name);
        names.push(path.clone());
        share(snapshot.storage(), Path::new(&file.name), storage, &path)?;
    }

    let state = snapshot.to_state();
    let pool = PoolSettings { uuid: uuid.to_owned(), ..state.pool };
    let state = State { pool, oldest: snapshot.generation, ..state };
    let payload = to_json(&state)?;
    // The empty pool's digest covers its settings; any later one is that of the commit it repeats.
    let is_empty = snapshot.generation == 0;
    let previous = if is_empty { [0; 32] } else { snapshot.digest };
    let (record, digest) = encode_record(Kind::State, snapshot.generation, &previous, &payload);
    let digest = if is_empty { digest } else { previous };
    let log = staged.join(log_name(snapshot.generation));
    names.push(log.clone());
    let created = storage.create(&log).and_then(|mut output| output.write_all(&record));
    created.map_err(PoolError::io("write", storage.locate(&log)))?;
    let head = staged.join(HEAD);
    names.push(head.clone());
    storage
        .overwrite(&head, &encode_head(snapshot.generation, &digest))
        .map_err(PoolError::io("write", storage.locate(&head)))
}

/// A second name for a file, or a copy where the system refuses that.
fn share(from: &dyn Storage, name: &Path, storage: &dyn Storage, path: &Path) -> Result<()> {
    if storage.link(&from.locate(name), path).is_ok() {
        return Ok(());
    }
    let bytes = from.map(name).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => {
            PoolError::corrupted(name.to_string_lossy(), 0, "the file is missing")
        }
        _ => PoolError::io("read", from.locate(name))(source),
    })?;
    let copied = storage
        .create(path)
        .and_then(|mut output| output.write_all(&bytes).and_then(|()| output.seal()));
    copied.map_err(PoolError::io("copy", storage.locate(path)))
}
