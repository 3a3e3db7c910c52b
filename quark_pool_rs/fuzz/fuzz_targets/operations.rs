#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| quark_pool_fuzz::targets::operations(data));
