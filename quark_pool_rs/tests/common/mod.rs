//! What the tests share: a fake disk and made-up batches.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "tests may")]

pub mod disk;
pub mod goals;

use std::collections::BTreeMap;
use std::sync::Arc;

use quark_pool_rs::batch::Batch;
use quark_pool_rs::columns::{COLUMNS, Given, column};
use quark_pool_rs::compaction::plan;
use quark_pool_rs::error::PoolError;
use quark_pool_rs::format::{FORMAT_VERSION, PoolSettings};
use quark_pool_rs::lookup::Sample;
use quark_pool_rs::pool::{OpenOptions, Pool};
use quark_pool_rs::retention::Limits;
use quark_pool_rs::rng::mix64;
use quark_pool_rs::snapshot::Snapshot;
use quark_pool_rs::storage::Storage;

pub const VOCAB: u32 = 500;
pub const TIE_SEED: u64 = 11;

pub fn settings() -> PoolSettings {
    PoolSettings::new("0123456789abcdef".to_owned(), VOCAB, true, TIE_SEED, "{\"who\":\"test\"}")
        .unwrap()
}

pub fn create(storage: &Arc<dyn Storage>) -> quark_pool_rs::error::Result<Pool> {
    create_version(storage, FORMAT_VERSION)
}

/// As a build of that format did.
pub fn create_version(
    storage: &Arc<dyn Storage>,
    format: u32,
) -> quark_pool_rs::error::Result<Pool> {
    Pool::create(storage.clone(), &settings().of_version(format)?, "pid 1")
}

pub fn writer(storage: &Arc<dyn Storage>) -> quark_pool_rs::error::Result<Pool> {
    Pool::open(storage.clone(), OpenOptions { writer: Some("pid 1"), snapshot: None })
}

pub fn reader(storage: &Arc<dyn Storage>) -> quark_pool_rs::error::Result<Pool> {
    Pool::open(storage.clone(), OpenOptions::default())
}

/// A batch that owns its arrays.
#[derive(Debug, Clone)]
pub struct Owned {
    pub key: String,
    pub prompts: Vec<(Vec<u32>, String, String)>,
    pub prompt_index: Vec<u32>,
    pub completions: Vec<(Vec<u32>, String)>,
    pub settings: String,
    pub round: u32,
    pub scores: Vec<(String, Vec<f32>)>,
}

impl Owned {
    /// The same for the same number: `count` samples, some prompts that other batches have too.
    pub fn numbered(number: u32, count: u32) -> Self {
        let prompt = |i: u32| {
            let i = i % 5 + number / 3;
            (vec![i % VOCAB, 7, i / 2 % VOCAB], format!("prompt {i} \u{e9}"), "{}".to_owned())
        };
        let score = |i: u32| match (number * 7 + i * 13) % 11 {
            0 => f32::NAN,
            r => r as f32 / 2.0 - 2.0,
        };
        Self {
            key: format!("run/{number}"),
            prompts: (0..3).map(prompt).collect(),
            prompt_index: (0..count).map(|i| i % 3).collect(),
            completions: (0..count)
                .map(|i| {
                    let tokens = (0..(i + number) % 6).map(|t| (t * 31 + i + number) % VOCAB);
                    (tokens.collect(), format!("completion {i} of {number}"))
                })
                .collect(),
            settings: format!("{{\"temperature\":{}}}", number % 2),
            round: number,
            scores: vec![("reward".to_owned(), (0..count).map(score).collect())],
        }
    }

