//! The disk that there is: every operation on a real folder, with what stands in its way.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quark_pool_rs::columns::column;
use quark_pool_rs::error::PoolError;
use quark_pool_rs::fork::fork;
use quark_pool_rs::format::{HEAD, LOCK};
use quark_pool_rs::gather::gather;
use quark_pool_rs::pool::{OpenOptions, Pool};
use quark_pool_rs::quantization::Quantization;
use quark_pool_rs::ranking::{RemainderRule, TieRule};
use quark_pool_rs::snapshot::Snapshot;
use quark_pool_rs::storage::{FileStorage, Storage, publish_directory};
use quark_pool_rs::verify::verify;

use crate::common::disk::Disk;
use crate::common::{Content, Owned, Step, VOCAB, check_content, create, reader, settings, writer};

fn kind<T>(result: io::Result<T>) -> Option<ErrorKind> {
    result.err().map(|error| error.kind())
}

/// A folder and a storage of it.
fn folder() -> (tempfile::TempDir, FileStorage) {
    let folder = tempfile::tempdir().unwrap();
    let storage = FileStorage::new(folder.path());
    (folder, storage)
}

#[test]
fn only_plain_files_are_opened() {
    let (folder, storage) = folder();
    fs::create_dir(folder.path().join("directory")).unwrap();
    fs::write(folder.path().join("file"), "bytes").unwrap();
    let mut others = vec!["directory"];
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("file", folder.path().join("link")).unwrap();
        drop(std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap());
        others.extend(["link", "socket"]);
    }
    for name in others {
        let path = Path::new(name);
        let refused = [
            kind(storage.read(path)),
            kind(storage.map(path)),
            kind(storage.append(path)),
            kind(storage.overwrite(path, b"other")),
            kind(storage.file_len(path)),
            kind(storage.sync_file(path)),
            kind(storage.lock(path, "me")),
        ];
        assert_eq!(refused, [Some(ErrorKind::InvalidInput); 7], "{name}");
    }
    let absent = Path::new("absent");
    let refused = [
        kind(storage.read(absent)),
        kind(storage.map(absent)),
        kind(storage.append(absent)),
        kind(storage.file_len(absent)),
        kind(storage.sync_file(absent)),
        kind(storage.list(absent)),
        kind(storage.sync_dir(absent)),
        kind(storage.remove(absent)),
        kind(storage.remove_dir(absent)),
        kind(storage.rename(absent, Path::new("other"))),
        kind(storage.link(&storage.locate(absent), Path::new("other"))),
        kind(storage.create(Path::new("absent/file"))),
        kind(storage.overwrite(Path::new("absent/file"), b"")),
        kind(storage.create_dir(Path::new("absent/directory"))),
        kind(storage.lock(Path::new("absent/LOCK"), "me")),
    ];
    assert_eq!(refused, [Some(ErrorKind::NotFound); 15]);
    assert_eq!(storage.read(Path::new("file")).unwrap(), b"bytes");
}

