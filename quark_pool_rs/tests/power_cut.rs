//! Does the pool survive a power cut? Every operation is a crash point; effects that no sync covers are
//! kept or lost in many combinations; recovery itself is cut, too.
#![allow(clippy::unwrap_used, reason = "tests may")]

mod common;

use std::collections::HashSet;
use std::path::Path;

use common::disk::{Disk, Fault};
use common::{Content, Owned, Step, create, goals, history, reader, retained, writer};
use quark_pool_rs::error::PoolError;
use quark_pool_rs::fork::fork;
use quark_pool_rs::log::{decode_head, read_chain};
use quark_pool_rs::pool::{OpenOptions, Pool};
use quark_pool_rs::rng::mix64;
use quark_pool_rs::storage::publish_directory;
use quark_pool_rs::verify::verify;

/// What was acknowledged, and when.
struct Workload {
    disk: Disk,
    /// Operations until the creation was acknowledged.
    created: usize,
    /// Per step: operations until it was acknowledged. Steps of one call share the number.
    acked: Vec<usize>,
    steps: Vec<Step>,
}

/// A protocol that is wrong: some syncs do not happen, or come after the step that counts on them.
#[derive(Debug, Clone, Copy)]
struct Mutant {
    /// Of the paths that are synced; empty for the root alone.
    prefix: &'static str,
    of_directories: bool,
    is_late: bool,
}

impl Mutant {
    const fn without(prefix: &'static str, of_directories: bool) -> Self {
        Self { prefix, of_directories, is_late: false }
    }

    const fn late(prefix: &'static str, of_directories: bool) -> Self {
        Self { prefix, of_directories, is_late: true }
    }

    fn infect(self, disk: &Disk) {
        if self.is_late {
            disk.delay_syncs(self.prefix, self.of_directories);
        } else {
            disk.ignore_syncs(self.prefix, self.of_directories);
        }
    }
}

/// All of them are noticed.
fn assert_caught(mutants: &[Mutant], mut find: impl FnMut(Mutant) -> Option<String>) {
    for &mutant in mutants {
        assert!(find(mutant).is_some(), "nothing noticed {mutant:?}");
    }
    goals::report(2, &[("mutants", mutants.len()), ("mutants_caught", mutants.len())]);
}

/// Create a pool and take steps; with long settings a new log begins on the way.
fn run(steps: Vec<Step>, mutant: Option<Mutant>) -> Workload {
    run_beside(steps, mutant, |_, _| {})
}

/// The same, with something that happens to the disk before each step.
fn run_beside(steps: Vec<Step>, mutant: Option<Mutant>, before: impl Fn(&Disk, usize)) -> Workload {
    let disk = Disk::default();
    if let Some(mutant) = mutant {
        mutant.infect(&disk);
    }
    let storage = disk.storage();
    let pool = create(&storage).unwrap();
    let created = disk.num_ops();
    let mut acked = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        before(&disk, number);
        step.apply(&pool).unwrap();
        acked.push(disk.num_ops());
    }
    pool.close();
    Workload { disk, created, acked, steps }
}

/// Appends to a pool that merges more than two small files of a kind. A merge is a step of its own.
fn run_merging(mutant: Option<Mutant>) -> Workload {
    let disk = Disk::default();
    if let Some(mutant) = mutant {
        mutant.infect(&disk);
    }
    let pool = create(&disk.storage()).unwrap().with_max_small_files(2);
    let created = disk.num_ops();
    let mut workload = Workload { disk, created, acked: Vec::new(), steps: Vec::new() };
    for number in 0..7 {
        let before = pool.snapshot().generation;
        let append = Step::Append(Owned::numbered(number, 2));
        append.apply(&pool).unwrap();
        let num_merges = (pool.snapshot().generation - before - 1) as usize;
        workload.steps.push(append);
        workload.steps.extend(std::iter::repeat_n(Step::Compact(0), num_merges));
        workload.acked.resize(workload.steps.len(), workload.disk.num_ops());
    }
    pool.close();
    workload
}

