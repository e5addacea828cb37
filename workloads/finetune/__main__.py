"""`python -m workloads.finetune CONFIG`: data checked, then fetched, trained and kept; the exit code is for the Job.

`check CONFIG`: the data alone, without torch. `emit axolotl CONFIG`, `emit unsloth CONFIG`: the same run for another
trainer. `worker CONFIG`: one process of a run with several, started by the run itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from planner.errors import PlannerError
from workloads import store
from workloads.blobs import AzureBlobs, Blobs, Place, is_url, parse_place
from workloads.finetune import FAILED, FINISHED, INTERRUPTED, REFUSED, checkpoint
from workloads.finetune.chat import Unreached, load_chat
from workloads.finetune.check import Prepared, prepare
from workloads.finetune.config import FinetuneConfig, load_config
from workloads.finetune.emit import Trainer, emit
from workloads.finetune.lease import RunIsHeld, hold, hold_at
from workloads.finetune.signals import Stop
from workloads.finetune.telemetry import Telemetry

USAGE = "usage: python -m workloads.finetune [check | emit axolotl | emit unsloth] CONFIG"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
GRACE_SECONDS = 60.0  # for the processes of a run, when one of them has ended
ELSEWHERE_SECONDS = 60.0  # how often another machine than the first looks whether the run is finished
UPLOAD_SECONDS = 1800.0  # how long it waits for the result after its own part: torch waits as long for a machine


class Inputs(NamedTuple):
    """Where the inputs of a run lie on this machine."""

    model: str
    train: Path
    evaluation: Path | None


def main(arguments: list[str]) -> int:
    """Run it; the exit code. What a person can act on is one sentence on stderr."""
    *mode, path = arguments or [""]
    if path.startswith("-") or not path or tuple(mode) not in MODES:
        print(USAGE, file=sys.stderr)
        return REFUSED
    try:
        return MODES[tuple(mode)](Path(path))
    except (RunIsHeld, Unreached, store.Unreachable, checkpoint.Behind) as error:
        return _told(error, FAILED)
    except PlannerError as error:
        return _told(error, REFUSED)
    except checkpoint.DiskFull as error:
        return _told(
            f"the disk of {error.filename} is full: free space, then start again from the newest checkpoint", FAILED
        )
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        if _is_of_others(error):
            return _told(
                f"another process of the run is gone ({said}): start all again, from the newest checkpoint on", FAILED
            )
        if not _out_of_memory(error):
            raise
        return _told(f"the card's memory ran out ({said}): plan a smaller micro batch, context or rank", REFUSED)


def _told(error: object, code: int) -> int:
    print(f"finetune: {error}", file=sys.stderr)
    return code


def _out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"


def _is_of_others(error: BaseException) -> bool:
    """Whether torch lost a process of the run. NCCL's and the store's errors have types, gloo's name its source."""
    return type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError") or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error)
    )


def check(path: Path) -> int:
    """The data of a configuration, without torch."""
    config = load_config(path)
    print(json.dumps({"event": "data", "run": config.run, **_prepared(config, fetch(config)).told}))
    return FINISHED


def run(path: Path) -> int:
    """The whole run, with one process or several; on the first of several machines, or with its part on another."""
    config = load_config(path)
    stop = Stop()
    stop.listen()
    machine = _machine(config)
    say = Telemetry(config.run, config.metrics)
    with _held(config), contextlib.closing(say):
        uploaded = _uploaded(config)  # before inputs are fetched: whether its container is there
        if machine == 0 or config.checkpoints.mirror:  # a folder of this machine's own
            for name in checkpoint.clean(Path(config.checkpoints.folder)):
                say.event("removed", folder=name, why="it was not whole")
        inputs = fetch(config)
        data = _prepared(config, inputs)
        say.event("data", **data.told)
        facts = {"config": config.digest, "data": data.digest}
        here = (machine == 0 or not config.checkpoints.mirror) and _is_done(config, facts)
        if not here:
            if uploaded is not None:
                checkpoint.check_same_run(str(config.upload), uploaded, **facts)  # nobody's result is written over
                say.event("finished", upload=config.upload)
                return FINISHED
            _from_mirror(config, facts, say)
            if config.gpus * config.nodes > 1:
                code = _several(path, config, stop, _elsewhere(config, facts))
            else:
                code = _one(config, inputs, data, stop, say)
            if code != FINISHED:
                return code
            if stop.by and config.upload:  # the signal came at the very end: the next try uploads
                return INTERRUPTED
        if machine == 0:
            _upload(config, say)
        else:
            _await_upload(config, facts)
        say.event("finished", result=config.result if machine == 0 else None, upload=config.upload)
    return FINISHED


