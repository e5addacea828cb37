"""A server as the plan's manifest says, on a real vLLM: a tiny random Qwen3 on the CPU, from its start to its end.

The intent is planned and rendered as any other, and the container's own command line, variables and probes are run.
Only what a machine without a GPU cannot take is left out, and only the port and the places of volumes are others.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: run make live", allow_module_level=True)

import httpx
import openai
import tiny_qwen3

from infra.alerts import SCRAPED
from planner.catalog.prices import DEFAULT, load_sheet
from planner.chat import SCHEMA
from planner.chat.server import KEY as KEY_VARIABLE
from planner.plan import make_plan, parse_intent
from planner.plan.lock import Lock, LockedWorkload, lock_of
from planner.stack import read_lock, stack_names
from workloads.arguments import ADAPTERS, adapter_request, serving_of
from workloads.render import render, vllm_arguments
from workloads.server import GUARD_FOLDER
from workloads.timing import serving_timing

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
KEY = "the-right-key"
MODEL = "tests/tiny-qwen3"  # written as a hub id, and a folder of the server's working folder
# what vLLM refuses without a GPU; test_vllm_arguments holds that it does
GPU_ONLY = ("--enable-sleep-mode",)
# of the container: where its volumes are mounted, and what fills variables from secrets
MOUNTS = ("/cache", ADAPTERS, "/tmp", GUARD_FOLDER)
SECRETS = {"api-key": KEY, "hf-token": "no-token"}
# of the CPU build: one thread, since two that share a busy core wait for each other
CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}

HELLO = [{"role": "user", "content": "hello"}]
POLITE = "Good day to you."
LIGHT = [{"role": "user", "content": "light, please"}]
LAMP = {
    "type": "function",
    "function": {
        "name": "lamp",
        "description": "Switches the lamp.",
        "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
    },
}
CALL = '<tool_call>\n{"name": "lamp", "arguments": {"on": true}}\n</tool_call>'


@dataclass(frozen=True)
class Running:
    """A vLLM server and what it was made of. folder: its working folder, with model, adapters and volumes."""

    folder: Path
    workload: LockedWorkload
    container: dict[str, Any]
    environment: dict[str, str]
    port: int
    process: subprocess.Popen[bytes]
    said: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.said.read_text(encoding="utf-8", errors="replace")

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def post(self, path: str, body: dict[str, Any], key: str | None = KEY) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=120)

    def probe(self, kind: str, environment: dict[str, str] | None = None) -> int:
        """Runs a probe of the container as its kubelet would, 0 where it is content."""
        probe = self.container[kind]
        if "exec" in probe:
            command = [str(self.port) if word == "8000" else word for word in probe["exec"]["command"]]
            done = subprocess.run(
                command, env=environment or self.environment, timeout=probe["timeoutSeconds"], check=False
            )
            return done.returncode
        (port,) = self.container["ports"]
        assert probe["httpGet"]["port"] == port["name"]
        try:
            answer = httpx.get(f"{self.url}{probe['httpGet']['path']}", timeout=probe["timeoutSeconds"])
        except httpx.TransportError:
            return 1
        return 0 if 200 <= answer.status_code < 400 else 1  # as a kubelet counts


def flags(words: Sequence[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter that the plan names, and one in the volume for adapters."""
    made = tmp_path_factory.mktemp("serving")
    torch = tiny_qwen3.torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of so small a model, more only wait for each other
    tokenizer = tiny_qwen3.save_tokenizer(made / MODEL)
    tiny_qwen3.save_model(made / MODEL, tokenizer)
    tiny_qwen3.save_adapter(made / MODEL, made / "tests/polite", tokenizer, HELLO, POLITE)
    tiny_qwen3.save_adapter(made / MODEL, made / ADAPTERS[1:] / "tools", tokenizer, LIGHT, CALL, [LAMP])
    torch.set_num_threads(threads)
    return made


