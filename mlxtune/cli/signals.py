"""Signals while a command works: training gets to save first, everything else stops at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mlxtune.cli import Terminated, display


class Signals:
    """Remembers a signal while `saving` is set; otherwise, or the second time, it stops the work."""

    def __init__(self) -> None:
        self.saving = False
        self.received: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.saving and self.received is None:
            self.received = number
            display.note("\nstopping after this update; press Ctrl-C again to stop at once")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise Terminated

    def stop(self) -> int | None:
        """The signal that asks to stop, or None."""
        return self.received


@contextmanager
def caught() -> Iterator[Signals]:
    """Handles SIGINT, SIGTERM and SIGHUP inside the block, but for what is ignored, as SIGHUP is under nohup."""
    signals = Signals()
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    numbers = [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]
    before = [signal.signal(number, signals.handle) for number in numbers]
    try:
        yield signals
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
