"""Datasets of many files: they take turns, and while one is trained on the next one loads."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


class Rotation(Generic[T]):
    """What is to be trained on at each step: file `(step // every) % len(files)`, so a resumed run goes on as it was.

    At most two files are in memory: the one in use, and the one that a thread loads meanwhile.
    """

    def __init__(self, files: Sequence[Path], load: Callable[[Path], T], *, every: int):
        """`load` reads a file and puts what training needs onto the devices, in another thread; a turn takes `every`
        gradient steps."""
        self.files, self.load, self.every = list(files), load, every
        self._turn, self._current = -1, None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next file")
        self._next: tuple[int, Future] | None = None

    def at(self, step: int) -> T:
        """The data of a step; waits where it is not loaded yet."""
        turn = (step // self.every) % len(self.files)
        if turn != self._turn:
            ahead = self._next
            if ahead is not None and ahead[0] != turn:  # the first step of a resumed run
                ahead[1].cancel()
                ahead = None
            future = ahead[1] if ahead else self._thread.submit(self.load, self.files[turn])
            self._current, self._next = None, None  # frees the last file's memory
            self._turn, self._current = turn, future.result()
        if self._next is None and len(self.files) > 1:
            turn = (turn + 1) % len(self.files)
            self._next = turn, self._thread.submit(self.load, self.files[turn])
        return self._current

    def __enter__(self) -> "Rotation[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)


def pad(array: np.ndarray, length: int, *, axis: int = 0) -> np.ndarray:
    """`array` with zeros at the end of an axis, so that files of different lengths share one compiled program."""
    missing = length - array.shape[axis]
    return array if missing == 0 else np.pad(array, [(0, missing * (i == axis)) for i in range(array.ndim)])