def planned(folder: Path, **workload: Any) -> Lock:
    """The plan of an intent with one server of the tiny model."""
    intent = parse_intent(
        {
            "model": MODEL,
            "approved_usd_per_month": 5000,
            "workloads": [{"kind": "serve", "context": tiny_qwen3.CONTEXT, "tool_call_parser": "hermes", **workload}],
        },
        "the test's intent",
    )
    with contextlib.chdir(folder):
        return lock_of(make_plan(intent, load_sheet(DEFAULT)), intent)


@pytest.fixture(scope="module")
def lock(folder: Path) -> Lock:
    """A plan that uses what a server can have; the cheapest card has no bfloat16, which is one flag more."""
    adapter = {"name": "polite", "rank": tiny_qwen3.RANK, "base": MODEL, "hub_id": "tests/polite"}
    more = {"adapters": [adapter], "runtime_adapters": True, "settings": {"max_loras": 2}}
    return planned(folder, concurrency=4, answer_tokens=512, **more)


@pytest.fixture(scope="module")
def cpu_lock(folder: Path) -> Lock:
    """The same model for a machine without a GPU."""
    return planned(folder, device="cpu")


@pytest.fixture(scope="module")
def server(folder: Path, lock: Lock) -> Iterator[Running]:
    with serving(folder, lock, "server", {"VLLM_CPU_KVCACHE_SPACE": "1"}) as running:
        yield running


