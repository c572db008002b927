"""What the command line says: refusals in one sentence, progress, the last line of a run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from gradiometer.bench.data.registry import nearest
from gradiometer.bench.errors import RequestError


class Commands(click.Group):
    """Turns requests that cannot be carried out into one sentence and exit status 2."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise _no_option(error) from None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            raise Refusal(f"unknown command {args[0]!r}{nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RequestError as error:
            raise Refusal(str(error)) from None
        except click.NoSuchOption as error:
            raise _no_option(error) from None
        except click.UsageError as error:
            raise Refusal(error.format_message().replace("Error: ", "").rstrip(".")) from None
        except BrokenPipeError:
            sys.stderr.close()
            raise SystemExit(0) from None
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            raise SystemExit(130) from None


class Refusal(click.ClickException):
    """A request that cannot be carried out as it stands."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"gradiometer: {self.message}", err=True)


def _no_option(error: click.NoSuchOption) -> Refusal:
    command = error.ctx.command if error.ctx else None
    name = "gradiometer" if command is None or isinstance(command, click.Group) else command.name
    known = [word for p in command.params for word in p.opts] if command else []
    return Refusal(f"{name} has no option {error.option_name}{nearest(error.option_name, known)}")


def screen() -> Any:
    """A rich console."""
    from rich.console import Console

    # A pipe has no width: 120 columns hold the table, if COLUMNS does not say otherwise.
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=120)


class Echo(logging.Handler):
    """What takes long says so on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


class Progress:
    """A bar on a terminal, a line per cell elsewhere."""

    def __init__(self, total: int) -> None:
        from rich import progress as rich

        self.total, self.done = total, 0
        columns = (
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
            rich.TextColumn("{task.description}", markup=False),
        )
        self.bar = rich.Progress(*columns) if sys.stdout.isatty() else None

    def __enter__(self) -> Callable[[Any], None]:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total)
        return self.tell

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def tell(self, outcome: Any) -> None:
        """Note one outcome."""
        self.done += 1
        said = f"{outcome.cell}: {outcome.status}" + (
            f": {outcome.reason}" if outcome.status in ("failed", "skipped") else ""
        )
        if self.bar is not None:
            self.bar.update(self.task, advance=1, description=str(outcome.cell))
            if outcome.status in ("failed", "skipped"):
                self.bar.console.print(said, markup=False, highlight=False)
        elif outcome.status != "kept":
            click.echo(
                f"[{self.done}/{self.total}] {said}" + (f" ({outcome.seconds:.1f} s)" if outcome.seconds else "")
            )


def summarize(outcomes: Iterable[Any], folder: Path) -> int:
    """Say how a run ended; its exit status."""
    by: dict[str, list[Any]] = {}
    for outcome in outcomes:
        by.setdefault(outcome.status, []).append(outcome)
    failed, kept = by.get("failed", []), by.get("kept", [])
    if len(kept) == sum(map(len, by.values())):
        click.echo(f"nothing to do: all {len(kept)} cells are finished")
    else:
        counts = ", ".join(f"{len(found)} {status}" for status, found in by.items())
        click.echo(f"{counts}; next: gradiometer report {folder}")
    for outcome in failed:
        click.echo(f"failed: {outcome.cell}: {outcome.reason}", err=True)
    return 1 if failed else 0
