//! Rankings of many small runs against comparing every sample with every other, and statistics against sums.

use std::sync::Arc;

use quark_pool_rs::columns::column;
use quark_pool_rs::describe::describe;
use quark_pool_rs::error::PoolError;
use quark_pool_rs::pool::{OpenOptions, Pool};
use quark_pool_rs::quantization::Quantization;
use quark_pool_rs::ranking::{RemainderRule, TieRule};
use quark_pool_rs::rng::mix64;
use quark_pool_rs::runs::{key_score, score_key, tie_hash};
use quark_pool_rs::sampler::{Sampler, SamplingMode, Settings};
use quark_pool_rs::snapshot::Snapshot;
use quark_pool_rs::verify::verify;

use crate::common::disk::Disk;
use crate::common::{Owned, SOURCE, TIE_SEED, create, reader, writer};

const TIES: [TieRule; 3] = [TieRule::Hash, TieRule::OlderFirst, TieRule::Together];
const REMAINDERS: [RemainderRule; 2] = [RemainderRule::Spread, RemainderRule::Lowest];

/// Few distinct scores, so that cuts fall into long blocks of ties.
fn score(i: u64) -> f32 {
    match mix64(i) % 9 {
        0 => f32::NAN,
        1 => -0.0,
        2 => 0.0,
        3 => f32::NEG_INFINITY,
        4 => 1e-40,
        r => (r as f32 - 6.0) * 1.5,
    }
}

/// Appends of 1 to 3 samples, so that merged runs are merged again.
fn appended(pool: &Pool, number: u32) -> Vec<f32> {
    let mut all = Vec::new();
    for i in 0..number {
        let mut batch = Owned::numbered(i, 1 + i % 3);
        let scores =
            (0..batch.completions.len()).map(|row| score((all.len() + row) as u64)).collect();
        batch.scores = vec![("reward".to_owned(), scores)];
        batch.append(pool).unwrap();
        all.extend_from_slice(&batch.scores[0].1);
    }
    all
}

/// Labels by the contract's words: how many samples are worse decides.
fn labels(
    scores: &[f32],
    group: impl Fn(usize) -> u32,
    label: impl Fn(usize, usize) -> usize,
    ties: TieRule,
) -> Vec<i16> {
    let order = |id: usize| match ties {
        TieRule::OlderFirst => id as u64,
        _ => tie_hash(TIE_SEED, id as u64),
    };
    let is_peer = |a: usize, b: usize| group(a) == group(b) && !scores[b].is_nan();
    let own = |id: usize| {
        if scores[id].is_nan() {
            return -1;
        }
        let peers = (0..scores.len()).filter(|&other| is_peer(id, other));
        let is_worse = |&other: &usize| {
            scores[other] < scores[id] || (scores[other] == scores[id] && order(other) > order(id))
        };
        label(peers.clone().filter(is_worse).count(), peers.count()) as i16
    };
    let own: Vec<i16> = (0..scores.len()).map(own).collect();
    if ties != TieRule::Together {
        return own;
    }
    let highest = |id: usize| {
        let block = (0..scores.len()).filter(|&b| is_peer(id, b) && scores[b] == scores[id]);
        block.map(|other| own[other]).max().unwrap_or(-1)
    };
    (0..scores.len()).map(highest).collect()
}

/// The quantile of the sample with `worse` worse ones among n.
fn cut(worse: usize, n: usize, k: usize, remainder: RemainderRule) -> usize {
    let start = |q: usize| match remainder {
        RemainderRule::Spread => q * n / k,
        RemainderRule::Lowest if q == 0 => 0,
        RemainderRule::Lowest => n - (k - q) * (n / k),
    };
    (0..k).rev().find(|&q| start(q) <= worse).unwrap()
}