#[test]
fn a_file_is_made_once_written_at_its_end_and_sealed() {
    let (_folder, storage) = folder();
    let path = Path::new("file");
    let mut output = storage.create(path).unwrap();
    assert_eq!(kind(storage.create(path)), Some(ErrorKind::AlreadyExists));
    output.write_all(b"one two").unwrap();
    output.truncate(4).unwrap();
    output.write_all(b"three").unwrap();
    output.sync().unwrap();
    storage.append(path).unwrap().write_all(b" four").unwrap();
    assert_eq!(storage.read(path).unwrap(), b"one three four");
    assert_eq!(&*storage.map(path).unwrap(), b"one three four");
    assert_eq!(storage.file_len(path).unwrap(), 14);
    // Over its beginning only.
    storage.overwrite(path, b"ONE").unwrap();
    assert_eq!(storage.read(path).unwrap(), b"ONE three four");
    let metadata = || fs::metadata(storage.locate(path)).unwrap();
    let mode = |at: &Path| {
        use std::os::unix::fs::PermissionsExt;
        fs::metadata(storage.locate(at)).unwrap().permissions().mode() & 0o777
    };
    assert_eq!((metadata().permissions().readonly(), mode(path)), (false, 0o600));
    output.seal().unwrap();
    assert_eq!((metadata().permissions().readonly(), mode(path)), (true, 0o400));
    storage.sync_file(path).unwrap();

    let second = Path::new("second");
    storage.link(&storage.locate(path), second).unwrap();
    assert!(storage.link(&storage.locate(path), second).is_err());
    storage.remove(path).unwrap();
    assert_eq!(storage.read(second).unwrap(), b"ONE three four");
    storage.rename(second, path).unwrap();
    assert_eq!(kind(storage.read(second)), Some(ErrorKind::NotFound));

    let directory = Path::new("directory");
    storage.create_dir(directory).unwrap();
    storage.create_dir(directory).unwrap();
    assert_eq!(mode(directory), 0o700);
    assert_eq!(kind(storage.create_dir(path)), Some(ErrorKind::AlreadyExists));
    storage.create(Path::new("directory/x")).unwrap();
    assert!(storage.remove_dir(directory).is_err());
    storage.sync_dir(directory).unwrap();
    storage.remove(Path::new("directory/x")).unwrap();
    storage.remove_dir(directory).unwrap();
    storage.sync_dir(Path::new("")).unwrap();
    storage.sync_parent().unwrap();
    FileStorage::new("/").sync_parent().unwrap();
    FileStorage::new("").sync_dir(Path::new("")).unwrap();
}

#[test]
fn a_directory_is_listed_by_name_with_what_its_entries_are() {
    let (folder, storage) = folder();
    for name in ["b", "a", "c"] {
        fs::write(folder.path().join(name), "").unwrap();
    }
    fs::create_dir(folder.path().join("Z")).unwrap();
    let mut expected =
        vec![("Z", true, false), ("a", false, true), ("b", false, true), ("c", false, true)];
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::ffi::OsStrExt;
        let name = std::ffi::OsStr::from_bytes(b"x\xff");
        fs::write(folder.path().join(name), "").unwrap();
        std::os::unix::fs::symlink("a", folder.path().join("y")).unwrap();
        expected.extend([("x\u{fffd}", false, true), ("y", false, false)]);
    }
    let found = storage.list(Path::new("")).unwrap();
    let found: Vec<_> = found.iter().map(|e| (e.name.as_str(), e.is_dir, e.is_file)).collect();
    assert_eq!(found, expected);
    assert_eq!(kind(storage.list(Path::new("a"))), Some(ErrorKind::NotADirectory));
}

#[test]
fn a_lock_names_its_holder_until_it_is_dropped() {
    let (_folder, storage) = folder();
    let path = Path::new(LOCK);
    let held = storage.lock(path, "by the first, whose message is long").unwrap();
    let error = storage.lock(path, "by the second").err().unwrap();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    assert_eq!(error.to_string(), "by the first, whose message is long");
    drop(held);
    let _held = storage.lock(path, "by the third").unwrap();
    assert_eq!(storage.read(path).unwrap(), b"by the third");
}

#[test]
fn what_cannot_be_published_whole_is_not_published() {
    let (folder, storage) = folder();
    let (staged, finished) = (Path::new("staged"), Path::new("runs/finished"));
    let error = publish_directory(&storage, staged, finished).unwrap_err();
    assert!(matches!(&error, PoolError::Io { action: "list", .. }), "{error}");
    fs::create_dir_all(folder.path().join("staged/inner")).unwrap();
    fs::write(folder.path().join("staged/inner/file"), "whole").unwrap();
    // There is no place for it.
    let error = publish_directory(&storage, staged, finished).unwrap_err();
    assert!(matches!(&error, PoolError::Io { action: "rename", .. }), "{error}");
    fs::create_dir(folder.path().join("runs")).unwrap();
    #[cfg(unix)]
    {
        let link = folder.path().join("staged/inner/link");
        std::os::unix::fs::symlink("file", &link).unwrap();
        let error = publish_directory(&storage, staged, finished).unwrap_err();
        assert!(error.to_string().contains("link is neither a file nor a directory"), "{error}");
        assert!(storage.list(finished).is_err());
        fs::remove_file(link).unwrap();
    }
    publish_directory(&storage, staged, finished).unwrap();
    assert_eq!(storage.read(Path::new("runs/finished/inner/file")).unwrap(), b"whole");
    assert!(storage.list(staged).is_err());
    fs::create_dir(folder.path().join("staged")).unwrap();
    let error = publish_directory(&storage, staged, finished).unwrap_err();
    assert!(error.to_string().ends_with("runs/finished exists"), "{error}");
}

