//! A disk in memory that can lose what was not synced, and refuse operations.
//!
//! Every mutation is one entry of a log. A crash image is the log up to some entry, where an effect that no
//! later sync of its file or directory covers may be missing: writes in pieces of 512 bytes, and names.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use quark_pool_rs::checksum::sum128;
use quark_pool_rs::error::Misplaced;
use quark_pool_rs::mapping::Region;
use quark_pool_rs::storage::{Entry, Lock, Output, Storage};

const PIECE: usize = 512;

#[derive(Debug, Clone)]
enum Op {
    Write {
        file: usize,
        offset: usize,
        bytes: Vec<u8>,
    },
    Truncate {
        file: usize,
        len: usize,
    },
    Link {
        path: PathBuf,
        node: Node,
    },
    Unlink {
        path: PathBuf,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    SyncFile {
        file: usize,
    },
    SyncDir {
        path: PathBuf,
    },
    /// A sync that failed: what was pending is clean in memory and never reaches the disk.
    LoseFile {
        file: usize,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    File(usize),
    Dir,
}

/// What the disk does instead of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A write that stops half-way with "no space".
    NoSpace,
    /// Any operation fails with an I/O error; a sync then loses what was pending.
    Io,
    /// A write that stops half-way at the user's quota.
    Quota,
    /// A signal came in between.
    Interrupted,
    /// Too many open files; a write that writes nothing.
    NoDescriptor,
    /// A write that says it failed and had written everything.
    Late,
}

impl Fault {
    pub const ALL: [Self; 6] =
        [Self::NoSpace, Self::Io, Self::Quota, Self::Interrupted, Self::NoDescriptor, Self::Late];

    fn error(self) -> io::Error {
        io::Error::from_raw_os_error(match self {
            Self::NoSpace => 28,
            Self::Io | Self::Late => 5,
            Self::Quota => 122,
            Self::Interrupted => 4,
            Self::NoDescriptor => 24,
        })
    }

    /// How much of a failing write reaches the file.
    fn written(self, len: usize) -> usize {
        match self {
            Self::NoDescriptor => 0,
            Self::Late => len,
            _ => len / 2,
        }
    }
}

#[derive(Default)]
struct Inner {
    ops: Vec<Op>,
    contents: Vec<Vec<u8>>,
    names: BTreeMap<PathBuf, Option<usize>>,
    locked: HashSet<PathBuf>,
    calls: usize,
    fault: Option<(usize, bool, Fault)>,
    /// Syncs of paths that begin with this and are (directory or not) do nothing, or come late.
    wrong_syncs: Option<(String, bool)>,
    are_late: bool,
    late_syncs: Vec<Op>,
    refuses_links: bool,
    synced_after_failure: bool,
    failed: HashSet<usize>,
    /// So many reads from now.
    interruption: Option<(usize, Box<dyn FnOnce() + Send>)>,
    /// After a file was read, before its reader goes on.
    delay: Option<(PathBuf, Box<dyn FnOnce() + Send>)>,
}

/// The disk; clones share it.
#[derive(Clone, Default)]
pub struct Disk(Arc<Mutex<Inner>>);

impl Disk {
    pub fn storage(&self) -> Arc<dyn Storage> {
        Arc::new(self.clone())
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    /// Length of the log.
    pub fn num_ops(&self) -> usize {
        self.inner().ops.len()
    }

    /// Operations that could have failed so far.
    pub fn num_calls(&self) -> usize {
        self.inner().calls
    }

    /// Let operation number `at`, or all from it on, fail.
    pub fn set_fault(&self, at: usize, from_then_on: bool, fault: Fault) {
        self.inner().fault = Some((at, from_then_on, fault));
    }

    /// Count as if there had been so many operations.
    pub fn set_calls(&self, calls: usize) {
        self.inner().calls = calls;
    }

    /// Clear a fault that has struck.
    pub fn clear_fault_if(&self, is_over: bool) {
        let mut inner = self.inner();
        if is_over && inner.fault.is_some_and(|(at, _, _)| inner.calls >= at) {
            inner.fault = None;
        }
    }

    pub fn clear_fault(&self) {
        self.inner().fault = None;
    }

    /// Let syncs of files (or directories) below a path do nothing.
    pub fn ignore_syncs(&self, prefix: &str, of_directories: bool) {
        self.inner().wrong_syncs = Some((prefix.to_owned(), of_directories));
    }

    /// Let them come only after the next operation that is no sync: two steps in the wrong order.
    pub fn delay_syncs(&self, prefix: &str, of_directories: bool) {
        self.ignore_syncs(prefix, of_directories);
        self.inner().are_late = true;
    }

    /// Do something after so many more reads of files and directories, before the next one.
    pub fn interrupt_after(&self, reads: usize, work: impl FnOnce() + Send + 'static) {
        self.inner().interruption = Some((reads, Box::new(work)));
    }

    /// Whether that is still to come.
    pub fn is_to_be_interrupted(&self) -> bool {
        self.inner().interruption.is_some()
    }

    /// Do something after a file was read, before its reader goes on.
    pub fn delay_after(&self, path: impl Into<PathBuf>, work: impl FnOnce() + Send + 'static) {
        self.inner().delay = Some((path.into(), Box::new(work)));
    }

    fn before_read(&self) {
        let due = match &mut self.inner().interruption {
            Some((reads @ 1.., _)) => {
                *reads -= 1;
                None
            }
            interruption => interruption.take(),
        };
        if let Some((_, work)) = due {
            work();
        }
    }

    /// Be a file system without hard links.
    pub fn refuse_links(&self) {
        self.inner().refuses_links = true;
    }

    /// A directory of the disk as a disk of its own.
    pub fn below(&self, root: &str) -> Arc<dyn Storage> {
        Arc::new(Below { disk: self.clone(), root: root.into() })
    }

    /// Whether a file was synced again after its sync had failed.
    pub fn retried_a_failed_sync(&self) -> bool {
        self.inner().synced_after_failure
    }

    /// All files with their content.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let inner = self.inner();
        let files = inner.names.iter().filter_map(|(path, file)| file.map(|f| (path, f)));
        files.map(|(path, file)| (path.clone(), inner.contents[file].clone())).collect()
    }

