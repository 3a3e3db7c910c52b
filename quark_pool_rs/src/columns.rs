//! The columns of a sample. Layout, append, compaction, lookup and the binding follow this one table.
//!
//! To add a column that comes with an append: add a line at the end of the table, so that a column has the same
//! position in every version that has it; raise [`FORMAT_VERSION`] in `format`; describe the column in FORMAT.md;
//! and give `SampleBatch` and `Sample` in `quark/pool/base.py` an attribute. All lists in Python are derived from
//! the table (`quark/pool/sample_columns.py`).

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use arrow_array::{
    ArrayRef, Float32Array, Int16Array, UInt8Array, UInt16Array, UInt32Array, UInt64Array,
};
use bytemuck::Pod;

use crate::datafile::DataFile;
use crate::encoding::Kind;
use crate::error::{PoolError, Result};
use crate::format::{FORMAT_VERSION, PoolSettings};

/// A number of any column.
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(missing_docs, reason = "the types say it")]
pub enum Value {
    U8(u8),
    I16(i16),
    U16(u16),
    U32(u32),
    U64(u64),
    F32(f32),
}

impl fmt::Display for Value {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::U8(number) => number.fmt(formatter),
            Self::I16(number) => number.fmt(formatter),
            Self::U16(number) => number.fmt(formatter),
            Self::U32(number) => number.fmt(formatter),
            Self::U64(number) => number.fmt(formatter),
            Self::F32(number) => number.fmt(formatter),
        }
    }
}

impl Value {
    /// Whether the two are equal, where NaN equals NaN.
    fn is_like(self, other: Self) -> bool {
        let are_nan =
            matches!((self, other), (Self::F32(a), Self::F32(b)) if a.is_nan() && b.is_nan());
        are_nan || self == other
    }
}

