"""The command line: one command for each question that people ask."""

from quantport.cli import asking, doing
from quantport.cli.app import app, main

__all__ = ["app", "asking", "doing", "main"]
