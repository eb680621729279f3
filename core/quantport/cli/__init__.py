"""The command line: one command for each question that people ask."""

from quantport.cli import execute, inspect
from quantport.cli.app import app, main

__all__ = ["app", "execute", "inspect", "main"]
