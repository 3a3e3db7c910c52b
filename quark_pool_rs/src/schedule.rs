//! Which stratum takes which slot of an endless sequence, and where its walk then is.
//!
//! The strata take turns. One that may be walked only so often leaves the rounds when it is used up, and
//! the others share its slots. All of it follows from a slot's number; nothing counts.

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

    /// Call `visit` with the stratum and the place in its walk for each of some slots, which exist.
    ///
    /// `walks` is one for each stratum.
    pub(crate) fn visit(
        &self,
        slots: Range<u128>,
        walks: &[Walk],
        mut visit: impl FnMut(usize, Step),
    ) {
        let mut from = slots.start;
        while from < slots.end {
            let at = self.phases.partition_point(|phase| phase.start <= from) - 1;
            let phase = &self.phases[at];
            let to = self.phases.get(at + 1).map_or(slots.end, |next| slots.end.min(next.start));
            let number = phase.strata.len() as u64;
            let turn = phase.turn + (from - phase.start) / u128::from(number);
            let mut next = ((from - phase.start) % u128::from(number)) as usize;
            // Those before the next one have had their turn already.
            let had = |i: usize| turn + u128::from(i < next);
            let strata = phase.strata.iter().enumerate();
            let mut cursors: Vec<Cursor> =
                strata.map(|(i, &stratum)| Cursor::new(walks[stratum], had(i))).collect();
            for _ in from..to {
                visit(phase.strata[next], cursors[next].step());
                next = if next + 1 == cursors.len() { 0 } else { next + 1 };
            }
            from = to;
        }
    }
}

/// An endless walk over `0 .. size`: every epoch visits each once, in an order of its own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Walk {
    pub(crate) key: u64,
    pub(crate) size: u64,
}

/// Where a walk is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(crate) epoch: u128,
    pub(crate) place: u64,
}

impl Walk {
    /// Where it is after `turn` steps.
    pub(crate) fn at(self, turn: u128) -> Step {
        Cursor::new(self, turn).step()
    }
}

/// A walk at one of its steps.
struct Cursor {
    walk: Walk,
    epoch: u128,
    next: u64,
    permutation: Permutation,
}

impl Cursor {
    fn new(walk: Walk, turn: u128) -> Self {
        let size = u128::from(walk.size);
        let epoch = turn / size;
        let permutation = Permutation::new(walk.size, hash(walk.key, epoch as u64));
        Self { walk, epoch, next: (turn % size) as u64, permutation }
    }

    #[inline]
    fn step(&mut self) -> Step {
        if self.next == self.walk.size {
            self.next = 0;
            self.epoch += 1;
            let key = hash(self.walk.key, self.epoch as u64);
            self.permutation = Permutation::new(self.walk.size, key);
        }
        let place = self.permutation.apply(self.next);
        self.next += 1;
        Step { epoch: self.epoch, place }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strata(schedule: &Schedule, slots: Range<u128>) -> Vec<usize> {
        let walks = [Walk { key: 0, size: 3 }; 4];
        let mut seen = Vec::new();
        schedule.visit(slots, &walks, |stratum, _| seen.push(stratum));
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
