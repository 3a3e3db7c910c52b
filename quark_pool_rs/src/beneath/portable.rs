//! By paths, where the system has no descriptors of directories: looked at before they are used.
#![expect(clippy::disallowed_methods, reason = "this is a room that touches files")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use super::{Access, Found, names, split};

/// A directory.
#[derive(Debug)]
pub(crate) struct Beneath {
    path: PathBuf,
}

impl Beneath {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn directory(&self, path: &Path) -> io::Result<PathBuf> {
        let mut so_far = PathBuf::new();
        for name in names(path)? {
            so_far.push(name);
            let found = found(&self.path.join(&so_far))?;
            if let Some(refusal) = found.refuse_as_directory(&so_far) {
                return Err(refusal);
            }
        }
        let directory = self.path.join(so_far);
        Ok(if directory.as_os_str().is_empty() { PathBuf::from(".") } else { directory })
    }

    fn entry(&self, path: &Path) -> io::Result<PathBuf> {
        let (directory, name) = split(path)?;
        Ok(self.directory(directory)?.join(name))
    }

    /// Open a plain file.
    ///
    /// # Errors
    /// `NotFound`, `Misplaced` for what is not a plain file, or the system's.
    pub(crate) fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        let entry = self.entry(path)?;
        if let Some(refusal) = found(&entry)?.refuse_as_file(path) {
            return Err(refusal);
        }
        let mut options = OpenOptions::new();
        match access {
            Access::Read => options.read(true),
            Access::Write => options.read(true).write(true),
            Access::Append => options.append(true),
        };
        options.open(entry)
    }

    /// Make a file that must not be there, to write at its end.
    pub(crate) fn create(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().append(true).create_new(true).open(self.entry(path)?)
    }

    /// Make a directory, or the root itself; whether it was not there before.
    pub(crate) fn create_directory(&self, path: &Path) -> io::Result<bool> {
        let is_root = path.as_os_str().is_empty();
        let entry = if is_root { self.path.clone() } else { self.entry(path)? };
        match fs::create_dir(&entry) {
            Ok(()) => Ok(true),
            Err(_) if is_root && entry.is_dir() => Ok(false),
            Err(error) if is_root || error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            Err(error) => match found(&entry)? {
                Found::Directory => Ok(false),
                other => Err(other.refuse_as_directory(path).unwrap_or(error)),
            },
        }
    }

    /// The entries of a directory, in no order.
    pub(crate) fn entries(&self, path: &Path) -> io::Result<Vec<(String, Found)>> {
        let entry = |entry: io::Result<fs::DirEntry>| {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            Ok((name, entry.file_type()?.into()))
        };
        fs::read_dir(self.directory(path)?)?.map(entry).collect()
    }

    /// Make a directory's names durable: a system without descriptors of directories keeps a journal of them.
    #[expect(clippy::unnecessary_wraps, clippy::unused_self, reason = "other systems can fail")]
    pub(crate) fn sync_directory(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    /// Make the root's own name durable, as [`Beneath::sync_directory`].
    #[expect(clippy::unnecessary_wraps, clippy::unused_self, reason = "other systems can fail")]
    pub(crate) fn sync_parent(&self) -> io::Result<()> {
        Ok(())
    }

    /// Give an entry another name; what has that name is replaced, a link and not what it leads to.
    pub(crate) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(self.entry(from)?, self.entry(to)?)
    }

    /// Give a plain file a second name; `original` lies in a directory that is not a link, anywhere.
    pub(crate) fn link(&self, original: &Path, path: &Path) -> io::Result<()> {
        let (directory, _) = split(original)?;
        if let Some(refusal) = found(directory)?.refuse_as_directory(path) {
            return Err(refusal);
        }
        if let Some(refusal) = found(original)?.refuse_as_file(path) {
            return Err(refusal);
        }
        fs::hard_link(original, self.entry(path)?)
    }

    /// Remove a name of what is not a directory.
    pub(crate) fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(self.entry(path)?)
    }

    /// Remove an empty directory.
    pub(crate) fn remove_directory(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(self.entry(path)?)
    }

    /// Whether an open file is the one at `path`. No name of an open file is given to another one here.
    #[expect(clippy::unnecessary_wraps, clippy::unused_self, reason = "other systems can fail")]
    pub(crate) fn is_at(&self, _path: &Path, _file: &File) -> io::Result<bool> {
        Ok(true)
    }
}

/// Whether an open file has more than one name, as far as the system says.
#[expect(clippy::unnecessary_wraps, reason = "other systems can fail")]
pub(crate) fn is_shared(_file: &File) -> io::Result<bool> {
    Ok(false)
}

fn found(path: &Path) -> io::Result<Found> {
    Ok(fs::symlink_metadata(path)?.file_type().into())
}
