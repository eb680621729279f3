"""Checks of arguments that several functions take."""

from __future__ import annotations

from torch import nn

from quantport.errors import ConfigError


def require_module(asked: str, model: object) -> None:
    """Refuses what is no module.

    Raises:
        ConfigError: says what it is.
    """
    if not isinstance(model, nn.Module):
        found = f"a {type(model).__name__}: {model!r}"
        raise ConfigError(asked, found, "a torch.nn.Module; quantport.load for the path of a checkpoint")
