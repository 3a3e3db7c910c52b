//! A second pool with the samples of a snapshot.
//!
//! Data files never change, so the two pools share their bytes by hard links and nothing else: each has its
//! own logs, and a file is gone only when neither names it. Rules: FORMAT.md, "A fork".

use std::path::{Path, PathBuf};

use crate::error::{PoolError, Result};
use crate::format::{
    HEAD, MANIFEST_DIR, PROMPT_DIR, PoolSettings, RUN_DIR, SCORE_DIR, SEGMENT_DIR, log_name,
};
use crate::log::{Kind, encode_head, encode_record};
use crate::manifest::State;
use crate::snapshot::Snapshot;
use crate::storage::{Output, Storage, publish_directory};
use crate::writer::to_json;

const DIRECTORIES: [&str; 5] = [MANIFEST_DIR, SEGMENT_DIR, PROMPT_DIR, RUN_DIR, SCORE_DIR];

/// Make a pool at `to`, a path of `storage`, that holds what `snapshot` does and goes on from there.
///
/// The generations go on, too: the snapshot's is the oldest that the new pool can show. When this returns,
/// the new pool survives a power cut; before, there is none at `to`.
///
/// # Errors
/// `Exists`, `Invalid` for a path without a name, `Corrupted` if a file of the snapshot is missing or is no plain
/// file, `Io`.
pub fn fork(snapshot: &Snapshot, storage: &dyn Storage, to: &Path, uuid: &str) -> Result<()> {
    let Some(name) = to.file_name().and_then(|name| name.to_str()) else {
        return Err(PoolError::invalid(format!("{} is no name for a pool", to.display())));
    };
    let parent = to.parent().unwrap_or(Path::new(""));
    let entries = storage.list(parent).map_err(PoolError::io("list", storage.locate(parent)))?;
    if entries.iter().any(|entry| entry.name == name) {
        return Err(PoolError::Exists { path: storage.locate(to) });
    }
    // The new pool's own name, so that no two forks meet.
    let mut staged = Staged {
        storage,
        path: to.with_file_name(format!("{name}.partial-{uuid}")),
        files: Vec::new(),
        directories: Vec::new(),
    };
    let result =
        staged.build(snapshot, uuid).and_then(|()| publish_directory(storage, &staged.path, to));
    if result.is_err() {
        staged.undo();
    }
    result
}

/// A pool in the making, which knows what is its own.
struct Staged<'a> {
    storage: &'a dyn Storage,
    path: PathBuf,
    files: Vec<PathBuf>,
    directories: Vec<PathBuf>,
}

impl Staged<'_> {
    /// Everything that the new pool consists of, not yet durable.
    fn build(&mut self, snapshot: &Snapshot, uuid: &str) -> Result<()> {
        self.make_directory("")?;
        for directory in DIRECTORIES {
            self.make_directory(directory)?;
        }
        for file in snapshot.files() {
            self.share(snapshot.storage(), &file.name)?;
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
        self.write("write", &log_name(snapshot.generation), |log| log.write_all(&record))?;
        let head = encode_head(snapshot.generation, &digest);
        self.write("write", HEAD, |file| file.write_all(&head))
    }

    fn make_directory(&mut self, name: &str) -> Result<()> {
        let path = if name.is_empty() { self.path.clone() } else { self.path.join(name) };
        let made = self.storage.create_dir(&path);
        if !made.map_err(PoolError::io("create", self.storage.locate(&path)))? {
            return Err(PoolError::Exists { path: self.storage.locate(&path) });
        }
        self.directories.push(path);
        Ok(())
    }

    /// A second name for a file of a pool, or a copy where the system refuses that.
    fn share(&mut self, from: &dyn Storage, name: &str) -> Result<()> {
        let (original, path) = (Path::new(name), self.path.join(name));
        if self.storage.link(&from.locate(original), &path).is_ok() {
            self.files.push(path);
            return Ok(());
        }
        let bytes = from.map(original).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => PoolError::corrupted(name, 0, "the file is missing"),
            _ => PoolError::io("read", from.locate(original))(source),
        })?;
        self.write("copy", name, |copy| copy.write_all(&bytes).and_then(|()| copy.seal()))
    }

    /// Make a file that is not there.
    fn write(
        &mut self,
        action: &'static str,
        name: &str,
        write: impl FnOnce(&mut dyn Output) -> std::io::Result<()>,
    ) -> Result<()> {
        let path = self.path.join(name);
        let io = || PoolError::io(action, self.storage.locate(&path));
        let mut output = self.storage.create(&path).map_err(io())?;
        let written = write(&mut *output).map_err(io());
        self.files.push(path);
        written
    }

    /// Remove what was made here, and nothing else.
    fn undo(&self) {
        for file in &self.files {
            let _ = self.storage.remove(file);
        }
        for directory in self.directories.iter().rev() {
            let _ = self.storage.remove_dir(directory);
        }
    }
}
