//! Access to one directory without following links.
//!
//! A pool may come from a stranger, so its content must not decide which file is touched. The path to the directory
//! may contain links, since the user chose it. Nothing beneath it may be a link. A file is opened first and then
//! checked through its descriptor, so that it cannot be replaced in between.

use std::ffi::OsStr;
use std::fs::FileType;
use std::io;
use std::path::{Component, Path};

use crate::error::Misplaced;

#[cfg_attr(unix, path = "beneath/unix.rs")]
#[cfg_attr(not(unix), path = "beneath/portable.rs")]
mod system;

pub(crate) use system::{Beneath, is_shared};

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// To read it.
    Read,
    /// To read it and write over it.
    Write,
    /// To write at its end.
    Append,
}

/// What an entry of a directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    File,
    Directory,
    Link,
    Other,
}

impl From<FileType> for Found {
    fn from(kind: FileType) -> Self {
        if kind.is_symlink() {
            Self::Link
        } else if kind.is_file() {
            Self::File
        } else if kind.is_dir() {
            Self::Directory
        } else {
            Self::Other
        }
    }
}

impl Found {
    /// The error if this is not a plain file, which belongs at `path`; None if it is one.
    fn refuse_as_file(self, path: &Path) -> Option<io::Error> {
        let found = match self {
            Self::File => return None,
            Self::Link => return Some(Misplaced::link(path).into()),
            Self::Directory => "a directory",
            Self::Other => "a pipe, a socket or a device",
        };
        Some(Misplaced::other(path, found, "a plain file").into())
    }

    /// The error if this is not a directory, which belongs at `path`; None if it is one, or a file, for which the system
    /// has an error of its own.
    fn refuse_as_directory(self, path: &Path) -> Option<io::Error> {
        match self {
            Self::File | Self::Directory => None,
            Self::Link => Some(Misplaced::link(path).into()),
            Self::Other => {
                let found = "a pipe, a socket or a device";
                Some(Misplaced::other(path, found, "a directory").into())
            }
        }
    }
}

/// The names that lead to `path`, each in the directory before it.
///
/// # Errors
/// `InvalidInput` for a path that leads out of the directory that it begins in.
fn names(path: &Path) -> io::Result<Vec<&OsStr>> {
    let name = |component| {
        if let Component::Normal(name) = component {
            return Ok(name);
        }
        let what = format!("{} leads out of its directory", path.display());
        Err(io::Error::new(io::ErrorKind::InvalidInput, what))
    };
    path.components().filter(|component| *component != Component::CurDir).map(name).collect()
}

/// The directory of `path`, and its name in there.
///
/// # Errors
/// `InvalidInput` for a path without a name.
fn split(path: &Path) -> io::Result<(&Path, &OsStr)> {
    let name = path.file_name().ok_or_else(|| {
        let what = format!("{} does not name an entry of a directory", path.display());
        io::Error::new(io::ErrorKind::InvalidInput, what)
    })?;
    Ok((path.parent().unwrap_or(Path::new("")), name))
}
