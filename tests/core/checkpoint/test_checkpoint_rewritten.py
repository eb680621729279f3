"""Tensors on their way to a file that become others."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from quantport.checkpoint import Joined, Rewrite, rewritten, save_tensors

CODES = torch.arange(12, dtype=torch.int8).view(4, 3)
SCALES = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
LAYOUT = {
    "a.codes": ((4, 3), torch.int8),
    "b": ((2,), torch.float32),
    "a.scale": ((4, 1), torch.float32),
}
CHANGES = {"b": Rewrite("c", torch.neg)}
FURTHER = {"d": torch.ones(1)}
JOINED = Joined(
    "a",
    {"codes": LAYOUT["a.codes"], "scale": LAYOUT["a.scale"]},
    {"columns": ((3, 4), torch.int8), "values": ((4, 3), torch.float32)},
    lambda held: {"columns": held["codes"].t(), "values": held["codes"] * held["scale"]},
)
PIECES = [("a.codes", CODES[:1]), ("a.scale", SCALES[:1]), ("b", torch.ones(2)), ("a.codes", CODES[1:])]
EXPECTED = {"a.columns": CODES.t(), "a.values": CODES * SCALES, "c": -torch.ones(2), "d": torch.ones(1)}


def test_a_weight_in_pieces_is_written_once_it_is_whole(tmp_path):
    tensors, layout = rewritten(iter([*PIECES, ("a.scale", SCALES[1:])]), LAYOUT, CHANGES, FURTHER, [JOINED])
    assert list(layout) == ["a.columns", "a.values", "c", "d"]
    written = load_file(save_tensors(tmp_path / "x", tensors, layout=layout) / "model.safetensors")
    assert written.keys() == EXPECTED.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in EXPECTED.items())


def test_only_what_is_missing_is_asked_for_and_written():
    def fill(missing, write):
        asked.append(missing)
        for name, tensor in [*PIECES, ("a.scale", SCALES[1:])]:
            if name in missing:
                write(name, tensor)

    asked, written = [], {}
    run, _ = rewritten(fill, LAYOUT, CHANGES, FURTHER, [JOINED])
    run({"a.values"}, written.__setitem__)
    assert asked == [{"a.codes", "a.scale"}]
    assert written.keys() == {"a.values"}
    assert torch.equal(written["a.values"], CODES * SCALES)
    run, _ = rewritten(fill, LAYOUT, CHANGES, FURTHER, [JOINED])
    run({"c", "d"}, written.__setitem__)
    assert asked[1:] == [{"b"}]
    assert written.keys() == {"a.values", "c", "d"}
