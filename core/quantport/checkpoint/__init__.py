"""Streams tensors in and out of checkpoints, and says what they are: safetensors files in the layout of the
Hugging Face hub, and whatever formats plugins bring.
"""

from quantport.checkpoint.companions import companions
from quantport.checkpoint.decoded import Coded, CodedTensor
from quantport.checkpoint.format import (
    CheckpointFormat,
    KVCacheConfig,
    QuantizedWeight,
    Recognized,
    SavedLayer,
    SavedModel,
    SaveTarget,
)
from quantport.checkpoint.header import TensorInfo
from quantport.checkpoint.json import read_config, read_json
from quantport.checkpoint.quantport_format import QuantportFormat
from quantport.checkpoint.reader import Checkpoint
from quantport.checkpoint.recognize import BUILTIN_FORMATS, open_by_format, open_source, recognize
from quantport.checkpoint.rewritten import Joined, Rewrite, rewritten
from quantport.checkpoint.shard import Fill, Head, OneFile, Stream, TensorLayout
from quantport.checkpoint.source import Rows, StoredTensor, TensorSource, VerifiedSource, unchanged
from quantport.checkpoint.writer import save_tensors

__all__ = [
    "BUILTIN_FORMATS",
    "Checkpoint",
    "CheckpointFormat",
    "Coded",
    "CodedTensor",
    "Fill",
    "Head",
    "Joined",
    "KVCacheConfig",
    "OneFile",
    "QuantizedWeight",
    "QuantportFormat",
    "Recognized",
    "Rewrite",
    "Rows",
    "SaveTarget",
    "SavedLayer",
    "SavedModel",
    "StoredTensor",
    "Stream",
    "TensorInfo",
    "TensorLayout",
    "TensorSource",
    "VerifiedSource",
    "companions",
    "open_by_format",
    "open_source",
    "read_config",
    "read_json",
    "recognize",
    "rewritten",
    "save_tensors",
    "unchanged",
]