/// Which pending effects are lost: all combinations of a few, else the telling ones and some at random.
fn losses(pending: &[(usize, usize)], seed: u64) -> Vec<HashSet<(usize, usize)>> {
    let pick = |bits: &dyn Fn(usize) -> bool| -> HashSet<_> {
        pending.iter().enumerate().filter(|(i, _)| bits(*i)).map(|(_, p)| *p).collect()
    };
    let n = pending.len();
    if n <= 6 {
        return (0..1_usize << n).map(|mask| pick(&|i| mask >> i & 1 == 1)).collect();
    }
    let mut losses = vec![pick(&|_| false), pick(&|_| true)];
    for chosen in (0..n).step_by(n.div_ceil(12)) {
        losses.push(pick(&|i| i == chosen));
        losses.push(pick(&|i| i != chosen));
    }
    for round in 0..goals::size("QUARK_GOAL_LOSSES", 8) as u64 {
        losses.push(pick(&|i| mix64(seed ^ mix64(round) ^ i as u64) & 1 == 0));
    }
    losses
}

impl Workload {
    /// Whether an image holds what was acknowledged `crash` operations in, and nothing but the next step
    /// beyond it; or why not.
    fn check(&self, image: &Disk, crash: usize, append_more: bool) -> Result<(), String> {
        let storage = image.storage();
        let acked = self.acked.iter().filter(|&&at| at <= crash).count();
        let opened = if append_more { writer(&storage) } else { reader(&storage) };
        let pool = match opened {
            Ok(pool) => pool,
            Err(PoolError::NotFound { .. }) if crash < self.created => return Ok(()),
            Err(error) => return Err(format!("does not open: {error}")),
        };
        let snapshot = pool.snapshot();
        let found = snapshot.generation as usize;
        let next = self.acked.get(acked);
        let begun = acked + self.acked.iter().filter(|&at| Some(at) == next).count();
        if found < acked || found > begun {
            return Err(format!(
                "{acked} steps were acknowledged, {begun} begun, {found} are there"
            ));
        }
        let mut content = Content::after(&self.steps[..found]);
        match content.is_in(&snapshot) {
            Ok(true) => {}
            Ok(false) => return Err("content differs".to_owned()),
            Err(error) => return Err(format!("content cannot be read: {error}")),
        }
        // Time travel, as far back as is promised.
        if self.steps.iter().any(|step| matches!(step, Step::Collect(_))) {
            if snapshot.oldest as usize != oldest_after(&self.steps[..found]) {
                return Err(format!("the oldest is {}", snapshot.oldest));
            }
            for generation in snapshot.oldest..=snapshot.generation {
                let options = OpenOptions { writer: None, snapshot: Some(generation) };
                let then = Pool::open(storage.clone(), options).map_err(|e| e.to_string())?;
                let content = Content::after(&self.steps[..generation as usize]);
                if !content.is_in(&then.snapshot()).map_err(|e| e.to_string())? {
                    return Err(format!("snapshot {generation} differs"));
                }
            }
        }
        if append_more {
            let extra = Step::Append(Owned::numbered(99, 2));
            extra.apply(&pool).map_err(|error| format!("does not append: {error}"))?;
            pool.close();
            content.apply(&extra);
            let pool = reader(&storage).map_err(|error| format!("does not reopen: {error}"))?;
            if !content.is_in(&pool.snapshot()).map_err(|error| error.to_string())? {
                return Err("content differs after another append".to_owned());
            }
            // Reads the runs, too.
            let report = verify(&storage).map_err(|error| error.to_string())?;
            if let Some(problem) = report.problems.first() {
                return Err(format!("not sound: {problem}"));
            }
        }
        Ok(())
    }

    /// All images; the first that is wrong, and how many there were.
    fn enumerate(&self, cut_recovery: bool) -> (usize, Option<String>) {
        let (mut images, mut doubles) = (0, 0);
        // What was lost often makes no difference: a disk that is equal to one that was found right is right.
        let mut right = HashSet::new();
        let mut check = |image: &Disk, crash: usize, append_more: bool| {
            let acked = self.acked.iter().filter(|&&at| at <= crash).count();
            let case = (image.fingerprint(), acked, crash < self.created, append_more);
            if right.contains(&case) {
                return Ok(());
            }
            self.check(image, crash, append_more)?;
            right.insert(case);
            Ok::<_, String>(())
        };
        for crash in 0..=self.disk.num_ops() {
            for (i, lost) in losses(&self.disk.pending(crash), crash as u64).iter().enumerate() {
                let fresh = || self.disk.image(crash, lost);
                let wrong = |what| Some(format!("crash at {crash}, image {i}: {what}"));
                images += 2;
                if let Err(what) = check(&fresh(), crash, false) {
                    return (images, wrong(what));
                }
                let image = fresh();
                if let Err(what) = check(&image, crash, true) {
                    return (images, wrong(what));
                }
                if !cut_recovery || i % 7 != 0 {
                    continue;
                }
                // The second cut: while a writer tidies up.
                let (image, base) = fresh().rebased();
                let Ok(pool) = writer(&image.storage()) else { continue };
                drop(pool);
                for second in base..=image.num_ops() {
                    for lost in losses(&image.pending(second), second as u64).iter().take(12) {
                        images += 1;
                        doubles += 1;
                        if let Err(what) = check(&image.image(second, lost), crash, true) {
                            return (images, wrong(format!("again at {second}: {what}")));
                        }
                    }
                }
            }
        }
        let points = self.disk.num_ops() + 1;
        goals::report(2, &[("crash_points", points), ("images", images), ("double", doubles)]);
        (images, None)
    }
}

