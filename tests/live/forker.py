"""Imports the fine-tuning program with its frameworks once, then forks a process for each run that it is asked for.

A line of JSON on stdin asks: {} whether it is ready, {"config": ...} to start a run, {"wait": pid} for its exit code.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import workloads.finetune.train  # noqa: F401  # what takes the time
from workloads.finetune.__main__ import main


def child(asked: dict[str, Any]) -> int:
    for path, number in ((asked["out"], 1), (asked["errors"], 2)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    os.close(0)
    os.environ.update(asked["environment"])
    try:
        exec(asked["patch"], {})
        return main([asked["config"]])
    except SystemExit as error:
        return int(error.code or 0)
    except Exception:  # noqa: BLE001  # as the interpreter would do it, but the forked copy must not go on serving
        traceback.print_exc()
        return 1


def serve() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any] = {}
        if "config" in asked:
            pid = os.fork()
            if pid == 0:
                code = child(asked)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            answer = {"pid": pid}
        elif "wait" in asked:
            _, status = os.waitpid(asked["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        os.write(1, (json.dumps(answer) + "\n").encode())


if __name__ == "__main__":
    serve()
