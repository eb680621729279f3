"""The example of three formats runs, and prints what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_three_formats_are_kept_converted_and_added_to(tmp_path):
    example = ROOT / "examples" / "checkpoints" / "keep_convert_add.py"
    done = subprocess.run([sys.executable, example, tmp_path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.rpartition(",")[0] for line in done.stdout.splitlines() if ": " in line]
    assert lines == [
        "bitsandbytes, kept: nf4",
        "bitsandbytes, converted: fp8_weight_only",
        "bitsandbytes, added to: int8_weight_only, nf4",
        "torchao, kept: int8_weight_only:channel:fp32",
        "torchao, converted: fp8_weight_only",
        "torchao, added to: int8_weight_only, int8_weight_only:channel:fp32",
        "compressed-tensors, kept: int4_weight_only:g64",
        "compressed-tensors, converted: fp8_weight_only",
        "compressed-tensors, added to: int4_weight_only:g64, int8_weight_only",
    ]
