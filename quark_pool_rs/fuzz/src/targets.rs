//! What hostile bytes are fed to. A target may refuse its input; it must not panic, hang or fill the memory.
//!
//! Sums keep no attacker away, so the targets put the right ones on what they are given: a file is listed
//! with the sums of its bytes, and a record with its digest.
#![allow(unreachable_pub, reason = "public for libFuzzer, and a module of a test")]
#![allow(clippy::unwrap_used, reason = "on what this file itself made")]

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use quark_pool_rs::checksum::sum64;
use quark_pool_rs::compaction::plan;
use quark_pool_rs::describe::describe;
use quark_pool_rs::error::{PoolError, Result};
use quark_pool_rs::fork::fork;
use quark_pool_rs::gather::gather;
use quark_pool_rs::log::{Kind, decode_head, encode_record, read_chain};
use quark_pool_rs::pool::{OpenOptions, Pool};
use quark_pool_rs::quantization::Quantization;
use quark_pool_rs::ranking::{RemainderRule, TieRule};
use quark_pool_rs::retention::Limits;
use quark_pool_rs::sampler::{Sampler, SamplingMode, Settings};
use quark_pool_rs::snapshot::Snapshot;
use quark_pool_rs::verify::verify;
use serde_json::Value;

use crate::common::disk::{Disk, Fault};
use crate::common::{Content, Owned, SOURCE, Step, create, reader, writer};

type Files = Vec<(PathBuf, Vec<u8>)>;

/// Takes any bytes.
pub type Target = fn(&[u8]);

/// All of them by name.
pub const TARGETS: [(&str, Target); 8] = [
    ("manifest", manifest),
    ("head", head),
    ("segment", segment),
    ("prompts", prompts),
    ("run", run),
    ("scores", scores),
    ("recover", recover),
    ("operations", operations),
];

/// Inputs that say something, to begin with.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    let (files, snapshot) = base();
    let of = |directory: &str| {
        let file = files.iter().find(|(path, _)| path.starts_with(directory));
        vec![without_sums(&file.expect("the base has all kinds").1)]
    };
    match target {
        "manifest" => {
            let log = &files.iter().find(|(path, _)| path.starts_with("manifest")).unwrap().1;
            let mut seeds: Vec<Vec<u8>> = vec![log.clone()];
            let state = serde_json::to_vec(&snapshot.to_state()).unwrap();
            seeds.push([&[1], &*state].concat());
            let records = read_chain(log, 0).records;
            seeds.extend(records.iter().map(|r| [&[r.kind as u8], r.payload].concat()));
            seeds.push(b"\x04{\"give_up\":{\"oldest\":3}}".to_vec());
            let disk = Disk::with_files(&files);
            let pool = writer(&disk.storage()).unwrap();
            Step::Retain(15).apply(&pool).unwrap();
            let files = disk.files();
            let log = &files.iter().find(|(path, _)| path.starts_with("manifest")).unwrap().1;
            let last = *read_chain(log, 0).records.last().unwrap();
            seeds.push([&[4], last.payload].concat());
            let state = serde_json::to_vec(&pool.snapshot().to_state()).unwrap();
            seeds.push([&[1], &*state].concat());
            seeds
        }
        "head" => vec![files.iter().find(|(path, _)| path.ends_with("HEAD")).unwrap().1.clone()],
        "segment" => of("segments"),
        "prompts" => of("prompts"),
        "run" => of("runs"),
        "scores" => of("scores"),
        "recover" => vec![vec![0], vec![1, 3, 2, 16, 0], vec![1, 0, 9, 3, 1, 1, 8, 1, 2]],
        _ => vec![
            (0..120).collect(),
            [0, 5, 0, 7, 4, 1, 6, 2, 0, 1, 5, 3].repeat(4),
            [0, 3, 0, 1, 0, 2, 7, 9, 3, 4, 0, 3, 250, 8, 3, 1].repeat(4),
        ],
    }
}

/// A pool with a file of every kind, and what it shows.
fn base() -> (Files, Arc<Snapshot>) {
    static BASE: OnceLock<(Files, Arc<Snapshot>)> = OnceLock::new();
    BASE.get_or_init(make_base).clone()
}