    /// A disk with these files (and their directories), all of it durable.
    pub fn with_files(files: &[(PathBuf, Vec<u8>)]) -> Self {
        let disk = Self::default();
        {
            let mut inner = disk.inner();
            for (path, bytes) in files {
                let mut parent = path.parent();
                while let Some(directory) = parent.filter(|p| !p.as_os_str().is_empty()) {
                    inner.names.insert(directory.to_path_buf(), None);
                    parent = directory.parent();
                }
                inner.contents.push(bytes.clone());
                let file = inner.contents.len() - 1;
                inner.names.insert(path.clone(), Some(file));
            }
        }
        disk
    }

    /// Effects of the first `crash` operations that may be lost, by position.
    pub fn pending(&self, crash: usize) -> Vec<(usize, usize)> {
        let inner = self.inner();
        let mut pending = Vec::new();
        for (at, op) in inner.ops[..crash].iter().enumerate() {
            let later = &inner.ops[at + 1..crash];
            let is_pending = match op {
                Op::Write { file, .. } | Op::Truncate { file, .. } => later
                    .iter()
                    .find_map(|op| match op {
                        Op::SyncFile { file: synced } if synced == file => Some(false),
                        Op::LoseFile { file: lost } if lost == file => Some(true),
                        _ => None,
                    })
                    .unwrap_or(true),
                Op::Link { path, .. } | Op::Unlink { path } | Op::Rename { to: path, .. } => {
                    !later.iter().any(|op| match op {
                        Op::SyncDir { path: synced } => Some(&**synced) == path.parent(),
                        _ => false,
                    })
                }
                _ => false,
            };
            if is_pending {
                let pieces = match op {
                    Op::Write { bytes, .. } => bytes.len().div_ceil(PIECE),
                    _ => 1,
                };
                pending.extend((0..pieces).map(|piece| (at, piece)));
            }
        }
        pending
    }

    /// The same disk with everything on it as the beginning of its log, all of it durable;
    /// and the length of that beginning.
    pub fn rebased(&self) -> (Self, usize) {
        let (files, directories) = {
            let inner = self.inner();
            let directories: Vec<PathBuf> =
                inner.names.iter().filter(|(_, f)| f.is_none()).map(|(p, _)| p.clone()).collect();
            (inner.names.clone(), directories)
        };
        let disk = Self::default();
        {
            let contents = self.inner().contents.clone();
            let mut inner = disk.inner();
            inner.contents = vec![Vec::new(); contents.len()];
            for directory in &directories {
                inner.link(directory, Node::Dir);
            }
            for (path, file) in &files {
                if let Some(file) = *file {
                    inner.link(path, Node::File(file));
                    inner.write(file, 0, &contents[file]);
                    inner.ops.push(Op::SyncFile { file });
                }
            }
            for directory in directories.iter().map(PathBuf::as_path).chain([Path::new("")]) {
                inner.ops.push(Op::SyncDir { path: directory.to_path_buf() });
            }
        }
        let base = disk.num_ops();
        (disk, base)
    }