/// Numbers of any column.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "the types say it")]
pub enum Numbers<'a> {
    U8(&'a [u8]),
    I16(&'a [i16]),
    U16(&'a [u16]),
    U32(&'a [u32]),
    U64(&'a [u64]),
    F32(&'a [f32]),
}

/// A type of the numbers in a column.
pub trait Number: Pod {
    /// The type in a data file.
    const KIND: Kind;
    /// Convert to a number of any column.
    fn value(self) -> Value;
    /// The numbers, if they have this type.
    fn of(numbers: Numbers<'_>) -> Option<&[Self]>;
    /// Convert to an array for a data file.
    fn array(values: Vec<Self>) -> ArrayRef;
}

macro_rules! numbers {
    ($($kind:ident $type:ident $array:ident;)*) => {$(
        impl Number for $type {
            const KIND: Kind = Kind::$kind;

            fn value(self) -> Value {
                Value::$kind(self)
            }

            fn of(numbers: Numbers<'_>) -> Option<&[Self]> {
                if let Numbers::$kind(numbers) = numbers { Some(numbers) } else { None }
            }

            fn array(values: Vec<Self>) -> ArrayRef {
                Arc::new($array::from(values))
            }
        }
    )*};
}

numbers! {
    U8 u8 UInt8Array;
    I16 i16 Int16Array;
    U16 u16 UInt16Array;
    U32 u32 UInt32Array;
    U64 u64 UInt64Array;
    F32 f32 Float32Array;
}

/// The declaration of a column.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleColumn {
    /// Its name in a segment.
    pub name: &'static str,
    /// The type of its numbers; None for token ids, which are as wide as the vocabulary needs.
    pub kind: Option<Kind>,
    /// Name of its values [N] in a batch; None if the pool assigns them.
    pub given: Option<&'static str>,
    /// Name of its value in a sample; None if it is an internal number.
    pub shown: Option<&'static str>,
    /// The first version of the format that has it.
    pub since: u32,
    /// The value of a removed sample, and of all samples if the version lacks the column.
    pub blank: Value,
}

impl SampleColumn {
    /// Whether the pool's version has the column.
    #[inline]
    pub fn is_in(&self, settings: &PoolSettings) -> bool {
        settings.format >= self.since
    }
}

macro_rules! sample_columns {
    (
        pool {$(
            $(#[doc = $pool_doc:literal])*
            $pool_at:literal $POOL:ident $pool:ident: $pool_type:ident, shown $pool_shown:expr;
        )*}
        batch {$(
            $(#[doc = $doc:literal])*
            $at:literal $NAME:ident $name:ident: $type:ident, given $given:ident, shown $shown:ident,
            since $since:literal, blank $kind:ident($blank:expr);
        )*}
    ) => {
        /// Columns of a segment by position. Texts and scores follow, without a fixed position.
        pub mod column {
            /// Token ids.
            pub const COMPLETION: usize = 1;
            $($(#[doc = $pool_doc])* pub const $POOL: usize = $pool_at;)*
            $($(#[doc = $doc])* pub const $NAME: usize = $at;)*
        }

        /// The table, by position.
        pub const COLUMNS: [SampleColumn; 1 + [$($pool_at,)* $($at,)*].len()] = {
            let mut columns = [SampleColumn {
                name: "completion",
                kind: None,
                given: None,
                shown: Some("completion_tokens"),
                since: 1,
                blank: Value::U32(0),
            }; 1 + [$($pool_at,)* $($at,)*].len()];
            $(columns[$pool_at] = SampleColumn {
                name: stringify!($pool),
                kind: Some(<$pool_type as Number>::KIND),
                given: None,
                shown: $pool_shown,
                since: 1,
                blank: Value::U32(0),
            };)*
            $(columns[$at] = SampleColumn {
                name: stringify!($name),
                kind: Some(<$type as Number>::KIND),
                given: Some(stringify!($given)),
                shown: Some(stringify!($shown)),
                since: $since,
                blank: Value::$kind($blank),
            };)*
            columns
        };

        /// The numbers that the pool assigns to N samples, [N] each.
        #[derive(Debug)]
        pub struct Found {
            $($(#[doc = $pool_doc])* pub $pool: Vec<$pool_type>,)*
        }

        /// The numbers that a batch gives for N samples, [N] each.
        #[derive(Debug, Clone, Copy)]
        pub struct Given<'a> {
            $($(#[doc = $doc])* pub $given: &'a [$type],)*
        }

        impl<'a> Given<'a> {
            /// Collect the numbers of each column. `mismatch` makes the error for numbers of another type.
            ///
            /// # Errors
            /// The errors of the two functions.
            pub fn collect<E>(
                mut numbers: impl FnMut(&SampleColumn) -> Result<Numbers<'a>, E>,
                mismatch: impl Fn(&SampleColumn) -> E,
            ) -> Result<Self, E> {
                Ok(Self {$(
                    $given: <$type as Number>::of(numbers(&COLUMNS[$at])?)
                        .ok_or_else(|| mismatch(&COLUMNS[$at]))?,
                )*})
            }

            /// Name and length of each column.
            pub(crate) fn lengths(&self) -> impl Iterator<Item = (&'static str, usize)> {
                [$((stringify!($given), self.$given.len()),)*].into_iter()
            }

            /// Refuse numbers of columns that the pool's version lacks, unless they are blank.
            pub(crate) fn check_version(&self, settings: &PoolSettings) -> Result<()> {
                $(refuse_numbers(&COLUMNS[$at], self.$given, settings)?;)*
                Ok(())
            }
        }

        /// The numbers of one sample.
        #[derive(Debug, Clone, PartialEq)]
        pub struct SampleNumbers {
            $($(#[doc = $pool_doc])* pub $pool: $pool_type,)*
            $($(#[doc = $doc])* pub $name: $type,)*
        }

        impl SampleNumbers {
            /// Read a row of a segment.
            pub(crate) fn read(file: &DataFile, row: usize, settings: &PoolSettings) -> Result<Self> {
                Ok(Self {
                    $($pool: file.value($pool_at, row)?,)*
                    $($name: if COLUMNS[$at].is_in(settings) { file.value($at, row)? } else { $blank },)*
                })
            }

            /// The numbers under their names in a sample.
            pub fn shown(&self) -> impl Iterator<Item = (&'static str, Value)> {
                [
                    $(($pool_at, self.$pool.value()),)*
                    $(($at, self.$name.value()),)*
                ]
                .into_iter()
                .filter_map(|(at, value): (usize, _)| Some((COLUMNS.get(at)?.shown?, value)))
            }
        }

        impl NumberArrays {
            /// The arrays of an append.
            pub(crate) fn new(found: Found, given: &Given<'_>) -> Self {
                let mut arrays = Self::default();
                $(arrays.0[$pool_at] = Some(Number::array(found.$pool));)*
                $(arrays.0[$at] = Some(Number::array(given.$given.to_vec()));)*
                arrays
            }
        }
    };
}

sample_columns! {
    pool {
        /// Prompt id.
        0 PROMPT prompt: u32, shown Some("prompt_id");
        /// Round.
        3 ROUND round: u32, shown Some("round");
        /// Chunk.
        4 CHUNK chunk: u32, shown Some("chunk");
        /// Optimizer steps of the sampling policy.
        5 POLICY_STEP policy_step: u32, shown Some("policy_step");
        /// Number of the sampling settings.
        7 SETTINGS settings: u32, shown None;
    }
    batch {
        /// Finish reason: 0 unknown, 1 stop, 2 length.
        2 FINISH finish: u8, given finish_reasons, shown finish_reason, since 1, blank U8(0);
        /// Quantile of the reward token, -1 none.
        6 REWARD_TOKEN reward_token: i16, given reward_tokens, shown reward_token, since 1, blank I16(-1);
        /// Seed.
        8 SEED seed: u64, given seeds, shown seed, since 1, blank U64(0);
        /// Nats under the policy, NaN = not computed.
        9 LOGPROB_POLICY logprob_policy: f32, given logprob_policy, shown logprob_policy,
        since 1, blank F32(f32::NAN);
        /// Nats under the reference, NaN = not computed.
        10 LOGPROB_REFERENCE logprob_reference: f32, given logprob_reference, shown logprob_reference,
        since 1, blank F32(f32::NAN);
        /// Nats under the distribution that was sampled, NaN = not known.
        11 LOGPROB_SAMPLED logprob_sampled: f32, given logprob_sampled, shown logprob_sampled,
        since 3, blank F32(f32::NAN);
    }
}

/// Number of columns in each version of the format.
#[expect(clippy::indexing_slicing, reason = "computed when the crate is compiled")]
const NUM_COLUMNS: [usize; FORMAT_VERSION as usize + 1] = {
    let mut counts = [0; FORMAT_VERSION as usize + 1];
    let mut version = 0;
    while version < counts.len() {
        let mut at = 0;
        while at < COLUMNS.len() {
            counts[version] += (COLUMNS[at].since as usize <= version) as usize;
            at += 1;
        }
        version += 1;
    }
    counts
};

/// Number of columns in a segment of the pool.
#[inline]
pub fn num_columns(settings: &PoolSettings) -> usize {
    NUM_COLUMNS.get(settings.format as usize).copied().unwrap_or(COLUMNS.len())
}

/// The arrays of a segment's numbers, by position.
#[derive(Debug, Default)]
pub struct NumberArrays([Option<ArrayRef>; COLUMNS.len()]);

impl NumberArrays {
    /// Read some rows of segments, concatenated.
    pub(crate) fn read(
        parts: &[(&DataFile, Range<usize>)],
        settings: &PoolSettings,
    ) -> Result<Self> {
        let mut arrays = Self::default();
        for (at, (column, array)) in COLUMNS.iter().zip(&mut arrays.0).enumerate() {
            if let Some(kind) = column.kind.filter(|_| column.is_in(settings)) {
                *array = Some(match kind {
                    Kind::U8 => joined::<u8>(parts, at)?,
                    Kind::I16 => joined::<i16>(parts, at)?,
                    Kind::U16 => joined::<u16>(parts, at)?,
                    Kind::U32 => joined::<u32>(parts, at)?,
                    Kind::U64 => joined::<u64>(parts, at)?,
                    Kind::F32 => joined::<f32>(parts, at)?,
                    Kind::ListU16 | Kind::ListU32 | Kind::Text | Kind::Bytes16 => {
                        unreachable!("a column of numbers")
                    }
                });
            }
        }
        Ok(arrays)
    }

    /// The arrays of the columns that the pool has, in order, with the token ids among them.
    pub(crate) fn with_completions(
        self,
        settings: &PoolSettings,
        completions: &ArrayRef,
    ) -> Vec<ArrayRef> {
        let arrays = self.0.into_iter().map(|array| array.unwrap_or_else(|| completions.clone()));
        arrays.take(num_columns(settings)).collect()
    }
}

fn joined<T: Number>(parts: &[(&DataFile, Range<usize>)], column: usize) -> Result<ArrayRef> {
    let mut values: Vec<T> = Vec::with_capacity(parts.iter().map(|(_, rows)| rows.len()).sum());
    for (file, rows) in parts {
        values.extend_from_slice(file.values(column, rows.clone())?);
    }
    Ok(T::array(values))
}

fn refuse_numbers<T: Number>(
    column: &SampleColumn,
    numbers: &[T],
    settings: &PoolSettings,
) -> Result<()> {
    if column.is_in(settings) {
        return Ok(());
    }
    let mut values = numbers.iter().map(|number| number.value()).enumerate();
    let Some((row, value)) = values.find(|(_, value)| !value.is_like(column.blank)) else {
        return Ok(());
    };
    Err(PoolError::invalid(format!(
        "{}[{row}] is {}, which a pool of format version {} has no place for: give {}, or append to a new pool",
        column.given.unwrap_or(column.name),
        value,
        settings.format,
        column.blank,
    )))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_position_is_taken_by_a_column_of_its_own() {
        let names: HashSet<_> = COLUMNS.iter().map(|column| column.name).collect();
        assert_eq!(names.len(), COLUMNS.len());
        assert_eq!(COLUMNS[column::COMPLETION].kind, None);
        assert_eq!(COLUMNS.iter().filter(|column| column.kind.is_none()).count(), 1);
    }

    #[test]
    fn later_columns_lie_behind_earlier_ones() {
        assert!(COLUMNS.is_sorted_by_key(|column| column.since));
        assert!(COLUMNS.iter().all(|column| (1..=FORMAT_VERSION).contains(&column.since)));
        assert_eq!(NUM_COLUMNS, [0, 11, 11, 12]);
    }

    #[test]
    fn a_blank_is_of_the_type_of_its_column() {
        for column in COLUMNS {
            let of = match column.blank {
                Value::U8(_) => Kind::U8,
                Value::I16(_) => Kind::I16,
                Value::U32(_) => Kind::U32,
                Value::U64(_) => Kind::U64,
                Value::F32(_) => Kind::F32,
                Value::U16(_) => Kind::U16,
            };
            assert_eq!(column.kind.unwrap_or(of), of, "{}", column.name);
        }
    }
}
