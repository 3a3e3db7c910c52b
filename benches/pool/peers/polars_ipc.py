"""polars: one IPC file a round, sampled from memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

from pool import arrow
from pool.data import NUM_QUANTILES, Rows, left_mask, padded, right_mask
from pool.peer import Batches, Peer, Strata, Work, keep_order, kept_order, sync


class PolarsIpc(Peer[tuple[str, pl.DataFrame]]):
    """A folder of IPC files; the syncs are ours, and nothing says which files count."""

    name = "polars"
    promise = "synced, no manifest"
    largest = 1 << 60

    def encode(self, rows: Rows) -> tuple[str, pl.DataFrame]:
        frame = pl.from_arrow(arrow.table(rows))
        assert isinstance(frame, pl.DataFrame)
        return f"{rows.number:08d}.arrow", frame

    def append(self, encoded: tuple[str, pl.DataFrame]) -> None:
        name, frame = encoded
        path = self.folder / name
        frame.write_ipc(path)
        sync([path, self.folder])

    def _rewards(self) -> pl.LazyFrame:
        return pl.scan_ipc(self.folder / "*.arrow").select("reward")

    def quantizers(self) -> Mapping[str, Work]:
        levels = [k / NUM_QUANTILES for k in range(1, NUM_QUANTILES)]
        quantiles = [pl.col("reward").quantile(q).alias(str(q)) for q in levels]
        return {"": lambda: self._rewards().select(quantiles).collect()}

    def labellers(self) -> Mapping[str, Work]:
        rank = pl.col("reward").rank("ordinal") - 1
        label = (rank * NUM_QUANTILES // pl.len()).cast(pl.UInt8)
        return {"": lambda: self._rewards().select(label).collect()}

    def prepare(self) -> None:
        keep_order(self.folder, self._rewards().collect()["reward"].to_numpy())

    def batches(self, batch_size: int) -> Batches:
        strata = Strata(kept_order(self.folder), batch_size)
        files = pl.scan_ipc(self.folder / "*.arrow").select("prompt", "response")
        frame = files.collect().rechunk()

        def matrix(column: pl.Series, mask_of: object) -> np.ndarray:
            lengths = column.list.len().to_numpy()
            return padded(column.explode().to_numpy(), mask_of(lengths))  # type: ignore[operator]

        def batch(step: int) -> object:
            del step
            taken = frame[strata.draw()]
            return (
                matrix(taken["prompt"], left_mask),
                matrix(taken["response"], right_mask),
                strata.labels,
            )

        return batch
