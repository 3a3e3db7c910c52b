//! From sample ids to token ids, padded or packed.
//!
//! In stages over the whole batch, so that the memory of one stage is on its way while the next sample's
//! is asked for: ids, rows, spans, tokens. Nothing is written before every span is known, and what is
//! written goes straight to where the caller wants it.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::marker::PhantomData;

use bytemuck::Pod;

use crate::columns::column;
use crate::datafile::DataFile;
use crate::error::{PoolError, Result};
use crate::memory::ensure;
use crate::processor::{self, Kernel};
use crate::segment::prompt_column;
use crate::snapshot::Snapshot;

/// A type of token ids in memory.
pub trait TokenId: Copy + Default + Send + Sync + TryFrom<i64> {
    /// A stored token id; those are below the vocabulary's size.
    fn of(token: u32) -> Self;
}

impl TokenId for i64 {
    #[inline(always)]
    fn of(token: u32) -> Self {
        Self::from(token)
    }
}

impl TokenId for i32 {
    #[inline(always)]
    fn of(token: u32) -> Self {
        token as Self
    }
}

/// On which side of a row the padding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Padding {
    /// Prompts.
    Left,
    /// Completions.
    Right,
}

/// Where a token list lies.
struct Place<'a> {
    file: &'a DataFile,
    start: usize,
    end: usize,
}

impl Place<'_> {
    #[inline]
    fn len(&self) -> usize {
        self.end - self.start
    }
}

/// Token lists that were found and not read yet.
pub struct TokenLists<'a> {
    places: Vec<Place<'a>>,
    column: usize,
    is_narrow: bool,
    width: usize,
    total: usize,
}

impl<'a> TokenLists<'a> {
    /// Those of some rows, which were prefetched.
    fn find(snapshot: &Snapshot, rows: &[(&'a DataFile, usize)], column: usize) -> Result<Self> {
        let is_narrow = snapshot.context.settings.token_bytes == 2;
        let places = Vec::with_capacity(rows.len());
        let mut lists = Self { places, column, is_narrow, width: 0, total: 0 };
        for &(file, row) in rows {
            let span = file.span(column, row)?;
            file.prefetch_items(column, &span);
            lists.width = lists.width.max(span.len());
            lists.total += span.len();
            lists.places.push(Place { file, start: span.start, end: span.end });
        }
        Ok(lists)
    }

    /// Length of the longest.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Token ids in all of them.
    pub fn total(&self) -> usize {
        self.total
    }

    /// [B] lengths.
    pub fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.places.iter().map(Place::len)
    }

    /// Fill `out`, [B, `width`], row by row.
    ///
    /// # Errors
    /// `Corrupted`.
    ///
    /// # Panics
    /// If `out` is shorter.
    pub fn pad_into<T: TokenId>(&self, padding: Padding, pad_id: T, out: &mut [T]) -> Result<()> {
        if self.width == 0 {
            return Ok(());
        }
        let (out, blank) = (&mut out[..self.places.len() * self.width], pad_id);
        if self.is_narrow {
            processor::run(Pad::<u16, T> { lists: self, padding, blank, out, stored: PhantomData })
        } else {
            processor::run(Pad::<u32, T> { lists: self, padding, blank, out, stored: PhantomData })
        }
    }

    /// Fill `out`, [`total`], with one list after another, and `offsets`, [B + 1].
    ///
    /// # Errors
    /// `Corrupted`.
    ///
    /// # Panics
    /// If `out` or `offsets` are shorter.
    pub fn pack_into<T: TokenId>(&self, out: &mut [T], offsets: &mut [i64]) -> Result<()> {
        let mut end = 0;
        offsets[0] = 0;
        for (place, offset) in self.places.iter().zip(&mut offsets[1..]) {
            let start = end;
            end += place.len();
            *offset = end as i64;
            self.copy(place, &mut out[start..end])?;
        }
        Ok(())
    }

    #[cold]
    fn pad_row<T: TokenId>(
        &self,
        place: &Place<'_>,
        padding: Padding,
        pad_id: T,
        row: &mut [T],
    ) -> Result<()> {
        let (blank, tokens) = match padding {
            Padding::Left => row.split_at_mut(self.width - place.len()),
            Padding::Right => {
                let (tokens, blank) = row.split_at_mut(place.len());
                (blank, tokens)
            }
        };
        blank.fill(pad_id);
        self.copy(place, tokens)
    }

    #[inline(always)]
    fn copy<T: TokenId>(&self, place: &Place<'_>, out: &mut [T]) -> Result<()> {
        let span = place.start..place.end;
        if self.is_narrow {
            widen(place.file.items::<u16>(self.column, span)?, out);
        } else {
            widen(place.file.items::<u32>(self.column, span)?, out);
        }
        Ok(())
    }
}

/// Fills a padded matrix from lists of `S`.
struct Pad<'a, S, T> {
    lists: &'a TokenLists<'a>,
    padding: Padding,
    blank: T,
    out: &'a mut [T],
    stored: PhantomData<S>,
}

