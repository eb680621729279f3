"""Whether a file is still the one that it was."""

from __future__ import annotations

import os
from io import FileIO
from typing import NamedTuple

from quantport.errors import CheckpointError


class FileStamp(NamedTuple):
    """A file at one time.

    Attributes:
        size: In bytes.
        mtime: When it was written last, in ns.
        device: The file system that it is on.
        inode: Its number there: another file that was renamed to its path has another.
    """

    size: int
    mtime: int
    device: int
    inode: int


def file_stamp(file: int | str) -> FileStamp:
    """Returns the stamp of an open file, or of a path."""
    status = os.stat(file)
    return FileStamp(status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)


def check_stamp(asked: str, file: int | str, stamp: FileStamp) -> None:
    """Checks that a file is still the one that it was.

    Raises:
        CheckpointError: it is not, or is gone; what was read of it may be of two files.
    """
    try:
        same = file_stamp(file) == stamp
    except OSError as error:
        raise CheckpointError(asked, str(error), "a file that stays while it is read") from error
    if not same:
        suggestion = "open the checkpoint again, once nothing writes to it"
        raise CheckpointError(asked, "the file changed since its header was read", suggestion)


def open_unchanged(asked: str, path: str, stamp: FileStamp) -> FileIO:
    """Opens a file without a buffer; the caller closes it.

    Raises:
        CheckpointError: it cannot be read, or is another than it was.
    """
    try:
        file = FileIO(path)
    except OSError as error:
        raise CheckpointError(asked, str(error), "a file that can be read") from error
    try:
        check_stamp(asked, file.fileno(), stamp)
    except CheckpointError:
        file.close()
        raise
    return file