fn make_base() -> (Files, Arc<Snapshot>) {
    let disk = Disk::default();
    let pool = create(&disk.storage()).unwrap();
    for number in 0..9 {
        Owned::numbered(number, 2).append(&pool).unwrap();
    }
    let scores: Vec<f32> = (0..18_u8).map(f32::from).collect();
    Step::Draft("other", scores.clone()).apply(&pool).unwrap();
    Step::Publish("other").apply(&pool).unwrap();
    Step::Draft("reward", scores[..4].to_vec()).apply(&pool).unwrap();
    (disk.files(), pool.snapshot())
}

/// Use a pool in every way; errors are welcome.
fn exercise(files: &Files) {
    let storage = Disk::with_files(files).storage();
    if let Ok(pool) = reader(&storage) {
        let snapshot = pool.snapshot();
        read(&snapshot);
        let oldest = OpenOptions { writer: None, snapshot: Some(snapshot.oldest) };
        if let Ok(pool) = Pool::open(storage.clone(), oldest) {
            read(&pool.snapshot());
        }
        let _ = fork(&snapshot, &*Disk::default().storage(), Path::new("fork"), "fork");
    }
    let _ = verify(&storage);
    if let Ok(pool) = writer(&storage) {
        for number in 100..109 {
            let _ = Owned::numbered(number, 2).append(&pool);
        }
        let first = pool.draft_end("reward").unwrap_or(0);
        let _ = pool.draft_scores("reward", SOURCE, first, &[1.0, f32::NAN]);
        let _ = pool.publish_scores("reward");
        let _ = pool.discard_scores("reward");
        let few = Limits { max_samples: Some(5), ..Limits::default() };
        let _ = pool.retain(&few, false);
        let _ = pool.collect(2, true);
        let _ = pool.collect(1, false);
        read(&pool.snapshot());
    }
    let _ = verify(&storage);
}

fn read(snapshot: &Arc<Snapshot>) {
    let _ = snapshot.hash();
    let _ = describe(snapshot);
    for id in (0..snapshot.num_samples).take(32) {
        let _ = snapshot.sample(id);
    }
    let ids: Vec<u64> = (0..snapshot.num_samples.min(16)).collect();
    let _ = gather(snapshot, &ids, 0);
    for column in snapshot.columns.iter().chain(&snapshot.drafts) {
        let mut found = vec![0.0; ids.len()];
        let _ = snapshot.scores_of(column, &ids, &mut found);
    }
    for column in &snapshot.columns {
        let _ = rank(snapshot, &column.name);
        if snapshot.num_samples < 1 << 20 {
            let mut found = vec![0.0; snapshot.num_samples as usize];
            let _ = snapshot.copy_scores(column, &mut found);
        }
    }
    for segment in &snapshot.segments {
        let appends = segment.entry.appends();
        assert!(appends.map(|(_, ids)| ids.end - ids.start).all(|count| count > 0));
    }
}

fn rank(snapshot: &Arc<Snapshot>, name: &str) -> Result<()> {
    for ties in [TieRule::Hash, TieRule::Together] {
        let spread = RemainderRule::Spread;
        let cut = Arc::new(Quantization::new(snapshot.clone(), name, 3, ties, spread)?);
        let _ = cut.lower_bounds();
        // An array grows with the ids that were given out.
        if snapshot.num_samples < 1 << 20 {
            let _ = cut.labels();
        }
        let ids: Vec<u64> = (0..snapshot.num_samples.min(16)).collect();
        let _ = cut.labels_of(&ids, &mut vec![0; ids.len()]);
        let filled = (0..).zip(cut.counts()).filter(|&(_, count)| count > 0);
        let places: Vec<_> = filled.map(|(quantile, count)| (quantile, count - 1)).collect();
        let (mut ids, mut scores) = (vec![0; places.len()], vec![0.0; places.len()]);
        let _ = cut.samples_at(&places, &mut ids, &mut scores);
        for mode in [SamplingMode::Stratified, SamplingMode::Shuffle] {
            if let Ok(sampler) = Sampler::new(cut.clone(), Settings::new(4, 3, mode)) {
                let _ = sampler.draw(5);
            }
        }
    }
    Ok(())
}

