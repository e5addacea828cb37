"""`planner chat` against a server of its own: what it sends and prints, and the sentence for all that can go wrong."""

from __future__ import annotations

import builtins
import io
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden
import pytest
from chat_server import KEY, ChatServer, delta, half, saying, status
from locks import shipped

from infra.names import names
from planner import chat as chats
from planner.chat import server as servers
from workloads.render import render

MODELS, CHAT = "/v1/models", "/v1/chat/completions"


class Terminal(io.StringIO):
    """Text that says of itself that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(servers.KEY, raising=False)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as made:
        yield made


def ask(server: ChatServer, *more: str) -> golden.Outcome:
    return golden.run(("chat", "--url", server.url, "--message", "Hello", *more))


def refused(*argv: str) -> str:
    """The sentence of a refusal: exit code 2 and one line on stderr."""
    outcome = golden.run(("chat", *argv))
    assert outcome.exit_code == 2, outcome
    assert outcome.stderr.startswith("planner: ")
    assert outcome.stderr.count("\n") == 1
    return outcome.stderr.removeprefix("planner: ").strip()


def converse(monkeypatch: pytest.MonkeyPatch, server: ChatServer, *typed: str | BaseException) -> golden.Outcome:
    """A conversation at a terminal in which a person types these lines and then ends it."""
    left = iter([*typed, EOFError()])

    def read(prompt: str) -> str:
        line = next(left)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", read)
    return golden.run(("chat", "--url", server.url))


# ------------------------------------------------------------------------------------------------------- one question


def test_the_answer_is_all_of_stdout_and_its_speed_is_on_stderr(server: ChatServer) -> None:
    outcome = ask(server)
    assert (outcome.exit_code, outcome.stdout) == (0, "Good day.\n")
    assert outcome.stderr.startswith("2 tokens, the first after 0.")


def test_the_request_is_streamed_and_leaves_to_the_server_what_was_not_said(server: ChatServer) -> None:
    ask(server)
    assert server.questions == [
        {
            "model": "qwen3-8b",
            "messages": [{"role": "user", "content": "Hello"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_what_was_said_goes_into_the_request(server: ChatServer) -> None:
    server.models = ["base", "adapter"]
    ask(server, "--model", "adapter", "--system", "Be brief.", "--max-tokens", "5", "--temperature", "0")
    (body,) = server.questions
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("adapter", 5, 0.0)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_the_question_may_come_on_standard_input(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is\na lock?\n"))
    assert golden.run(("chat", "--url", server.url)).stdout == "Good day.\n"
    assert server.questions[0]["messages"][0]["content"] == "What is\na lock?\n"


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_address_may_be_written_as_other_clients_want_it(server: ChatServer, ending: str) -> None:
    outcome = golden.run(("chat", "--url", f" {server.url}{ending} ", "-m", "Hello"))
    assert outcome.exit_code == 0
    assert [path for path, _, _ in server.asked] == [MODELS, CHAT]


def test_as_json_it_is_one_object_with_tokens_and_times(server: ChatServer) -> None:
    server.events = (delta(reasoning="Polite? "), *saying("Good ", "day."))
    outcome = ask(server, "--json")
    assert outcome.stderr == ""
    loaded = json.loads(outcome.stdout)
    assert loaded["schema_version"] == chats.SCHEMA == "tonnage.chat/1"
    assert (loaded["model"], loaded["url"]) == ("qwen3-8b", server.url)
    assert (loaded["content"], loaded["reasoning"], loaded["finish_reason"]) == ("Good day.", "Polite? ", "stop")
    assert (loaded["prompt_tokens"], loaded["completion_tokens"]) == (7, 2)
    assert 0 <= loaded["first_seconds"] <= loaded["seconds"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        # 11 tokens, one at once and ten in two seconds
        (chats.Answer("x", "", "stop", 7, 11, 0.5, 2.5), "11 tokens, the first after 0.50 s, then 5 a second"),
        (chats.Answer("x", "", "stop", 7, 1, 0.5, 0.5), "1 token, the first after 0.50 s"),
        (chats.Answer("x", "", "length", 7, 1, 0.5, 0.5), "1 token, the first after 0.50 s; it was cut at the limit"),
        (chats.Answer("x", "", "stop", None, None, 0.5, 2.0), "the first piece after 0.50 s, the last after 2.00 s"),
    ],
)
def test_the_speed_is_told_by_what_is_known(answer: chats.Answer, words: str) -> None:
    assert answer.speed().startswith(words)


def test_thoughts_are_no_part_of_the_answer_that_a_pipe_gets(server: ChatServer) -> None:
    for name in ("reasoning", "reasoning_content"):
        server.events = (delta(**{name: "Polite? "}), *saying("Good day."))
        assert ask(server).stdout == "Good day.\n"


def test_a_pipe_gets_the_answer_as_it_is_and_a_terminal_gets_no_control_characters(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.events = (delta(reasoning="Hm\x1b[2J"), *saying("a\tb\x1b]0;title\x07c\n"))
    assert ask(server).stdout == "a\tb\x1b]0;title\x07c\n\n"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    options = dict.fromkeys(("stack", "workload", "model", "system", "max_tokens", "temperature"))
    chats.chat({**options, "url": server.url, "message": "Hello", "as_json": False})
    assert terminal.getvalue() == "\033[2mHm[2J\033[0m\n\na\tb]0;titlec\n\n"


# ---------------------------------------------------------------------------------------------------- a conversation


def test_a_conversation_remembers_what_was_said(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = converse(monkeypatch, server, "One", "  ", "Two")
    assert outcome.exit_code == 0
    assert outcome.stdout == "Good day.\nGood day.\n\n"
    assert outcome.stderr.startswith(f"qwen3-8b at {server.url}: ")
    assert [message["content"] for message in server.questions[1]["messages"]] == ["One", "Good day.", "Two"]


def test_a_question_that_fails_is_reported_and_forgotten(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    too_long = {"error": {"message": "maximum context length is 512 tokens", "code": 400}}
    # refused once, then as before
    server.faults[CHAT] = lambda handler: (server.faults.clear(), handler.send(400, too_long))[0]
    outcome = converse(monkeypatch, server, "Long", "Short")
    assert outcome.exit_code == 0
    assert "refuses the question: maximum context length is 512 tokens" in outcome.stderr
    assert [message["content"] for message in server.questions[1]["messages"]] == ["Short"]


def test_ctrl_c_at_the_prompt_ends_it(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = converse(monkeypatch, server, KeyboardInterrupt())
    assert (outcome.exit_code, outcome.stdout) == (0, "\n")


def test_ctrl_c_stops_an_answer_and_not_the_conversation(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = chats._print, []

    def interrupted(piece: chats.Piece, **more: Any) -> None:
        calls.append(piece)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(piece, **more)

    monkeypatch.setattr(chats, "_print", interrupted)
    outcome = converse(monkeypatch, server, "One", "Two")
    assert outcome.exit_code == 0
    assert "stopped; the question is forgotten" in outcome.stderr
    assert outcome.stdout == "Good \nGood day.\n\n"
    assert [message["content"] for message in server.questions[1]["messages"]] == ["Two"]


# -------------------------------------------------------------------------------------------------------------- keys


def test_the_key_comes_from_the_environment_and_is_printed_nowhere(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = KEY
    monkeypatch.setenv(servers.KEY, f"{KEY}\n")
    outcome = ask(server, "--json")
    assert outcome.exit_code == 0
    assert {key for _, key, _ in server.asked} == {f"Bearer {KEY}"}
    assert KEY not in outcome.stdout + outcome.stderr


def test_no_key_and_a_wrong_one_are_told_apart(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = KEY
    sentence = refused("--url", server.url, "-m", "Hello")
    assert sentence == f"{server.url} wants an API key and TONNAGE_API_KEY is not set: export it and ask again"
    monkeypatch.setenv(servers.KEY, "wrong-key")
    sentence = refused("--url", server.url, "-m", "Hello")
    assert sentence.startswith(f"{server.url} refuses the API key: set TONNAGE_API_KEY to the server's own")
    assert "wrong-key" not in sentence
    assert server.questions == []


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines"])
def test_a_key_that_no_header_can_hold_is_refused(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv(servers.KEY, key)
    assert "holds characters that no API key has" in refused("--url", server.url, "-m", "Hello")


def test_a_key_over_http_to_another_machine_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(servers.KEY, KEY)
    monkeypatch.setattr(chats, "CONNECT_SECONDS", 0.2)
    # an address for documentation (RFC 5737), where nobody answers
    outcome = golden.run(("chat", "--url", "http://192.0.2.1", "-m", "Hello"))
    assert outcome.exit_code == 2
    assert "planner: the API key goes to 192.0.2.1 over http, where others may read it\n" in outcome.stderr


def test_a_redirect_is_not_followed_since_the_key_would_go_along(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(servers.KEY, KEY)
    server.faults[MODELS] = status(302, "", Location=f"{server.url}/elsewhere")
    assert "sends you elsewhere (status 302)" in refused("--url", server.url, "-m", "Hello")
    assert [path for path, _, _ in server.asked] == [MODELS]


def test_a_proxy_is_not_asked_for_this_machine_s_own_addresses(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert ask(server).exit_code == 0


# --------------------------------------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "say which server: --stack STACK for one of a stack, or --url"),
        (("--stack", "dev-32k", "--url", "http://localhost:8000"), "say which server"),
        (("--url", "localhost:8000", "-m", "x"), "'localhost:8000' is not the address of a server"),
        (("--url", "http://", "-m", "x"), "is not the address of a server"),
        (("--url", "http://[::1", "-m", "x"), "is not the address of a server"),
        (("--url", "http://me:secret@localhost", "-m", "x"), "--url has a name or password in it"),
        (("--url", "http://localhost?key=1", "-m", "x"), "--url has a ? or # in it"),
        (("--url", "http://localhost", "-m", " \n"), "the question is empty"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused_in_one_sentence(argv: tuple[str, ...], words: str) -> None:
    sentence = refused(*argv)
    assert words in sentence
    assert "secret" not in sentence


def test_json_at_a_terminal_needs_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert "--json answers one question" in refused("--url", "http://localhost", "--json")


def test_no_server_is_said_with_what_to_do() -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        sentence = refused("--url", address, "-m", "Hello")
    assert sentence.startswith(f"nothing answers at {address}: start the server, correct --url, or forward its port")


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "SILENCE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sentence = refused("--url", f"http://127.0.0.1:{silent.getsockname()[1]}", "-m", "Hello")
    assert "was silent for 0.2 s: it is overloaded or stuck" in sentence


def test_a_model_that_the_server_does_not_have_is_refused_with_those_that_it_has(server: ChatServer) -> None:
    server.models = ["qwen3-8b", "support"]
    sentence = refused("--url", server.url, "--model", "gpt-4", "-m", "Hello")
    assert sentence == f"{server.url} has no model 'gpt-4': it serves qwen3-8b, support"
    assert server.questions == []


def test_a_server_without_models_is_said_to_have_none(server: ChatServer) -> None:
    server.models = []
    assert "serves no model yet" in refused("--url", server.url, "-m", "Hello")


@pytest.mark.parametrize(
    ("path", "fault", "words"),
    [
        (MODELS, status(200, "<html>welcome</html>"), "does not speak OpenAI's API"),
        (MODELS, status(200, '{"models": []}'), "does not speak OpenAI's API"),
        (MODELS, status(404, "no such page"), "does not speak OpenAI's API"),
        (MODELS, status(503, "no\x1b[2J upstream"), "failed with status 503 (no[2J upstream): see the server's log"),
        (CHAT, status(500, {"error": {"message": "engine is dead"}}), "failed with status 500 (engine is dead)"),
        (CHAT, status(400, {"error": "no template"}), "refuses the question: no template"),
        (CHAT, status(422, {"detail": "bad field"}), "refuses the question: bad field"),
        (CHAT, status(429, {}), "refuses the question: {}"),
        (CHAT, status(400, {"message": "word " * 200}), "word ..."),
        (CHAT, half(delta(content="Go")), "ended its answer half way"),
        (CHAT, half(delta(content="Go"), {"error": {"message": "out of memory"}}), "gave up on the answer (out of"),
        (CHAT, half("nonsense"), "does not speak OpenAI's API"),
        (CHAT, half("[1]"), "does not speak OpenAI's API"),
    ],
)
def test_what_a_server_gets_wrong_is_said_in_one_sentence(
    server: ChatServer, path: str, fault: Any, words: str
) -> None:
    server.faults[path] = fault
    sentence = refused("--url", server.url, "-m", "Hello")
    assert words in sentence
    assert server.url in sentence


def test_a_connection_that_breaks_is_said(server: ChatServer) -> None:
    def broken(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"data: ")

    server.faults[CHAT] = broken
    assert f"the connection to {server.url} broke" in refused("--url", server.url, "-m", "Hello")


# ------------------------------------------------------------------------------------------------- a stack's server


def program(folder: Path, name: str, body: str) -> None:
    """A program on the PATH that does what the body says, in Python."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys, time\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def forwards(folder: Path, port: int) -> None:
    """A kubectl that leaves its arguments and its end in files, and forwards to that port for as long as it lives."""
    program(
        folder,
        "kubectl",
        f"""
import pathlib, signal
folder = pathlib.Path({str(folder)!r})
(folder / "arguments").write_text(" ".join(sys.argv[1:]))
def end(*_):
    (folder / "ended").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("Forwarding from 127.0.0.1:{port} -> 8000", flush=True)
while True:
    time.sleep(0.05)
""",
    )


