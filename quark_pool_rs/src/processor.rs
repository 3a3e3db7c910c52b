//! Loops compiled for several instruction sets.
//!
//! A build runs on every processor of its architecture. Long loops run several times faster with the vector
//! instructions that most processors have. The instruction set is detected when a loop runs.
#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "calling what was compiled for more than the baseline is unsafe")
)]

/// A loop. Functions that it calls must be inlined. Otherwise they are compiled for the baseline only.
pub(crate) trait Kernel {
    /// What it computes.
    type Output;
    /// Run the loop. Mark it `#[inline(always)]`.
    fn run(self) -> Self::Output;
}

/// Run a loop with the widest vectors of this processor.
#[inline]
pub(crate) fn run<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
    {
        // SAFETY: the function needs nothing but the features that were found on the line above.
        return unsafe { run_wide(kernel) };
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: as above.
        return unsafe { run_half(kernel) };
    }
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
fn run_wide<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn run_half<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}
