"""What a user got wrong, said in one sentence; and the command line that says it."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import tyro


class UserError(ValueError):
    """A mistake the user can mend. The message is one sentence that ends with the remedy."""


def parse_args(args_type: type, presets: Mapping[str, Mapping[str, Any]], argv: list[str] | None = None) -> Any:
    """Parses the command line into `args_type`; a preset such as `--quick` changes defaults, so any flag overrides it.

    Args:
        presets: preset name to the fields it changes. Each name is a boolean field of `args_type`.
    """
    argv = sys.argv[1:] if argv is None else argv
    chosen = [name for name in presets if f"--{name}" in argv]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} exclude each other: pass one of them.")
    if not chosen:
        return tyro.cli(args_type, args=argv)
    return tyro.cli(args_type, default=dataclasses.replace(args_type(), **presets[chosen[0]]), args=argv)


def run_cli(main: Callable, args_type: type, presets: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Runs `main(args)`; a `UserError` becomes one line on stderr and exit status 2, without a traceback."""
    try:
        main(parse_args(args_type, presets or {}))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
