//! Widths, limits and names. FORMAT.md is the specification; this is its ground floor.

use serde::{Deserialize, Serialize};

use crate::error::{PoolError, Result};

#[cfg(target_endian = "big")]
compile_error!("the pool maps little-endian files: big-endian machines are not supported");

/// Version of the format of new pools. Older ones are read, and written as they are.
pub const FORMAT_VERSION: u32 = 3;
/// From this version on a merged run is one column, and an order is as narrow as its rows allow.
pub const COMPACT_ORDERS: u32 = 2;
/// Unit of the checksum table of a data file.
pub const BLOCK_BYTES: usize = 4096;
/// Longest payload of a manifest record.
pub const MAX_PAYLOAD_BYTES: u32 = 1 << 28;
/// A log shorter than this is not worth a new one.
pub const MIN_LOG_BYTES: u64 = 64 * 1024;
/// Longest idempotency key.
pub const MAX_KEY_BYTES: usize = 1024;
/// Longest sampling-settings or user-metadata text.
pub const MAX_JSON_BYTES: usize = 1 << 20;
/// Tokens or text bytes of one column of one file: Arrow's offsets are i32.
pub const MAX_COLUMN_BYTES: usize = i32::MAX as usize;

/// Name of the lock file.
pub const LOCK: &str = "LOCK";
/// Name of the file that holds the newest acknowledged generation.
pub const HEAD: &str = "HEAD";
/// Directory of the logs.
pub const MANIFEST_DIR: &str = "manifest";
/// Directory of the samples.
pub const SEGMENT_DIR: &str = "segments";
/// Directory of the prompts.
pub const PROMPT_DIR: &str = "prompts";
/// Directory of the merged runs.
pub const RUN_DIR: &str = "runs";
/// Directory of score columns that came after their samples.
pub const SCORE_DIR: &str = "scores";

/// Name of the log that begins at `generation`.
pub fn log_name(generation: u64) -> String {
    format!("{MANIFEST_DIR}/{generation:020}.log")
}

/// Name of the segment that `generation` committed.
pub fn segment_name(first_id: u64, generation: u64) -> String {
    format!("{SEGMENT_DIR}/seg-{first_id:016x}-{generation:016x}.arrow")
}

/// Name of the prompt file that `generation` committed.
pub fn prompts_name(first_prompt: u32, generation: u64) -> String {
    format!("{PROMPT_DIR}/pr-{first_prompt:016x}-{generation:016x}.arrow")
}

/// Name of the file of scores that `generation` committed after their samples.
pub fn scores_name(first_id: u64, generation: u64) -> String {
    format!("{SCORE_DIR}/sc-{first_id:016x}-{generation:016x}.arrow")
}

/// Name of the file with what `generation` left of a column's scores, which came after their samples.
pub fn kept_scores_name(first_id: u64, column: usize, generation: u64) -> String {
    format!("{SCORE_DIR}/sc-{first_id:016x}-{column:04x}-{generation:016x}.arrow")
}

/// Name of the run that `generation` merged.
pub fn run_name(column: usize, level: u8, generation: u64) -> String {
    format!("{RUN_DIR}/run-{column:04x}-{level:02x}-{generation:016x}.arrow")
}

/// First generation of a log, from its name without the directory.
pub fn parse_log_name(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".log")?;
    (digits.len() == 20 && digits.bytes().all(|b| b.is_ascii_digit()))
        .then(|| digits.parse().ok())
        .flatten()
}

/// Whether `name` (with its directory) is one that a manifest may list.
pub fn is_data_name(name: &str) -> bool {
    let Some((directory, file)) = name.split_once('/') else { return false };
    let Some(stem) = file.strip_suffix(".arrow") else { return false };
    let mut parts = stem.split('-');
    let (prefix, widths): (&str, &[usize]) = match directory {
        SEGMENT_DIR => ("seg", &[16, 16]),
        PROMPT_DIR => ("pr", &[16, 16]),
        RUN_DIR => ("run", &[4, 2, 16]),
        SCORE_DIR if parts.clone().count() == 4 => ("sc", &[16, 4, 16]),
        SCORE_DIR => ("sc", &[16, 16]),
        _ => return false,
    };
    let is_hex =
        |text: &str| text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    parts.next() == Some(prefix)
        && widths.iter().all(|&w| parts.next().is_some_and(|p| p.len() == w && is_hex(p)))
        && parts.next().is_none()
}

/// What a pool is created with and never changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolSettings {
    /// Hexadecimal, so that a pool can be told from its copy's sibling.
    pub uuid: String,
    /// [`FORMAT_VERSION`] of the build that made the pool.
    pub format: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
    /// 2 or 4.
    pub token_bytes: u8,
    /// Whether completions carry their text.
    pub store_text: bool,
    /// Seed of the tie hash.
    pub tie_seed: u64,
    /// The user's, one JSON object.
    pub metadata: String,
}

