"""The formats room: checkpoints that others have quantized, each format one file."""

from quantport.backend import hookimpl
from quantport.checkpoint import CheckpointFormat
from quantport_formats.compressed_tensors import CompressedTensors
from quantport_formats.fp8 import Fp8


@hookimpl
def quantport_checkpoint_formats() -> list[CheckpointFormat]:
    """Returns the formats. No two recognize one checkpoint."""
    return [Fp8(), CompressedTensors()]
