//! Records in a log, each with the digest of the record before it, and HEAD, which names the newest.
//!
//! This module turns bytes into records and back, and touches no file. `manifest` describes the payloads. Layout:
//! FORMAT.md, "Manifest" and "HEAD".

use crate::checksum::{Digest256, sha256, sum64};
use crate::format::MAX_PAYLOAD_BYTES;

/// Length of a record before its payload.
pub const HEADER_BYTES: usize = 96;
const MAGIC: [u8; 8] = *b"\xffQRKMAN\xfe";
const HEAD_MAGIC: [u8; 8] = *b"QRKHEAD1";
const HEAD_BYTES: usize = 64;

/// The kind of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The whole state at a generation.
    State = 1,
    /// The samples of one append.
    Commit = 2,
    /// A change of the scores of existing samples.
    Scores = 3,
    /// A change of existing snapshots and files.
    Upkeep = 4,
}

/// A record whose checksums match.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    /// Offset in its log.
    pub offset: usize,
    /// Its kind.
    pub kind: Kind,
    /// The generation that it creates.
    pub generation: u64,
    /// Digest of the previous record.
    pub previous: Digest256,
    /// Digest of this record.
    pub digest: Digest256,
    /// JSON.
    pub payload: &'a [u8],
}

impl Record<'_> {
    /// Offset of the next record.
    pub fn end(&self) -> usize {
        self.offset + HEADER_BYTES + self.payload.len()
    }
}

/// The bytes of a record, and its digest.
///
/// # Panics
/// If the payload is longer than the format allows.
pub fn encode_record(
    kind: Kind,
    generation: u64,
    previous: &Digest256,
    payload: &[u8],
) -> (Vec<u8>, Digest256) {
    assert!(payload.len() <= MAX_PAYLOAD_BYTES as usize, "a manifest record outgrew its limit");
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&(kind as u32).to_le_bytes());
    header[12..16].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    header[16..24].copy_from_slice(&generation.to_le_bytes());
    header[24..56].copy_from_slice(previous);
    let digest = sha256(&[&header[..56], payload]);
    header[56..88].copy_from_slice(&digest);
    let sum = frame_sum(&header, payload);
    header[88..96].copy_from_slice(&sum);
    ([&header, payload].concat(), digest)
}

fn frame_sum(header: &[u8; HEADER_BYTES], payload: &[u8]) -> [u8; 8] {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    hasher.update(&header[..88]);
    hasher.update(payload);
    hasher.digest().to_le_bytes()
}

/// The record at `offset`, or the reason why there is none.
///
/// # Errors
/// The reason, as text for people.
pub fn decode_record(log: &[u8], offset: usize) -> Result<Record<'_>, &'static str> {
    let header: Option<&[u8; HEADER_BYTES]> = log.get(offset..).and_then(<[u8]>::first_chunk);
    let header = header.ok_or("a record header is cut short")?;
    if header[..8] != MAGIC {
        return Err("a record does not begin with the magic bytes");
    }
    let payload_len = u32::from_le_bytes(header[12..16].try_into().expect("4 bytes"));
    if payload_len > MAX_PAYLOAD_BYTES {
        return Err("a record claims to be longer than the format allows");
    }
    let start = offset + HEADER_BYTES;
    let payload = log.get(start..start + payload_len as usize).ok_or("a record is cut short")?;
    if frame_sum(header, payload) != header[88..96] {
        return Err("a record does not match its sum");
    }
    let digest: Digest256 = header[56..88].try_into().expect("32 bytes");
    if sha256(&[&header[..56], payload]) != digest {
        return Err("a record does not match its digest");
    }
    let kind = match u32::from_le_bytes(header[8..12].try_into().expect("4 bytes")) {
        1 => Kind::State,
        2 => Kind::Commit,
        3 => Kind::Scores,
        4 => Kind::Upkeep,
        _ => return Err("a record has an unknown kind"),
    };
    Ok(Record {
        offset,
        kind,
        generation: u64::from_le_bytes(header[16..24].try_into().expect("8 bytes")),
        previous: header[24..56].try_into().expect("32 bytes"),
        digest,
        payload,
    })
}

/// The valid prefix of a log.
#[derive(Debug)]
pub struct Chain<'a> {
    /// A state, then consecutive commits.
    pub records: Vec<Record<'a>>,
    /// Why the chain ends before the log: offset and cause.
    pub broken: Option<(usize, &'static str)>,
    /// A valid record of a later generation after the break: its offset and generation.
    pub survivor: Option<(usize, u64)>,
}

