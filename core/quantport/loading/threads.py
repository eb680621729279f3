"""One native thread for the thread that asks, whatever the others have."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch


def one_native_thread() -> None:
    """Gives the calling thread one native thread: others, and those that start meanwhile, keep theirs.

    ``torch.set_num_threads`` sets the number of the calling thread and also the one that every new thread
    begins with. The first alone is what OpenMP's own function sets. Where torch's OpenMP is not found, a
    helper puts the second back.
    """
    # the first question of a thread takes over the number of the process: before ours, not after
    before = torch.get_num_threads()
    openmp = _openmp()
    if openmp is not None:
        openmp(1)
    if torch.get_num_threads() == 1:
        return
    torch.set_num_threads(1)
    helper = threading.Thread(target=torch.set_num_threads, args=(before,))
    helper.start()
    helper.join()


def _openmp() -> Any:
    """``omp_set_num_threads`` of the very library that torch is linked to, or None."""
    try:
        # looked up among the libraries that it depends on, too
        return ctypes.CDLL(torch._C.__file__).omp_set_num_threads
    except (OSError, AttributeError):
        return None
