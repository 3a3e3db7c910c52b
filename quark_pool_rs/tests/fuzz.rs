//! Do hostile bytes do harm? The stored corpus, and random changes of it, through the targets of `fuzz/`.
//! Record what a new format version begins with: `cargo test --test fuzz -- --ignored`.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may")]
#![allow(unsafe_code, reason = "an allocator that counts")]

mod common;
#[path = "../fuzz/src/targets.rs"]
mod targets;

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::goals;
use quark_pool_rs::rng::mix64;

const MAX_BYTES: usize = 64 << 20;
const MAX_TIME: Duration = Duration::from_secs(1);
static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// What one test holds would count for the other.
static TURN: Mutex<()> = Mutex::new(());

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(held, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(held, Ordering::Relaxed);
        // SAFETY: as the caller promises. Asked of the system, zeroed memory costs nothing until it is used.
        unsafe { System.alloc_zeroed(layout) }
    }
}

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

/// Where findings are left.
fn artifacts(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/artifacts").join(target)
}

fn stored(target: &str) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(corpus(target)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// Numbers that are at some limit.
const LIMITS: [u64; 12] = [
    0,
    1,
    7,
    0x7f,
    0xff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 40,
    (1 << 62) - 1,
    1 << 62,
    i64::MAX as u64,
    u64::MAX,
];

struct Mutator {
    drawn: u64,
}

impl Mutator {
    fn below(&mut self, limit: usize) -> usize {
        self.drawn = mix64(self.drawn.wrapping_add(1));
        (self.drawn % limit.max(1) as u64) as usize
    }

    fn mutate(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = corpus[self.below(corpus.len())].clone();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            let len = self.below(1 + (bytes.len() - at).min(64));
            match self.below(9) {
                _ if bytes.is_empty() => bytes.push(self.below(256) as u8),
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = self.below(256) as u8,
                2 => bytes.truncate(at),
                3 => drop(bytes.drain(at..at + len)),
                4 => {
                    let copy = bytes[at..at + len].to_vec();
                    let to = self.below(bytes.len());
                    bytes.splice(to..to, copy);
                }
                5 => {
                    let other = &corpus[self.below(corpus.len())];
                    let from = self.below(other.len());
                    bytes.truncate(at);
                    bytes.extend_from_slice(&other[from..]);
                }
                6 => {
                    let width = [1, 2, 4, 8][self.below(4)];
                    let number = LIMITS[self.below(LIMITS.len())].to_le_bytes();
                    let at = at / width * width;
                    let end = bytes.len().min(at + width);
                    bytes[at..end].copy_from_slice(&number[..end - at]);
                }
                // A number as JSON has it.
                7 => {
                    let digits = |byte: &u8| byte.is_ascii_digit();
                    let start = at + bytes[at..].iter().position(digits).unwrap_or(0);
                    let end = start + bytes[start..].iter().take_while(|b| digits(b)).count();
                    let number = LIMITS[self.below(LIMITS.len())].to_string();
                    bytes.splice(start..end, number.into_bytes());
                }
                _ => {
                    let more: Vec<u8> = (0..len).map(|_| self.below(256) as u8).collect();
                    bytes.splice(at..at, more);
                }
            }
        }
        bytes
    }
}

/// One case: within the limits, or a panic that says what to look at.
fn feed(name: &str, target: targets::Target, input: &[u8], is_timed: bool) {
    let held = HELD.load(Ordering::Relaxed);
    PEAK.store(held, Ordering::Relaxed);
    let begin = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| target(input)));
    let mut time = begin.elapsed();
    let bytes = PEAK.load(Ordering::Relaxed).saturating_sub(held);
    for _ in 0..2 {
        // Slow for once is the machine's doing.
        if time > MAX_TIME && is_timed && result.is_ok() {
            let begin = Instant::now();
            target(input);
            time = time.min(begin.elapsed());
        }
    }
    let is_good = result.is_ok() && bytes <= MAX_BYTES && (!is_timed || time <= MAX_TIME);
    if !is_good {
        let folder = artifacts(name);
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join(format!("{:016x}", mix64(input.len() as u64 ^ begin_of(input))));
        std::fs::write(&path, input).unwrap();
        panic!("{}: panic: {}, {bytes} bytes, {time:?}", path.display(), result.is_err());
    }
}

fn begin_of(input: &[u8]) -> u64 {
    input.iter().fold(0, |hash, &byte| mix64(hash ^ u64::from(byte)))
}

#[test]
fn hostile_bytes_do_no_harm() {
    let _turn = TURN.lock().unwrap();
    let seconds = goals::size("QUARK_GOAL_FUZZ_SECONDS", 0) as u64;
    let seed = goals::size("QUARK_GOAL_SEED", 0) as u64;
    let only = std::env::var("QUARK_GOAL_FUZZ_TARGET").ok();
    for (name, target) in targets::TARGETS {
        if only.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        let corpus = stored(name);
        for input in &corpus {
            feed(name, target, input, seconds > 0);
        }
        let mut mutator = Mutator { drawn: mix64(seed) };
        let begin = Instant::now();
        let mut cases = 0;
        while cases < 100 || begin.elapsed() < Duration::from_secs(seconds) {
            feed(name, target, &mutator.mutate(&corpus), seconds > 0);
            cases += 1;
        }
        let spent = begin.elapsed().as_secs() as usize;
        let counts = [("corpus", corpus.len()), ("executions", cases), ("seconds", spent)];
        goals::report(6, &[("targets", 1), counts[0], counts[1], counts[2]]);
    }
}

#[test]
fn what_goes_beyond_the_limits_is_noticed() {
    let harm: [targets::Target; 2] =
        [|_| drop(std::hint::black_box(vec![1_u8; MAX_BYTES + 1])), |_| panic!("found")];
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for target in harm {
        let noticed = catch_unwind(|| feed("none", target, b"x", false)).is_err();
        std::fs::remove_dir_all(artifacts("none")).unwrap();
        assert!(noticed);
    }
}

#[test]
#[ignore = "re-records the corpus"]
fn record() {
    for (name, _) in targets::TARGETS {
        std::fs::create_dir_all(corpus(name)).unwrap();
        for (number, seed) in targets::seeds(name).iter().enumerate() {
            std::fs::write(corpus(name).join(format!("seed-{number}")), seed).unwrap();
        }
    }
}