    pub fn append(&self, pool: &Pool) -> quark_pool_rs::error::Result<std::ops::Range<u64>> {
        let n = self.completions.len();
        let prompt_tokens: Vec<u32> = self.prompts.iter().flat_map(|p| p.0.clone()).collect();
        let texts: Vec<&str> = self.prompts.iter().map(|p| p.1.as_str()).collect();
        let metadata: Vec<&str> = self.prompts.iter().map(|p| p.2.as_str()).collect();
        let tokens: Vec<u32> = self.completions.iter().flat_map(|c| c.0.clone()).collect();
        let completion_texts: Vec<&str> = self.completions.iter().map(|c| c.1.as_str()).collect();
        let scores: Vec<(&str, &[f32])> =
            self.scores.iter().map(|(name, values)| (name.as_str(), values.as_slice())).collect();
        let settings = pool.snapshot().context.settings.clone();
        let sampled = |row| Self::logprob_sampled(row, &settings);
        pool.append(&Batch {
            key: &self.key,
            prompt_tokens: &prompt_tokens,
            prompt_offsets: &offsets(self.prompts.iter().map(|p| p.0.len())),
            prompt_texts: &texts,
            prompt_metadata: &metadata,
            prompt_index: &self.prompt_index,
            completion_tokens: &tokens,
            completion_offsets: &offsets(self.completions.iter().map(|c| c.0.len())),
            completion_texts: settings.store_text.then_some(&completion_texts),
            round: self.round,
            chunk: 2,
            policy_step: 3,
            settings: &self.settings,
            given: Given {
                finish_reasons: &vec![1; n],
                reward_tokens: &vec![-1; n],
                seeds: &(0..n as u64).map(|i| i << 40).collect::<Vec<_>>(),
                logprob_policy: &vec![-1.5; n],
                logprob_reference: &vec![f32::NAN; n],
                logprob_sampled: &(0..n).map(sampled).collect::<Vec<_>>(),
            },
            scores: &scores,
        })
    }

    /// Of a row; not known of each third one, nor in a pool of a version without the column.
    fn logprob_sampled(row: usize, settings: &PoolSettings) -> f32 {
        if COLUMNS[column::LOGPROB_SAMPLED].is_in(settings) && row % 3 < 2 {
            -0.25 - row as f32
        } else {
            f32::NAN
        }
    }

    /// Whether row `row` is what `sample` of a pool with these settings says.
    pub fn matches(&self, row: usize, sample: &Sample, settings: &PoolSettings) -> bool {
        let logprob_sampled = Self::logprob_sampled(row, settings);
        let prompt = &self.prompts[self.prompt_index[row] as usize];
        let mut given: Vec<_> = self.scores.iter().map(|(n, v)| (n, v[row].to_bits())).collect();
        let mut stored: Vec<_> = sample.scores.iter().map(|(n, s)| (n, s.to_bits())).collect();
        given.sort_unstable();
        stored.sort_unstable();
        let numbers = &sample.numbers;
        sample.prompt_tokens == prompt.0
            && sample.prompt_text == prompt.1
            && sample.prompt_metadata == prompt.2
            && sample.completion_tokens == self.completions[row].0
            && sample.completion_text.as_ref() == Some(&self.completions[row].1)
            && (numbers.finish, numbers.round, numbers.chunk) == (1, self.round, 2)
            && (numbers.policy_step, numbers.reward_token) == (3, -1)
            && *sample.settings == *self.settings
            && numbers.seed == (row as u64) << 40
            && numbers.logprob_policy.to_bits() == (-1.5_f32).to_bits()
            && numbers.logprob_reference.is_nan()
            && numbers.logprob_sampled.to_bits() == logprob_sampled.to_bits()
            && given == stored
    }
}

fn offsets(lengths: impl Iterator<Item = usize>) -> Vec<i64> {
    let mut offsets = vec![0];
    for len in lengths {
        offsets.push(offsets[offsets.len() - 1] + len as i64);
    }
    offsets
}

/// Whether a snapshot holds exactly these batches; an error of the pool is passed on.
pub fn check_content(snapshot: &Snapshot, batches: &[Owned]) -> quark_pool_rs::error::Result<bool> {
    check_content_from(0, snapshot, batches)
}

