"""The command line: presets, exit statuses, and what went wrong in one sentence."""

import contextlib
import dataclasses
import errno
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import tyro

from common.args import flag_of
from common.errors import UserError

FULL = "RESOURCE_EXHAUSTED"  # how JAX begins to say that memory ran out
GUARDED = "INVALID_ARGUMENT: Disallowed"  # that JAX_TRANSFER_GUARD forbids what a run does


def parse_args(
    args_type: type,
    presets: Mapping[str, Mapping[str, Any]],
    argv: list[str] | None = None,
    *,
    recipe_of: Callable[[Any], Mapping[str, Any]] = lambda args: {},
) -> Any:
    """Parses the command line into `args_type`; a preset such as `--quick` changes defaults, so any flag overrides it.

    Args:
        presets: preset name to the fields it changes. Each name is a boolean field of `args_type`.
        recipe_of: what `--preview` changes beyond its preset, for the arguments parsed so far.
    """
    argv = sys.argv[1:] if argv is None else argv
    chosen = [name for name in presets if f"--{name}" in argv]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} exclude each other: pass one of them.")
    if not chosen:
        return tyro.cli(args_type, args=argv)
    default = dataclasses.replace(args_type(), **presets[chosen[0]])
    args = tyro.cli(args_type, default=default, args=argv)
    if chosen != ["preview"] or not (recipe := recipe_of(args)):
        return args
    return tyro.cli(args_type, default=dataclasses.replace(default, **recipe), args=argv)


def flags_of(args: Any, fields: Collection[str]) -> str:
    """The values of these fields, as they are typed."""
    values = {name: getattr(args, name) for name in fields}
    texts = {name: " ".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in values.items()}
    return " ".join(f"{flag_of(name)} {text}" for name, text in texts.items())


class _Lossy:
    """A stream that drops what cannot be written; `error` is the last failure."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self.error = error
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _lossy_output() -> Iterator[None]:
    """What cannot be printed must not cost a run: a name that the terminal cannot show is escaped, and what cannot be
    written is dropped, with a warning at the end where the cause is another than a closed pipe."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    lossy = [stream and _Lossy(stream) for stream in before]
    sys.stdout, sys.stderr = lossy
    try:
        yield
    finally:
        _end_output(lossy)
        sys.stdout, sys.stderr = before


def _end_output(streams: Sequence[Any]) -> None:
    """What is left for a pipe that nobody reads any more, or for a full disk, goes nowhere: else Python, which writes
    it at the end of the process, would say so and change the exit status."""
    streams = [stream for stream in streams if stream is not None]
    for stream in streams:
        stream.flush()
    causes = {stream.error.strerror for stream in streams if stream.error} - {os.strerror(errno.EPIPE)}
    for cause in causes:
        print(f"warning: some of the output is lost ({cause}).", file=sys.stderr, flush=True)
    for stream in streams:
        if stream.error or _is_unread(stream):
            with contextlib.suppress(OSError):  # it is no file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_unread(stream: Any) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (AttributeError, OSError):  # Windows, and what is no file, do not tell
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


@_lossy_output()
def run_cli(
    main: Callable,
    args_type: type,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    recipe_of: Callable[[Any], Mapping[str, Any]] = lambda args: {},
) -> None:
    """Runs `main(args)`. What goes wrong becomes one line on stderr: a `UserError`, or a file that cannot be read or
    written, with exit status 2, a number that is not finite with 1. SIGTERM and Ctrl-C exit with 143 and 130, as shells
    count. `main` goes on where what it prints cannot be written. With `--debug` on the command line the traceback is
    shown too."""
    argv = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(argv) < len(sys.argv) - 1
    # Cleans up, which the default action does not: worker processes end, temporary files go.
    before = signal.getsignal(signal.SIGTERM)
    if before not in (signal.SIG_IGN, None):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with _no_signal_lost():
            args = parse_args(args_type, presets or {}, argv, recipe_of=recipe_of)
            if getattr(args, "preview", False) and (recipe := recipe_of(args)):
                print(f"recipe of {args.env}: {flags_of(args, recipe)}")
            main(args)
    except SystemExit as error:
        exit_without_waiting(error.code)
        raise
    except (UserError, FloatingPointError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith((FULL, GUARDED)) and not _is_lost(error):
            raise
        code = _report(error, debug=debug)
        exit_without_waiting(code)
        raise SystemExit(code) from None
    finally:
        if before not in (signal.SIG_IGN, None):
            signal.signal(signal.SIGTERM, before)


def _report(error: BaseException, *, debug: bool) -> int:
    """Says on stderr what went wrong; returns the exit status."""
    if debug:
        traceback.print_exception(error)
    print("interrupted." if isinstance(error, KeyboardInterrupt) else f"error: {sentence(error)}", file=sys.stderr)
    return 130 if isinstance(error, KeyboardInterrupt) else 1 if isinstance(error, FloatingPointError) else 2


@contextlib.contextmanager
def _no_signal_lost() -> Iterator[None]:
    """Repeats a signal whose exception Python ignored, as it does in callbacks of the garbage collector, which JAX has:
    else a process that was asked to end would go on."""
    hook, timers = sys.unraisablehook, []

    def repeat(ignored: Any) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            number = signal.SIGINT
        elif issubclass(ignored.exc_type, SystemExit) and getattr(ignored.exc_value, "code", None) == 143:
            number = signal.SIGTERM
        else:
            hook(ignored)
            return
        # In a moment: here it would be ignored, too.
        timers.append(threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, number)))
        timers[-1].start()

    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for timer in timers:  # nothing is left to stop
            timer.cancel()
            timer.join()


def _is_one_of_several() -> bool:
    """Whether this is one of several processes that run one program (`jax.distributed`)."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _is_lost(error: BaseException) -> bool:
    """Whether `error` is how JAX says that another process of the same program is gone."""
    full = str(error).startswith(FULL)
    return _is_one_of_several() and isinstance(error, sys.modules["jax"].errors.JaxRuntimeError) and not full


def exit_without_waiting(code: Any) -> None:
    """Ends this process at once, if it is one of several: the usual way out waits for the others, which wait for it."""
    if _is_one_of_several():
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code if isinstance(code, int) else 1)


def sentence(error: BaseException) -> str:
    """What went wrong, and what to do about it."""
    first = str(error).partition("\n")[0]
    if _is_lost(error):
        return f"another process of this run ended ({first}): see what it said; all of them go on with --resume."
    if str(error).startswith(GUARDED):
        return f"JAX allows no transfer to the device ({first}): unset JAX_TRANSFER_GUARD."
    if isinstance(error, MemoryError | RuntimeError):
        return f"out of memory ({first}): use a smaller --batch-size, fewer --seeds or --num-next-actions."
    if not isinstance(error, OSError) or isinstance(error, UserError):
        return str(error)
    remedy = {
        errno.ENOSPC: "free some space, then go on with --resume",
        errno.EFBIG: "raise the limit (ulimit -f), then go on with --resume",
        errno.EDQUOT: "free some of your quota, then go on with --resume",
        errno.EACCES: "change its permissions, or choose another place",
        errno.EPERM: "change its permissions, or choose another place",
        errno.EROFS: "choose a place that can be written to, with --run-dir or --out",
    }.get(error.errno or 0, "--debug shows where this happened")
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}: {remedy}."
