"""A model's own tokens and chat template, without transformers: what the check counts is what the training sees.

    text = template(messages); tokens = tokenizer(text), no special tokens added, as transformers' chat template does

Template language: jinja2, sandboxed, with the functions that transformers gives it (utils/chat_template_utils.py).
`strftime_now` is left out, for which templates have a fixed date in reserve: a run that goes on tomorrow must see the
same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from planner.errors import PlannerError

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

Message = dict[str, Any]


class Unreached(PlannerError):
    """The hub does not answer. A later try may succeed."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks answers in training templates; here only what stands between matters."""

    tags = {"generation"}  # noqa: RUF012  # the name and type that jinja2 asks for

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Chat:
    """The tokenizer and the template of one model."""

    def __init__(self, name: str, tokenizer: Any, template: str, special: dict[str, str]) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._special = special
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise PlannerError(f"the chat template of {name} cannot be read ({error}): name another model") from error

    def text(self, messages: Sequence[Message], *, answer: bool = False, tools: Any = None) -> str:
        """The conversation as the model sees it; answer: with the opening of the next answer at its end.

        PlannerError where the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=list(messages), tools=tools, add_generation_prompt=answer, **self._special
            )
        except (jinja2.TemplateError, TypeError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise PlannerError(f"the chat template of {self.name} refuses it: {said}") from error

    def tokens(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found


def _tojson(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def load_chat(model: str, revision: str | None = None) -> Chat:
    """Tokenizer and template of a folder or a hub id. PlannerError where they are missing."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise PlannerError("tokens are counted with the package tokenizers: pip install 'tonnage[data]'") from error
    files = {name: path for name in FILES if (path := _file(model, name, revision))}
    if "tokenizer.json" not in files:
        raise PlannerError(f"{model} has no tokenizer.json: name the folder or hub id of a model that has one")
    said = json.loads(files["tokenizer_config.json"].read_text("utf-8")) if "tokenizer_config.json" in files else {}
    template = said.get("chat_template")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].read_text("utf-8")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not template:
        raise PlannerError(f"{model} has no chat template, so it is no chat model: name its instruct or chat version")
    special = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = said.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        if content is not None:
            special[key] = str(content)
    tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Chat(model, tokenizer, template, special)


def _file(model: str, name: str, revision: str | None) -> Path | None:
    folder = Path(model)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise PlannerError(f"{model} is no folder and no hub id: name a model's folder, or OWNER/NAME on the hub")
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise PlannerError(
            f"the hub has no model {model}: correct the name, or set HF_TOKEN where it is gated"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise Unreached(f"{name} of {model} is not cached and the hub is not reached: name a folder instead") from error
    except errors.EntryNotFoundError:
        return None
