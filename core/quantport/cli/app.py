"""The application: version, errors and exit codes. Exit 0: done. 1: a check failed. 2: a wrong request,
explained on stderr.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from quantport.cli.output import only_pages, quiet_logs, stdout_failed, write
from quantport.errors import QuantportError, SaveError
from quantport.plugins.entry_points import installed, is_builtin

if TYPE_CHECKING:
    from quantport.plugins.registry import Registry

INTERRUPTED = 130  # 128 + SIGINT
_MANUAL = """Quantizes BF16/FP16 models while they load, on whatever accelerator it finds.

A scheme says what the numbers become (int8, fp8_per_block, int4_weight_only...); a plan says what each layer
gets on a device, and why; `matrix` says what works where.

Exit codes: 0 done; 1 a check failed (doctor); 2 a wrong request, explained on stderr, or as JSON on stdout
with --json; 130 interrupted."""
_EPILOG = """[bold]Start here[/bold]

  quantport devices                      what is here

  quantport plan MODEL --scheme int8     what would happen, without doing it

  quantport run MODEL --scheme int8      do it, and generate text"""


class _ConvertsWhatWasGiven:
    """Leaves options alone that were not given: typer converts them all through pydantic, whose import takes
    longer than most of what a short command does.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]  # of the command that it is mixed into
        for param in params:
            if not (param.required or param.multiple or param.nargs != 1 or "process_value" in vars(param)):
                param.process_value = _where_given(param.process_value)
        return params


def _where_given(convert: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def convert_given(ctx: Any, value: Any) -> Any:
        return None if value is None else convert(ctx, value)

    return convert_given


class _Command(_ConvertsWhatWasGiven, TyperCommand):
    """One command."""


class _Group(_ConvertsWhatWasGiven, TyperGroup):
    """Turns every error of quantport into its three-part message and exit code 2, and says an interrupt."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except QuantportError as error:
            explain(error)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=_MANUAL,
    epilog=_EPILOG,
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Adds a command; the section Examples of its docstring, one to a line, stands at the end of its help.

    With ``--json``, an error is JSON on stdout too.
    """
    text, _, shown = (inspect.getdoc(function) or "").partition("\nExamples:\n")
    lines = [escape(line.strip()) for line in shown.splitlines() if line.strip()]
    epilog = "\n\n".join(["[bold]Examples[/bold]", *lines]) if lines else None

    @functools.wraps(function)
    def run(**options: Any) -> None:
        with only_pages(), quiet_logs():
            try:
                function(**options)
            except QuantportError as error:
                explain(error, as_json=options.get("as_json") or options.get("style") == "json")
                raise typer.Exit(2) from None

    return app.command(cls=_Command, help=escape(text), epilog=epilog)(run)


def add_plugin_commands(registry: Registry | None = None) -> None:
    """Adds the commands of plugins after those of quantport; one whose parameters cannot be options is set
    aside. Where nobody else's plugin is installed, nothing is loaded.

    Args:
        registry: Where the commands come from; by default that of the process.
    """
    if registry is None:
        if all(map(is_builtin, installed())):
            return
        from quantport.plugins.registry import default_registry

        registry = default_registry()
    for name, function in registry.commands.items():
        trial = typer.Typer()
        trial.command(name)(function)
        try:
            typer.main.get_command(trial)
        except Exception as error:  # whatever typer makes of a stranger's signature
            registry.set_aside(registry.owners[name], "command", error)
        else:
            app.command(name)(function)


def _version(asked: bool) -> None:
    if asked:
        import quantport

        typer.echo(f"quantport {quantport.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def explain(error: QuantportError, *, as_json: bool = False) -> None:
    """Prints the three parts of an error, each under its name: to stderr, or to stdout as JSON."""
    if as_json:
        parts = {"asked": error.asked, "found": error.found, "try": error.suggestion}
        write(json.dumps({"error": {"type": type(error).__name__, **parts}}, indent=2))
        return
    view = Console(stderr=True, markup=False, highlight=False, emoji=False)
    if not sys.stderr.isatty():  # one part to a line, whole, for pipes and logs
        view.print(f"{type(error).__name__}\n{error}", soft_wrap=True)
        return
    view.print(Text(type(error).__name__, "bold red"))
    grid = Table.grid(padding=(0, 1))
    for name, text in (("asked", error.asked), ("found", error.found), ("try", error.suggestion)):
        grid.add_row(Text(f"{name}:", "bold"), Text(text, overflow="fold"))
    view.print(grid)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Shows a warning as people read it: no file, no line of source."""
    print(f"warning: {message}", file=file or sys.stderr)  # the hook of the warnings module


def main() -> None:
    """Runs the command line."""
    if sys.stdout is None:  # closed: Python has no stream for it
        explain(SaveError("write to stdout", "it is closed", "a file, a pipe, a terminal, or /dev/null"))
        sys.exit(2)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            # a terminal that knows no box or tick shows a question mark, not a traceback
            reconfigure(errors="replace")
    warnings.showwarning = _warn
    try:
        try:
            with only_pages():
                add_plugin_commands()
        except QuantportError as error:  # of the environment that restricts plugins
            explain(error, as_json="--json" in sys.argv)
            sys.exit(2)
        app()
    except OSError as error:
        if error.filename is not None:
            raise
        explain(stdout_failed(error))
        sys.exit(2)
