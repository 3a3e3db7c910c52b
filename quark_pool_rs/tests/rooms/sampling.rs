//! Do batches hold what the contract says? Samplers against plain counting; `quark/pool/base.py` has the rules.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use proptest::prelude::*;
use quark_pool_rs::error::PoolError;
use quark_pool_rs::quantization::Quantization;
use quark_pool_rs::ranking::{RemainderRule, TieRule};
use quark_pool_rs::rng::mix64;
use quark_pool_rs::sampler::{Drawn, Sampler, SamplingMode, Settings};

use crate::common::disk::Disk;
use crate::common::{Owned, create};

/// Quantile and sample.
type Draw = (i16, u64);

/// Samples of one append: their round and their scores.
type Append = (u32, Vec<f32>);

/// What a sampler draws from, known sample by sample.
#[derive(Clone)]
struct Known {
    quantization: Arc<Quantization>,
    labels: Vec<i16>,
    rounds: Vec<u32>,
    lengths: Vec<usize>,
}

impl std::fmt::Debug for Known {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { labels, rounds, lengths, .. } = self;
        write!(formatter, "labels {labels:?}, rounds {rounds:?}, lengths {lengths:?}")
    }
}

impl Known {
    fn of(appends: &[Append], num_quantiles: u64, ties: TieRule, is_column: bool) -> Self {
        let pool = create(&Disk::default().storage()).unwrap();
        let (mut rounds, mut lengths, mut all) = (Vec::new(), Vec::new(), Vec::new());
        for (number, (round, scores)) in (0..).zip(appends) {
            let mut batch = Owned::numbered(number, scores.len() as u32);
            batch.round = *round;
            batch.scores = vec![("reward".to_owned(), scores.clone())];
            for (i, (tokens, _)) in (0..).zip(&mut batch.completions) {
                *tokens = vec![7; (mix64(u64::from(number) << 32 | i) % 9) as usize];
                lengths.push(tokens.len());
            }
            rounds.extend(scores.iter().map(|_| *round));
            all.extend_from_slice(scores);
            batch.append(&pool).unwrap();
        }
        let (snapshot, spread) = (pool.snapshot(), RemainderRule::Spread);
        let quantization = if is_column {
            Quantization::new(snapshot, "reward", num_quantiles, ties, spread)
        } else {
            Quantization::of_values(snapshot, all, num_quantiles, ties, spread)
        };
        let quantization = Arc::new(quantization.unwrap());
        let labels = quantization.labels().unwrap();
        Self { quantization, labels, rounds, lengths }
    }

    fn sampler(&self, settings: &Settings) -> Result<Sampler, PoolError> {
        Sampler::new(self.quantization.clone(), settings.clone())
    }

    /// The samples of each quantile that is drawn from; of the whole as one where it is not cut.
    fn strata(&self, settings: &Settings) -> Vec<Vec<u64>> {
        let mut strata: BTreeMap<i16, Vec<u64>> = BTreeMap::new();
        let is_wanted = |label: i16| {
            let only = settings.quantiles.as_ref();
            label >= 0 && only.is_none_or(|only| only.contains(&i64::from(label)))
        };
        for (id, &label) in (0..).zip(&self.labels).filter(|&(_, &label)| is_wanted(label)) {
            let of = if settings.mode == SamplingMode::Shuffle { 0 } else { label };
            strata.entry(of).or_default().push(id);
        }
        strata.into_values().collect()
    }

    /// By round, newest first: its samples, and how many of them an epoch takes.
    fn quotas(&self, members: &[u64], weights: &[u32]) -> Vec<(Vec<u64>, u64)> {
        let mut rounds: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        for &id in members {
            rounds.entry(self.rounds[id as usize]).or_default().push(id);
        }
        let newest = *rounds.keys().next_back().unwrap();
        let mut sum = 0;
        let quota = |(round, ids): (u32, Vec<u64>)| {
            let weight = weights.get((newest - round) as usize).copied().unwrap_or(0);
            let before = sum >> 20;
            sum += ids.len() as u64 * u64::from(weight);
            (ids, (sum >> 20) - before)
        };
        rounds.into_iter().rev().map(quota).collect()
    }
}

