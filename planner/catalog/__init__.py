"""The facts that Tonnage plans with. Models are read here; GPUs and VM sizes in `hardware`."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from datetime import date
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from planner.catalog import hub
from planner.errors import PlannerError
from planner.model import Frozen, ModelSpec, Quantization, spec_from_config

__all__ = ["ModelEntry", "load_config", "load_model", "model", "model_entries", "model_entry", "select_models"]


class ModelEntry(Frozen):
    """A model of the catalog.

    name: short name; hub_id: the checkpoint whose config.json this is; aliases: other names of the same shape
    max_context: tokens; parameter_count: of its tensors, vision tower included; released: year and month
    use_cases: from a fixed vocabulary; config: the fields of config.json that decide the shape
    listed: offered to users; the others are there because published measurements name them
    """

    name: str
    hub_id: str
    aliases: tuple[str, ...]
    family: str
    license: str
    max_context: int
    use_cases: tuple[str, ...]
    released: str
    parameter_count: int
    config: dict[str, Any]
    source: str
    as_of: date
    listed: bool


class QuantizedSuffix(Frozen):
    """What the end of a repository's name says about how its weights are stored.

    orgs: whose names it holds for, everybody's when empty; quantization: None for a 16-bit copy
    """

    suffix: str
    orgs: tuple[str, ...]
    quantization: Quantization | None
    source: str
    as_of: date


Key = tuple[str, ...]


@cache
def read_facts(filename: str) -> dict[str, Any]:
    """One of the catalog's JSON files, read once."""
    facts: dict[str, Any] = json.loads((files("planner.catalog") / filename).read_text(encoding="utf-8"))
    return facts


def _data() -> dict[str, Any]:
    return read_facts("models.json")


@cache
def _index() -> dict[Key, dict[str, Any]]:
    """Every name, hub id and alias -> its record."""
    index: dict[Key, dict[str, Any]] = {}
    for record in _data()["models"]:
        for name in (record["name"], record["hub_id"], *record["aliases"]):
            key = _key(name)
            if index.setdefault(key, record) is not record:
                raise ValueError(f"models.json: {record['name']} and {index[key]['name']} are both called {name}")
    return index


@cache
def _suffixes() -> tuple[tuple[Key, QuantizedSuffix], ...]:
    return tuple((_key(r["suffix"]), QuantizedSuffix(**r)) for r in _data()["quantized_suffixes"])


def _key(name: str) -> Key:
    """A name as the words and numbers it is made of, without the organisation: case and separators do not matter."""
    parts = re.findall(r"[a-z]+|[0-9]+", name.rpartition("/")[2].lower())
    return tuple(parts[1:] if parts[:2] == ["meta", "llama"] else parts)


def _find(name: str) -> tuple[dict[str, Any], tuple[QuantizedSuffix, ...]] | None:
    """The record a name means, and the quantisations that its end names. None when there is none.

    Endings are taken off one at a time, and the name is looked up after each: dates (2503), words that do not change
    the shape (instruct, chat, hf ...) and the quantised suffixes of models.json.
    """
    index, dropped = _index(), frozenset(_data()["dropped_suffixes"])
    org = name.rpartition("/")[0].rpartition("/")[2].lower()
    key = _key(name)
    found: list[QuantizedSuffix] = []
    while key:
        if key in index:
            return index[key], tuple(found)
        for suffix, meaning in _suffixes():
            theirs = not meaning.orgs or org in (o.lower() for o in meaning.orgs)
            if theirs and len(key) > len(suffix) and key[-len(suffix) :] == suffix:
                found.append(meaning)
                key = key[: -len(suffix)]
                break
        else:
            if not (key[-1] in dropped or re.fullmatch("[0-9]{4}", key[-1])):
                return None
            key = key[:-1]
    return None


def _unknown(name: str) -> PlannerError:
    names = [record["name"] for record in _data()["models"]]
    plain = name.rpartition("/")[2].lower()[:100]
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.4)
    hint = f"the nearest are {', '.join(near)}" if near else "`planner models` lists them"
    return PlannerError(
        f"{name[:100]!r} is not in the model catalog: {hint}; a folder, config.json or hub id works too"
    )


@cache
def model_entries() -> tuple[ModelEntry, ...]:
    """All models of the catalog, listed or not."""
    return tuple(ModelEntry(**record) for record in _data()["models"])


