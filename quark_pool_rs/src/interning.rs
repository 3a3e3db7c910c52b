//! Which prompts of a batch a pool has already: each is stored once.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::batch::Batch;
use crate::checksum::sum128;
use crate::error::{PoolError, Result};
use crate::segment::{PromptRow, Tokens, prompt_column};
use crate::snapshot::Snapshot;

/// The prompts of a pool, by the hash of their content.
pub(crate) struct KnownPrompts(ByHash<u32>);

impl KnownPrompts {
    /// Those of a snapshot.
    ///
    /// # Errors
    /// `Corrupted`, `Io`.
    pub(crate) fn read(snapshot: &Snapshot) -> Result<Self> {
        let mut ids = ByHash::default();
        for table in &snapshot.prompts {
            let file = table.open(&snapshot.context)?;
            let hashes: &[[u8; 16]] = file.values(prompt_column::HASH, 0..file.rows())?;
            // By what is there, not by what the manifest says is there.
            ids.reserve(hashes.len());
            for (hash, id) in hashes.iter().zip(table.entry.first..) {
                ids.entry(*hash).or_insert(id);
            }
        }
        Ok(Self(ids))
    }

    /// Hashes and ids of prompts that were committed since.
    pub(crate) fn add(&mut self, new: Vec<([u8; 16], u32)>) {
        for (hash, id) in new {
            self.0.entry(hash).or_insert(id);
        }
    }

    /// Ids of the batch's prompts, and the ones that are new.
    ///
    /// # Errors
    /// `Invalid` where no prompt ids are left; `Corrupted`, `Io`.
    pub(crate) fn intern<'b>(
        &self,
        snapshot: &Snapshot,
        batch: &Batch<'b>,
    ) -> Result<(Vec<u32>, Vec<PromptRow<'b>>)> {
        let mut ids = Vec::with_capacity(batch.prompt_texts.len());
        let mut new: Vec<PromptRow<'b>> = Vec::new();
        let mut new_ids: ByHash<usize> = HashMap::default();
        let prompts = prompts_of(batch);
        // Sought all together, so that the processor waits for many places of the table at once.
        let known: Vec<_> = prompts.iter().map(|prompt| self.0.get(&prompt.hash)).collect();
        for (prompt, known) in prompts.into_iter().zip(known) {
            if let Some(&id) = known
                && is_same_prompt(snapshot, id, &prompt)?
            {
                ids.push(id);
                continue;
            }
            let at = match new_ids.get(&prompt.hash) {
                Some(&at) if new[at] == prompt => at,
                _ => {
                    new_ids.entry(prompt.hash).or_insert(new.len());
                    new.push(prompt);
                    new.len() - 1
                }
            };
            let id = u32::try_from(at).ok().and_then(|at| snapshot.num_prompts.checked_add(at));
            ids.push(id.ok_or_else(|| PoolError::invalid("the pool has no prompt ids left"))?);
        }
        Ok((ids, new))
    }
}

/// A map by hashes of content, which need no other hash.
type ByHash<V> = HashMap<[u8; 16], V, BuildHasherDefault<OwnBits>>;

/// The first bytes of a hash, as they are.
#[derive(Debug, Default)]
struct OwnBits(u64);

impl Hasher for OwnBits {
    fn write(&mut self, bytes: &[u8]) {
        for (to, &byte) in (0..).step_by(8).zip(bytes.iter().take(8)) {
            self.0 ^= u64::from(byte) << to;
        }
    }

    // The length, which an array writes first, is the same for all.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

fn prompts_of<'b>(batch: &Batch<'b>) -> Vec<PromptRow<'b>> {
    let mut content = Vec::new();
    let texts = batch.prompt_texts.iter().zip(batch.prompt_metadata);
    let spans = batch.prompt_offsets.windows(2);
    let row = |(span, (&text, &metadata)): (&[i64], (&&'b str, &&'b str))| {
        let tokens = &batch.prompt_tokens[span[0] as usize..span[1] as usize];
        let hash = hash_prompt(tokens, text, metadata, &mut content);
        PromptRow { tokens, text, metadata, hash }
    };
    spans.zip(texts).map(row).collect()
}

fn hash_prompt(tokens: &[u32], text: &str, metadata: &str, bytes: &mut Vec<u8>) -> [u8; 16] {
    bytes.clear();
    for len in [tokens.len(), text.len(), metadata.len()] {
        bytes.extend_from_slice(&(len as u64).to_le_bytes());
    }
    bytes.extend_from_slice(bytemuck::cast_slice(tokens));
    bytes.extend_from_slice(text.as_bytes());
    bytes.extend_from_slice(metadata.as_bytes());
    sum128(bytes)
}

/// Two prompts may share a hash, so content decides.
fn is_same_prompt(snapshot: &Snapshot, id: u32, prompt: &PromptRow<'_>) -> Result<bool> {
    let (table, row) = snapshot.locate_prompt(id)?;
    let file = table.open(&snapshot.context)?;
    let span = file.span(prompt_column::TOKENS, row)?;
    let token_bytes = snapshot.context.settings.token_bytes;
    let is_same = match Tokens::read(file, prompt_column::TOKENS, token_bytes, span)? {
        Tokens::Narrow(ids) => {
            ids.len() == prompt.tokens.len()
                && ids.iter().zip(prompt.tokens).all(|(&a, &b)| u32::from(a) == b)
        }
        Tokens::Wide(ids) => ids == prompt.tokens,
    };
    // Where there is no text, the addresses are of no memory; comparing nothing there stalls a processor.
    let is_there = |column, text: &str| -> Result<bool> {
        let there = file.items::<u8>(column, file.span(column, row)?)?;
        Ok(there.len() == text.len() && (text.is_empty() || there == text.as_bytes()))
    };
    Ok(is_same
        && is_there(prompt_column::TEXT, prompt.text)?
        && is_there(prompt_column::METADATA, prompt.metadata)?)
}