    /// A hash of all names and of what the files hold: equal disks are equal for whoever opens them.
    pub fn fingerprint(&self) -> [u8; 16] {
        let inner = self.inner();
        let mut bytes = Vec::new();
        for (path, file) in &inner.names {
            bytes.extend_from_slice(path.as_os_str().as_encoded_bytes());
            bytes.push(0);
            if let Some(file) = file {
                bytes.extend_from_slice(&sum128(&inner.contents[*file]));
            }
        }
        sum128(&bytes)
    }

    /// The disk after a power cut at `crash`, without the effects in `lost`.
    pub fn image(&self, crash: usize, lost: &HashSet<(usize, usize)>) -> Self {
        let inner = self.inner();
        let mut contents: Vec<Vec<u8>> = vec![Vec::new(); inner.contents.len()];
        let mut names: BTreeMap<PathBuf, Option<usize>> = BTreeMap::new();
        for (at, op) in inner.ops[..crash].iter().enumerate() {
            match op {
                Op::Write { file, offset, bytes } => {
                    for (piece, bytes) in bytes.chunks(PIECE).enumerate() {
                        if lost.contains(&(at, piece)) {
                            continue;
                        }
                        let content = &mut contents[*file];
                        let start = offset + piece * PIECE;
                        content.resize(content.len().max(start + bytes.len()), 0);
                        content[start..start + bytes.len()].copy_from_slice(bytes);
                    }
                }
                _ if lost.contains(&(at, 0)) => {}
                Op::Truncate { file, len } => contents[*file].truncate(*len),
                Op::Link { path, node } => {
                    let file = match node {
                        Node::File(file) => Some(*file),
                        Node::Dir => None,
                    };
                    names.insert(path.clone(), file);
                }
                Op::Unlink { path } => {
                    names.remove(path);
                }
                Op::Rename { from, to } => rename(&mut names, from, to),
                _ => {}
            }
        }
        // What lies in a directory whose own name was lost cannot be reached.
        let reachable = |path: &Path| {
            path.ancestors().skip(1).all(|p| p.as_os_str().is_empty() || names.contains_key(p))
        };
        let kept: BTreeMap<_, _> = names
            .iter()
            .filter(|(path, _)| reachable(path))
            .map(|(p, n)| (p.clone(), *n))
            .collect();
        let image = Self::default();
        *image.inner() = Inner { contents, names: kept, ..Inner::default() };
        image
    }
}

/// Move a name and everything below it.
fn rename(names: &mut BTreeMap<PathBuf, Option<usize>>, from: &Path, to: &Path) {
    let moved: Vec<PathBuf> = names.keys().filter(|path| path.starts_with(from)).cloned().collect();
    for path in moved {
        let file = names.remove(&path).unwrap();
        let below = path.strip_prefix(from).unwrap();
        let target = if below.as_os_str().is_empty() { to.to_path_buf() } else { to.join(below) };
        names.insert(target, file);
    }
}

impl Inner {
    /// Count a call, and fail it if its turn has come.
    fn step(&mut self) -> io::Result<()> {
        self.calls += 1;
        match self.fault {
            Some((at, forever, fault)) if self.calls == at || forever && self.calls > at => {
                Err(fault.error())
            }
            _ => Ok(()),
        }
    }

