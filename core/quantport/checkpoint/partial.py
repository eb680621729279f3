"""A directory that appears under its final name complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from platform import node

from quantport.errors import SaveError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

WHOLE = ".whole"  # of shards that are written to their end, and are on the disk
_RESUME = ".resume"  # the file that says what is being saved: hidden, as no companion is
_LOCK = ".lock"  # the file that a living save holds: a pid may be that of another process, after a restart
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".gguf")


@contextlib.contextmanager
def appearing(directory: Path, *, overwrite: bool, resume: str = "", only: str = "") -> Iterator[Path]:
    """Yields a fresh directory beside the final one, and renames it to the final name when the block ends
    well.

    The fresh one is ``.<name>.partial-<host>-<pid>-<random>``. If the block raises, it is removed and the
    final name is untouched. After a kill it stays, and the next save to this name on this machine removes it.
    When an old checkpoint is replaced it waits as ``.<name>.replaced-...`` between two renames; after a kill
    there, the next save brings it back.

    Args:
        directory: The final name. It must be free, or an empty directory; or a checkpoint, if ``overwrite``.
        overwrite: Replace a checkpoint that is there.
        resume: What is saved. Where a killed save of the same left whole shards, the fresh directory has
            them: files that end in ``WHOLE``.
        only: The file that gets the final name in place of the directory that it is written to.

    Raises:
        SaveError: The final name is taken.
        OSError: The file system refused.
    """
    target = Path(os.path.realpath(directory))
    target.parent.mkdir(parents=True, exist_ok=True)
    left = _remove_stale(target, resume)
    check_free(target, overwrite, is_file=bool(only))
    mark = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    partial = target.with_name(f".{target.name}.partial-{mark}")
    try:
        if left is None or not _take_over(left, partial):
            partial.mkdir()
        with _locked(partial):
            if resume:
                (partial / _RESUME).write_text(resume)
            yield partial
            (partial / _RESUME).unlink(missing_ok=True)
            sync(partial)
            if only:
                check_free(target, overwrite, is_file=True)
                os.replace(partial / only, target)
            else:
                _publish(partial, target, target.with_name(f".{target.name}.replaced-{mark}"), overwrite)
        if only:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            (target / _LOCK).unlink(missing_ok=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(target.parent)


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Inside, other processes see that this one writes to a directory, whatever namespace they are in."""
    lock = None
    if fcntl is not None:
        new = partial / f"{_LOCK}-new"
        lock = new.open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(new, partial / _LOCK)  # nobody sees it before it is held
        except OSError:  # a file system without locks: there the pid decides
            new.unlink()
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _abandoned(partial: Path, pid: int) -> bool:
    """Whether no process writes to a directory of this machine any more."""
    if fcntl is None:
        return not _alive(pid)
    try:
        with (partial / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return not _alive(pid)
    except OSError:  # it is held, or is not ours
        return False
    return True


def check_free(target: Path, overwrite: bool, *, is_file: bool = False) -> None:
    """Checks that a directory, or a file, may be made, or replaced, at a path.

    Raises:
        SaveError: Something is there that must stay.
    """
    asked = f"save a checkpoint to {target}"
    if not target.exists():
        return
    if is_file:
        if target.is_dir():
            raise SaveError(asked, "a directory of this name", "the path of a new file")
        if not overwrite:
            raise SaveError(asked, "a file of this name", "another path, or overwrite=True")
        return
    if not target.is_dir():
        raise SaveError(asked, "a file of this name", "the path of a new or empty directory")
    if os.path.ismount(target):
        found = "a mount point, which the finished directory cannot replace"
        raise SaveError(asked, found, "a new directory inside this mount point")
    names = os.listdir(target)
    if not names:
        return
    is_checkpoint = any(name.endswith(_WEIGHTS) for name in names)
    if not overwrite:
        found = f"a directory that holds {len(names)} {'entries' if len(names) > 1 else 'entry'}"
        suggestion = f"a new or empty directory{', or overwrite=True' * is_checkpoint}"
        raise SaveError(asked, found, suggestion)
    # overwrite=True with a wrong path must not delete a home
    if not is_checkpoint:
        suggestion = "the path of a checkpoint, or delete the directory yourself"
        raise SaveError(f"{asked}, overwrite=True", "a directory that holds files but no weights", suggestion)


def _publish(partial: Path, target: Path, aside: Path, overwrite: bool) -> None:
    """Renames the complete directory to its final name; an old checkpoint there comes back if that fails."""
    check_free(target, overwrite)  # again: a save takes minutes
    if not target.exists() or not os.listdir(target):
        if sys.platform == "win32" and target.exists():
            target.rmdir()  # Windows renames onto no directory, not even an empty one
        os.rename(partial, target)
        return
    os.rename(target, aside)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _remove_stale(target: Path, resume: str) -> Path | None:
    """Removes what killed saves to this name left on this machine, and brings back a checkpoint that one set
    aside; returns what one of the same left, if that is to be resumed.
    """
    same: Path | None = None
    pattern = re.compile(
        re.escape(f".{target.name}.") + r"(partial|replaced)-(?P<mark>(?P<host>\w+)-(?P<pid>\d+)-[0-9a-f]{8})"
    )
    for found in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(found.name)
        if match is None or match["host"] != _host():
            continue
        if not _abandoned(target.with_name(f".{target.name}.partial-{match['mark']}"), int(match["pid"])):
            continue
        if match[1] == "replaced" and not target.exists():
            os.rename(found, target)
        elif resume and same is None and _saves(found, resume):
            same = found
        else:
            shutil.rmtree(found, ignore_errors=True)
    return same


def _saves(partial: Path, resume: str) -> bool:
    try:
        return (partial / _RESUME).read_text() == resume
    except (OSError, UnicodeDecodeError):
        return False


def _take_over(left: Path, partial: Path) -> bool:
    """Makes a directory that was left the fresh one, with its whole shards only; False where another save was
    faster.
    """
    try:
        os.rename(left, partial)
    except OSError:
        return False
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.suffix != WHOLE:
            entry.unlink()
    return True


def _host() -> str:
    """A short mark of this machine: on a shared file system, a pid says nothing about another machine."""
    return f"{zlib.crc32(node().encode()):08x}"


def _alive(pid: int) -> bool:
    """Whether a process of this pid runs; True where one cannot ask (on Windows, signal 0 is Ctrl-C)."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def sync(path: Path) -> None:
    """Waits until a file or directory is on the disk; systems that cannot sync a directory skip that."""
    if path.is_dir():
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return
    with path.open("r+b") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())