def worker(path: Path) -> int:
    """One of several processes; its inputs are there already, and the first alone speaks."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the run's lease ends with the process that started this
    config = load_config(path)
    stop = Stop()
    stop.listen()
    say = Telemetry(config.run, config.metrics, quiet=os.environ.get("RANK") != "0")
    inputs = _inputs(config)
    with contextlib.closing(say):
        return _one(config, inputs, _prepared(config, inputs), stop, say)


def _emit(trainer: Trainer) -> Callable[[Path], int]:
    def write(path: Path) -> int:
        print(emit(load_config(path), trainer), end="")
        return FINISHED

    return write


MODES: dict[tuple[str, ...], Callable[[Path], int]] = {
    (): run,
    ("check",): check,
    ("worker",): worker,
    ("emit", "axolotl"): _emit("axolotl"),
    ("emit", "unsloth"): _emit("unsloth"),
}


def _one(config: FinetuneConfig, inputs: Inputs, data: Prepared, stop: Stop, say: Telemetry) -> int:
    from workloads.finetune.train import train

    done = train(config, inputs.model, data, stop, say, copy=_mirror(config, say))
    if done.stopped:
        say.event("interrupted", by=stop.by, step=done.steps, steps=done.total)
        return INTERRUPTED
    return FINISHED


# --- several processes ------------------------------------------------------------------------------------------------


def _machine(config: FinetuneConfig) -> int:
    """This machine's number among those of the run, as an Indexed Job counts its pods. PlannerError for none of it."""
    if config.nodes == 1:
        return 0
    said = os.environ.get("JOB_COMPLETION_INDEX", "0")
    if not said.isdecimal() or int(said) >= config.nodes:
        raise PlannerError(
            f"JOB_COMPLETION_INDEX is {said} and the run's {config.nodes} machines are numbered from 0: start as many"
            " as the configuration says"
        )
    if "MASTER_ADDR" not in os.environ:
        raise PlannerError("MASTER_ADDR is not set: the machines of a run meet at the first one's address")
    return int(said)


def _several(path: Path, config: FinetuneConfig, stop: Stop, elsewhere: Callable[[], bool] = lambda: False) -> int:
    """A process for each GPU of this machine. Signals are handed on; the worst of their exit codes counts.

    torchrun is not used: whatever its processes say, it says 1. elsewhere: whether the run is finished without them.
    """
    machine = _machine(config)
    shared = {
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT", "29500"),
        "WORLD_SIZE": str(config.gpus * config.nodes),
        "LOCAL_WORLD_SIZE": str(config.gpus),
    }
    command = [sys.executable, "-m", "workloads.finetune", "worker", str(path)]
    with stop.gently():
        processes = [
            subprocess.Popen(
                command, env=os.environ | shared | {"LOCAL_RANK": str(i), "RANK": str(machine * config.gpus + i)}
            )
            for i in range(config.gpus)
        ]
        try:
            codes = _watched(processes, stop, elsewhere)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    if REFUSED in codes:
        return REFUSED
    if all(code == FINISHED for code in codes):
        return FINISHED
    return INTERRUPTED if set(codes) == {INTERRUPTED} else FAILED


