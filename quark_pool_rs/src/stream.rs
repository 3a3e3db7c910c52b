//! Minibatches that a thread prepares while the caller works on the current one.
//!
//! The thread prepares at most `depth` batches ahead and sleeps otherwise. It ends after the last batch, at the first
//! error, and when the stream is dropped, which waits for it.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, JoinHandle};

use crate::error::{PoolError, Result};

/// Values that a thread prepares ahead, in order.
pub struct Stream<T: Send + 'static> {
    /// None after the last one.
    thread: Option<Thread<T>>,
    /// The thread exists only in the process that started it.
    process: u32,
}

struct Thread<T> {
    values: Receiver<Outcome<T>>,
    handle: JoinHandle<()>,
}

type Outcome<T> = std::thread::Result<Result<T>>;

impl<T: Send + 'static> Stream<T> {
    /// Call `make` for each step in order, at most `depth` (at least one) ahead.
    ///
    /// # Errors
    /// `Io` if the system cannot start a thread.
    pub fn new(
        steps: Range<u64>,
        depth: usize,
        make: impl Fn(u64) -> Result<T> + Send + 'static,
    ) -> Result<Self> {
        // One more value is prepared while the channel is full.
        let (sender, values) = sync_channel(depth.max(1) - 1);
        let work = move || {
            for step in steps {
                let outcome = catch_unwind(AssertUnwindSafe(|| make(step)));
                let is_last = !matches!(outcome, Ok(Ok(_)));
                if sender.send(outcome).is_err() || is_last {
                    return;
                }
            }
        };
        let spawned = Builder::new().name("quark-batches".to_owned()).spawn(work);
        let handle = spawned.map_err(PoolError::io("start a thread for", "batches".into()))?;
        Ok(Self { thread: Some(Thread { values, handle }), process: process::id() })
    }

    /// The next value, or None after the last one or an error.
    ///
    /// # Errors
    /// `Forked` in a child of the process that created the stream; the errors of `make`.
    ///
    /// # Panics
    /// If `make` did.
    pub fn take(&mut self) -> Result<Option<T>> {
        if self.process != process::id() {
            return Err(PoolError::Forked);
        }
        let Some(thread) = &self.thread else { return Ok(None) };
        match thread.values.recv() {
            Ok(Ok(Ok(value))) => Ok(Some(value)),
            Ok(Ok(Err(error))) => {
                self.close();
                Err(error)
            }
            Ok(Err(panic)) => {
                self.close();
                resume_unwind(panic)
            }
            Err(_) => {
                self.close();
                Ok(None)
            }
        }
    }

    /// End the thread and wait for it; there is no next value then.
    pub fn close(&mut self) {
        let Some(Thread { values, handle }) = self.thread.take() else { return };
        if self.process != process::id() {
            // The thread stayed in the parent, and it may have held locks during the fork.
            std::mem::forget((values, handle));
            return;
        }
        // Its next send fails, also one that it is blocked in.
        drop(values);
        // The thread sends panics as values.
        let _ = handle.join();
    }
}

impl<T: Send + 'static> Drop for Stream<T> {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn values_come_in_order_and_end() {
        let mut stream = Stream::new(3..7, 2, |step| Ok(step * 10)).unwrap();
        let mut seen = Vec::new();
        while let Some(value) = stream.take().unwrap() {
            seen.push(value);
        }
        assert_eq!(seen, [30, 40, 50, 60]);
        assert!(stream.take().unwrap().is_none());
    }

    #[test]
    fn an_error_and_a_panic_reach_the_consumer() {
        let fails = |step| if step == 1 { Err(PoolError::invalid("one")) } else { Ok(step) };
        let mut stream = Stream::new(0..9, 3, fails).unwrap();
        assert_eq!(stream.take().unwrap(), Some(0));
        assert!(matches!(stream.take(), Err(PoolError::Invalid(_))));
        assert!(stream.take().unwrap().is_none());
        let mut stream = Stream::<u64>::new(0..9, 1, |_| panic!("on purpose")).unwrap();
        assert!(catch_unwind(AssertUnwindSafe(|| stream.take())).is_err());
    }

    #[test]
    fn it_runs_no_further_ahead_than_told_and_ends_when_dropped() {
        let made = Arc::new(AtomicU64::new(0));
        let count = made.clone();
        let mut stream = Stream::new(0..u64::MAX, 3, move |step| {
            count.fetch_add(1, Ordering::SeqCst);
            Ok(step)
        })
        .unwrap();
        for _ in 0..10 {
            stream.take().unwrap();
        }
        assert!(made.load(Ordering::SeqCst) <= 13);
        drop(stream);
        // Its thread is gone, and with it the counter's other owner.
        assert_eq!(Arc::strong_count(&made), 1);
    }
}
