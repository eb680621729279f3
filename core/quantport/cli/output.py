"""Standard output belongs to pages: what plugins and libraries print meanwhile goes to standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TextIO

import typer

from quantport.errors import SaveError

BROKEN_PIPE = 141  # 128 + SIGPIPE: what a shell says of any tool whose reader left
_PAGES: ContextVar[TextIO | None] = ContextVar("pages", default=None)


def pages() -> TextIO:
    """Where pages are written."""
    return _PAGES.get() or sys.stdout


@contextlib.contextmanager
def only_pages() -> Iterator[None]:
    """Keeps standard output for `write`, so that JSON stays JSON. The programs that a plugin starts, and
    libraries in C, write to standard error too, where these streams are files.
    """
    try:
        out, err = sys.stdout.fileno(), sys.stderr.fileno()
    except (OSError, ValueError):  # a test's
        with _kept(sys.stdout), contextlib.redirect_stdout(sys.stderr):
            yield
        return
    sys.stdout.flush()
    with open(os.dup(out), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors) as stream:
        os.dup2(err, out)
        try:
            with _kept(stream):
                yield
        finally:
            sys.stdout.flush()
            os.dup2(stream.fileno(), out)


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Inside, libraries log errors only: what Transformers imports for a plan warns of its own extensions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _kept(stream: TextIO) -> Iterator[None]:
    token = _PAGES.set(stream)
    try:
        yield
    finally:
        _PAGES.reset(token)


def write(text: str) -> None:
    """Writes a text and a newline to stdout; a reader that left (``| head``) ends the command without
    a word.

    Raises:
        OSError: stdout takes nothing, as on a full disk; an error as JSON would be lost there too, so `main`
            explains it on stderr.
    """
    stream = pages()
    try:
        stream.write(text + "\n")
        stream.flush()
    except BrokenPipeError as error:
        stdout_failed(error)
        raise typer.Exit(BROKEN_PIPE) from None


def stdout_failed(error: OSError) -> SaveError:
    """The error for a stdout that took nothing, which nothing is written to any more: the interpreter flushes
    it once more when it ends.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), pages().fileno())
    found = error.strerror or str(error)
    return SaveError("write to stdout", found, "another file or pipe, on a disk with free space")
