//! Bytes that match their sums and contradict each other: no damage of a disk, and nothing that a sum finds.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{Array, ArrayRef, Float32Array, RecordBatch, UInt32Array};
use arrow_ipc::reader::FileReader;
use arrow_ipc::writer::FileWriter;
use arrow_schema::{DataType, Field, Schema};
use quark_pool_rs::checksum::{block_sums, sum64};
use quark_pool_rs::columns::column;
use quark_pool_rs::datafile::DataFile;
use quark_pool_rs::encoding::{ColumnSpec, FileEntry, Kind as Column, encode};
use quark_pool_rs::error::PoolError;
use quark_pool_rs::format::FORMAT_VERSION;
use quark_pool_rs::gather::gather;
use quark_pool_rs::log::{Kind, encode_head, encode_record, read_chain};
use quark_pool_rs::pool::Pool;
use quark_pool_rs::quantization::Quantization;
use quark_pool_rs::ranking::{RemainderRule, TieRule};
use quark_pool_rs::segment::{
    encode_run, encode_scores, prompt_column, prompt_columns, segment_columns,
};
use quark_pool_rs::snapshot::Snapshot;
use quark_pool_rs::storage::Storage;
use quark_pool_rs::verify::verify;
use serde_json::{Value, json};

use crate::common::disk::Disk;
use crate::common::{Owned, Step, create, reader, settings, writer};

/// What the last log of a pool says, and the pool's other files.
#[derive(Clone)]
struct Forged {
    files: Vec<(PathBuf, Vec<u8>)>,
    log: PathBuf,
    first: u64,
    previous: [u8; 32],
    records: Vec<(Kind, Value)>,
}

impl Forged {
    fn of(steps: &[Step]) -> Self {
        let disk = Disk::default();
        let pool = create(&disk.storage()).unwrap();
        for step in steps {
            step.apply(&pool).unwrap();
        }
        let mut files = disk.files();
        let is_log = |(path, _): &(PathBuf, Vec<u8>)| path.starts_with("manifest");
        let at = files.iter().rposition(is_log).unwrap();
        let (log, bytes) = files.remove(at);
        let first = log.file_stem().unwrap().to_str().unwrap().parse().unwrap();
        let chain = read_chain(&bytes, first);
        assert!(chain.broken.is_none());
        let value = |payload| serde_json::from_slice(payload).unwrap();
        let records = chain.records.iter().map(|r| (r.kind, value(r.payload))).collect();
        Self { files, log, first, previous: chain.records[0].previous, records }
    }

    /// Three appends in files of one, and scores made anew.
    fn whole() -> Self {
        let mut steps: Vec<Step> = [0, 3, 6].map(|i| Step::Append(Owned::numbered(i, 3))).into();
        steps.extend([Step::Compact(100), Step::Compact(100)]);
        steps.push(Step::Draft("reward", vec![0.5, f32::NAN, 2.0, 1.0]));
        steps.push(Step::Draft("reward", vec![3.0, f32::NAN, 2.0, 4.0, -1.0]));
        steps.push(Step::Publish("reward"));
        steps.push(Step::Draft("other", vec![1.0, 2.0]));
        steps.push(Step::Discard("other"));
        Self::of(&steps)
    }

    /// The same as one state, and a draft.
    fn state() -> Self {
        let mut steps: Vec<Step> = [0, 3, 6].map(|i| Step::Append(Owned::numbered(i, 3))).into();
        steps.push(Step::Draft("other", vec![1.0, 2.0]));
        steps.push(Step::Collect(1));
        let state = Self::of(&steps);
        assert!(state.records.len() == 1 && state.first == 5);
        state
    }

    /// The disk, with sums and digests that are right.
    fn storage(&self) -> Arc<dyn Storage> {
        let (mut log, mut digest) = (Vec::new(), self.previous);
        let mut acknowledged = None;
        for ((kind, value), generation) in self.records.iter().zip(self.first..) {
            let payload = serde_json::to_vec(value).unwrap();
            let (record, own) = encode_record(*kind, generation, &digest, &payload);
            log.extend(record);
            let repeats = *kind == Kind::State && generation > 0;
            acknowledged = Some((generation, if repeats { digest } else { own }));
            digest = own;
        }
        let mut files = self.files.clone();
        files.push((self.log.clone(), log));
        files.retain(|(path, _)| !path.ends_with("HEAD"));
        if let Some((generation, digest)) = acknowledged {
            files.push(("HEAD".into(), encode_head(generation, &digest).to_vec()));
        }
        Disk::with_files(&files).storage()
    }

