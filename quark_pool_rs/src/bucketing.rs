//! Batches of similar length: redistributes the draws of a window of batches, quantile by quantile.
//!
//! The samples of the window do not change, and neither do the counts per quantile in each batch. Rules:
//! `quark/pool/base.py`.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::collections::HashMap;

use crate::rng::Permutation;

/// Quantile and sample.
pub(crate) type Draw = (i16, u64);

/// Redistribute the draws of whole batches so that lengths within a batch are similar.
///
/// `lengths` has one entry for each of `draws`.
pub(crate) fn deal(draws: &mut [Draw], lengths: &[u32], batch_size: usize, key: u64) {
    let mut queues: HashMap<i16, Vec<(u32, usize)>> = HashMap::new();
    for (slot, (&(quantile, _), &length)) in draws.iter().zip(lengths).enumerate() {
        queues.entry(quantile).or_default().push((length, slot));
    }
    let mut queues: HashMap<i16, _> = queues
        .into_iter()
        .map(|(quantile, mut queue)| {
            queue.sort_unstable();
            (quantile, queue.into_iter())
        })
        .collect();
    let before = draws.to_vec();
    // The order of the batches is random, so that lengths do not rise within every window.
    let number = draws.len() / batch_size;
    let permutation = Permutation::new(number as u64, key);
    let mut order: Vec<usize> = (0..number).collect();
    order.sort_unstable_by_key(|&batch| permutation.apply(batch as u64));
    for batch in order {
        for draw in &mut draws[batch * batch_size..(batch + 1) * batch_size] {
            let queue = queues.get_mut(&draw.0).expect("every quantile has its queue");
            let (_, slot) = queue.next().expect("as many as there are slots");
            *draw = before[slot];
        }
    }
}