/// Read the longest chain in a log that begins with the state of `first_generation`.
pub fn read_chain(log: &[u8], first_generation: u64) -> Chain<'_> {
    let mut records: Vec<Record<'_>> = Vec::new();
    let mut offset = 0;
    let mut broken = None;
    while offset < log.len() || records.is_empty() {
        let record = decode_record(log, offset).and_then(|record| {
            let fits = match records.last() {
                None => record.kind == Kind::State && record.generation == first_generation,
                Some(last) => {
                    record.kind != Kind::State
                        && record.generation == last.generation + 1
                        && record.previous == last.digest
                }
            };
            if fits { Ok(record) } else { Err("a record does not follow the one before") }
        });
        match record {
            Ok(record) => {
                offset = record.end();
                records.push(record);
            }
            Err(cause) => {
                broken = Some((offset, cause));
                break;
            }
        }
    }
    let newest = records.last().map(|r| r.generation);
    let survivor = broken.and_then(|(at, _)| {
        let rest = log.get(at + 1..).unwrap_or_default();
        rest.windows(MAGIC.len())
            .enumerate()
            .filter(|(_, window)| *window == MAGIC)
            .filter_map(|(i, _)| decode_record(log, at + 1 + i).ok())
            .find(|record| newest.is_none_or(|g| record.generation > g))
            .map(|record| (record.offset, record.generation))
    });
    Chain { records, broken, survivor }
}

/// The bytes of HEAD.
pub fn encode_head(generation: u64, digest: &Digest256) -> [u8; HEAD_BYTES] {
    let mut bytes = [0; HEAD_BYTES];
    bytes[..8].copy_from_slice(&HEAD_MAGIC);
    bytes[8..16].copy_from_slice(&generation.to_le_bytes());
    bytes[16..48].copy_from_slice(digest);
    let sum = sum64(&bytes[..56]);
    bytes[56..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Generation and digest in HEAD, if it is valid.
pub fn decode_head(bytes: &[u8]) -> Option<(u64, Digest256)> {
    let bytes: &[u8; HEAD_BYTES] = bytes.try_into().ok()?;
    let valid = bytes[..8] == HEAD_MAGIC && sum64(&bytes[..56]).to_le_bytes() == bytes[56..];
    valid.then(|| {
        let generation = u64::from_le_bytes(bytes[8..16].try_into().expect("8 bytes"));
        (generation, bytes[16..48].try_into().expect("32 bytes"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(payloads: &[&str]) -> Vec<u8> {
        let (mut bytes, mut digest) = encode_record(Kind::State, 5, &[0; 32], b"{}");
        for (i, payload) in payloads.iter().enumerate() {
            let (record, next) =
                encode_record(Kind::Commit, 6 + i as u64, &digest, payload.as_bytes());
            bytes.extend(record);
            digest = next;
        }
        bytes
    }

    #[test]
    fn a_log_reads_back() {
        let bytes = log(&["one", "two"]);
        let chain = read_chain(&bytes, 5);
        assert_eq!(chain.records.len(), 3);
        assert_eq!(chain.records[2].payload, b"two");
        assert!(chain.broken.is_none() && chain.survivor.is_none());
        assert!(read_chain(&bytes, 4).records.is_empty());
    }

    #[test]
    fn a_torn_tail_ends_the_chain_and_leaves_no_survivor() {
        let bytes = log(&["one", "two"]);
        let start = read_chain(&bytes, 5).records[2].offset;
        for len in start + 1..bytes.len() {
            let chain = read_chain(&bytes[..len], 5);
            assert_eq!(chain.records.len(), 2);
            assert_eq!(chain.broken.map(|b| b.0), Some(start));
            assert!(chain.survivor.is_none());
        }
    }

    #[test]
    fn every_flipped_byte_before_the_last_record_leaves_a_survivor() {
        let bytes = log(&["one", "two"]);
        let last = read_chain(&bytes, 5).records[2].offset;
        for at in 0..last {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            let chain = read_chain(&damaged, 5);
            assert!(chain.records.len() < 3 && chain.survivor.is_some(), "byte {at}");
        }
    }

    #[test]
    fn head_says_its_generation_or_nothing() {
        let bytes = encode_head(7, &[3; 32]);
        assert_eq!(decode_head(&bytes), Some((7, [3; 32])));
        for at in 0..HEAD_BYTES {
            let mut damaged = bytes;
            damaged[at] ^= 1;
            assert_eq!(decode_head(&damaged), None, "byte {at}");
        }
        assert_eq!(decode_head(&bytes[..63]), None);
    }
}