    fn set(&mut self, record: usize, pointer: &str, value: Value) {
        let record = &mut self.records[record].1;
        let Some((parent, key)) = pointer.rsplit_once('/') else { return *record = value };
        let parent = record.pointer_mut(parent).unwrap_or_else(|| panic!("there is no {pointer}"));
        match key.parse::<usize>() {
            Ok(index) => parent[index] = value,
            Err(_) => parent[key] = value,
        }
    }

    /// Put other bytes in the place of a file, and what the log says of it.
    fn replace(&mut self, bytes: Vec<u8>, entry: &FileEntry) {
        let file = self.files.iter_mut().find(|(path, _)| path == Path::new(&entry.name));
        file.unwrap().1 = bytes;
        let said = serde_json::to_value(entry).unwrap();
        self.records.iter_mut().for_each(|(_, value)| rename(value, &said));
    }

    /// The only file in a directory, or its first.
    fn file(&self, directory: &str) -> (String, Vec<u8>) {
        let mut of = self.files.iter().filter(|(path, _)| path.starts_with(directory));
        let (path, bytes) = of.next().unwrap();
        (path.to_str().unwrap().to_owned(), bytes.clone())
    }

    /// Refused by whoever opens it, and `verify` says the same.
    fn is_refused(&self, message: &str) {
        let storage = self.storage();
        for opened in [reader(&storage), writer(&storage)] {
            let error = opened.map(drop).unwrap_err();
            assert!(matches!(error, PoolError::Corrupted { .. }), "{message}: {error}");
            assert!(error.to_string().contains(message), "{error}, not: {message}");
        }
        self.is_reported(message);
    }

    fn is_reported(&self, message: &str) {
        let problems = verify(&self.storage()).unwrap().problems;
        let said: Vec<String> = problems.iter().map(PoolError::to_string).collect();
        assert!(said.iter().any(|problem| problem.contains(message)), "{said:?}, not: {message}");
    }
}

/// Wherever a value says something of a file with this name, say this.
fn rename(value: &mut Value, said: &Value) {
    if value.get("name") == said.get("name") && value.get("tail").is_some() {
        *value = said.clone();
        return;
    }
    match value {
        Value::Object(fields) => fields.values_mut().for_each(|field| rename(field, said)),
        Value::Array(items) => items.iter_mut().for_each(|item| rename(item, said)),
        _ => {}
    }
}

