//! The binding: `quark._pool_rs`. Nothing is decided here; `quark.pool.native` is the face.

mod batch;
mod errors;
mod pool;
mod records;
mod sampler;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::error::PoolError;
use crate::storage::{FileStorage, Storage};

/// Read every byte of a pool and list what is wrong.
#[pyfunction]
fn verify(py: Python<'_>, path: PathBuf) -> PyResult<records::Report> {
    let report = errors::detached(py, || {
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::new(path));
        crate::verify::verify(&storage)
    })?;
    Ok(records::Report::of(report))
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
    module.add("SAMPLE_COLUMNS", {
        let columns = records::SampleColumn::all().map(|column| Py::new(module.py(), column));
        PyTuple::new(module.py(), columns.collect::<PyResult<Vec<_>>>()?)?
    })?;
    module.add_class::<records::Append>()?;
    module.add_class::<records::Collected>()?;
    module.add_class::<records::Draft>()?;
    module.add_class::<records::Drawn>()?;
    module.add_class::<records::Filled>()?;
    module.add_class::<records::Info>()?;
    module.add_class::<records::Packed>()?;
    module.add_class::<records::PackedBatch>()?;
    module.add_class::<records::Padded>()?;
    module.add_class::<records::PaddedBatch>()?;
    module.add_class::<records::Problem>()?;
    module.add_class::<records::Report>()?;
    module.add_class::<records::Retained>()?;
    module.add_class::<records::SampleColumn>()?;
    module.add_class::<records::ScoreColumn>()?;
    module.add_class::<records::Settings>()?;
    module.add_class::<records::Snapshot>()?;
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
