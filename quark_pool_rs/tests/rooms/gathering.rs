//! From ids to token ids in all the ways there are, against the samples one by one.

use std::sync::OnceLock;

use proptest::prelude::*;
use quark_pool_rs::error::{PoolError, Result};
use quark_pool_rs::format::PoolSettings;
use quark_pool_rs::gather::{
    Gathered, ListsMut, Located, Packed, Padding, TokensMut, check_room, completion_lengths,
    gather, locate, pack,
};
use quark_pool_rs::pool::Pool;

use crate::common::disk::Disk;
use crate::common::{Owned, reader};

/// What the buffers hold where nothing was written.
const UNTOUCHED: i64 = -77;

struct Known {
    pool: Pool,
    prompts: Vec<Vec<i64>>,
    completions: Vec<Vec<i64>>,
}

impl Known {
    /// Some appends, compacted in part; token ids are beyond 16 bits where the vocabulary is.
    fn new(vocab_size: u32, store_text: bool) -> Self {
        let disk = Disk::default();
        let settings =
            PoolSettings::new("0123".to_owned(), vocab_size, store_text, 5, "{}").unwrap();
        let pool = Pool::create(disk.storage(), &settings, "pid 1").unwrap();
        let (mut prompts, mut completions) = (Vec::new(), Vec::new());
        for number in 0..6 {
            let mut batch = Owned::numbered(number, 4);
            for (length, prompt) in batch.prompts.iter_mut().enumerate() {
                prompt.0.truncate(length);
            }
            let completions_of = batch.completions.iter_mut().map(|c| &mut c.0);
            for list in batch.prompts.iter_mut().map(|p| &mut p.0).chain(completions_of) {
                for token in list {
                    *token *= vocab_size / 500;
                }
            }
            let wide = |list: &Vec<u32>| list.iter().copied().map(i64::from).collect::<Vec<_>>();
            prompts.extend(batch.prompt_index.iter().map(|&i| wide(&batch.prompts[i as usize].0)));
            completions.extend(batch.completions.iter().map(|c| wide(&c.0)));
            batch.append(&pool).unwrap();
        }
        // Those of three appends are alike: known prompts are found again by their content.
        assert_eq!(pool.snapshot().num_prompts, 6);
        while pool.compact_once(12).unwrap() {}
        pool.close();
        Self { pool: reader(&disk.storage()).unwrap(), prompts, completions }
    }

    /// Narrow and wide token ids, with texts and without.
    fn all() -> &'static [Self; 2] {
        static ALL: OnceLock<[Known; 2]> = OnceLock::new();
        ALL.get_or_init(|| [Self::new(500, true), Self::new(100_000, false)])
    }
}

fn rows<'a>(lists: &'a [Vec<i64>], ids: &[u64]) -> Vec<&'a [i64]> {
    ids.iter().map(|&id| lists[id as usize].as_slice()).collect()
}

fn width(rows: &[&[i64]]) -> usize {
    rows.iter().map(|row| row.len()).max().unwrap_or(0)
}

fn padded(rows: &[&[i64]], padding: Padding, pad_id: i64) -> Vec<i64> {
    let width = width(rows);
    let padded = |row: &&[i64]| {
        let blank = vec![pad_id; width - row.len()];
        match padding {
            Padding::Left => [&blank, *row].concat(),
            Padding::Right => [*row, &blank].concat(),
        }
    };
    rows.iter().flat_map(padded).collect()
}