#[test]
fn a_record_that_does_not_follow_is_refused_with_why() {
    let whole = Forged::whole();
    let kinds: Vec<u32> = whole.records.iter().map(|(kind, _)| *kind as u32).collect();
    assert_eq!(kinds, [1, 2, 2, 2, 4, 4, 3, 3, 3, 3, 3]);
    drop(reader(&whole.storage()).unwrap());
    assert!(verify(&whole.storage()).unwrap().problems.is_empty());
    let merge = |start: u64, end: u64, entries: u64, source: Value| json!([{"start": start, "end": end, "run": {"level": 1, "entries": entries, "source": source}}]);
    let scored = whole.records[2].1["scores"][0]["scored"].as_u64().unwrap();
    let further = |first: u64| json!([{"key": "x", "first": first, "round": 0, "chunk": 0}]);
    let run = whole.records[4].1["merge_segments"]["columns"][0]["merges"][0]["run"].clone();
    let in_file = run["source"].clone();
    let cases = [
        (1, "/segment/first", json!(1), "a segment of 3 samples begins at 1, not at 0"),
        (1, "/segment/count", json!(0), "a segment of 0 samples begins at 0"),
        (1, "/segment/count", json!(1_u64 << 40), "a segment of 1099511627776 samples"),
        (1, "/segment/scores", json!(["x"]), "scores of a commit are not those of its segment"),
        (1, "/segment", json!(null), "a commit does not parse"),
        (2, "/segment/further", further(99), "the appends of a segment do not follow"),
        (1, "/prompts/count", json!(0), "a prompt file begins at 0, not at 0"),
        (2, "/prompts/first", json!(0), "a prompt file begins at 0, not at 3"),
        (2, "/prompts/count", json!(u32::MAX), "there are too many prompts"),
        (2, "/scores/0/scored", json!(4), "an extent that does not fit its column"),
        (2, "/scores/0/merges", merge(0, 9, scored, in_file.clone()), "a merge of absent runs"),
        (2, "/scores/0/merges", merge(0, 1, 99, in_file), "a merge loses or invents entries"),
        (2, "/scores/0/merges", merge(0, 1, scored, json!({"extent": 1})), "a run of no extent"),
        (
            2,
            "/scores/0/merges",
            merge(0, 1, 9, json!({"extent": 3})),
            "a run that does not fit its extent",
        ),
        (4, "/merge_segments/end", json!(9), "a merge of absent segments"),
        (4, "/merge_segments/start", json!(1), "a merge loses or invents samples"),
        (4, "/merge_segments/segment/count", json!(8), "a merge loses or invents samples"),
        (
            4,
            "/merge_segments/segment/further/0/key",
            json!("x"),
            "a merge loses or invents samples",
        ),
        (
            4,
            "/merge_segments/segment/scores",
            json!([]),
            "an extent of a segment without the column",
        ),
        (4, "/merge_segments/columns", json!([]), "a run is left in a segment that is gone"),
        (4, "/merge_segments/columns/0/name", json!("x"), "a merge of an absent column's runs"),
        (4, "/merge_segments", json!(7), "a commit does not parse"),
        (5, "/merge_prompts/end", json!(9), "a merge of absent prompts"),
        (5, "/merge_prompts/prompts/count", json!(8), "a merge loses or invents prompts"),
        (5, "", json!({"give_up": {"oldest": 99}}), "snapshots before 99 are given up"),
        (6, "/draft/extent/file", json!(null), "a draft of scores without a file"),
        (6, "/draft/extent/first", json!(1), "scores that do not go on with their draft"),
        (6, "/draft/extent/count", json!(99), "an extent beyond the last sample"),
        (6, "/draft/extent/first", json!(u64::MAX), "an extent beyond the last sample"),
        (7, "/draft/source", json!("{}"), "scores that do not go on with their draft"),
        (7, "/draft", json!(null), "a commit does not parse"),
        (8, "/publish/name", json!("x"), "there is no draft of \"x\""),
        (10, "/discard/name", json!("x"), "there is no draft of \"x\""),
    ];
    for (record, pointer, value, message) in cases {
        let mut forged = whole.clone();
        forged.set(record, pointer, value);
        forged.is_refused(message);
    }
    let mut early = whole.clone();
    early.records.remove(7);
    early.is_refused("a draft is published before it is complete");
    let mut states = whole.clone();
    states.records[3] = states.records[0].clone();
    states.is_refused("a record does not follow the one before, but generation 4 follows");

    // Of two segments only one has scores: they cannot become one.
    let mut second = Owned::numbered(3, 3);
    second.scores.clear();
    let mut unlike = Forged::of(&[Step::Append(Owned::numbered(0, 3)), Step::Append(second)]);
    let mut segment = unlike.records[1].1["segment"].clone();
    let other = &unlike.records[2].1["segment"];
    segment["further"] = json!([{"key": other["key"], "first": 3, "round": 3, "chunk": 2}]);
    segment["count"] = json!(6);
    let merged = json!({"start": 0, "end": 2, "segment": segment, "columns": []});
    unlike.records.push((Kind::Upkeep, json!({"merge_segments": merged})));
    unlike.is_refused("a merge of segments with different scores");
}

