"""A pod of a rendered Job as a process of this machine: its command, its variables, and its mounts as folders.

Nothing of the repository is on the process's path: the program is what the Job brings along.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Manifest = dict[str, Any]


class Pod:
    """The running container of a Job's pod, on a machine whose disk is `folder`.

    places: what stands in the manifests as ${NAME}
    """

    def __init__(self, made: Sequence[Manifest], job: Manifest, folder: Path, places: Mapping[str, str]) -> None:
        spec = job["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        maps = {one["metadata"]["name"]: one["data"] for one in made if one["kind"] == "ConfigMap"}
        self._mounts = {mount["mountPath"]: folder / mount["name"] for mount in container["volumeMounts"]}
        for mount in container["volumeMounts"]:
            volume = next(one for one in spec["volumes"] if one["name"] == mount["name"])
            (folder / mount["name"]).mkdir(parents=True, exist_ok=True)
            if "configMap" in volume:
                self._write(folder / mount["name"], volume["configMap"], maps)
        variables = {
            one["name"]: places.get(one["value"].strip("${}"), self._here(one["value"]))
            for one in container["env"]
            if "value" in one
        }
        # the emulator's key stands in for the pod's identity
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "AZURE_STORAGE_KEY") if name in os.environ}
        python, *words = container["command"]
        assert python == "python"
        self.out, self.errors = folder / "stdout", folder / "stderr"
        with self.out.open("w") as out, self.errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *words, *map(self._here, container["args"])],
                cwd=folder,
                env=kept | {"HF_HUB_OFFLINE": "1", "JOB_COMPLETION_INDEX": "0"} | variables,
                stdout=out,
                stderr=errors,
            )

    def _write(self, folder: Path, source: Manifest, maps: Mapping[str, Mapping[str, str]]) -> None:
        data = maps[source["name"]]
        for item in source.get("items") or [{"key": key, "path": key} for key in data]:
            path = folder / item["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            text = data[item["key"]]
            path.write_text(text if path.suffix == ".py" else self._here(text), encoding="utf-8")

    def _here(self, text: str) -> str:
        """A text with every path of the container as one of this machine."""
        for mount, folder in self._mounts.items():
            if text == mount:
                return str(folder)
            text = text.replace(f"{mount}/", f"{folder}/")
        return text

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.out.read_text(encoding="utf-8").splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]
        return [event for event in found if event["event"] == name]

    def until(self, name: str, seconds: float = 180, **facts: Any) -> None:
        """Wait for an event; AssertionError with what it said when it ends or takes too long before."""
        end = time.monotonic() + seconds
        while True:
            ended = self._process.poll() is not None  # asked first: it may say it last of all
            if any(facts.items() <= event.items() for event in self.events(name)):
                return
            said = self.out.read_text()[-2000:] + self.errors.read_text()[-3000:]
            assert not ended, said
            assert time.monotonic() < end, said
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = 300) -> int:
        return self._process.wait(timeout=seconds)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
