//! Does the pool behave like a list? Random appends, reopenings and old snapshots against plain vectors.
#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "tests may, and ties are exact")]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::disk::Disk;
use common::{Content, Owned, Step as Commit, TIE_SEED, create, create_version, reader, writer};
use proptest::prelude::*;
use quark_pool_rs::columns::column;
use quark_pool_rs::compaction::plan;
use quark_pool_rs::describe::describe;
use quark_pool_rs::error::PoolError;
use quark_pool_rs::fork::fork;
use quark_pool_rs::format::FORMAT_VERSION;
use quark_pool_rs::gather::gather;
use quark_pool_rs::pool::{OpenOptions, Pool};
use quark_pool_rs::quantization::Quantization;
use quark_pool_rs::ranking::{RemainderRule, TieRule};
use quark_pool_rs::retention::Limits;
use quark_pool_rs::rng::mix64;
use quark_pool_rs::runs::tie_hash;
use quark_pool_rs::sampler::{Drawn, Sampler, SamplingMode, Settings};
use quark_pool_rs::verify::verify;

#[derive(Debug, Clone)]
enum Step {
    Append(Owned),
    Repeat(usize),
    Reopen,
    /// As many of these scores as samples have none in the draft.
    Draft(&'static str, Vec<f32>),
    /// The draft is completed with zeros first.
    Publish(&'static str),
    Discard(&'static str),
    Collect(u64),
    /// Until nothing is left to do.
    Compact(u64),
    Retain(u64),
}

fn score() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => (-3_i8..3).prop_map(f32::from),
        2 => any::<f32>(),
        1 => Just(f32::NAN),
        1 => Just(-0.0),
        1 => Just(f32::NEG_INFINITY),
    ]
}

fn batch() -> impl Strategy<Value = Owned> {
    (1_usize..7, any::<u16>(), prop::sample::subsequence(vec!["reward", "length"], 0..=2))
        .prop_flat_map(|(n, number, names)| {
            let columns = names.len();
            prop::collection::vec(prop::collection::vec(score(), n), columns).prop_map(
                move |values| {
                    let mut batch = Owned::numbered(u32::from(number), n as u32);
                    batch.scores = names.iter().map(|n| (*n).to_owned()).zip(values).collect();
                    batch
                },
            )
        })
}

fn name() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["reward", "length"])
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => batch().prop_map(Step::Append),
        1 => (0_usize..20).prop_map(Step::Repeat),
        1 => Just(Step::Reopen),
        3 => (name(), prop::collection::vec(score(), 1..20)).prop_map(|(n, s)| Step::Draft(n, s)),
        1 => name().prop_map(Step::Publish),
        1 => name().prop_map(Step::Discard),
        1 => (1_u64..6).prop_map(Step::Collect),
        2 => (2_u64..60).prop_map(Step::Compact),
        2 => (1_u64..60).prop_map(Step::Retain),
    ];
    prop::collection::vec(step, 1..30)
}

/// Scores of a column, NaN where it has none or where the sample was removed.
fn column(content: &Content, name: &str) -> Vec<f32> {
    let of = |batch: &Owned| match batch.scores.iter().find(|(n, _)| n == name) {
        Some((_, values)) => values.clone(),
        None => vec![f32::NAN; batch.completions.len()],
    };
    let mut scores: Vec<f32> = content.batches.iter().flat_map(of).collect();
    scores[..content.removed].fill(f32::NAN);
    scores
}

/// Ids worst first, as the contract words it.
fn ascending(scores: &[f32], ties: TieRule) -> Vec<u64> {
    let mut ids: Vec<u64> =
        (0..scores.len() as u64).filter(|&id| !scores[id as usize].is_nan()).collect();
    ids.sort_by(|&a, &b| {
        let scores = scores[a as usize].partial_cmp(&scores[b as usize]).unwrap();
        scores.then(match ties {
            TieRule::OlderFirst => b.cmp(&a),
            _ => tie_hash(TIE_SEED, b).cmp(&tie_hash(TIE_SEED, a)),
        })
    });
    ids
}