def select_models(
    *,
    use_case: str | None = None,
    max_parameters: float | None = None,
    min_context: int | None = None,
    licence: str | None = None,
    recommend: bool = False,
) -> tuple[ModelEntry, ...]:
    """Listed models that match, by name; with recommend the newest first and, of one month, the smaller first.

    Raises PlannerError for an unknown use case, a recommendation without one, and when nothing matches.
    """
    listed = [entry for entry in model_entries() if entry.listed]
    known = sorted({case for entry in listed for case in entry.use_cases})
    if use_case is not None and use_case not in known:
        raise PlannerError(f"{use_case!r} is not a use case of the catalog: choose one of {', '.join(known)}")
    if recommend and use_case is None:
        raise PlannerError(f"a recommendation needs a use case: add --use-case with one of {', '.join(known)}")
    found = [
        entry
        for entry in listed
        if (use_case is None or use_case in entry.use_cases)
        and (max_parameters is None or entry.parameter_count <= max_parameters)
        and (min_context is None or entry.max_context >= min_context)
        and (licence is None or licence.lower() in entry.license.lower())
    ]
    if not found:
        raise PlannerError("no model of the catalog matches: loosen a filter, `planner models` lists them all")
    if recommend:
        return tuple(sorted(found, key=lambda e: ([-int(part) for part in e.released.split("-")], e.parameter_count)))
    return tuple(sorted(found, key=lambda e: _natural(e.name)))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(0, text) if not part else (int(part), text) for text, part in re.findall(r"([^0-9]*)([0-9]*)", name)]


def model_entry(name: str) -> ModelEntry:
    """The catalog's record of a model, by short name, hub id or alias. Raises PlannerError naming the nearest."""
    found = _find(name)
    if found is None:
        raise _unknown(name)
    return ModelEntry(**found[0])


def model(name: str) -> ModelSpec:
    """The shape of a catalog model, by short name, hub id, alias, or the name of a quantised re-upload.

    "RedHatAI/Llama-3.3-70B-Instruct-quantized.w8a8" is llama-3.3-70b with 8-bit weights and activations, as such
    checkpoints usually are stored. Raises PlannerError naming the nearest models.
    """
    found = _find(name)
    if found is None:
        raise _unknown(name)
    return _spec(name, *found)


@cache
def _spec_of(name: str) -> ModelSpec:
    record = _index()[_key(name)]
    spec = spec_from_config(record["config"], record["name"], record["source"])
    return spec.model_copy(update={"hub_id": record["hub_id"]})


def _spec(name: str, record: dict[str, Any], suffixes: tuple[QuantizedSuffix, ...]) -> ModelSpec:
    spec = _spec_of(record["name"])
    update: dict[str, object] = {}
    if "/" in name and _key(name) != _key(record["hub_id"]):
        update = {"name": name, "hub_id": name}  # a re-upload: the same shape under its own address
    if suffixes:
        last = suffixes[0]
        update |= {"quantization": last.quantization, "source": f"{spec.source}; stored as {last.source}"}
        update["name"] = name
    return spec.model_copy(update=update) if update else spec


def load_config(text: str) -> Mapping[str, object]:
    """The config.json behind a catalog name, folder or file, as it stands there. PlannerError for anything else."""
    text = text.strip()
    if _is_path(text):
        return hub.path_config(Path(text))[1]
    return model_entry(text).config


def _is_path(text: str) -> bool:
    """Whether a folder or file is meant, there or not, rather than a name."""
    return text.endswith(".json") or text.startswith((".", "/", "~")) or hub.holds_config(Path(text))


def load_model(text: str) -> ModelSpec:
    """The shape of a model: a folder or config.json, else a name of the catalog, else a hub id `org/name`.

    Reads the Hugging Face hub only for an id that is no file and not in the catalog; HF_HUB_OFFLINE and HF_ENDPOINT
    hold. Raises PlannerError in one sentence for anything that cannot be read or is not known.
    """
    text = text.strip()
    if not text or "\x00" in text:
        raise PlannerError("no model was named: give a catalog name, a folder, a config.json or a hub id")
    if _is_path(text):
        return hub.load_path(Path(text))
    found = _find(text)
    if found is not None:
        return _spec(text, *found)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return hub.load_hub(text)
    raise _unknown(text)
