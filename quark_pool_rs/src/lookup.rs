//! Samples, prompts and scores of a snapshot, by id.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::sync::Arc;

use bytemuck::Pod;
use rayon::prelude::*;

use crate::columns::{COLUMNS, SampleNumbers, column};
use crate::error::{PoolError, Result};
use crate::memory::ensure;
use crate::parts::{Column, Extent, PromptTable, Segment};
use crate::segment::{Tokens, prompt_column, text_position};
use crate::snapshot::Snapshot;
use crate::threads::parallel;

impl Snapshot {
    /// Refuse an id that the snapshot lacks.
    ///
    /// # Errors
    /// `UnknownSample`.
    #[inline(always)]
    pub fn check_id(&self, id: u64) -> Result<()> {
        let Self { num_removed, num_samples, .. } = *self;
        if id.wrapping_sub(num_removed) < num_samples - num_removed {
            Ok(())
        } else {
            Err(PoolError::UnknownSample { id, num_removed, num_samples })
        }
    }

    /// Segment and row of a sample that the snapshot has.
    pub fn locate(&self, id: u64) -> (&Segment, usize) {
        self.finder().locate(id)
    }

    /// For looking up many samples.
    pub fn finder(&self) -> Finder<'_> {
        let segments = self.first_ids.len() as u128;
        let size = (self.num_samples - self.num_removed).max(1);
        let per_sample = (segments << 64) / u128::from(size);
        Finder { snapshot: self, per_sample: u64::try_from(per_sample).unwrap_or(u64::MAX) }
    }

    /// Prompt file and row of a prompt.
    ///
    /// # Errors
    /// `Corrupted` if the snapshot lacks it: a segment named it.
    #[inline(always)]
    pub fn locate_prompt(&self, prompt: u32) -> Result<(&PromptTable, usize)> {
        if prompt >= self.num_prompts {
            return Err(PoolError::corrupted(
                "segments",
                0,
                format!("a sample names prompt {prompt} of {}", self.num_prompts),
            ));
        }
        let at = self.first_prompts.partition_point(|&first| first <= prompt) - 1;
        Ok((&self.prompts[at], (prompt - self.first_prompts[at]) as usize))
    }

    /// Token ids of a prompt.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    pub fn prompt_tokens(&self, prompt: u32) -> Result<Tokens<'_>> {
        let (table, row) = self.locate_prompt(prompt)?;
        let file = table.open(&self.context)?;
        let span = file.span(prompt_column::TOKENS, row)?;
        Tokens::read(file, prompt_column::TOKENS, self.context.settings.token_bytes, span)
    }

    /// A score column.
    ///
    /// # Errors
    /// `UnknownColumn`.
    pub fn column(&self, name: &str) -> Result<&Column> {
        self.columns.iter().find(|c| c.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.columns.iter().map(|c| c.name.as_str()).collect();
            PoolError::UnknownColumn {
                name: name.to_owned(),
                known: if names.is_empty() { "none".to_owned() } else { names.join(", ") },
            }
        })
    }

    /// A fixed-width column of the segments in id order into `out`, which has the length of the snapshot.
    /// What `out` says of samples that were removed stays, and all of it where the pool's version lacks the column.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    pub fn copy_column<T: Pod + Send + Sync>(&self, column: usize, out: &mut [T]) -> Result<()> {
        if !COLUMNS[column].is_in(&self.context.settings) {
            return Ok(());
        }
        let mut rest = &mut out[self.num_removed as usize..];
        let mut parts = Vec::with_capacity(self.segments.len());
        for segment in &self.segments {
            let (part, tail) = rest.split_at_mut(segment.entry.count as usize);
            parts.push((segment, part));
            rest = tail;
        }
        let copy = |(segment, part): (&Arc<Segment>, &mut [T])| {
            let rows = 0..part.len();
            part.copy_from_slice(segment.open(&self.context)?.values(column, rows)?);
            Ok(())
        };
        parallel(|| parts.into_par_iter().try_for_each(copy))
    }

    /// Scores in id order into `out`, which has the length of the snapshot.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    pub fn copy_scores(&self, column: &Column, out: &mut [f32]) -> Result<()> {
        out.fill(f32::NAN);
        for extent in &column.extents {
            let at = extent.first() as usize;
            out[at..at + extent.count()]
                .copy_from_slice(extent.scores(&self.context, 0..extent.count())?);
        }
        Ok(())
    }

    /// Scores of some samples into `out`, which has the same length.
    ///
    /// # Errors
    /// `UnknownSample`, `Corrupted`, `Io`.
    pub fn scores_of(&self, column: &Column, ids: &[u64], out: &mut [f32]) -> Result<()> {
        let bytes = ids.len() as u128 * size_of::<(Option<&Extent>, u64)>() as u128;
        ensure(bytes, || format!("the scores of {} samples", ids.len()))?;
        // In stages, so that the lines of the second are on their way.
        let finder = self.finder();
        let mut places = Vec::with_capacity(ids.len());
        for &id in ids {
            self.check_id(id)?;
            let extent = finder.extent(column, id);
            if let Some(extent) = extent {
                extent.prefetch_score(&self.context, (id - extent.first()) as usize)?;
            }
            places.push((extent, id));
        }
        for ((extent, id), out) in places.into_iter().zip(out) {
            *out = match extent {
                None => f32::NAN,
                Some(extent) => {
                    let row = (id - extent.first()) as usize;
                    extent.scores(&self.context, row..row + 1)?[0]
                }
            };
        }
        Ok(())
    }

    /// Samples with all their columns, in the order of `ids`.
    ///
    /// # Errors
    /// `UnknownSample`, `Corrupted`, `Io`, `Memory`.
    pub fn samples(&self, ids: &[u64]) -> Result<Vec<Sample>> {
        let mut bytes = 0;
        for &id in ids {
            bytes += self.sample_bytes(id)?;
        }
        // The samples, and the copies that their reader owns.
        ensure(2 * bytes, || format!("{} samples with their texts and tokens", ids.len()))?;
        ids.iter().map(|&id| self.sample(id)).collect()
    }

    /// The memory of a sample with all its columns.
    fn sample_bytes(&self, id: u64) -> Result<u128> {
        self.check_id(id)?;
        let settings = &self.context.settings;
        let (segment, row) = self.locate(id);
        let file = segment.open(&self.context)?;
        let (table, prompt_row) =
            self.locate_prompt(SampleNumbers::read(file, row, settings)?.prompt)?;
        let prompts = table.open(&self.context)?;
        let mut tokens = file.span(column::COMPLETION, row)?.len();
        tokens += prompts.span(prompt_column::TOKENS, prompt_row)?.len();
        let mut bytes = size_of::<Sample>() + tokens * size_of::<u32>();
        for text in [prompt_column::TEXT, prompt_column::METADATA] {
            bytes += prompts.span(text, prompt_row)?.len();
        }
        if settings.store_text {
            bytes += file.span(text_position(settings), row)?.len();
        }
        for column in &self.columns {
            bytes += size_of::<(String, f32)>() + column.name.len();
        }
        Ok(bytes as u128)
    }

    /// A sample with all its columns.
    ///
    /// # Errors
    /// `UnknownSample`, `Corrupted`, `Io`.
    pub fn sample(&self, id: u64) -> Result<Sample> {
        self.check_id(id)?;
        let settings = &self.context.settings;
        let (segment, row) = self.locate(id);
        let file = segment.open(&self.context)?;
        let numbers = SampleNumbers::read(file, row, settings)?;
        let (table, prompt_row) = self.locate_prompt(numbers.prompt)?;
        let prompts = table.open(&self.context)?;
        let span = file.span(column::COMPLETION, row)?;
        let sampling = numbers.settings;
        let sampling = self.sampling_settings.get(sampling as usize).ok_or_else(|| {
            let what = format!("sampling settings {sampling} are unknown");
            PoolError::corrupted(file.name(), 0, what)
        })?;
        let text = settings.store_text.then(|| file.text(text_position(settings), row));
        Ok(Sample {
            id,
            prompt_text: prompts.text(prompt_column::TEXT, prompt_row)?.to_owned(),
            prompt_tokens: self.prompt_tokens(numbers.prompt)?.to_vec(),
            prompt_metadata: prompts.text(prompt_column::METADATA, prompt_row)?.to_owned(),
            completion_tokens: Tokens::read(file, column::COMPLETION, settings.token_bytes, span)?
                .to_vec(),
            completion_text: text.transpose()?.map(str::to_owned),
            settings: sampling.clone(),
            numbers,
            scores: self
                .columns
                .iter()
                .filter_map(|c| self.finder().extent(c, id).map(|extent| (c, extent)))
                .map(|(c, extent)| {
                    let row = (id - extent.first()) as usize;
                    Ok((c.name.clone(), extent.scores(&self.context, row..row + 1)?[0]))
                })
                .collect::<Result<_>>()?,
        })
    }
}

