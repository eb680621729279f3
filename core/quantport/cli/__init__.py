"""The command line: one command for each question that people ask."""

import gc

import torch  # noqa: F401

gc.freeze()  # what torch has made stays: to look through it for garbage takes longer than the imports below

from quantport.cli import inspect  # noqa: E402, I001  # first in the help: what is here, and what would happen
from quantport.cli import execute  # noqa: E402
from quantport.cli.app import app, main  # noqa: E402

__all__ = ["app", "execute", "inspect", "main"]
