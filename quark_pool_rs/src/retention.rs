//! Chooses the oldest appends to remove, by number of samples, number of rounds, or round.
//!
//! This module only decides, from ids and rounds. `pool` writes and commits. Rules: FORMAT.md, "A retention".

use std::collections::BTreeSet;
use std::ops::Range;

use crate::error::{PoolError, Result};

/// Limits on a pool. Whole appends are removed, oldest first, until all limits hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Maximum number of samples.
    pub max_samples: Option<u64>,
    /// Maximum number of rounds that have samples, counted from the newest.
    pub max_rounds: Option<u64>,
    /// Rounds below this are removed.
    pub before_round: Option<u32>,
}

impl Limits {
    /// Refuse limits out of range.
    ///
    /// # Errors
    /// `Invalid`.
    pub fn check(&self) -> Result<()> {
        match *self {
            Self { max_samples: None, max_rounds: None, before_round: None } => {
                Err(PoolError::invalid(
                    "nothing says what is to stay: give max_samples, max_rounds or before_round",
                ))
            }
            Self { max_samples: Some(0), .. } => {
                Err(PoolError::invalid("max_samples is 0; at least 1 has to stay"))
            }
            Self { max_rounds: Some(0), .. } => {
                Err(PoolError::invalid("max_rounds is 0; at least 1 has to stay"))
            }
            _ => Ok(()),
        }
    }

    /// How many of `appends` (ids and round, by first id) to remove. The newest always stays.
    ///
    /// If rounds are not in order, an append that stays also keeps all later ones.
    pub fn num_gone(&self, appends: &[(Range<u64>, u32)]) -> usize {
        let Some(((newest, _), older)) = appends.split_last() else { return 0 };
        let by_samples = |max: u64| older.partition_point(|(ids, _)| newest.end - ids.start > max);
        let before = |round: u32| older.iter().take_while(|(_, own)| *own < round).count();
        let by_rounds = |max: u64| {
            let rounds: BTreeSet<u32> = appends.iter().map(|(_, round)| *round).collect();
            let oldest = rounds.into_iter().rev().take(usize::try_from(max).unwrap_or(usize::MAX));
            before(oldest.min().unwrap_or(0))
        };
        let gone = [
            self.max_samples.map(by_samples),
            self.max_rounds.map(by_rounds),
            self.before_round.map(before),
        ];
        gone.into_iter().flatten().max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gone(limits: Limits, appends: &[(u64, u32)]) -> usize {
        let mut end = 7;
        let appends = appends.iter().map(|&(count, round)| {
            end += count;
            (end - count..end, round)
        });
        limits.num_gone(&appends.collect::<Vec<_>>())
    }

    #[test]
    fn the_oldest_go_and_the_newest_stays() {
        let appends = [(3, 0), (2, 0), (4, 1), (1, 1), (5, 3)];
        let by_samples =
            |max| gone(Limits { max_samples: Some(max), ..Limits::default() }, &appends);
        assert_eq!([1, 5, 6, 9, 10, 14, 15, 99].map(by_samples), [4, 4, 3, 3, 2, 1, 0, 0]);
        let by_rounds = |max| gone(Limits { max_rounds: Some(max), ..Limits::default() }, &appends);
        assert_eq!([1, 2, 3, u64::MAX].map(by_rounds), [4, 2, 0, 0]);
        let before =
            |round| gone(Limits { before_round: Some(round), ..Limits::default() }, &appends);
        assert_eq!([0, 1, 2, 3, 9].map(before), [0, 2, 4, 4, 4]);
        let both = Limits { max_samples: Some(99), max_rounds: Some(2), before_round: Some(3) };
        assert_eq!(gone(both, &appends), 4);
        assert_eq!(gone(both, &[]), 0);
    }

    #[test]
    fn an_append_that_is_to_stay_keeps_what_came_after_it() {
        let appends = [(1, 0), (1, 2), (1, 1), (1, 2)];
        assert_eq!(gone(Limits { before_round: Some(2), ..Limits::default() }, &appends), 1);
        assert_eq!(gone(Limits { max_rounds: Some(1), ..Limits::default() }, &appends), 1);
    }

    #[test]
    fn what_limits_nothing_is_refused() {
        assert!(Limits::default().check().is_err());
        assert!(Limits { max_samples: Some(0), ..Limits::default() }.check().is_err());
        assert!(Limits { max_rounds: Some(0), ..Limits::default() }.check().is_err());
        assert!(Limits { before_round: Some(0), ..Limits::default() }.check().is_ok());
    }
}
