//! The only file that maps memory; with `processor` the only one with `unsafe`.
//!
//! A [`Region`] is read-only bytes that never change: a map of a published file, or a copy on the heap
//! (for storages that are not a file system). Layout of the bytes: FORMAT.md.
#![expect(unsafe_code, reason = "mapping and prefetching are unsafe; see the safety comments")]

use std::fs::File;
use std::io::{self, Read};
use std::ops::{Deref, Range};

use memmap2::Mmap;

/// Read-only bytes, aligned to at least 8.
///
/// What remains the user's duty: nobody may truncate or rewrite a published file of the pool while a
/// process reads it (the kernel would end the process, or show it bytes that were never checked).
#[derive(Debug)]
pub struct Region(Bytes);

#[derive(Debug)]
enum Bytes {
    Map(Mmap),
    Heap { words: Vec<u64>, len: usize },
}

impl Region {
    /// Map a whole file; where the system has no map left, read it.
    ///
    /// # Errors
    /// The system's.
    pub fn map(file: &mut File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        if len == 0 {
            return Ok(Self::copy(&[]));
        }
        // SAFETY: the obligation is that the file's bytes do not change while the map lives. Published
        // files are immutable: the pool creates them under a name that did not exist, never writes to
        // them again, and makes them read-only; it unlinks but never truncates. The rest is the user's
        // duty, stated on `Region`. The map is private to this type and only lent as `&[u8]`.
        if let Ok(map) = unsafe { Mmap::map(&*file) } {
            // Samples lie anywhere: what the system would read around a page is read for nothing. Whoever
            // reads on asks for it by `will_need`.
            let _ = map.advise(memmap2::Advice::Random);
            return Ok(Self(Bytes::Map(map)));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(Self::copy(&bytes))
    }

    /// A copy on the heap.
    pub fn copy(bytes: &[u8]) -> Self {
        let mut words = vec![0_u64; bytes.len().div_ceil(8)];
        for (to, &from) in bytemuck::cast_slice_mut(&mut words).iter_mut().zip(bytes) {
            *to = from;
        }
        Self(Bytes::Heap { words, len: bytes.len() })
    }

    /// Ask the processor to bring the line with byte `at` into its cache; a hint, so it cannot fail.
    #[inline]
    pub fn prefetch(&self, at: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let line = self.as_ptr().wrapping_add(at);
            // SAFETY: a prefetch reads no memory as far as the program can see and does not fault,
            // whatever the address is, and every x86-64 processor has the instruction.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = at;
    }

    /// Tell the system that all bytes will be read, first to last; a hint, so it cannot fail.
    pub fn will_be_read_through(&self) {
        if let Bytes::Map(map) = &self.0 {
            let _ = map.advise(memmap2::Advice::Sequential);
        }
    }

    /// Ask the system to bring these bytes in; a hint, so it cannot fail.
    pub fn will_need(&self, range: Range<usize>) {
        if let Bytes::Map(map) = &self.0
            && range.start < range.end
            && range.end <= map.len()
        {
            let _ = map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
    }
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Bytes::Map(map) => map,
            Bytes::Heap { words, len } => {
                bytemuck::cast_slice(words).get(..*len).unwrap_or_default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_map_and_a_copy_show_the_same_bytes() {
        let bytes: Vec<u8> = (0..10_001_u32).map(|i| (i % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let map = Region::map(&mut file).unwrap();
        map.will_need(4096..9000);
        map.prefetch(5000);
        map.will_be_read_through();
        map.prefetch(usize::MAX);
        assert_eq!(&*map, &bytes[..]);
        assert_eq!(&*Region::copy(&bytes), &bytes[..]);
        assert_eq!(Region::map(&mut tempfile::tempfile().unwrap()).unwrap().len(), 0);
    }
}
