//! Draws newer samples of a quantile more often.
//!
//! An epoch takes a quota of each round. The samples of a round are walked without replacement, continuing where the
//! previous epoch stopped. The arithmetic uses integers, so that every machine draws the same samples. Rules:
//! `quark/pool/base.py`.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use rayon::prelude::*;

use crate::columns::column;
use crate::error::Result;
use crate::quantization::Quantization;
use crate::rng::hash;
use crate::schedule::Walk;
use crate::threads::parallel;

/// The weight of a sample of the newest round.
const WHOLE_BITS: u32 = 20;

/// The samples of one round in one quantile.
struct Round {
    /// Their start among the ids.
    first: usize,
    /// Number of draws in an epoch.
    quota: u64,
    walk: Walk,
}

/// The members of one quantile, by round.
pub(crate) struct Aged {
    /// By round and id, ascending.
    ids: Vec<u64>,
    /// Newest first.
    rounds: Vec<Round>,
    /// Cumulative number of draws in an epoch, each round included.
    ends: Vec<u64>,
}

impl Aged {
    /// One for each of `labels`, which must have members. `weights` are by age in rounds; older samples are not drawn.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    pub(crate) fn of(
        quantization: &Quantization,
        labels: &[i16],
        weights: &[u32],
        key: u64,
    ) -> Result<Vec<Self>> {
        let snapshot = quantization.snapshot();
        let label_of = quantization.labels()?;
        let mut round_of = vec![0_u32; label_of.len()];
        snapshot.copy_column(column::ROUND, &mut round_of)?;
        let one = |&label: &i16| {
            let members = (0_u64..).zip(&label_of).filter(|&(_, &l)| l == label);
            let mut ids: Vec<u64> = members.map(|(id, _)| id).collect();
            // A stable sort, and one pass if the rounds are in order.
            ids.sort_by_key(|&id| round_of[id as usize]);
            Self::new(ids, &round_of, weights, hash(key, label as u64))
        };
        Ok(parallel(|| labels.par_iter().map(one).collect()))
    }

    fn new(ids: Vec<u64>, round_of: &[u32], weights: &[u32], key: u64) -> Self {
        let (mut rounds, mut ends) = (Vec::new(), Vec::new());
        let (mut weight, mut first) = (0, ids.len());
        let newest = ids.last().map_or(0, |&id| round_of[id as usize]);
        let same = |a: &u64, b: &u64| round_of[*a as usize] == round_of[*b as usize];
        for members in ids.chunk_by(same).rev() {
            let round = round_of[members[0] as usize];
            let size = members.len() as u64;
            first -= members.len();
            let before: u64 = weight >> WHOLE_BITS;
            let age = (newest - round) as usize;
            weight += size * u64::from(weights.get(age).copied().unwrap_or(0));
            let end = weight >> WHOLE_BITS;
            let walk = Walk { key: hash(key, u64::from(round)), size };
            rounds.push(Round { first, quota: end - before, walk });
            ends.push(end);
        }
        Self { ids, rounds, ends }
    }

    /// Number of draws in an epoch.
    pub(crate) fn size(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// The sample at a position of the walk.
    pub(crate) fn id(&self, epoch: u128, place: u64) -> u64 {
        let at = self.ends.partition_point(|&end| end <= place);
        let Round { first, quota, walk } = self.rounds[at];
        let taken = place - (self.ends[at] - quota);
        let own = walk.at(epoch * u128::from(quota) + u128::from(taken));
        self.ids[first + own as usize]
    }
}