fn offsets(rows: &[&[i64]]) -> Vec<i64> {
    let ends = rows.iter().scan(0, |end, row| {
        *end += row.len() as i64;
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}

fn lengths(rows: &[&[i64]]) -> Vec<i32> {
    rows.iter().map(|row| row.len() as i32).collect()
}

/// Memory of a caller's, and what came into it.
struct Buffers {
    wide: Vec<i64>,
    narrow: Vec<i32>,
    lengths: Vec<i32>,
    offsets: Vec<i64>,
}

impl Buffers {
    fn new(tokens: usize, rows: usize, offsets: usize) -> Self {
        Self {
            wide: vec![UNTOUCHED; tokens],
            narrow: vec![UNTOUCHED as i32; tokens],
            lengths: vec![UNTOUCHED as i32; rows],
            offsets: vec![UNTOUCHED; offsets],
        }
    }

    fn fill(
        &mut self,
        located: &Located<'_>,
        is_narrow: bool,
        padding: Padding,
        pad_id: Option<i64>,
    ) -> Result<usize> {
        let tokens = if is_narrow {
            TokensMut::I32(&mut self.narrow)
        } else {
            TokensMut::I64(&mut self.wide)
        };
        let (lengths, offsets) = (&mut self.lengths[..], &mut self.offsets[..]);
        let (name, lists) = match padding {
            Padding::Left => ("prompts", &located.prompts),
            Padding::Right => ("completions", &located.completions),
        };
        ListsMut { name, tokens, lengths, offsets }.fill(lists, padding, pad_id)
    }

    fn tokens(&self, is_narrow: bool) -> Vec<i64> {
        if is_narrow {
            self.narrow.iter().copied().map(i64::from).collect()
        } else {
            self.wide.clone()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn lists_are_those_of_the_samples(
        ids in prop::collection::vec(0_u64..24, 0..9),
        which in 0_usize..2,
        is_narrow in any::<bool>(),
        pad_id in -2_i64..9,
        spare in 0_usize..4,
    ) {
        let known = &Known::all()[which];
        let snapshot = known.pool.snapshot();
        let (prompts, completions) = (rows(&known.prompts, &ids), rows(&known.completions, &ids));
        let gathered = Gathered {
            prompts: padded(&prompts, Padding::Left, pad_id),
            prompt_width: width(&prompts),
            prompt_lengths: lengths(&prompts),
            completions: padded(&completions, Padding::Right, pad_id),
            completion_width: width(&completions),
            completion_lengths: lengths(&completions),
        };
        prop_assert_eq!(gather(&snapshot, &ids, pad_id).unwrap(), gathered);
        let packed = Packed {
            prompts: prompts.concat(),
            prompt_offsets: offsets(&prompts),
            completions: completions.concat(),
            completion_offsets: offsets(&completions),
        };
        prop_assert_eq!(pack(&snapshot, &ids).unwrap(), packed);
        let found = completion_lengths(&snapshot, &ids).unwrap();
        prop_assert!(found.iter().zip(&completions).all(|(&len, row)| len as usize == row.len()));

        let located = locate(&snapshot, &ids).unwrap();
        for (lists, padding) in [(&prompts, Padding::Left), (&completions, Padding::Right)] {
            // Padded: from the beginning, and what is behind stays as it was.
            let room = ids.len() * width(lists);
            let mut out = Buffers::new(room + spare, ids.len() + spare, 0);
            prop_assert_eq!(out.fill(&located, is_narrow, padding, Some(pad_id)).unwrap(), width(lists));
            let mut expected = padded(lists, padding, pad_id);
            expected.resize(room + spare, UNTOUCHED);
            prop_assert_eq!(out.tokens(is_narrow), expected);
            let mut expected = lengths(lists);
            expected.resize(ids.len() + spare, UNTOUCHED as i32);
            prop_assert_eq!(&out.lengths, &expected);
            // Packed.
            let total = lists.concat().len();
            let mut out = Buffers::new(total + spare, 0, ids.len() + 1 + spare);
            prop_assert_eq!(out.fill(&located, is_narrow, padding, None).unwrap(), total);
            let mut expected = lists.concat();
            expected.resize(total + spare, UNTOUCHED);
            prop_assert_eq!(out.tokens(is_narrow), expected);
            let mut expected = offsets(lists);
            expected.resize(ids.len() + 1 + spare, UNTOUCHED);
            prop_assert_eq!(&out.offsets, &expected);
        }
    }
}

#[test]
fn a_buffer_that_is_too_short_is_refused_and_stays_as_it_was() {
    let snapshot = Known::all()[0].pool.snapshot();
    let completions = rows(&Known::all()[0].completions, &[2, 3, 7, 8]);
    let (room, total) = (4 * width(&completions), completions.concat().len());
    assert!(room > total && total > 0);
    let located = locate(&snapshot, &[2, 3, 7, 8]).unwrap();
    let tokens = |has: usize, needs: usize| {
        format!("the buffer for completions has room for {has} token ids; this batch needs {needs}")
    };
    let rows = |has: usize, needs: usize| {
        format!("the buffers for completions have room for {has} rows; this batch needs {needs}")
    };
    let too_large = i64::from(i32::MAX) + 1;
    let cases = [
        (Buffers::new(room - 1, 4, 0), Some(0), tokens(room - 1, room)),
        (Buffers::new(room, 3, 0), Some(0), rows(3, 4)),
        (Buffers::new(total - 1, 0, 5), None, tokens(total - 1, total)),
        (Buffers::new(total, 0, 4), None, rows(4, 5)),
        (Buffers::new(room, 4, 0), Some(too_large), "pad_id 2147483648 does not fit".to_owned()),
    ];
    for (mut buffers, pad_id, message) in cases {
        for is_narrow in [true, false] {
            if pad_id == Some(too_large) && !is_narrow {
                assert!(buffers.fill(&located, false, Padding::Right, pad_id).is_ok());
                continue;
            }
            let error = buffers.fill(&located, is_narrow, Padding::Right, pad_id).unwrap_err();
            assert!(matches!(error, PoolError::Invalid(_)), "{error}");
            assert!(error.to_string().contains(&message), "{error}");
            assert!(buffers.tokens(is_narrow).iter().all(|&token| token == UNTOUCHED));
            assert!(buffers.lengths.iter().all(|&length| i64::from(length) == UNTOUCHED));
            assert!(buffers.offsets.iter().all(|&offset| offset == UNTOUCHED));
        }
    }
    assert!(check_room("scores", 4, 4).is_ok());
    assert!(check_room("scores", 3, 4).unwrap_err().to_string().contains("buffers for scores"));
}

#[test]
fn a_sample_that_is_not_there_is_refused_by_its_number() {
    for known in Known::all() {
        let snapshot = known.pool.snapshot();
        let all = [
            gather(&snapshot, &[0, 24], 0).map(drop),
            pack(&snapshot, &[24]).map(drop),
            completion_lengths(&snapshot, &[3, 24]).map(drop),
            snapshot.sample(24).map(drop),
        ];
        for refused in all {
            let error = refused.unwrap_err();
            assert!(
                matches!(error, PoolError::UnknownSample { id: 24, num_samples: 24, .. }),
                "{error}"
            );
            assert!(error.to_string().starts_with("sample 24 is not in the pool"), "{error}");
        }
        let sample = snapshot.sample(5).unwrap();
        assert_eq!(sample.completion_text.is_some(), snapshot.context.settings.store_text);
        let tokens = sample.completion_tokens.into_iter().map(i64::from);
        assert!(tokens.eq(known.completions[5].iter().copied()));
    }
}