def test_a_stack_s_server_is_reached_by_kubectl_with_the_stack_s_own_key(server: ChatServer, on_path: Path) -> None:
    server.key = KEY
    forwards(on_path, server.port)
    program(on_path, "pulumi", f"assert sys.argv[1:4] == ['config', 'get', 'tonnage:apiKey'], sys.argv\nprint({KEY!r})")
    outcome = golden.run(("chat", "--stack", "dev-32k", "-m", "Hello"))
    assert (outcome.exit_code, outcome.stdout) == (0, "Good day.\n"), outcome.stderr
    arguments = (on_path / "arguments").read_text(encoding="utf-8")
    assert arguments == (
        "--context tonnage-dev-32k --namespace tonnage port-forward --pod-running-timeout=20s service/serve :80"
    )
    assert (on_path / "ended").exists()


def test_a_key_in_the_environment_spares_the_question_to_pulumi(
    server: ChatServer, on_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = KEY
    forwards(on_path, server.port)
    monkeypatch.setenv(servers.KEY, KEY)
    assert golden.run(("chat", "--stack", "dev-32k", "-m", "Hello")).exit_code == 0


def test_the_context_is_the_cluster_that_the_program_makes_for_the_stack() -> None:
    # `az aks get-credentials --name CLUSTER` names the context after the cluster
    assert names("dev-32k").cluster == "tonnage-dev-32k"


def test_the_service_is_the_one_that_is_rendered_for_the_server() -> None:
    _, lock = shipped("dev-32k")
    (service,) = (one for one in render(lock) if one["kind"] == "Service")
    assert (service["metadata"]["namespace"], service["metadata"]["name"]) == (servers.NAMESPACE, "serve")
    assert [port["port"] for port in service["spec"]["ports"]] == [80]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ('error: context "tonnage-dev-32k" does not exist', "run `az aks get-credentials --resource-group tonnage-dev"),
        ('Error from server (NotFound): services "serve" not found', "the cluster has no server serve"),
        ("error: unable to forward port because pod is not running", "one that is off is started with `kubectl"),
        ("", "kubectl cannot reach the server serve (without a word)"),
    ],
)
def test_what_kubectl_cannot_do_is_said_with_the_next_step(
    on_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, sentence: str
) -> None:
    monkeypatch.setenv(servers.KEY, KEY)
    program(on_path, "kubectl", f"sys.exit({words!r})")
    assert sentence in refused("--stack", "dev-32k", "-m", "Hello")


