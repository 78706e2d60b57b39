"""Progress bars that suit a terminal and a file."""

import sys
import time
from typing import Any

from tqdm import tqdm

INTERVAL = 10.0  # seconds between two lines in a file


class _Lines:
    """What tqdm writes, as lines on stderr: at most one every `INTERVAL` seconds, of all bars of this process."""

    latest = time.monotonic()

    def write(self, text: str) -> None:
        bar, now = text.strip(), time.monotonic()
        if bar and now - _Lines.latest >= INTERVAL:
            _Lines.latest = now
            sys.stderr.write(f"{bar}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(**settings: Any) -> tqdm:
    """A bar of tqdm on stderr, which takes the same `settings`: it moves in a terminal; a file gets a line of it now
    and then, so that a run of days leaves a log that can be read."""
    if sys.stderr.isatty():
        return tqdm(**settings)
    return tqdm(file=_Lines(), position=0, **settings)  # else tqdm moves between the lines of nested bars
