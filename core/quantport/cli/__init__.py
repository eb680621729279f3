"""The command line: one command for each question that people ask."""

from quantport.cli import inspect  # noqa: I001  # first in the help: what is here, and what would happen
from quantport.cli import execute
from quantport.cli.app import app, main

__all__ = ["app", "execute", "inspect", "main"]
