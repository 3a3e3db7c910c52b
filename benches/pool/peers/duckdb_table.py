"""DuckDB: one table, INSERT of Arrow, NTILE for labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import duckdb
import numpy as np
import pyarrow as pa

from pool import arrow
from pool.data import NUM_QUANTILES, Rows, Workload
from pool.peer import Batches, Peer, Strata, Work, keep_order, kept_order

_SCHEMA = """CREATE TABLE samples (
    prompt USMALLINT[], response USMALLINT[], reward FLOAT,
    prompt_index UINTEGER, round UINTEGER, policy_step UINTEGER
)"""


class DuckdbTable(Peer[pa.Table]):
    """Rows by rowid, with its write-ahead log."""

    name = "duckdb"
    promise = "atomic, synced"
    largest = 1 << 60

    def __init__(
        self, folder: Path, workload: Workload, connection: duckdb.DuckDBPyConnection
    ) -> None:
        super().__init__(folder, workload)
        self.connection = connection

    @classmethod
    def create(cls, folder: Path, workload: Workload, capacity: int) -> Self:
        del capacity
        folder.mkdir(parents=True)
        connection = duckdb.connect(str(folder / "samples.db"))
        connection.execute(_SCHEMA)
        return cls(folder, workload, connection)

    @classmethod
    def open(cls, folder: Path, workload: Workload) -> Self:
        return cls(folder, workload, duckdb.connect(str(folder / "samples.db"), read_only=True))

    def encode(self, rows: Rows) -> pa.Table:
        return arrow.table(rows)

    def append(self, encoded: pa.Table) -> None:
        self.connection.register("incoming", encoded)
        self.connection.execute("INSERT INTO samples SELECT * FROM incoming")
        self.connection.unregister("incoming")

    def quantizers(self) -> Mapping[str, Work]:
        levels = ", ".join(str(k / NUM_QUANTILES) for k in range(1, NUM_QUANTILES))
        query = f"SELECT quantile_disc(reward, [{levels}]) FROM samples"
        return {"": lambda: self.connection.execute(query).fetchall()}

    def labellers(self) -> Mapping[str, Work]:
        query = (
            "CREATE OR REPLACE TEMP TABLE labels AS "
            f"SELECT rowid AS id, NTILE({NUM_QUANTILES}) OVER (ORDER BY reward) AS label FROM samples"
        )
        return {"": lambda: self.connection.execute(query)}

    def prepare(self) -> None:
        self.connection.execute("DROP TABLE IF EXISTS labels")
        self.connection.execute("CHECKPOINT")
        rewards = self.connection.execute("SELECT reward FROM samples ORDER BY rowid").fetchnumpy()
        keep_order(self.folder, rewards["reward"])

    def batches(self, batch_size: int) -> Batches:
        strata = Strata(kept_order(self.folder), batch_size)

        def batch(step: int) -> object:
            del step
            ids = strata.draw()
            places = ", ".join(map(str, ids.tolist()))
            taken = self.connection.sql(
                f"SELECT rowid, prompt, response FROM samples WHERE rowid IN ({places})"
            ).to_arrow_table()
            order = np.argsort(ids)
            found = np.searchsorted(ids[order], taken.column("rowid").to_numpy())
            return *arrow.padded_batch(taken), strata.labels[order[found]]

        return batch

    def close(self) -> None:
        self.connection.close()
        super().close()
