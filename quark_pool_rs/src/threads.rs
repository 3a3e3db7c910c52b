//! The threads of this process that compute together.
//!
//! Those that rayon starts by itself are missing in a process that was forked, where whoever needs them waits for
//! ever; and trainers fork, to load data. So the threads are those of the process that asks.

use std::sync::{Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// The process that started the threads, and they.
static THREADS: Mutex<Option<(u32, &'static ThreadPool)>> = Mutex::new(None);

/// Compute on all of them: for everything that rayon makes parallel.
///
/// # Panics
/// If the system lets no thread start.
pub(crate) fn parallel<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    of_this_process().install(work)
}

fn of_this_process() -> &'static ThreadPool {
    let mut threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    match *threads {
        Some((owner, known)) if owner == process => known,
        _ => {
            let started = ThreadPoolBuilder::new().thread_name(|i| format!("quark-pool-{i}"));
            // Never dropped: a fork would wait for threads that it does not have.
            let started: &'static ThreadPool =
                Box::leak(Box::new(started.build().expect("the system lets threads start")));
            *threads = Some((process, started));
            started
        }
    }
}