fn all_of(sampler: &Sampler, steps: std::ops::Range<u64>) -> Vec<Draw> {
    steps
        .flat_map(|step| {
            let Drawn { ids, quantiles, .. } = sampler.draw(step).unwrap();
            quantiles.into_iter().zip(ids).collect::<Vec<_>>()
        })
        .collect()
}

/// Which stratum takes each of so many slots; fewer where all are used up.
fn turns(epochs: &[u64], max_uses: Option<u64>, slots: usize) -> Vec<usize> {
    let mut left: Vec<Option<u64>> =
        epochs.iter().map(|&epoch| max_uses.map(|uses| uses * epoch)).collect();
    let mut taken = Vec::new();
    while taken.len() < slots && left.iter().any(|&left| left != Some(0)) {
        for (stratum, left) in left.iter_mut().enumerate() {
            if *left != Some(0) {
                *left = left.map(|left| left - 1);
                taken.push(stratum);
            }
        }
    }
    taken.truncate(slots);
    taken
}

/// Whether a walk over some samples takes each once before it takes one again.
fn is_without_replacement(walk: &[u64], members: &[u64]) -> bool {
    walk.chunks(members.len()).all(|epoch| {
        let epoch = sorted(epoch.iter().copied());
        epoch.is_sorted_by(|a, b| a < b) && epoch.iter().all(|id| members.contains(id))
    })
}

/// How often the sample is drawn that is drawn most.
fn most_uses(draws: &[Draw]) -> u64 {
    let mut counts: HashMap<u64, u64> = HashMap::new();
    for &(_, id) in draws {
        *counts.entry(id).or_default() += 1;
    }
    counts.into_values().max().unwrap_or(0)
}

fn sorted<T: Ord>(values: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut values: Vec<T> = values.into_iter().collect();
    values.sort();
    values
}

fn appends() -> impl Strategy<Value = Vec<Append>> {
    let score = prop_oneof![6 => (0_i8..9).prop_map(f32::from), 1 => Just(f32::NAN)];
    prop::collection::vec((0_u32..5, prop::collection::vec(score, 1..9)), 1..10)
}

fn known() -> impl Strategy<Value = Known> {
    let ties = prop::sample::select(vec![TieRule::Hash, TieRule::OlderFirst, TieRule::Together]);
    (appends(), 1_u64..7, ties, any::<bool>())
        .prop_map(|(appends, k, ties, is_column)| Known::of(&appends, k, ties, is_column))
}

fn settings() -> impl Strategy<Value = Settings> {
    let mode = prop::sample::select(vec![SamplingMode::Stratified, SamplingMode::Shuffle]);
    let only = prop::option::weighted(0.3, prop::collection::vec(0_i64..3, 1..3));
    (1_usize..9, any::<u64>(), mode, only, prop::option::of(1_u64..4)).prop_map(
        |(batch_size, seed, mode, quantiles, max_uses)| Settings {
            quantiles,
            max_uses,
            ..Settings::new(batch_size, seed, mode)
        },
    )
}