fn labels(scores: &[f32], k: usize, ties: TieRule, remainder: RemainderRule) -> Vec<i16> {
    let ids = ascending(scores, ties);
    let n = ids.len();
    let start = |q: usize| match remainder {
        RemainderRule::Spread => q * n / k,
        RemainderRule::Lowest if q == 0 => 0,
        RemainderRule::Lowest => n - (k - q) * (n / k),
    };
    let mut labels = vec![-1; scores.len()];
    for (rank, &id) in ids.iter().enumerate() {
        let label = (0..k).rev().find(|&q| rank >= start(q)).unwrap();
        labels[id as usize] = label as i16;
    }
    if ties == TieRule::Together {
        for &id in &ids {
            let same = ids.iter().filter(|&&o| scores[o as usize] == scores[id as usize]);
            let highest = same.map(|&o| labels[o as usize]).max().unwrap();
            labels[id as usize] = highest;
        }
    }
    labels
}

/// Ids and labels of a quantization, asked for in all the ways there are.
fn check_quantization(q: Quantization, expected: &[i16], scores: &[f32]) {
    let removed = q.snapshot().num_removed as usize;
    let all: Vec<u64> = (removed as u64..expected.len() as u64).collect();
    let mut one_by_one = vec![9; all.len()];
    q.labels_of(&all, &mut one_by_one).unwrap();
    assert_eq!(q.labels().unwrap(), expected);
    assert_eq!(one_by_one, expected[removed..]);
    assert!(removed == 0 || q.labels_of(&[removed as u64 - 1], &mut one_by_one).is_err());
    let unranked = expected[removed..].iter().filter(|&&label| label < 0).count();
    assert_eq!(q.num_unranked(), unranked as u64);
    let mut found = vec![0.0; all.len()];
    q.scores_of(&all, &mut found).unwrap();
    assert!(found.iter().zip(&scores[removed..]).all(|(a, b)| a.to_bits() == b.to_bits()));
    let bounds = q.lower_bounds().unwrap();
    let q = Arc::new(q);
    for (label, &count) in q.counts().iter().enumerate() {
        let (mut members, mut theirs) = (vec![0; count as usize], vec![0.0; count as usize]);
        let places: Vec<_> = (0..count).map(|i| (label as i16, i)).collect();
        q.samples_at(&places, &mut members, &mut theirs).unwrap();
        assert!(members.iter().zip(theirs).all(|(&id, score)| scores[id as usize] == score));
        members.sort_unstable();
        let with = |id: &u64| expected[*id as usize] == label as i16;
        assert!(members.iter().eq(all.iter().filter(|id| with(id))));
        let lowest = members.iter().map(|&id| scores[id as usize]).reduce(f32::min);
        assert!(lowest.map_or(bounds[label].is_nan(), |lowest| lowest == bounds[label]));
    }
    let ranked: u64 = q.counts().iter().sum();
    for mode in [SamplingMode::Stratified, SamplingMode::Iid, SamplingMode::Shuffle] {
        let Ok(sampler) = Sampler::new(q.clone(), Settings::new(7, 3, mode)) else {
            assert_eq!(ranked, 0);
            continue;
        };
        let Drawn { ids, quantiles, scores: drawn } = sampler.draw(5).unwrap();
        assert!(ids.iter().zip(quantiles).all(|(&id, q)| expected[id as usize] == q));
        assert!(ids.iter().zip(drawn).all(|(&id, score)| scores[id as usize] == score));
    }
    if ranked > 0 {
        let epoch =
            Sampler::new(q, Settings::new(ranked as usize, 3, SamplingMode::Shuffle)).unwrap();
        let mut ids = epoch.draw(2).unwrap().ids;
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len() as u64, ranked);
    }
}

