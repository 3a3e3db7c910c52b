//! Does the pool cope when the system refuses? Each operation in turn fails, once or from then on; what was
//! acknowledged must stay, what was refused must be as if it had not been asked for.
#![allow(clippy::unwrap_used, reason = "tests may")]

mod common;

use std::path::Path;

use common::disk::{Disk, Fault};
use common::{
    Content, Owned, SOURCE, Step, check_content, create, goals, history, reader, retained, writer,
};
use quark_pool_rs::error::{PoolError, Result};
use quark_pool_rs::fork::fork;
use quark_pool_rs::pool::Pool;
use quark_pool_rs::verify::verify;

fn batches() -> Vec<Owned> {
    (0..10).map(|i| Owned::numbered(i, 2)).collect()
}

/// The faults to try: two in every run, all for the goal.
fn faults() -> &'static [Fault] {
    &Fault::ALL[..goals::size("QUARK_GOAL_FAULTS", 2)]
}

/// Calls until the creation, and until the end of all appends, without a fault.
fn calls() -> (usize, usize) {
    let disk = Disk::default();
    let pool = create(&disk.storage()).unwrap();
    let created = disk.num_calls();
    for batch in batches() {
        batch.append(&pool).unwrap();
    }
    (created, disk.num_calls())
}

#[test]
fn a_failing_operation_loses_nothing_and_invents_nothing() {
    let (created, end) = calls();
    goals::report(5, &[("runs", faults().len() * 2 * (end - created))]);
    for &fault in faults() {
        for from_then_on in [false, true] {
            for at in created + 1..=end {
                let what = format!("{fault:?} at {at}, from then on: {from_then_on}");
                let disk = Disk::default();
                let storage = disk.storage();
                let pool = create(&storage).unwrap();
                disk.set_fault(at, from_then_on, fault);
                let mut kept = Vec::new();
                let mut is_poisoned = false;
                for batch in batches() {
                    match batch.append(&pool) {
                        Ok(_) => {
                            assert!(!is_poisoned, "{what}: appended after a failed sync");
                            kept.push(batch);
                        }
                        Err(PoolError::Io { .. }) => assert!(!is_poisoned, "{what}: not poisoned"),
                        Err(PoolError::Poisoned) => is_poisoned = true,
                        Err(error) => panic!("{what}: {error}"),
                    }
                    disk.clear_fault_if(!from_then_on);
                }
                disk.clear_fault();
                assert!(
                    check_content(&pool.snapshot(), &kept).unwrap(),
                    "{what}: the handle differs"
                );
                pool.close();
                drop(pool);
                assert!(!disk.retried_a_failed_sync(), "{what}: a failed sync was trusted");

                let snapshot = reader(&storage).unwrap().snapshot();
                let found = snapshot.generation as usize;
                // A commit whose sync failed may be there: it was refused, not undone.
                assert!(found == kept.len() || found == kept.len() + 1, "{what}: {found} appends");
                assert!(check_content(&snapshot, &kept_and_next(&kept, found)).unwrap(), "{what}");

                let pool = writer(&storage).unwrap();
                let again = kept_and_next(&kept, found);
                for batch in batches() {
                    batch.append(&pool).unwrap();
                }
                let mut all = again.clone();
                all.extend(batches().into_iter().filter(|b| again.iter().all(|a| a.key != b.key)));
                assert!(check_content(&pool.snapshot(), &all).unwrap(), "{what}: after reopening");
            }
        }
    }
}

/// What was acknowledged, and the refused batch after it if it is there all the same.
fn kept_and_next(kept: &[Owned], found: usize) -> Vec<Owned> {
    let mut batches_found = kept.to_vec();
    if found > kept.len() {
        let next = batches().into_iter().find(|b| kept.iter().all(|k| k.key != b.key));
        batches_found.extend(next);
    }
    batches_found
}

/// Score 20 samples anew, from where an earlier attempt ended.
fn rescore(pool: &Pool) -> Result<()> {
    while let first @ 0..20 = pool.draft_end("reward").unwrap_or(0) {
        let scores: Vec<f32> = (first..20.min(first + 3)).map(|id| (id * 7 % 9) as f32).collect();
        pool.draft_scores("reward", SOURCE, first, &scores)?;
    }
    pool.publish_scores("reward")
}

