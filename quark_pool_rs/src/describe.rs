//! Counts and statistics of a snapshot, for people.

use rayon::prelude::*;

use crate::error::Result;
use crate::parts::{Column, Extent};
use crate::snapshot::Snapshot;
use crate::threads::parallel;

/// Counts and statistics of a snapshot.
#[derive(Debug, Clone, PartialEq)]
pub struct Description {
    /// Ids are below this.
    pub num_samples: u64,
    /// Ids below this were removed.
    pub num_removed: u64,
    /// Prompts.
    pub num_prompts: u64,
    /// Segment files.
    pub num_segments: u64,
    /// Bytes of all live data files.
    pub num_bytes: u64,
    /// Score columns in order of appearance.
    pub columns: Vec<ColumnDescription>,
}

/// Statistics of a score column.
#[derive(Debug, Clone, PartialEq)]
pub struct ColumnDescription {
    /// Its name.
    pub name: String,
    /// Samples with a score.
    pub scored: u64,
    /// Samples without.
    pub unscored: u64,
    /// Sorted runs.
    pub num_runs: u64,
    /// 1 for the first scores under this name; each re-scoring adds 1.
    pub version: u32,
    /// Describes the scorer, if the scores were added after their samples; else empty.
    pub source: String,
    /// NaN when nothing is scored.
    pub mean: f64,
    /// Population standard deviation; NaN if nothing is scored.
    pub std: f64,
    /// NaN when nothing is scored.
    pub min: f32,
    /// NaN when nothing is scored.
    pub max: f32,
}

/// Describe a snapshot, with one pass over its scores.
///
/// # Errors
/// `Corrupted`, `Io`.
pub fn describe(snapshot: &Snapshot) -> Result<Description> {
    Ok(Description {
        num_samples: snapshot.num_samples,
        num_removed: snapshot.num_removed,
        num_prompts: u64::from(snapshot.num_prompts),
        num_segments: snapshot.segments.len() as u64,
        num_bytes: snapshot.files().map(|file| file.length).sum(),
        columns: snapshot
            .columns
            .iter()
            .map(|column| describe_column(snapshot, column))
            .collect::<Result<_>>()?,
    })
}

fn describe_column(snapshot: &Snapshot, column: &Column) -> Result<ColumnDescription> {
    // Add per extent in id order, so that the mean does not depend on the number of threads.
    let part = |extent: &Extent| {
        let scores = extent.scores(&snapshot.context, 0..extent.count())?;
        let scored = scores.iter().copied().filter(|score| !score.is_nan());
        let sums = scored
            .clone()
            .fold((0.0, f32::INFINITY, f32::NEG_INFINITY), |(sum, min, max), score| {
                (sum + f64::from(score), score.min(min), score.max(max))
            });
        // Squares around the extent's mean, which keeps precision if the scores are far from 0.
        let mean = sums.0 / extent.entry.scored.max(1) as f64;
        let squares: f64 = scored.map(|score| (f64::from(score) - mean).powi(2)).sum();
        Ok((sums, extent.entry.scored as f64, mean, squares))
    };
    let parts = parallel(|| column.extents.par_iter().map(part).collect::<Result<Vec<_>>>())?;
    let (sum, min, max) = parts
        .iter()
        .map(|part| part.0)
        .fold((0.0, f32::INFINITY, f32::NEG_INFINITY), |a: (f64, f32, f32), b| {
            (a.0 + b.0, a.1.min(b.1), a.2.max(b.2))
        });
    let is_empty = column.scored == 0;
    let mean = sum / column.scored as f64;
    let squares: f64 =
        parts.iter().map(|(_, count, own, squares)| squares + count * (own - mean).powi(2)).sum();
    Ok(ColumnDescription {
        name: column.name.clone(),
        scored: column.scored,
        unscored: snapshot.num_samples - snapshot.num_removed - column.scored,
        num_runs: column.runs.len() as u64,
        version: column.version,
        source: column.source.clone(),
        mean,
        std: (squares / column.scored as f64).sqrt(),
        min: if is_empty { f32::NAN } else { min },
        max: if is_empty { f32::NAN } else { max },
    })
}