#[test]
fn a_state_that_contradicts_itself_is_refused_with_why() {
    let state = Forged::state();
    drop(reader(&state.storage()).unwrap());
    assert!(verify(&state.storage()).unwrap().problems.is_empty());
    let cases = [
        ("/chain", json!("00ff"), "a state does not name the commit before it"),
        ("/pool/token_bytes", json!(3), "tokens of 3 bytes"),
        ("/pool/vocab_size", json!("many"), "a state does not parse"),
        ("/segments/1/first", json!(0), "a segment of 3 samples begins at 0, not at 3"),
        ("/prompts/0/count", json!(2), "a prompt file begins at 3, not at 2"),
        ("/columns/0/runs", json!([]), "the runs of a column do not hold its scored samples"),
        ("/columns/0/runs/0/entries", json!(9), "a run that does not fit its extent"),
        ("/columns/0/extents/0/count", json!(99), "an extent beyond the last sample"),
        ("/columns/0/extents/0/count", json!(2), "an extent that does not fit its segment"),
        ("/columns/0/extents/1/first", json!(4), "an extent of no segment"),
        ("/columns/0/extents/1/first", json!(0), "an extent that does not fit its column"),
        ("/columns/0/name", json!("x"), "an extent of a segment without the column"),
        ("/drafts/0/extents/0/first", json!(8), "an extent beyond the last sample"),
        ("/drafts/0/runs/0/source", json!({"extent": 7}), "a run of no extent"),
    ];
    for (pointer, value, message) in cases {
        let mut forged = state.clone();
        forged.set(0, pointer, value);
        forged.is_refused(message);
    }
    for (pointer, value, found) in
        [("/pool/format", json!(0), 0), ("/pool", json!({"format": 7}), 7)]
    {
        let mut forged = state.clone();
        forged.set(0, pointer, value);
        let error = reader(&forged.storage()).map(drop).unwrap_err();
        assert!(
            matches!(error, PoolError::Version { found: f, supported: FORMAT_VERSION } if f == found),
            "{error}"
        );
        assert!(error.to_string().contains("use the quark that wrote it"), "{error}");
    }
}

#[test]
fn a_pool_is_of_the_version_that_its_segments_are_of() {
    let state = Forged::state();
    for version in 1..FORMAT_VERSION {
        let mut forged = state.clone();
        forged.set(0, "/pool/format", json!(version));
        forged.is_reported("not a table of ours: the columns");
        let error = reader(&forged.storage()).unwrap().snapshot().sample(0).unwrap_err();
        assert!(matches!(error, PoolError::Corrupted { .. }), "{error}");
    }
}

#[test]
fn what_head_acknowledged_is_missed() {
    let whole = Forged::whole();
    let with_head = |head: Option<Vec<u8>>, cut: usize| {
        let mut forged = whole.clone();
        forged.records.truncate(forged.records.len() - cut);
        let storage = forged.storage();
        let mut files: Vec<(PathBuf, Vec<u8>)> = forged.files.clone();
        files.push((forged.log.clone(), storage.read(&forged.log).unwrap()));
        files.retain(|(path, _)| !path.ends_with("HEAD"));
        files.extend(head.map(|head| ("HEAD".into(), head)));
        files
    };
    let refuse = |files: &[(PathBuf, Vec<u8>)], message: &str| {
        let storage = Disk::with_files(files).storage();
        let error = reader(&storage).map(drop).unwrap_err();
        assert!(matches!(error, PoolError::Corrupted { .. }), "{error}");
        assert!(error.to_string().contains(message), "{error}");
        let problems = verify(&storage).unwrap().problems;
        assert!(problems.iter().any(|p| p.to_string().contains(message)), "{problems:?}");
    };
    let acknowledged = Some(whole.storage().read(Path::new("HEAD")).unwrap());
    refuse(&with_head(acknowledged.clone(), 1), "the log ends, but generation 10 was acknowledged");
    let other = Some(encode_head(9, &[7; 32]).to_vec());
    refuse(&with_head(other, 0), "generation 9 is not the one that was acknowledged");
    let mut files = with_head(acknowledged, 0);
    files.retain(|(path, _)| *path != whole.log);
    files.push(("manifest/other".into(), Vec::new()));
    refuse(&files, "there is no log, but generation 10 was acknowledged");
    let last = files.len() - 1;
    files[last] = (whole.log.clone(), b"nothing".to_vec());
    refuse(&files, "a record header is cut short, but generation 10 was acknowledged");
    // HEAD is only a lower bound: without it, or with a torn one, a pool is what its log says.
    for head in [None, Some(vec![1; 64])] {
        let is_torn = head.is_some();
        let storage = Disk::with_files(&with_head(head, 0)).storage();
        assert_eq!(reader(&storage).unwrap().snapshot().generation, 10);
        let problems = verify(&storage).unwrap().problems;
        assert_eq!(problems.len(), usize::from(is_torn), "{problems:?}");
        writer(&storage).unwrap();
        assert!(verify(&storage).unwrap().problems.is_empty());
    }
}