#[test]
fn scores_anew_go_on_where_a_failing_operation_stopped_them() {
    let prepared = |disk: &Disk| {
        let pool = create(&disk.storage()).unwrap();
        for batch in batches() {
            batch.append(&pool).unwrap();
        }
        pool
    };
    let disk = Disk::default();
    let pool = prepared(&disk);
    let begin = disk.num_calls();
    rescore(&pool).unwrap();
    let end = disk.num_calls();
    let old = Content::after(&batches().into_iter().map(Step::Append).collect::<Vec<_>>());
    let mut new = old.clone();
    new.apply(&Step::Draft("reward", (0..20).map(|id| (id * 7 % 9) as f32).collect()));
    new.apply(&Step::Publish("reward"));
    goals::report(5, &[("runs", faults().len() * 2 * (end - begin))]);
    let mut num_failed = 0;
    for &fault in faults() {
        for from_then_on in [false, true] {
            for at in begin + 1..=end {
                let what = format!("{fault:?} at {at}, from then on: {from_then_on}");
                let disk = Disk::default();
                let pool = prepared(&disk);
                disk.set_fault(at, from_then_on, fault);
                let failed = rescore(&pool).is_err();
                num_failed += usize::from(failed);
                disk.clear_fault();
                let before = if failed { &old } else { &new };
                let samples = check_content(&pool.snapshot(), &before.batches);
                assert!(samples.unwrap(), "{what}: the handle differs");
                pool.close();
                let pool = writer(&disk.storage()).unwrap();
                let is_new = new.is_in(&pool.snapshot()).unwrap();
                if !is_new {
                    // A publication whose sync failed may be there: it was refused, not undone.
                    assert!(check_content(&pool.snapshot(), &old.batches).unwrap(), "{what}");
                    rescore(&pool).unwrap();
                }
                assert!(failed || is_new, "{what}: published scores are gone");
                assert!(new.is_in(&pool.snapshot()).unwrap(), "{what}: after going on");
                let problems = verify(&disk.storage()).unwrap().problems;
                assert!(problems.is_empty(), "{what}: {problems:?}");
            }
        }
    }
    assert!(
        num_failed > faults().len() * 2 * (end - begin) * 3 / 4,
        "only {num_failed} faults were felt"
    );
}

#[test]
fn a_history_goes_on_after_a_failing_operation() {
    let mut runs = 0;
    let first = goals::size("QUARK_GOAL_SEED", 0) as u64;
    for seed in first..first + goals::size("QUARK_GOAL_HISTORIES", 1) as u64 {
        let steps = history(seed);
        let disk = Disk::default();
        let pool = create(&disk.storage()).unwrap();
        let begin = disk.num_calls();
        for step in &steps {
            step.apply(&pool).unwrap();
        }
        for at in begin + 1..=disk.num_calls() {
            for &fault in faults() {
                for from_then_on in [false, true] {
                    let what = format!("{fault:?} at {at} of history {seed}, on: {from_then_on}");
                    fail_once_in(&steps, at, from_then_on, fault, &what);
                    runs += 1;
                }
            }
        }
    }
    goals::report(5, &[("runs", runs)]);
}

#[test]
fn a_retention_that_fails_removes_nothing_and_can_be_repeated() {
    let steps = retained();
    let disk = Disk::default();
    let pool = create(&disk.storage()).unwrap();
    let mut calls = Vec::new();
    for step in &steps {
        let begin = disk.num_calls();
        step.apply(&pool).unwrap();
        if matches!(step, Step::Retain(_)) {
            calls.extend(begin + 1..=disk.num_calls());
        }
    }
    goals::report(5, &[("runs", faults().len() * 2 * calls.len())]);
    for at in calls {
        for &fault in faults() {
            for from_then_on in [false, true] {
                let what = format!("{fault:?} at {at}, from then on: {from_then_on}");
                fail_once_in(&steps, at, from_then_on, fault, &what);
            }
        }
    }
}

