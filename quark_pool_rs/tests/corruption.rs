//! Is damage ever served? Files are flipped, cut, lengthened, zeroed, swapped and removed; reading must end
//! in an error that names a file, or in exactly what was committed, and verification must find it.
#![allow(clippy::unwrap_used, reason = "tests may")]

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use common::disk::Disk;
use common::{Content, Owned, Step, create, goals, reader};
use quark_pool_rs::error::{PoolError, Result};
use quark_pool_rs::quantization::Quantization;
use quark_pool_rs::ranking::{RemainderRule, TieRule};
use quark_pool_rs::rng::mix64;
use quark_pool_rs::snapshot::Snapshot;
use quark_pool_rs::verify::verify;

type Files = Vec<(PathBuf, Vec<u8>)>;

fn pool(appends: u32) -> (Files, Vec<Owned>) {
    let disk = Disk::default();
    let pool = create(&disk.storage()).unwrap();
    let batches: Vec<Owned> = (0..appends).map(|i| Owned::numbered(i, 3)).collect();
    for batch in &batches {
        batch.append(&pool).unwrap();
    }
    (disk.files(), batches)
}

/// Everything that a ranking says.
fn ranking(snapshot: &Arc<Snapshot>) -> Result<(Vec<i16>, Vec<u64>, Vec<u32>)> {
    let spread = RemainderRule::Spread;
    let quantization = Quantization::new(snapshot.clone(), "reward", 3, TieRule::Hash, spread)?;
    let labels = quantization.labels()?;
    let mut places = Vec::new();
    for (quantile, count) in (0..).zip(quantization.counts()) {
        places.extend((0..count).map(|index| (quantile, index)));
    }
    let (mut ids, mut scores) = (vec![0; places.len()], vec![0.0; places.len()]);
    quantization.samples_at(&places, &mut ids, &mut scores)?;
    scores.extend(quantization.lower_bounds()?);
    Ok((labels, ids, scores.into_iter().map(f32::to_bits).collect()))
}

struct Oracle {
    files: Files,
    content: Content,
    ranking: (Vec<i16>, Vec<u64>, Vec<u32>),
}

impl Oracle {
    fn new(appends: u32) -> Self {
        let (files, batches) = pool(appends);
        Self::of(files, Content { batches, ..Content::default() })
    }

    /// Of a pool whose scores were made anew.
    fn rescored() -> Self {
        let disk = Disk::default();
        let pool = create(&disk.storage()).unwrap();
        let mut steps: Vec<_> = (0..2).map(|i| Step::Append(Owned::numbered(i, 3))).collect();
        steps.push(Step::Draft("reward", vec![0.5, -2.0, f32::NAN, 4.0]));
        steps.push(Step::Draft("reward", vec![0.5, 7.0]));
        steps.push(Step::Publish("reward"));
        for step in &steps {
            step.apply(&pool).unwrap();
        }
        Self::of(disk.files(), Content::after(&steps))
    }

    /// Of a pool whose files were made of smaller ones, which are still there.
    fn compacted() -> Self {
        let disk = Disk::default();
        let pool = create(&disk.storage()).unwrap();
        let mut steps: Vec<_> = (0..3).map(|i| Step::Append(Owned::numbered(i, 2))).collect();
        steps.push(Step::Compact(10));
        for step in &steps {
            step.apply(&pool).unwrap();
        }
        Self::of(disk.files(), Content::after(&steps))
    }

    /// Of a pool whose oldest samples were removed from a compacted file, a merged run and a file of scores;
    /// what they lay in is still there.
    fn retained() -> Self {
        let disk = Disk::default();
        let pool = create(&disk.storage()).unwrap();
        let mut steps: Vec<_> = (0..8).map(|i| Step::Append(Owned::numbered(i, 1))).collect();
        steps.push(Step::Compact(10));
        steps.push(Step::Draft("other", vec![0.5, -2.0, f32::NAN, 4.0, 1.0, 2.0, 3.0, f32::NAN]));
        steps.extend([Step::Publish("other"), Step::Retain(5)]);
        for step in &steps {
            step.apply(&pool).unwrap();
        }
        Self::of(disk.files(), Content::after(&steps))
    }

    fn of(files: Files, content: Content) -> Self {
        let opened = reader(&Disk::with_files(&files).storage()).unwrap();
        let ranking = ranking(&opened.snapshot()).unwrap();
        let clean = verify(&Disk::with_files(&files).storage()).unwrap();
        assert!(clean.problems.is_empty(), "{:?}", clean.problems);
        Self { files, content, ranking }
    }

    /// Whether reading fails as it should (true) or gives what was committed (false).
    fn is_refused(&self, files: &Files, what: &str) -> bool {
        let storage = Disk::with_files(files).storage();
        let read = || {
            let pool = reader(&storage)?;
            let snapshot = pool.snapshot();
            Ok((self.content.is_in(&snapshot)?, ranking(&snapshot)?))
        };
        match read() {
            Ok((is_same, ranking)) => {
                assert!(is_same && ranking == self.ranking, "{what}: wrong data was served");
                false
            }
            Err(PoolError::Corrupted { file, .. }) => {
                assert!(!file.is_empty(), "{what}: no file named");
                true
            }
            Err(error) => panic!("{what}: {error}"),
        }
    }