/// Everything that rankings read; damage may be named or stay unseen, and nothing else may happen.
fn rank(pool: &Pool) -> Result<(), PoolError> {
    let rank = |k, ties, remainder| {
        let quantization = Quantization::new(pool.snapshot(), "reward", k, ties, remainder)?;
        quantization.labels()?;
        quantization.lower_bounds()?;
        for (label, count) in (0..).zip(quantization.counts()) {
            let places: Vec<_> = (0..count).map(|index| (label, index)).collect();
            let (mut ids, mut scores) = (vec![0; places.len()], vec![0.0; places.len()]);
            quantization.samples_at(&places, &mut ids, &mut scores)?;
        }
        Ok(())
    };
    for k in 1..5 {
        for ties in [TieRule::Hash, TieRule::OlderFirst, TieRule::Together] {
            rank(k, ties, RemainderRule::Spread)?;
            rank(k, ties, RemainderRule::Lowest)?;
        }
    }
    Ok(())
}

fn ranked_or_damaged(pool: &Pool) -> bool {
    let result = rank(pool);
    let is_damage = matches!(&result, Err(PoolError::Corrupted { .. }));
    assert!(result.is_ok() || is_damage, "{result:?}");
    is_damage
}

#[test]
fn runs_in_any_order_give_a_ranking_or_an_error() {
    let whole = Forged::whole();
    let (name, _) = whole.file("scores");
    let mut num_damaged = 0;
    for scores in [[0.5, f32::NAN, 2.0, 1.0], [1.0, f32::NAN, 2.0, 1.0], [0.0, f32::NAN, 0.0, 0.0]]
    {
        for code in 0..256_u32 {
            let mut forged = whole.clone();
            let order = [code & 3, code >> 2 & 3, code >> 4 & 3, code >> 6];
            let (bytes, entry) = encode_scores(name.clone(), &settings(), &scores, order.to_vec());
            forged.replace(bytes, &entry);
            num_damaged += u32::from(ranked_or_damaged(&reader(&forged.storage()).unwrap()));
        }
    }
    assert!(num_damaged > 100, "{num_damaged}");
}

#[test]
fn an_order_that_is_none_of_its_scores_is_reported() {
    let whole = Forged::whole();
    let (name, _) = whole.file("scores");
    let scores = [0.5, f32::NAN, 2.0, 1.0];
    let cases = [
        ([2, 3, 0, 1], None),
        ([2, 3, 9, 1], Some("an order names row 9")),
        ([2, 0, 3, 1], Some("rank 2 of an order is not in order")),
        ([2, 3, 3, 1], Some("rank 2 of an order is not in order")),
        ([2, 3, 1, 0], Some("rank 2 of an order is on the wrong side of its 3 scores")),
    ];
    for (order, message) in cases {
        let mut forged = whole.clone();
        let (bytes, entry) = encode_scores(name.clone(), &settings(), &scores, order.to_vec());
        forged.replace(bytes, &entry);
        match message {
            None => assert!(verify(&forged.storage()).unwrap().problems.is_empty()),
            Some(message) => forged.is_reported(message),
        }
        if order.contains(&9) {
            let error = rank(&reader(&forged.storage()).unwrap()).unwrap_err().to_string();
            assert!(error.contains("an order names row 9, which is not there"), "{error}");
            // A run that is to be merged reads all of an order.
            let pool = writer(&forged.storage()).unwrap();
            let append = |number| Owned::numbered(number, 2).append(&pool);
            let refused = (20..40).map(append).find_map(Result::err).unwrap();
            assert!(refused.to_string().contains("an order names row 9"), "{refused}");
        }
    }
}