def test_a_kubectl_that_hangs_is_ended(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(servers.KEY, KEY)
    monkeypatch.setattr(servers, "FORWARD_SECONDS", 0.2)
    program(on_path, "kubectl", "time.sleep(60)")
    assert "kubectl cannot reach the server serve" in refused("--stack", "dev-32k", "-m", "Hello")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (None, "pulumi, which knows the API key of dev-32k, is not on the PATH: export TONNAGE_API_KEY"),
        ("sys.exit('error: passphrase must be set')", "(error: passphrase must be set): export TONNAGE_API_KEY"),
        ("pass", "pulumi does not tell the API key of dev-32k (without a word)"),
        ("time.sleep(60)", "pulumi did not tell the API key of dev-32k within"),
    ],
)
def test_a_key_that_pulumi_does_not_tell_is_said_with_the_next_step(
    on_path: Path, monkeypatch: pytest.MonkeyPatch, body: str | None, words: str
) -> None:
    if body is not None:
        program(on_path, "pulumi", body)
    if body and "sleep" in body:
        monkeypatch.setattr(servers, "FORWARD_SECONDS", 0.2)
    assert words in refused("--stack", "dev-32k", "-m", "Hello")


def test_without_kubectl_the_way_round_is_named(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(servers.KEY, KEY)
    assert "kubectl is not on the PATH" in refused("--stack", "dev-32k", "-m", "Hello")


def test_a_stack_that_is_not_there_or_has_no_such_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no stack file" in refused("--stack", "nowhere", "-m", "Hello")
    sentence = refused("--stack", "dev-32k", "--workload", "finetune", "-m", "Hello")
    assert sentence == "the plan of dev-32k has no server 'finetune': choose with --workload from serve"
    _, lock = shipped("dev-32k")
    serve = next(w for w in lock.workloads if w.task == "serve")
    twins = (serve, serve.model_copy(update={"name": "other"}))
    for workloads, words in (
        (twins, "has several servers: choose with --workload from serve, other"),
        ([w for w in lock.workloads if w.task != "serve"], "has no server, only fine-tuning"),
    ):
        changed = lock.model_copy(update={"workloads": workloads})
        monkeypatch.setattr(servers, "read_lock", lambda _, changed=changed: changed)
        assert words in refused("--stack", "dev-32k", "-m", "Hello")
