//! From sample ids to padded arrays.
//!
//! In stages over the whole batch, so that the memory of one stage is on its way while the next sample's
//! is asked for: ids, rows, spans, tokens.

use crate::datafile::DataFile;
use crate::error::Result;
use crate::segment::{Tokens, column, prompt_column};
use crate::snapshot::Snapshot;

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

/// Where a token list lies.
struct Place<'a> {
    file: &'a DataFile,
    start: usize,
    end: usize,
}

impl Place<'_> {
    fn len(&self) -> usize {
        self.end - self.start
    }
}

/// The token ids of some samples.
///
/// # Errors
/// `UnknownSample`, `Corrupted`, `Io`.
pub fn gather(snapshot: &Snapshot, ids: &[u64], pad_id: i64) -> Result<Gathered> {
    let home = &snapshot.home;
    let rows = ids
        .iter()
        .map(|&id| {
            snapshot.check_id(id)?;
            let (segment, row) = snapshot.locate(id);
            let file = segment.open(home)?;
            file.prefetch_row(column::COMPLETION, row);
            file.prefetch_row(column::PROMPT, row);
            Ok((file, row))
        })
        .collect::<Result<Vec<_>>>()?;
    let completions = rows
        .iter()
        .map(|&(file, row)| {
            let span = file.span(column::COMPLETION, row)?;
            file.prefetch_items(column::COMPLETION, &span);
            Ok(Place { file, start: span.start, end: span.end })
        })
        .collect::<Result<Vec<_>>>()?;
    let prompt_rows = rows
        .iter()
        .map(|&(file, row)| {
            let (table, row) = snapshot.locate_prompt(file.value(column::PROMPT, row)?)?;
            let file = table.open(home)?;
            file.prefetch_row(prompt_column::TOKENS, row);
            Ok((file, row))
        })
        .collect::<Result<Vec<_>>>()?;
    let prompts = prompt_rows
        .iter()
        .map(|&(file, row)| {
            let span = file.span(prompt_column::TOKENS, row)?;
            file.prefetch_items(prompt_column::TOKENS, &span);
            Ok(Place { file, start: span.start, end: span.end })
        })
        .collect::<Result<Vec<_>>>()?;

    let token_bytes = home.settings.token_bytes;
    let (prompts, prompt_width, prompt_lengths) =
        pad(&prompts, prompt_column::TOKENS, token_bytes, pad_id, true)?;
    let (completions, completion_width, completion_lengths) =
        pad(&completions, column::COMPLETION, token_bytes, pad_id, false)?;
    Ok(Gathered {
        prompts,
        prompt_width,
        prompt_lengths,
        completions,
        completion_width,
        completion_lengths,
    })
}

fn pad(
    places: &[Place<'_>],
    column: usize,
    token_bytes: u8,
    pad_id: i64,
    on_the_left: bool,
) -> Result<(Vec<i64>, usize, Vec<i32>)> {
    let width = places.iter().map(Place::len).max().unwrap_or(0);
    let mut out = Vec::with_capacity(places.len() * width);
    for place in places {
        let tokens = Tokens::read(place.file, column, token_bytes, place.start..place.end)?;
        let padding = std::iter::repeat_n(pad_id, width - place.len());
        if on_the_left {
            out.extend(padding);
            tokens.widen_into(&mut out);
        } else {
            tokens.widen_into(&mut out);
            out.extend(padding);
        }
    }
    Ok((out, width, places.iter().map(|place| place.len() as i32).collect()))
}