def _watched(processes: list[subprocess.Popen[bytes]], stop: Stop, elsewhere: Callable[[], bool]) -> list[int]:
    """Wait for all. A signal goes to each once; when one has ended otherwise than well the rest have a minute."""
    told = False
    patience: float | None = None
    finished = threading.Event()
    # beside: a question to Blob may take longer than a machine that is taken away leaves for a checkpoint
    threading.Thread(target=_look, args=(elsewhere, finished), daemon=True).start()
    while any(process.poll() is None for process in processes):
        if finished.is_set():
            return [FINISHED]
        if stop.by and not told:
            told = True
            for process in processes:
                if process.poll() is None:
                    process.terminate()
        ended = [process.returncode for process in processes if process.poll() is not None]
        if patience is None and any(code not in (FINISHED, INTERRUPTED) for code in ended):
            patience = time.monotonic() + GRACE_SECONDS
            for process in processes:
                if process.poll() is None:
                    process.terminate()
        if patience is not None and time.monotonic() > patience:
            for process in processes:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.1)
    finished.set()  # nobody looks any more
    codes = [int(process.returncode) for process in processes]
    # one that the signal met before it could listen has nothing to lose
    return [INTERRUPTED if told and code == -signal.SIGTERM else code for code in codes]


def _look(elsewhere: Callable[[], bool], finished: threading.Event) -> None:
    while not finished.wait(ELSEWHERE_SECONDS):
        if elsewhere():
            finished.set()


# --- inputs and results -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _held(config: FinetuneConfig) -> Iterator[None]:
    """The run is this trainer's alone, on its folder and at its mirror; of several machines the first holds it."""
    with contextlib.ExitStack() as held:
        if _machine(config) == 0:
            held.enter_context(hold(Path(config.checkpoints.folder), lost=_give_way))
            if config.checkpoints.mirror:
                place = parse_place(config.checkpoints.mirror)
                held.enter_context(hold_at(place, AzureBlobs(place), lost=_give_way))
        yield


def _give_way() -> None:
    """Another trainer has the run, because this one stood still too long: not one more byte is written here."""
    print("finetune: another trainer has taken the run over: this one ends", file=sys.stderr, flush=True)
    os._exit(FAILED)


def _inputs(config: FinetuneConfig) -> Inputs:
    scratch = Path(config.scratch)

    def place(source: str, kind: str) -> Path:
        return scratch / kind / Path(parse_place(source).prefix).name if is_url(source) else Path(source)

    model = str(scratch / "model") if is_url(config.model) else config.model
    evaluation = config.data.evaluation
    return Inputs(model, place(config.data.train, "train"), place(evaluation, "evaluation") if evaluation else None)


def fetch(config: FinetuneConfig) -> Inputs:
    """Inputs that are Blob URLs, brought onto this machine."""
    inputs = _inputs(config)
    wanted = [(config.data.train, inputs.train)]
    if config.data.evaluation and inputs.evaluation:
        wanted.append((config.data.evaluation, inputs.evaluation))
    for source, target in wanted:
        if is_url(source):
            place = parse_place(source)
            store.download_file(place, target, AzureBlobs(place))
    if is_url(config.model):
        place = parse_place(config.model)
        store.download(place, Path(inputs.model), AzureBlobs(place))
    return inputs


def _prepared(config: FinetuneConfig, inputs: Inputs) -> Prepared:
    chat = load_chat(inputs.model, config.revision)
    return prepare(
        config.data,
        task=config.task,
        chat=chat,
        max_length=config.max_length,
        train=inputs.train,
        evaluation=inputs.evaluation,
    )


def _is_done(config: FinetuneConfig, facts: dict[str, str]) -> bool:
    """Whether an earlier try got as far as the result. PlannerError when another run's result is in the way."""
    result = Path(config.result)
    said = checkpoint.manifest_of(result)
    if said is None:
        return False
    checkpoint.check_same_run(result, said, **facts)
    return True


def _uploaded(config: FinetuneConfig, patience: store.Patience | None = None) -> dict[str, Any] | None:
    """What the manifest of the result at Blob says, of whichever run it is; None where there is none."""
    if config.upload is None:
        return None
    place = parse_place(config.upload)
    return store.manifest_at(place, AzureBlobs(place), patience=patience)


def _elsewhere(config: FinetuneConfig, facts: dict[str, str]) -> Callable[[], bool]:
    """Whether the first machine has uploaded the result: then no process of this one is needed, nor will be met."""

    def ask() -> bool:
        try:
            said = _uploaded(config, store.Patience(0))
        except PlannerError:  # no answer just now; what is wrong for good was said before
            return False
        return said is not None and facts.items() <= said.items()

    return ask if _machine(config) else lambda: False


