//! Checks that memory suffices for a request before it is allocated.
//!
//! A failed allocation of a vector aborts the process. Memory whose size depends on an argument is therefore requested
//! here first, where a refusal is an error, and released at once.

use std::hint::black_box;

use crate::error::{PoolError, Result};

/// Smaller requests are not checked, because the check would take longer than it is worth.
const SMALL: u128 = 1 << 22;

/// Refuse work that needs more memory than the system provides. `what` names the argument.
///
/// # Errors
/// `Memory`.
pub(crate) fn ensure(bytes: u128, what: impl FnOnce() -> String) -> Result<()> {
    if bytes < SMALL {
        return Ok(());
    }
    let mut probe: Vec<u8> = Vec::new();
    let is_had = usize::try_from(bytes).is_ok_and(|len| probe.try_reserve_exact(len).is_ok());
    // Otherwise the compiler removes the unused allocation.
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