#[test]
fn a_run_that_is_none_of_its_column_is_reported() {
    let steps: Vec<Step> = (0..9).map(|i| Step::Append(Owned::numbered(i, 2))).collect();
    let whole = Forged::of(&steps);
    for (first, message) in [(99, "a run that begins beyond its column"), (3, "")] {
        let mut forged = whole.clone();
        forged.records[8].1["scores"][0]["merges"][0]["run"]["first"] = json!(first);
        if message.is_empty() {
            forged.is_reported("a run names a sample that is not there");
            ranked_or_damaged(&reader(&forged.storage()).unwrap());
        } else {
            forged.is_refused(message);
        }
    }
    let (name, bytes) = whole.file("runs");
    let batch = FileReader::try_new(std::io::Cursor::new(bytes), None).unwrap().next().unwrap();
    let batch = batch.unwrap();
    let words = batch.column(0).as_any().downcast_ref::<arrow_array::UInt64Array>().unwrap();
    let words = words.values().iter();
    let (keys, ids): (Vec<u32>, Vec<u64>) =
        words.map(|word| ((word >> 32) as u32, word & 0xffff_ffff)).unzip();
    let changes: [(&str, Option<&str>); 4] = [
        ("", None),
        ("swap", Some("of a run is not in order")),
        ("key", Some("entry 1 of a run has not the score of sample")),
        ("id", Some("a run names a sample that is not there")),
    ];
    for (change, message) in changes {
        let (mut keys, mut ids) = (keys.clone(), ids.clone());
        match change {
            "swap" => {
                let last = keys.len() - 1;
                keys.swap(0, last);
                ids.swap(0, last);
            }
            "key" => keys[1] -= 1,
            "id" => ids[3] = 999,
            _ => {}
        }
        let mut forged = whole.clone();
        let (bytes, entry) = encode_run(name.clone(), &settings(), 0, keys, ids);
        forged.replace(bytes, &entry);
        match message {
            None => assert!(verify(&forged.storage()).unwrap().problems.is_empty()),
            Some(message) => {
                forged.is_reported(message);
                ranked_or_damaged(&reader(&forged.storage()).unwrap());
            }
        }
    }
}

/// The columns of a file, and its rows.
fn table(bytes: &[u8]) -> RecordBatch {
    let mut reader = FileReader::try_new(std::io::Cursor::new(bytes.to_vec()), None).unwrap();
    reader.next().unwrap().unwrap()
}

/// A file with one column changed.
fn with_column(
    name: &str,
    bytes: &[u8],
    columns: &[ColumnSpec],
    at: usize,
    values: ArrayRef,
) -> (Vec<u8>, FileEntry) {
    let mut arrays = table(bytes).columns().to_vec();
    arrays[at] = values;
    encode(name.to_owned(), columns, arrays)
}

/// The bytes of an Arrow file as a data file, with the sums that it would have.
fn sealed(name: &str, mut arrow: Vec<u8>) -> (Vec<u8>, FileEntry) {
    let at = arrow.len() - 10;
    let footer = u32::from_le_bytes(arrow[at..at + 4].try_into().unwrap()) as usize;
    let footer = arrow.split_off(at - footer);
    arrow.resize(arrow.len().next_multiple_of(8), 0);
    resealed(name, arrow, &footer)
}

fn resealed(name: &str, mut bytes: Vec<u8>, footer: &[u8]) -> (Vec<u8>, FileEntry) {
    let tail = bytes.len();
    let sums: Vec<u8> = block_sums(&bytes).flat_map(u64::to_le_bytes).collect();
    bytes.extend(sums);
    bytes.extend_from_slice(footer);
    let sum = sum64(&bytes[tail..]);
    let length = bytes.len() as u64;
    (bytes, FileEntry { name: name.to_owned(), length, tail: tail as u64, sum })
}

/// A file in which some bytes before its tail are others.
fn patched(
    name: &str,
    bytes: &[u8],
    entry: &FileEntry,
    find: &[u8],
    put: &[u8],
) -> (Vec<u8>, FileEntry) {
    let (body, rest) = bytes.split_at(entry.tail as usize);
    let mut body = body.to_vec();
    let found: Vec<usize> = (0..body.len()).filter(|&at| body[at..].starts_with(find)).collect();
    let at = *found.last().unwrap();
    body[at..at + put.len()].copy_from_slice(put);
    let sums = 8 * body.chunks(4096).len();
    resealed(name, body, &rest[sums..])
}

