"""Datasets of many files: they take turns, and while one is trained on the next one loads."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")


class Rotation(Generic[T]):
    """What is to be trained on at each step: file `(step // every) % len(files)`, so a resumed run goes on as it was.

    At most two of them are on the devices: the one in use, and the one that a thread loads meanwhile.
    """

    def __init__(self, files: Sequence[Path], load: Callable[[Path], T], *, every: int, steps: int):
        """`load` reads a file and puts what training needs onto the devices; a turn takes `every` gradient steps of
        `steps` in all."""
        self.files, self.load, self.every, self.steps = list(files), load, every, steps
        self._turn, self._current = -1, None
        self._next: _Loading | None = None

    def at(self, step: int) -> T:
        """The data of a step; waits where it is not loaded yet. An error of the next file is raised as soon as known.

        The first file is loaded here, so that an interrupt ends it; the thread of the others ends with the process.
        """
        many = len(self.files) > 1
        turn = step // self.every if many else 0
        if turn != self._turn:
            ahead, self._next, self._current = self._next, None, None  # frees the last file's memory
            if ahead is not None and ahead.turn == turn:
                self._current = ahead.result()
            else:
                self._current = self.load(self.files[turn % len(self.files)])
            self._turn = turn
        if self._next is None and many and (turn + 1) * self.every < self.steps:
            self._next = _Loading(turn + 1, self.load, self.files[(turn + 1) % len(self.files)])
        elif self._next is not None:
            self._next.check()
        return self._current


class _Loading:
    """A call in another thread."""

    def __init__(self, turn: int, load: Callable[[Path], Any], file: Path):
        self.turn, self._result, self._error = turn, None, None

        def run() -> None:
            try:
                self._result = load(file)
            except BaseException as error:  # raised again where the result is wanted
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True, name=f"loading {file.name}")
        self._thread.start()

    def check(self) -> None:
        """Raises what the call has raised so far."""
        if self._error is not None:
            raise self._error

    def result(self) -> Any:
        self._thread.join()
        self.check()
        return self._result


def pad(array: np.ndarray, length: int, *, axis: int = 0) -> np.ndarray:
    """`array` with zeros at the end of an axis, so that files of different lengths share one compiled program."""
    missing = length - array.shape[axis]
    return array if missing == 0 else np.pad(array, [(0, missing * (i == axis)) for i in range(array.ndim)])