/// Take steps until one fails, reopen the pool, and take the rest.
fn fail_once_in(steps: &[Step], at: usize, from_then_on: bool, fault: Fault, what: &str) {
    let disk = Disk::default();
    let pool = create(&disk.storage()).unwrap();
    disk.set_fault(at, from_then_on, fault);
    let is_done = |step: &&Step| match step.apply(&pool) {
        Ok(()) => true,
        Err(PoolError::Io { .. }) => false,
        Err(error) => panic!("{what}: {error}"),
    };
    let done = steps.iter().take_while(is_done).count();
    disk.clear_fault();
    let mut content = Content::after(&steps[..done]);
    assert!(content.is_in(&pool.snapshot()).unwrap(), "{what}: the handle differs");
    pool.close();
    assert!(!disk.retried_a_failed_sync(), "{what}: a failed sync was trusted");
    let pool = writer(&disk.storage()).unwrap();
    let mut rest = &steps[done..];
    if !content.is_in(&pool.snapshot()).unwrap() {
        // A commit whose sync failed may be there: it was refused, not undone.
        content.apply(&rest[0]);
        rest = &rest[1..];
        assert!(content.is_in(&pool.snapshot()).unwrap(), "{what}: after reopening");
    }
    for step in rest {
        step.apply(&pool).unwrap_or_else(|error| panic!("{what}: going on: {error}"));
        content.apply(step);
    }
    assert!(content.is_in(&reader(&disk.storage()).unwrap().snapshot()).unwrap(), "{what}");
    let problems = verify(&disk.storage()).unwrap().problems;
    assert!(problems.is_empty(), "{what}: {problems:?}");
}

#[test]
fn a_creation_that_fails_can_be_repeated() {
    let (created, _) = calls();
    for at in 1..=created {
        let disk = Disk::default();
        disk.set_fault(at, false, Fault::Io);
        let result = create(&disk.storage());
        disk.clear_fault();
        match result.map(drop) {
            Ok(()) => {}
            Err(PoolError::Io { .. }) => match create(&disk.storage()).map(drop) {
                Ok(()) => {}
                // The pool was there before the failure; only the handle was refused.
                Err(PoolError::Exists { .. }) => drop(writer(&disk.storage()).unwrap()),
                Err(error) => panic!("at {at}: {error}"),
            },
            Err(error) => panic!("at {at}: {error}"),
        }
    }
}

#[test]
fn a_second_writer_is_told_who_has_the_pool() {
    let disk = Disk::default();
    let first = create(&disk.storage()).unwrap();
    assert!(matches!(writer(&disk.storage()), Err(PoolError::Locked { .. })));
    first.close();
    writer(&disk.storage()).unwrap();
    assert!(matches!(Owned::numbered(0, 1).append(&first), Err(PoolError::ReadOnly(_))));
}

#[test]
fn a_fork_that_fails_leaves_nothing_and_can_be_repeated() {
    let prepared = || {
        let disk = Disk::default();
        let pool = create(&disk.below("a")).unwrap();
        for batch in batches() {
            batch.append(&pool).unwrap();
        }
        (disk, pool)
    };
    let to = Path::new("b");
    let (disk, pool) = prepared();
    let begin = disk.num_calls();
    fork(&pool.snapshot(), &*disk.storage(), to, "one").unwrap();
    let end = disk.num_calls();
    goals::report(5, &[("runs", faults().len() * (end - begin))]);
    for &fault in faults() {
        for at in begin + 1..=end {
            let (disk, pool) = prepared();
            disk.set_fault(at, false, fault);
            let result = fork(&pool.snapshot(), &*disk.storage(), to, "one");
            disk.clear_fault();
            let is_there = disk.storage().list(to).is_ok();
            match result {
                // A second name that was refused became a copy.
                Ok(()) => assert!(is_there, "{fault:?} at {at}"),
                Err(PoolError::Io { .. }) if is_there => {}
                Err(PoolError::Io { .. }) => {
                    let left = disk.storage().list(Path::new("")).unwrap();
                    assert_eq!(left.len(), 1, "{fault:?} at {at}: {left:?}");
                    fork(&pool.snapshot(), &*disk.storage(), to, "two").unwrap();
                }
                Err(error) => panic!("{fault:?} at {at}: {error}"),
            }
            for side in ["a", "b"] {
                let storage = disk.below(side);
                let snapshot = reader(&storage).unwrap().snapshot();
                assert!(check_content(&snapshot, &batches()).unwrap(), "{fault:?} at {at}");
                assert!(verify(&storage).unwrap().problems.is_empty(), "{fault:?} at {at}");
            }
        }
    }
    let exists = fork(&pool.snapshot(), &*disk.storage(), to, "two");
    assert!(matches!(exists, Err(PoolError::Exists { .. })));
}

