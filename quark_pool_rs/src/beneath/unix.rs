//! By descriptors: each directory is opened in the one before it, by a name that may not be a link.
#![expect(clippy::disallowed_methods, reason = "this is a room that touches files")]

use std::ffi::{CStr, OsStr};
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, linkat, mkdirat, openat, renameat, statat, unlinkat,
};
use rustix::io::{Errno, retry_on_intr};

use super::{Access, Found, names, split};

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// A pipe that nobody writes to is opened without waiting, and no terminal becomes that of the process.
const FILE: OFlags =
    OFlags::NOFOLLOW.union(OFlags::NONBLOCK).union(OFlags::NOCTTY).union(OFlags::CLOEXEC);

/// A directory, held open from the first use on.
#[derive(Debug)]
pub(crate) struct Beneath {
    path: PathBuf,
    opened: OnceLock<OwnedFd>,
}

impl Beneath {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, opened: OnceLock::new() }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn root(&self) -> io::Result<BorrowedFd<'_>> {
        if let Some(root) = self.opened.get() {
            return Ok(root.as_fd());
        }
        let path = if self.path.as_os_str().is_empty() { Path::new(".") } else { &self.path };
        let root = retry_on_intr(|| openat(CWD, path, DIRECTORY, Mode::empty()))?;
        Ok(self.opened.get_or_init(|| root).as_fd())
    }

    fn directory(&self, path: &Path) -> io::Result<OwnedFd> {
        let flags = DIRECTORY | OFlags::NOFOLLOW;
        let open = |at: BorrowedFd<'_>, name: &OsStr| {
            retry_on_intr(|| openat(at, name, flags, Mode::empty()))
        };
        let mut directory = open(self.root()?, OsStr::new("."))?;
        let mut so_far = PathBuf::new();
        for name in names(path)? {
            so_far.push(name);
            directory = match open(directory.as_fd(), name) {
                Ok(directory) => directory,
                Err(errno) => {
                    let found = found(directory.as_fd(), name).ok();
                    let refusal = found.and_then(|found| found.refuse_as_directory(&so_far));
                    return Err(refusal.unwrap_or_else(|| errno.into()));
                }
            };
        }
        Ok(directory)
    }

    fn holder<'p>(&self, path: &'p Path) -> io::Result<(OwnedFd, &'p OsStr)> {
        let (directory, name) = split(path)?;
        Ok((self.directory(directory)?, name))
    }

    /// Open a plain file.
    ///
    /// # Errors
    /// `NotFound`, `Misplaced` for what is not a plain file, or the system's.
    pub(crate) fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        let flags = match access {
            Access::Read => OFlags::RDONLY,
            Access::Write => OFlags::RDWR,
            Access::Append => OFlags::WRONLY | OFlags::APPEND,
        };
        let (directory, name) = self.holder(path)?;
        match retry_on_intr(|| openat(&directory, name, flags | FILE, Mode::empty())) {
            Ok(opened) => {
                let file = File::from(opened);
                let found = Found::from(file.metadata()?.file_type());
                found.refuse_as_file(path).map_or(Ok(file), Err)
            }
            Err(errno) => {
                let found = found(directory.as_fd(), name).ok();
                let refusal = found.and_then(|found| found.refuse_as_file(path));
                Err(refusal.unwrap_or_else(|| errno.into()))
            }
        }
    }

    /// Make a file that must not be there, to write at its end.
    pub(crate) fn create(&self, path: &Path) -> io::Result<File> {
        let (directory, name) = self.holder(path)?;
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::EXCL | FILE;
        let mode = Mode::RUSR | Mode::WUSR;
        Ok(File::from(retry_on_intr(|| openat(&directory, name, flags, mode))?))
    }

    /// Make a directory, or the root itself; whether it was not there before.
    pub(crate) fn create_directory(&self, path: &Path) -> io::Result<bool> {
        if path.as_os_str().is_empty() {
            return match DirBuilder::new().mode(0o700).create(&self.path) {
                Ok(()) => Ok(true),
                Err(error) => match self.root() {
                    Ok(_) => Ok(false),
                    Err(_) => Err(error),
                },
            };
        }
        let (directory, name) = self.holder(path)?;
        match mkdirat(&directory, name, Mode::RWXU) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => match found(directory.as_fd(), name)? {
                Found::Directory => Ok(false),
                other => {
                    let refusal = other.refuse_as_directory(path);
                    Err(refusal.unwrap_or_else(|| Errno::EXIST.into()))
                }
            },
            Err(errno) => Err(errno.into()),
        }
    }

    /// The entries of a directory, in no order.
    pub(crate) fn entries(&self, path: &Path) -> io::Result<Vec<(String, Found)>> {
        let directory = self.directory(path)?;
        let mut entries = Vec::new();
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name: &CStr = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let name = OsStr::from_bytes(name.to_bytes());
            let found = match entry.file_type() {
                // Not every file system says it here.
                FileType::Unknown => found(directory.as_fd(), name)?,
                kind => kind.into(),
            };
            entries.push((name.to_string_lossy().into_owned(), found));
        }
        Ok(entries)
    }

    /// Make a directory's names durable.
    pub(crate) fn sync_directory(&self, path: &Path) -> io::Result<()> {
        File::from(self.directory(path)?).sync_all()
    }

    /// Make the root's own name durable.
    pub(crate) fn sync_parent(&self) -> io::Result<()> {
        let root = self.root()?;
        let parent = retry_on_intr(|| openat(root, "..", DIRECTORY, Mode::empty()))?;
        File::from(parent).sync_all()
    }

    /// Give an entry another name; what has that name is replaced, a link and not what it leads to.
    pub(crate) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (old, from) = self.holder(from)?;
        let (new, to) = self.holder(to)?;
        Ok(renameat(&old, from, &new, to)?)
    }

    /// Give a plain file a second name; `original` lies in a directory that is not a link, anywhere.
    pub(crate) fn link(&self, original: &Path, path: &Path) -> io::Result<()> {
        let (from, original) = split(original)?;
        let from = openat(CWD, from, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
        let (directory, name) = self.holder(path)?;
        linkat(&from, original, &directory, name, AtFlags::empty())?;
        // Looked at under the new name, which nobody else gives to another file.
        match found(directory.as_fd(), name)?.refuse_as_file(path) {
            None => Ok(()),
            Some(refusal) => {
                unlinkat(&directory, name, AtFlags::empty())?;
                Err(refusal)
            }
        }
    }

    /// Remove a name of what is not a directory.
    pub(crate) fn remove(&self, path: &Path) -> io::Result<()> {
        let (directory, name) = self.holder(path)?;
        Ok(unlinkat(&directory, name, AtFlags::empty())?)
    }

    /// Remove an empty directory.
    pub(crate) fn remove_directory(&self, path: &Path) -> io::Result<()> {
        let (directory, name) = self.holder(path)?;
        Ok(unlinkat(&directory, name, AtFlags::REMOVEDIR)?)
    }

    /// Whether an open file is the one at `path`.
    #[allow(clippy::unnecessary_cast, reason = "not every system has 64 bits there")]
    pub(crate) fn is_at(&self, path: &Path, file: &File) -> io::Result<bool> {
        let (directory, name) = self.holder(path)?;
        let (ours, there) = match statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(there) => (file.metadata()?, there),
            Err(Errno::NOENT) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        };
        Ok((ours.dev(), ours.ino()) == (there.st_dev as u64, there.st_ino as u64))
    }
}

/// Whether an open file has more than one name.
pub(crate) fn is_shared(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.nlink() > 1)
}

fn found(directory: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<Found> {
    let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(stat.st_mode).into())
}

impl From<FileType> for Found {
    fn from(kind: FileType) -> Self {
        match kind {
            FileType::RegularFile => Self::File,
            FileType::Directory => Self::Directory,
            FileType::Symlink => Self::Link,
            _ => Self::Other,
        }
    }
}