/// A log as it is, and one whose last payload is the input: the first byte says of which kind.
pub fn manifest(data: &[u8]) {
    let _ = read_chain(data, 0);
    let (mut files, snapshot) = base();
    files.retain(|(path, _)| !path.ends_with("HEAD"));
    let log = files.iter().position(|(path, _)| path.starts_with("manifest")).unwrap();
    let whole = std::mem::replace(&mut files[log].1, data.to_vec());
    exercise(&files);
    let Some((kind, payload)) = data.split_first() else { return };
    let record = |kind, generation| encode_record(kind, generation, &snapshot.digest, payload).0;
    let next = snapshot.generation + 1;
    match kind % 4 {
        1 => {
            files.remove(log);
            let path = quark_pool_rs::format::log_name(snapshot.generation);
            files.push((path.into(), record(Kind::State, snapshot.generation)));
        }
        kind => {
            let kind = [Kind::Upkeep, Kind::State, Kind::Commit, Kind::Scores][kind as usize];
            files[log].1 = [whole, record(kind, next)].concat();
        }
    }
    exercise(&files);
}

/// HEAD.
pub fn head(data: &[u8]) {
    let _ = decode_head(data);
    let (mut files, _) = base();
    let head = files.iter_mut().find(|(path, _)| path.ends_with("HEAD")).unwrap();
    head.1 = data.to_vec();
    exercise(&files);
}

/// A segment.
pub fn segment(data: &[u8]) {
    replace("segments", data);
}

/// A prompt file.
pub fn prompts(data: &[u8]) {
    replace("prompts", data);
}

/// A merged run.
pub fn run(data: &[u8]) {
    replace("runs", data);
}

/// A file of scores.
pub fn scores(data: &[u8]) {
    replace("scores", data);
}

const BLOCK_BYTES: usize = 4096;

/// The content of a data file without its sums, which [`replace`] makes.
fn without_sums(bytes: &[u8]) -> Vec<u8> {
    let footer = bytes.len() - 10 - footer_len(bytes);
    // The body is what leaves room for its own sums.
    let body = (0..footer).rev().find(|body| body + body.div_ceil(BLOCK_BYTES) * 8 == footer);
    [&bytes[..body.unwrap()], &bytes[footer..]].concat()
}