impl PoolSettings {
    /// Settings for a vocabulary.
    ///
    /// # Errors
    /// `Invalid` for an empty vocabulary or metadata that is no JSON object.
    pub fn new(
        uuid: String,
        vocab_size: u32,
        store_text: bool,
        tie_seed: u64,
        metadata: &str,
    ) -> Result<Self> {
        if vocab_size == 0 {
            return Err(PoolError::invalid("vocab_size is 0; a vocabulary has at least one token"));
        }
        check_json_object("metadata", metadata)?;
        Ok(Self {
            uuid,
            format: FORMAT_VERSION,
            vocab_size,
            token_bytes: if vocab_size <= 1 << 16 { 2 } else { 4 },
            store_text,
            tie_seed,
            metadata: metadata.to_owned(),
        })
    }

    /// The same for a pool as builds of that format made it.
    ///
    /// # Errors
    /// `Version` where this build does not know the format.
    pub fn of_version(self, format: u32) -> Result<Self> {
        if (1..=FORMAT_VERSION).contains(&format) {
            Ok(Self { format, ..self })
        } else {
            Err(PoolError::Version { found: format, supported: FORMAT_VERSION })
        }
    }

    /// Whether runs and orders are as [`COMPACT_ORDERS`] says.
    #[inline]
    pub fn has_compact_orders(&self) -> bool {
        self.format >= COMPACT_ORDERS
    }
}

/// Refuse a score column name that is not `[a-z0-9_.-]{1,64}`.
///
/// # Errors
/// `Invalid`, with the name.
pub fn check_column_name(name: &str) -> Result<()> {
    let fits = (1..=64).contains(&name.len())
        && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-'));
    if fits {
        Ok(())
    } else {
        Err(PoolError::invalid(format!(
            "score column {name:?}: a name has 1 to 64 characters of a-z, 0-9, '_', '.', '-'"
        )))
    }
}

/// Refuse a text that is not one JSON object of bounded length.
///
/// # Errors
/// `Invalid`, with what it is called.
pub fn check_json_object(what: &str, text: &str) -> Result<()> {
    if text.len() > MAX_JSON_BYTES {
        return Err(PoolError::invalid(format!(
            "{what} has {} bytes; at most {MAX_JSON_BYTES} are stored",
            text.len()
        )));
    }
    match serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text) {
        Ok(_) => Ok(()),
        Err(source) => Err(PoolError::invalid(format!("{what} is not one JSON object: {source}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_we_make_are_names_that_we_accept() {
        assert!(is_data_name(&segment_name(0, 1)));
        assert!(is_data_name(&prompts_name(u32::MAX, u64::MAX)));
        assert!(is_data_name(&run_name(3, 2, 77)));
        assert!(is_data_name(&scores_name(1 << 33, 9)));
        assert!(is_data_name(&kept_scores_name(1 << 33, 4, 9)));
        assert_eq!(parse_log_name(log_name(42).strip_prefix("manifest/").unwrap()), Some(42));
    }

    #[test]
    fn other_names_are_refused() {
        for name in [
            "",
            "segments/",
            "../segments/seg-0000000000000000-0000000000000001.arrow",
            "segments/../LOCK",
            "segments/seg-0000000000000000-0000000000000001.arrow/x",
            "segments/seg-000000000000000G-0000000000000001.arrow",
            "segments/seg-0000000000000000-0000000000000001-00.arrow",
            "runs/seg-0000000000000000-0000000000000001.arrow",
            "scores/sc-0000000000000000-00-0000000000000001.arrow",
            "segments/seg-0000000000000000-0000-0000000000000001.arrow",
            "/etc/passwd",
        ] {
            assert!(!is_data_name(name), "{name}");
        }
        assert_eq!(parse_log_name("1.log"), None);
        assert_eq!(parse_log_name("+0000000000000000001.log"), None);
    }

    #[test]
    fn token_width_follows_the_vocabulary() {
        let width = |v| PoolSettings::new(String::new(), v, true, 0, "{}").unwrap().token_bytes;
        assert_eq!((width(1), width(65_536), width(65_537)), (2, 2, 4));
        assert!(PoolSettings::new(String::new(), 0, true, 0, "{}").is_err());
        assert!(PoolSettings::new(String::new(), 9, true, 0, "[]").is_err());
    }

    #[test]
    fn a_version_is_one_that_this_build_knows() {
        let new = || PoolSettings::new(String::new(), 9, true, 0, "{}").unwrap();
        for format in 1..=FORMAT_VERSION {
            let settings = new().of_version(format).unwrap();
            assert_eq!(settings.has_compact_orders(), format >= 2);
        }
        for format in [0, FORMAT_VERSION + 1] {
            assert!(matches!(new().of_version(format), Err(PoolError::Version { .. })));
        }
    }
}