/// Labels within each group, sample by sample.
fn labels_in_groups(scores: &[f32], groups: &[u32], k: usize, ties: TieRule) -> Vec<i16> {
    let mut labels = vec![-1; scores.len()];
    for group in 0..=groups.iter().copied().max().unwrap_or(0) {
        let of_group: Vec<f32> = scores
            .iter()
            .zip(groups)
            .map(|(&score, &g)| if g == group { score } else { f32::NAN })
            .collect();
        let ids = ascending(&of_group, ties);
        for (rank, &id) in ids.iter().enumerate() {
            labels[id as usize] = ((2 * rank + 1) * k / (2 * ids.len())) as i16;
        }
        if ties == TieRule::Together {
            for &id in &ids {
                let same = ids.iter().filter(|&&o| scores[o as usize] == scores[id as usize]);
                labels[id as usize] = same.map(|&o| labels[o as usize]).max().unwrap();
            }
        }
    }
    labels
}

fn check_ranking(pool: &Pool, content: &Content, name: &str) {
    let snapshot = pool.snapshot();
    let scores = column(content, name);
    let mut found = vec![0.0; scores.len()];
    snapshot.copy_scores(snapshot.column(name).unwrap(), &mut found).unwrap();
    assert!(found.iter().map(|s| s.to_bits()).eq(scores.iter().map(|s| s.to_bits())));
    let scored = scores.iter().filter(|score| !score.is_nan()).count() as u64;
    let described = describe(&snapshot).unwrap();
    let described = described.columns.iter().find(|column| column.name == name).unwrap();
    let num_kept = scores.len() as u64 - snapshot.num_removed;
    assert_eq!((described.scored, described.unscored), (scored, num_kept - scored));
    let mut prompts = vec![0; scores.len()];
    snapshot.copy_column(column::PROMPT, &mut prompts).unwrap();
    for ties in [TieRule::Hash, TieRule::OlderFirst, TieRule::Together] {
        for remainder in [RemainderRule::Spread, RemainderRule::Lowest] {
            for k in [1, 2, 5, 23, 40] {
                let q = Quantization::new(snapshot.clone(), name, k, ties, remainder).unwrap();
                let expected = labels(&scores, k as usize, ties, remainder);
                check_quantization(q, &expected, &scores);
                // What is said of removed samples does not count.
                let (at, mut own) = (snapshot.clone(), scores.clone());
                own[..snapshot.num_removed as usize].fill(1.0);
                let q = Quantization::of_values(at, own, k, ties, remainder).unwrap();
                check_quantization(q, &expected, &scores);
            }
        }
        for k in [1, 3, 5, 40] {
            let (at, own) = (snapshot.clone(), scores.clone());
            let q = Quantization::per_prompt(at, own, k, ties).unwrap();
            let expected = labels_in_groups(&scores, &prompts, k as usize, ties);
            check_quantization(q, &expected, &scores);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_pool_is_a_list_of_its_batches(steps in steps(), version in 1..=FORMAT_VERSION) {
        let storage = Disk::default().storage();
        let mut pool = create_version(&storage, version).unwrap();
        let mut commits: Vec<Commit> = Vec::new();
        let mut content = Content::default();
        let mut hashes = vec![pool.snapshot().hash()];
        for step in steps {
            let mut due = Vec::new();
            match step {
                Step::Append(batch) => {
                    let batches = &content.batches;
                    match batches.iter().position(|known| known.key == batch.key) {
                        Some(known) => {
                            let before = batches[..known].iter().map(|b| b.completions.len());
                            let ids = batch.append(&pool).unwrap();
                            prop_assert_eq!(ids.start, before.sum::<usize>() as u64);
                        }
                        None => due.push(Commit::Append(batch)),
                    }
                }
                Step::Repeat(at) if at < content.batches.len() => {
                    let ids = content.batches[at].append(&pool).unwrap();
                    prop_assert_eq!(Some(ids), pool.find(&content.batches[at].key));
                }
                Step::Repeat(_) => {}
                Step::Reopen => {
                    pool.close();
                    drop(pool);
                    pool = writer(&storage).unwrap();
                }
                Step::Draft(name, mut scores) => {
                    let end = content.draft_end(name);
                    scores.truncate(content.num_samples() - end);
                    if scores.is_empty() {
                        prop_assert!(Commit::Draft(name, scores).apply(&pool).is_err());
                    } else {
                        due.push(Commit::Draft(name, scores));
                    }
                }
                Step::Collect(keep) => {
                    let would = pool.collect(keep, true).unwrap();
                    let is_due = commits.len() as u64 - pool.snapshot().oldest >= keep;
                    if is_due {
                        due.push(Commit::Collect(keep));
                    }
                    let hash = pool.snapshot().hash();
                    prop_assert!(would.files > 0 || !is_due || keep > 1);
                    prop_assert_eq!(pool.snapshot().hash(), hash);
                }
                Step::Compact(max_rows) => {
                    let before = pool.snapshot();
                    while plan(&pool.snapshot(), max_rows).is_some() {
                        let commit = Commit::Compact(max_rows);
                        commit.apply(&pool).unwrap();
                        commits.push(commit);
                        hashes.push(pool.snapshot().hash());
                    }
                    let snapshot = pool.snapshot();
                    prop_assert!(!pool.compact_once(max_rows).unwrap());
                    prop_assert!(snapshot.segments.len() <= before.segments.len());
                    prop_assert!(content.is_in(&before).unwrap());
                }
                Step::Retain(max_samples) => {
                    let (generation, excess) = (commits.len() as u64, content.excess(max_samples));
                    let limits = Limits { max_samples: Some(max_samples), ..Limits::default() };
                    let would = pool.retain(&limits, true).unwrap();
                    prop_assert_eq!(would.samples, excess as u64);
                    prop_assert_eq!(would.first, (content.removed + excess) as u64);
                    prop_assert_eq!(pool.snapshot().generation, generation);
                    if excess > 0 {
                        due.push(Commit::Retain(max_samples));
                    } else {
                        Commit::Retain(max_samples).apply(&pool).unwrap();
                    }
                }
                Step::Publish(name) => {
                    let missing = content.num_samples() - content.draft_end(name);
                    if missing > 0 {
                        prop_assert!(Commit::Publish(name).apply(&pool).is_err());
                        due.push(Commit::Draft(name, vec![0.0; missing]));
                    }
                    if content.num_samples() > 0 {
                        due.push(Commit::Publish(name));
                    }
                }
                Step::Discard(name) => {
                    if content.drafts.contains_key(name) {
                        due.push(Commit::Discard(name));
                    } else {
                        prop_assert!(Commit::Discard(name).apply(&pool).is_err());
                    }
                }
            }
            for commit in due {
                commit.apply(&pool).unwrap();
                content.apply(&commit);
                commits.push(commit);
                hashes.push(pool.snapshot().hash());
            }
            prop_assert_eq!(pool.snapshot().generation as usize, commits.len());
        }
        let reader = reader(&storage).unwrap();
        for handle in [&pool, &reader] {
            for batch in &content.batches {
                let ids = handle.find(&batch.key).unwrap();
                prop_assert_eq!(ids.end - ids.start, batch.completions.len() as u64);
            }
            prop_assert!(content.is_in(&handle.snapshot()).unwrap());
            prop_assert_eq!(handle.snapshot().hash(), hashes[commits.len()].clone());
            for name in ["reward", "length"] {
                if content.batches.iter().any(|b| b.scores.iter().any(|(n, _)| n == name)) {
                    check_ranking(handle, &content, name);
                } else {
                    prop_assert!(handle.snapshot().column(name).is_err());
                }
            }
        }
        let oldest = pool.snapshot().oldest as usize;
        if oldest > 0 {
            let options = OpenOptions { writer: None, snapshot: Some(oldest as u64 - 1) };
            prop_assert!(Pool::open(storage.clone(), options).is_err());
        }
        for generation in (oldest..=commits.len()).step_by(3) {
            let at = Some(generation as u64);
            let options = OpenOptions { writer: None, snapshot: at };
            let snapshot = Pool::open(storage.clone(), options).unwrap().snapshot();
            prop_assert!(Content::after(&commits[..generation]).is_in(&snapshot).unwrap());
            prop_assert_eq!(snapshot.hash(), hashes[generation].clone());
        }
        let report = verify(&storage).unwrap();
        prop_assert!(report.problems.is_empty(), "{:?}", report.problems);
    }

    #[test]
    fn a_fork_is_the_same_list_and_goes_on_alone(
        before in prop::collection::vec(batch(), 0..12),
        ours in prop::collection::vec(batch(), 0..12),
        theirs in prop::collection::vec(batch(), 1..12),
        draft in prop::collection::vec(score(), 1..20),
    ) {
        let disk = Disk::default();
        let original = create(&disk.below("a")).unwrap();
        let numbered = |batches: Vec<Owned>, of: &str| -> Vec<Commit> {
            let rekeyed = batches.into_iter().enumerate().map(|(i, batch)| Owned { key: format!("{of}/{i}"), ..batch });
            rekeyed.map(Commit::Append).collect()
        };
        let mut shared = numbered(before, "before");
        let num_samples = Content::after(&shared).num_samples();
        if num_samples > 0 {
            let scores = draft.into_iter().cycle().take(num_samples).collect();
            shared.push(Commit::Draft("reward", scores));
        }
        for commit in &shared {
            commit.apply(&original).unwrap();
        }
        let at = shared.len() as u64;
        fork(&original.snapshot(), &*disk.storage(), Path::new("b"), "other").unwrap();
        let second = writer(&disk.below("b")).unwrap();
        prop_assert_eq!(&second.snapshot().context.settings.uuid, "other");
        let mut sides = [(original, shared.clone(), "a"), (second, shared.clone(), "b")];
        for ((pool, commits, _), more) in sides.iter_mut().zip([numbered(ours, "ours"), numbered(theirs, "theirs")]) {
            for commit in more {
                commit.apply(pool).unwrap();
                commits.push(commit);
            }
        }
        for (pool, commits, name) in &sides {
            prop_assert!(Content::after(commits).is_in(&pool.snapshot()).unwrap());
            let storage = disk.below(name);
            for generation in at..=commits.len() as u64 {
                let options = OpenOptions { writer: None, snapshot: Some(generation) };
                let snapshot = Pool::open(storage.clone(), options).unwrap().snapshot();
                prop_assert!(Content::after(&commits[..generation as usize]).is_in(&snapshot).unwrap());
            }
            let report = verify(&storage).unwrap();
            prop_assert!(report.problems.is_empty(), "{:?}", report.problems);
        }
        if at > 0 {
            let options = OpenOptions { writer: None, snapshot: Some(at - 1) };
            let refused = Pool::open(disk.below("b"), options).map(drop);
            let is_clear = matches!(refused, Err(PoolError::UnknownSnapshot { oldest, .. }) if oldest == at);
            prop_assert!(is_clear);
            Pool::open(disk.below("a"), options).unwrap();
        }
    }
}

#[test]
fn values_are_cut_where_a_sort_would_cut_them() {
    // More values than one task reads, keys that share their upper halves, long blocks of ties.
    let storage = Disk::default().storage();
    let pool = create(&storage).unwrap();
    let number = 150_000;
    Owned::numbered(0, number).append(&pool).unwrap();
    let value = |i: u32| match mix64(u64::from(i)) % 7 {
        0 => f32::NAN,
        1 => 0.5,
        2 | 3 => 0.5 + (mix64(u64::from(i) + 1) % 1000) as f32 * 1e-7,
        _ => (mix64(u64::from(i) + 2) % 4096) as f32 - 2048.0,
    };
    let values: Vec<f32> = (0..number).map(value).collect();
    for ties in [TieRule::Hash, TieRule::OlderFirst, TieRule::Together] {
        let ascending = ascending(&values, ties);
        for k in [2_usize, 5, 64] {
            let spread = RemainderRule::Spread;
            let snapshot = pool.snapshot();
            let q = Quantization::of_values(snapshot, values.clone(), k as u64, ties, spread);
            let mut expected = vec![-1; values.len()];
            for (rank, &id) in ascending.iter().enumerate() {
                // The greatest q with floor(q N / K) <= rank.
                let label = ((rank + 1) * k - 1) / ascending.len();
                expected[id as usize] = label as i16;
            }
            if ties == TieRule::Together {
                for pair in (1..ascending.len()).rev() {
                    let (low, high) = (ascending[pair - 1] as usize, ascending[pair] as usize);
                    if values[low] == values[high] {
                        expected[low] = expected[high];
                    }
                }
            }
            assert_eq!(q.unwrap().labels().unwrap(), expected, "{ties:?} {k}");
        }
    }
    let short = Quantization::of_values(
        pool.snapshot(),
        vec![0.0],
        2,
        TieRule::Hash,
        RemainderRule::Spread,
    );
    assert!(short.is_err());
}

#[test]
fn a_gathered_batch_is_padded_on_the_outside() {
    let storage = Disk::default().storage();
    let pool = create(&storage).unwrap();
    let batches: Vec<Owned> = (0..4).map(|i| Owned::numbered(i, 5)).collect();
    for batch in &batches {
        batch.append(&pool).unwrap();
    }
    let ids = [19, 0, 7, 7];
    let gathered = gather(&pool.snapshot(), &ids, -1).unwrap();
    for (row, &id) in ids.iter().enumerate() {
        let sample = pool.snapshot().sample(id).unwrap();
        let prompt = &gathered.prompts[row * gathered.prompt_width..][..gathered.prompt_width];
        let completion =
            &gathered.completions[row * gathered.completion_width..][..gathered.completion_width];
        let (pad, tokens) = prompt.split_at(gathered.prompt_width - sample.prompt_tokens.len());
        assert!(pad.iter().all(|&t| t == -1));
        assert!(tokens.iter().copied().eq(sample.prompt_tokens.iter().map(|&t| i64::from(t))));
        let (tokens, pad) = completion.split_at(sample.completion_tokens.len());
        assert!(pad.iter().all(|&t| t == -1));
        assert!(tokens.iter().copied().eq(sample.completion_tokens.iter().map(|&t| i64::from(t))));
    }
    assert!(gather(&pool.snapshot(), &[20], 0).is_err());
    assert_eq!(gather(&pool.snapshot(), &[], 0).unwrap().prompts.len(), 0);
}

#[test]
fn a_reader_moves_on_only_when_asked() {
    let storage = Disk::default().storage();
    let pool = create(&storage).unwrap();
    Owned::numbered(0, 3).append(&pool).unwrap();
    let reader = reader(&storage).unwrap();
    let pinned = reader.snapshot();
    Owned::numbered(1, 3).append(&pool).unwrap();
    assert_eq!(reader.snapshot().num_samples, 3);
    assert_eq!(reader.find("run/1"), None);
    reader.refresh().unwrap();
    assert_eq!((reader.snapshot().num_samples, pinned.num_samples), (6, 3));
    assert_eq!(reader.find("run/1"), Some(3..6));
    assert!(Owned::numbered(2, 1).append(&reader).is_err());
}

#[test]
fn a_bad_batch_is_refused_at_the_door() {
    let storage = Disk::default().storage();
    let pool = create(&storage).unwrap();
    let good = Owned::numbered(0, 3);
    let refuse = |change: &dyn Fn(&mut Owned)| {
        let mut batch = good.clone();
        change(&mut batch);
        let error = batch.append(&pool).unwrap_err();
        assert!(matches!(error, quark_pool_rs::error::PoolError::Invalid(_)), "{error}");
    };
    refuse(&|b| b.key.clear());
    refuse(&|b| b.key = "k".repeat(2000));
    refuse(&|b| b.prompt_index[1] = 3);
    refuse(&|b| b.completions[0].0 = vec![common::VOCAB]);
    refuse(&|b| b.prompts[0].0 = vec![u32::MAX]);
    refuse(&|b| b.prompts[0].2 = "[1]".to_owned());
    refuse(&|b| b.settings = "{".to_owned());
    refuse(&|b| b.scores[0].0 = "Reward!".to_owned());
    refuse(&|b| b.scores[0].1.truncate(2));
    refuse(&|b| b.scores.push(b.scores[0].clone()));
    refuse(&|b| {
        b.prompt_index.clear();
        b.completions.clear();
        b.scores.clear();
    });
    assert_eq!(pool.snapshot().generation, 0);
    good.append(&pool).unwrap();
}
