//! The disk operations that the pool needs. `beneath` performs them on a directory.
//!
//! [`Storage`] has only the operations whose order matters for the proof in FORMAT.md, so that a fake disk can cut
//! the power between any two of them. Paths are relative to the root of the storage.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::beneath::{Access, Beneath, Found, is_shared};
use crate::error::{PoolError, Result};
use crate::mapping::Region;

/// A file being written; bytes go to its end.
pub trait Output: Send {
    /// Append `bytes`.
    ///
    /// # Errors
    /// The system's. Some of the bytes may have been written.
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Make bytes and length durable.
    ///
    /// # Errors
    /// The system's. The content of the file is unknown afterwards.
    fn sync(&mut self) -> io::Result<()>;
    /// Cut the file to `len` bytes.
    ///
    /// # Errors
    /// The system's.
    fn truncate(&mut self, len: u64) -> io::Result<()>;
    /// Make the file read-only for everyone.
    ///
    /// # Errors
    /// The system's.
    fn seal(&mut self) -> io::Result<()>;
    /// Whether the file has another name, under which writes to it are visible.
    ///
    /// # Errors
    /// The system's.
    fn is_shared(&self) -> io::Result<bool>;
}

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Name within its directory.
    pub name: String,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// Whether it is a plain file (not a link, pipe or device).
    pub is_file: bool,
}

/// Held until dropped.
pub trait Lock: Send + Sync {}

/// A disk.
pub trait Storage: Send + Sync {
    /// Where this is, for messages.
    fn locate(&self, path: &Path) -> PathBuf;
    /// Create a directory, unless it exists. Returns whether it was created.
    ///
    /// # Errors
    /// `InvalidInput` for a link in its place, or the system's.
    fn create_dir(&self, path: &Path) -> io::Result<bool>;
    /// Create a file that must not exist.
    ///
    /// # Errors
    /// `AlreadyExists`, or the system's.
    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>>;
    /// Open a file to append to it.
    ///
    /// # Errors
    /// `NotFound`, `InvalidInput` for what is not a plain file, or the system's.
    fn append(&self, path: &Path) -> io::Result<Box<dyn Output>>;
    /// Overwrite the beginning of a file, not durably. The file is created if it does not exist, and replaced if it has
    /// another name.
    ///
    /// # Errors
    /// `InvalidInput` for what is not a plain file, or the system's.
    fn overwrite(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;
    /// The content of a plain file.
    ///
    /// # Errors
    /// `NotFound`, `InvalidInput` for what is not a plain file, or the system's.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// The content of a plain file that never changes again.
    ///
    /// # Errors
    /// As [`Storage::read`].
    fn map(&self, path: &Path) -> io::Result<Region>;
    /// Length of a plain file.
    ///
    /// # Errors
    /// As [`Storage::read`].
    fn file_len(&self, path: &Path) -> io::Result<u64>;
    /// The entries of a directory, sorted by name. A name that is not UTF-8 has replacement characters, so opening it
    /// fails.
    ///
    /// # Errors
    /// `NotFound`, or the system's.
    fn list(&self, path: &Path) -> io::Result<Vec<Entry>>;
    /// Make a file's bytes durable, by name.
    ///
    /// # Errors
    /// The system's.
    fn sync_file(&self, path: &Path) -> io::Result<()>;
    /// Make a directory's names durable.
    ///
    /// # Errors
    /// The system's.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Make the root's own name durable.
    ///
    /// # Errors
    /// The system's.
    fn sync_parent(&self) -> io::Result<()>;
    /// Rename a file or directory.
    ///
    /// # Errors
    /// The system's.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Add a second name to a file that never changes again. `original` is a path from [`Storage::locate`].
    ///
    /// # Errors
    /// `InvalidInput` for what is not a plain file; else the system's. Not every file system has hard links, and none has
    /// them across devices.
    fn link(&self, original: &Path, path: &Path) -> io::Result<()>;
    /// Remove a file's name.
    ///
    /// # Errors
    /// The system's.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Remove an empty directory.
    ///
    /// # Errors
    /// The system's.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// Take the writer's lock and write `message` to its file. A lock file that has another name is replaced first.
    ///
    /// # Errors
    /// `WouldBlock`, with the holder's message, if another holds it; `InvalidInput` for what is not a plain
    /// file; else the system's.
    fn lock(&self, path: &Path, message: &str) -> io::Result<Box<dyn Lock>>;
}

/// A directory of the file system. Links beneath it are never followed.
#[derive(Debug)]
pub struct FileStorage {
    root: Beneath,
}

impl FileStorage {
    /// `root` need not exist yet. The path to it may contain links.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: Beneath::new(root.into()) }
    }

    /// Replace a file. The new file gets the name only when it is complete, because the process may die in between.
    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let fresh = path.with_extension("new");
        let _ = self.root.remove(&fresh);
        let mut file = self.root.create(&fresh)?;
        let written = file.write_all(bytes);
        drop(file);
        let named = written.and_then(|()| self.root.rename(&fresh, path));
        if named.is_err() {
            let _ = self.root.remove(&fresh);
        }
        named
    }
}

struct FileOutput(File);