@contextlib.contextmanager
def serving(folder: Path, lock: Lock, name: str, more: dict[str, str]) -> Iterator[Running]:
    """The server of a plan, once its startup probe is content, and gone with its processes afterwards."""
    (workload,) = lock.workloads
    objects = render(lock)
    (deployment,) = (one for one in objects if one["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["vllm", "serve"]
    port = free_port()
    arguments = [
        f"--port={port}" if word == "--port=8000" else word for word in container["args"] if word not in GPU_ONLY
    ]
    for mount in MOUNTS:
        (folder / mount[1:]).mkdir(parents=True, exist_ok=True)
    (guard,) = (one for one in objects if one["kind"] == "ConfigMap")
    assert {"name": "key-guard", "configMap": {"name": guard["metadata"]["name"]}} in pod["volumes"]
    for file, text in guard["data"].items():
        (folder / GUARD_FOLDER[1:] / file).write_text(text, encoding="utf-8")
    environment = {**variables(container, folder), **CPU, **QUIET, **more, "PATH": os.environ["PATH"]}
    command = [sys.executable, str(HERE / "vllm_command.py"), "serve", *arguments, "--host=127.0.0.1"]
    start = time.monotonic()
    said = folder / f"{name}.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    running = Running(folder, workload, container, environment, port, process, said)
    try:
        until = start + serving_timing(serving_of(workload)).start_seconds
        while running.probe("startupProbe"):
            assert process.poll() is None, running.log[-3000:]
            assert time.monotonic() < until, running.log[-3000:]
            time.sleep(0.5)
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its engine and workers too
        process.wait()


def variables(container: dict[str, Any], folder: Path) -> dict[str, str]:
    """The container's variables: volumes in the folder, secrets as the vault would have them."""
    found = {"READY_FOLDER": str(folder / "tmp")}
    for one in container["env"]:
        if "value" in one:
            value = one["value"]
            found[one["name"]] = f"{folder}{value}" if value.startswith(MOUNTS) else value
        else:
            found[one["name"]] = SECRETS[one["valueFrom"]["secretKeyRef"]["key"]]
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ------------------------------------------------------------------------------------------------------- the command


def test_every_flag_of_the_shipped_stacks_is_tried_here_but_for_those_that_need_a_gpu(
    lock: Lock, cpu_lock: Lock
) -> None:
    tried = {True: flags(vllm_arguments(lock.workloads[0])), False: flags(vllm_arguments(cpu_lock.workloads[0]))}
    with contextlib.chdir(ROOT):
        locks = [read_lock(stack) for stack in stack_names()]
    shipped = [one for lock in locks for one in lock.workloads if one.task == "serve"]
    assert {one.gpus > 0 for one in shipped} == {True, False}
    for one in shipped:
        asked = flags(vllm_arguments(one))
        assert asked <= tried[one.gpus > 0] | set(GPU_ONLY), one.name
        assert one.gpus or not asked & set(GPU_ONLY), one.name
    # and more: adapters, which no shipped stack has
    assert {"--enable-lora", "--max-loras", "--max-lora-rank", "--lora-modules"} <= tried[True]


# --------------------------------------------------------------------------------------------------------- its probes


def test_the_server_is_ready_only_when_it_has_answered(server: Running) -> None:
    marks = folder_of_marks(server)
    assert list(marks.glob("answered-*")) == []
    assert server.probe("readinessProbe", server.environment | {"VLLM_API_KEY": "wrong"}) == 1
    assert list(marks.glob("answered-*")) == []
    assert server.probe("readinessProbe") == 0
    assert len(list(marks.glob("answered-*"))) == 1
    assert server.probe("livenessProbe") == 0
    assert server.probe("startupProbe") == 0


def folder_of_marks(server: Running) -> Path:
    return Path(server.environment["READY_FOLDER"])


def test_a_readiness_probe_of_a_port_where_nobody_answers_fails(server: Running) -> None:
    command = [
        str(free_port()) if word == "8000" else word for word in server.container["readinessProbe"]["exec"]["command"]
    ]
    done = subprocess.run(command, env=server.environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith("not ready: ")) == (1, True)


# ---------------------------------------------------------------------------------------------------------- its key


@pytest.mark.parametrize("key", [None, "the-wrong-key", f"{KEY}x"])
def test_a_wrong_key_is_refused_wherever_something_can_be_asked_or_loaded(server: Running, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401
    question = {"model": MODEL, "messages": HELLO, "max_tokens": 1}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/load_lora_adapter"):
        assert httpx.post(f"{server.url}{path}", json=question, headers=headers).status_code == 401, path


def test_the_right_key_is_let_in_and_its_probes_and_metrics_need_none(server: Running) -> None:
    names = [model.id for model in server.client().models.list()]
    assert names[:2] == [MODEL, "polite"]
    for path in ("/health", "/metrics"):
        assert httpx.get(f"{server.url}{path}").status_code == 200


@pytest.mark.parametrize("key", [None, "the-wrong-key"])
def test_a_wrong_key_is_refused_beside_v1_too_where_vllm_itself_does_not_ask(server: Running, key: str | None) -> None:
    question = {"model": MODEL, "messages": HELLO, "max_tokens": 1}
    bodies: dict[str, dict[str, Any]] = {
        "/invocations": question,
        "/tokenize": {"model": MODEL, "prompt": "x"},
        "/adapters": {"name": "unasked", "src": f"{server.folder}/nowhere"},
    }
    for path, body in bodies.items():
        refused = server.post(path, body, key=key)
        assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"}), path
    # the paths are there: the right key reaches them, and vLLM goes and looks for an adapter that is nowhere
    told = {path: server.post(path, body).status_code for path, body in bodies.items()}
    assert (told.pop("/adapters") in (400, 404), told) == (True, {"/invocations": 200, "/tokenize": 200})


def test_of_all_paths_of_the_server_two_answer_without_the_key(server: Running) -> None:
    """Asked of the server itself, by its OpenAPI document, so that a new vLLM's new path is asked too."""
    told = httpx.get(f"{server.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()["paths"]
    assert {"/health", "/invocations", "/tokenize", "/version", "/v1/chat/completions"} <= set(told)
    answered = {
        path: httpx.request(method.upper(), f"{server.url}{path}").status_code
        for path, methods in {**told, "/metrics": ["get"], "/docs": ["get"], "/openapi.json": ["get"]}.items()
        for method in methods
    }
    assert {path for path, status in answered.items() if status != 401} == {"/health", "/metrics"}
    assert httpx.get(f"{server.url}/metrics/").status_code == 401


def test_a_web_socket_without_the_key_is_refused_before_it_opens(server: Running) -> None:
    asked = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",  # of RFC 6455, 1.3
    }
    assert httpx.get(f"{server.url}/v1/realtime", headers=asked).status_code == 403
    assert httpx.get(f"{server.url}/anywhere", headers=asked).status_code == 403


def test_a_browser_may_ask_without_the_key_what_it_may_do_and_vllm_itself_says_nothing(server: Running) -> None:
    asked = {"Origin": "http://localhost", "Access-Control-Request-Method": "POST"}
    for path in ("/v1/chat/completions", "/invocations"):
        answer = httpx.options(f"{server.url}{path}", headers=asked)
        # no page of another origin is let in, unless --allowed-origins names it
        assert (answer.status_code, answer.text) == (400, "Disallowed CORS origin")


def test_the_metrics_that_the_alerts_ask_for_are_there(server: Running) -> None:
    told = httpx.get(f"{server.url}/metrics").text
    for name in SCRAPED["vllm"]:
        assert f"\n{name}{{" in told


# ------------------------------------------------------------------------------------------------------- its answers


def test_it_chats_and_streams_the_same(server: Running) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = server.client().chat.completions.create(**asked)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    pieces = list(server.client().chat.completions.create(**asked, stream=True))
    assert len(pieces) > 2
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content


def test_the_adapter_of_the_plan_says_what_it_has_learnt_and_the_model_does_not(server: Running) -> None:
    said = {
        name: server.client().chat.completions.create(model=name, messages=HELLO, max_tokens=40, temperature=0)
        for name in ("polite", MODEL)
    }
    assert said["polite"].choices[0].message.content == POLITE
    assert said["polite"].choices[0].finish_reason == "stop"
    assert said[MODEL].choices[0].message.content != POLITE


def test_planner_chat_talks_to_it(server: Running) -> None:
    command = [sys.executable, "-m", "planner", "chat", "--url", server.url, "--message", "hello", "--temperature", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), KEY_VARIABLE: KEY}

    def run(*more: str, **other: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], env=environment | other, capture_output=True, text=True, check=False, timeout=120
        )

    answered = run("--model", "polite")
    assert (answered.returncode, answered.stdout) == (0, f"{POLITE}\n"), answered.stderr
    # a byte a token, and the end
    assert answered.stderr.startswith(f"{len(POLITE) + 1} tokens, the first after ")
    told = json.loads(run("--json", "--max-tokens", "4").stdout)
    assert (told["schema_version"], told["model"], told["completion_tokens"]) == (SCHEMA, MODEL, 4)
    assert told["finish_reason"] == "length"
    wrong = run(**{KEY_VARIABLE: "the-wrong-key"})
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert f"{server.url} refuses the API key" in wrong.stderr
    assert "has no model 'gpt-4': it serves tests/tiny-qwen3, polite" in run("--model", "gpt-4").stderr
    assert "refuses the question: max_tokens=5000" in run("--max-tokens", "5000").stderr


def test_a_second_adapter_is_loaded_while_it_runs_and_its_tool_call_is_understood(server: Running) -> None:
    client = server.client()
    asked: dict[str, Any] = {"model": "tools", "messages": LIGHT, "tools": [LAMP], "max_tokens": 100, "temperature": 0}
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**asked)
    # the volume of adapters lies elsewhere here
    request = json.loads(adapter_request("tools", "tools"))
    request["lora_path"] = f"{server.folder}{request['lora_path']}"
    loaded = server.post("/v1/load_lora_adapter", request)
    assert loaded.status_code == 200, loaded.text
    assert [model.id for model in client.models.list()] == [MODEL, "polite", "tools"]

    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("lamp", {"on": True})

    name, arguments = "", ""
    for piece in client.chat.completions.create(**asked, stream=True):
        for part in piece.choices[0].delta.tool_calls or ():
            assert part.function is not None
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert (name, json.loads(arguments)) == ("lamp", {"on": True})
    # and the first is not disturbed
    polite = client.chat.completions.create(model="polite", messages=HELLO, max_tokens=40, temperature=0)
    assert polite.choices[0].message.content == POLITE