    /// Damage one file, check, and say whether reading was refused.
    fn check(&self, file: usize, damage: impl FnOnce(&mut Vec<u8>), what: &str) -> bool {
        let mut files = self.files.clone();
        damage(&mut files[file].1);
        let what = format!("{} {what}", files[file].0.display());
        let refused = self.is_refused(&files, &what);
        assert!(is_found_by_verify(&files), "{what}: verification is content");
        refused
    }

    fn is_message(&self, file: usize) -> bool {
        self.files[file].0.ends_with("LOCK")
    }
}

fn is_found_by_verify(files: &Files) -> bool {
    match verify(&Disk::with_files(files).storage()) {
        Ok(report) => !report.problems.is_empty(),
        Err(error) => matches!(error, PoolError::NotFound { .. }),
    }
}

#[test]
fn every_flipped_byte_is_refused_or_harmless_and_always_found() {
    let oracle = Oracle::new(2);
    let masks: Vec<u8> = match goals::size("QUARK_GOAL_MASKS", 2) {
        2 => vec![0x01, 0x80],
        all => (1..=all as u8).collect(),
    };
    let (mut flips, mut refused) = (0, 0);
    for file in 0..oracle.files.len() {
        for at in 0..oracle.files[file].1.len() {
            for mask in &masks {
                let what = format!("byte {at} ^ {mask:#x}");
                refused += usize::from(oracle.check(file, |bytes| bytes[at] ^= mask, &what));
                flips += 1;
            }
        }
    }
    goals::report(4, &[("mutants", flips), ("refused", refused), ("harmless", flips - refused)]);
    assert!(flips > 10_000 * masks.len() && refused * 10 > flips * 9, "{refused} of {flips}");
}

/// Two to eight bytes of one file or several. Not of HEAD: it and the end of the log, both damaged, are what a
/// power cut during a commit may leave, so the commit is gone then (and `verify` names HEAD).
#[test]
fn several_changed_bytes_are_refused_or_harmless_and_always_found() {
    let oracle = Oracle::rescored();
    let count = goals::size("QUARK_GOAL_RANDOM_DAMAGES", 2_000) as u64;
    let first = goals::size("QUARK_GOAL_SEED", 0) as u64;
    let is_drawn = |file: &usize| {
        let (path, content) = &oracle.files[*file];
        !path.ends_with("HEAD") && !content.is_empty()
    };
    let filled: Vec<usize> = (0..oracle.files.len()).filter(is_drawn).collect();
    let (mut harmless, mut drawn) = (0, mix64(first));
    let mut below = |limit: usize| {
        drawn = mix64(drawn + 1);
        (drawn % limit as u64) as usize
    };
    for number in 0..count {
        let mut files = oracle.files.clone();
        for _ in 0..below(7) + 2 {
            let file = filled[below(filled.len())];
            let at = below(files[file].1.len());
            files[file].1[at] ^= 1 + below(255) as u8;
        }
        if files == oracle.files {
            continue;
        }
        let what = format!("damage {number} of seed {first}");
        harmless += usize::from(!oracle.is_refused(&files, &what));
        assert!(is_found_by_verify(&files), "{what}: verification is content");
    }
    goals::report(4, &[("random", count as usize), ("random_harmless", harmless)]);
}

#[test]
fn new_files_and_those_they_took_the_place_of_are_guarded_like_the_rest() {
    for oracle in [Oracle::compacted(), Oracle::retained()] {
        let mut refused = [0; 2];
        for file in (0..oracle.files.len()).filter(|file| !oracle.is_message(*file)) {
            for at in (0..oracle.files[file].1.len()).step_by(5) {
                let what = format!("byte {at}");
                refused[usize::from(oracle.check(file, |bytes| bytes[at] ^= 0x10, &what))] += 1;
            }
        }
        // The older files are found by verification alone: nobody reads them.
        assert!(refused[0] > 600 && refused[1] > 600, "{refused:?}");
    }
}

#[test]
fn scores_that_came_later_are_guarded_like_the_rest() {
    let oracle = Oracle::rescored();
    let is_part = |file: &usize| {
        let path = &oracle.files[*file].0;
        path.starts_with("scores") || path.extension().is_some_and(|e| e == "log")
    };
    let (mut flips, mut refused) = (0, 0);
    for file in (0..oracle.files.len()).filter(is_part) {
        for at in 0..oracle.files[file].1.len() {
            let what = format!("byte {at}");
            refused += usize::from(oracle.check(file, |bytes| bytes[at] ^= 0x04, &what));
            oracle.check(file, |bytes| bytes.truncate(at), &format!("cut to {at}"));
            flips += 1;
        }
    }
    assert!(flips > 2_000 && refused * 10 > flips * 9, "{refused} of {flips}");
}

