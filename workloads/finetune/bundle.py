"""The program as one file, which a Job brings along: a zip that Python imports from, the same for the same source.

A ConfigMap holds a mebibyte. `PYTHONPATH=/program/tonnage.zip python -m workloads.finetune CONFIG` runs it.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAME = "tonnage.zip"
OUTSIDE = ("from_plan.py", "bundle.py")  # need the planner, and run beside it


def program_files() -> dict[str, Path]:
    """Every module that the program needs, by its name in the bundle."""
    found = [
        ROOT / "planner" / "errors.py",
        *(ROOT / "workloads" / name for name in ("__init__.py", "blobs.py", "store.py")),
    ]
    found += [path for path in (ROOT / "workloads" / "finetune").glob("*.py") if path.name not in OUTSIDE]
    return {path.relative_to(ROOT).as_posix(): path for path in sorted(found)}


def bundle() -> bytes:
    """The zip. `planner` is an empty package in it: the program knows nothing of it but its errors."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        contents = {name: path.read_bytes() for name, path in program_files().items()} | {"planner/__init__.py": b""}
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, contents[name])
    return made.getvalue()
