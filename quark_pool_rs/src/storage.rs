//! The only room that touches the file system.
//!
//! [`Storage`] has just the operations whose order the commit argument of FORMAT.md speaks of, so that a
//! fake disk can cut the power between any two of them. Paths are relative to the storage's root.
#![expect(clippy::disallowed_methods, reason = "this is the room")]

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::error::{PoolError, Result};
use crate::mapping::Region;

/// A file being written; bytes go to its end.
pub trait Output: Send {
    /// Append `bytes`.
    ///
    /// # Errors
    /// The system's; some of the bytes may have arrived.
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Make bytes and length durable.
    ///
    /// # Errors
    /// The system's; after one nothing is known about the file.
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
    /// Make one directory; it may be there.
    ///
    /// # Errors
    /// The system's.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Make a file that must not be there.
    ///
    /// # Errors
    /// `AlreadyExists`, or the system's.
    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>>;
    /// Open a file to append to it.
    ///
    /// # Errors
    /// `NotFound`, `InvalidInput` for what is not a plain file, or the system's.
    fn append(&self, path: &Path) -> io::Result<Box<dyn Output>>;
    /// Write over the beginning of a file, making it if need be; not durable.
    ///
    /// # Errors
    /// The system's.
    fn overwrite(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;
    /// A whole plain file.
    ///
    /// # Errors
    /// `NotFound`, `InvalidInput` for what is not a plain file, or the system's.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// A whole plain file that never changes again.
    ///
    /// # Errors
    /// As [`Storage::read`].
    fn map(&self, path: &Path) -> io::Result<Region>;
    /// Length of a plain file.
    ///
    /// # Errors
    /// As [`Storage::read`].
    fn file_len(&self, path: &Path) -> io::Result<u64>;
    /// The entries of a directory, sorted by name (a name that is not UTF-8 comes with replacement
    /// characters, so opening it fails).
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
    /// Give a file or directory another name.
    ///
    /// # Errors
    /// The system's.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Give a file that never changes again a second name; `original` is as [`Storage::locate`] says.
    ///
    /// # Errors
    /// The system's: not every file system has links, and none has them across devices.
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
    /// Take the writer's lock and leave `message` in it.
    ///
    /// # Errors
    /// `WouldBlock`, with the holder's message, if another holds it; else the system's.
    fn lock(&self, path: &Path, message: &str) -> io::Result<Box<dyn Lock>>;
}

/// A directory of the file system.
#[derive(Debug)]
pub struct FileStorage {
    root: PathBuf,
}

impl FileStorage {
    /// `root` need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Opens only what is a plain file by its own name, so that neither a link nor a pipe is followed.
    fn open(&self, path: &Path, options: &OpenOptions) -> io::Result<File> {
        let path = self.root.join(path);
        if !fs::symlink_metadata(&path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file"));
        }
        options.open(path)
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
}

struct FileLock {
    file: File,
    process: u32,
}

impl Lock for FileLock {}

impl Drop for FileLock {
    fn drop(&mut self) {
        // A child that was forked since has the file open, too, so that closing it here would release nothing; and
        // the child's own copy must not release what is still held here.
        if self.process == std::process::id() {
            let _ = self.file.unlock();
        }
    }
}

impl Storage for FileStorage {
    fn locate(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let path = self.root.join(path);
        let mut builder = fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        match builder.create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            result => result,
        }
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        let mut options = private();
        options.append(true).create_new(true);
        Ok(Box::new(FileOutput(options.open(self.root.join(path))?)))
    }

    fn append(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        Ok(Box::new(FileOutput(self.open(path, OpenOptions::new().append(true))?)))
    }

    fn overwrite(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        match self.open(path, OpenOptions::new().write(true)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Under its name only when it is whole: a process may die in between.
                let name = self.root.join(path);
                let fresh = name.with_extension("new");
                let _ = fs::remove_file(&fresh);
                let created = private().write(true).create_new(true).open(&fresh);
                let written = created
                    .and_then(|mut file| file.write_all(bytes))
                    .and_then(|()| fs::rename(&fresh, name));
                if written.is_err() {
                    let _ = fs::remove_file(&fresh);
                }
                written
            }
            result => result?.write_all(bytes),
        }
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(path, OpenOptions::new().read(true))?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn map(&self, path: &Path) -> io::Result<Region> {
        Region::map(&mut self.open(path, OpenOptions::new().read(true))?)
    }

    fn file_len(&self, path: &Path) -> io::Result<u64> {
        Ok(self.open(path, OpenOptions::new().read(true))?.metadata()?.len())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(self.root.join(path))? {
            let entry = entry?;
            let kind = entry.file_type()?;
            let name = entry.file_name().to_string_lossy().into_owned();
            entries.push(Entry { name, is_dir: kind.is_dir(), is_file: kind.is_file() });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        self.open(path, OpenOptions::new().read(true))?.sync_all()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        // Windows has no handle of a directory to sync; its names are journaled.
        if cfg!(windows) {
            return Ok(());
        }
        let path = self.root.join(path);
        File::open(if path.as_os_str().is_empty() { Path::new(".") } else { &path })?.sync_all()
    }

    fn sync_parent(&self) -> io::Result<()> {
        let root = std::path::absolute(&self.root)?;
        root.parent().map_or(Ok(()), |parent| self.sync_dir(parent))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(self.root.join(from), self.root.join(to))
    }

    fn link(&self, original: &Path, path: &Path) -> io::Result<()> {
        fs::hard_link(original, self.root.join(path))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(self.root.join(path))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(self.root.join(path))
    }

    fn lock(&self, path: &Path, message: &str) -> io::Result<Box<dyn Lock>> {
        let full = self.root.join(path);
        let mut options = private();
        options.read(true).write(true);
        let mut file = match options.clone().create_new(true).open(&full) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.open(path, &options)?
            }
            result => result?,
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = file.take(1024).read_to_string(&mut holder);
                return Err(io::Error::new(io::ErrorKind::WouldBlock, holder));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // What is in the file is only a message for people, so losing it is no error.
        let _ = file
            .set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| file.write_all(message.as_bytes()));
        Ok(Box::new(FileLock { file, process: std::process::id() }))
    }
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

/// Publish a finished directory under its final name: sync everything in it, rename, sync the parent.
///
/// When this returns, `finished` survives a power cut with everything that was in `staged`. Both paths
/// must lie on one file system.
///
/// # Errors
/// `NotFound`, `Exists`, `Invalid` for something that is neither file nor directory, `Io`.
pub fn publish_directory(storage: &dyn Storage, staged: &Path, finished: &Path) -> Result<()> {
    if storage.list(finished).is_ok() {
        return Err(PoolError::Exists { path: storage.locate(finished) });
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
        // What a process left that died between making the file and writing it.
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