/// A pool of everything, in a folder; closed.
fn pool() -> (tempfile::TempDir, Arc<dyn Storage>, Content) {
    let folder = tempfile::tempdir().unwrap();
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::new(folder.path().join("pool")));
    let pool = create(&storage).unwrap();
    let mut steps: Vec<Step> = (0..9).map(|i| Step::Append(Owned::numbered(i, 3))).collect();
    steps.push(Step::Draft("other", vec![0.5; 27]));
    steps.push(Step::Publish("other"));
    steps.push(Step::Draft("reward", vec![1.5; 4]));
    for step in &steps {
        step.apply(&pool).unwrap();
    }
    pool.close();
    (folder, storage, Content::after(&steps))
}

#[test]
fn a_pool_lives_in_a_folder() {
    let (folder, storage, mut content) = pool();
    let open = writer(&storage).unwrap();
    let beside = reader(&storage).unwrap();
    assert!(content.is_in(&open.snapshot()).unwrap() && content.is_in(&beside.snapshot()).unwrap());
    let second = writer(&storage).map(drop).unwrap_err();
    assert_eq!(second.to_string(), "the pool is open for writing elsewhere: pid 1");
    for step in [Step::Append(Owned::numbered(20, 4)), Step::Discard("reward"), Step::Compact(20)] {
        step.apply(&open).unwrap();
        content.apply(&step);
    }
    beside.refresh().unwrap();
    assert!(content.is_in(&beside.snapshot()).unwrap());
    assert_eq!(beside.snapshot().hash(), open.snapshot().hash());

    // A fork has the same files, under second names.
    let parent = FileStorage::new(folder.path());
    fork(&open.snapshot(), &parent, Path::new("fork"), "other").unwrap();
    let forked: Arc<dyn Storage> = Arc::new(FileStorage::new(folder.path().join("fork")));
    assert!(content.is_in(&writer(&forked).unwrap().snapshot()).unwrap());
    for refused in ["fork", "..", "absent/fork"] {
        let error = fork(&open.snapshot(), &parent, Path::new(refused), "third").unwrap_err();
        let is_clear = match refused {
            "fork" => matches!(error, PoolError::Exists { .. }),
            ".." => matches!(error, PoolError::Invalid(_)),
            _ => matches!(error, PoolError::Io { action: "list", .. }),
        };
        assert!(is_clear, "{refused}: {error}");
    }
    #[cfg(unix)]
    for file in open.snapshot().files() {
        use std::os::unix::fs::MetadataExt;
        let path = storage.locate(Path::new(&file.name));
        assert_eq!(fs::metadata(path).unwrap().nlink(), 2, "{}", file.name);
    }

    let would = open.collect(1, true).unwrap();
    let collected = open.collect(1, false).unwrap();
    assert!(would.files > 0 && would.files == collected.files, "{would:?} {collected:?}");
    let mut needed: Vec<PathBuf> =
        open.snapshot().files().map(|file| (&file.name).into()).collect();
    needed.sort();
    let is_data = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "arrow");
    let left = files(&folder.path().join("pool"), Path::new(""));
    assert_eq!(left.into_iter().filter(is_data).collect::<Vec<_>>(), needed);
    assert!(content.is_in(&open.snapshot()).unwrap());
    open.close();
    let refused = Owned::numbered(30, 1).append(&open).unwrap_err();
    assert_eq!(refused.to_string(), "the pool is closed");
    for storage in [&storage, &forked] {
        assert!(content.is_in(&reader(storage).unwrap().snapshot()).unwrap());
        let report = verify(storage).unwrap();
        assert!(report.problems.is_empty(), "{:?}", report.problems);
        assert_eq!((report.num_samples, report.num_files > 3), (31, true));
    }
}

