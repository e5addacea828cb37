"""Models that the catalog does not hold: config.json from a folder or from the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from planner.errors import PlannerError
from planner.model import ModelSpec, spec_from_config

MAX_CONFIG_BYTES = 4 << 20
"""A larger config.json is not one: the longest published ones, with a list for every layer, stay below 100 KiB."""

# Stored tensors may differ from the shapes by buffers that older code saved (rotary frequencies, masks): far below it.
_TOLERANCE = 0.001
_SECONDS_TO_ANSWER = 10.0


def holds_config(path: Path) -> bool:
    """Whether the path is a file or a folder with config.json; a text that no file system takes as a name is not."""
    try:
        return path.is_file() or (path / "config.json").is_file()
    except OSError:
        return False


def load_path(path: Path) -> ModelSpec:
    """The model of a folder that holds config.json, or of that file itself."""
    file, config = path_config(path)
    return spec_from_config(config, str(path.expanduser()), str(file))


def path_config(path: Path) -> tuple[Path, Mapping[str, object]]:
    """The config.json that a path means, and what it holds. Raises PlannerError where there is none to read."""
    try:
        path = path.expanduser()
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise PlannerError(f"{file} is not there: give a folder that holds config.json, or the file itself")
        return file, read_config(file)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ without a home folder
        raise PlannerError(f"{path} cannot be read ({type(error).__name__}): check the path") from error


def read_config(file: Path) -> Mapping[str, object]:
    """config.json as a mapping. Raises PlannerError for a file too large, not JSON, or nested beyond reason."""
    size = file.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise PlannerError(f"{file} has {size:,} bytes, more than the 4 MiB a config.json may have: check the path")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # also what json raises for bytes that are no text
        raise PlannerError(f"{file} is not a JSON file that can be read: download it again") from error
    if not isinstance(config, dict):
        raise PlannerError(f"{file} does not hold a JSON object: give a model's config.json")
    return config


def load_hub(hub_id: str) -> ModelSpec:
    """The model of a hub repository: its config.json, and where it is in safetensors a check of the parameter count.

    Raises PlannerError when the hub cannot be reached or refuses, or when the tensors and the config disagree.
    """
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    online = _reachable()
    try:
        file = Path(hf_hub_download(hub_id, "config.json", local_files_only=not online))
    except HFValidationError as error:
        raise PlannerError(f"{hub_id!r} is not a hub id: write organisation/name") from error
    except LocalEntryNotFoundError as error:
        raise PlannerError(
            f"{hub_id} is not in the catalog and the Hugging Face hub cannot be reached: "
            "go online, or download its config.json and give the path"
        ) from error
    except HfHubHTTPError as error:
        raise PlannerError(_refused(hub_id, error)) from error
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise PlannerError(f"config.json of {hub_id} could not be downloaded: try again, or give its path") from error
    spec = spec_from_config(read_config(file), hub_id, f"{hub_id} config.json")
    stored = stored_parameters(hub_id, spec) if online else None
    if stored is not None and abs(stored - spec.parameter_count) > _TOLERANCE * spec.parameter_count:
        raise PlannerError(
            f"the checkpoint of {hub_id} holds {stored:,} parameters, but its config.json describes "
            f"{spec.parameter_count:,}: its code differs from transformers' {spec.architecture}, which is not modelled"
        )
    checked = "not checked against its tensors" if stored is None else "checked against its safetensors headers"
    return spec.model_copy(update={"hub_id": hub_id, "source": f"{spec.source}, {checked}"})


def _reachable() -> bool:
    """Whether anything answers at the hub's address: asked once, for the download itself retries for half a minute."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=_SECONDS_TO_ANSWER)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
        return False
    return True


def _refused(hub_id: str, error: Exception) -> str:
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return f"{hub_id} asks for its licence to be accepted: do so on its page, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"{hub_id} is neither in the catalog nor on the Hugging Face hub: check the name, or log in if private"
    if isinstance(error, EntryNotFoundError):
        return f"{hub_id} has no config.json on the Hugging Face hub: choose a repository with transformers weights"
    return f"the Hugging Face hub refused config.json of {hub_id}: try again later, or give the path of a copy"


def stored_parameters(hub_id: str, spec: ModelSpec) -> int | None:
    """Elements of the checkpoint's tensors, from its safetensors headers; None where they cannot tell.

    Left out of the sum: multi-token-prediction layers, which are not loaded, and a tied output head stored twice.
    They cannot tell for a quantised checkpoint, whose weights are packed, nor without safetensors, nor offline.
    """
    import httpx
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    if spec.quantization is not None:
        return None
    try:
        metadata = get_safetensors_metadata(hub_id)
    except (NotASafetensorsRepoError, SafetensorsParsingError, HfHubHTTPError, httpx.HTTPError, OSError, ValueError):
        return None  # no safetensors, or the connection broke: config.json alone has to do
    total = 0
    for file in metadata.files_metadata.values():
        for name, tensor in file.tensors.items():
            if not _extra(name, spec):
                total += tensor.parameter_count
    return total


def _extra(name: str, spec: ModelSpec) -> bool:
    """Whether a stored tensor belongs to no tensor of the spec."""
    parts = name.split(".")
    if parts[0] == "mtp" or "mtp" in parts[:2] or name.endswith("rotary_emb.inv_freq"):
        return True
    if spec.tied_embeddings and parts[0] == "lm_head":
        return True
    if "layers" in parts and "vision" not in name:
        number = parts[parts.index("layers") + 1 : parts.index("layers") + 2]
        return bool(number) and number[0].isdigit() and int(number[0]) >= spec.num_layers
    return False