    fn file(&self, path: &Path) -> io::Result<usize> {
        match self.names.get(path) {
            Some(Some(file)) => Ok(*file),
            Some(None) => Err(Misplaced::other(path, "a directory", "a plain file").into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn num_names(&self, file: usize) -> usize {
        self.names.values().filter(|named| **named == Some(file)).count()
    }

    fn check_parent(&self, path: &Path) -> io::Result<()> {
        match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() && !self.names.contains_key(parent) => {
                Err(io::ErrorKind::NotFound.into())
            }
            _ => Ok(()),
        }
    }

    fn link(&mut self, path: &Path, node: Node) {
        let file = match node {
            Node::File(file) => Some(file),
            Node::Dir => None,
        };
        self.names.insert(path.to_path_buf(), file);
        self.log(Op::Link { path: path.to_path_buf(), node });
    }

    fn new_file(&mut self, path: &Path) -> usize {
        self.contents.push(Vec::new());
        let file = self.contents.len() - 1;
        self.link(path, Node::File(file));
        file
    }

    fn write(&mut self, file: usize, offset: usize, bytes: &[u8]) {
        let content = &mut self.contents[file];
        content.resize(content.len().max(offset + bytes.len()), 0);
        content[offset..offset + bytes.len()].copy_from_slice(bytes);
        self.log(Op::Write { file, offset, bytes: bytes.to_vec() });
    }

    /// Log an operation that is no sync, and the syncs that come late.
    fn log(&mut self, op: Op) {
        self.ops.push(op);
        self.ops.append(&mut self.late_syncs);
    }

    fn log_sync(&mut self, path: &Path, is_directory: bool, op: Op) {
        if !self.is_wrong(path, is_directory) {
            self.ops.push(op);
        } else if self.are_late {
            self.late_syncs.push(op);
        }
    }

    fn is_wrong(&self, path: &Path, is_directory: bool) -> bool {
        self.wrong_syncs.as_ref().is_some_and(|(prefix, of_directories)| {
            *of_directories == is_directory
                && if prefix.is_empty() {
                    path.as_os_str().is_empty()
                } else {
                    path.starts_with(prefix)
                }
        })
    }
}

struct FakeOutput {
    disk: Disk,
    path: PathBuf,
    file: usize,
}

impl Output for FakeOutput {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut inner = self.disk.inner();
        let end = inner.contents[self.file].len();
        if let Err(error) = inner.step() {
            let (_, _, fault) = inner.fault.expect("it has just struck");
            inner.write(self.file, end, &bytes[..fault.written(bytes.len())]);
            return Err(error);
        }
        inner.write(self.file, end, bytes);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut inner = self.disk.inner();
        let file = self.file;
        inner.synced_after_failure |= inner.failed.contains(&file);
        if let Err(error) = inner.step() {
            inner.failed.insert(file);
            inner.ops.push(Op::LoseFile { file });
            return Err(error);
        }
        inner.log_sync(&self.path, false, Op::SyncFile { file });
        Ok(())
    }

    fn truncate(&mut self, len: u64) -> io::Result<()> {
        let mut inner = self.disk.inner();
        inner.step()?;
        let (file, len) = (self.file, len as usize);
        inner.contents[file].truncate(len);
        inner.log(Op::Truncate { file, len });
        Ok(())
    }

    fn seal(&mut self) -> io::Result<()> {
        self.disk.inner().step()
    }

    fn is_shared(&self) -> io::Result<bool> {
        let mut inner = self.disk.inner();
        inner.step()?;
        Ok(inner.num_names(self.file) > 1)
    }
}

struct FakeLock(Disk, PathBuf);

impl Lock for FakeLock {}

impl Drop for FakeLock {
    fn drop(&mut self) {
        self.0.inner().locked.remove(&self.1);
    }
}

impl Storage for Disk {
    fn locate(&self, path: &Path) -> PathBuf {
        path.to_path_buf()
    }

    fn create_dir(&self, path: &Path) -> io::Result<bool> {
        let mut inner = self.inner();
        inner.step()?;
        inner.check_parent(path)?;
        let is_new = !path.as_os_str().is_empty() && !inner.names.contains_key(path);
        if is_new {
            inner.link(path, Node::Dir);
        }
        Ok(is_new)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        let mut inner = self.inner();
        inner.step()?;
        inner.check_parent(path)?;
        if inner.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = inner.new_file(path);
        Ok(Box::new(FakeOutput { disk: self.clone(), path: path.to_path_buf(), file }))
    }

    fn append(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        let mut inner = self.inner();
        inner.step()?;
        let file = inner.file(path)?;
        Ok(Box::new(FakeOutput { disk: self.clone(), path: path.to_path_buf(), file }))
    }