/// Appends and rescored ones made one file of, again, and the small files collected.
fn compacted() -> Vec<Step> {
    let append = |i| Step::Append(Owned::numbered(i, 2));
    let mut steps: Vec<_> = (0..5).map(append).collect();
    steps.extend([Step::Draft("reward", vec![1.5; 10]), Step::Publish("reward")]);
    steps.extend((5..8).map(append));
    // Those that were scored anew, those that were not, and the prompts.
    steps.extend([Step::Compact(40), Step::Compact(40), Step::Compact(40), append(8)]);
    steps.extend((9..14).map(append));
    steps.extend([Step::Compact(40), Step::Collect(1), append(14)]);
    steps
}

/// The oldest snapshot that is left after some steps.
fn oldest_after(steps: &[Step]) -> usize {
    (1..).zip(steps).fold(0, |oldest, (generation, step)| match step {
        Step::Collect(keep) => oldest.max(generation + 1 - *keep as usize),
        _ => oldest,
    })
}

/// Appends, merges, superseded versions and a discarded draft, and collections of all three.
fn collected() -> Vec<Step> {
    let append = |i| Step::Append(Owned::numbered(i, 2));
    let mut steps: Vec<_> = (0..8).map(append).collect();
    steps.extend([Step::Draft("reward", vec![1.5; 16]), Step::Collect(4), append(8)]);
    steps.extend([Step::Draft("reward", vec![2.5; 2]), Step::Publish("reward")]);
    steps.extend([Step::Draft("other", vec![0.5; 3]), Step::Collect(1)]);
    steps.extend([Step::Discard("other"), append(9), Step::Collect(2), append(10)]);
    steps
}

fn small() -> Vec<Step> {
    (0..10).map(|i| Step::Append(Owned::numbered(i, i % 3 + 1))).collect()
}

/// Scores anew, in as many drafts as make a merge, with appends between them; one that is given up.
fn rescored() -> Vec<Step> {
    let append = |i| Step::Append(Owned::numbered(i, 5));
    let mut steps = vec![append(0), append(1)];
    steps.extend((0..9_u8).map(|i| Step::Draft("reward", vec![f32::from(i * 7 % 5)])));
    steps.extend([append(2), Step::Draft("other", vec![1.0, f32::NAN])]);
    steps.extend([Step::Draft("reward", vec![2.5; 6]), Step::Publish("reward"), append(3)]);
    steps.extend([Step::Discard("other"), Step::Draft("reward", vec![-1.0; 20])]);
    steps.extend([Step::Publish("reward"), append(4)]);
    steps
}

/// Sampling settings so long that the log is soon worth a new one.
fn with_long_settings() -> Vec<Step> {
    let long = |mut batch: Owned| {
        batch.settings = format!("{{\"note\":\"{}{}\"}}", batch.key, "x".repeat(30_000));
        Step::Append(batch)
    };
    (0..5).map(|i| long(Owned::numbered(i, 2))).collect()
}

#[test]
fn what_was_acknowledged_survives_every_power_cut() {
    let workload = run(small(), None);
    assert!(workload.disk.files().iter().any(|(path, _)| path.starts_with("runs")), "no merge");
    let (images, wrong) = workload.enumerate(true);
    assert_eq!(wrong, None);
    assert!(images > 5_000, "only {images} images");
}

#[test]
fn appends_that_merge_small_files_survive_every_power_cut() {
    let workload = run_merging(None);
    let merges = |workload: &Workload| {
        workload.steps.iter().filter(|step| matches!(step, Step::Compact(_))).count()
    };
    assert!(merges(&workload) > 4, "{} merges", merges(&workload));
    assert_eq!(workload.enumerate(true).1, None);
    let mutants = ["segments", "prompts"]
        .map(|directory| [false, true].map(|of| Mutant::without(directory, of)));
    assert_caught(mutants.as_flattened(), |mutant| run_merging(Some(mutant)).enumerate(false).1);
}