# The adapter has learnt one answer by heart, and is steep: transformers' own float16 and float32 are up to 0.017 apart.
@pytest.mark.parametrize(("name", "tolerance"), [(MODEL, 0.01), ("polite", 0.02)])
def test_log_probabilities_are_those_of_transformers(server: Running, name: str, tolerance: float) -> None:
    tokens = [(37 * place + 11) % 256 for place in range(64)]  # any bytes
    answer = server.post(
        "/v1/completions",
        {"model": name, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 10},
    )
    assert answer.status_code == 200, answer.text
    told = answer.json()["choices"][0]["prompt_logprobs"]
    adapter = server.folder / "tests/polite" if name == "polite" else None
    expected = tiny_qwen3.log_probabilities(server.folder / MODEL, tokens, adapter, dtype="float16")
    differences = [
        abs(entry["logprob"] - expected[place - 1][int(token)])
        for place in range(1, len(tokens))
        for token, entry in told[place].items()
    ]
    assert len(differences) >= 63 * 10  # the ten likeliest at each place, and the one that is there
    assert max(differences) < tolerance
    if adapter is not None:  # and not those of the model without it
        plain = tiny_qwen3.log_probabilities(server.folder / MODEL, tokens, dtype="float16")
        assert max(abs(expected[place][65] - plain[place][65]) for place in range(len(tokens))) > 1


