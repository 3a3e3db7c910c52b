//! The input of an append, and its validation.
#![expect(
    clippy::indexing_slicing,
    reason = "positions are the pool's own, or were checked at the door"
)]

use crate::columns::Given;
use crate::error::{PoolError, Result};
use crate::format::{
    MAX_COLUMN_BYTES, MAX_KEY_BYTES, PoolSettings, check_column_name, check_json_object,
};
use crate::processor::{self, Kernel};

/// The largest finish reason: the length was reached.
const MAX_FINISH: u8 = 2;

/// N samples to append in one commit; all slices that say [N] have the same length.
#[derive(Debug, Clone)]
pub struct Batch<'a> {
    /// Idempotency key.
    pub key: &'a str,
    /// Token ids of the U prompts, one prompt after another.
    pub prompt_tokens: &'a [u32],
    /// [U + 1] where each prompt begins.
    pub prompt_offsets: &'a [i64],
    /// [U]
    pub prompt_texts: &'a [&'a str],
    /// [U] one JSON object each.
    pub prompt_metadata: &'a [&'a str],
    /// [N] index of each sample's prompt.
    pub prompt_index: &'a [u32],
    /// Token ids of the N completions, one completion after another.
    pub completion_tokens: &'a [u32],
    /// [N + 1] where each completion begins.
    pub completion_offsets: &'a [i64],
    /// [N] if the pool stores text.
    pub completion_texts: Option<&'a [&'a str]>,
    /// For all samples.
    pub round: u32,
    /// For all samples.
    pub chunk: u32,
    /// For all samples.
    pub policy_step: u32,
    /// One JSON object for all samples.
    pub settings: &'a str,
    /// [N] the numbers of each sample.
    pub given: Given<'a>,
    /// Name and [N] values, NaN = not scored.
    pub scores: &'a [(&'a str, &'a [f32])],
}

