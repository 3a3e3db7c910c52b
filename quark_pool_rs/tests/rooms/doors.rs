//! What is refused at the pool's doors, by name, and what follows a panic behind them.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use quark_pool_rs::batch::Batch;
use quark_pool_rs::checksum::sum64;
use quark_pool_rs::columns::{COLUMNS, Given, column};
use quark_pool_rs::error::{PoolError, Result};
use quark_pool_rs::fork::fork;
use quark_pool_rs::format::PoolSettings;
use quark_pool_rs::log::{Kind, decode_record, encode_record};
use quark_pool_rs::mapping::Region;
use quark_pool_rs::pool::{OpenOptions, Pool};
use quark_pool_rs::storage::{Entry, Lock, Output, Storage};
use quark_pool_rs::verify::verify;

use crate::common::disk::Disk;
use crate::common::{Owned, SOURCE, check_content, create, create_version, reader, writer};

/// Two samples of one prompt.
const GOOD: Batch<'_> = Batch {
    key: "run/0",
    prompt_tokens: &[1, 2, 3],
    prompt_offsets: &[0, 3],
    prompt_texts: &["a prompt"],
    prompt_metadata: &["{\"from\":\"test\"}"],
    prompt_index: &[0, 0],
    completion_tokens: &[4, 5],
    completion_offsets: &[0, 0, 2],
    completion_texts: Some(&["", "text"]),
    round: 1,
    chunk: 2,
    policy_step: 3,
    settings: "{}",
    given: GIVEN,
    scores: &[("reward", &[0.5, 1.5])],
};

const GIVEN: Given<'_> = Given {
    finish_reasons: &[0, 1],
    reward_tokens: &[-1, 4],
    seeds: &[7, 8],
    logprob_policy: &[-0.5, -1.5],
    logprob_reference: &[-0.5, -1.5],
    logprob_sampled: &[f32::NAN, -1.5],
};