#[test]
fn a_collection_that_fails_loses_nothing_and_goes_on() {
    let steps = || {
        let mut steps: Vec<_> = batches().into_iter().map(Step::Append).collect();
        steps.push(Step::Draft("reward", vec![0.5; 20]));
        steps.push(Step::Publish("reward"));
        steps.push(Step::Draft("other", vec![0.5; 3]));
        steps
    };
    let prepared = |disk: &Disk| {
        let pool = create(&disk.storage()).unwrap();
        for step in steps() {
            step.apply(&pool).unwrap();
        }
        pool
    };
    let content = Content::after(&steps());
    let disk = Disk::default();
    let pool = prepared(&disk);
    let begin = disk.num_calls();
    assert!(pool.collect(1, false).unwrap().files > 1);
    let (end, left) = (disk.num_calls(), disk.files().len());
    goals::report(5, &[("runs", faults().len() * 2 * (end - begin))]);
    for &fault in faults() {
        for from_then_on in [false, true] {
            for at in begin + 1..=end {
                let what = format!("{fault:?} at {at}, from then on: {from_then_on}");
                let disk = Disk::default();
                let pool = prepared(&disk);
                disk.set_fault(at, from_then_on, fault);
                let _ = pool.collect(1, false);
                disk.clear_fault();
                assert!(content.is_in(&pool.snapshot()).unwrap(), "{what}: the handle differs");
                pool.close();
                assert!(!disk.retried_a_failed_sync(), "{what}: a failed sync was trusted");
                let problems = verify(&disk.storage()).unwrap().problems;
                assert!(problems.is_empty(), "{what}: {problems:?}");
                let pool = writer(&disk.storage()).unwrap();
                assert!(content.is_in(&pool.snapshot()).unwrap(), "{what}: after reopening");
                pool.collect(1, false).unwrap();
                assert!(disk.files().len() <= left + 1, "{what}: it did not go on");
                assert!(content.is_in(&reader(&disk.storage()).unwrap().snapshot()).unwrap());
            }
        }
    }
}

#[test]
fn a_compaction_goes_on_where_a_failing_operation_stopped_it() {
    let prepared = |disk: &Disk| {
        let pool = create(&disk.storage()).unwrap();
        for batch in batches() {
            batch.append(&pool).unwrap();
        }
        pool
    };
    let compact = |pool: &Pool| -> Result<()> {
        while pool.compact_once(100)? {}
        Ok(())
    };
    let disk = Disk::default();
    let pool = prepared(&disk);
    let begin = disk.num_calls();
    compact(&pool).unwrap();
    let end = disk.num_calls();
    assert_eq!((pool.snapshot().segments.len(), pool.snapshot().prompts.len()), (1, 1));
    let mut num_failed = 0;
    for fault in [Fault::NoSpace, Fault::Io] {
        for from_then_on in [false, true] {
            for at in begin + 1..=end {
                let what = format!("{fault:?} at {at}, from then on: {from_then_on}");
                let disk = Disk::default();
                let pool = prepared(&disk);
                disk.set_fault(at, from_then_on, fault);
                num_failed += usize::from(compact(&pool).is_err());
                disk.clear_fault();
                assert!(check_content(&pool.snapshot(), &batches()).unwrap(), "{what}");
                pool.close();
                assert!(!disk.retried_a_failed_sync(), "{what}: a failed sync was trusted");
                let pool = writer(&disk.storage()).unwrap();
                assert!(check_content(&pool.snapshot(), &batches()).unwrap(), "{what}: reopened");
                compact(&pool).unwrap();
                assert_eq!(pool.snapshot().segments.len(), 1, "{what}");
                assert!(check_content(&pool.snapshot(), &batches()).unwrap(), "{what}: compacted");
                assert!(verify(&disk.storage()).unwrap().problems.is_empty(), "{what}");
            }
        }
    }
    assert!(num_failed > 20, "only {num_failed} faults were felt");
}

