//! The thread pool of this process.
//!
//! A forked child lacks the threads that rayon started by itself, so parallel work in it would wait forever. Trainers
//! fork to load data. Each process therefore starts threads of its own.

use std::sync::{Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// The process that started the threads, and the threads.
static THREADS: Mutex<Option<(u32, &'static ThreadPool)>> = Mutex::new(None);

/// Run on these threads. All parallel work of rayon goes through here.
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
            // Never dropped, because a forked child would wait for threads that it does not have.
            let started: &'static ThreadPool =
                Box::leak(Box::new(started.build().expect("the system lets threads start")));
            *threads = Some((process, started));
            started
        }
    }
}