impl<S: Pod + Into<u32>, T: TokenId> Kernel for Pad<'_, S, T> {
    type Output = Result<()>;

    #[inline(always)]
    fn run(self) -> Result<()> {
        let Self { lists, padding, blank, out, .. } = self;
        let width = lists.width;
        for (place, row) in lists.places.iter().zip(out.chunks_exact_mut(width)) {
            let len = place.len();
            // As many stored tokens as the row is wide, so that no step depends on the list's length; what
            // is beyond the list is not used.
            let window = match padding {
                Padding::Right => Some(place.start..place.start + width),
                Padding::Left => place.end.checked_sub(width).map(|start| start..place.end),
            };
            let window = window.and_then(|window| place.file.window::<S>(lists.column, window));
            match (window, padding) {
                (Some(tokens), Padding::Right) => {
                    for (i, (out, &token)) in row.iter_mut().zip(tokens).enumerate() {
                        *out = if i < len { T::of(token.into()) } else { blank };
                    }
                }
                (Some(tokens), Padding::Left) => {
                    for (i, (out, &token)) in row.iter_mut().zip(tokens).enumerate() {
                        *out = if i >= width - len { T::of(token.into()) } else { blank };
                    }
                }
                (None, _) => lists.pad_row(place, padding, blank, row)?,
            }
        }
        Ok(())
    }
}

#[inline]
fn widen<S: Pod + Into<u32>, T: TokenId>(tokens: &[S], out: &mut [T]) {
    for (out, &token) in out.iter_mut().zip(tokens) {
        *out = T::of(token.into());
    }
}

/// The prompts and completions of some samples, found and not read yet.
pub struct Located<'a> {
    /// One for each sample, however many share it.
    pub prompts: TokenLists<'a>,
    /// As sampled.
    pub completions: TokenLists<'a>,
}

/// What finding a sample's token ids takes, and their lengths or offsets.
const BYTES_PER_PLACE: u128 = 128;

/// Find the token ids of some samples.
///
/// # Errors
/// `UnknownSample`, `Corrupted`, `Io`.
pub fn locate<'a>(snapshot: &'a Snapshot, ids: &[u64]) -> Result<Located<'a>> {
    let context = &snapshot.context;
    let finder = snapshot.finder();
    ensure(ids.len() as u128 * BYTES_PER_PLACE, || format!("a batch of {} samples", ids.len()))?;
    let mut rows = Vec::with_capacity(ids.len());
    for &id in ids {
        snapshot.check_id(id)?;
        let (segment, row) = finder.locate(id);
        let file = segment.open(context)?;
        file.prefetch_row(column::COMPLETION, row);
        file.prefetch_row(column::PROMPT, row);
        rows.push((file, row));
    }
    let completions = TokenLists::find(snapshot, &rows, column::COMPLETION)?;
    for entry in &mut rows {
        let (segment, row) = *entry;
        let (table, row) = snapshot.locate_prompt(segment.value(column::PROMPT, row)?)?;
        let file = table.open(context)?;
        file.prefetch_row(prompt_column::TOKENS, row);
        *entry = (file, row);
    }
    let prompts = TokenLists::find(snapshot, &rows, prompt_column::TOKENS)?;
    Ok(Located { prompts, completions })
}

/// [B] lengths of the completions of some samples.
///
/// # Errors
/// `UnknownSample`, `Corrupted`, `Io`.
pub fn completion_lengths(snapshot: &Snapshot, ids: &[u64]) -> Result<Vec<u32>> {
    let finder = snapshot.finder();
    let mut rows = Vec::with_capacity(ids.len());
    for &id in ids {
        snapshot.check_id(id)?;
        let (segment, row) = finder.locate(id);
        let file = segment.open(&snapshot.context)?;
        file.prefetch_row(column::COMPLETION, row);
        rows.push((file, row));
    }
    rows.into_iter()
        .map(|(file, row)| Ok(file.span(column::COMPLETION, row)?.len() as u32))
        .collect()
}

/// A padded minibatch, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gathered {
    /// [B, `prompt_width`], left-padded.
    pub prompts: Vec<i64>,
    /// Longest prompt.
    pub prompt_width: usize,
    /// [B]
    pub prompt_lengths: Vec<i32>,
    /// [B, `completion_width`], right-padded.
    pub completions: Vec<i64>,
    /// Longest completion.
    pub completion_width: usize,
    /// [B]
    pub completion_lengths: Vec<i32>,
}

