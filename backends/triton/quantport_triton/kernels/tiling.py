"""How a product is cut into programs."""

from __future__ import annotations

from quantport_triton.launch import Config


def split_k(tiles: int, programs: int, steps: int) -> int:
    """Over how many programs K is split: a power of two, so that few variants are compiled; each has four steps or more."""
    split = 1
    while 2 * split * tiles <= programs and 8 * split <= steps:
        split *= 2
    return split


def tiled(config: Config, m: int, n: int, k: int) -> tuple[Config, tuple[int, int]]:
    """The configuration with ``SPLIT`` in place of ``PROGRAMS`` (how many keep the device busy), and the grid: tiles, parts of K."""
    blocks = dict(config.blocks)
    tiles = -(-m // blocks["BM"]) * -(-n // blocks["BN"])
    split = split_k(tiles, blocks.pop("PROGRAMS", 1), -(-k // blocks["BK"]))
    return Config({**blocks, "SPLIT": split}, config.warps, config.stages), (tiles, split)