/// Whether it holds exactly these but for the samples before `first`, and says so of those.
pub fn check_content_from(
    first: u64,
    snapshot: &Snapshot,
    batches: &[Owned],
) -> quark_pool_rs::error::Result<bool> {
    let mut id = 0;
    for batch in batches {
        for row in 0..batch.completions.len() {
            let is_right = match snapshot.sample(id) {
                Err(PoolError::UnknownSample { .. }) => id < first,
                Err(error) => return Err(error),
                Ok(sample) => {
                    id >= first && batch.matches(row, &sample, &snapshot.context.settings)
                }
            };
            if !is_right {
                return Ok(false);
            }
            id += 1;
        }
    }
    Ok((snapshot.num_removed, snapshot.num_samples) == (first, id))
}

/// One commit.
#[derive(Debug, Clone)]
pub enum Step {
    Append(Owned),
    /// The next scores of a column's draft.
    Draft(&'static str, Vec<f32>),
    Publish(&'static str),
    Discard(&'static str),
    /// Keep so many snapshots; there are to be more.
    Collect(u64),
    /// Make one file of small ones, of at most so many rows; there are to be some.
    Compact(u64),
    /// Keep so many samples; there are to be more, beside those of the newest append.
    Retain(u64),
}

/// What the tests' drafts say of their scores.
pub const SOURCE: &str = "{\"reward\":\"other\"}";

impl Step {
    pub fn apply(&self, pool: &Pool) -> quark_pool_rs::error::Result<()> {
        match self {
            Self::Append(batch) => batch.append(pool).map(drop),
            Self::Draft(name, scores) => {
                let begin = pool.snapshot().num_removed;
                pool.draft_scores(name, SOURCE, pool.draft_end(name).unwrap_or(begin), scores)
            }
            Self::Publish(name) => pool.publish_scores(name),
            Self::Discard(name) => pool.discard_scores(name),
            Self::Collect(keep) => pool.collect(*keep, false).map(drop),
            Self::Compact(max_rows) => pool.compact_once(*max_rows).map(drop),
            Self::Retain(max_samples) => {
                let limits = Limits { max_samples: Some(*max_samples), ..Limits::default() };
                pool.retain(&limits, false).map(drop)
            }
        }
    }
}

/// What a pool is to hold.
#[derive(Debug, Clone, Default)]
pub struct Content {
    /// With those that were removed.
    pub batches: Vec<Owned>,
    /// By id, NaN for what was removed.
    pub drafts: BTreeMap<&'static str, Vec<f32>>,
    /// Samples that were removed.
    pub removed: usize,
}

impl Content {
    pub fn after(steps: &[Step]) -> Self {
        let mut content = Self::default();
        for step in steps {
            content.apply(step);
        }
        content
    }

    pub fn num_samples(&self) -> usize {
        self.batches.iter().map(|batch| batch.completions.len()).sum()
    }

    /// Ids below this are in a draft, or were removed.
    pub fn draft_end(&self, name: &str) -> usize {
        self.drafts.get(name).map_or(self.removed, Vec::len)
    }

    /// Samples that are to be removed for so many to stay.
    pub fn excess(&self, max_samples: u64) -> usize {
        let mut kept = 0;
        for size in self.batches.iter().rev().map(|batch| batch.completions.len()) {
            if kept > 0 && kept + size > max_samples as usize {
                break;
            }
            kept += size;
        }
        (self.num_samples() - kept).saturating_sub(self.removed)
    }

    pub fn apply(&mut self, step: &Step) {
        match step {
            Step::Append(batch) => self.batches.push(batch.clone()),
            Step::Draft(name, scores) => {
                let draft = self.drafts.entry(name).or_insert(vec![f32::NAN; self.removed]);
                draft.extend(scores);
            }
            Step::Retain(max_samples) => {
                self.removed += self.excess(*max_samples);
                for draft in self.drafts.values_mut() {
                    draft.resize(draft.len().max(self.removed), f32::NAN);
                    draft[..self.removed].fill(f32::NAN);
                }
            }
            Step::Publish(name) => {
                let scores = self.drafts.remove(name).unwrap();
                let mut scores = scores.as_slice();
                for batch in &mut self.batches {
                    let (own, rest) = scores.split_at(batch.completions.len());
                    scores = rest;
                    batch.scores.retain(|(other, _)| other != name);
                    batch.scores.push(((*name).to_owned(), own.to_vec()));
                }
            }
            Step::Discard(name) => drop(self.drafts.remove(name).unwrap()),
            Step::Collect(_) | Step::Compact(_) => {}
        }
    }

    /// Whether a snapshot holds exactly this.
    pub fn is_in(&self, snapshot: &Snapshot) -> quark_pool_rs::error::Result<bool> {
        if snapshot.drafts.len() != self.drafts.len() {
            return Ok(false);
        }
        for draft in &snapshot.drafts {
            let Some(scores) = self.drafts.get(draft.name.as_str()) else { return Ok(false) };
            if snapshot.draft_end(Some(draft)) != scores.len() as u64 || draft.source != SOURCE {
                return Ok(false);
            }
            let mut found = vec![0.0; self.num_samples()];
            snapshot.copy_scores(draft, &mut found)?;
            if !found.iter().zip(scores).all(|(a, b)| a.to_bits() == b.to_bits()) {
                return Ok(false);
            }
        }
        check_content_from(self.removed as u64, snapshot, &self.batches)
    }
}

/// Appends made one file of, a merged run, a draft, and retentions that go through all three.
pub fn retained() -> Vec<Step> {
    let append = |i| Step::Append(Owned::numbered(i, 2));
    let mut steps: Vec<_> = (0..5).map(append).collect();
    steps.push(Step::Compact(40));
    steps.extend((5..8).map(append));
    steps.extend([Step::Draft("other", vec![1.5; 9]), Step::Retain(9), append(8)]);
    steps.extend([Step::Retain(4), Step::Draft("other", vec![2.5; 4]), Step::Publish("other")]);
    steps.extend([append(9), Step::Retain(3), Step::Collect(1), append(10)]);
    steps
}

/// Steps that nobody chose.
pub fn history(seed: u64) -> Vec<Step> {
    let mut drawn = 0;
    let mut below = |limit: u64| {
        drawn += 1;
        mix64(seed ^ mix64(drawn)) % limit
    };
    let mut content = Content::default();
    let mut steps: Vec<Step> = Vec::new();
    let mut oldest = 0;
    let pool = create(&disk::Disk::default().storage()).unwrap();
    while steps.len() < 14 {
        let generation = steps.len() as u64;
        let name = ["reward", "other"][below(2) as usize];
        let scored = content.drafts.get(name).map(Vec::len);
        let missing = content.num_samples() - content.draft_end(name);
        let max_rows = 4 + below(20);
        let step = match (below(14), scored) {
            (0..=2, _) if missing > 0 => {
                let count = 1 + below(missing as u64);
                Step::Draft(name, (0..count).map(|_| below(9) as f32 - 4.0).collect())
            }
            (3..=5, Some(_)) if missing == 0 => Step::Publish(name),
            (6, Some(_)) => Step::Discard(name),
            (7, _) if generation > oldest => {
                let keep = 1 + below(generation - oldest);
                oldest = generation + 2 - keep;
                Step::Collect(keep)
            }
            (12..=13, _) if content.excess(max_rows / 2) > 0 => Step::Retain(max_rows / 2),
            (8..=10, _) if plan(&pool.snapshot(), max_rows).is_some() => Step::Compact(max_rows),
            _ => Step::Append(Owned::numbered(generation as u32, 1 + below(4) as u32)),
        };
        step.apply(&pool).unwrap();
        content.apply(&step);
        steps.push(step);
    }
    steps
}
