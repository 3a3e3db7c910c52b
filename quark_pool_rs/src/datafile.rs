//! One open data file: a plain Arrow IPC file with a checksum table before its footer.
//!
//! This module does not know what the columns mean. It returns bytes only after their block matched its sum, and
//! slices only after a check of their bounds. Layout: FORMAT.md, "Data files".

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytemuck::Pod;

use crate::checksum::{CheckedBlocks, sum64};
use crate::encoding::{ColumnSpec, FileEntry, Kind, trailing_footer_len};
use crate::error::{PoolError, Result};
use crate::format::BLOCK_BYTES;
use crate::mapping::Region;
use crate::storage::Storage;

/// Where a column lies in its file.
#[derive(Debug, Clone)]
struct Layout {
    kind: Kind,
    /// Bytes of a value, or of an item of a value.
    width: usize,
    /// Values, or items of all values.
    items: usize,
    /// i32 offsets, empty for fixed-width columns.
    offsets: Range<usize>,
    values: Range<usize>,
}

/// Guess from the time since `begin` whether reading `len` bytes needed the disk. A wrong guess costs only a little
/// time. Asking the system which pages are in memory would take as long as reading them.
fn came_from_disk(begin: Instant, len: usize) -> bool {
    /// Mapping and checking a page takes a microsecond from memory, and thirty from a fast disk.
    const SLOWEST_PAGE: Duration = Duration::from_micros(2);
    const FASTEST_DISK: Duration = Duration::from_micros(15);
    begin.elapsed() > FASTEST_DISK + SLOWEST_PAGE * (len / BLOCK_BYTES) as u32
}

/// An open data file.
#[derive(Debug)]
pub struct DataFile {
    name: String,
    region: Region,
    tail: usize,
    sums: Range<usize>,
    checked: CheckedBlocks,
    /// Whether a read needed the disk. If so, later reads are requested ahead.
    is_cold: AtomicBool,
    rows: usize,
    columns: Vec<Layout>,
}

