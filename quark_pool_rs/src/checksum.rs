//! Sums over bytes: xxh3 against accidents, SHA-256 where a chain must hold.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::format::BLOCK_BYTES;

/// A SHA-256.
pub type Digest256 = [u8; 32];

/// xxh3-64 of some bytes.
pub fn sum64(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// xxh3-128 of some bytes, little-endian.
pub fn sum128(bytes: &[u8]) -> [u8; 16] {
    xxh3_128(bytes).to_le_bytes()
}

/// SHA-256 over the parts, one after another.
pub fn sha256(parts: &[&[u8]]) -> Digest256 {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        use std::fmt::Write;
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The table of a data file: one sum per block of `bytes`.
pub fn block_sums(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks(BLOCK_BYTES).map(sum64)
}

/// Which blocks of a file were found to match their sums.
#[derive(Debug)]
pub struct CheckedBlocks {
    bits: Vec<AtomicU64>,
}

impl CheckedBlocks {
    /// None yet, for `len` bytes.
    pub fn new(len: usize) -> Self {
        let words = len.div_ceil(BLOCK_BYTES).div_ceil(64);
        Self { bits: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Whether block `block` was checked.
    #[inline(always)]
    pub fn is_checked(&self, block: usize) -> bool {
        // Relaxed: the bytes are immutable, so the bit guards no other memory.
        let bits = self.bits.get(block / 64);
        bits.is_some_and(|bits| bits.load(Ordering::Relaxed) >> (block % 64) & 1 == 1)
    }

    /// Whether all blocks that `range` touches were checked.
    #[inline(always)]
    pub fn covers(&self, range: &Range<usize>) -> bool {
        if range.start >= range.end {
            return true;
        }
        let (first, last) = (range.start / BLOCK_BYTES, (range.end - 1) / BLOCK_BYTES);
        self.is_checked(first)
            && (first == last || (first + 1..=last).all(|block| self.is_checked(block)))
    }

    /// Check the blocks that `range` touches and that were not checked before.
    ///
    /// # Errors
    /// The number of the first block that does not match its sum.
    pub fn check(&self, data: &[u8], sums: &[u8], range: Range<usize>) -> Result<(), usize> {
        if range.start >= range.end {
            return Ok(());
        }
        for block in range.start / BLOCK_BYTES..=(range.end - 1) / BLOCK_BYTES {
            if !self.is_checked(block) {
                self.check_block(data, sums, block)?;
            }
        }
        Ok(())
    }

    #[cold]
    fn check_block(&self, data: &[u8], sums: &[u8], block: usize) -> Result<(), usize> {
        let start = block * BLOCK_BYTES;
        let bytes = data.get(start..data.len().min(start + BLOCK_BYTES)).ok_or(block)?;
        let sum = sums.get(block * 8..block * 8 + 8).ok_or(block)?;
        if sum64(bytes).to_le_bytes() != sum {
            return Err(block);
        }
        let bits = self.bits.get(block / 64).ok_or(block)?;
        bits.fetch_or(1 << (block % 64), Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_answers_for_itself() {
        let mut data = vec![7_u8; 3 * BLOCK_BYTES + 5];
        let sums: Vec<u8> = block_sums(&data).flat_map(u64::to_le_bytes).collect();
        assert_eq!(sums.len(), 4 * 8);
        data[2 * BLOCK_BYTES] ^= 1;
        let checked = CheckedBlocks::new(data.len());
        assert_eq!(checked.check(&data, &sums, 0..2 * BLOCK_BYTES), Ok(()));
        assert_eq!(checked.check(&data, &sums, 0..2 * BLOCK_BYTES + 1), Err(2));
        assert_eq!(checked.check(&data, &sums, 3 * BLOCK_BYTES..data.len()), Ok(()));
        assert!(checked.is_checked(0) && checked.is_checked(3) && !checked.is_checked(2));
        assert_eq!(checked.check(&data, &sums, 9..9), Ok(()));
    }

    #[test]
    fn known_sums() {
        assert_eq!(sum64(b""), 0x2d06_8005_38d3_94c2);
        assert_eq!(
            hex(&sha256(&[b"a", b"bc"])),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
