"""What a shell sees when something goes wrong: one sentence, and an exit code.

0 done   1 a certificate, a model or a sample failed   2 the call cannot be right
3 broken off: the model raised, memory ran out, a file could not be written
130 interrupted   141 nobody reads the output any more
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click

__all__ = ["BROKEN_OFF", "INTERRUPTED", "WRONG_CALL", "Calls", "Group", "first_line", "traced"]

WRONG_CALL, BROKEN_OFF, INTERRUPTED = 2, 3, 130
NOBODY_READS = 128 + 13
"""What shells show for a program that SIGPIPE ended."""
TRACEBACK = "scoresolve.cli.traceback"
"""Where the context keeps whether --traceback was given."""


class Calls:
    """Watches the calls of the user's own network, to tell whether it raised, and where.

    Attributes:
        name: what the user called it by.
        count: calls so far.
        t: times of the last call, as the network got them.
        inside: whether the last call has not returned.
    """

    def __init__(self, name: str) -> None:
        self.name, self.count, self.inside = name, 0, False
        self.t: Any = None

    def watch(self, net: Callable[..., Any]) -> Callable[..., Any]:
        """`net`, or what calls it, with its calls counted here while the command runs."""
        import torch

        click.get_current_context().meta[Calls.__name__] = self
        if not isinstance(net, torch.nn.Module):
            return _Counted(net, self)
        if not isinstance(net, torch.jit.ScriptModule):  # whose hooks have to be scripts too
            net.register_forward_pre_hook(self._entering, with_kwargs=True)
            net.register_forward_hook(lambda *_: self.leave())
        return net

    def _entering(self, _: object, values: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.enter(values, named)

    def enter(self, values: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A call begins."""
        self.count += 1
        self.t, self.inside = values[1] if len(values) > 1 else named.get("t"), True

    def leave(self) -> None:
        """A call has returned."""
        self.inside = False

    def where(self) -> str:
        """The last call in words."""
        return f"in its call {self.count}{_times(self.t)}"


class _Counted:
    """A callable with its calls watched; all else is that callable's own."""

    def __init__(self, net: Callable[..., Any], calls: Calls) -> None:
        self.__wrapped__, self._calls = net, calls  # where `inspect.signature` looks

    def __call__(self, *values: Any, **named: Any) -> Any:
        self._calls.enter(values, named)
        found = self.__wrapped__(*values, **named)
        self._calls.leave()
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["__wrapped__"], name)


def _times(t: Any) -> str:
    try:
        values = [float(value) for value in (t.flatten() if hasattr(t, "flatten") else [t])]
    except (RuntimeError, TypeError, ValueError):
        return ""
    if not values:
        return ""
    low, high = min(values), max(values)
    return f", at t = {low:.4g}" if low == high else f", at t from {low:.4g} to {high:.4g}"


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])


def traced() -> None:
    """Print the traceback of the error that is handled now, if --traceback was given."""
    if click.get_current_context().meta.get(TRACEBACK):
        click.echo(traceback.format_exc(), err=True, nl=False)


class Group(click.Group):
    """Commands that end in one sentence whatever goes wrong, each with a flag --traceback."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        option = click.Option(
            ["--traceback"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=lambda ctx, _, value: ctx.meta.__setitem__(TRACEBACK, value),
            help="Show where an error was raised.",
        )
        cmd.params.append(option)
        super().add_command(cmd, name)

    def main(self, *values: Any, **named: Any) -> Any:
        """As click's, and a sentence too if help cannot be printed."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # what has no such letter shows its number
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*values, **named)
        except OSError as error:
            _end(_sentence(error), BROKEN_OFF)

    def invoke(self, ctx: click.Context) -> Any:
        from scoresolve.errors import ScoresolveError

        try:
            with warnings.catch_warnings(), _output_arrives():
                warnings.showwarning = _warn
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except BrokenPipeError:
            _discard(sys.stdout)
            raise SystemExit(NOBODY_READS) from None
        except KeyboardInterrupt:
            _end("interrupted", INTERRUPTED)
        except (Exception, SystemExit) as error:
            calls = ctx.meta.get(Calls.__name__)
            raised = calls is not None and calls.inside
            if isinstance(error, SystemExit) and not raised:
                raise
            traced()
            if isinstance(error, ScoresolveError):
                _end(str(error), WRONG_CALL)
            if calls is not None and raised and not _is_memory(error):
                words = f"the model {calls.name} raised {first_line(error)}, {calls.where()}"
                _end(f"{words}; --traceback shows the line", BROKEN_OFF)
            _end(_sentence(error), BROKEN_OFF)


@contextmanager
def _output_arrives() -> Iterator[None]:
    """What was printed is flushed, so that a full disk is an error here and not lost in silence."""
    try:
        yield
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _sentence(error: BaseException) -> str:
    if _is_memory(error):
        return (
            f"out of memory ({first_line(error)}): ask for fewer, or for less at a time by --chunk"
        )
    if isinstance(error, OSError):
        return f"{error.filename or 'the output'}: {error.strerror or error}"
    return f"broke off, {first_line(error)}; --traceback shows where"


def _is_memory(error: BaseException) -> bool:
    """Also torch's errors of memory, which on a CPU have no type of their own."""
    words = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    click.echo(f"scoresolve: warning: {message}", err=True)


def _end(words: str, code: int) -> NoReturn:
    click.echo(f"scoresolve: {words}", err=True)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _discard(sys.stdout)
    raise SystemExit(code)


def _discard(stream: Any) -> None:
    """Let nothing more be written, else Python tries once more when it ends, and complains."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
