"""The formats room: checkpoints that others have quantized, each format one file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantport.backend import hookimpl

if TYPE_CHECKING:
    from quantport.checkpoint import CheckpointFormat


@hookimpl
def quantport_checkpoint_formats() -> tuple[CheckpointFormat, ...]:
    """Returns the formats, imported when somebody asks for them: most commands read no checkpoint."""
    from quantport_formats.catalog import FORMATS

    return FORMATS