#[test]
fn a_new_log_survives_every_power_cut() {
    let workload = run(with_long_settings(), None);
    let logs =
        workload.disk.files().iter().filter(|(path, _)| path.starts_with("manifest")).count();
    assert!(logs > 1, "no new log");
    assert_eq!(workload.enumerate(false).1, None);
}

/// A copy by hard links before each step: the log and HEAD have a second name.
fn run_copied(mutant: Option<Mutant>) -> Workload {
    let steps = (0..5).map(|i| Step::Append(Owned::numbered(i, 2))).collect();
    run_beside(steps, mutant, |disk, number| {
        for name in ["HEAD", "manifest/00000000000000000000.log"] {
            let copy = format!("copy-{number}-{}", name.len());
            disk.storage().link(Path::new(name), Path::new(&copy)).unwrap();
        }
    })
}

#[test]
fn a_pool_whose_log_is_copied_by_hard_links_survives_every_power_cut() {
    let workload = run_copied(None);
    let files = workload.disk.files();
    for number in 0..5_u64 {
        let copy = |len| {
            let name = format!("copy-{number}-{len}");
            &files.iter().find(|(path, _)| *path == Path::new(&name)).unwrap().1
        };
        // Each has what was there then, and nothing that came later.
        assert_eq!(read_chain(copy(33), 0).records.last().unwrap().generation, number);
        assert_eq!(decode_head(copy(4)).unwrap().0, number);
    }
    assert_eq!(workload.enumerate(true).1, None);
    let mutants = [Mutant::without("manifest", false), Mutant::without("manifest", true)];
    assert_caught(&mutants, |mutant| run_copied(Some(mutant)).enumerate(false).1);
}

#[test]
fn scores_anew_survive_every_power_cut() {
    let workload = run(rescored(), None);
    let is_there = |prefix| workload.disk.files().iter().any(|(path, _)| path.starts_with(prefix));
    assert!(is_there("scores") && is_there("runs"), "no draft, or no merge of one");
    let (images, wrong) = workload.enumerate(true);
    assert_eq!(wrong, None);
    assert!(images > 5_000, "only {images} images");
}

#[test]
fn a_collection_survives_every_power_cut() {
    let workload = run(collected(), None);
    let files = workload.disk.files();
    let num = |prefix| files.iter().filter(|(path, _)| path.starts_with(prefix)).count();
    assert_eq!((num("manifest"), num("segments"), num("scores")), (2, 11, 2));
    let (images, wrong) = workload.enumerate(true);
    assert_eq!(wrong, None);
    assert!(images > 5_000, "only {images} images");
}

#[test]
fn a_compaction_survives_every_power_cut() {
    let workload = run(compacted(), None);
    let files = workload.disk.files();
    let num = |prefix| files.iter().filter(|(path, _)| path.starts_with(prefix)).count();
    assert_eq!((num("manifest"), num("segments"), num("runs")), (1, 3, 3));
    let (images, wrong) = workload.enumerate(true);
    assert_eq!(wrong, None);
    assert!(images > 5_000, "only {images} images");
}

#[test]
fn a_retention_survives_every_power_cut() {
    let steps = retained();
    let first = steps.iter().position(|step| matches!(step, Step::Retain(_))).unwrap();
    let files = run(steps[..=first].to_vec(), None).disk.files();
    let num = |prefix| files.iter().filter(|(path, _)| path.starts_with(prefix)).count();
    // The eight that were appended, the compacted one and what was left of it; and so on.
    assert_eq!((num("segments"), num("scores"), num("runs")), (10, 2, 7));
    let workload = run(steps, None);
    let (images, wrong) = workload.enumerate(false);
    assert_eq!(wrong, None);
    assert!(images > 5_000, "only {images} images");
}

#[test]
fn a_retention_with_a_wrong_sync_is_caught() {
    let mutants = ["segments", "scores", "runs"].into_iter().flat_map(|prefix| {
        [
            Mutant::without(prefix, false),
            Mutant::without(prefix, true),
            Mutant::late(prefix, false),
            Mutant::late(prefix, true),
        ]
    });
    let steps = retained();
    let at = steps.iter().position(|step| matches!(step, Step::Retain(_))).unwrap();
    assert_caught(&mutants.collect::<Vec<_>>(), |mutant| {
        let disk = Disk::default();
        let pool = create(&disk.storage()).unwrap();
        let mut acked = Vec::new();
        for (number, step) in steps[..=at].iter().enumerate() {
            if number == at {
                // Only what the retention writes.
                mutant.infect(&disk);
            }
            step.apply(&pool).unwrap();
            acked.push(disk.num_ops());
        }
        pool.close();
        Workload { disk, created: 0, acked, steps: steps[..=at].to_vec() }.enumerate(false).1
    });
}