/// The two samples with other numbers.
const fn with(given: Given<'_>) -> Batch<'_> {
    Batch { given, ..GOOD }
}

fn refusal<T>(result: Result<T>) -> String {
    let error = result.err().unwrap();
    assert!(matches!(error, PoolError::Invalid(_)), "{error}");
    error.to_string()
}

#[test]
fn samples_that_no_log_tells_of_are_in_the_way_of_a_pool() {
    let disk = Disk::default();
    create(&disk.storage()).unwrap().append(&GOOD).unwrap();
    let mut files = disk.files();
    files.retain(|(path, _)| !path.starts_with("manifest") && !path.ends_with("HEAD"));
    for kept in ["segments", "prompts"] {
        let left: Vec<_> =
            files.iter().filter(|(path, _)| path.starts_with(kept)).cloned().collect();
        let disk = Disk::with_files(&left);
        let error = create(&disk.storage()).map(drop).unwrap_err();
        assert!(matches!(error, PoolError::Exists { .. }), "{error}");
        assert_eq!(disk.files(), left);
    }
    // The remains of a creation are not.
    let empty = Disk::default();
    empty.storage().create_dir(Path::new("")).unwrap();
    empty.storage().create_dir(Path::new("segments")).unwrap();
    create(&empty.storage()).unwrap();
}

#[test]
fn arrays_that_do_not_fit_together_are_refused_by_name() {
    let pool = create(&Disk::default().storage()).unwrap();
    let metadata = format!("{{\"long\":\"{}\"}}", "x".repeat(1 << 20));
    let cases = [
        (Batch { key: "", ..GOOD }, "the key has 0 bytes; a key has 1 to 1024"),
        (Batch { prompt_index: &[], ..GOOD }, "the batch has no samples"),
        (Batch { completion_offsets: &[0, 2], ..GOOD }, "completion_offsets is for 1 samples"),
        (
            with(Given { finish_reasons: &[0], ..GIVEN }),
            "finish_reasons is for 1 samples, prompt_index for 2",
        ),
        (with(Given { reward_tokens: &[], ..GIVEN }), "reward_tokens is for 0 samples"),
        (with(Given { finish_reasons: &[2, 3], ..GIVEN }), "finish_reasons[1] is 3; 0 is unknown"),
        (with(Given { reward_tokens: &[-1, -2], ..GIVEN }), "reward_tokens[1] is -2; -1 is none"),
        (with(Given { seeds: &[1, 2, 3], ..GIVEN }), "seeds is for 3 samples"),
        (with(Given { logprob_policy: &[0.0], ..GIVEN }), "logprob_policy is for 1 samples"),
        (with(Given { logprob_reference: &[0.0], ..GIVEN }), "logprob_reference is for 1 samples"),
        (with(Given { logprob_sampled: &[0.0], ..GIVEN }), "logprob_sampled is for 1 samples"),
        (Batch { completion_texts: Some(&["one"]), ..GOOD }, "completion_texts is for 1 samples"),
        (Batch { completion_texts: None, ..GOOD }, "stores text: completion_texts is missing"),
        (Batch { prompt_metadata: &[], ..GOOD }, "are for different numbers of prompts"),
        (Batch { prompt_offsets: &[0, 2, 3], ..GOOD }, "are for different numbers of prompts"),
        (Batch { prompt_index: &[0, 1], ..GOOD }, "prompt_index[1] is 1, but there are 1 prompts"),
        (Batch { prompt_offsets: &[0, 2], ..GOOD }, "prompt tokens: offsets begin at 0"),
        (
            Batch { completion_offsets: &[1, 1, 2], ..GOOD },
            "completion_offsets: offsets begin at 0",
        ),
        (Batch { completion_offsets: &[0, 3, 2], ..GOOD }, "end at the number of tokens, here 2"),
        (Batch { completion_tokens: &[4, 500], ..GOOD }, "token 1 of completion 1 has the id 500"),
        (
            Batch { prompt_tokens: &[1, 2, 999], ..GOOD },
            "token 2 of prompt 0 has the id 999, outside the vocabulary of 500",
        ),
        (
            Batch { prompt_metadata: &["[]"], ..GOOD },
            "the metadata of prompt 0 is not one JSON object",
        ),
        (Batch { prompt_metadata: &[&metadata], ..GOOD }, "at most 1048576 are stored"),
        (Batch { settings: "{", ..GOOD }, "settings is not one JSON object"),
        (Batch { scores: &[("A", &[0.5, 1.5])], ..GOOD }, "score column \"A\": a name has"),
        (Batch { scores: &[("a", &[0.5])], ..GOOD }, "score \"a\" has 1 values for 2 samples"),
        (Batch { scores: &[("a", &[0.5; 2]), ("a", &[0.5; 2])], ..GOOD }, "\"a\" is given twice"),
    ];
    for (batch, message) in cases {
        let refused = refusal(pool.append(&batch));
        assert!(refused.contains(message), "{refused}, not: {message}");
    }
    assert_eq!(pool.snapshot().generation, 0);
    assert_eq!(pool.append(&GOOD).unwrap(), 0..2);
    // A key that is there is not appended again, whatever comes with it.
    assert_eq!(pool.append(&with(Given { finish_reasons: &[9], ..GIVEN })).unwrap(), 0..2);
    let settings = PoolSettings::new("0".to_owned(), 500, false, 1, "{}").unwrap();
    let pool = Pool::create(Disk::default().storage(), &settings, "pid 1").unwrap();
    assert!(refusal(pool.append(&GOOD)).contains("stores no text: completion_texts must be None"));
    pool.append(&Batch { completion_texts: None, ..GOOD }).unwrap();
}

#[test]
fn a_pool_of_an_older_version_refuses_what_it_has_no_column_for() {
    let stored = |pool: &Pool| {
        let mut column = [7.0_f32; 2];
        pool.snapshot().copy_column(column::LOGPROB_SAMPLED, &mut column).unwrap();
        column.map(f32::to_bits)
    };
    for version in 1..COLUMNS[column::LOGPROB_SAMPLED].since {
        let pool = create_version(&Disk::default().storage(), version).unwrap();
        let refused = refusal(pool.append(&GOOD));
        let place = format!("logprob_sampled[1] is -1.5, which a pool of format version {version}");
        assert!(refused.contains(&place), "{refused}");
        assert_eq!(pool.snapshot().generation, 0);
        pool.append(&with(Given { logprob_sampled: &[f32::NAN; 2], ..GIVEN })).unwrap();
        assert!(pool.snapshot().sample(1).unwrap().numbers.logprob_sampled.is_nan());
        assert_eq!(stored(&pool), [7.0_f32; 2].map(f32::to_bits), "what was there is left");
    }
    let pool = create(&Disk::default().storage()).unwrap();
    pool.append(&GOOD).unwrap();
    assert_eq!(stored(&pool), [f32::NAN, -1.5].map(f32::to_bits));
}

#[test]
fn a_prompt_is_stored_once_however_often_it_is_given() {
    let pool = create(&Disk::default().storage()).unwrap();
    let twice = Batch {
        prompt_tokens: &[1, 2, 1, 2, 1, 2],
        prompt_offsets: &[0, 2, 4, 6],
        prompt_texts: &["same", "same", "other"],
        prompt_metadata: &["{}", "{}", "{}"],
        prompt_index: &[1, 2],
        ..GOOD
    };
    pool.append(&twice).unwrap();
    pool.append(&Batch { key: "run/1", prompt_index: &[0, 2], ..twice }).unwrap();
    let snapshot = pool.snapshot();
    let prompts: Vec<u32> = (0..4).map(|id| snapshot.sample(id).unwrap().numbers.prompt).collect();
    assert_eq!((prompts, snapshot.num_prompts), (vec![0, 1, 0, 1], 2));
}

#[test]
fn scores_anew_are_refused_where_they_do_not_go_on() {
    let pool = create(&Disk::default().storage()).unwrap();
    Owned::numbered(0, 4).append(&pool).unwrap();
    let draft = |source, first, scores: &[f32]| pool.draft_scores("reward", source, first, scores);
    draft(SOURCE, 0, &[1.0; 2]).unwrap();
    let refused = [
        (draft("{}", 2, &[1.0]), "are made by {\"reward\":\"other\"}: finish or discard them"),
        (draft("no", 2, &[1.0]), "the source of the scores is not one JSON object"),
        (
            draft(SOURCE, 1, &[1.0]),
            "1 scores from sample 1 on: the draft of \"reward\" goes on at 2",
        ),
        (draft(SOURCE, 2, &[1.0; 3]), "3 scores from sample 2 on"),
        (draft(SOURCE, 2, &[]), "and the pool has 4 samples"),
        (pool.draft_scores("A", SOURCE, 0, &[1.0]), "score column \"A\""),
        (pool.publish_scores("reward"), "the draft of \"reward\" covers 2 of 4 samples"),
        (pool.publish_scores("other"), "the draft of \"other\" covers 0 of 4 samples"),
        (pool.discard_scores("other"), "there is no draft of \"other\""),
        (pool.collect(0, false).map(drop), "keep is 0"),
    ];
    for (result, message) in refused {
        let refused = refusal(result);
        assert!(refused.contains(message), "{refused}, not: {message}");
    }
    assert_eq!((pool.draft_end("reward"), pool.snapshot().generation), (Some(2), 2));
}

#[test]
fn a_record_of_another_kind_or_digest_is_none() {
    let (good, digest) = encode_record(Kind::Commit, 3, &[1; 32], b"{}");
    assert_eq!(decode_record(&good, 0).unwrap().digest, digest);
    let refuse = |at: usize, value: u8| {
        let mut record = good.clone();
        record[at] = value;
        let sum = sum64(&[&record[..88], &record[96..]].concat());
        record[88..96].copy_from_slice(&sum.to_le_bytes());
        decode_record(&record, 0).map(drop).unwrap_err()
    };
    assert_eq!(refuse(56, good[56] ^ 1), "a record does not match its digest");
    assert_eq!(refuse(16, 4), "a record does not match its digest");
    assert_eq!(refuse(15, 255), "a record claims to be longer than the format allows");
    let of_kind = |kind: u32| {
        let mut record = good.clone();
        record[8..12].copy_from_slice(&kind.to_le_bytes());
        let digest = quark_pool_rs::checksum::sha256(&[&record[..56], &record[96..]]);
        record[56..88].copy_from_slice(&digest);
        let sum = sum64(&[&record[..88], &record[96..]].concat());
        record[88..96].copy_from_slice(&sum.to_le_bytes());
        decode_record(&record, 0).map(|record| record.kind)
    };
    assert_eq!(of_kind(5), Err("a record has an unknown kind"));
    assert_eq!(of_kind(4), Ok(Kind::Upkeep));
}

#[test]
fn a_fork_of_a_pool_with_a_missing_file_is_refused_and_leaves_nothing() {
    let disk = Disk::default();
    let pool = create(&disk.below("a")).unwrap();
    Owned::numbered(0, 4).append(&pool).unwrap();
    let snapshot = pool.snapshot();
    let name = &snapshot.files().next().unwrap().name;
    disk.storage().remove(&Path::new("a").join(name)).unwrap();
    for copies in [false, true] {
        if copies {
            disk.refuse_links();
        }
        let error = fork(&snapshot, &*disk.storage(), Path::new("b"), "other").unwrap_err();
        assert!(matches!(&error, PoolError::Corrupted { file, .. } if file == name), "{error}");
        let left = disk.storage().list(Path::new("")).unwrap();
        assert_eq!(left.len(), 1, "{left:?}");
    }
}

#[test]
fn an_old_log_that_is_gone_is_missed_where_it_is_needed() {
    let disk = Disk::default();
    let pool = create(&disk.storage()).unwrap();
    let batches: Vec<Owned> = (0..9).map(|i| Owned::numbered(i, 2)).collect();
    for batch in &batches[..8] {
        batch.append(&pool).unwrap();
    }
    pool.collect(3, false).unwrap();
    batches[8].append(&pool).unwrap();
    pool.close();
    let (oldest, newest) = (pool.snapshot().oldest, pool.snapshot().generation);
    assert!(oldest < newest - 1);
    let mut files = disk.files();
    files.remove(files.iter().position(|(path, _)| path.starts_with("manifest")).unwrap());
    let storage = Disk::with_files(&files).storage();
    assert!(check_content(&reader(&storage).unwrap().snapshot(), &batches).unwrap());
    let options = OpenOptions { writer: None, snapshot: Some(oldest) };
    let missed = Pool::open(storage.clone(), options).map(drop).unwrap_err().to_string();
    assert!(missed.contains(&format!("the log of generation {oldest} is missing")), "{missed}");
    let problems = verify(&storage).unwrap().problems;
    assert!(problems.iter().any(|p| p.to_string() == missed), "{problems:?}");
    // Nobody knows what the snapshots before need, so nothing goes.
    let pool = writer(&storage).unwrap();
    let refused = pool.collect(4, false).unwrap_err();
    assert!(matches!(refused, PoolError::Corrupted { .. }), "{refused}");
    pool.close();
    assert!(check_content(&reader(&storage).unwrap().snapshot(), &batches).unwrap());
}

/// A disk on which making a file panics when told so.
struct Panicking(Disk, Arc<AtomicBool>);

impl Storage for Panicking {
    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        assert!(!self.1.load(Ordering::SeqCst), "on purpose");
        self.0.create(path)
    }
    fn locate(&self, path: &Path) -> PathBuf {
        self.0.locate(path)
    }
    fn create_dir(&self, path: &Path) -> io::Result<bool> {
        self.0.create_dir(path)
    }
    fn append(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        self.0.append(path)
    }
    fn overwrite(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.0.overwrite(path, bytes)
    }
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.0.read(path)
    }
    fn map(&self, path: &Path) -> io::Result<Region> {
        self.0.map(path)
    }
    fn file_len(&self, path: &Path) -> io::Result<u64> {
        self.0.file_len(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.0.list(path)
    }
    fn sync_file(&self, path: &Path) -> io::Result<()> {
        self.0.sync_file(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.0.sync_dir(path)
    }
    fn sync_parent(&self) -> io::Result<()> {
        self.0.sync_parent()
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn link(&self, original: &Path, path: &Path) -> io::Result<()> {
        self.0.link(original, path)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.remove(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.0.remove_dir(path)
    }
    fn lock(&self, path: &Path, message: &str) -> io::Result<Box<dyn Lock>> {
        self.0.lock(path, message)
    }
}

#[test]
fn after_a_panic_in_an_append_a_writer_is_to_be_reopened() {
    let (disk, panics) = (Disk::default(), Arc::new(AtomicBool::new(false)));
    let storage: Arc<dyn Storage> = Arc::new(Panicking(disk.clone(), panics.clone()));
    let pool = create(&storage).unwrap();
    let batches = [Owned::numbered(0, 3), Owned::numbered(1, 3)];
    batches[0].append(&pool).unwrap();
    assert!(pool.is_writable() && pool.refresh().is_ok());
    panics.store(true, Ordering::SeqCst);
    assert!(catch_unwind(AssertUnwindSafe(|| batches[1].append(&pool))).is_err());
    panics.store(false, Ordering::SeqCst);
    let refused = [
        batches[1].append(&pool).map(drop),
        pool.draft_scores("reward", SOURCE, 0, &[1.0]),
        pool.collect(1, false).map(drop),
        pool.compact_once(10).map(drop),
    ];
    for result in refused {
        let error = result.unwrap_err();
        assert!(matches!(error, PoolError::Poisoned), "{error}");
        assert!(error.to_string().ends_with("reopen the pool to continue"), "{error}");
    }
    assert!(check_content(&pool.snapshot(), &batches[..1]).unwrap());
    pool.close();
    let pool = writer(&storage).unwrap();
    batches[1].append(&pool).unwrap();
    assert!(check_content(&pool.snapshot(), &batches).unwrap());
    assert!(!reader(&storage).unwrap().is_writable());
}

#[test]
fn a_refresh_never_leads_back() {
    let disk = Disk::default();
    let pool = create(&disk.storage()).unwrap();
    Owned::numbered(0, 2).append(&pool).unwrap();
    let shared = Arc::new(reader(&disk.storage()).unwrap());
    // While this thread has read the log and looks at what it says, another one is faster.
    let other = shared.clone();
    disk.delay_after("manifest/00000000000000000000.log", move || {
        Owned::numbered(1, 2).append(&pool).unwrap();
        other.refresh().unwrap();
        assert_eq!(other.snapshot().generation, 2);
    });
    shared.refresh().unwrap();
    assert_eq!((shared.snapshot().generation, shared.find("run/1")), (2, Some(2..4)));
}