    fn overwrite(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut inner = self.inner();
        inner.step()?;
        match inner.file(path) {
            Ok(file) if inner.num_names(file) == 1 => inner.write(file, 0, bytes),
            Ok(_) => {
                let fresh = path.with_extension("new");
                let file = inner.new_file(&fresh);
                inner.write(file, 0, bytes);
                rename(&mut inner.names, &fresh, path);
                inner.log(Op::Rename { from: fresh, to: path.to_path_buf() });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let file = inner.new_file(path);
                inner.write(file, 0, bytes);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.before_read();
        let mut inner = self.inner();
        inner.step()?;
        let bytes = inner.file(path).map(|file| inner.contents[file].clone())?;
        let delay = inner.delay.take_if(|(of, _)| of.as_path() == path);
        drop(inner);
        if let Some((_, work)) = delay {
            work();
        }
        Ok(bytes)
    }

    fn map(&self, path: &Path) -> io::Result<Region> {
        self.before_read();
        let mut inner = self.inner();
        inner.step()?;
        inner.file(path).map(|file| Region::copy(&inner.contents[file]))
    }

    fn file_len(&self, path: &Path) -> io::Result<u64> {
        let mut inner = self.inner();
        inner.step()?;
        inner.file(path).map(|file| inner.contents[file].len() as u64)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.before_read();
        let mut inner = self.inner();
        inner.step()?;
        if !path.as_os_str().is_empty() && inner.names.get(path) != Some(&None) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let children = inner.names.iter().filter(|(child, _)| child.parent() == Some(path));
        Ok(children
            .map(|(child, file)| Entry {
                name: child.file_name().unwrap().to_string_lossy().into_owned(),
                is_dir: file.is_none(),
                is_file: file.is_some(),
            })
            .collect())
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        let file = self.inner().file(path)?;
        FakeOutput { disk: self.clone(), path: path.to_path_buf(), file }.sync()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut inner = self.inner();
        inner.step()?;
        if !path.as_os_str().is_empty() && inner.names.get(path) != Some(&None) {
            return Err(io::ErrorKind::NotFound.into());
        }
        inner.log_sync(path, true, Op::SyncDir { path: path.to_path_buf() });
        Ok(())
    }

    fn sync_parent(&self) -> io::Result<()> {
        self.inner().step()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut inner = self.inner();
        inner.step()?;
        if !inner.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        rename(&mut inner.names, from, to);
        inner.log(Op::Rename { from: from.to_path_buf(), to: to.to_path_buf() });
        Ok(())
    }

    fn link(&self, original: &Path, path: &Path) -> io::Result<()> {
        let mut inner = self.inner();
        inner.step()?;
        inner.check_parent(path)?;
        if inner.refuses_links || inner.names.contains_key(path) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let file = inner.file(original)?;
        inner.link(path, Node::File(file));
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut inner = self.inner();
        inner.step()?;
        if inner.names.get(path) != Some(&None)
            || inner.names.keys().any(|child| child.parent() == Some(path))
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        inner.names.remove(path);
        inner.log(Op::Unlink { path: path.to_path_buf() });
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut inner = self.inner();
        inner.step()?;
        inner.file(path)?;
        inner.names.remove(path);
        inner.log(Op::Unlink { path: path.to_path_buf() });
        Ok(())
    }

    fn lock(&self, path: &Path, message: &str) -> io::Result<Box<dyn Lock>> {
        let mut inner = self.inner();
        inner.step()?;
        if !inner.locked.insert(path.to_path_buf()) {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, message.to_owned()));
        }
        if !inner.names.contains_key(path) {
            inner.new_file(path);
        }
        Ok(Box::new(FakeLock(self.clone(), path.to_path_buf())))
    }
}

/// A directory of a disk.
struct Below {
    disk: Disk,
    root: PathBuf,
}

impl Below {
    fn at(&self, path: &Path) -> PathBuf {
        if path.as_os_str().is_empty() { self.root.clone() } else { self.root.join(path) }
    }
}

impl Storage for Below {
    fn locate(&self, path: &Path) -> PathBuf {
        self.at(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<bool> {
        self.disk.create_dir(&self.at(path))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        self.disk.create(&self.at(path))
    }

    fn append(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        self.disk.append(&self.at(path))
    }

    fn overwrite(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.disk.overwrite(&self.at(path), bytes)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.disk.read(&self.at(path))
    }

    fn map(&self, path: &Path) -> io::Result<Region> {
        self.disk.map(&self.at(path))
    }

    fn file_len(&self, path: &Path) -> io::Result<u64> {
        self.disk.file_len(&self.at(path))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.disk.list(&self.at(path))
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        self.disk.sync_file(&self.at(path))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.sync_dir(&self.at(path))
    }

    fn sync_parent(&self) -> io::Result<()> {
        self.disk.sync_dir(self.root.parent().unwrap_or(Path::new("")))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(&self.at(from), &self.at(to))
    }

    fn link(&self, original: &Path, path: &Path) -> io::Result<()> {
        self.disk.link(original, &self.at(path))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(&self.at(path))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.remove_dir(&self.at(path))
    }

    fn lock(&self, path: &Path, message: &str) -> io::Result<Box<dyn Lock>> {
        self.disk.lock(&self.at(path), message)
    }
}
