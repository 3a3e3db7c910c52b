//! From our errors to Python's, in one place.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::exceptions::{
    PyFileExistsError, PyFileNotFoundError, PyIndexError, PyKeyError, PyMemoryError, PyOSError,
    PyValueError,
};
use pyo3::prelude::*;

use crate::error::{PoolError, Result};

/// The Python exception for an error.
pub(super) fn to_python(py: Python<'_>, error: PoolError) -> PyErr {
    let message = error.to_string();
    match error {
        PoolError::Invalid(_) | PoolError::UnknownSnapshot { .. } => PyValueError::new_err(message),
        PoolError::Memory { .. } => PyMemoryError::new_err(message),
        PoolError::UnknownColumn { .. } => PyKeyError::new_err(message),
        PoolError::UnknownSample { .. } => PyIndexError::new_err(message),
        PoolError::NotFound { .. } => PyFileNotFoundError::new_err(message),
        PoolError::Exists { .. } => PyFileExistsError::new_err(message),
        PoolError::Corrupted { .. } => ours(py, "PoolCorruptedError", message),
        PoolError::Version { .. } => ours(py, "PoolVersionError", message),
        PoolError::Locked { .. } => ours(py, "PoolLockedError", message),
        PoolError::Poisoned => ours(py, "PoolPoisonedError", message),
        PoolError::Forked | PoolError::ReadOnly(_) => ours(py, "PoolError", message),
        PoolError::Io { action, path, source } => match source.raw_os_error() {
            // With a number Python picks the subclass: PermissionError, FileNotFoundError and so on.
            Some(number) => {
                let text = format!("cannot {action}: {source}");
                PyOSError::new_err((number, text, path))
            }
            None => PyOSError::new_err(message),
        },
    }
}

/// An exception class of `quark.errors`.
fn ours(py: Python<'_>, name: &str, message: String) -> PyErr {
    let class = py.import("quark.errors").and_then(|module| module.getattr(name));
    match class.and_then(|class| class.call1((message,))) {
        Ok(value) => PyErr::from_value(value),
        Err(error) => error,
    }
}

/// Run `work` without the interpreter; its errors and panics become exceptions.
pub(super) fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    match py.detach(|| catch_unwind(AssertUnwindSafe(work))) {
        Ok(result) => result.map_err(|error| to_python(py, error)),
        Err(panic) => Err(ours(py, "PoolError", panic_message(&*panic))),
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    format!("the pool broke one of its own rules, please report this: {text}")
}

/// Every error once, for the test of the mapping.
#[pyfunction]
pub(super) fn raise_for_test(py: Python<'_>, kind: &str) -> PyResult<()> {
    let error = match kind {
        "invalid" => PoolError::invalid("x"),
        "memory" => PoolError::Memory { what: "x".into(), bytes: 1 },
        "unknown_column" => PoolError::UnknownColumn { name: "x".into(), known: "none".into() },
        "unknown_sample" => PoolError::UnknownSample { id: 1, num_removed: 0, num_samples: 1 },
        "unknown_snapshot" => PoolError::UnknownSnapshot { generation: 2, oldest: 0, newest: 1 },
        "not_found" => PoolError::NotFound { path: "x".into() },
        "exists" => PoolError::Exists { path: "x".into() },
        "corrupted" => PoolError::corrupted("x", 1, "y"),
        "version" => PoolError::Version { found: 2, supported: 1 },
        "locked" => PoolError::Locked { holder: "x".into() },
        "poisoned" => PoolError::Poisoned,
        "forked" => PoolError::Forked,
        "read_only" => PoolError::ReadOnly("x".into()),
        "io" => PoolError::io("read", "x".into())(std::io::Error::from_raw_os_error(13)),
        "io_other" => PoolError::io("read", "x".into())(std::io::Error::other("y")),
        "panic" => return detached(py, || panic!("x")),
        _ => return Err(PyValueError::new_err("no such kind")),
    };
    Err(to_python(py, error))
}
