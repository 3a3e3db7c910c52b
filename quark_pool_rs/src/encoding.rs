//! The bytes of a data file: the types of its columns, and how it is encoded. Layout: FORMAT.md, "Data files".

use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_ipc::writer::FileWriter;
use arrow_schema::{DataType, Field, Schema};
use serde::{Deserialize, Serialize};

use crate::checksum::{block_sums, sum64};

/// The manifest's description of a data file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Name with its directory. `manifest` has checked its form.
    pub name: String,
    /// Length of the file.
    pub length: u64,
    /// Offset of the checksum table.
    pub tail: u64,
    /// xxh3-64 of the bytes from `tail` on.
    #[serde(with = "hex_u64")]
    pub sum: u64,
}

mod hex_u64 {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    pub(super) fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{value:016x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        u64::from_str_radix(&String::deserialize(deserializer)?, 16).map_err(D::Error::custom)
    }
}

/// Type of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Fixed-width numbers.
    U8,
    /// 16-bit signed.
    I16,
    /// 16-bit unsigned.
    U16,
    /// 32-bit unsigned.
    U32,
    /// 64-bit unsigned.
    U64,
    /// 32-bit float.
    F32,
    /// Lists of 16-bit token ids.
    ListU16,
    /// Lists of 32-bit token ids.
    ListU32,
    /// Text.
    Text,
    /// 16 bytes.
    Bytes16,
}

impl Kind {
    /// The Arrow type.
    pub fn data_type(self) -> DataType {
        let list = |of| DataType::List(Arc::new(Field::new("item", of, false)));
        match self {
            Self::U8 => DataType::UInt8,
            Self::I16 => DataType::Int16,
            Self::U16 => DataType::UInt16,
            Self::U32 => DataType::UInt32,
            Self::U64 => DataType::UInt64,
            Self::F32 => DataType::Float32,
            Self::ListU16 => list(DataType::UInt16),
            Self::ListU32 => list(DataType::UInt32),
            Self::Text => DataType::Utf8,
            Self::Bytes16 => DataType::FixedSizeBinary(16),
        }
    }

    /// Bytes of a value, or of an item of a value.
    pub(crate) fn width(self) -> usize {
        match self {
            Self::U8 | Self::Text => 1,
            Self::I16 | Self::U16 | Self::ListU16 => 2,
            Self::U32 | Self::F32 | Self::ListU32 => 4,
            Self::U64 => 8,
            Self::Bytes16 => 16,
        }
    }

    /// The type that a footer names.
    pub(crate) fn arrow_type(self) -> arrow_ipc::Type {
        match self {
            Self::U8 | Self::I16 | Self::U16 | Self::U32 | Self::U64 => arrow_ipc::Type::Int,
            Self::F32 => arrow_ipc::Type::FloatingPoint,
            Self::ListU16 | Self::ListU32 => arrow_ipc::Type::List,
            Self::Text => arrow_ipc::Type::Utf8,
            Self::Bytes16 => arrow_ipc::Type::FixedSizeBinary,
        }
    }

    pub(crate) fn has_offsets(self) -> bool {
        matches!(self, Self::ListU16 | Self::ListU32 | Self::Text)
    }
}

/// Name and type of a column.
pub type ColumnSpec = (String, Kind);

/// Encode a data file with these columns: its bytes and its entry for the manifest.
///
/// # Panics
/// If the arrays do not have the types and lengths of `columns`. The caller has checked its input.
pub fn encode(name: String, columns: &[ColumnSpec], arrays: Vec<ArrayRef>) -> (Vec<u8>, FileEntry) {
    let fields: Vec<Field> =
        columns.iter().map(|(name, kind)| Field::new(name, kind.data_type(), false)).collect();
    let schema = Arc::new(Schema::new(fields));
    let payload: usize = arrays.iter().map(arrow_array::Array::get_array_memory_size).sum();
    let bytes = Vec::with_capacity(payload + payload / 256 + 16 * 1024);
    let arrow = (|| {
        let batch = RecordBatch::try_new(schema.clone(), arrays)?;
        let mut writer = FileWriter::try_new(bytes, &schema)?;
        writer.write(&batch)?;
        writer.finish()?;
        writer.into_inner()
    })();
    let mut bytes = arrow.expect("arrays match their schema, and memory takes every write");

    let footer_start = bytes.len() - 10 - trailing_footer_len(&bytes);
    let footer = bytes.split_off(footer_start);
    bytes.resize(footer_start.next_multiple_of(8), 0);
    let tail = bytes.len();
    let sums: Vec<u64> = block_sums(&bytes).collect();
    bytes.extend_from_slice(bytemuck::cast_slice(&sums));
    bytes.extend_from_slice(&footer);
    let entry = FileEntry {
        name,
        length: bytes.len() as u64,
        tail: tail as u64,
        sum: sum64(bytes.get(tail..).unwrap_or_default()),
    };
    (bytes, entry)
}

/// The length of the footer, which an Arrow file stores before its closing magic bytes.
pub(crate) fn trailing_footer_len(bytes: &[u8]) -> usize {
    let end: Option<&[u8; 10]> = bytes.last_chunk();
    end.map_or(0, |&[a, b, c, d, ..]| u32::from_le_bytes([a, b, c, d]) as usize)
}