#[test]
fn random_histories_survive_every_power_cut() {
    let target = goals::size("QUARK_GOAL_IMAGES", 1);
    let first = goals::size("QUARK_GOAL_SEED", 0) as u64;
    let mut images = 0;
    for seed in first.. {
        let (more, wrong) = run(history(seed), None).enumerate(true);
        assert_eq!(wrong, None, "seed {seed}");
        images += more;
        if images >= target {
            break;
        }
    }
}

#[test]
fn a_collection_with_a_wrong_sync_is_caught() {
    let files = Mutant::without("manifest", false);
    let names = Mutant::without("manifest", true);
    let late = [Mutant::late("manifest", false), Mutant::late("manifest", true)];
    assert_caught(&[files, names, late[0], late[1]], |mutant| {
        let disk = Disk::default();
        let pool = create(&disk.storage()).unwrap();
        let steps: Vec<_> = (0..9).map(|i| Step::Append(Owned::numbered(i, 2))).collect();
        let mut acked = Vec::new();
        let mut apply = |step: &Step| {
            step.apply(&pool).unwrap();
            acked.push(disk.num_ops());
        };
        steps.iter().for_each(&mut apply);
        // Only the collection's own log and its name.
        mutant.infect(&disk);
        apply(&Step::Collect(1));
        pool.close();
        let steps = steps.into_iter().chain([Step::Collect(1)]).collect();
        Workload { disk, created: 0, acked, steps }.enumerate(false).1
    });
}

#[test]
fn a_protocol_with_a_wrong_sync_is_caught() {
    let mutants = [
        Mutant::without("scores", false),
        Mutant::without("scores", true),
        Mutant::without("segments", false),
        Mutant::without("prompts", false),
        Mutant::without("runs", false),
        Mutant::without("manifest", false),
        Mutant::without("segments", true),
        Mutant::without("prompts", true),
        Mutant::without("runs", true),
        Mutant::without("manifest", true),
        Mutant::without("", true),
        Mutant::late("scores", true),
        Mutant::late("segments", true),
        Mutant::late("prompts", true),
        Mutant::late("runs", true),
    ];
    assert_caught(&mutants, |mutant| {
        let steps = if mutant.prefix == "scores" { rescored() } else { small() };
        run(steps, Some(mutant)).enumerate(false).1
    });
}

/// Write a directory without a sync, publish it, and look at every power cut.
fn publish(mutant: Option<Mutant>) -> Option<String> {
    let disk = Disk::default();
    if let Some(mutant) = mutant {
        mutant.infect(&disk);
    }
    let storage = disk.storage();
    for directory in ["runs", "runs/staged", "runs/staged/deep"] {
        storage.create_dir(Path::new(directory)).unwrap();
    }
    storage.sync_dir(Path::new("")).unwrap();
    let content = vec![7; 1500];
    for file in ["runs/staged/a", "runs/staged/deep/b"] {
        storage.create(Path::new(file)).unwrap().write_all(&content).unwrap();
    }
    publish_directory(&*storage, Path::new("runs/staged"), Path::new("runs/final")).unwrap();
    let acked = disk.num_ops();
    for crash in 0..=acked {
        for lost in losses(&disk.pending(crash), crash as u64) {
            let image = disk.image(crash, &lost).storage();
            if image.list(Path::new("runs/final")).is_err() {
                if crash == acked {
                    return Some("it is gone after it was published".to_owned());
                }
                continue;
            }
            for file in ["runs/final/a", "runs/final/deep/b"] {
                if image.read(Path::new(file)).ok().as_ref() != Some(&content) {
                    return Some(format!("{file} is not whole after a crash at {crash}"));
                }
            }
        }
    }
    None
}

#[test]
fn a_published_directory_is_whole_or_absent() {
    assert_eq!(publish(None), None);
    let mutants = [
        Mutant::without("runs/staged", false),
        Mutant::without("runs/staged", true),
        Mutant::without("runs", true),
        Mutant::late("runs/staged", false),
        Mutant::late("runs/staged", true),
    ];
    assert_caught(&mutants, |mutant| publish(Some(mutant)));
}