def _await_upload(config: FinetuneConfig, facts: dict[str, str]) -> None:
    """Another machine than the first ends when the result is uploaded.

    A Job starts no pod again that has finished, and a first machine that failed before it was done needs all of them.
    """
    uploaded = _elsewhere(config, facts)
    until = time.monotonic() + UPLOAD_SECONDS
    while config.upload and not uploaded():
        if time.monotonic() > until:
            raise checkpoint.Behind(
                f"the first machine did not upload the result in {UPLOAD_SECONDS:.0f} s: see what it says; all start"
                " again from the newest checkpoint"
            )
        time.sleep(min(5.0, UPLOAD_SECONDS))


def _upload(config: FinetuneConfig, say: Telemetry) -> None:
    if config.upload is None:
        return
    place = parse_place(config.upload)
    with store.bar("upload") as tell:
        sent = store.upload(Path(config.result), place, AzureBlobs(place), progress=tell)
    say.event("upload", place=str(place), sent_bytes=sent)


def _mirror(config: FinetuneConfig, say: Telemetry) -> Callable[[Path], None] | None:
    """What copies each checkpoint to Blob. Where Blob does not answer the run goes on: the folder has it."""
    if config.checkpoints.mirror is None:
        return None
    base = parse_place(config.checkpoints.mirror)
    blobs = AzureBlobs(base)

    def copy(folder: Path) -> None:
        try:
            place = base._replace(prefix=base.name(folder.name))
            patience = store.Patience(MIRROR_SECONDS)
            sent = store.upload(folder, place, blobs, patience=patience)
            kept = sorted(store.folders(base, blobs, patience=patience), key=_step, reverse=True)
            best = checkpoint.best_of(folder)
            for name in kept[config.checkpoints.keep :]:
                if name != best:
                    store.remove(base._replace(prefix=base.name(name)), blobs, patience=patience)
            say.event("mirrored", checkpoint=folder.name, sent_bytes=sent)
        except store.Unreachable as error:
            say.event("not-mirrored", checkpoint=folder.name, why=str(error))

    return copy


MIRROR_SECONDS = 120.0  # the card waits meanwhile


def _step(name: str) -> int:
    match = checkpoint.NAME.fullmatch(name)
    return int(match[1]) if match else -1


def _from_mirror(config: FinetuneConfig, facts: dict[str, str], say: Telemetry) -> None:
    """The newest checkpoint of the mirror, and the best, where this machine lacks them.

    A newer one on the first machine's disk, which Blob did not take at its time, goes to the mirror: what it goes on
    from the other machines need too. PlannerError for those of another run, before they and a model are loaded.
    """
    if config.checkpoints.mirror is None:
        return
    base = parse_place(config.checkpoints.mirror)
    blobs = AzureBlobs(base)
    there = {name for name in store.folders(base, blobs) if checkpoint.NAME.fullmatch(name)}
    name = max(there, key=_step, default="")
    folder = Path(config.checkpoints.folder)
    first = _machine(config) == 0
    here, _ = checkpoint.newest(folder)
    if first and here is not None and checkpoint.step_of(here) >= _step(name):
        if here.name != name and (copy := _mirror(config, say)):
            copy(here)
        return
    if not there:
        return
    newest = base._replace(prefix=base.name(name))
    checkpoint.check_same_run(str(newest), store.manifest_at(newest, blobs) or {}, **facts)
    _fetch_checkpoint(base, name, folder, blobs, say)
    best = checkpoint.best_of(folder / name)
    if first and best in there:
        _fetch_checkpoint(base, best, folder, blobs, say)


def _fetch_checkpoint(base: Place, name: str, folder: Path, blobs: Blobs, say: Telemetry) -> None:
    if checkpoint.manifest_of(folder / name) is not None:
        return
    partial = folder / (name + checkpoint.PARTIAL)
    got = store.download(base._replace(prefix=base.name(name)), partial, blobs)
    shutil.rmtree(folder / name, ignore_errors=True)  # one of that step that was not whole
    partial.rename(folder / name)
    say.event("from-mirror", checkpoint=name, got_bytes=got)


if __name__ == "__main__":
    ended = main(sys.argv[1:])
    if sys.argv[1:2] == ["worker"]:  # threads of gloo and NCCL may abort an interpreter that ends, whose work is done
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended)
    sys.exit(ended)