fn footer_len(bytes: &[u8]) -> usize {
    let at = bytes.len() - 10;
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

/// Put a data file in the place of the first one of a directory, listed with the sums that it has.
fn replace(directory: &str, data: &[u8]) {
    if data.len() < 10 {
        return;
    }
    let (mut files, snapshot) = base();
    let footer = data.len() - 10 - footer_len(data).min(data.len() - 10);
    let mut bytes = data[..footer].to_vec();
    bytes.resize(footer.next_multiple_of(8), 0);
    let tail = bytes.len();
    let sums: Vec<u8> = bytes.chunks(BLOCK_BYTES).flat_map(|b| sum64(b).to_le_bytes()).collect();
    bytes.extend(sums);
    bytes.extend_from_slice(&data[footer..]);
    let place = files.iter().position(|(path, _)| path.starts_with(directory)).unwrap();
    let name = files[place].0.to_string_lossy().into_owned();
    let mut state = serde_json::to_value(snapshot.to_state()).unwrap();
    let sum = format!("{:016x}", sum64(&bytes[tail..]));
    relist(
        &mut state,
        &name,
        &[("length", bytes.len().into()), ("tail", tail.into()), ("sum", sum.into())],
    );
    files[place].1 = bytes;
    files.retain(|(path, _)| !path.starts_with("manifest") && !path.ends_with("HEAD"));
    let payload = serde_json::to_vec(&state).unwrap();
    let (record, _) = encode_record(Kind::State, snapshot.generation, &snapshot.digest, &payload);
    let log = quark_pool_rs::format::log_name(snapshot.generation);
    files.push((log.into(), record));
    exercise(&files);
}

/// Change what a state says of a file.
fn relist(value: &mut Value, name: &str, changes: &[(&str, Value)]) {
    match value {
        Value::Object(object) => {
            if object.get("name").and_then(Value::as_str) == Some(name) {
                for (key, value) in changes {
                    object.insert((*key).to_owned(), value.clone());
                }
            }
            object.values_mut().for_each(|value| relist(value, name, changes));
        }
        Value::Array(values) => values.iter_mut().for_each(|v| relist(v, name, changes)),
        _ => {}
    }
}

/// A directory of anything: the first byte says whether a pool lies in it, then come changes of files, each
/// with the number of a file, what to do, and how many bytes to do it with.
pub fn recover(data: &[u8]) {
    let Some((first, mut rest)) = data.split_first() else { return };
    let (mut files, _) = base();
    let mut names: Vec<PathBuf> = files.iter().map(|(path, _)| path.clone()).collect();
    let strange = [
        "manifest/00000000000000000003.log",
        "manifest/ffffffffffffffff.log",
        "manifest/x.log",
        "HEAD/x",
        "segments/x.arrow",
        "runs/0-0-ffffffffffffffff.arrow",
        "other",
    ];
    names.extend(strange.map(PathBuf::from));
    if first % 2 == 0 {
        files.clear();
    }
    while let [number, action, len, more @ ..] = rest {
        let (bytes, after) = more.split_at(more.len().min(usize::from(*len)));
        rest = after;
        let path = &names[usize::from(*number) % names.len()];
        let place = files.iter().position(|(other, _)| other == path);
        let content = place.map(|place| files.remove(place).1).unwrap_or_default();
        let cut = content.len().saturating_sub(usize::from(*len));
        let changed = match action % 6 {
            0 => continue,
            1 => bytes.to_vec(),
            2 => content[..cut].to_vec(),
            3 => [&*content, bytes].concat(),
            4 => [bytes, content.get(bytes.len()..).unwrap_or_default()].concat(),
            _ => [&content[..cut], bytes].concat(),
        };
        files.push((path.clone(), changed));
    }
    exercise(&files);
}

/// Steps, reopenings and faults, one byte each and one for how; the pool must hold what a list does.
pub fn operations(data: &[u8]) {
    let disk = Disk::default();
    let mut pool = create(&disk.storage()).unwrap();
    let mut content = Content::default();
    for (number, pair) in (0..).zip(data.chunks_exact(2).take(40)) {
        let how = pair[1];
        let name = ["reward", "other"][usize::from(how % 2)];
        let drafted = content.draft_end(name);
        let step = match pair[0] % 9 {
            _ if pair[0] >= 248 => Step::Retain(u64::from(how % 32)),
            0..=2 => Step::Append(Owned::numbered(number, 1 + u32::from(how % 4))),
            3 => {
                let count = usize::from(how).min(content.num_samples() - drafted);
                Step::Draft(name, (0..count).map(|i| (i * 7 % 9) as f32).collect())
            }
            4 => Step::Publish(name),
            5 => Step::Discard(name),
            6 => Step::Collect(u64::from(how)),
            7 if plan(&pool.snapshot(), u64::from(how)).is_some() => Step::Compact(u64::from(how)),
            7 => continue,
            _ => {
                let fault = Fault::ALL[usize::from(how) % Fault::ALL.len()];
                disk.set_fault(disk.num_calls() + 1 + usize::from(how / 8), how % 2 == 0, fault);
                continue;
            }
        };
        match step.apply(&pool) {
            Ok(()) => content.apply(&step),
            Err(PoolError::Invalid(_)) => {}
            Err(PoolError::Io { .. } | PoolError::Poisoned) => {
                disk.clear_fault();
                assert!(!disk.retried_a_failed_sync(), "{step:?}: a failed sync was trusted");
                pool.close();
                pool = writer(&disk.storage()).unwrap();
                if !content.is_in(&pool.snapshot()).unwrap() {
                    content.apply(&step);
                }
            }
            Err(error) => panic!("{step:?}: {error}"),
        }
        disk.clear_fault_if(true);
    }
    disk.clear_fault();
    assert!(content.is_in(&pool.snapshot()).unwrap(), "the handle differs");
    assert!(content.is_in(&reader(&disk.storage()).unwrap().snapshot()).unwrap(), "it differs");
    let problems = verify(&disk.storage()).unwrap().problems;
    assert!(problems.is_empty(), "{problems:?}");
}
