//! Columns of some samples, checked and copied into one Arrow file.
//!
//! The values are copied from the checked bytes, so no file is opened a second time.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::ops::Range;
use std::sync::Arc;

use arrow_array::types::ArrowPrimitiveType;
use arrow_array::types::{Float32Type, Int16Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type};
use arrow_array::{Array, ArrayRef, LargeListArray, LargeStringArray, PrimitiveArray, RecordBatch};
use arrow_buffer::{Buffer, OffsetBuffer, ScalarBuffer};
use arrow_ipc::writer::FileWriter;
use arrow_schema::{Field, Schema};
use bytemuck::Pod;

use crate::datafile::DataFile;
use crate::encoding::Kind;
use crate::error::{PoolError, Result};
use crate::memory::ensure;
use crate::segment::segment_columns;
use crate::snapshot::Snapshot;

/// Rows of one file.
struct Part<'a> {
    file: &'a DataFile,
    rows: Range<usize>,
}

/// An Arrow file with some columns of the segments, under their names there, and one row per id.
///
/// # Errors
/// `Invalid` for a column that segments lack; `UnknownSample`, `Corrupted`, `Io`, `Memory`.
///
/// # Panics
/// If Arrow refuses arrays of equal lengths.
pub fn rows(snapshot: &Snapshot, spans: &[Range<u64>], names: &[String]) -> Result<Vec<u8>> {
    let parts = parts(snapshot, spans)?;
    let known = segment_columns(&snapshot.context.settings, &[], 0);
    let mut arrays = Vec::with_capacity(names.len());
    for name in names {
        let position = known
            .iter()
            .position(|(known, _)| known == name)
            .ok_or_else(|| PoolError::invalid(format!("segments have no column {name:?}")))?;
        arrays.push(array(&parts, position, known[position].1)?);
    }
    let size: usize = arrays.iter().map(Array::get_array_memory_size).sum();
    // The file, and the copy for the reader.
    ensure(2 * size as u128, || format!("reading {} rows", row_count(&parts)))?;
    let fields: Vec<Field> = names
        .iter()
        .zip(&arrays)
        .map(|(name, array)| Field::new(name, array.data_type().clone(), false))
        .collect();
    let schema = Arc::new(Schema::new(fields));
    let arrow = (|| {
        let batch = RecordBatch::try_new(schema.clone(), arrays)?;
        let bytes = Vec::with_capacity(size + size / 64 + 16 * 1024);
        let mut writer = FileWriter::try_new(bytes, &schema)?;
        writer.write(&batch)?;
        writer.finish()?;
        writer.into_inner()
    })();
    Ok(arrow.expect("arrays match their schema, and memory takes every write"))
}

/// The rows of samples, file by file.
fn parts<'a>(snapshot: &'a Snapshot, spans: &[Range<u64>]) -> Result<Vec<Part<'a>>> {
    let mut parts = Vec::with_capacity(spans.len());
    for span in spans {
        let mut id = span.start;
        while id < span.end {
            snapshot.check_id(id)?;
            snapshot.check_id(span.end - 1)?;
            let (segment, row) = snapshot.locate(id);
            let file = segment.open(&snapshot.context)?;
            let count = (file.rows() - row).min((span.end - id) as usize);
            parts.push(Part { file, rows: row..row + count });
            id += count as u64;
        }
    }
    Ok(parts)
}

fn row_count(parts: &[Part<'_>]) -> usize {
    parts.iter().map(|part| part.rows.len()).sum()
}

fn array(parts: &[Part<'_>], column: usize, kind: Kind) -> Result<ArrayRef> {
    match kind {
        Kind::U8 => numbers::<UInt8Type>(parts, column),
        Kind::I16 => numbers::<Int16Type>(parts, column),
        Kind::U16 => numbers::<UInt16Type>(parts, column),
        Kind::U32 => numbers::<UInt32Type>(parts, column),
        Kind::U64 => numbers::<UInt64Type>(parts, column),
        Kind::F32 => numbers::<Float32Type>(parts, column),
        Kind::ListU16 => lists::<UInt16Type>(parts, column),
        Kind::ListU32 => lists::<UInt32Type>(parts, column),
        Kind::Text => texts(parts, column),
        Kind::Bytes16 => Err(PoolError::invalid("segments have no column of hashes")),
    }
}

fn numbers<T: ArrowPrimitiveType>(parts: &[Part<'_>], column: usize) -> Result<ArrayRef>
where
    T::Native: Pod,
{
    let mut values: Vec<T::Native> = Vec::with_capacity(row_count(parts));
    for part in parts {
        values.extend_from_slice(part.file.values(column, part.rows.clone())?);
    }
    Ok(Arc::new(PrimitiveArray::<T>::new(ScalarBuffer::from(values), None)))
}

fn lists<T: ArrowPrimitiveType>(parts: &[Part<'_>], column: usize) -> Result<ArrayRef>
where
    T::Native: Pod,
{
    let (offsets, values) = items::<T::Native>(parts, column)?;
    let items = PrimitiveArray::<T>::new(ScalarBuffer::from(values), None);
    let field = Arc::new(Field::new("item", T::DATA_TYPE, false));
    Ok(Arc::new(LargeListArray::new(field, offsets, Arc::new(items), None)))
}

fn texts(parts: &[Part<'_>], column: usize) -> Result<ArrayRef> {
    let (offsets, bytes) = items::<u8>(parts, column)?;
    match LargeStringArray::try_new(offsets, Buffer::from_vec(bytes), None) {
        Ok(texts) => Ok(Arc::new(texts)),
        // One of them is not UTF-8. Reading the row reports file and offset.
        Err(error) => {
            for part in parts {
                for row in part.rows.clone() {
                    part.file.text(column, row)?;
                }
            }
            Err(PoolError::corrupted("segments", 0, error.to_string()))
        }
    }
}

/// Offsets [N + 1] and the items of all rows.
fn items<T: Pod>(parts: &[Part<'_>], column: usize) -> Result<(OffsetBuffer<i64>, Vec<T>)> {
    let mut offsets = Vec::with_capacity(row_count(parts) + 1);
    offsets.push(0);
    let mut end = 0;
    for part in parts {
        for row in part.rows.clone() {
            end += part.file.span(column, row)?.len();
            offsets.push(end as i64);
        }
    }
    ensure(end as u128 * size_of::<T>() as u128, || format!("reading {} rows", row_count(parts)))?;
    let mut values = Vec::with_capacity(end);
    for part in parts {
        if let Some(last) = part.rows.clone().next_back() {
            // Neighbors share offsets, so the items of a part are contiguous.
            let first = part.file.span(column, part.rows.start)?.start;
            let span = first..part.file.span(column, last)?.end;
            values.extend_from_slice(part.file.items(column, span)?);
        }
    }
    Ok((OffsetBuffer::new(ScalarBuffer::from(offsets)), values))
}
