"""The program as text, which a Job brings along in a ConfigMap: a preview shows every line that changes in it.

A ConfigMap holds a mebibyte. `PYTHONPATH=FOLDER python -m workloads.finetune CONFIG` runs it where it is mounted.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUTSIDE = ("from_plan.py", "bundle.py")  # need the planner, and run beside it


@cache
def sources() -> dict[str, str]:
    """Source by path, such as `workloads/finetune/train.py`. `planner` is an empty package: of it there are errors."""
    found = [
        ROOT / "planner" / "errors.py",
        *(ROOT / "workloads" / name for name in ("__init__.py", "blobs.py", "store.py")),
        *(path for path in (ROOT / "workloads" / "finetune").glob("*.py") if path.name not in OUTSIDE),
    ]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in found}
    return dict(sorted((texts | {"planner/__init__.py": ""}).items()))
