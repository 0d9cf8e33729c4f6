"""An output that grows row by row and that a run which was stopped goes on with."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from angelslim_core.calibration.rows import read_objects
from angelslim_core.errors import OutputError
from angelslim_core.io.writer import disk_errors, write_json

_FLUSH_SECONDS = 1.0


class AppendedRows:
    """A JSONL file to which finished rows are appended, each with an `id`; beside it, what they were made with.

    Args:
        settings: what rows depend on.
        replace: begin anew where the file exists.

    Attributes:
        ids: of the rows that are there.

    Raises:
        OutputError: the file exists and its rows were made with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], replace: bool) -> None:
        self.path, self.ids = path, set[str]()
        beside = path.with_name(f".{path.name}.settings.json")
        self._needed = 1 << 20
        with disk_errors(path, self._needed):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not replace:
                earlier = json.loads(beside.read_text()) if beside.is_file() else {}
                differing = sorted(k for k in settings if earlier.get(k) != settings[k])
                if differing:
                    raise OutputError(740, str(path), f"exists and was made with another {', '.join(differing)}", "choose another --out, or give --replace")
                _drop_torn(path)
                self.ids = {str(row.get("id")) for _, row in read_objects(path)}
            else:
                path.unlink(missing_ok=True)
                write_json(beside, dict(settings))
        self._flushed = 0.0

    def __enter__(self) -> AppendedRows:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def append(self, row: Mapping[str, Any]) -> None:
        with disk_errors(self.path, self._needed):
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                os.fsync(self._file.fileno())
                self._flushed = time.monotonic()
        self.ids.add(str(row["id"]))

    def __exit__(self, *_: object) -> None:
        with disk_errors(self.path, self._needed):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def _drop_torn(path: Path) -> None:
    """Cut off a last line that a crash left without its end."""
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        at = size
        while at > 0:
            start = max(0, at - (1 << 16))
            file.seek(start)
            newline = file.read(at - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            at = start
        file.truncate(0)
