"""Where a chat goes: an address that was given, or a stack's own server behind a port that kubectl forwards."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from planner.errors import PlannerError
from planner.stack import read_lock

KEY = "TONNAGE_API_KEY"
NAMESPACE = "tonnage"
FORWARD_SECONDS = 90
_SAID_CHARACTERS = 300


class Server(NamedTuple):
    """Where to ask. base: up to and without /v1; key: None sends none; hint: what to do when nothing answers there."""

    base: str
    key: str | None
    hint: str


@contextlib.contextmanager
def server_of(options: Mapping[str, Any]) -> Iterator[Server]:
    """The server of --url, or the one of --stack behind a forwarded port for as long as the chat lasts."""
    key = _key_of_environment()
    if options["url"] is not None:
        hint = "start the server, correct --url, or forward its port (`kubectl --namespace tonnage port-forward ...`)"
        yield Server(_base(options["url"]), key, hint)
        return
    stack, name = options["stack"].strip(), _workload(options["stack"], options["workload"])
    key = key or _key_of_stack(stack)
    with _forwarded(stack, name) as port:
        hint = f"see `kubectl --namespace {NAMESPACE} get pods`, and wait until {name} is ready"
        yield Server(f"http://127.0.0.1:{port}", key, hint)


def _base(address: str) -> str:
    """An address up to its /v1. PlannerError for what is no http address, and for one with a password in it."""
    import httpx

    text = address.strip()
    try:
        url = httpx.URL(text)
        right = url.scheme in ("http", "https") and bool(url.host)
    except (httpx.InvalidURL, UnicodeError):
        right = False
    if not right:
        raise PlannerError(f"{one_line(text)[:100]!r} is not the address of a server: write http://HOST:PORT")
    if url.userinfo:
        raise PlannerError(f"--url has a name or password in it, which others can see: export {KEY} instead")
    if url.query or url.fragment:
        raise PlannerError("--url has a ? or # in it: give the address of the server alone, such as http://HOST:PORT")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


def _key_of_environment() -> str | None:
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise PlannerError(f"{KEY} holds characters that no API key has: export it again")
    return key or None


def _workload(stack: str, wanted: str | None) -> str:
    """The name of the stack's server. PlannerError when it has none, or several and none was chosen."""
    servers = [workload.name for workload in read_lock(stack).workloads if workload.task == "serve"]
    if not servers:
        raise PlannerError(f"the plan of {stack} has no server, only fine-tuning: add a workload of the kind serve")
    if wanted is None and len(servers) == 1:
        return servers[0]
    if wanted not in servers:
        missing = f"has no server {wanted!r}" if wanted is not None else "has several servers"
        raise PlannerError(f"the plan of {stack} {missing}: choose with --workload from {', '.join(servers)}")
    return str(wanted)


def _key_of_stack(stack: str) -> str:
    """The stack's secret tonnage:apiKey, by the Pulumi CLI. PlannerError when it does not tell."""
    command = ["pulumi", "config", "get", "tonnage:apiKey", "--stack", stack, "--non-interactive"]
    ask = f"export {KEY} with the server's API key"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=FORWARD_SECONDS
        )
    except FileNotFoundError as error:
        raise PlannerError(f"pulumi, which knows the API key of {stack}, is not on the PATH: {ask}") from error
    except subprocess.TimeoutExpired as error:
        raise PlannerError(f"pulumi did not tell the API key of {stack} within {FORWARD_SECONDS} s: {ask}") from error
    if done.returncode or not done.stdout.strip():
        raise PlannerError(f"pulumi does not tell the API key of {stack} ({_last_words(done.stderr)}): {ask}")
    return done.stdout.strip()


@contextlib.contextmanager
def _forwarded(stack: str, name: str) -> Iterator[int]:
    """A free port of this machine that leads to the Service of that name in the stack's own cluster, by kubectl."""
    cluster = f"tonnage-{stack}"  # also the name of the context that `az aks get-credentials` writes
    command = ["kubectl", "--context", cluster, "--namespace", NAMESPACE, "port-forward"]
    command += ["--pod-running-timeout=20s", f"service/{name}", ":80"]
    with contextlib.ExitStack() as closing:
        said = Path(closing.enter_context(tempfile.TemporaryDirectory())) / "kubectl.log"
        log = closing.enter_context(said.open("wb"))
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        except FileNotFoundError as error:
            raise PlannerError(
                "kubectl is not on the PATH: install it, or forward a port yourself and give --url its address"
            ) from error
        closing.callback(_end, process)
        until = time.monotonic() + FORWARD_SECONDS
        ended = False
        while True:
            words = said.read_text(encoding="utf-8", errors="replace")
            found = re.search(r"Forwarding from 127\.0\.0\.1:(\d+) ", words)
            if found is not None:
                break
            if ended or time.monotonic() > until:
                raise PlannerError(_why_not(_last_words(words), cluster, name))
            ended = process.poll() is not None  # once more: its last words may have come since
            time.sleep(0.02)
        yield int(found[1])


def _why_not(words: str, cluster: str, name: str) -> str:
    if "context" in words and "does not exist" in words:
        return (
            "kubectl does not know the cluster: run"
            f" `az aks get-credentials --resource-group {cluster} --name {cluster}`"
            " and `kubelogin convert-kubeconfig --login azurecli`"
        )
    if "not found" in words:
        return f"the cluster has no server {name} ({words}): run `pulumi up`"
    return (
        f"kubectl cannot reach the server {name} ({words}): see `kubectl --namespace {NAMESPACE} get pods`; one that is"
        f" off is started with `kubectl --namespace {NAMESPACE} scale deployment/{name} --replicas 1`"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else "without a word"


def printable(text: str) -> str:
    """The text without control characters but tabs and newlines: what a terminal may be given."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def one_line(text: str) -> str:
    """What somebody else said, as a part of a sentence of ours."""
    line = " ".join(printable(text).split())
    return line if len(line) <= _SAID_CHARACTERS else f"{line[:_SAID_CHARACTERS].rstrip()} ..."
