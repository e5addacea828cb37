"""`planner chat`: talk to a server of a stack, or to any that speaks OpenAI's API, to see that it works."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.chat.server import KEY, Server, one_line, printable, server_of
from planner.errors import PlannerError

if TYPE_CHECKING:
    import httpx

SCHEMA = "tonnage.chat/1"
CONNECT_SECONDS = 10
SILENCE_SECONDS = 300  # between two pieces: a question may wait in a queue, and a cold server compiles first

Message = dict[str, str]


class Piece(NamedTuple):
    """A part of an answer as it arrives. reasoning: it is thought before the answer, by a model that shows it."""

    text: str
    reasoning: bool


class Answer(NamedTuple):
    """An answer in full. first_seconds: until its first piece; seconds: until its end; tokens as the server counts."""

    content: str
    reasoning: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    first_seconds: float
    seconds: float

    def speed(self) -> str:
        """`23 tokens, the first after 0.41 s, then 57 a second`: what people want to know of a server."""
        if self.completion_tokens is None:
            return f"the first piece after {self.first_seconds:.2f} s, the last after {self.seconds:.2f} s"
        count = f"{self.completion_tokens:,} token{'s' if self.completion_tokens != 1 else ''}"
        text = f"{count}, the first after {self.first_seconds:.2f} s"
        after = self.seconds - self.first_seconds
        if self.completion_tokens > 1 and after > 0:
            text += f", then {(self.completion_tokens - 1) / after:,.0f} a second"
        return text if self.finish_reason != "length" else f"{text}; it was cut at the limit of tokens"


class Limits(NamedTuple):
    """What a request sets; None leaves it to the server."""

    max_tokens: int | None
    temperature: float | None


def chat(options: Mapping[str, Any]) -> None:
    """Answer one question (--message, or standard input), or hold a conversation at a terminal.

    options: those of the command, by parameter. PlannerError in one sentence for no server, a key that it refuses, a
    model that it does not have, a stack without a server, and a question that it will not answer.
    """
    question = _question(options)
    with server_of(options) as server, _client(server) as client:
        model = _model(client, server, options["model"])
        limits = Limits(options["max_tokens"], options["temperature"])
        said: list[Message] = [{"role": "system", "content": options["system"]}] if options["system"] else []
        if question is None:
            _converse(client, server, model, limits, said)
            return
        said.append({"role": "user", "content": question})
        answer = _ask(client, server, model, limits, said, show=not options["as_json"])
        if options["as_json"]:
            print(json.dumps({"schema_version": SCHEMA, "url": server.base, "model": model, **answer._asdict()}))
        else:
            print(answer.speed(), file=sys.stderr)


def _question(options: Mapping[str, Any]) -> str | None:
    """The one question, None for a conversation. PlannerError for an empty one, and for options that exclude others."""
    if (options["stack"] is None) == (options["url"] is None):
        raise PlannerError(
            "say which server: --stack STACK for one of a stack, or --url http://HOST:PORT for any other"
        )
    question: str | None = options["message"]
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read()
    if question is None and options["as_json"]:
        raise PlannerError("--json answers one question: give it with --message, or on standard input")
    if question is not None and not question.strip():
        raise PlannerError("the question is empty: give it with --message, or on standard input")
    return question


def _converse(client: httpx.Client, server: Server, model: str, limits: Limits, said: list[Message]) -> None:
    """Question and answer in turns until the end of input. A question that fails is reported and left out."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (arrow keys and history for input())
    print(f"{model} at {server.base}: Ctrl-C stops an answer, Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            question = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question.strip():
            continue
        said.append({"role": "user", "content": question})
        try:
            answer = _ask(client, server, model, limits, said, show=True)
        except (PlannerError, KeyboardInterrupt) as error:
            said.pop()
            stopped = "stopped; the question is forgotten"
            print(f"{stopped if isinstance(error, KeyboardInterrupt) else error}", file=sys.stderr)
            continue
        said.append({"role": "assistant", "content": answer.content})
        print(answer.speed(), file=sys.stderr)


def _ask(
    client: httpx.Client, server: Server, model: str, limits: Limits, said: Sequence[Message], *, show: bool
) -> Answer:
    """One request, streamed; show: print what comes, as it comes."""
    body: dict[str, Any] = {"model": model, "messages": list(said), "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    body |= {name: value for name, value in limits._asdict().items() if value is not None}
    usage: dict[str, Any] = {}
    content, reasoning, finish = "", "", None
    terminal = sys.stdout.isatty()
    start = time.monotonic()
    first = None
    try:
        for event in _events(client, server, body):
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                finish = choice.get("finish_reason") or finish
                piece = _piece(choice.get("delta") or {})
                if piece is None:
                    continue
                first = time.monotonic() if first is None else first
                if show:
                    _print(piece, before=reasoning, started=bool(content), terminal=terminal)
                if piece.reasoning:
                    reasoning += piece.text
                else:
                    content += piece.text
    finally:
        if show and first is not None:
            print(flush=True)
    end = time.monotonic()
    return Answer(
        content=content,
        reasoning=reasoning,
        finish_reason=finish,
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        first_seconds=round((first or end) - start, 3),
        seconds=round(end - start, 3),
    )


def _piece(delta: Mapping[str, Any]) -> Piece | None:
    """The text of a delta; vLLM names what a model thinks `reasoning`, others `reasoning_content`."""
    if delta.get("content"):
        return Piece(str(delta["content"]), reasoning=False)
    thought = delta.get("reasoning") or delta.get("reasoning_content")
    return Piece(str(thought), reasoning=True) if thought else None


def _print(piece: Piece, *, before: str, started: bool, terminal: bool) -> None:
    """A piece on stdout: thoughts faintly and only at a terminal, which gets no control characters of a model's."""
    if piece.reasoning:
        if terminal:
            print(f"\033[2m{printable(piece.text)}\033[0m", end="", flush=True)
        return
    if terminal and before and not started:
        print("\n")
    print(printable(piece.text) if terminal else piece.text, end="", flush=True)


# ------------------------------------------------------------------------------------------------------ the requests


def _client(server: Server) -> httpx.Client:
    import httpx

    url = httpx.URL(server.base)
    local = url.host in ("localhost", "127.0.0.1", "::1")
    headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    if server.key and url.scheme == "http" and not local:
        print(f"planner: the API key goes to {url.host} over http, where others may read it", file=sys.stderr)
    timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
    # a proxy of the company's does not know this machine's own addresses
    return httpx.Client(headers=headers, timeout=timeout, trust_env=not local)


def _model(client: httpx.Client, server: Server, wanted: str | None) -> str:
    """The model that is asked for, or else the first that the server has. PlannerError when it has none such."""
    with _failures(server):
        response = client.get(f"{server.base}/v1/models")
    _check(response.status_code, response.text, server)
    try:
        names = [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise _stranger(server) from error
    if not names:
        raise PlannerError(f"{server.base} serves no model yet: load one, or wait until it has")
    if wanted is None:
        return names[0]
    if wanted not in names:
        raise PlannerError(f"{server.base} has no model {wanted!r}: it serves {one_line(', '.join(names))}")
    return wanted


def _events(client: httpx.Client, server: Server, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The server-sent events of a streamed answer, until [DONE]. PlannerError when it breaks off before that."""
    with (
        _failures(server),
        client.stream("POST", f"{server.base}/v1/chat/completions", json=body) as response,
    ):
        if response.status_code != 200:
            _check(response.status_code, response.read().decode("utf-8", "replace"), server)
        for line in response.iter_lines():
            name, _, data = line.partition(":")
            if name != "data":  # a comment that keeps the connection alive, an empty line
                continue
            if data.strip() == "[DONE]":
                return
            event = _json(data)
            if not isinstance(event, dict):
                raise _stranger(server)
            if event.get("error"):
                raise PlannerError(f"{server.base} gave up on the answer ({_reason(data)}): see the server's log")
            yield event
    raise PlannerError(f"{server.base} ended its answer half way: see the server's log, and ask again")


def _check(status: int, text: str, server: Server) -> None:
    """PlannerError for a status other than 200, by what it means to the person who asks."""
    if status == 200:
        return
    if status in (401, 403):
        if server.key is None:
            raise PlannerError(f"{server.base} wants an API key and {KEY} is not set: export it and ask again")
        raise PlannerError(
            f"{server.base} refuses the API key: set {KEY} to the server's own (`pulumi config get tonnage:apiKey"
            " --stack STACK` prints a stack's)"
        )
    if 300 <= status < 400:
        raise PlannerError(f"{server.base} sends you elsewhere (status {status}): give --url the address that answers")
    if status >= 500:
        raise PlannerError(f"{server.base} failed with status {status} ({_reason(text)}): see the server's log")
    if _json(text) is None:
        raise _stranger(server)
    raise PlannerError(f"{server.base} refuses the question: {_reason(text)}")


def _stranger(server: Server) -> PlannerError:
    return PlannerError(
        f"{server.base} does not speak OpenAI's API: give --url the address of a server such as vLLM, without a path,"
        " such as http://localhost:8000"
    )


def _json(text: str) -> Any:
    """The value, None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _reason(text: str) -> str:
    """The server's own words: OpenAI's {"error": {"message"}}, {"error": "text"}, or the text itself; in one line."""
    value = _json(text)
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return one_line(value if isinstance(value, str) else text) or "without a reason"


@contextlib.contextmanager
def _failures(server: Server) -> Iterator[None]:
    """Turns what a network can do into a sentence."""
    import httpx

    try:
        yield
    except httpx.ConnectTimeout as error:
        raise PlannerError(f"{server.base} does not answer within {CONNECT_SECONDS} s: {server.hint}") from error
    except httpx.ReadTimeout as error:
        raise PlannerError(
            f"{server.base} was silent for {SILENCE_SECONDS} s: it is overloaded or stuck; see its log"
        ) from error
    except httpx.ConnectError as error:
        if "CERTIFICATE" in str(error):
            raise PlannerError(
                f"the certificate of {server.base} is not trusted here: set SSL_CERT_FILE to its authority's"
            ) from error
        raise PlannerError(f"nothing answers at {server.base}: {server.hint}") from error
    except httpx.HTTPError as error:
        raise PlannerError(
            f"the connection to {server.base} broke ({one_line(str(error)) or type(error).__name__}): {server.hint}"
        ) from error
