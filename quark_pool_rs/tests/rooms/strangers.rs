//! A pool of a stranger, or one with links in it: nothing outside of it is read, written or removed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quark_pool_rs::error::PoolError;
use quark_pool_rs::fork::fork;
use quark_pool_rs::format::segment_name;
use quark_pool_rs::log::{Kind, encode_head, encode_record, read_chain};
use quark_pool_rs::parts::Context;
use quark_pool_rs::pool::{OpenOptions, Pool};
use quark_pool_rs::rng::mix64;
use quark_pool_rs::snapshot::Snapshot;
use quark_pool_rs::storage::{FileStorage, Storage};
use quark_pool_rs::verify::verify;
use serde_json::Value;

use crate::common::disk::Disk;
use crate::common::{Owned, Step, create, reader, writer};

type Files = Vec<(PathBuf, Vec<u8>)>;

/// What is at each path below a folder, and when it was last changed.
fn tree(folder: &Path, without: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path == without {
            continue;
        }
        let metadata = fs::symlink_metadata(&path).unwrap();
        let kind = metadata.file_type();
        let mut what = vec![format!("{kind:?}")];
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            what.push(format!("{} {}", metadata.mode(), metadata.nlink()));
        }
        if kind.is_dir() {
            found.extend(tree(&path, without));
        } else {
            what.push(format!("{:?}", metadata.modified().unwrap()));
        }
        if kind.is_file() {
            what.push(format!("{:?}", fs::read(&path).unwrap()));
        }
        found.insert(path, what.join(" "));
    }
    found
}