/// Labels, members, counts and bounds agree with `expected`.
fn check(quantization: &Quantization, expected: &[i16], scores: &[f32], what: &str) {
    assert_eq!(quantization.labels().unwrap(), expected, "{what}");
    let all: Vec<u64> = (0..expected.len() as u64).collect();
    let mut one_by_one = vec![7; expected.len()];
    quantization.labels_of(&all, &mut one_by_one).unwrap();
    assert_eq!(one_by_one, expected, "{what}");
    let unranked = expected.iter().filter(|&&label| label == -1).count() as u64;
    assert_eq!(quantization.num_unranked(), unranked, "{what}");
    let bounds = quantization.lower_bounds().unwrap();
    for (label, &count) in quantization.counts().iter().enumerate() {
        let places: Vec<_> = (0..count).map(|index| (label as i16, index)).collect();
        let (mut ids, mut found) = (vec![0; places.len()], vec![0.0; places.len()]);
        quantization.samples_at(&places, &mut ids, &mut found).unwrap();
        assert!(ids.iter().zip(found).all(|(&id, score)| scores[id as usize] == score), "{what}");
        ids.sort_unstable();
        let members = all.iter().filter(|&&id| expected[id as usize] == label as i16);
        assert!(members.eq(&ids), "{what}: quantile {label}");
        let lowest = ids.iter().map(|&id| scores[id as usize]).reduce(f32::min);
        assert!(bounds[label].total_cmp(&lowest.map_or(f32::NAN, |low| low + 0.0)).is_eq());
    }
}

fn check_all(snapshot: &Arc<Snapshot>, scores: &[f32]) {
    let mut prompts = vec![0_u32; scores.len()];
    snapshot.copy_column(column::PROMPT, &mut prompts).unwrap();
    for k in [1, 3, 7, 30] {
        for ties in TIES {
            for remainder in REMAINDERS {
                let what = format!("{k} {ties:?} {remainder:?}");
                let expected = labels(scores, |_| 0, |worse, n| cut(worse, n, k, remainder), ties);
                let of_column =
                    Quantization::new(snapshot.clone(), "reward", k as u64, ties, remainder);
                let of_column = of_column.unwrap();
                check(&of_column, &expected, scores, &what);
                let is_kept: Vec<bool> =
                    (0..scores.len() as u64).map(|i| !mix64(i).is_multiple_of(3)).collect();
                let left = |(&label, &kept): (&i16, &bool)| if kept { label } else { -1 };
                let fewer: Vec<i16> = expected.iter().zip(&is_kept).map(left).collect();
                check(&of_column.only(&is_kept).unwrap(), &fewer, scores, &format!("{what} only"));
                let of_values = Quantization::of_values(
                    snapshot.clone(),
                    scores.to_vec(),
                    k as u64,
                    ties,
                    remainder,
                );
                check(&of_values.unwrap(), &expected, scores, &what);
            }
            let middle = |worse: usize, n: usize| (2 * worse + 1) * k / (2 * n);
            let expected = labels(scores, |id| prompts[id], middle, ties);
            let per_prompt =
                Quantization::per_prompt(snapshot.clone(), scores.to_vec(), k as u64, ties);
            check(&per_prompt.unwrap(), &expected, scores, &format!("{k} {ties:?} per prompt"));
        }
    }
}

#[test]
fn runs_of_all_tiers_rank_as_comparing_all_samples_does() {
    let disk = Disk::default();
    let pool = create(&disk.storage()).unwrap();
    let mut scores = appended(&pool, 80);
    let levels = |snapshot: &Snapshot| -> Vec<u8> {
        snapshot.columns[0].runs.iter().map(|run| run.entry.level).collect()
    };
    let found = levels(&pool.snapshot());
    assert!(found.starts_with(&[2, 1]) && found.ends_with(&[0]), "{found:?}");
    check_all(&pool.snapshot(), &scores);
    // The same of files that were made of smaller ones.
    while pool.compact_once(60).unwrap() {}
    assert!(pool.snapshot().segments.len() < 5);
    check_all(&reader(&disk.storage()).unwrap().snapshot(), &scores);
    // And of scores that came later, chunk by chunk, with runs of their own.
    let mut first = 0;
    for (number, chunk) in scores.chunks_mut(2).enumerate() {
        for score in &mut *chunk {
            *score = -*score + (number % 3) as f32;
        }
        pool.draft_scores("reward", SOURCE, first, chunk).unwrap();
        first += chunk.len() as u64;
    }
    pool.publish_scores("reward").unwrap();
    assert!(levels(&pool.snapshot()).contains(&2));
    check_all(&pool.snapshot(), &scores);
}