/// Where samples of a snapshot are, for looking up many.
#[derive(Clone, Copy)]
pub struct Finder<'a> {
    snapshot: &'a Snapshot,
    /// Segments, in 2^64ths.
    per_sample: u64,
}

impl<'a> Finder<'a> {
    /// Segment and row of a sample that the snapshot has.
    #[inline]
    pub fn locate(&self, id: u64) -> (&'a Segment, usize) {
        let at = self.index(id);
        (&self.snapshot.segments[at], (id - self.snapshot.first_ids[at]) as usize)
    }

    /// Appends are mostly alike in size, so the proportional guess is mostly right.
    #[inline]
    fn index(&self, id: u64) -> usize {
        let firsts = &self.snapshot.first_ids[..];
        let place = u128::from(id - self.snapshot.num_removed);
        let guess = ((place * u128::from(self.per_sample)) >> 64) as usize;
        let starts_before = |i: usize| firsts.get(i).is_some_and(|&first| first <= id);
        if starts_before(guess) && !starts_before(guess + 1) {
            return guess;
        }
        firsts.partition_point(|&first| first <= id) - 1
    }

    /// The extent of a column that covers a sample of the snapshot.
    #[inline]
    fn extent<'c>(&self, column: &'c Column, id: u64) -> Option<&'c Extent> {
        let covers = |e: &&Extent| id.wrapping_sub(e.first()) < e.entry.count;
        // Mostly every segment has the column, so that extents and segments run in step.
        let same = column.extents.get(self.index(id)).filter(covers);
        same.or_else(|| {
            let after = column.extents.partition_point(|e| e.first() <= id);
            after.checked_sub(1).map(|i| &column.extents[i]).filter(covers)
        })
    }
}

/// A sample with all its columns.
#[expect(missing_docs, reason = "the fields are the columns of FORMAT.md")]
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub id: u64,
    pub prompt_text: String,
    pub prompt_tokens: Vec<u32>,
    pub prompt_metadata: String,
    pub completion_tokens: Vec<u32>,
    pub completion_text: Option<String>,
    pub settings: Arc<str>,
    pub numbers: SampleNumbers,
    pub scores: Vec<(String, f32)>,
}