impl Output for FileOutput {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn truncate(&mut self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn seal(&mut self) -> io::Result<()> {
        let mut permissions = self.0.metadata()?.permissions();
        permissions.set_readonly(true);
        self.0.set_permissions(permissions)
    }

    fn is_shared(&self) -> io::Result<bool> {
        is_shared(&self.0)
    }
}

struct FileLock {
    file: File,
    process: u32,
}

impl FileLock {
    /// Lock an open file, or return the message of its holder.
    fn take(file: File) -> io::Result<Self> {
        match file.try_lock() {
            Ok(()) => Ok(Self { file, process: std::process::id() }),
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = file.take(1024).read_to_string(&mut holder);
                Err(io::Error::new(io::ErrorKind::WouldBlock, holder))
            }
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

impl Lock for FileLock {}

impl Drop for FileLock {
    fn drop(&mut self) {
        // A forked child also has the file open. Closing it here would therefore not release the lock, and closing the
        // child's copy must not release a lock that is still held here.
        if self.process == std::process::id() {
            let _ = self.file.unlock();
        }
    }
}

impl Storage for FileStorage {
    fn locate(&self, path: &Path) -> PathBuf {
        self.root.path().join(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<bool> {
        self.root.create_directory(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        Ok(Box::new(FileOutput(self.root.create(path)?)))
    }

    fn append(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        Ok(Box::new(FileOutput(self.root.open(path, Access::Append)?)))
    }

    fn overwrite(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        match self.root.open(path, Access::Write) {
            Ok(mut file) if !is_shared(&file)? => file.write_all(bytes),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.replace(path, bytes),
        }
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.root.open(path, Access::Read)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn map(&self, path: &Path) -> io::Result<Region> {
        Region::map(&mut self.root.open(path, Access::Read)?)
    }

    fn file_len(&self, path: &Path) -> io::Result<u64> {
        Ok(self.root.open(path, Access::Read)?.metadata()?.len())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let entry = |(name, found)| Entry {
            name,
            is_dir: found == Found::Directory,
            is_file: found == Found::File,
        };
        let mut entries: Vec<_> = self.root.entries(path)?.into_iter().map(entry).collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        self.root.open(path, Access::Read)?.sync_all()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.root.sync_directory(path)
    }

    fn sync_parent(&self) -> io::Result<()> {
        self.root.sync_parent()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.root.rename(from, to)
    }

    fn link(&self, original: &Path, path: &Path) -> io::Result<()> {
        self.root.link(original, path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.root.remove(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.root.remove_directory(path)
    }

    fn lock(&self, path: &Path, message: &str) -> io::Result<Box<dyn Lock>> {
        let mut is_replaced = false;
        loop {
            match self.root.create(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                // Opened below, regardless of who created it.
                _ => {}
            }
            let mut held = FileLock::take(self.root.open(path, Access::Write)?)?;
            if !self.root.is_at(path, &held.file)? {
                // Its holder replaced the file, as this code does, and released it.
                continue;
            }
            if is_shared(&held.file)? && !is_replaced {
                // The other name belongs to the lock of a copy of the pool, or to an unrelated file.
                self.replace(path, &[])?;
                is_replaced = true;
                continue;
            }
            // The content is only a message for people. Losing it is not an error.
            let _ = held.file.set_len(0).and_then(|()| held.file.write_all(message.as_bytes()));
            return Ok(Box::new(held));
        }
    }
}

/// Publish a finished directory under its final name: sync everything in it, rename, sync the parent.
///
/// When this returns, `finished` survives a power cut with the whole content of `staged`. Both paths must be on the
/// same file system.
///
/// # Errors
/// `NotFound`, `Exists`, `Invalid` for something that is neither file nor directory, `Io`.
pub fn publish_directory(storage: &dyn Storage, staged: &Path, finished: &Path) -> Result<()> {
    match storage.list(finished) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // A file, or a link.
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::NotADirectory | io::ErrorKind::InvalidInput
            ) =>
        {
            return Err(PoolError::io("list", storage.locate(finished))(error));
        }
        _ => return Err(PoolError::Exists { path: storage.locate(finished) }),
    }
    sync_tree(storage, staged)?;
    storage.rename(staged, finished).map_err(PoolError::io("rename", storage.locate(staged)))?;
    let mut parents = vec![finished.parent().unwrap_or(Path::new(""))];
    if staged.parent() != finished.parent() {
        parents.push(staged.parent().unwrap_or(Path::new("")));
    }
    for parent in parents {
        storage.sync_dir(parent).map_err(PoolError::io("sync", storage.locate(parent)))?;
    }
    Ok(())
}

fn sync_tree(storage: &dyn Storage, directory: &Path) -> Result<()> {
    let io = |action| PoolError::io(action, storage.locate(directory));
    for entry in storage.list(directory).map_err(io("list"))? {
        let path = directory.join(&entry.name);
        if entry.is_dir {
            sync_tree(storage, &path)?;
        } else if entry.is_file {
            storage.sync_file(&path).map_err(PoolError::io("sync", storage.locate(&path)))?;
        } else {
            return Err(PoolError::invalid(format!(
                "{} is neither a file nor a directory, so it cannot be published",
                storage.locate(&path).display()
            )));
        }
    }
    storage.sync_dir(directory).map_err(io("sync"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_overwritten_for_the_first_time_is_never_there_in_part() {
        let folder = tempfile::tempdir().unwrap();
        let storage = FileStorage::new(folder.path());
        let head = Path::new("HEAD");
        // Left over from a process that died between creating and writing the file.
        drop(storage.create(Path::new("HEAD.new")).unwrap());
        assert!(storage.read(head).is_err());
        for bytes in [b"first", b"again"] {
            storage.overwrite(head, bytes).unwrap();
            assert_eq!(storage.read(head).unwrap(), bytes);
        }
        let names: Vec<_> =
            storage.list(Path::new("")).unwrap().into_iter().map(|e| e.name).collect();
        assert_eq!(names, ["HEAD"]);
    }
}