fn write_all(root: &Path, files: &Files) {
    for directory in ["manifest", "segments", "prompts", "runs", "scores"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    for (path, bytes) in files {
        fs::write(root.join(path), bytes).unwrap();
    }
}

fn storage(root: &Path) -> Arc<dyn Storage> {
    Arc::new(FileStorage::new(root))
}

/// Everything that is read, in every snapshot; an error where any of it is refused.
fn read_all(storage: &Arc<dyn Storage>) -> Result<(), PoolError> {
    let newest = reader(storage)?.snapshot();
    for generation in newest.oldest..=newest.generation {
        let options = OpenOptions { writer: None, snapshot: Some(generation) };
        let snapshot = Pool::open(storage.clone(), options)?.snapshot();
        for id in snapshot.num_removed..snapshot.num_samples {
            snapshot.sample(id)?;
        }
    }
    Ok(())
}

/// Write to a pool in every way.
fn write_everywhere(pool: &Pool) -> Vec<Result<(), PoolError>> {
    let steps = [
        Step::Append(Owned::numbered(90, 3)),
        Step::Draft("other", vec![0.5]),
        Step::Discard("other"),
        Step::Compact(100),
        Step::Compact(100),
        Step::Retain(4),
        Step::Collect(1),
        Step::Append(Owned::numbered(91, 2)),
    ];
    steps.iter().map(|step| step.apply(pool)).collect()
}

/// Do everything with a pool that can be done. Whether it was written to.
fn use_in_every_way(root: &Path, forks: &Path) -> bool {
    let pool = storage(root);
    let _ = read_all(&pool);
    let _ = verify(&pool);
    if let Ok(pool) = reader(&pool) {
        let forked = fork(&pool.snapshot(), &FileStorage::new(forks), Path::new("fork"), "1");
        if forked.is_ok() {
            fs::remove_dir_all(forks.join("fork")).unwrap();
        }
    }
    let Ok(pool) = writer(&pool) else { return false };
    write_everywhere(&pool);
    true
}

/// A log that is changed and sealed again.
#[derive(Clone)]
struct Log {
    path: PathBuf,
    first: u64,
    previous: [u8; 32],
    records: Vec<(Kind, Value)>,
}

impl Log {
    fn of((path, bytes): &(PathBuf, Vec<u8>)) -> Self {
        let first = path.file_stem().unwrap().to_str().unwrap().parse().unwrap();
        let chain = read_chain(bytes, first);
        let value = |payload| serde_json::from_slice(payload).unwrap();
        let records = chain.records.iter().map(|r| (r.kind, value(r.payload))).collect();
        Self { path: path.clone(), first, previous: chain.records[0].previous, records }
    }

    /// Its bytes, and those of a HEAD that names its last record.
    fn sealed(&self) -> (Vec<u8>, Vec<u8>) {
        let (mut log, mut digest) = (Vec::new(), self.previous);
        let mut head = Vec::new();
        for ((kind, value), generation) in self.records.iter().zip(self.first..) {
            let payload = serde_json::to_vec(value).unwrap();
            let (record, own) = encode_record(*kind, generation, &digest, &payload);
            log.extend(record);
            let repeats = *kind == Kind::State && generation > 0;
            head = encode_head(generation, if repeats { &digest } else { &own }).to_vec();
            digest = own;
        }
        (log, head)
    }

    /// Where its records name files.
    fn slots(&self) -> Vec<(usize, String)> {
        fn walk(value: &Value, pointer: &str, found: &mut Vec<String>) {
            if value.get("name").is_some() && value.get("tail").is_some() {
                found.push(pointer.to_owned());
            }
            match value {
                Value::Object(fields) => {
                    fields.iter().for_each(|(key, v)| walk(v, &format!("{pointer}/{key}"), found));
                }
                Value::Array(items) => {
                    let items = items.iter().enumerate();
                    items.for_each(|(i, v)| walk(v, &format!("{pointer}/{i}"), found));
                }
                _ => {}
            }
        }
        let mut slots = Vec::new();
        for (number, (_, value)) in self.records.iter().enumerate() {
            let mut found = Vec::new();
            walk(value, "", &mut found);
            slots.extend(found.into_iter().map(|pointer| (number, pointer)));
        }
        slots
    }
}

/// What names are made of by chance.
const PIECES: [&str; 12] =
    ["/", "../", "./", "\\", "\0", "-", "0", "f", "segments/", ".arrow", "outside", "victim"];

/// Names for a file that is called `good`, most of which no manifest may list.
fn hostile(number: u64, good: &str, outside: &Path) -> String {
    let victim = outside.join("victim").to_str().unwrap().to_owned();
    let (directory, file) = good.split_once('/').unwrap();
    let chosen = [
        victim.clone(),
        format!("{directory}/{victim}"),
        "../outside/victim".to_owned(),
        format!("{directory}/../../outside/victim"),
        format!("{directory}/../{good}"),
        format!("../outside/{good}"),
        format!("../pool/{good}"),
        outside.join(good).to_str().unwrap().to_owned(),
        format!("../forks/fork/{good}"),
        String::new(),
        ".".to_owned(),
        "..".to_owned(),
        "/".to_owned(),
        directory.to_owned(),
        format!("{directory}/"),
        format!("{directory}/."),
        format!("{directory}//{file}"),
        format!("{directory}/./{file}"),
        format!("{directory}/deep/{file}"),
        format!("{good}/"),
        format!("{good}/{file}"),
        format!("{good}\0"),
        format!("{directory}/\0{file}"),
        format!("{good}\n"),
        format!("{good} "),
        format!("{directory}\\{file}"),
        format!("..\\outside\\{file}"),
        format!("{directory}/..\\..\\outside\\victim"),
        "C:\\victim".to_owned(),
        "x".repeat(5_000),
        format!("{directory}/{}.arrow", "0".repeat(300)),
        format!("{directory}/{}{file}", "../".repeat(2_000)),
        file.to_owned(),
        good.to_uppercase(),
        good.replace('0', "\u{660}"),
        "LOCK".to_owned(),
        "HEAD".to_owned(),
        "manifest/00000000000000000000.log".to_owned(),
        format!("manifest/{file}"),
        format!("segments/{file}"),
        format!("prompts/{file}"),
        format!("runs/{file}"),
        format!("scores/{file}"),
        "segments/seg-0000000000000000-0000000000000001.arrow".to_owned(),
        "prompts/pr-0000000000000000-0000000000000001.arrow".to_owned(),
        "runs/run-0000-00-0000000000000001.arrow".to_owned(),
        "scores/sc-0000000000000000-0000000000000001.arrow".to_owned(),
    ];
    if let Some(name) = chosen.get(number as usize) {
        return name.clone();
    }
    // By chance: a good name with pieces put in and cut out.
    let mut drawn = number;
    let mut below = |limit: usize| {
        drawn = mix64(drawn.wrapping_add(1));
        (drawn % limit as u64) as usize
    };
    let mut name = good.to_owned();
    for _ in 0..=below(4) {
        let at = below(name.len() + 1);
        let end = (at + below(4)).min(name.len());
        name.replace_range(at..end, PIECES[below(PIECES.len())]);
        if below(4) == 0 {
            name.insert_str(0, PIECES[below(4)]);
        }
    }
    name
}

/// Logs that name files in all their ways, the one to change first; the rest of the pool, and whether a newer log
/// follows.
fn bases() -> Vec<(Log, Files, bool)> {
    let base = |steps: &[Step], has_two_logs: bool| {
        let disk = Disk::default();
        let pool = create(&disk.storage()).unwrap();
        for (number, step) in steps.iter().enumerate() {
            if has_two_logs && number + 1 == steps.len() {
                // So long that the next commit begins a new log.
                let long = format!("{{\"note\":\"{}\"}}", "x".repeat(70_000));
                let first = pool.snapshot().num_removed;
                pool.draft_scores("long", &long, first, &[1.0]).unwrap();
                pool.discard_scores("long").unwrap();
            }
            step.apply(&pool).unwrap();
        }
        let mut files = disk.files();
        let is_log = |(path, _): &(PathBuf, Vec<u8>)| path.starts_with("manifest");
        let at = files.iter().position(is_log).unwrap();
        assert_eq!(files.iter().filter(|file| is_log(file)).count() > 1, has_two_logs);
        let log = Log::of(&files.remove(at));
        (log, files, has_two_logs)
    };
    let mut whole: Vec<Step> = (0..8).map(|i| Step::Append(Owned::numbered(i, 3))).collect();
    whole.extend([Step::Draft("other", vec![1.0; 24]), Step::Publish("other")]);
    whole.extend([Step::Draft("reward", vec![0.5; 20]), Step::Compact(100), Step::Compact(100)]);
    whole.extend([Step::Retain(7), Step::Append(Owned::numbered(8, 2))]);
    let mut state = whole.clone();
    state.push(Step::Collect(1));
    vec![base(&whole, false), base(&state, false), base(&whole, true)]
}

#[test]
fn no_name_in_a_manifest_leads_out_of_the_pool() {
    // In memory where there is a place for it: nothing here is about syncs.
    let memory = Path::new("/dev/shm");
    let folder = tempfile::tempdir_in(memory).or_else(|_| tempfile::tempdir()).unwrap();
    let [root, outside, forks] = ["pool", "outside", "forks"].map(|name| folder.path().join(name));
    fs::create_dir(&forks).unwrap();
    let (mut num_manifests, mut num_refused, mut named) = (0, 0, BTreeSet::new());
    for (log, files, has_newer) in bases() {
        let _ = fs::remove_dir_all(&outside);
        write_all(&outside, &files);
        fs::write(outside.join("victim"), "precious").unwrap();
        let before = tree(folder.path(), &root);
        let slots = log.slots();
        named.extend(slots.iter().map(|(at, pointer)| {
            let digits = |c: char| c.is_ascii_digit();
            (log.records[*at].0 as u32, pointer.replace(digits, "0"))
        }));
        let mut is_written = true;
        // A pool that opens is used in every way and made anew, which takes longer.
        let num_cases = if has_newer { 300 } else { 5_000_usize };
        let per_slot = num_cases.div_ceil(slots.len());
        for (slot, (record, pointer)) in slots.iter().enumerate() {
            for number in 0..per_slot as u64 {
                let mut log = log.clone();
                let entry = log.records[*record].1.pointer_mut(pointer).unwrap();
                let good = entry["name"].as_str().unwrap().to_owned();
                let seed = if number < 47 { number } else { mix64(slot as u64) ^ mix64(number) };
                let name = hostile(seed, &good, &outside);
                entry["name"] = name.clone().into();
                let (bytes, head) = log.sealed();
                if is_written {
                    let _ = fs::remove_dir_all(&root);
                    write_all(&root, &files);
                }
                fs::write(root.join(&log.path), bytes).unwrap();
                if !has_newer {
                    fs::write(root.join("HEAD"), head).unwrap();
                }
                is_written = use_in_every_way(&root, &forks);
                num_manifests += 1;
                num_refused += usize::from(!is_written);
                if number % 50 == 0 || is_written {
                    assert_eq!(tree(folder.path(), &root), before, "{name:?} at {pointer}");
                }
            }
            assert_eq!(tree(folder.path(), &root), before, "at {pointer}");
        }
    }
    assert!(num_manifests >= 10_000 && num_refused > 6_000, "{num_manifests}, {num_refused}");
    // Segments, prompts, scores and runs, in states, commits, changes of scores and upkeep.
    assert!(named.len() >= 12, "{named:?}");
}

#[test]
fn a_name_of_another_kind_of_file_is_refused_where_it_is_read() {
    let (log, files, _) = bases().swap_remove(0);
    for (record, pointer) in log.slots() {
        let mut log = log.clone();
        let entry = log.records[record].1.pointer_mut(&pointer).unwrap();
        let good = entry["name"].as_str().unwrap().to_owned();
        let other = if good.starts_with("runs") { "prompts" } else { "runs" };
        let mut names = vec![
            "../outside/victim".to_owned(),
            good.replace('/', "//"),
            segment_name(0, 1).replace("segments", other),
        ];
        // A good name, in the wrong place.
        names.push(match other {
            "runs" => "runs/run-0000-00-0000000000000001.arrow".to_owned(),
            _ => segment_name(0, 1),
        });
        for name in names {
            log.records[record].1.pointer_mut(&pointer).unwrap()["name"] = name.clone().into();
            let (bytes, head) = log.sealed();
            let mut files = files.clone();
            files.retain(|(path, _)| path != Path::new("HEAD"));
            files.extend([(log.path.clone(), bytes), ("HEAD".into(), head)]);
            let storage = Disk::with_files(&files).storage();
            let said = format!("has: {name:?}");
            for opened in [reader(&storage), writer(&storage)] {
                let error = opened.map(drop).unwrap_err();
                assert!(matches!(error, PoolError::Corrupted { .. }), "{error}");
                assert!(error.to_string().contains(&said), "{error}, not {said}");
            }
            let problems = verify(&storage).unwrap().problems;
            assert!(problems.iter().any(|p| p.to_string().contains(&said)), "{problems:?}");
        }
    }
}

#[test]
fn what_a_log_that_only_older_snapshots_need_names_is_checked_too() {
    let (mut log, files, has_newer) = bases().swap_remove(2);
    assert!(has_newer);
    let (record, pointer) = log.slots().swap_remove(0);
    log.records[record].1.pointer_mut(&pointer).unwrap()["name"] = "../victim".into();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("pool");
    write_all(&root, &files);
    fs::write(root.join(&log.path), log.sealed().0).unwrap();
    let storage = storage(&root);
    let said = "has: \"../victim\"";
    let pool = writer(&storage).unwrap();
    let error = pool.collect(1_000, false).map(drop).unwrap_err();
    assert!(error.to_string().contains(said), "{error}");
    let problems = verify(&storage).unwrap().problems;
    assert!(problems.iter().any(|p| p.to_string().contains(said)), "{problems:?}");
    let error = read_all(&storage).unwrap_err();
    assert!(error.to_string().contains(said), "{error}");
}

#[test]
fn a_fork_removes_only_what_it_made() {
    let folder = tempfile::tempdir().unwrap();
    let [root, outside] = ["pool", "outside"].map(|name| folder.path().join(name));
    let pool = create(&storage(&root)).unwrap();
    for i in 0..3 {
        Owned::numbered(i, 2).append(&pool).unwrap();
    }
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("victim"), "precious").unwrap();
    let parent = FileStorage::new(folder.path());
    let good = pool.snapshot();
    let with = |name: &str| {
        // Past the check of manifests: a mistake there is to do no harm either.
        let mut state = good.to_state();
        Arc::make_mut(&mut state.segments[1]).file.name = name.to_owned();
        let context = Arc::new(Context { storage: storage(&root), settings: state.pool.clone() });
        Snapshot::from_state(context, good.generation, good.digest, state).unwrap()
    };
    let before = tree(folder.path(), Path::new(""));
    let absolute = outside.join("victim");
    let names = [
        absolute.to_str().unwrap(),
        "../outside/victim",
        "segments/../../outside/victim",
        "LOCK",
        "",
        "..",
        "segments/absent",
        &good.segments[0].entry.file.name.clone(),
    ];
    for name in names {
        let forked = fork(&with(name), &parent, Path::new("fork"), "1");
        match name {
            // In the fork it is a file like any other, until somebody reads it.
            "LOCK" => fs::remove_dir_all(folder.path().join("fork")).unwrap(),
            _ => drop(forked.unwrap_err()),
        }
        let after = tree(folder.path(), Path::new(""));
        assert!(after.keys().eq(before.keys()), "{name:?}");
        assert_eq!(fs::read(&absolute).unwrap(), b"precious", "{name:?}");
    }
    // Somebody else's directory, under the name that was to be its own.
    let theirs = folder.path().join("fork.partial-1");
    fs::create_dir_all(theirs.join("segments")).unwrap();
    let error = fork(&good, &parent, Path::new("fork"), "1").unwrap_err();
    assert!(matches!(&error, PoolError::Exists { path } if *path == theirs), "{error}");
    assert!(theirs.join("segments").is_dir() && !theirs.join("manifest").exists());
}