impl DataFile {
    /// Open the file of `entry`, which must have exactly `columns` and `rows` rows.
    ///
    /// # Errors
    /// `Corrupted` if length, checksum of the tail or structure differ from the commit; `Io`.
    pub fn open(
        storage: &dyn Storage,
        entry: &FileEntry,
        columns: &[ColumnSpec],
        rows: u64,
    ) -> Result<Self> {
        let name = &entry.name;
        let damaged = |offset, what: String| PoolError::corrupted(name, offset, what);
        let path = Path::new(name);
        let region = storage.map(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => damaged(0, "the file is missing".to_owned()),
            _ => PoolError::io("map", storage.locate(path))(source),
        })?;
        if region.len() as u64 != entry.length {
            return Err(damaged(
                entry.length.min(region.len() as u64),
                format!("it has {} bytes, not the {} committed", region.len(), entry.length),
            ));
        }
        let tail = usize::try_from(entry.tail).unwrap_or(usize::MAX);
        let sums_len = tail.div_ceil(BLOCK_BYTES).saturating_mul(8);
        let footer_start = tail.saturating_add(sums_len);
        let fits = footer_start.saturating_add(10) <= region.len();
        let Some(summed) = region.get(tail..).filter(|_| fits) else {
            return Err(damaged(entry.tail, "its checksum table does not fit".to_owned()));
        };
        let begin = Instant::now();
        let found = sum64(summed);
        let is_cold = came_from_disk(begin, summed.len());
        if found != entry.sum {
            let what = format!("its tail has the sum {found:016x}, not {:016x}", entry.sum);
            return Err(damaged(entry.tail, what));
        }
        let mut file = Self {
            name: name.clone(),
            checked: CheckedBlocks::new(tail),
            is_cold: AtomicBool::new(is_cold),
            region,
            tail,
            sums: tail..footer_start,
            rows: usize::try_from(rows).unwrap_or(usize::MAX),
            columns: Vec::new(),
        };
        file.columns = file.parse(columns)?;
        Ok(file)
    }

    /// Positions of all buffers, from footer and record batch message.
    fn parse(&self, specs: &[ColumnSpec]) -> Result<Vec<Layout>> {
        let wrong = |what: &str| self.damaged(self.tail, format!("not a table of ours: {what}"));
        let footer_end = self.region.len() - 10;
        let footer_start = footer_end
            .checked_sub(trailing_footer_len(&self.region))
            .filter(|&start| start == self.sums.end)
            .ok_or_else(|| wrong("the footer's length"))?;
        let footer = self.region.get(footer_start..footer_end);
        let footer = footer.and_then(|bytes| arrow_ipc::root_as_footer(bytes).ok());
        let footer = footer.ok_or_else(|| wrong("the footer"))?;

        let fields =
            footer.schema().and_then(|s| s.fields()).ok_or_else(|| wrong("it has no schema"))?;
        if fields.len() != specs.len()
            || fields.iter().zip(specs).any(|(field, (name, kind))| {
                field.name() != Some(name.as_str()) || field.type_type() != kind.arrow_type()
            })
        {
            return Err(wrong("the columns"));
        }

        let blocks = footer.recordBatches().ok_or_else(|| wrong("it has no record batch"))?;
        if blocks.len() != 1 {
            return Err(wrong("the number of record batches"));
        }
        let block = blocks.get(0);
        let metadata = self
            .range(block.offset(), i64::from(block.metaDataLength()), self.tail)
            .filter(|range| range.len() >= 8)
            .ok_or_else(|| wrong("the record batch's place"))?;
        let body = self
            .range(metadata.end as i64, block.bodyLength(), self.tail)
            .ok_or_else(|| wrong("the record batch's length"))?;
        let message = self.bytes(metadata)?.get(8..);
        let message = message.and_then(|bytes| arrow_ipc::root_as_message(bytes).ok());
        let message = message.ok_or_else(|| wrong("the record batch message"))?;
        let batch =
            message.header_as_record_batch().ok_or_else(|| wrong("the kind of the message"))?;
        if batch.length() != self.rows as i64 || batch.compression().is_some() {
            return Err(wrong("the number of rows"));
        }
        let nodes = batch.nodes().ok_or_else(|| wrong("it has no nodes"))?;
        if nodes.iter().any(|node| node.null_count() != 0) {
            return Err(wrong("it has nulls"));
        }

        let buffers = batch.buffers().ok_or_else(|| wrong("it has no buffers"))?;
        let mut buffers = buffers.iter().map(|buffer| {
            let start = (body.start as i64).checked_add(buffer.offset()).unwrap_or(-1);
            self.range(start, buffer.length(), body.end)
        });
        let mut next = || buffers.next().flatten().ok_or_else(|| wrong("a buffer's place"));
        let mut layouts = Vec::with_capacity(specs.len());
        for &(_, kind) in specs {
            let _validity = next()?;
            let offsets = if kind.has_offsets() { next()? } else { 0..0 };
            let _item_validity =
                if kind == Kind::ListU16 || kind == Kind::ListU32 { next()? } else { 0..0 };
            let values = next()?;
            let fits = if kind.has_offsets() {
                offsets.len() / 4 > self.rows
            } else {
                values.len() / kind.width() >= self.rows
            };
            if !fits || !offsets.start.is_multiple_of(8) || !values.start.is_multiple_of(8) {
                return Err(wrong("a buffer's length or alignment"));
            }
            let width = kind.width();
            layouts.push(Layout { kind, width, items: values.len() / width, offsets, values });
        }
        Ok(layouts)
    }

    fn range(&self, start: i64, len: i64, end: usize) -> Option<Range<usize>> {
        let start = usize::try_from(start).ok()?;
        let stop = start.checked_add(usize::try_from(len).ok()?)?;
        (stop <= end && stop <= self.region.len()).then_some(start..stop)
    }

    fn damaged(&self, offset: usize, what: impl Into<String>) -> PoolError {
        PoolError::corrupted(&self.name, offset as u64, what)
    }
}

/// Reading. The positions of columns and rows were checked when the file was opened.
#[expect(clippy::indexing_slicing, reason = "a row costs nanoseconds, and its bounds are asserted")]
impl DataFile {
    /// Checked bytes. `range` must end before the tail.
    #[inline(always)]
    fn bytes(&self, range: Range<usize>) -> Result<&[u8]> {
        if !self.checked.covers(&range) {
            self.check(range.clone())?;
        }
        Ok(&self.region[range])
    }