fn entry_of(snapshot: &Snapshot, name: &str) -> FileEntry {
    snapshot.files().find(|file| file.name == name).unwrap().clone()
}

#[test]
fn a_sample_that_names_what_is_not_there_is_reported_and_not_served() {
    let whole = Forged::of(&[Step::Append(Owned::numbered(0, 3))]);
    let (name, bytes) = whole.file("segments");
    let columns = segment_columns(&settings(), &["reward".to_owned()], 3);
    let cases = [
        (column::PROMPT, vec![0, 99, 1], "a sample names prompt 99 of 3"),
        (column::SETTINGS, vec![0, 7, 0], "row 1 names sampling settings 7"),
    ];
    for (at, values, message) in cases {
        let mut forged = whole.clone();
        let values: ArrayRef = Arc::new(UInt32Array::from(values));
        let (bytes, entry) = with_column(&name, &bytes, &columns, at, values);
        forged.replace(bytes, &entry);
        forged.is_reported(message);
        let pool = reader(&forged.storage()).unwrap();
        assert!(pool.snapshot().sample(0).is_ok());
        let error = pool.snapshot().sample(1).unwrap_err();
        assert!(matches!(error, PoolError::Corrupted { .. }), "{error}");
        assert_eq!(gather(&pool.snapshot(), &[1], 0).is_err(), at == column::PROMPT);
    }

    // Offsets and texts that no writer of Arrow would make.
    let entry = entry_of(&reader(&whole.storage()).unwrap().snapshot(), &name);
    let words = |words: [i32; 4]| words.map(i32::to_le_bytes).concat();
    // Of 0, 1 and 2 token ids.
    let (find, texts) = (words([0, 0, 1, 3]), b"completion 1 of 0");
    for wrong in [[0, 2, 1, 3], [0, 0, 1, 99], [0, -1, 1, 3]] {
        let mut forged = whole.clone();
        let (bytes, entry) = patched(&name, &bytes, &entry, &find, &words(wrong));
        forged.replace(bytes, &entry);
        forged.is_reported("are no span");
        let error = gather(&reader(&forged.storage()).unwrap().snapshot(), &[0, 1, 2], 0);
        assert!(error.unwrap_err().to_string().contains("are no span"));
    }
    let mut forged = whole.clone();
    let (bytes, entry) = patched(&name, &bytes, &entry, texts, b"\xff");
    forged.replace(bytes, &entry);
    forged.is_reported("a text is not UTF-8");
    let error = reader(&forged.storage()).unwrap().snapshot().sample(1).unwrap_err();
    assert!(error.to_string().contains("a text is not UTF-8"), "{error}");
}

#[test]
fn prompts_that_no_vocabulary_has_are_reported() {
    let whole = Forged::of(&[Step::Append(Owned::numbered(0, 3))]);
    let (name, bytes) = whole.file("prompts");
    let entry = entry_of(&reader(&whole.storage()).unwrap().snapshot(), &name);
    let narrow = |tokens: [u16; 3]| tokens.map(u16::to_le_bytes).concat();
    let mut forged = whole.clone();
    let (wrong, said) = patched(&name, &bytes, &entry, &narrow([1, 7, 0]), &narrow([1, 777, 0]));
    forged.replace(wrong, &said);
    forged.is_reported("token id 777 is outside the vocabulary of 500");
    for (at, text) in [(prompt_column::TEXT, &b"prompt 1"[..]), (prompt_column::METADATA, b"{}")] {
        let mut forged = whole.clone();
        let (wrong, said) = patched(&name, &bytes, &entry, text, b"\xfe");
        forged.replace(wrong, &said);
        forged.is_reported("a text is not UTF-8");
        let columns = prompt_columns(2);
        let storage = forged.storage();
        let file = DataFile::open(&*storage, &said, &columns, 3).unwrap();
        assert!((0..3).any(|row| file.text(at, row).is_err()));
    }
}

