"""This machine, and others."""

import ctypes

import pytest

from common import machine


@pytest.mark.parametrize(
    "library", [TypeError("bad argument type for built-in operation"), OSError("no library"), object()]
)
def test_systems_without_malloc_trim(library: object, monkeypatch: pytest.MonkeyPatch):
    """Windows does not know `CDLL(None)`; macOS has no `malloc_trim`."""

    def load(_: None) -> object:
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    machine.trim_memory()