#[test]
fn a_merged_run_is_guarded_like_the_rest() {
    let oracle = Oracle::new(9);
    let run = oracle.files.iter().position(|(path, _)| path.starts_with("runs")).unwrap();
    for at in 0..oracle.files[run].1.len() {
        let flip = |bytes: &mut Vec<u8>| bytes[at] ^= 0x10;
        oracle.check(run, flip, &format!("byte {at}"));
    }
}

#[test]
fn every_shortened_file_is_refused() {
    let oracle = Oracle::new(2);
    for file in (0..oracle.files.len()).filter(|&file| !oracle.is_message(file)) {
        let is_head = oracle.files[file].0.ends_with("HEAD");
        for len in 0..oracle.files[file].1.len() {
            let refused = oracle.check(file, |bytes| bytes.truncate(len), &format!("cut to {len}"));
            // Without a HEAD nothing is missing; it only bounds what a log may lose.
            assert!(refused != is_head, "{} cut to {len}", oracle.files[file].0.display());
        }
    }
}

#[test]
fn a_lengthened_file_is_refused_or_harmless() {
    let oracle = Oracle::new(2);
    for file in (0..oracle.files.len()).filter(|&file| !oracle.is_message(file)) {
        for len in 1..=64 {
            let mut files = oracle.files.clone();
            files[file].1.extend(vec![0xA5; len]);
            oracle.is_refused(&files, &format!("{} and {len} bytes", files[file].0.display()));
        }
    }
}

#[test]
fn a_zeroed_sector_is_refused_or_harmless() {
    let oracle = Oracle::new(2);
    for file in (0..oracle.files.len()).filter(|&file| !oracle.is_message(file)) {
        for start in (0..oracle.files[file].1.len()).step_by(512) {
            let mut files = oracle.files.clone();
            files[file].1[start..].iter_mut().take(512).for_each(|byte| *byte = 0);
            if files[file].1 != oracle.files[file].1 {
                oracle.check(file, |b| b.clone_from(&files[file].1), &format!("zeroed at {start}"));
            }
        }
    }
}

#[test]
fn swapped_and_missing_files_are_refused() {
    let oracle = Oracle::new(9);
    let data: Vec<usize> = (0..oracle.files.len())
        .filter(|&file| oracle.files[file].0.extension().is_some_and(|e| e == "arrow"))
        .collect();
    for pair in data.windows(2) {
        let mut files = oracle.files.clone();
        let first = std::mem::take(&mut files[pair[0]].1);
        let second = std::mem::replace(&mut files[pair[1]].1, first);
        files[pair[0]].1 = second;
        assert!(oracle.is_refused(&files, "swapped"));
        assert!(is_found_by_verify(&files));
    }
    for file in (0..oracle.files.len()).filter(|&file| !oracle.is_message(file)) {
        let mut files = oracle.files.clone();
        let (path, _) = files.remove(file);
        let is_log = path.extension().is_some_and(|e| e == "log");
        if path.ends_with("HEAD") {
            assert!(!oracle.is_refused(&files, "without HEAD"));
        } else if is_log {
            // Its directory is gone with it here, so there is no pool at all.
            assert!(reader(&Disk::with_files(&files).storage()).is_err());
        } else {
            let what = format!("without {}", path.display());
            assert!(oracle.is_refused(&files, &what), "{what}");
            assert!(is_found_by_verify(&files));
        }
    }
}

#[test]
fn the_log_of_another_pool_is_refused() {
    let oracle = Oracle::new(2);
    let (other, _) = pool(1);
    let mut files = oracle.files.clone();
    for (path, bytes) in &mut files {
        if path.extension().is_some_and(|e| e == "log") {
            bytes.clone_from(&other.iter().find(|(p, _)| p == path).unwrap().1);
        }
    }
    assert!(oracle.is_refused(&files, "an older log"));
}

#[test]
fn a_collection_that_cannot_read_a_log_removes_nothing() {
    let disk = Disk::default();
    let pool = create(&disk.storage()).unwrap();
    let steps: Vec<_> = (0..9).map(|i| Step::Append(Owned::numbered(i, 2))).collect();
    for step in &steps {
        step.apply(&pool).unwrap();
    }
    pool.collect(3, false).unwrap();
    Owned::numbered(9, 2).append(&pool).unwrap();
    let intact = disk.files();
    let old = intact.iter().position(|(path, _)| path.starts_with("manifest")).unwrap();
    for at in (0..intact[old].1.len()).step_by(41) {
        let mut files = intact.clone();
        files[old].1[at] ^= 1;
        let disk = Disk::with_files(&files);
        let pool = common::writer(&disk.storage()).unwrap();
        let before = disk.files().len();
        assert!(matches!(pool.collect(5, false), Err(PoolError::Corrupted { .. })), "byte {at}");
        assert_eq!(disk.files().len(), before, "byte {at}");
    }
}