/// Fork a pool with merges and a draft, and look at every power cut; what is wrong first.
fn fork_images(refuse_links: bool, mutant: Option<Mutant>) -> Option<String> {
    let disk = Disk::default();
    if refuse_links {
        disk.refuse_links();
    }
    let original = create(&disk.below("a")).unwrap();
    let steps = &rescored()[..13];
    for step in steps {
        step.apply(&original).unwrap();
    }
    let content = Content::after(steps);
    assert!(!content.drafts.is_empty(), "no draft");
    original.close();

    let begin = disk.num_ops();
    if let Some(mutant) = mutant {
        mutant.infect(&disk);
    }
    let snapshot = original.snapshot();
    fork(&snapshot, &*disk.storage(), Path::new("b"), "fork").unwrap();
    let acked = disk.num_ops();
    let check = |image: &Disk, crash: usize| -> Result<(), String> {
        let say = |error: PoolError| error.to_string();
        let source = reader(&image.below("a")).map_err(say)?;
        if !content.is_in(&source.snapshot()).map_err(say)? {
            return Err("the original differs".to_owned());
        }
        if image.storage().list(Path::new("b")).is_err() {
            return if crash < acked { Ok(()) } else { Err("it is gone".to_owned()) };
        }
        // Alone: its files are its own.
        for (path, _) in image.files() {
            if path.starts_with("a") {
                image.storage().remove(&path).unwrap();
            }
        }
        let storage = image.below("b");
        let pool = writer(&storage).map_err(say)?;
        if pool.snapshot().digest != snapshot.digest || pool.snapshot().oldest != 13 {
            return Err("another snapshot".to_owned());
        }
        let mut content = content.clone();
        let extra = Step::Append(Owned::numbered(99, 2));
        extra.apply(&pool).map_err(say)?;
        content.apply(&extra);
        if !content.is_in(&pool.snapshot()).map_err(say)? {
            return Err("content differs".to_owned());
        }
        match verify(&storage).map_err(say)?.problems.first() {
            Some(problem) => Err(format!("not sound: {problem}")),
            None => Ok(()),
        }
    };
    let mut images = 0;
    for crash in begin..=acked {
        for (i, lost) in losses(&disk.pending(crash), crash as u64).iter().enumerate() {
            images += 1;
            if let Err(what) = check(&disk.image(crash, lost), crash) {
                return Some(format!("crash at {crash}, image {i}: {what}"));
            }
        }
    }
    goals::report(2, &[("crash_points", acked - begin + 1), ("images", images)]);
    None
}

#[test]
fn a_fork_is_whole_or_absent() {
    assert_eq!(fork_images(false, None), None);
    assert_eq!(fork_images(true, None), None);
    let mutants = [
        Mutant::without("b.partial-fork", false),
        Mutant::without("b.partial-fork/segments", true),
        Mutant::without("b.partial-fork/runs", true),
        Mutant::without("b.partial-fork/scores", true),
        Mutant::without("b.partial-fork/manifest", true),
        Mutant::without("", true),
        Mutant::late("b.partial-fork", false),
        Mutant::late("b.partial-fork", true),
    ];
    assert_caught(&mutants, |mutant| fork_images(false, Some(mutant)));
    let copies = Mutant::without("b.partial-fork/segments", false);
    assert_caught(&[copies], |mutant| fork_images(true, Some(mutant)));
}

#[test]
fn what_follows_a_failed_sync_and_a_reopening_survives_every_power_cut() {
    for call in 1..20 {
        let disk = Disk::default();
        let storage = disk.storage();
        let pool = create(&storage).unwrap();
        Owned::numbered(0, 2).append(&pool).unwrap();
        disk.set_fault(disk.num_calls() + call, false, Fault::Io);
        let refused = Owned::numbered(1, 2).append(&pool).is_err();
        disk.clear_fault();
        pool.close();
        let pool = writer(&storage).unwrap();
        Owned::numbered(2, 2).append(&pool).unwrap();
        let acknowledged = pool.snapshot().generation;
        let crash = disk.num_ops();
        for lost in losses(&disk.pending(crash), 1) {
            let opened = reader(&disk.image(crash, &lost).storage());
            let found = opened.map(|pool| pool.snapshot().generation);
            assert!(
                matches!(found, Ok(found) if found == acknowledged),
                "call {call} failed (refused: {refused}), then: {found:?}"
            );
        }
    }
}
