//! Can this build read the pools of every format version? Re-record the current one, after a change that
//! FORMAT.md explains, with `cargo test --test golden -- --ignored`.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may")]

mod common;

use std::path::{Path, PathBuf};

use common::disk::Disk;
use common::{Owned, check_content, create, create_version, reader, writer};
use quark_pool_rs::format::FORMAT_VERSION;
use quark_pool_rs::pool::Pool;
use quark_pool_rs::quantization::Quantization;
use quark_pool_rs::ranking::{RemainderRule, TieRule};
use quark_pool_rs::verify::verify;

fn folder(version: u32) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/v{version}"))
}

fn batches() -> Vec<Owned> {
    (0..9).map(|i| Owned::numbered(i, 2)).collect()
}

fn files(folder: &Path, below: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder.join(below)).unwrap() {
        let entry = entry.unwrap();
        let path = below.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(folder, &path));
        } else {
            found.push((path, std::fs::read(entry.path()).unwrap()));
        }
    }
    found
}

fn labels(pool: &Pool) -> String {
    let spread = RemainderRule::Spread;
    let quantization =
        Quantization::new(pool.snapshot(), "reward", 4, TieRule::Hash, spread).unwrap();
    let labels: Vec<String> = quantization.labels().unwrap().iter().map(i16::to_string).collect();
    labels.join(" ")
}

fn written(version: u32, extension: &str) -> String {
    let text = std::fs::read_to_string(folder(version).with_extension(extension)).unwrap();
    text.trim().to_owned()
}

#[test]
fn a_pool_of_any_version_reads_as_it_was_written_and_goes_on() {
    for version in 1..=FORMAT_VERSION {
        let disk = Disk::with_files(&files(&folder(version), Path::new("")));
        let storage = disk.storage();
        let report = verify(&storage).unwrap();
        assert!(report.problems.is_empty(), "{:?}", report.problems);
        let pool = reader(&storage).unwrap();
        assert!(check_content(&pool.snapshot(), &batches()).unwrap());
        assert_eq!(pool.snapshot().hash(), written(version, "hash"));
        assert_eq!(labels(&pool), written(version, "labels"));
        // Until runs are merged.
        let pool = writer(&storage).unwrap();
        for number in 20..30 {
            Owned::numbered(number, 2).append(&pool).unwrap();
        }
        let report = verify(&storage).unwrap();
        assert!(report.problems.is_empty(), "{:?}", report.problems);
    }
}

#[test]
fn the_same_appends_make_the_same_bytes() {
    for version in 1..=FORMAT_VERSION {
        let disk = Disk::default();
        let pool = create_version(&disk.storage(), version).unwrap();
        for batch in batches() {
            batch.append(&pool).unwrap();
        }
        for (path, bytes) in files(&folder(version), Path::new("")) {
            let (_, made) = disk.files().into_iter().find(|(made, _)| *made == path).unwrap();
            assert!(made == bytes, "{} differs", path.display());
        }
    }
}

#[test]
#[ignore = "re-records the fixture"]
fn record() {
    let disk = Disk::default();
    let pool = create(&disk.storage()).unwrap();
    for batch in batches() {
        batch.append(&pool).unwrap();
    }
    let folder = folder(FORMAT_VERSION);
    for (path, bytes) in disk.files().into_iter().filter(|(path, _)| !path.ends_with("LOCK")) {
        let path = folder.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    std::fs::write(folder.with_extension("labels"), labels(&pool) + "\n").unwrap();
    std::fs::write(folder.with_extension("hash"), pool.snapshot().hash() + "\n").unwrap();
}
