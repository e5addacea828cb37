"""What several live tests share, since it takes seconds to start: the forker of runs, and an emulator of Blob."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import tiny
from blob import KEY, Azurite, azurite

os.environ["AZURE_STORAGE_KEY"] = KEY  # also of the processes that tests start


@pytest.fixture(scope="session")
def forker() -> Iterator[tiny.Forker]:
    made = tiny.Forker()
    yield made
    made.close()


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with azurite(tmp_path_factory.mktemp("azurite")) as made:
        yield made