#[test]
fn what_is_no_pool_or_in_the_way_of_one_is_said() {
    let (folder, storage, _) = pool();
    let at =
        |name: &str| -> Arc<dyn Storage> { Arc::new(FileStorage::new(folder.path().join(name))) };
    let again = create(&storage).map(drop).unwrap_err();
    assert!(matches!(again, PoolError::Exists { .. }), "{again}");
    for name in ["absent", "pool/segments", "pool/LOCK"] {
        let error = reader(&at(name)).map(drop).unwrap_err();
        assert!(error.to_string().ends_with(&format!("{name}/ is not a pool")), "{error}");
        let error = verify(&at(name)).map(drop).unwrap_err();
        assert!(matches!(error, PoolError::NotFound { .. }), "{error}");
    }
    fs::create_dir(folder.path().join("mine")).unwrap();
    fs::write(folder.path().join("mine/thesis.txt"), "").unwrap();
    // With the names of what an interrupted creation leaves, but not made by one.
    for name in ["LOCK", "segments"] {
        let root = folder.path().join(format!("other {name}"));
        fs::create_dir(&root).unwrap();
        if name == "LOCK" {
            fs::create_dir(root.join(name)).unwrap();
        } else {
            fs::write(root.join(name), "").unwrap();
        }
        let error = create(&at(&format!("other {name}"))).map(drop).unwrap_err();
        assert!(matches!(error, PoolError::Exists { .. }), "{error}");
    }
    let error = create(&at("mine")).map(drop).unwrap_err();
    assert!(error.to_string().ends_with("mine/ exists"), "{error}");
    let error = create(&at("absent/deep")).map(drop).unwrap_err();
    assert!(matches!(error, PoolError::Io { action: "create", .. }), "{error}");
    let error = create(&at("pool/LOCK")).map(drop).unwrap_err();
    assert!(matches!(error, PoolError::Io { action: "create", .. }), "{error}");

    let open = |writer, snapshot| Pool::open(storage.clone(), OpenOptions { writer, snapshot });
    let error = open(None, Some(99)).map(drop).unwrap_err();
    assert_eq!(error.to_string(), "the pool has no snapshot 99; it has those from 0 to 12");
    let error = open(Some("me"), Some(1)).map(drop).unwrap_err();
    assert_eq!(error.to_string(), "an old snapshot can only be read, not written");
    let error = Owned::numbered(50, 1).append(&open(None, None).unwrap()).unwrap_err();
    assert!(error.to_string().contains("open it with writable=True"), "{error}");
    let nameless = storage.lock(Path::new(LOCK), "").unwrap();
    let error = open(Some("me"), None).map(drop).unwrap_err();
    assert!(error.to_string().ends_with("by an unknown process"), "{error}");
    drop(nameless);
    fs::remove_file(folder.path().join("pool/LOCK")).unwrap();
    fs::create_dir(folder.path().join("pool/LOCK")).unwrap();
    let error = open(Some("me"), None).map(drop).unwrap_err();
    assert!(error.to_string().contains("LOCK is damaged at offset 0: it is a dir"), "{error}");
    assert!(settings().store_text && open(None, None).is_ok());
}

