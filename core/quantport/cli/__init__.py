"""The command line: one command for each question that people ask."""

from quantport.cli.app import main

__all__ = ["main"]
