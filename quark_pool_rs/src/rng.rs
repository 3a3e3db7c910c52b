//! Counter-based randomness: a number is a pure function of a seed and a position, without state.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use crate::processor::{self, Kernel};

/// A bijection of 64 bits (the finalizer of splitmix64).
#[inline]
pub fn mix64(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A hash of `value` under `seed`; bijective in `value`.
#[inline]
pub fn hash(seed: u64, value: u64) -> u64 {
    mix64(mix_seed(seed) ^ value)
}

/// The half of [`hash`] that does not depend on the value.
#[inline]
fn mix_seed(seed: u64) -> u64 {
    mix64(seed.wrapping_add(0x9e37_79b9_7f4a_7c15))
}

/// A number below `n` from 64 random bits, as uniform as possible.
#[inline]
pub fn below(bits: u64, n: u64) -> u64 {
    ((u128::from(bits) * u128::from(n)) >> 64) as u64
}

/// With fewer bits, the halves have too few functions to choose from, and some positions would be more likely.
const MIN_BITS: u32 = 6;

/// A keyed permutation of `0 .. n` without an array of that length.
///
/// A Feistel network over the least number of bits that holds n, at least [`MIN_BITS`], walked until it falls into
/// the range.
#[derive(Debug, Clone, Copy)]
pub struct Permutation {
    n: u64,
    /// One key for each round, mixed.
    keys: [u64; 6],
    low_bits: u32,
    low_mask: u64,
    high_mask: u64,
}

impl Permutation {
    /// A permutation of `0 .. n`.
    pub fn new(n: u64, key: u64) -> Self {
        let bits = (u64::BITS - n.saturating_sub(1).leading_zeros()).max(MIN_BITS);
        let low_bits = bits / 2;
        Self {
            n,
            keys: std::array::from_fn(|round| mix_seed(key.wrapping_add(round as u64))),
            low_bits,
            low_mask: (1 << low_bits) - 1,
            high_mask: (1 << (bits - low_bits)) - 1,
        }
    }

    /// The position of `i < n`.
    #[inline(always)]
    pub fn apply(&self, i: u64) -> u64 {
        debug_assert!(i < self.n);
        let mut x = i;
        loop {
            x = self.scramble(x);
            if x < self.n {
                return x;
            }
        }
    }

    /// The positions of `out.len()` consecutive numbers from `first` on, all below n.
    pub fn apply_each(&self, first: u64, out: &mut [u64]) {
        for (out, i) in out.iter_mut().zip(first..) {
            *out = i;
        }
        processor::run(Scramble { permutation: self, values: out });
        // Numbers outside the range continue, together.
        let is_outside = |values: &[u64], at: &u32| values[*at as usize] >= self.n;
        let mut outside: Vec<u32> =
            (0..out.len() as u32).filter(|at| is_outside(out, at)).collect();
        let mut values: Vec<u64> = Vec::with_capacity(outside.len());
        while !outside.is_empty() {
            values.clear();
            values.extend(outside.iter().map(|&at| out[at as usize]));
            processor::run(Scramble { permutation: self, values: &mut values });
            for (&at, &value) in outside.iter().zip(&values) {
                out[at as usize] = value;
            }
            outside.retain(|at| is_outside(out, at));
        }
    }

    #[inline(always)]
    fn scramble(&self, x: u64) -> u64 {
        let (mut low, mut high) = (x & self.low_mask, x >> self.low_bits);
        // Rounds change the halves in turn, each keyed by the other, so their widths may differ.
        for [even, odd] in self.keys.as_chunks().0 {
            low ^= mix64(even ^ high) & self.low_mask;
            high ^= mix64(odd ^ low) & self.high_mask;
        }
        high << self.low_bits | low
    }
}

/// One pass over several values.
struct Scramble<'a> {
    permutation: &'a Permutation,
    values: &'a mut [u64],
}

impl Kernel for Scramble<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for value in self.values {
            *value = self.permutation.scramble(*value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permutation_reaches_everything_once() {
        for n in [1_u64, 2, 3, 4, 5, 17, 64, 1000] {
            for key in 0..5 {
                let permutation = Permutation::new(n, key);
                let mut seen: Vec<u64> = (0..n).map(|i| permutation.apply(i)).collect();
                let mut each = vec![0; n as usize];
                permutation.apply_each(0, &mut each);
                assert_eq!(each, seen);
                permutation.apply_each(n / 2, &mut each[..(n - n / 2) as usize]);
                assert_eq!(each[..(n - n / 2) as usize], seen[(n / 2) as usize..]);
                seen.sort_unstable();
                assert_eq!(seen, (0..n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn keys_permute_differently_and_evenly() {
        const KEYS: usize = 20_000;
        for n in [2, 3, 5, 6, 7, 9, 20, 40] {
            // How often each number comes to each place, and how often each pair comes to the first two.
            let mut places = vec![0_usize; n * n];
            let mut pairs = vec![0_usize; n * n];
            for key in 0..KEYS {
                let permutation = Permutation::new(n as u64, mix64(key as u64));
                let order: Vec<usize> =
                    (0..n).map(|i| permutation.apply(i as u64) as usize).collect();
                for (place, &i) in order.iter().enumerate() {
                    places[place * n + i] += 1;
                }
                pairs[order[0] * n + order[1]] += 1;
            }
            // Five standard deviations above the mean.
            let bound = |degrees: usize| degrees as f64 + 5.0 * (2.0 * degrees as f64).sqrt() + 5.0;
            let distance = |counts: &[usize], cells: usize| {
                let expected = counts.iter().sum::<usize>() as f64 / cells as f64;
                let seen = counts.iter().filter(|&&count| count > 0);
                seen.map(|&count| (count as f64 - expected).powi(2) / expected).sum::<f64>()
            };
            // Rows and columns of a permutation's matrix have the sum 1.
            let of_places = distance(&places, n * n) * (n - 1) as f64 / n as f64;
            assert!(of_places < bound((n - 1).pow(2)), "{n}: {of_places}");
            let of_pairs = distance(&pairs, n * (n - 1));
            assert!(of_pairs < bound(n * (n - 1) - 1), "{n}: {of_pairs}");
        }
    }

    #[test]
    fn below_covers_its_range() {
        assert_eq!((below(0, 7), below(u64::MAX, 7)), (0, 6));
    }
}
