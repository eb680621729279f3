"""Commands that do something: run, quantize and bench."""

from __future__ import annotations

from pathlib import Path
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
    Model,
    NumTokensOption,
    SchemeOption,
    form,
    read_config,
)
from quantport.errors import ConfigError


@command
def run(
    model: Model,
    scheme: SchemeOption = None,
    device: DeviceOption = "auto",
    config: ConfigOption = None,
    ignore: IgnoreOption = None,
    num_tokens: NumTokensOption = 1,
    fallback: FallbackOption = None,
    kv_cache: KVCacheOption = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to continue, or to answer with --chat.")
    ] = "The following exceptions are",
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Ask with the chat template of the tokenizer; by default where it has one.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens to generate, greedily.")] = 48,
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of torch; greedy text does not depend on it.")
    ] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the decode step: a minute once, then faster steps.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Load BF16 too: perplexity, KL, top-1, bytes, tokens/s.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", help="Text for --compare; eval.txt beside the model, or Python's help, if left out."
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option("--windows", min=1, help="For --compare: windows of 256 tokens, at most.")
    ] = 64,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="For --compare: the 16-bit model; MODEL if left out.")
    ] = None,
    style: FormatOption = None,
    as_json: JsonOption = False,
) -> None:
    """Load, quantize and generate text; with --compare, measure it against BF16 on the same text.

    Examples:
        quantport run examples/models/tiny-llama --scheme int8
        quantport run examples/models/tiny-llama --scheme int8 --compare
        quantport run examples/models/tiny-llama --scheme int8 --kv-cache fp8 --compare
        quantport run MODEL --scheme int4 --prompt 'Once upon a time' --tokens 100 --no-chat
        quantport run MODEL --scheme int4 --compile
        quantport run OUT --compare --baseline MODEL --text pages.txt   (OUT written by quantize)
    """
    from quantport.cli import run_model

    chosen = form(style, as_json)
    run_model.run(
        run_model.Request(
            model,
            scheme,
            device,
            read_config(config, ignore, kv_cache),
            num_tokens,
            fallback.value if fallback else None,
        ),
        run_model.Text(prompt, tokens, seed, chat, compiled),
        run_model.Comparison(text, windows, baseline) if compare else None,
        chosen,
    )


@command
def quantize(
    model: Model,
    out: Annotated[
        Path, typer.Argument(help="Directory to write: new, or empty; or a .gguf file.", show_default=False)
    ],
    scheme: SchemeOption = None,
    device: DeviceOption = "auto",
    config: ConfigOption = None,
    ignore: IgnoreOption = None,
    num_tokens: NumTokensOption = 1,
    fallback: FallbackOption = None,
    kv_cache: KVCacheOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint that is there.")
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Largest file: bytes, or a text such as 2GB.")
    ] = "5GB",
    written: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="Format of the checkpoint: quantport, which holds every scheme, or one that others load, "
            "such as compressed-tensors, gptq or gguf; auto: such a one where nothing is lost, or quantport.",
        ),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a quantized checkpoint whose numbers `quantport run` and `quantport.load` read back, and
    where its format can hold the numbers one that others load without quantport.

    OUT appears complete or not at all. A few layers at a time are in memory. If it is killed, the same
    command goes on after the last whole file.

    Examples:
        quantport quantize MODEL OUT --scheme int8 --kv-cache fp8
        quantport quantize MODEL OUT --scheme int4 --ignore '*.down_proj' --overwrite
        quantport quantize MODEL OUT --scheme int4_weight_only:g128:fp16 --format gptq
        quantport quantize MODEL OUT.gguf --scheme q8_0 --format gguf
        quantport run OUT   (reads it back; it is quantized, so no --scheme)
    """
    from quantport.cli import run_model

    settings = read_config(config, ignore, kv_cache)
    policy = fallback.value if fallback else None
    request = run_model.Request(model, scheme, device, settings, num_tokens, policy)
    run_model.quantize(request, out, overwrite, max_shard_size, written, "json" if as_json else "table")


@command
def bench(
    schemes: Annotated[
        list[str] | None, typer.Option("--scheme", "-s", help="Scheme; repeatable; all by default.")
    ] = None,
    device: DeviceOption = "auto",
    size: Annotated[tuple[int, int], typer.Option("--size", help="N and K of the linear layer.")] = (
        4096,
        4096,
    ),
    num_tokens: Annotated[
        list[int] | None,
        typer.Option(
            "--num-tokens", "--rows", min=1, help="Tokens (rows of activations); repeatable; 1, 16, 128."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few copies and rounds: shows that it runs, measures nothing.")
    ] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the speeds for this machine: the plan chooses by them.")
    ] = False,
    style: FormatOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine: each scheme's linear layer against BF16, as ratios of one run, with cold weights.

    Examples:
        quantport bench
        quantport bench --scheme int8 --scheme int4 --num-tokens 1 --num-tokens 16
        quantport bench --scheme int8 --save   (plan, load and run prefer it to the measurements that ship)
        quantport bench --size 512 512 --quick   (a smoke test, not a measurement)
    """
    from quantport.cli import bench_linear, page

    chosen = form(style, as_json)
    if save and quick:
        raise ConfigError("--save with --quick", "--quick measures nothing", "one of them")
    found = bench_linear.bench(schemes, device, size, tuple(num_tokens or (1, 16, 128)), quick)
    if save:
        found["saved"] = str(bench_linear.save(found))
    page.emit(bench_linear.bench_page(found), chosen)
