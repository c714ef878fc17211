"""Files of results, each written beside its place and renamed into it."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from depthnet._checks import optional_import
from depthnet._files import replacing

# Letters as outlines look the same everywhere; equal figures give equal files.
SVG = {"svg.fonttype": "path", "svg.hashsalt": "depthnet"}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV file of rows that have the same keys."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0] if rows else ()), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """A Parquet file of rows that have the same keys, for which it needs pyarrow."""
    arrow = optional_import("pyarrow", "report", "writing Parquet")
    parquet = optional_import("pyarrow.parquet", "report", "writing Parquet")
    with replacing(path) as temporary:
        parquet.write_table(arrow.Table.from_pylist(rows), temporary)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, which has no infinity and no NaN: they become the text "inf" and null."""
    write_text(path, json.dumps(plain(value), indent=2) + "\n")


def write_figure(path: Path, figure) -> None:
    """A matplotlib Figure as the PNG or SVG file that `path` names."""
    import matplotlib

    kind = path.suffix[1:]
    options = {"metadata": NO_METADATA} if kind == "svg" else {"dpi": 150}
    with replacing(path) as temporary, matplotlib.rc_context(SVG):
        figure.savefig(temporary, format=kind, **options)


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
