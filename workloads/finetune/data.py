"""Chat JSONL, checked line by line before a GPU is paid for: what is wrong, how long it is, what truncation costs.

    sft: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    dpo: {"prompt": [messages], "chosen": [messages], "rejected": [messages]}

A fault names its file and line. The tokens counted are the very ones that are trained on (`Example`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from planner.errors import PlannerError
from workloads.finetune.chat import Chat, Message

Task = Literal["sft", "dpo"]
LossOn = Literal["completion", "assistant", "all"]
ROLES = ("system", "user", "assistant", "tool")
SHOWN_FAULTS = 20
IGNORED = -100  # label of a token that is not learned: torch.nn.CrossEntropyLoss, ignore_index


@dataclass(frozen=True)
class Fault:
    """What is wrong in one line of a file; line counts from 1."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


@dataclass(frozen=True)
class Example:
    """One line as tokens. labels: the same tokens where they are learned, else -100; of dpo the chosen answer's.

    prompt, rejected: of dpo alone: the tokens before both answers, and of the other answer
    """

    line: int
    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    prompt: tuple[int, ...] = ()
    rejected: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longer of its sequences."""
        return max(len(self.tokens), len(self.prompt) + len(self.rejected))


@dataclass
class File:
    """A file that was read: its records by line, its faults, and its digest."""

    name: str
    sha256: str = ""
    records: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    duplicates: list[tuple[int, int]] = field(default_factory=list)  # line, and the first line like it
    contradictions: list[tuple[int, int]] = field(default_factory=list)  # the same question, another answer
    keys: dict[bytes, int] = field(default_factory=dict)  # digest of a whole record -> line
    turns: Counter[str] = field(default_factory=Counter)


def read(path: Path, task: Task) -> File:
    """Every line of a file, checked. PlannerError when there is no such file or nothing in it."""
    found = File(str(path))
    digest = hashlib.sha256()
    questions: dict[bytes, tuple[bytes, int]] = {}
    try:
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                digest.update(raw)
                _line(found, number, raw, task, questions)
    except OSError as error:
        raise PlannerError(f"{path} cannot be read ({error.strerror}): give a JSONL file of conversations") from error
    found.sha256 = digest.hexdigest()
    if not found.records and not found.faults:
        raise PlannerError(f"{path} is empty: give a JSONL file of conversations, one a line")
    return found


def _line(found: File, number: int, raw: bytes, task: Task, questions: dict[bytes, tuple[bytes, int]]) -> None:
    if not raw.strip():
        found.faults.append(Fault(found.name, number, "the line is empty"))
        return
    record, wrong = _record(raw)
    wrong = wrong or (_sft_fault(record) if task == "sft" else _dpo_fault(record))
    if wrong:
        found.faults.append(Fault(found.name, number, wrong))
        return
    whole, question = _keys(record, task)
    if whole in found.keys:
        found.duplicates.append((number, found.keys[whole]))
    else:
        found.keys[whole] = number
        if question in questions and questions[question][0] != whole:
            found.contradictions.append((number, questions[question][1]))
        questions.setdefault(question, (whole, number))
    for message in _messages(record, task):
        found.turns[message["role"]] += 1
    found.records.append((number, record))


def _record(raw: bytes) -> tuple[dict[str, Any], str]:
    if raw.startswith(b"\xef\xbb\xbf"):
        return {}, "the line begins with a byte order mark: save the file as UTF-8 without one"
    try:
        text = raw.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        return {}, f"byte {error.start + 1} is not UTF-8"
    try:
        record = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        return {}, f"not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON: {error}"
    if not isinstance(record, dict):
        return {}, f"a JSON {type(record).__name__}, not an object"
    return record, ""


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _sft_fault(record: dict[str, Any]) -> str:
    if "messages" not in record:
        return f"no `messages`, but {', '.join(sorted(map(str, record))) or 'nothing'}"
    return _conversation_fault(record["messages"], "messages", ends_with_answer=True)


def _dpo_fault(record: dict[str, Any]) -> str:
    missing = [key for key in ("prompt", "chosen", "rejected") if key not in record]
    if missing:
        return f"no `{missing[0]}`: a preference has prompt, chosen and rejected"
    wrong = _conversation_fault(record["prompt"], "prompt", ends_with_answer=False)
    for side in ("chosen", "rejected"):
        answer = record[side]
        if not wrong and not (isinstance(answer, list) and len(answer) == 1):
            wrong = f"{side} is not a list of one assistant message"
        wrong = wrong or _message_fault(answer[0], f"{side}[0]")
        if not wrong and answer[0]["role"] != "assistant":
            wrong = f"{side}[0] is of the role {answer[0]['role']}, not assistant"
    if not wrong and record["chosen"] == record["rejected"]:
        wrong = "chosen and rejected are the same"
    return wrong


def _conversation_fault(messages: Any, where: str, *, ends_with_answer: bool) -> str:
    """Why a list of messages is no conversation; empty when it is one."""
    if not isinstance(messages, list) or not messages:
        return f"{where} is not a list of messages"
    for index, message in enumerate(messages):
        wrong = _message_fault(message, f"{where}[{index}]")
        if wrong:
            return wrong
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        return f"{where}[{roles.index('system', 1)}] is a system message that does not come first"
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns[0] != "user":
        return f"the conversation does not begin with the user{f', but with the {turns[0]}' if turns else ''}"
    before = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
    for earlier, later in pairwise(turns):
        if earlier not in before[later]:
            return f"a message of the {later} follows one of the {earlier}"
    if ends_with_answer and turns[-1] != "assistant":
        return f"the conversation ends with the {turns[-1]}: there is no answer to learn"
    if not ends_with_answer and turns[-1] == "assistant":
        return "the prompt ends with an answer already"
    return ""


def _message_fault(message: Any, where: str) -> str:
    if not isinstance(message, dict):
        return f"{where} is not an object"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return f"{where} has the role {role!r}: use {', '.join(ROLES)}"
    if role == "assistant" and message.get("tool_calls") and content is None:
        return ""
    if not isinstance(content, str):
        return f"{where} has content that is not text" if content is not None else f"{where} has no content"
    if not content.strip():
        return f"{where} is an empty turn of the {role}"
    if any("\ud800" <= character <= "\udfff" for character in content):
        return f"{where} has half a surrogate pair, which is no text"
    return ""


def _messages(record: dict[str, Any], task: Task) -> list[Message]:
    if task == "sft":
        return list(record["messages"])
    return [*record["prompt"], *record["chosen"], *record["rejected"]]


def _keys(record: dict[str, Any], task: Task) -> tuple[bytes, bytes]:
    """Digests of the whole record, and of what is asked in it."""
    if task == "sft":
        whole, question = record["messages"], record["messages"][:-1]
    else:
        whole, question = [record[key] for key in ("prompt", "chosen", "rejected")], record["prompt"]
    return _key(whole), _key(question)


def _key(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:16]


# --- as tokens --------------------------------------------------------------------------------------------------------


def examples(found: File, chat: Chat, task: Task, loss_on: LossOn) -> Iterator[Example | Fault]:
    """Every record as tokens and labels, or why the model's template cannot take it."""
    for number, record in found.records:
        try:
            if task == "dpo":
                yield _preference(number, record, chat)
            else:
                yield _conversation(number, record, chat, loss_on)
        except PlannerError as error:
            yield Fault(found.name, number, str(error))