/// A sampler, or that it was refused because there is nothing to draw from.
fn checked(known: &Known, settings: &Settings) -> Option<Sampler> {
    let lacks = |k: &i64| (*k as usize) >= known.quantization.counts().len();
    match known.sampler(settings) {
        Ok(sampler) => Some(sampler),
        Err(error) => {
            let is_absent = settings.quantiles.iter().flatten().any(lacks);
            assert!(is_absent || known.strata(settings).is_empty(), "{error}");
            let what = if is_absent { "there is no quantile" } else { "nothing to draw from" };
            assert!(error.to_string().contains(what), "{error}");
            None
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn strata_take_turns_and_repeat_nothing_in_an_epoch(known in known(), settings in settings()) {
        let Some(sampler) = checked(&known, &settings) else { return Ok(()) };
        let strata = known.strata(&settings);
        let epochs: Vec<u64> = strata.iter().map(|ids| ids.len() as u64).collect();
        let total: u64 = epochs.iter().sum();
        let number = if let Some(uses) = settings.max_uses {
            // Up to the last whole batch.
            let slots = turns(&epochs, settings.max_uses, usize::MAX).len() as u64;
            prop_assert_eq!(slots, uses * total);
            let number = slots / settings.batch_size as u64;
            prop_assert_eq!(sampler.num_batches(), Some(u128::from(number)));
            let beyond = sampler.draw(number).unwrap_err().to_string();
            prop_assert!(beyond.contains(&format!("used up after {number} batches")), "{}", beyond);
            number
        } else {
            prop_assert_eq!(sampler.num_batches(), None);
            3 * total / settings.batch_size as u64 + 1
        };
        let draws = all_of(&sampler, 0..number);
        prop_assert_eq!(draws.len(), number as usize * settings.batch_size);
        prop_assert!(draws.iter().all(|&(quantile, id)| known.labels[id as usize] == quantile));
        let taken = turns(&epochs, settings.max_uses, draws.len());
        for (stratum, members) in strata.iter().enumerate() {
            let walk: Vec<u64> =
                draws.iter().zip(&taken).filter(|&(_, &of)| of == stratum).map(|(&(_, id), _)| id).collect();
            prop_assert!(is_without_replacement(&walk, members), "{:?} of {:?}", walk, members);
        }
        if let Some(uses) = settings.max_uses {
            prop_assert!(most_uses(&draws) <= uses);
        }
    }

    #[test]
    fn newer_samples_come_as_often_as_their_weight_says(
        known in known(),
        settings in settings(),
        weights in prop_oneof![
            Just(vec![1 << 20]),
            Just(vec![1 << 20, 1 << 19, 1 << 18, 1 << 17]),
            Just(vec![1 << 20, 888_888, 750_001, 3, 1, 1]),
            prop::collection::vec(0_u32..1 << 20, 0..5),
        ],
    ) {
        let mode = SamplingMode::Stratified;
        let settings = Settings { weights: Some(weights.clone()), mode, ..settings };
        let strata = known.strata(&settings);
        let quotas: Vec<_> = strata.iter().map(|ids| known.quotas(ids, &weights)).collect();
        let epochs: Vec<u64> = quotas.iter().map(|of| of.iter().map(|(_, quota)| quota).sum()).collect();
        if !strata.is_empty() && epochs.contains(&0) {
            let lacks = settings.quantiles.iter().flatten().any(|&k| k as usize >= known.quantization.counts().len());
            let refused = known.sampler(&settings).map(drop).unwrap_err().to_string();
            prop_assert!(lacks || refused.contains("newest round is too small"), "{}", refused);
            return Ok(());
        }
        let Some(sampler) = checked(&known, &settings) else { return Ok(()) };
        let wanted = 4 * epochs.iter().max().unwrap() * epochs.len() as u64;
        let slots = turns(&epochs, settings.max_uses, wanted as usize).len() as u64;
        let draws = all_of(&sampler, 0..slots / settings.batch_size as u64);
        let taken = turns(&epochs, settings.max_uses, draws.len());
        for (stratum, rounds) in quotas.iter().enumerate() {
            let walk: Vec<u64> =
                draws.iter().zip(&taken).filter(|&(_, &of)| of == stratum).map(|(&(_, id), _)| id).collect();
            for (members, quota) in rounds {
                let is_of_round = |id: &&u64| members.contains(id);
                for epoch in walk.chunks_exact(epochs[stratum] as usize) {
                    prop_assert_eq!(epoch.iter().filter(is_of_round).count() as u64, *quota);
                }
                // Every epoch goes on where the one before stopped.
                let mut counts: BTreeMap<u64, u64> = members.iter().map(|&id| (id, 0)).collect();
                for epoch in walk.chunks_exact(epochs[stratum] as usize) {
                    epoch.iter().filter(is_of_round).for_each(|id| *counts.get_mut(id).unwrap() += 1);
                    let least = counts.values().min().unwrap();
                    prop_assert!(counts.values().max().unwrap() - least <= 1, "{:?}", counts);
                }
            }
            prop_assert!(walk.iter().all(|&id| known.labels[id as usize] == known.labels[strata[stratum][0] as usize]));
        }
        if let Some(uses) = settings.max_uses {
            prop_assert_eq!(sampler.num_batches().unwrap(), u128::from(uses * epochs.iter().sum::<u64>()) / settings.batch_size as u128);
            prop_assert!(most_uses(&draws) <= uses);
        }
    }

    #[test]
    fn a_window_deals_its_own_draws_by_length(
        known in known(),
        settings in settings(),
        bucket_window in 2_usize..5,
        order in prop::collection::vec(any::<prop::sample::Index>(), 12),
    ) {
        let Some(plain) = checked(&known, &settings) else { return Ok(()) };
        let bucketed = Settings { bucket_window, ..settings.clone() };
        let sampler = known.sampler(&bucketed).unwrap();
        prop_assert_eq!(sampler.num_batches(), plain.num_batches());
        let number = plain.num_batches().map_or(12, |number| (number as u64).min(12));
        let batch = |step| all_of(&sampler, step..step + 1);
        let window = bucket_window as u64;
        for first in (0..number).step_by(bucket_window) {
            // The last window has fewer batches where the samples are used up.
            let end = plain.num_batches().map_or(first + window, |n| (n as u64).min(first + window));
            let before = all_of(&plain, first..end);
            let after: Vec<_> = (first..end).map(batch).collect();
            prop_assert!(is_dealt(&known, &before, &after), "{:?} to {:?}", before, after);
        }
        // In whatever order they are asked for.
        let again = known.sampler(&bucketed).unwrap();
        for at in order.iter().filter(|_| number > 0) {
            let step = at.index(number as usize) as u64;
            prop_assert_eq!(all_of(&again, step..step + 1), batch(step));
        }
    }

    #[test]
    fn the_slices_of_all_ranks_make_the_batch(
        known in known(),
        settings in settings(),
        is_iid in any::<bool>(),
        weights in prop::option::of(Just(vec![1 << 20, 1 << 19, 1 << 18])),
        bucket_window in 1_usize..4,
        processes in any::<prop::sample::Index>(),
    ) {
        let mut settings = Settings { bucket_window, ..settings };
        if is_iid {
            settings = Settings { mode: SamplingMode::Iid, max_uses: None, ..settings };
        } else if settings.mode == SamplingMode::Stratified {
            settings.weights = weights;
        }
        let Some(whole) = checked(&known, &settings) else { return Ok(()) };
        let world_size = 1 + processes.index(settings.batch_size);
        let shares: Vec<Sampler> = (0..world_size)
            .map(|rank| known.sampler(&Settings { rank, world_size, ..settings.clone() }).unwrap())
            .collect();
        for step in 0..whole.num_batches().map_or(5, |number| number.min(5) as u64) {
            let slices: Vec<_> = shares.iter().map(|share| all_of(share, step..step + 1)).collect();
            let lengths: Vec<usize> = slices.iter().map(Vec::len).collect();
            let share = |rank: usize| (settings.batch_size - rank).div_ceil(world_size);
            prop_assert_eq!(lengths, (0..world_size).map(share).collect::<Vec<_>>());
            let rows = (0..settings.batch_size).map(|row| slices[row % world_size][row / world_size]);
            prop_assert_eq!(rows.collect::<Vec<_>>(), all_of(&whole, step..step + 1));
        }
    }
}

/// Whether `after` are the draws `before`, dealt quantile by quantile in the order of their lengths (and
/// slots), the batches taking their shares in some order.
fn is_dealt(known: &Known, before: &[Draw], after: &[Vec<Draw>]) -> bool {
    let batch_size = after[0].len();
    let mut queues: BTreeMap<i16, Vec<(usize, usize, u64)>> = BTreeMap::new();
    for (slot, &(quantile, id)) in before.iter().enumerate() {
        queues.entry(quantile).or_default().push((known.lengths[id as usize], slot, id));
    }
    for queue in queues.values_mut() {
        queue.sort_unstable();
        queue.reverse();
    }
    permutations(after.len()).into_iter().any(|order| {
        let mut queues = queues.clone();
        order.into_iter().all(|batch| {
            let shares = &before[batch * batch_size..(batch + 1) * batch_size];
            let dealt = shares.iter().map(|(quantile, _)| {
                (*quantile, queues.get_mut(quantile).unwrap().pop().unwrap().2)
            });
            sorted(dealt) == sorted(after[batch].iter().copied())
        })
    })
}

fn permutations(n: usize) -> Vec<Vec<usize>> {
    if n == 0 {
        return vec![Vec::new()];
    }
    let shorter = permutations(n - 1);
    let with_last = |at: usize, mut order: Vec<usize>| {
        order.insert(at, n - 1);
        order
    };
    (0..n).flat_map(|at| shorter.iter().map(move |order| with_last(at, order.clone()))).collect()
}

/// 400 samples in 4 quantiles of 100, rounds 0 .. 7, no ties.
fn even() -> Known {
    let scores = |round: u64| (0..50).map(|i| (mix64(round * 50 + i) >> 41) as f32).collect();
    let appends: Vec<Append> = (0..8).map(|round| (round as u32, scores(round))).collect();
    Known::of(&appends, 4, TieRule::Hash, true)
}

#[test]
fn draws_with_replacement_are_uniform_over_quantiles_and_in_them() {
    let scores = |range: std::ops::Range<u32>| range.map(|i| i as f32).collect();
    // Quantiles of 20, 0, 0, .. samples would be drawn by their size otherwise.
    let known = Known::of(&[(0, scores(0..40)), (1, vec![0.5; 20])], 3, TieRule::Together, true);
    let counts = known.quantization.counts();
    assert_ne!(counts[0], counts[2], "{counts:?}");
    let sampler = known.sampler(&Settings::new(1000, 5, SamplingMode::Iid)).unwrap();
    let draws = all_of(&sampler, 0..60);
    let strata: Vec<_> = (0_i16..).zip(&counts).filter(|&(_, &count)| count > 0).collect();
    // Five standard deviations of a binomial.
    let is_near = |found: usize, p: f64| {
        let n = draws.len() as f64;
        (found as f64 - n * p).abs() < 5.0 * (n * p * (1.0 - p)).sqrt()
    };
    for &(label, &count) in &strata {
        let p = 1.0 / strata.len() as f64;
        let found = draws.iter().filter(|&&(quantile, _)| quantile == label).count();
        assert!(is_near(found, p), "{found} of quantile {label}");
        for (id, _) in known.labels.iter().enumerate().filter(|&(_, &of)| of == label) {
            let found = draws.iter().filter(|&&(_, drawn)| drawn == id as u64).count();
            assert!(is_near(found, p / count as f64), "{found} of sample {id}");
        }
    }
    assert_eq!(sampler.num_batches(), None);
    assert_ne!(sampler.draw(0).unwrap(), sampler.draw(1).unwrap());
    assert_eq!(sampler.draw(1 << 50).unwrap().ids.len(), 1000);
}

#[test]
fn seeds_and_epochs_have_orders_of_their_own() {
    let known = even();
    let settings = |mode, seed| Settings::new(400, seed, mode);
    for mode in [SamplingMode::Stratified, SamplingMode::Shuffle] {
        let sampler = known.sampler(&settings(mode, 1)).unwrap();
        let (first, second) = (sampler.draw(0).unwrap(), sampler.draw(1).unwrap());
        assert_ne!(first, second, "{mode:?}: every epoch has the same order");
        assert_eq!(sorted(first.ids.clone()), sorted(second.ids));
        let other = known.sampler(&settings(mode, 2)).unwrap().draw(0).unwrap();
        assert_ne!(first, other, "{mode:?}: the seed decides nothing");
        assert_eq!(first, known.sampler(&settings(mode, 1)).unwrap().draw(0).unwrap());
    }
    let weights = Some(vec![1 << 20, 1 << 19]);
    let aged =
        |seed| Settings { weights: weights.clone(), ..settings(SamplingMode::Stratified, seed) };
    let draw = |seed, step| known.sampler(&aged(seed)).unwrap().draw(step).unwrap();
    assert_ne!(draw(1, 0), draw(1, 1));
    assert_ne!(draw(1, 0), draw(2, 0));
}

#[test]
fn short_batches_come_at_every_place_of_a_window() {
    let known = even();
    let settings = Settings { bucket_window: 4, ..Settings::new(40, 3, SamplingMode::Stratified) };
    let sampler = known.sampler(&settings).unwrap();
    let mut places = [0; 4];
    for window in 0..60 {
        let length = |step| {
            let Drawn { ids, .. } = sampler.draw(step).unwrap();
            ids.iter().map(|&id| known.lengths[id as usize]).sum::<usize>()
        };
        let lengths: Vec<usize> = (0..4).map(|i| length(4 * window + i)).collect();
        let shortest = (0..4).min_by_key(|&i| lengths[i]).unwrap();
        places[shortest] += 1;
        let widest = lengths.iter().max().unwrap() - lengths.iter().min().unwrap();
        assert!(widest > 100, "batches of like length would differ more: {lengths:?}");
    }
    assert!(places.iter().all(|&count| count > 4), "{places:?}");
}

#[test]
fn a_setting_out_of_range_is_refused_by_name() {
    let known = even();
    let base = || Settings::new(8, 1, SamplingMode::Stratified);
    let cases: Vec<(Settings, &str)> = vec![
        (Settings { batch_size: 0, ..base() }, "batch_size is 0"),
        (Settings { batch_size: (1 << 31) + 1, ..base() }, "batch_size is 2147483649"),
        (Settings { rank: 2, world_size: 2, ..base() }, "rank 2 of 2 in a batch of 8"),
        (Settings { world_size: 9, ..base() }, "rank 0 of 9 in a batch of 8"),
        (Settings { max_uses: Some(0), ..base() }, "max_uses is 0"),
        (Settings { max_uses: Some(1), mode: SamplingMode::Iid, ..base() }, "the mode is iid"),
        (Settings { bucket_window: 0, ..base() }, "bucket_window is 0"),
        (Settings { bucket_window: 1 << 29, ..base() }, "bucket_window is 536870912"),
        (Settings { quantiles: Some(vec![1, 4]), ..base() }, "no quantile 4; they go from 0 to 3"),
        (Settings { quantiles: Some(vec![-1]), ..base() }, "no quantile -1"),
        (Settings { quantiles: Some(vec![]), ..base() }, "nothing to draw from"),
        (Settings { weights: Some(vec![1]), ..base() }, "newest round is too small"),
    ];
    let aged = |mode| Settings { weights: Some(vec![1 << 20]), mode, ..base() };
    let modes = [SamplingMode::Iid, SamplingMode::Shuffle];
    let cases = cases.into_iter().chain(modes.map(|mode| (aged(mode), "age weights")));
    for (settings, message) in cases {
        let error = known.sampler(&settings).map(drop).unwrap_err();
        assert!(matches!(error, PoolError::Invalid(_)), "{error}");
        assert!(error.to_string().contains(message), "{error}");
    }
    let unscored = Known::of(&[(0, vec![f32::NAN; 5])], 2, TieRule::Hash, true);
    let error = unscored.sampler(&base()).map(drop).unwrap_err();
    assert!(error.to_string().contains("no sample is ranked"), "{error}");
    assert_eq!(known.sampler(&base()).unwrap().quantization().counts(), [100; 4]);
}