#[cfg(unix)]
mod links {
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::sync::mpsc;
    use std::time::Duration;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;
    use crate::common::Content;
    use quark_pool_rs::format::{HEAD, LOCK};

    fn make_pipe(path: &Path) {
        mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    }

    /// What `work` returns, unless it waits for somebody.
    fn without_hanging<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || sender.send(work()));
        receiver.recv_timeout(Duration::from_secs(60)).expect("it waits")
    }

    fn steps() -> Vec<Step> {
        let mut steps: Vec<_> = (0..9).map(|i| Step::Append(Owned::numbered(i, 3))).collect();
        steps.extend([Step::Draft("other", vec![0.5; 27]), Step::Publish("other")]);
        steps
    }

    fn pool_files() -> Files {
        let disk = Disk::default();
        let pool = create(&disk.storage()).unwrap();
        for step in steps() {
            step.apply(&pool).unwrap();
        }
        pool.close();
        disk.files()
    }

    #[test]
    fn no_link_in_a_pool_is_followed_and_no_pipe_waited_for() {
        let files = pool_files();
        let mut places: Vec<PathBuf> = files.iter().map(|(path, _)| path.clone()).collect();
        places.extend(["manifest", "segments", "prompts", "runs", "scores"].map(PathBuf::from));
        let listed = places.len();
        // What a writer makes, or looks for.
        let log = "manifest/00000000000000000000.log.new";
        places.extend(["HEAD.new", "LOCK.new", log].map(PathBuf::from));
        places.extend([segment_name(27, 12), segment_name(0, 13)].map(PathBuf::from));
        places.push("manifest/00000000000000000099.log".into());
        for (number, place) in places.iter().enumerate() {
            for kind in ["link", "dangling link", "pipe"] {
                let what = format!("{kind} at {}", place.display());
                let folder = tempfile::tempdir().unwrap();
                let [root, outside, forks] =
                    ["pool", "outside", "forks"].map(|name| folder.path().join(name));
                write_all(&root, &files);
                // The same pool, so that whoever follows a link finds what he looks for.
                write_all(&outside, &files);
                fs::create_dir(&forks).unwrap();
                let full = root.join(place);
                if number < listed {
                    let aside = folder.path().join("aside");
                    fs::rename(&full, &aside).unwrap();
                } else if kind == "link" {
                    fs::write(outside.join(place), "precious").unwrap();
                }
                match kind {
                    "link" => symlink(outside.join(place), &full).unwrap(),
                    "dangling link" => symlink(outside.join("absent"), &full).unwrap(),
                    _ => make_pipe(&full),
                }
                let before = tree(folder.path(), &root);
                let pool = storage(&root);
                let read = without_hanging(move || read_all(&pool));
                let pool = storage(&root);
                let report = without_hanging(move || verify(&pool)).unwrap();
                let said = format!("{} is damaged at offset 0: it is a ", place.display());
                let is_said = |error: &PoolError| error.to_string().starts_with(&said);
                // Runs serve no sample, and what is not listed is nobody's.
                let is_optional = place.starts_with("runs")
                    || [HEAD, LOCK].contains(&place.to_str().unwrap())
                    || (number >= listed && !place.ends_with("00000000000000000099.log"));
                if is_optional {
                    read.unwrap_or_else(|error| panic!("{what}: {error}"));
                } else {
                    let error = read.expect_err(&what);
                    assert!(is_said(&error), "{what}: {error}");
                }
                let is_reported = report.problems.iter().any(is_said);
                assert_eq!(is_reported, number < listed || !is_optional, "{what}: {report:?}");

                let (at, to) = (root.clone(), forks.clone());
                let (forked, refusals) = without_hanging(move || {
                    let pool = storage(&at);
                    let forked = reader(&pool).and_then(|pool| {
                        fork(&pool.snapshot(), &FileStorage::new(&to), Path::new("fork"), "1")
                    });
                    if forked.is_ok() {
                        let fork = storage(&to.join("fork"));
                        assert!(verify(&fork).unwrap().problems.is_empty());
                        fs::remove_dir_all(to.join("fork")).unwrap();
                    }
                    let refusals = match writer(&pool) {
                        Err(error) => vec![error],
                        Ok(pool) => {
                            write_everywhere(&pool).into_iter().filter_map(Result::err).collect()
                        }
                    };
                    (forked, refusals)
                });
                assert_eq!(tree(folder.path(), &root), before, "{what}");
                let is_needed = place.extension().is_some_and(|extension| extension == "arrow");
                if number < listed && is_needed {
                    let error = forked.expect_err(&what);
                    assert!(is_said(&error), "{what}: {error}");
                }
                let is_directory = number < listed && place.extension().is_none();
                let is_lock_or_directory = is_directory && place != Path::new(HEAD);
                if is_lock_or_directory {
                    assert!(refusals.len() == 1 && is_said(&refusals[0]), "{what}: {refusals:?}");
                } else if number >= listed && is_optional {
                    assert!(refusals.is_empty(), "{what}: {refusals:?}");
                    assert!(verify(&storage(&root)).unwrap().problems.is_empty(), "{what}");
                } else {
                    let are_said = refusals.iter().all(is_said);
                    assert!(are_said, "{what}: {refusals:?}");
                }
            }
        }
        assert!(listed > 20, "{listed}");
    }

    #[test]
    fn the_way_to_a_pool_may_lead_through_links() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("far")).unwrap();
        symlink("far", folder.path().join("near")).unwrap();
        write_all(&folder.path().join("far/pool"), &pool_files());
        symlink("far/pool", folder.path().join("link")).unwrap();
        for (number, root) in (20..).zip(["near/pool", "link"]) {
            let storage = storage(&folder.path().join(root));
            let pool = writer(&storage).unwrap();
            Owned::numbered(number, 2).append(&pool).unwrap();
            // It stays the pool that was opened, whatever its way leads to now.
            let parent = FileStorage::new(folder.path().join("near"));
            fork(&pool.snapshot(), &parent, Path::new(&format!("fork{number}")), "1").unwrap();
            pool.close();
            assert!(verify(&storage).unwrap().problems.is_empty());
        }
        let pool = writer(&storage(&folder.path().join("link"))).unwrap();
        fs::remove_file(folder.path().join("link")).unwrap();
        let other = folder.path().join("other");
        write_all(&other, &pool_files());
        symlink("other", folder.path().join("link")).unwrap();
        let before = tree(&other, Path::new(""));
        Owned::numbered(30, 2).append(&pool).unwrap();
        assert_eq!(tree(&other, Path::new("")), before);
        assert_eq!(
            reader(&storage(&folder.path().join("far/pool"))).unwrap().snapshot().num_samples,
            33
        );
    }

    /// As `cp -al` does.
    fn copy_by_links(from: &Path, to: &Path) {
        fs::create_dir(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let (path, name) = entry.map(|e| (e.path(), e.file_name())).unwrap();
            if path.is_dir() {
                copy_by_links(&path, &to.join(name));
            } else {
                fs::hard_link(&path, to.join(name)).unwrap();
            }
        }
    }

    fn assert_holds(root: &Path, content: &Content, what: &str) {
        let storage = storage(root);
        let problems = verify(&storage).unwrap().problems;
        assert!(problems.is_empty(), "{what}: {problems:?}");
        assert!(content.is_in(&reader(&storage).unwrap().snapshot()).unwrap(), "{what}");
    }

    #[test]
    fn a_copy_by_hard_links_is_a_pool_of_its_own() {
        for is_open in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
            write_all(&first, &pool_files());
            let mut contents = [Content::after(&steps()), Content::after(&steps())];
            let open = is_open.then(|| writer(&storage(&first)).unwrap());
            copy_by_links(&first, &second);
            let inode = |root: &Path| fs::metadata(root.join(HEAD)).unwrap().ino();
            assert_eq!(inode(&first), inode(&second));
            let rounds = [
                vec![Step::Append(Owned::numbered(20, 4)), Step::Draft("reward", vec![1.5; 5])],
                vec![Step::Compact(100), Step::Append(Owned::numbered(21, 2))],
                vec![Step::Retain(11), Step::Collect(1)],
                vec![Step::Collect(2), Step::Append(Owned::numbered(22, 3))],
            ];
            let mut number = 30;
            for (round, steps) in rounds.iter().enumerate() {
                for (side, root) in [&first, &second].into_iter().enumerate() {
                    let what = format!("round {round}, side {side}, open: {is_open}");
                    let opened = match &open {
                        Some(_) if (round, side) == (0, 0) => None,
                        Some(pool) => {
                            // The lock of the copy was one with the lock that this one held.
                            pool.close();
                            Some(writer(&storage(root)).unwrap())
                        }
                        None => Some(writer(&storage(root)).unwrap()),
                    };
                    let pool = opened.as_ref().or(open.as_ref()).unwrap();
                    // No two appends are the same.
                    number += 1;
                    let own = Step::Append(Owned::numbered(number, 1 + side as u32));
                    for step in steps.iter().chain([&own]) {
                        step.apply(pool).unwrap_or_else(|error| panic!("{what}: {error}"));
                        contents[side].apply(step);
                    }
                    drop(opened);
                    for (root, content) in [&first, &second].into_iter().zip(&contents) {
                        assert_holds(root, content, &what);
                    }
                }
            }
            assert_ne!(inode(&first), inode(&second));
        }
    }

    #[test]
    fn a_file_with_another_name_is_not_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("pool");
        write_all(&root, &pool_files());
        let log = "manifest/00000000000000000000.log";
        let victim = folder.path().join("victim");
        for place in [HEAD, LOCK, log] {
            let full = root.join(place);
            let bytes = if place == LOCK { b"precious".to_vec() } else { fs::read(&full).unwrap() };
            fs::write(&victim, &bytes).unwrap();
            fs::remove_file(&full).unwrap();
            fs::hard_link(&victim, &full).unwrap();
            let pool = writer(&storage(&root)).unwrap();
            let locked = writer(&storage(&root)).map(drop).unwrap_err();
            assert!(matches!(locked, PoolError::Locked { .. }), "{locked}");
            // Once more, while the pool is open: a backup by links may be made at any time.
            Owned::numbered(40, 2).append(&pool).unwrap();
            let copy = folder.path().join("copy");
            fs::hard_link(&full, &copy).unwrap();
            let copied = fs::read(&copy).unwrap();
            for step in [Step::Append(Owned::numbered(41, 2)), Step::Draft("more", vec![1.0])] {
                let _ = step.apply(&pool);
            }
            pool.close();
            assert_eq!(fs::read(&victim).unwrap(), bytes, "{place}");
            assert_eq!(fs::read(&copy).unwrap(), copied, "{place}");
            assert!(verify(&storage(&root)).unwrap().problems.is_empty(), "{place}");
            fs::remove_file(&copy).unwrap();
            fs::remove_dir_all(&root).unwrap();
            write_all(&root, &pool_files());
        }
    }

    #[test]
    fn of_writers_that_begin_at_once_on_a_shared_lock_one_has_it() {
        for _ in 0..50 {
            let folder = tempfile::tempdir().unwrap();
            let lock = folder.path().join(LOCK);
            fs::write(folder.path().join("other"), "precious").unwrap();
            fs::hard_link(folder.path().join("other"), &lock).unwrap();
            let storage = storage(folder.path());
            let held: Vec<_> = std::thread::scope(|scope| {
                let take = || storage.lock(Path::new(LOCK), "by one of them").ok();
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
                threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(held.len(), 1);
            assert_eq!(fs::read(folder.path().join("other")).unwrap(), b"precious");
            assert_eq!(fs::read(&lock).unwrap(), b"by one of them");
        }
    }
}
