//! The columns of segments, prompt files and merged runs.
//!
//! Which columns there are, in which order, and how arrays become one file. Values are taken as given:
//! `pool` checked them at the door.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::{
    ArrayRef, FixedSizeBinaryArray, Float32Array, ListArray, StringArray, UInt16Array, UInt32Array,
    UInt64Array,
};
use arrow_buffer::{Buffer, OffsetBuffer, ScalarBuffer};
use arrow_schema::{DataType, Field};

use crate::columns::{COLUMNS, NumberArrays, num_columns};
use crate::datafile::DataFile;
use crate::encoding::{ColumnSpec, FileEntry, Kind, encode};
use crate::error::Result;
use crate::format::PoolSettings;

/// Columns of a prompt file by position.
pub mod prompt_column {
    /// Token ids.
    pub const TOKENS: usize = 0;
    /// Text.
    pub const TEXT: usize = 1;
    /// The user's JSON.
    pub const METADATA: usize = 2;
    /// xxh3-128 of the content.
    pub const HASH: usize = 3;
}

/// Columns of a merged run by position.
pub mod run_column {
    /// In a compact run: the key in the upper half, in the lower one the id, counted from the run's first.
    pub const ENTRY: usize = 0;
    /// Otherwise: order-preserving key.
    pub const KEY: usize = 0;
    /// And sample id.
    pub const ID: usize = 1;
}

/// How many ids a compact run spans at most.
pub const MAX_RUN_SPAN: u64 = 1 << 32;

fn tokens_kind(token_bytes: u8) -> Kind {
    if token_bytes == 2 { Kind::ListU16 } else { Kind::ListU32 }
}

/// Row numbers below `rows`.
fn order_kind(settings: &PoolSettings, rows: u64) -> Kind {
    let is_narrow = settings.has_compact_orders() && rows <= 1 << 16;
    if is_narrow { Kind::U16 } else { Kind::U32 }
}

/// Columns of a segment with so many rows.
pub fn segment_columns(settings: &PoolSettings, scores: &[String], rows: u64) -> Vec<ColumnSpec> {
    let fixed = COLUMNS.iter().take(num_columns(settings)).map(|column| {
        let kind = column.kind.unwrap_or(tokens_kind(settings.token_bytes));
        (column.name.to_owned(), kind)
    });
    let text = settings.store_text.then(|| ("completion_text".to_owned(), Kind::Text));
    let scores = scores.iter().flat_map(|name| {
        let order = order_kind(settings, rows);
        [(format!("score:{name}"), Kind::F32), (format!("order:{name}"), order)]
    });
    fixed.chain(text).chain(scores).collect()
}

/// Position of the completions' texts in a segment, where the pool stores them.
#[inline]
pub fn text_position(settings: &PoolSettings) -> usize {
    num_columns(settings)
}

/// Position of the values of a segment's score column `index`; its order is the next one.
#[inline]
pub fn score_position(settings: &PoolSettings, index: usize) -> usize {
    text_position(settings) + usize::from(settings.store_text) + 2 * index
}

/// Columns of a prompt file.
pub fn prompt_columns(token_bytes: u8) -> Vec<ColumnSpec> {
    vec![
        ("tokens".to_owned(), tokens_kind(token_bytes)),
        ("text".to_owned(), Kind::Text),
        ("metadata".to_owned(), Kind::Text),
        ("hash".to_owned(), Kind::Bytes16),
    ]
}

/// Columns of a merged run.
pub fn run_columns(settings: &PoolSettings) -> Vec<ColumnSpec> {
    if settings.has_compact_orders() {
        return vec![("entry".to_owned(), Kind::U64)];
    }
    vec![("key".to_owned(), Kind::U32), ("id".to_owned(), Kind::U64)]
}

/// Columns of a file of scores: the values, and the row numbers, best first.
pub fn score_columns(settings: &PoolSettings, rows: u64) -> Vec<ColumnSpec> {
    vec![("score".to_owned(), Kind::F32), ("order".to_owned(), order_kind(settings, rows))]
}

/// The bytes of a file of scores.
pub fn encode_scores(
    name: String,
    settings: &PoolSettings,
    scores: &[f32],
    order: Vec<u32>,
) -> (Vec<u8>, FileEntry) {
    let columns = score_columns(settings, scores.len() as u64);
    let order_kind = order_kind(settings, scores.len() as u64);
    let arrays: Vec<ArrayRef> =
        vec![Arc::new(Float32Array::from(scores.to_vec())), order_array(order_kind, order)];
    encode(name, &columns, arrays)
}

fn order_array(kind: Kind, order: Vec<u32>) -> ArrayRef {
    if kind == Kind::U16 {
        let narrow = order.into_iter().map(|row| row as u16);
        Arc::new(UInt16Array::from_iter_values(narrow))
    } else {
        Arc::new(UInt32Array::from(order))
    }
}

/// Values of a segment, N rows.
#[derive(Debug)]
pub(crate) struct SegmentRows<'a> {
    /// All completions one after another.
    pub(crate) tokens: &'a [u32],
    /// [N + 1]
    pub(crate) offsets: Vec<i32>,
    /// Of every column of numbers.
    pub(crate) numbers: NumberArrays,
    /// [N], if the pool stores text.
    pub(crate) texts: Option<&'a [&'a str]>,
    /// Name, values [N], order [N].
    pub(crate) scores: Vec<(&'a str, &'a [f32], Vec<u32>)>,
}