#[test]
fn an_append_stands_where_the_merge_after_it_fails() {
    let merging = |disk: &Disk| create(&disk.storage()).unwrap().with_max_small_files(3);
    let disk = Disk::default();
    let pool = merging(&disk);
    let begin = disk.num_calls();
    for batch in batches() {
        batch.append(&pool).unwrap();
    }
    let end = disk.num_calls();
    let snapshot = pool.snapshot();
    assert!(snapshot.segments.len() <= 3 && snapshot.prompts.len() <= 3);
    let mut num_failed = 0;
    for &fault in faults() {
        for from_then_on in [false, true] {
            for at in begin + 1..=end {
                let what = format!("{fault:?} at {at}, from then on: {from_then_on}");
                let disk = Disk::default();
                let pool = merging(&disk);
                disk.set_fault(at, from_then_on, fault);
                let mut acknowledged = 0;
                for batch in batches() {
                    // In order: an append that failed ends the workload.
                    if batch.append(&pool).is_err() {
                        break;
                    }
                    acknowledged += 1;
                }
                disk.clear_fault();
                let is_whole = acknowledged == batches().len();
                num_failed += usize::from(is_whole && pool.snapshot().segments.len() > 3);
                let there = &batches()[..acknowledged];
                assert!(check_content(&pool.snapshot(), there).unwrap(), "{what}: the handle");
                pool.close();
                assert!(!disk.retried_a_failed_sync(), "{what}: a failed sync was trusted");
                let pool = writer(&disk.storage()).unwrap().with_max_small_files(3);
                for batch in batches() {
                    batch.append(&pool).unwrap();
                }
                assert!(check_content(&pool.snapshot(), &batches()).unwrap(), "{what}: reopened");
                assert!(verify(&disk.storage()).unwrap().problems.is_empty(), "{what}");
            }
        }
    }
    assert!(num_failed > 5, "only {num_failed} merges failed");
}

#[test]
fn what_the_system_refuses_is_not_said_to_be_missing() {
    let prepared = || {
        let disk = Disk::default();
        let pool = create(&disk.storage()).unwrap();
        for batch in batches() {
            batch.append(&pool).unwrap();
        }
        pool.close();
        disk
    };
    let disk = prepared();
    let begin = disk.num_calls();
    assert!(verify(&disk.storage()).unwrap().problems.is_empty());
    let end = disk.num_calls();
    goals::report(5, &[("runs", faults().len() * 2 * (end - begin))]);
    let mut num_felt = 0;
    for fault in [Fault::NoDescriptor, Fault::Io] {
        for from_then_on in [false, true] {
            for at in begin + 1..=end {
                let what = format!("{fault:?} at {at}, from then on: {from_then_on}");
                let is_told = |error: &PoolError| matches!(error, PoolError::Io { .. });
                disk.set_fault(at, from_then_on, fault);
                disk.set_calls(begin);
                match verify(&disk.storage()) {
                    Ok(report) => {
                        assert!(report.problems.iter().all(is_told), "{what}: {report:?}");
                        num_felt += usize::from(!report.problems.is_empty());
                    }
                    Err(error) => {
                        assert!(is_told(&error), "{what}: {error}");
                        num_felt += 1;
                    }
                }
                disk.set_calls(begin);
                if let Err(error) = reader(&disk.storage()) {
                    assert!(is_told(&error), "{what}: {error}");
                }
                // Nor is what cannot be seen taken for nothing.
                disk.set_calls(begin);
                let before = disk.files();
                match create(&disk.storage()).map(drop).unwrap_err() {
                    PoolError::Exists { .. } => {}
                    error => assert!(is_told(&error), "{what}: {error}"),
                }
                assert!(disk.files() == before, "{what}");
            }
        }
    }
    assert!(num_felt > 2 * (end - begin), "only {num_felt} faults were felt");
}