def _conversation(number: int, record: dict[str, Any], chat: Chat, loss_on: LossOn) -> Example:
    messages, tools = record["messages"], record.get("tools")
    text = chat.text(messages, tools=tools)
    tokens = chat.tokens(text)
    if loss_on == "all":
        return Example(number, tuple(tokens), tuple(tokens))
    last = len(messages) - 1
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    labels = [IGNORED] * len(tokens)
    for index in [last] if loss_on == "completion" else answers:
        asked = chat.text(messages[:index], answer=True, tools=tools)
        answered = text if index == last else chat.text(messages[: index + 1], tools=tools)
        if not answered.startswith(asked):
            raise PlannerError("the model's template writes the question otherwise once it is answered: name another")
        if not text.startswith(answered):
            raise PlannerError(
                "the model's template writes an earlier answer otherwise once more follows: use data.loss_on completion"
            )
        start, end = _common(chat.tokens(asked), tokens), _common(chat.tokens(answered), tokens)
        labels[start:end] = tokens[start:end]
    return Example(number, tuple(tokens), tuple(labels))


def _preference(number: int, record: dict[str, Any], chat: Chat) -> Example:
    prompt, tools = record["prompt"], record.get("tools")
    opening = chat.tokens(chat.text(prompt, answer=True, tools=tools))
    chosen, rejected = (
        chat.tokens(chat.text([*prompt, *record[side]], tools=tools)) for side in ("chosen", "rejected")
    )
    start = min(_common(opening, chosen), _common(opening, rejected))
    labels = (IGNORED,) * start + tuple(chosen[start:])
    return Example(number, tuple(chosen), labels, tuple(opening[:start]), tuple(rejected[start:]))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def is_evaluation(key: bytes, share: float) -> bool:
    """Whether a record is set aside for evaluation: by its digest, so that equal lines stay on one side."""
    return int.from_bytes(key[:8], "big") < share * (1 << 64)
