//! Whether there is memory for what a caller asks for, before it is allocated.
//!
//! A vector that cannot be had aborts the process. What grows with an argument is asked for here first,
//! where a refusal is an error, and given back at once.

use std::hint::black_box;

use crate::error::{PoolError, Result};

/// Less than this is not asked for: it would cost more than it tells.
const SMALL: u128 = 1 << 22;

/// Refuse work that takes more memory than the system gives; `what` names the argument.
///
/// # Errors
/// `Memory`.
pub(crate) fn ensure(bytes: u128, what: impl FnOnce() -> String) -> Result<()> {
    if bytes < SMALL {
        return Ok(());
    }
    let mut probe: Vec<u8> = Vec::new();
    let is_had = usize::try_from(bytes).is_ok_and(|len| probe.try_reserve_exact(len).is_ok());
    // Otherwise the compiler sees that nobody uses the memory, and asks for none.
    black_box(&mut probe);
    if is_had { Ok(()) } else { Err(PoolError::Memory { what: what(), bytes }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_had_is_an_error() {
        for bytes in [u128::MAX, u128::from(u64::MAX), 1 << 62] {
            let error = ensure(bytes, || "batch_size is 7".to_owned()).unwrap_err();
            assert!(error.to_string().starts_with("batch_size is 7: "), "{error}");
        }
        ensure(SMALL, || unreachable!()).unwrap();
        ensure(0, || unreachable!()).unwrap();
    }
}