/// All files of a folder, by their paths in it.
fn files(folder: &Path, below: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder.join(below)).unwrap() {
        let entry = entry.unwrap();
        let path = below.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(folder, &path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn a_file_that_is_gone_or_no_file_any_more_is_named() {
    let (folder, storage, content) = pool();
    let root = folder.path().join("pool");
    let read = || -> Result<bool, PoolError> { content.is_in(&reader(&storage)?.snapshot()) };
    // Runs serve no sample: a ranking reads them, and a check does.
    let is_read =
        |path: &Path| !path.starts_with("runs") && !path.ends_with(LOCK) && !path.ends_with(HEAD);
    let mut num_refused = 0;
    for path in files(&root, Path::new("")) {
        let (full, aside) = (root.join(&path), folder.path().join("aside"));
        fs::rename(&full, &aside).unwrap();
        for what in ["missing", "not a plain file"] {
            if what != "missing" {
                fs::create_dir(&full).unwrap();
            }
            let name = path.display().to_string();
            match read() {
                Err(PoolError::Corrupted { file, what: said, .. }) if is_read(&path) => {
                    // Without its only log a pool still has what it acknowledged.
                    let is_log = path.starts_with("manifest");
                    assert!(file == name || is_log, "{file} for {name}");
                    assert!(said.contains(what) || is_log, "{said} for {name}, {what}");
                    num_refused += 1;
                }
                result => assert!(result.unwrap() && !is_read(&path), "{name}, {what}"),
            }
            let is_clean = verify(&storage).is_ok_and(|report| report.problems.is_empty());
            let is_optional = path.ends_with(LOCK) || path.ends_with(HEAD);
            assert_eq!(is_clean, is_optional && what == "missing", "{name}, {what}");
        }
        fs::remove_dir(&full).unwrap();
        fs::rename(&aside, &full).unwrap();
    }
    assert!(num_refused > 20 && read().unwrap(), "{num_refused}");
    assert!(check_content(&reader(&storage).unwrap().snapshot(), &content.batches).unwrap());
}

#[test]
fn a_large_file_is_checked_block_by_block() {
    let folder = tempfile::tempdir().unwrap();
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::new(folder.path()));
    let (number, length) = (6000_u64, 5);
    let pool = create(&storage).unwrap();
    let mut batch = Owned::numbered(0, number as u32);
    for (i, (tokens, _)) in (0..).zip(&mut batch.completions) {
        *tokens = vec![i % VOCAB; length];
    }
    batch.append(&pool).unwrap();
    pool.close();
    let name = pool.snapshot().segments[0].entry.file.name.clone();
    let path = folder.path().join(&name);
    let ids = [5999, 17, 3000, 3001, 1024];
    let token = |id: u64| (id % u64::from(VOCAB)) as i64;
    let read = |ids: &[u64]| gather(&reader(&storage).unwrap().snapshot(), ids, -1);
    let whole = read(&ids).unwrap();
    assert_eq!(whole.completions, ids.map(|id| [token(id); 5]).concat());
    let snapshot = || reader(&storage).unwrap().snapshot();
    let rank = || -> Result<Vec<u64>, PoolError> {
        let (hash, spread) = (TieRule::Hash, RemainderRule::Spread);
        let quantization = Quantization::new(snapshot(), "reward", 3, hash, spread)?;
        quantization.labels()?;
        Ok(quantization.counts())
    };
    let scored = snapshot().columns[0].scored;
    assert_eq!(rank().unwrap().iter().sum::<u64>(), scored);

    // The tokens of sample 3000: whoever reads their block is refused, and nobody else.
    let tokens: Vec<u8> =
        (0..VOCAB as u16).flat_map(|t| [t; 5]).flat_map(u16::to_le_bytes).collect();
    let good = fs::read(&path).unwrap();
    let start = good.windows(tokens.len()).position(|window| window == tokens).unwrap();
    let at = start + 3000 * length * 2;
    let mut damaged = good.clone();
    damaged[at] ^= 1;
    fs::remove_file(&path).unwrap();
    fs::write(&path, &damaged).unwrap();
    let block = at as u64 / 4096 * 4096;
    let refused = read(&ids).unwrap_err();
    assert!(
        matches!(&refused, PoolError::Corrupted { file, offset, .. } if *file == name && *offset == block),
        "{refused}"
    );
    assert_eq!(
        read(&[17, 5999]).unwrap().completions,
        [17, 5999].map(|id| [token(id); 5]).concat()
    );
    assert_eq!(rank().unwrap().iter().sum::<u64>(), scored);
    let problems = verify(&storage).unwrap().problems;
    assert!(problems.len() == 1 && problems[0].to_string() == refused.to_string(), "{problems:?}");
}

/// Each whole column, as text: what is served of it, or why it is not.
fn read_through(snapshot: &Arc<Snapshot>) -> Vec<Result<String, PoolError>> {
    fn values<T>(snapshot: &Snapshot, at: usize) -> Result<String, PoolError>
    where
        T: bytemuck::Pod + Send + Sync + std::fmt::Debug,
    {
        let mut values = vec![T::zeroed(); snapshot.num_samples as usize];
        snapshot.copy_column(at, &mut values)?;
        Ok(format!("{values:?}"))
    }
    let scores = || {
        let mut scores = vec![0.0; snapshot.num_samples as usize];
        snapshot.copy_scores(snapshot.column("reward")?, &mut scores)?;
        Ok(format!("{scores:?}"))
    };
    let ids: Vec<u64> = (0..snapshot.num_samples).collect();
    let texts = || {
        let text = |&id: &u64| Ok(snapshot.sample(id)?.completion_text.unwrap());
        ids.iter().map(text).collect::<Result<String, PoolError>>()
    };
    let order = || {
        let (hash, spread) = (TieRule::Hash, RemainderRule::Spread);
        let quantization = Quantization::new(snapshot.clone(), "reward", 1, hash, spread)?;
        let places: Vec<_> = (0..quantization.counts()[0]).map(|index| (0, index)).collect();
        let mut order = vec![0; places.len()];
        let mut scores = vec![0.0; places.len()];
        quantization.samples_at(&places, &mut order, &mut scores)?;
        Ok(format!("{order:?} {scores:?}"))
    };
    vec![
        values::<u32>(snapshot, column::PROMPT),
        gather(snapshot, &ids, 0).map(|gathered| format!("{gathered:?}")),
        values::<u8>(snapshot, column::FINISH),
        values::<u32>(snapshot, column::ROUND),
        values::<u32>(snapshot, column::CHUNK),
        values::<u32>(snapshot, column::POLICY_STEP),
        values::<i16>(snapshot, column::REWARD_TOKEN),
        values::<u32>(snapshot, column::SETTINGS),
        values::<u64>(snapshot, column::SEED),
        values::<f32>(snapshot, column::LOGPROB_POLICY),
        values::<f32>(snapshot, column::LOGPROB_REFERENCE),
        scores(),
        order(),
        texts(),
    ]
}

#[test]
fn every_block_of_a_long_read_is_checked() {
    let disk = Disk::default();
    let pool = create(&disk.storage()).unwrap();
    // So many that every column fills more than one block, and most have one to themselves.
    Owned::numbered(0, 5000).append(&pool).unwrap();
    let intact = read_through(&reader(&disk.storage()).unwrap().snapshot());
    let intact: Vec<String> = intact.into_iter().map(Result::unwrap).collect();
    let entry = pool.snapshot().segments[0].entry.file.clone();
    for block in (4096..entry.tail).step_by(4096) {
        let mut files = disk.files();
        let file = files.iter_mut().find(|(path, _)| path == Path::new(&entry.name)).unwrap();
        file.1[(block + entry.tail.min(block + 4096)) as usize / 2] ^= 4;
        let snapshot = reader(&Disk::with_files(&files).storage()).unwrap().snapshot();
        let mut num_refused = 0;
        for (number, (read, intact)) in read_through(&snapshot).into_iter().zip(&intact).enumerate()
        {
            match read {
                Ok(served) => assert!(served == *intact, "block {block}, read {number}"),
                Err(PoolError::Corrupted { file, offset, .. }) => {
                    assert_eq!((file, offset), (entry.name.clone(), block), "read {number}");
                    num_refused += 1;
                }
                Err(error) => panic!("block {block}, read {number}: {error}"),
            }
        }
        assert!(num_refused > 0, "block {block} was never read");
    }
}

#[test]
fn a_check_beside_a_collection_finds_nothing_wrong() {
    for reads in 0.. {
        let disk = Disk::default();
        let pool = create(&disk.storage()).unwrap();
        for number in 0..9 {
            Owned::numbered(number, 2).append(&pool).unwrap();
        }
        disk.interrupt_after(reads, move || {
            pool.compact_once(40).unwrap();
            pool.collect(1, false).unwrap();
        });
        let report = verify(&disk.storage()).unwrap();
        assert!(report.problems.is_empty(), "after {reads} reads: {:?}", report.problems);
        if disk.is_to_be_interrupted() {
            assert!(reads > 20);
            break;
        }
        assert!([Some(9), Some(11)].contains(&report.generation), "{report:?}");
    }
}
