"""Arguments and options that commands share, and what they turn into."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from quantport.errors import CheckpointError, ConfigError


class Fallback(str, Enum):
    """Fallback policies."""

    weight_only = "weight_only"
    error = "error"
    reference = "reference"


class Format(str, Enum):
    """Output formats."""

    table = "table"
    markdown = "markdown"
    json = "json"
    html = "html"


class LayerKind(str, Enum):
    """Kinds of layers."""

    linear = "linear"
    moe = "moe"


Model = Annotated[
    str, typer.Argument(help="Checkpoint directory, safetensors file, or hub id.", show_default=False)
]
SchemeOption = Annotated[
    str | None,
    typer.Option(
        "--scheme", "-s", help="Scheme, for example int8 or fp8_per_block; the device chooses when left out."
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        "-d",
        help="auto, a kind (cpu), or kind:index (cpu:0); kind:arch (cpu:x86_amx) or a product, not here.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help='JSON file with a QuantConfig, for example {"scheme": "int8"}.'),
]
IgnoreOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore", help="Layers to leave alone: a name, a glob ('*.down_proj') or 're:...'; repeatable."
    ),
]
KVCacheOption = Annotated[
    str | None, typer.Option("--kv-cache", help="KV cache: fp8, fp8_e5m2, int8, int4; 16 bits when left out.")
]
NumTokensOption = Annotated[
    int,
    typer.Option(
        "--num-tokens",
        "--rows",
        min=1,
        help="Tokens at a time (rows of activations) to choose kernels for: 1 is decoding.",
    ),
]
FallbackOption = Annotated[
    Fallback | None, typer.Option("--fallback", help="Where the device cannot run the scheme itself.")
]
FormatOption = Annotated[
    Format | None, typer.Option("--format", "-f", help="Output format; table by default.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Short for --format json.")]


def form(asked: Format | None, as_json: bool) -> str:
    """The output format; ``--json`` beside another ``--format`` is a conflict."""
    if as_json and asked not in (None, Format.json):
        raise ConfigError(f"--json and --format {asked.value}", "two formats", "one of them")
    return "json" if as_json else (asked or Format.table).value


def read_config(
    path: Path | None, ignore: list[str] | None, kv_cache: str | None = None
) -> dict[str, Any] | None:
    """Reads ``--config`` and adds ``--ignore`` and ``--kv-cache`` to it.

    Raises:
        ConfigError: no such file, not JSON, or not an object.
    """
    data: dict[str, Any] = {}
    if path is not None:
        from quantport.checkpoint.json import read_json  # on use: it imports torch

        suggestion = 'a JSON file, for example {"scheme": "int8"}'
        try:
            if not path.exists():
                raise ConfigError(f"--config {path}", "No such file", suggestion)
            data = read_json(path, f"--config {path}", suggestion)
        except CheckpointError as error:  # it is none, whatever the reader is for
            raise ConfigError(error.asked, error.found, error.suggestion) from None
    if ignore:
        in_file = data.get("ignore", [])
        if not isinstance(in_file, list):
            raise ConfigError(
                f"--ignore beside --config {path}",
                f"its ignore is {in_file!r}",
                "a list of patterns in the file",
            )
        data = {**data, "ignore": [*in_file, *ignore]}
    if kv_cache is not None:
        if data.get("kv_cache_dtype") not in (None, kv_cache):
            found = f"--config {path} says kv_cache_dtype {data['kv_cache_dtype']!r}"
            raise ConfigError(f"--kv-cache {kv_cache}", found, "one of them")
        data = {**data, "kv_cache_dtype": kv_cache}
    return data or None
