"""Streams tensors in and out of checkpoints: safetensors files in the layout of the Hugging Face hub."""

from quantport.checkpoint.header import TensorInfo
from quantport.checkpoint.reader import Checkpoint
from quantport.checkpoint.writer import save_tensors

__all__ = ["Checkpoint", "TensorInfo", "save_tensors"]
