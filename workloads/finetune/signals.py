"""SIGTERM and SIGINT: before and after training they end the program at once, during it at the next safe point."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from workloads.finetune import INTERRUPTED


class Stop:
    """Whether somebody asked the run to stop. by: the signal's name; gently: it waits for a safe point."""

    def __init__(self) -> None:
        self.by: str | None = None
        self._gently = False

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked)

    def ask(self, by: str) -> None:
        self.by = self.by or by

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)
        if not self._gently:
            raise SystemExit(INTERRUPTED)

    @contextlib.contextmanager
    def gently(self) -> Iterator[None]:
        """While training: only note it. A signal from before counts too."""
        self._gently = True
        try:
            yield
        finally:
            self._gently = False
