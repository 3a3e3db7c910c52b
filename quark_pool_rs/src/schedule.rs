//! Which stratum takes which slot of an endless sequence, and where its walk then is.
//!
//! The strata take turns. One that may be walked only so often leaves the rounds when it is used up, and
//! the others share its slots. All of it follows from a slot's number; nothing counts.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::ops::Range;

use crate::rng::{Permutation, hash};

/// From some slot on, the strata that take turns.
#[derive(Debug)]
struct Phase {
    /// First slot.
    start: u128,
    /// Turns that each of its strata has had.
    turn: u128,
    strata: Vec<usize>,
}

/// The turns of all slots.
#[derive(Debug)]
pub(crate) struct Schedule {
    /// The last one has no strata where all are used up at last.
    phases: Vec<Phase>,
}

impl Schedule {
    /// Of so many strata without end.
    pub(crate) fn endless(strata: usize) -> Self {
        Self { phases: vec![Phase { start: 0, turn: 0, strata: (0..strata).collect() }] }
    }

    /// Of strata that have so many turns.
    pub(crate) fn limited(turns: &[u128]) -> Self {
        let mut ends: Vec<u128> = turns.to_vec();
        ends.sort_unstable();
        ends.dedup();
        let (mut start, mut turn) = (0, 0);
        let mut phases = Vec::with_capacity(ends.len() + 1);
        for end in ends.into_iter().map(Some).chain([None]) {
            let strata: Vec<usize> = (0..turns.len()).filter(|&i| turns[i] > turn).collect();
            let slots = end.map_or(0, |end| (end - turn) * strata.len() as u128);
            phases.push(Phase { start, turn, strata });
            start += slots;
            turn = end.unwrap_or(turn);
        }
        Self { phases }
    }

    /// Number of slots; None without end.
    pub(crate) fn num_slots(&self) -> Option<u128> {
        self.phases.last().filter(|phase| phase.strata.is_empty()).map(|phase| phase.start)
    }

    /// Call `visit` with the steps that some slots are, which exist: stratum by stratum, not in their order.
    ///
    /// `walks` is one for each stratum.
    pub(crate) fn visit(
        &self,
        slots: Range<u128>,
        walks: &[Walk],
        mut visit: impl FnMut(Steps<'_>),
    ) {
        let mut buffer = Vec::new();
        let mut from = slots.start;
        while from < slots.end {
            let at = self.phases.partition_point(|phase| phase.start <= from) - 1;
            let phase = &self.phases[at];
            let to = self.phases.get(at + 1).map_or(slots.end, |next| slots.end.min(next.start));
            let number = phase.strata.len();
            let turn = phase.turn + (from - phase.start) / number as u128;
            let next = ((from - phase.start) % number as u128) as usize;
            let (before, len) = ((from - slots.start) as usize, (to - from) as usize);
            for (i, &stratum) in phase.strata.iter().enumerate() {
                // Those before the next one have had their turn already.
                let had = turn + u128::from(i < next);
                let offset = if i < next { i + number - next } else { i - next };
                let count = len.saturating_sub(offset).div_ceil(number);
                walks[stratum].visit(had, count, &mut buffer, |epoch, positions, done| {
                    let first = before + offset + done * number;
                    visit(Steps { stratum, epoch, positions, first, stride: number });
                });
            }
            from = to;
        }
    }
}

/// Some steps of the walk over one stratum, of one epoch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Steps<'a> {
    pub(crate) stratum: usize,
    pub(crate) epoch: u128,
    /// Where the walk is at each step.
    pub(crate) positions: &'a [u64],
    /// Which of the visited slots the first step is.
    first: usize,
    /// How many slots on the next one is.
    stride: usize,
}

impl Steps<'_> {
    /// Each position, and which of the visited slots it is.
    pub(crate) fn slots(&self) -> impl Iterator<Item = (usize, u64)> {
        (self.first..).step_by(self.stride).zip(self.positions.iter().copied())
    }
}

/// An endless walk over `0 .. size`: every epoch visits each once, in an order of its own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Walk {
    pub(crate) key: u64,
    pub(crate) size: u64,
}

impl Walk {
    fn permutation(self, epoch: u128) -> Permutation {
        Permutation::new(self.size, hash(self.key, epoch as u64))
    }

    /// Where it is after `turn` steps.
    pub(crate) fn at(self, turn: u128) -> u64 {
        let size = u128::from(self.size);
        self.permutation(turn / size).apply((turn % size) as u64)
    }

    /// Call `visit` with the positions of `count` steps after `turn` of them, epoch by epoch, and how many of
    /// the steps came before. What `buffer` holds does not matter.
    fn visit(
        self,
        turn: u128,
        count: usize,
        buffer: &mut Vec<u64>,
        mut visit: impl FnMut(u128, &[u64], usize),
    ) {
        let size = u128::from(self.size);
        let (mut epoch, mut next, mut done) = (turn / size, (turn % size) as u64, 0);
        while done < count {
            let left = self.size - next;
            let len = usize::try_from(left).map_or(count - done, |left| left.min(count - done));
            buffer.resize(len, 0);
            self.permutation(epoch).apply_each(next, buffer);
            visit(epoch, buffer, done);
            (epoch, next, done) = (epoch + 1, 0, done + len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strata(schedule: &Schedule, slots: Range<u128>) -> Vec<usize> {
        let walks = [Walk { key: 0, size: 3 }; 4];
        let mut seen = vec![usize::MAX; (slots.end - slots.start) as usize];
        schedule.visit(slots.clone(), &walks, |steps| {
            for (slot, _) in steps.slots() {
                seen[slot] = steps.stratum;
            }
        });
        seen
    }

    #[test]
    fn a_used_up_stratum_leaves_its_slots_to_the_others() {
        let schedule = Schedule::limited(&[3, 1, 3, 5]);
        assert_eq!(schedule.num_slots(), Some(12));
        assert_eq!(strata(&schedule, 0..12), [0, 1, 2, 3, 0, 2, 3, 0, 2, 3, 3, 3]);
        assert_eq!(strata(&schedule, 5..8), [2, 3, 0]);
    }

    #[test]
    fn turns_go_on_forever_otherwise() {
        let schedule = Schedule::endless(3);
        assert_eq!(schedule.num_slots(), None);
        assert_eq!(strata(&schedule, (1 << 70)..(1 << 70) + 4), [1, 2, 0, 1]);
    }
}