/// A file with one column "n" of these values, in so many batches.
fn arrow(field: Field, batches: &[ArrayRef]) -> Vec<u8> {
    let schema = Arc::new(Schema::new(vec![field]));
    let mut writer = FileWriter::try_new(Vec::new(), &schema).unwrap();
    for values in batches {
        let batch = RecordBatch::try_new(schema.clone(), vec![values.clone()]).unwrap();
        writer.write(&batch).unwrap();
    }
    writer.finish().unwrap();
    writer.into_inner().unwrap()
}

#[test]
fn a_table_that_is_none_of_ours_is_refused() {
    let name = "segments/seg-0000000000000000-0000000000000001.arrow";
    let numbers: ArrayRef = Arc::new(UInt32Array::from(vec![1, 2, 3]));
    let floats: ArrayRef = Arc::new(Float32Array::from(vec![1.0, 2.0, 3.0]));
    let holes: ArrayRef = Arc::new(UInt32Array::from(vec![Some(1), None, Some(3)]));
    let whole = |kind| Field::new("n", kind, false);
    let open = |bytes: Vec<u8>, entry: &FileEntry, columns: &[ColumnSpec], rows| {
        let disk = Disk::with_files(&[(name.into(), bytes)]);
        DataFile::open(&*disk.storage(), entry, columns, rows)
    };
    let columns = [("n".to_owned(), Column::U32)];
    let (good, entry) =
        sealed(name, arrow(whole(DataType::UInt32), std::slice::from_ref(&numbers)));
    let file = open(good.clone(), &entry, &columns, 3).unwrap();
    assert_eq!(file.values::<u32>(0, 0..3).unwrap(), [1, 2, 3]);
    assert_eq!((file.rows(), file.name()), (3, name));

    let twice = [numbers.clone(), numbers.clone()];
    let others = [
        (
            arrow(Field::new("m", DataType::UInt32, false), std::slice::from_ref(&numbers)),
            3,
            "the columns",
        ),
        (arrow(whole(DataType::Float32), &[floats]), 3, "the columns"),
        (arrow(whole(DataType::UInt32), &twice), 3, "the number of record batches"),
        (arrow(whole(DataType::UInt32), &[]), 3, "the number of record batches"),
        (arrow(Field::new("n", DataType::UInt32, true), &[holes]), 3, "it has nulls"),
        (arrow(whole(DataType::UInt32), std::slice::from_ref(&numbers)), 4, "the number of rows"),
    ];
    for (bytes, rows, message) in others {
        let (bytes, entry) = sealed(name, bytes);
        let error = open(bytes, &entry, &columns, rows).map(drop).unwrap_err().to_string();
        assert!(error.contains(&format!("not a table of ours: {message}")), "{error}");
    }

    // Entries that do not fit the bytes.
    let said = |change: &dyn Fn(&mut FileEntry)| {
        let mut entry = entry.clone();
        change(&mut entry);
        open(good.clone(), &entry, &columns, 3).map(drop).unwrap_err().to_string()
    };
    let sum_from = |tail: u64| sum64(&good[tail as usize..]);
    let cases: [(String, &str); 5] = [
        (said(&|e| e.name = name.replace('1', "2")), "the file is missing"),
        (said(&|e| e.length += 1), "bytes, not the"),
        (said(&|e| e.tail = u64::MAX), "its checksum table does not fit"),
        (said(&|e| e.sum ^= 1), "its tail has the sum"),
        (
            said(&|e| {
                e.tail -= 8;
                e.sum = sum_from(e.tail);
            }),
            "not a table of ours: the footer's length",
        ),
    ];
    for (error, message) in cases {
        assert!(error.contains(message), "{error}, not: {message}");
    }
    // Two sums as a kilobyte of footer, and a footer of noise.
    let footer = &good[entry.tail as usize + 8..];
    let mut noise = vec![0x5a; footer.len()];
    noise[footer.len() - 10..].copy_from_slice(&footer[footer.len() - 10..]);
    let (bytes, entry) = resealed(name, good[..entry.tail as usize].to_vec(), &noise);
    let error = open(bytes, &entry, &columns, 3).map(drop).unwrap_err().to_string();
    assert!(error.contains("not a table of ours: the footer"), "{error}");
}
