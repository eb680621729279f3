"""Commands, options and exit codes. Exit 0: done. 1: a check failed. 2: a wrong request, explained on stderr."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from quantport.errors import ConfigError, QuantportError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantizes BF16/FP16 models while they load, on whatever accelerator it finds.",
    epilog="Start here: `quantport devices`, then `quantport plan MODEL`, then `quantport run MODEL`.",
)
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Checkpoint directory, safetensors file, or hub id.")]
SchemeOption = Annotated[str | None, typer.Option("--scheme", "-s", help="Scheme; the device chooses when left out.")]
DeviceOption = Annotated[str, typer.Option("--device", "-d", help="auto, a kind, kind:index, or kind:arch for hardware not here.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="JSON file with a QuantConfig.")]
IgnoreOption = Annotated[list[str] | None, typer.Option("--ignore", help="Pattern of layers to leave alone; repeatable.")]
RowsOption = Annotated[int, typer.Option("--rows", min=1, help="Expected rows of activations: 1 for decoding one sequence.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Fallback(str, Enum):
    """Fallback policies."""

    weight_only = "weight_only"
    error = "error"
    reference = "reference"


class Format(str, Enum):
    """Output formats of the matrix."""

    table = "table"
    markdown = "markdown"
    json = "json"
    html = "html"


class LayerKind(str, Enum):
    """Kinds of layers."""

    linear = "linear"
    moe = "moe"


FallbackOption = Annotated[Fallback | None, typer.Option("--fallback", help="What to do where the device cannot run the scheme.")]


def _read_config(path: Path | None, ignore: list[str] | None) -> dict[str, Any] | None:
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--config {path}", str(error), 'a JSON file, for example {"scheme": "int8"}') from None
        if not isinstance(data, dict):
            raise ConfigError(f"--config {path}", f"a JSON {type(data).__name__}", "a JSON object")
    if ignore:
        data["ignore"] = [*data.get("ignore", ()), *ignore]
    return data or None


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


@app.command()
def devices(as_json: JsonOption = False) -> None:
    """List the devices that were found; the first one is what --device auto takes."""
    import quantport
    from quantport.cli import show

    found = quantport.devices()
    if as_json:
        _print_json([show.device_dict(d) for d in found])
    else:
        show.console().print(show.device_table(found))


@app.command()
def matrix(
    scheme: SchemeOption = None,
    device: Annotated[str | None, typer.Option("--device", "-d", help="Only this kind, or kind:arch.")] = None,
    layer: Annotated[LayerKind | None, typer.Option("--layer", help="Only this kind of layer.")] = None,
    form: Annotated[Format, typer.Option("--format", "-f", help="Output format.")] = Format.table,
    as_json: JsonOption = False,
) -> None:
    """Show what works where: scheme x architecture, with effective precision, kernel, reason and evidence."""
    import quantport
    from quantport.cli import show

    cells = quantport.matrix(scheme, device, layer.value if layer else None)
    if as_json or form is Format.json:
        _print_json([c.to_dict() for c in cells])
    elif form is Format.markdown:
        typer.echo(show.matrix_markdown(cells))
    elif form is Format.html:
        typer.echo(show.matrix_html(cells))
    else:
        show.console().print(show.matrix_table(cells))


@app.command()
def plan(
    model: Model, scheme: SchemeOption = None, device: DeviceOption = "auto", config: ConfigOption = None,
    ignore: IgnoreOption = None, rows: RowsOption = 1, fallback: FallbackOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Say what loading would do to every layer, and why. Reads headers only; the hardware need not be here."""
    import quantport
    from quantport.cli import show

    made = quantport.plan(
        model, scheme, config=_read_config(config, ignore), device=device, rows=rows, fallback=fallback.value if fallback else None
    )
    if as_json:
        typer.echo(made.to_json())
    else:
        show.print_plan(made)


@app.command()
def run(
    model: Model, scheme: SchemeOption = None, device: DeviceOption = "auto", config: ConfigOption = None,
    ignore: IgnoreOption = None, rows: RowsOption = 1, fallback: FallbackOption = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")] = "The following exceptions are",
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens to generate.")] = 48,
    seed: Annotated[int, typer.Option("--seed", help="Seed; the text is greedy, so it changes nothing but what samples.")] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Also load BF16: perplexity, KL, top-1, bytes, tokens/s.")] = False,
    text: Annotated[Path | None, typer.Option("--text", help="Text for --compare; eval.txt beside the model by default.")] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Load, quantize and generate text; with --compare, measure it against BF16."""
    from quantport.cli import running

    report = running.run(
        model, scheme, device, _read_config(config, ignore), rows, fallback.value if fallback else None,
        prompt, tokens, seed, text if compare else None, compare, quiet=as_json,
    )  # fmt: skip
    if as_json:
        _print_json(report)


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist, or be empty.")],
    scheme: SchemeOption = None, device: DeviceOption = "auto", config: ConfigOption = None, ignore: IgnoreOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    fallback: FallbackOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Write a quantized checkpoint that `quantport run` and `quantport.load` read back bit-identically."""
    import quantport
    from quantport.cli import show

    with show.progress("quantizing") as report:
        loaded = quantport.load(
            model, scheme, config=_read_config(config, ignore), device=device, progress=report,
            fallback=fallback.value if fallback else None,
        )  # fmt: skip
    quantport.save(loaded, out, overwrite=overwrite)
    made = loaded.quantport_plan
    if as_json:
        _print_json({"directory": str(out), "bytes_before": made.before, "bytes_after": made.after})
    else:
        show.print_plan(made)
        show.console().print(f"wrote {out}")


@app.command()
def bench(
    schemes: Annotated[list[str] | None, typer.Option("--scheme", "-s", help="Schemes; all of them when left out.")] = None,
    device: DeviceOption = "auto",
    size: Annotated[tuple[int, int], typer.Option("--size", help="N and K of the linear layer.")] = (4096, 4096),
    rows: Annotated[list[int] | None, typer.Option("--rows", min=1, help="Rows of activations; repeatable.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine: each scheme's linear layer against BF16, as ratios from one run, weights cold in cache."""
    from quantport.cli import benching, show

    table = benching.bench(schemes, device, size, tuple(rows or (1, 16, 128)))
    if as_json:
        _print_json(table)
    else:
        show.console().print(show.bench_table(table))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check the installation: devices, plugins that were set aside and why, and what is missing. Exit 1 on a problem."""
    from quantport.cli import show
    from quantport.host import host

    found = host()
    _ = found.devices, [found.kernels(kind) for kind in found.backends]
    advice = {kind: list(backend.advice()) for kind, backend in found.backends.items()}
    if as_json:
        _print_json(show.doctor_dict(found, advice))
    else:
        show.print_doctor(found, advice)
    if found.problems:
        raise typer.Exit(1)


def main() -> None:
    """Runs the command line; an error of quantport becomes its three-part message and exit code 2."""
    try:
        app()
    except QuantportError as error:
        err.print(f"[bold red]{type(error).__name__}[/]")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
