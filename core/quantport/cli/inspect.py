"""Commands that look and tell: devices, matrix, inspect, plan and doctor. They change nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from quantport.cli.app import command
from quantport.cli.options import (
    ConfigOption,
    DeviceOption,
    FallbackOption,
    FormatOption,
    IgnoreOption,
    JsonOption,
    KVCacheOption,
    LayerKind,
    Model,
    NumTokensOption,
    SchemeOption,
    form,
    read_config,
)


@command
def devices(style: FormatOption = None, as_json: JsonOption = False) -> None:
    """List the devices that were found; the first one is what --device auto takes.

    Examples:
        quantport devices
        quantport devices --json
        quantport plan MODEL --device cuda:sm_90   (a device that is not here)
    """
    import quantport
    from quantport.cli import page, show

    page.emit(show.devices_page(quantport.devices()), form(style, as_json))


@command
def matrix(
    scheme: Annotated[str | None, typer.Option("--scheme", "-s", help="Only this scheme.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", "-d", help="Only this kind (cpu), or kind:arch (cpu:x86_amx).")
    ] = None,
    layer: Annotated[LayerKind | None, typer.Option("--layer", help="Only this kind of layer.")] = None,
    style: FormatOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what works where: scheme x architecture, with effective precision, kernel, reason and evidence.

    Evidence, strongest first: measured, compiled, simulated, interpreted, declared (a vendor's document).

    Examples:
        quantport matrix                                    all of it, one mark for each cell
        quantport matrix --device cuda:sm_80                one architecture, with the reasons
        quantport matrix --scheme fp8_per_block --layer moe one scheme everywhere
        quantport matrix --format markdown > matrix.md      with kernels, evidence and sources
    """
    import quantport
    from quantport.cli import output, page, show

    cells = quantport.matrix(scheme, device, layer.value if layer else None)
    chosen = form(style, as_json)
    if chosen == "markdown":
        output.write(show.matrix_markdown(cells))
    else:
        page.emit(show.matrix_page(cells, detailed=bool(scheme or device) or chosen == "html"), chosen)


@command
def inspect(
    model: Model,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device", "-d", help="What this device would do, found or not (KIND:ARCH); repeatable."
        ),
    ] = None,
    style: FormatOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint is: its format, schemes, bits per weight, and what each device would do with it.

    Reads headers only. Without --device: the devices that were found.

    Examples:
        quantport inspect MODEL
        quantport inspect MODEL --device cuda:sm_80 --device cpu
        quantport inspect MODEL --json
    """
    import quantport
    from quantport.cli import contents, page

    chosen = form(style, as_json)
    targets = device or quantport.devices()
    keep = {"linear": None, "moe": None}
    plans = [quantport.plan(model, config=keep, device=target) for target in targets]
    page.emit(contents.contents_page(plans), chosen)


@command
def plan(
    model: Model,
    scheme: SchemeOption = None,
    device: DeviceOption = "auto",
    config: ConfigOption = None,
    ignore: IgnoreOption = None,
    num_tokens: NumTokensOption = 1,
    fallback: FallbackOption = None,
    kv_cache: KVCacheOption = None,
    style: FormatOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what loading would do to every layer, and why. Reads headers only; the hardware need not be here.

    Examples:
        quantport plan examples/models/tiny-llama
        quantport plan MODEL --scheme fp8_per_block --device cuda:sm_80
        quantport plan MODEL --scheme int8 --kv-cache fp8
        quantport plan MODEL --scheme int4 --ignore '*.down_proj' --ignore 're:.*layers.0..*'
        quantport plan MODEL --scheme fp8 --device cuda:sm_80 --fallback error   (exit code 2 where W8A8
        cannot run)
    """
    import quantport
    from quantport.cli import page, plans

    chosen, settings = form(style, as_json), read_config(config, ignore, kv_cache)
    made = quantport.plan(
        model,
        scheme,
        config=settings,
        device=device,
        num_tokens=num_tokens,
        fallback=fallback.value if fallback else None,
    )
    page.emit(plans.plan_page(made), chosen)


@command
def doctor(style: FormatOption = None, as_json: JsonOption = False) -> None:
    """Check the installation: versions, devices, plugins that were set aside and why, and what is missing.

    Exit code 1 when something is broken; advice alone is no problem.

    Examples:
        quantport doctor
        quantport doctor --json   (for a bug report)
    """
    from quantport.cli import doctor as examination
    from quantport.cli import page

    chosen = form(style, as_json)
    found = examination.examine()
    page.emit(examination.doctor_page(found), chosen)
    if found.problems:
        raise typer.Exit(1)
