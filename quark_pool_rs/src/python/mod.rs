//! The binding: `quark._pool_rs`. Nothing is decided here; `quark.pool.native` is the face.

mod batch;
mod errors;
mod pool;
mod sampler;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pyo3::prelude::*;

use crate::error::PoolError;
use crate::storage::{FileStorage, Storage};

/// Generation (None if the pool does not open), samples, files, bytes, problems as (file, offset, what).
type ReportTuple = (Option<u64>, u64, u64, u64, Vec<(String, u64, String)>);

/// Read every byte of a pool and list what is wrong.
#[pyfunction]
fn verify(py: Python<'_>, path: PathBuf) -> PyResult<ReportTuple> {
    let report = errors::detached(py, || {
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::new(path));
        crate::verify::verify(&storage)
    })?;
    let problems = report
        .problems
        .into_iter()
        .map(|problem| match problem {
            PoolError::Corrupted { file, offset, what } => (file, offset, what),
            PoolError::Io { action, path, source } => {
                (path.display().to_string(), 0, format!("cannot {action} it: {source}"))
            }
            other => (String::new(), 0, other.to_string()),
        })
        .collect();
    Ok((report.generation, report.num_samples, report.num_files, report.num_bytes, problems))
}

/// Sync everything in `staged`, rename it to `finished`, which lies in the same directory, sync that.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
fn publish_directory(py: Python<'_>, staged: PathBuf, finished: PathBuf) -> PyResult<()> {
    errors::detached(py, || {
        let (Some(from), Some(to)) = (staged.file_name(), finished.file_name()) else {
            return Err(PoolError::invalid("a directory without a name cannot be published"));
        };
        if staged.parent() != finished.parent() {
            let (staged, finished) = (staged.display(), finished.display());
            let what = format!("{staged} and {finished} do not lie in the same directory");
            return Err(PoolError::invalid(what));
        }
        // How that is reached is its user's affair.
        let storage = FileStorage::new(staged.parent().unwrap_or(Path::new("")));
        crate::storage::publish_directory(&storage, from.as_ref(), to.as_ref())
    })
}

#[pymodule]
fn _pool_rs(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("FORMAT_VERSION", crate::format::FORMAT_VERSION)?;
    module.add_class::<pool::PyPool>()?;
    module.add_class::<pool::PyView>()?;
    module.add_class::<pool::PyQuantization>()?;
    module.add_class::<sampler::PySampler>()?;
    module.add_class::<sampler::PyStream>()?;
    module.add_function(wrap_pyfunction!(verify, module)?)?;
    module.add_function(wrap_pyfunction!(publish_directory, module)?)?;
    module.add_function(wrap_pyfunction!(errors::raise_for_test, module)?)?;
    Ok(())
}
