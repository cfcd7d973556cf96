"""Reference log-probs on disk: computed once for a model and a row, whatever the loss, the run or the seed.

A cache is an SQLite file in the user's cache folder (`RLKIT_CACHE`, else `XDG_CACHE_HOME/rlkit`, else the platform's),
one for each way of computing: the weights' hash, the arithmetic (precision, attention implementation, layout of rows,
number of threads) and the versions of torch and transformers. In it, a row's key is the hash of its tokens and of which
of them count: tokenizer, template and truncation act through these alone. A row of another model, template or length is
therefore never taken for this one. What is stored are float32 values, one for each counted token, and no code.

Rows are written batch by batch in transactions, so a run that is stopped while it fills the cache goes on there.
"""

from __future__ import annotations

import hashlib
import sqlite3
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def row_key(tokens: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_]) -> bytes:
    """16 bytes that stand for a row: its tokens, and which of them count."""
    digest = hashlib.blake2b(len(tokens).to_bytes(8, "little"), digest_size=16)
    digest.update(np.ascontiguousarray(tokens, np.int32).tobytes())
    digest.update(np.packbits(mask).tobytes())
    return digest.digest()


class ReferenceCache:
    """Rows' log-probs of one model, computed in one way. A context manager; unusable places make it an empty one.

    Args:
        identity: everything but the row that decides the values; texts and numbers.
        folder: where the file is; None turns the cache off.
    """

    def __init__(self, identity: dict[str, Any], folder: Path | None) -> None:
        text = repr(sorted((k, str(v)) for k, v in identity.items()))
        self.name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._db: sqlite3.Connection | None = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / f"reference-{self.name}.sqlite", timeout=60)
            self._db.execute("CREATE TABLE IF NOT EXISTS about (text TEXT)")
            self._db.execute("CREATE TABLE IF NOT EXISTS rows (key BLOB PRIMARY KEY, logps BLOB) WITHOUT ROWID")
            if self._db.execute("SELECT count(*) FROM about").fetchone()[0] == 0:
                self._db.execute("INSERT INTO about VALUES (?)", (text,))
            self._db.commit()
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def get(self, keys: Sequence[bytes], lengths: Sequence[int]) -> list[Floats | None]:
        """The values of each row, or None; a value of another length than expected counts as absent."""
        found: dict[bytes, bytes] = {}
        if self._db is not None:
            try:
                for start in range(0, len(keys), 500):  # below the limit on variables of a statement
                    part = keys[start : start + 500]
                    marks = ",".join("?" * len(part))
                    found |= dict(self._db.execute(f"SELECT key, logps FROM rows WHERE key IN ({marks})", part))
            except sqlite3.Error as error:
                self._give_up(error)
                found = {}
        values = [np.frombuffer(found[key], "<f4") if key in found else None for key in keys]
        return [
            v.astype(np.float32) if v is not None and len(v) == n and np.isfinite(v).all() else None
            for v, n in zip(values, lengths, strict=True)
        ]

    def put(self, rows: Iterable[tuple[bytes, Floats]]) -> None:
        """Store rows in one transaction; a full or read-only disk turns the cache off and is said."""
        if self._db is None:
            return
        try:
            with self._db:
                self._db.executemany(
                    "INSERT OR IGNORE INTO rows VALUES (?, ?)", [(k, v.astype("<f4").tobytes()) for k, v in rows]
                )
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        print(f"reference cache switched off: {error}", file=sys.stderr)
        self.__exit__(None, None, None)

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None