def test_what_is_too_long_is_refused_and_does_no_harm(server: Running) -> None:
    tokens = [65] * (tiny_qwen3.CONTEXT + 1)
    refused = server.post("/v1/completions", {"model": MODEL, "prompt": tokens, "max_tokens": 1})
    assert refused.status_code == 400
    assert str(tiny_qwen3.CONTEXT) in refused.json()["error"]["message"]
    assert server.probe("livenessProbe") == 0


# -------------------------------------------------------------------------------- its end; none of its tests may follow


def test_when_it_must_stop_it_finishes_what_it_has_begun_within_its_grace(server: Running) -> None:
    timing = serving_timing(serving_of(server.workload))
    # as many as the plan holds at once, each as long as the context allows
    most, streams = tiny_qwen3.CONTEXT - 64, 4
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": most, "temperature": 0}

    def stream(place: int) -> tuple[int, str | None]:
        """How many tokens came in all, and why they ended."""
        client = server.client()
        together.wait(60)  # making a client takes longer than a short answer
        pieces = client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
        )
        tokens, why = 0, None
        for piece in pieces:
            begun[place] += 1
            if piece.usage is not None:
                tokens = piece.usage.completion_tokens
            for choice in piece.choices:
                why = choice.finish_reason or why
        return tokens, why

    begun, together = [0] * streams, threading.Barrier(streams)
    with ThreadPoolExecutor(streams) as threads:
        waiting = [threads.submit(stream, place) for place in range(streams)]
        until = time.monotonic() + 60
        while min(begun) < 1:  # of each of them: one that is only on its way is not in flight
            assert time.monotonic() < until, server.log[-3000:]
            time.sleep(0.01)
        # after the container's preStop, which sleeps, the kubelet sends SIGTERM to its first process
        server.process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        assert not any(one.done() for one in waiting), "the answers were over before the server was told to stop"
        ended = [one.result() for one in waiting]
    code = server.process.wait(timing.grace_seconds)
    assert ended == [(most, "length")] * streams
    assert code == 0, server.log[-3000:]
    assert time.monotonic() - sent < timing.grace_seconds - timing.pre_stop_seconds
    assert server.probe("livenessProbe") == 1


# ------------------------------------------------------------------------------------------ a machine without a GPU


def test_the_profile_for_machines_without_a_gpu_is_served_with_all_of_its_arguments(
    folder: Path, cpu_lock: Lock
) -> None:
    (workload,) = cpu_lock.workloads
    assert not flags(vllm_arguments(workload)) & set(GPU_ONLY)
    with serving(folder, cpu_lock, "cpu", {}) as server:
        assert server.probe("readinessProbe") == 0
        answer = server.client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3, temperature=0)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3