    #[cold]
    fn check(&self, range: Range<usize>) -> Result<()> {
        if range.len() > BLOCK_BYTES {
            self.region.will_need(range.clone());
        }
        let (data, sums) = (&self.region[..self.tail], &self.region[self.sums.clone()]);
        let (begin, len) = (Instant::now(), range.len() + 2 * BLOCK_BYTES);
        self.checked.check(data, sums, range).map_err(|block| {
            self.damaged(block * BLOCK_BYTES, "a block of 4096 bytes does not match its sum")
        })?;
        if came_from_disk(begin, len) {
            self.is_cold.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Type of a column.
    #[inline(always)]
    pub fn kind(&self, column: usize) -> Kind {
        self.columns[column].kind
    }

    /// Name with its directory.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Values of a fixed-width column.
    ///
    /// # Errors
    /// `Corrupted`.
    ///
    /// # Panics
    /// If `rows` are not rows of the file or `T` is not the column's type.
    #[inline(always)]
    pub fn values<T: Pod>(&self, column: usize, rows: Range<usize>) -> Result<&[T]> {
        let layout = &self.columns[column];
        let width = size_of::<T>();
        debug_assert!(width == layout.kind.width() && !layout.kind.has_offsets());
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows outside the file");
        let start = layout.values.start;
        Ok(bytemuck::cast_slice(self.bytes(start + rows.start * width..start + rows.end * width)?))
    }

    /// One value of a fixed-width column.
    ///
    /// # Errors
    /// `Corrupted`.
    ///
    /// # Panics
    /// As [`DataFile::values`].
    #[inline(always)]
    pub fn value<T: Pod>(&self, column: usize, row: usize) -> Result<T> {
        Ok(self.values::<T>(column, row..row + 1)?[0])
    }

    /// The span of a row's items among all items of a column with offsets.
    ///
    /// # Errors
    /// `Corrupted`.
    ///
    /// # Panics
    /// If `row` is not a row of the file.
    #[inline(always)]
    pub fn span(&self, column: usize, row: usize) -> Result<Range<usize>> {
        let layout = &self.columns[column];
        assert!(row < self.rows && layout.kind.has_offsets(), "not a row with items");
        let at = layout.offsets.start + row * 4;
        let pair: &[i32] = bytemuck::cast_slice(self.bytes(at..at + 8)?);
        match (usize::try_from(pair[0]), usize::try_from(pair[1])) {
            (Ok(start), Ok(end)) if start <= end && end <= layout.items => Ok(start..end),
            _ => Err(self.no_span(at, pair)),
        }
    }

    #[cold]
    fn no_span(&self, at: usize, pair: &[i32]) -> PoolError {
        self.damaged(at, format!("offsets {} .. {} are no span", pair[0], pair[1]))
    }

    /// The items of a span from [`DataFile::span`].
    ///
    /// # Errors
    /// `Corrupted`.
    ///
    /// # Panics
    /// If the span is not one of this column's, or `T` is not the items' type.
    #[inline(always)]
    pub fn items<T: Pod>(&self, column: usize, span: Range<usize>) -> Result<&[T]> {
        let layout = &self.columns[column];
        let width = size_of::<T>();
        debug_assert_eq!(width, layout.kind.width());
        let start = layout.values.start;
        let range = start + span.start * width..start + span.end * width;
        assert!(range.end <= layout.values.end, "span outside the column");
        Ok(bytemuck::cast_slice(self.bytes(range)?))
    }

    /// Some items of a column, if they exist and their blocks have already been checked.
    ///
    /// # Panics
    /// If `T` is not the items' type.
    #[inline(always)]
    pub fn window<T: Pod>(&self, column: usize, items: Range<usize>) -> Option<&[T]> {
        let layout = &self.columns[column];
        let width = size_of::<T>();
        debug_assert_eq!(width, layout.kind.width());
        let start = layout.values.start;
        let range = start + items.start * width..start + items.end * width;
        (range.end <= layout.values.end && self.checked.covers(&range))
            .then(|| bytemuck::cast_slice(&self.region[range]))
    }

    /// The text of a row.
    ///
    /// # Errors
    /// `Corrupted`.
    ///
    /// # Panics
    /// If `row` is not a row of the file.
    pub fn text(&self, column: usize, row: usize) -> Result<&str> {
        let span = self.span(column, row)?;
        let at = self.columns[column].values.start + span.start;
        std::str::from_utf8(self.items(column, span)?)
            .map_err(|_| self.damaged(at, "a text is not UTF-8"))
    }

    /// Prefetch a row's value or offsets.
    #[inline(always)]
    pub fn prefetch_row(&self, column: usize, row: usize) {
        let layout = &self.columns[column];
        let at = if layout.kind.has_offsets() {
            layout.offsets.start + row * 4
        } else {
            layout.values.start + row * layout.width
        };
        if self.checked.is_checked(at / BLOCK_BYTES) {
            self.region.prefetch(at);
        } else if self.is_cold.load(Ordering::Relaxed) {
            let block = at / BLOCK_BYTES * BLOCK_BYTES;
            self.region.will_need(block..self.region.len().min(block + BLOCK_BYTES));
        }
    }

    /// Prefetch the first items of a span. Ask the system for them if this process has not read them before.
    #[inline(always)]
    pub fn prefetch_items(&self, column: usize, span: &Range<usize>) {
        let layout = &self.columns[column];
        let at = layout.values.start + span.start * layout.width;
        let end = layout.values.start + span.end * layout.width;
        if at >= end {
            return;
        }
        if self.checked.is_checked(at / BLOCK_BYTES) {
            self.region.prefetch(at);
            self.region.prefetch((at + 63).max(end - 1));
        } else if self.is_cold.load(Ordering::Relaxed) {
            self.region.will_need(at / BLOCK_BYTES * BLOCK_BYTES..end.min(self.region.len()));
        }
    }

    /// Check every block that was not checked before, and report each damaged one.
    pub fn check_all(&self, mut report: impl FnMut(PoolError)) {
        self.region.will_be_read_through();
        for start in (0..self.tail).step_by(BLOCK_BYTES) {
            if let Err(error) = self.bytes(start..start + 1) {
                report(error);
            }
        }
    }
}

/// A data file that is opened on first use.
#[derive(Debug)]
pub struct LazyFile {
    /// Its entry in the manifest.
    pub entry: FileEntry,
    opened: OnceLock<Arc<DataFile>>,
}

impl LazyFile {
    /// A file that is not open yet.
    pub fn new(entry: FileEntry) -> Self {
        Self { entry, opened: OnceLock::new() }
    }

    /// Share the open file of another handle, if it has one.
    pub fn adopt(&self, other: &Self) {
        if self.entry == other.entry
            && let Some(file) = other.opened.get()
        {
            let _ = self.opened.set(file.clone());
        }
    }

    /// The file, opened if necessary. If opening fails, the next call tries again.
    ///
    /// # Errors
    /// As [`DataFile::open`].
    #[inline(always)]
    pub fn get(
        &self,
        storage: &dyn Storage,
        columns: impl FnOnce() -> Vec<ColumnSpec>,
        rows: u64,
    ) -> Result<&DataFile> {
        if let Some(file) = self.opened.get() {
            return Ok(file);
        }
        self.open(storage, &columns(), rows)
    }

    #[cold]
    fn open(&self, storage: &dyn Storage, columns: &[ColumnSpec], rows: u64) -> Result<&DataFile> {
        let file = Arc::new(DataFile::open(storage, &self.entry, columns, rows)?);
        Ok(self.opened.get_or_init(|| file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::encode;
    use crate::storage::FileStorage;
    use arrow_array::{ArrayRef, StringArray, UInt32Array};

    fn example() -> (Vec<ColumnSpec>, Vec<u8>, FileEntry) {
        let columns = vec![("n".to_owned(), Kind::U32), ("t".to_owned(), Kind::Text)];
        let arrays: Vec<ArrayRef> = vec![
            Arc::new(UInt32Array::from_iter_values(0..2000)),
            Arc::new(StringArray::from_iter_values((0..2000).map(|i| format!("text {i}")))),
        ];
        let (bytes, entry) = encode(crate::format::segment_name(0, 1), &columns, arrays);
        (columns, bytes, entry)
    }

    fn open(bytes: &[u8], entry: &FileEntry, columns: &[ColumnSpec]) -> Result<DataFile> {
        let folder = tempfile::tempdir().unwrap();
        let storage = FileStorage::new(folder.path());
        storage.create_dir(Path::new("segments")).unwrap();
        storage.create(Path::new(&entry.name)).unwrap().write_all(bytes).unwrap();
        DataFile::open(&storage, entry, columns, 2000)
    }

    #[test]
    fn what_was_encoded_is_read_back() {
        let (columns, bytes, entry) = example();
        let file = open(&bytes, &entry, &columns).unwrap();
        assert_eq!(file.values::<u32>(0, 1990..2000).unwrap()[9], 1999);
        assert_eq!(file.text(1, 1234).unwrap(), "text 1234");
        assert_eq!(file.span(1, 0).unwrap(), 0..6);
        file.check_all(|error| panic!("{error}"));
    }

    #[test]
    fn an_arrow_reader_opens_it() {
        let (_, bytes, _) = example();
        let reader =
            arrow_ipc::reader::FileReader::try_new(std::io::Cursor::new(bytes), None).unwrap();
        assert_eq!(reader.map(|batch| batch.unwrap().num_rows()).sum::<usize>(), 2000);
    }

    #[test]
    fn another_schema_or_length_is_damage() {
        let (mut columns, bytes, entry) = example();
        assert!(matches!(
            open(&bytes[..bytes.len() - 1], &entry, &columns),
            Err(PoolError::Corrupted { .. })
        ));
        columns[0].1 = Kind::F32;
        assert!(matches!(open(&bytes, &entry, &columns), Err(PoolError::Corrupted { .. })));
    }
}