#[test]
fn appends_merge_small_files_and_nothing_else_changes() {
    let (merging, plain) = (Disk::default(), Disk::default());
    let pool = create(&merging.storage()).unwrap().with_max_small_files(16);
    let scores = appended(&pool, 300);
    let other = create(&plain.storage()).unwrap().with_max_small_files(usize::MAX);
    let _ = appended(&other, 300);
    let (found, expected) = (pool.snapshot(), other.snapshot());
    assert!(found.segments.len() <= 16, "{}", found.segments.len());
    assert!(found.prompts.len() <= 16, "{}", found.prompts.len());
    assert_eq!(expected.segments.len(), 300);
    check_all(&found, &scores);

    // The same draws, since runs hold the same samples.
    let draws = |snapshot: &Arc<Snapshot>| {
        let (ties, remainder) = (TieRule::Hash, RemainderRule::Spread);
        let cut = Quantization::new(snapshot.clone(), "reward", 3, ties, remainder).unwrap();
        let settings = Settings::new(32, 7, SamplingMode::Stratified);
        let sampler = Sampler::new(Arc::new(cut), settings).unwrap();
        (0..20).map(|step| sampler.draw(step).unwrap().ids).collect::<Vec<_>>()
    };
    assert_eq!(draws(&found), draws(&expected));

    // Keys, earlier snapshots, and what a reader finds.
    for (append, ids) in expected.appends() {
        assert_eq!(pool.find(&append.key), Some(ids));
    }
    let options = OpenOptions { writer: None, snapshot: Some(20) };
    let then = Pool::open(merging.storage(), options).unwrap().snapshot();
    check_all(&then, &scores[..then.num_samples as usize]);
    pool.close();
    let again = writer(&merging.storage()).unwrap();
    check_all(&again.snapshot(), &scores);
    assert!(verify(&merging.storage()).unwrap().problems.is_empty());
}

#[test]
fn a_key_orders_as_its_score_and_says_it() {
    let mut scores = vec![
        f32::NEG_INFINITY,
        f32::MIN,
        -1.5,
        -f32::MIN_POSITIVE,
        -1e-45,
        0.0,
        1e-45,
        1.0,
        f32::MAX,
        f32::INFINITY,
    ];
    assert!(scores.is_sorted_by(|a, b| score_key(*a) < score_key(*b)));
    assert_eq!(score_key(-0.0), score_key(0.0));
    scores.extend((0..1000).map(|i| f32::from_bits(mix64(i) as u32)).filter(|s| !s.is_nan()));
    for score in scores {
        assert!(key_score(score_key(score)).total_cmp(&(score + 0.0)).is_eq(), "{score}");
    }
}