/// The bytes of a segment.
pub(crate) fn encode_segment(
    name: String,
    settings: &PoolSettings,
    rows: SegmentRows<'_>,
) -> (Vec<u8>, FileEntry) {
    let names: Vec<String> = rows.scores.iter().map(|(name, _, _)| (*name).to_owned()).collect();
    let count = rows.offsets.len() as u64 - 1;
    let columns = segment_columns(settings, &names, count);
    let order_kind = order_kind(settings, count);
    let completions = token_lists(settings.token_bytes, rows.tokens, rows.offsets);
    let mut arrays = rows.numbers.with_completions(settings, &completions);
    if let Some(texts) = rows.texts {
        arrays.push(Arc::new(StringArray::from_iter_values(texts)));
    }
    for (_, values, order) in rows.scores {
        arrays.push(Arc::new(Float32Array::from(values.to_vec())));
        arrays.push(order_array(order_kind, order));
    }
    encode(name, &columns, arrays)
}

/// A prompt as it goes into a prompt file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptRow<'a> {
    /// Token ids.
    pub tokens: &'a [u32],
    /// Text.
    pub text: &'a str,
    /// JSON.
    pub metadata: &'a str,
    /// Of the content.
    pub hash: [u8; 16],
}

/// The bytes of a prompt file.
pub fn encode_prompts(
    name: String,
    token_bytes: u8,
    prompts: &[PromptRow<'_>],
) -> (Vec<u8>, FileEntry) {
    let mut tokens = Vec::new();
    let mut offsets = vec![0_i32];
    for prompt in prompts {
        tokens.extend_from_slice(prompt.tokens);
        offsets.push(tokens.len() as i32);
    }
    let hashes: Vec<u8> = prompts.iter().flat_map(|p| p.hash).collect();
    let arrays: Vec<ArrayRef> = vec![
        token_lists(token_bytes, &tokens, offsets),
        Arc::new(StringArray::from_iter_values(prompts.iter().map(|p| p.text))),
        Arc::new(StringArray::from_iter_values(prompts.iter().map(|p| p.metadata))),
        Arc::new(FixedSizeBinaryArray::new(16, Buffer::from_vec(hashes), None)),
    ];
    encode(name, &prompt_columns(token_bytes), arrays)
}

/// The bytes of a merged run of samples from `first` on, fewer than [`MAX_RUN_SPAN`].
pub fn encode_run(
    name: String,
    settings: &PoolSettings,
    first: u64,
    keys: Vec<u32>,
    ids: Vec<u64>,
) -> (Vec<u8>, FileEntry) {
    let arrays: Vec<ArrayRef> = if settings.has_compact_orders() {
        // Only ids of a forged manifest lie before `first`: a reader then finds the wrong sample, and verify says so.
        let entry = |(key, id): (u32, u64)| {
            u64::from(key) << 32 | (id.wrapping_sub(first) & (MAX_RUN_SPAN - 1))
        };
        vec![Arc::new(UInt64Array::from_iter_values(keys.into_iter().zip(ids).map(entry)))]
    } else {
        vec![Arc::new(UInt32Array::from(keys)), Arc::new(UInt64Array::from(ids))]
    };
    encode(name, &run_columns(settings), arrays)
}

fn token_lists(token_bytes: u8, tokens: &[u32], offsets: Vec<i32>) -> ArrayRef {
    let (kind, values): (_, ArrayRef) = if token_bytes == 2 {
        let narrow: Vec<u16> = tokens.iter().map(|&id| id as u16).collect();
        (DataType::UInt16, Arc::new(UInt16Array::from(narrow)))
    } else {
        (DataType::UInt32, Arc::new(UInt32Array::from(tokens.to_vec())))
    };
    let field = Arc::new(Field::new("item", kind, false));
    let offsets = OffsetBuffer::new(ScalarBuffer::from(offsets));
    Arc::new(ListArray::new(field, offsets, values, None))
}

/// Token ids of a file, in the width that it has.
#[derive(Debug, Clone, Copy)]
pub enum Tokens<'a> {
    /// For vocabularies up to 65536.
    Narrow(&'a [u16]),
    /// For the others.
    Wide(&'a [u32]),
}

impl<'a> Tokens<'a> {
    /// The tokens of a span.
    ///
    /// # Errors
    /// `Corrupted`.
    #[inline]
    pub fn read(
        file: &'a DataFile,
        column: usize,
        token_bytes: u8,
        span: Range<usize>,
    ) -> Result<Self> {
        Ok(if token_bytes == 2 {
            Self::Narrow(file.items(column, span)?)
        } else {
            Self::Wide(file.items(column, span)?)
        })
    }

    /// Append them.
    pub fn append_to(self, out: &mut Vec<u32>) {
        match self {
            Self::Narrow(ids) => out.extend(ids.iter().map(|&id| u32::from(id))),
            Self::Wide(ids) => out.extend_from_slice(ids),
        }
    }

    /// A copy.
    pub fn to_vec(self) -> Vec<u32> {
        match self {
            Self::Narrow(ids) => ids.iter().map(|&id| u32::from(id)).collect(),
            Self::Wide(ids) => ids.to_vec(),
        }
    }
}