impl Batch<'_> {
    /// The memory of its columns.
    pub(crate) fn num_bytes(&self) -> u128 {
        let texts = [Some(self.prompt_texts), Some(self.prompt_metadata), self.completion_texts];
        let texts = texts.into_iter().flatten().flatten().map(|text| text.len()).sum::<usize>();
        let tokens = self.prompt_tokens.len() + self.completion_tokens.len();
        // Eight numbers, and value and order of each score.
        let numbers = self.prompt_index.len() * (8 + 2 * self.scores.len());
        texts as u128 + 4 * (tokens + numbers) as u128
    }

    /// Refuse arrays that do not fit together.
    pub(crate) fn check(&self, settings: &PoolSettings) -> Result<()> {
        let refuse = |message: String| Err(PoolError::Invalid(message));
        let n = self.prompt_index.len();
        if self.key.is_empty() || self.key.len() > MAX_KEY_BYTES {
            return refuse(format!(
                "the key has {} bytes; a key has 1 to {MAX_KEY_BYTES}",
                self.key.len()
            ));
        }
        if n == 0 {
            return refuse("the batch has no samples".to_owned());
        }
        if n > 1 << 31 {
            return refuse(format!("the batch has {n} samples; at most 2^31 go into one append"));
        }
        let offsets = ("completion_offsets", self.completion_offsets.len().wrapping_sub(1));
        let texts = ("completion_texts", self.completion_texts.map_or(n, <[_]>::len));
        let lengths = std::iter::once(offsets).chain(self.given.lengths()).chain([texts]);
        for (name, len) in lengths {
            if len != n {
                return refuse(format!("{name} is for {len} samples, prompt_index for {n}"));
            }
        }
        let Given { finish_reasons, reward_tokens, .. } = self.given;
        let wrong = finish_reasons.iter().enumerate().find(|&(_, &reason)| reason > MAX_FINISH);
        if let Some((row, reason)) = wrong {
            return refuse(format!(
                "finish_reasons[{row}] is {reason}; 0 is unknown, 1 stop and 2 length"
            ));
        }
        let wrong = reward_tokens.iter().enumerate().find(|&(_, &token)| token < -1);
        if let Some((row, token)) = wrong {
            return refuse(format!(
                "reward_tokens[{row}] is {token}; -1 is none, others are quantiles"
            ));
        }
        self.given.check_version(settings)?;
        match (settings.store_text, self.completion_texts) {
            (true, None) => {
                return refuse("the pool stores text: completion_texts is missing".into());
            }
            (false, Some(_)) => {
                return refuse("the pool stores no text: completion_texts must be None".into());
            }
            _ => {}
        }

        let num_prompts = self.prompt_texts.len();
        if self.prompt_metadata.len() != num_prompts || self.prompt_offsets.len() != num_prompts + 1
        {
            return refuse(
                "texts, metadata and tokens are for different numbers of prompts".into(),
            );
        }
        if let Some((row, index)) =
            self.prompt_index.iter().enumerate().find(|&(_, &i)| i as usize >= num_prompts)
        {
            return refuse(format!(
                "prompt_index[{row}] is {index}, but there are {num_prompts} prompts"
            ));
        }
        check_offsets("prompt tokens", self.prompt_offsets, self.prompt_tokens.len())?;
        check_offsets("completion_offsets", self.completion_offsets, self.completion_tokens.len())?;
        let vocab_size = settings.vocab_size;
        check_tokens("prompt", self.prompt_tokens, self.prompt_offsets, vocab_size)?;
        check_tokens("completion", self.completion_tokens, self.completion_offsets, vocab_size)?;
        let bytes = |texts: &[&str]| texts.iter().map(|t| t.len()).sum::<usize>();
        for (what, len) in [
            ("prompt texts", bytes(self.prompt_texts)),
            ("prompt metadata", bytes(self.prompt_metadata)),
            ("completion texts", self.completion_texts.map_or(0, bytes)),
        ] {
            if len > MAX_COLUMN_BYTES {
                return refuse(format!(
                    "{what} have {len} bytes; at most 2^31 - 1 go into one append"
                ));
            }
        }
        for (i, metadata) in self.prompt_metadata.iter().enumerate() {
            // The most frequent value needs no parser.
            if *metadata != "{}" {
                check_json_object(&format!("the metadata of prompt {i}"), metadata)?;
            }
        }
        check_json_object("settings", self.settings)?;

        for (i, (name, values)) in self.scores.iter().enumerate() {
            check_column_name(name)?;
            if values.len() != n {
                return refuse(format!(
                    "score {name:?} has {} values for {n} samples",
                    values.len()
                ));
            }
            if self.scores[..i].iter().any(|(other, _)| other == name) {
                return refuse(format!("score {name:?} is given twice"));
            }
        }
        Ok(())
    }
}

fn check_offsets(what: &str, offsets: &[i64], len: usize) -> Result<()> {
    let fits = len <= MAX_COLUMN_BYTES
        && offsets.first() == Some(&0)
        && offsets.last() == Some(&(len as i64))
        && offsets.is_sorted();
    if fits {
        Ok(())
    } else {
        Err(PoolError::invalid(format!(
            "{what}: offsets begin at 0, never fall and end at the number of tokens, here {len} (at most 2^31 - 1)"
        )))
    }
}

/// The largest number; 0 if there is none.
struct Largest<'a>(&'a [u32]);

impl Kernel for Largest<'_> {
    type Output = u32;

    #[inline(always)]
    fn run(self) -> u32 {
        self.0.iter().fold(0, |largest, &number| largest.max(number))
    }
}

fn check_tokens(what: &str, tokens: &[u32], offsets: &[i64], vocab_size: u32) -> Result<()> {
    // Finding the maximum is vectorized. The position of a bad value matters only if there is one.
    if processor::run(Largest(tokens)) < vocab_size {
        return Ok(());
    }
    match tokens.iter().position(|&id| id >= vocab_size) {
        None => Ok(()),
        Some(at) => {
            let list = offsets.partition_point(|&offset| offset <= at as i64) - 1;
            Err(PoolError::invalid(format!(
                "token {} of {what} {list} has the id {}, outside the vocabulary of {vocab_size}",
                at as i64 - offsets[list],
                tokens[at]
            )))
        }
    }
}