#[test]
fn what_cannot_be_ranked_is_refused_by_name() {
    let pool = create(&Disk::default().storage()).unwrap();
    let quantize = |score: &str, k| {
        let (hash, spread) = (TieRule::Hash, RemainderRule::Spread);
        Quantization::new(pool.snapshot(), score, k, hash, spread).map(drop).unwrap_err()
    };
    let message = "the pool has no score column \"reward\"; it has none";
    assert_eq!(quantize("reward", 2).to_string(), message);
    let scores = appended(&pool, 4);
    let message = "the pool has no score column \"length\"; it has reward";
    assert_eq!(quantize("length", 2).to_string(), message);
    for k in [0, 1 << 15] {
        let error = quantize("reward", k);
        let message = format!("num_quantiles is {k}; it goes from 1 to 32767");
        assert_eq!(error.to_string(), message);
    }
    let short = scores[1..].to_vec();
    let refused = Quantization::per_prompt(pool.snapshot(), short, 2, TieRule::Hash).map(drop);
    assert_eq!(refused.unwrap_err().to_string(), "there are 6 values for 7 samples");

    let snapshot = || pool.snapshot();
    let (hash, spread) = (TieRule::Hash, RemainderRule::Spread);
    let rankings = [
        Quantization::new(snapshot(), "reward", 2, hash, spread).unwrap(),
        Quantization::of_values(snapshot(), scores.clone(), 2, hash, spread).unwrap(),
        Quantization::per_prompt(snapshot(), scores.clone(), 2, hash).unwrap(),
    ];
    for ranking in rankings {
        let refused = ranking.only(&[true; 6]).map(drop).unwrap_err();
        assert_eq!(refused.to_string(), "there are 6 marks for 7 samples");
        let refused =
            [ranking.labels_of(&[0, 7], &mut [0; 2]), ranking.scores_of(&[7], &mut [0.0])];
        for refused in refused {
            let is_named =
                matches!(refused, Err(PoolError::UnknownSample { id: 7, num_samples: 7, .. }));
            assert!(is_named);
        }
        let mut found = [0.0; 7];
        ranking.scores_of(&[6, 5, 4, 3, 2, 1, 0], &mut found).unwrap();
        assert!(found.iter().rev().zip(&scores).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}

#[test]
fn a_description_has_the_statistics_of_the_scores() {
    let pool = create(&Disk::default().storage()).unwrap();
    let empty = describe(&pool.snapshot()).unwrap();
    assert_eq!((empty.num_samples, empty.num_bytes, empty.columns.len()), (0, 0, 0));
    // Far from zero, where a sum of squares would lose everything.
    let value = |i: u64| if i % 5 == 3 { f32::NAN } else { 1e6 + (mix64(i) % 100) as f32 / 16.0 };
    let mut all = Vec::new();
    for number in 0..9 {
        let mut batch = Owned::numbered(number, 5);
        let scores: Vec<f32> = (0..5).map(|row| value(u64::from(number) * 5 + row)).collect();
        batch.scores = vec![("reward".to_owned(), scores.clone())];
        if number > 6 {
            batch.scores.push(("none".to_owned(), vec![f32::NAN; 5]));
        }
        batch.append(&pool).unwrap();
        all.extend(scores);
    }
    let found = describe(&pool.snapshot()).unwrap();
    let snapshot = pool.snapshot();
    assert_eq!((found.num_samples, found.num_segments), (45, 9));
    assert_eq!(found.num_prompts, u64::from(snapshot.num_prompts));
    assert_eq!(found.num_bytes, snapshot.files().map(|file| file.length).sum::<u64>());
    let scored: Vec<f64> = all.iter().filter(|s| !s.is_nan()).map(|&s| f64::from(s)).collect();
    let n = scored.len() as f64;
    let mean = scored.iter().sum::<f64>() / n;
    let std = (scored.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / n).sqrt();
    let [reward, none] = &found.columns[..] else { panic!("{:?}", found.columns) };
    assert_eq!((reward.scored, reward.unscored, reward.num_runs), (36, 9, 2));
    assert!((reward.mean - mean).abs() < 1e-6 && (reward.std - std).abs() < 1e-9, "{reward:?}");
    let extremes = [f64::from(reward.min), f64::from(reward.max)];
    assert_eq!(scored.iter().copied().reduce(f64::min), Some(extremes[0]));
    assert_eq!(scored.iter().copied().reduce(f64::max), Some(extremes[1]));
    assert_eq!((none.name.as_str(), none.scored, none.unscored, none.num_runs), ("none", 0, 45, 0));
    assert!(none.mean.is_nan() && none.std.is_nan() && none.min.is_nan() && none.max.is_nan());
    assert_eq!((reward.version, reward.source.as_str()), (1, ""));
    // Scores anew count up, and say where they are from.
    pool.draft_scores("reward", SOURCE, 0, &[2.5; 45]).unwrap();
    pool.publish_scores("reward").unwrap();
    let reward = describe(&pool.snapshot()).unwrap().columns.remove(0);
    assert_eq!((reward.version, reward.source.as_str(), reward.unscored), (2, SOURCE, 0));
    assert_eq!((reward.mean, reward.std, reward.min, reward.max), (2.5, 0.0, 2.5, 2.5));
}