/// The token ids of some samples, padded.
///
/// # Errors
/// `UnknownSample`, `Corrupted`, `Io`.
pub fn gather(snapshot: &Snapshot, ids: &[u64], pad_id: i64) -> Result<Gathered> {
    let Located { prompts, completions } = locate(snapshot, ids)?;
    let cells = |lists: &TokenLists<'_>| ids.len() as u128 * lists.width() as u128;
    ensure(8 * (cells(&prompts) + cells(&completions)), || {
        let (prompts, completions) = (prompts.width(), completions.width());
        format!("a batch of {} samples, padded to {prompts} and {completions} tokens", ids.len())
    })?;
    let padded = |lists: &TokenLists<'_>, padding| {
        let mut out = vec![0; ids.len() * lists.width()];
        lists.pad_into(padding, pad_id, &mut out)?;
        Ok::<_, PoolError>(out)
    };
    let lengths = |lists: &TokenLists<'_>| lists.lengths().map(|length| length as i32).collect();
    Ok(Gathered {
        prompts: padded(&prompts, Padding::Left)?,
        prompt_width: prompts.width(),
        prompt_lengths: lengths(&prompts),
        completions: padded(&completions, Padding::Right)?,
        completion_width: completions.width(),
        completion_lengths: lengths(&completions),
    })
}

/// A packed minibatch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    /// All prompts one after another.
    pub prompts: Vec<i64>,
    /// [B + 1]
    pub prompt_offsets: Vec<i64>,
    /// All completions one after another.
    pub completions: Vec<i64>,
    /// [B + 1]
    pub completion_offsets: Vec<i64>,
}

/// The token ids of some samples, packed.
///
/// # Errors
/// `UnknownSample`, `Corrupted`, `Io`.
pub fn pack(snapshot: &Snapshot, ids: &[u64]) -> Result<Packed> {
    let Located { prompts, completions } = locate(snapshot, ids)?;
    ensure(8 * (prompts.total() as u128 + completions.total() as u128), || {
        format!("a packed batch of {} samples", ids.len())
    })?;
    let packed = |lists: &TokenLists<'_>| {
        let (mut out, mut offsets) = (vec![0; lists.total()], vec![0; ids.len() + 1]);
        lists.pack_into(&mut out, &mut offsets)?;
        Ok::<_, PoolError>((out, offsets))
    };
    let (prompts, prompt_offsets) = packed(&prompts)?;
    let (completions, completion_offsets) = packed(&completions)?;
    Ok(Packed { prompts, prompt_offsets, completions, completion_offsets })
}

/// Token ids in memory of the caller's.
pub enum TokensMut<'a> {
    /// 64-bit signed.
    I64(&'a mut [i64]),
    /// 32-bit signed.
    I32(&'a mut [i32]),
}

/// One side of a batch in memory of the caller's, which may be larger than needed.
pub struct ListsMut<'a> {
    /// What it is called in messages.
    pub name: &'static str,
    /// Filled from the beginning, without gaps.
    pub tokens: TokensMut<'a>,
    /// [B], of padded lists.
    pub lengths: &'a mut [i32],
    /// [B + 1], of packed lists.
    pub offsets: &'a mut [i64],
}

impl ListsMut<'_> {
    /// Write `lists`, padded if there is a `pad_id`; how wide they are then, or how long altogether.
    ///
    /// # Errors
    /// `Invalid` if they do not fit, or the `pad_id` is too large; `Corrupted`.
    pub fn fill(
        &mut self,
        lists: &TokenLists<'_>,
        padding: Padding,
        pad_id: Option<i64>,
    ) -> Result<usize> {
        match &mut self.tokens {
            TokensMut::I64(out) => {
                fill(self.name, out, self.lengths, self.offsets, lists, padding, pad_id)
            }
            TokensMut::I32(out) => {
                fill(self.name, out, self.lengths, self.offsets, lists, padding, pad_id)
            }
        }
    }
}

fn fill<T: TokenId>(
    name: &str,
    out: &mut [T],
    lengths: &mut [i32],
    offsets: &mut [i64],
    lists: &TokenLists<'_>,
    padding: Padding,
    pad_id: Option<i64>,
) -> Result<usize> {
    let rows = lists.places.len();
    let needed = if pad_id.is_some() { rows * lists.width } else { lists.total };
    if out.len() < needed {
        return Err(PoolError::invalid(format!(
            "the buffer for {name} has room for {} token ids; this batch needs {needed}",
            out.len()
        )));
    }
    let Some(pad_id) = pad_id else {
        check_room(name, offsets.len(), rows + 1)?;
        lists.pack_into(out, offsets)?;
        return Ok(lists.total);
    };
    check_room(name, lengths.len(), rows)?;
    let pad_id = T::try_from(pad_id).map_err(|_| {
        PoolError::invalid(format!("pad_id {pad_id} does not fit the type of the buffer"))
    })?;
    lists.pad_into(padding, pad_id, out)?;
    for (out, length) in lengths.iter_mut().zip(lists.lengths()) {
        *out = length as i32;
    }
    Ok(lists.width)
}

/// Refuse a buffer for `what` that is too short.
///
/// # Errors
/// `Invalid`.
pub fn check_room(what: &str, room: usize, needed: usize) -> Result<()> {
    if room < needed {
        return Err(PoolError::invalid(format!(
            "the buffers for {what} have room for {room} rows; this batch needs {needed}"
        )));
    }
    Ok(())
}
