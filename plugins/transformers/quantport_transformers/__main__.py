"""``python -m quantport_transformers serve MODEL --quantization int8``: the command line of Transformers, to
which quantport is known. Whatever else it takes stays as it is.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from quantport.engine import ConfigError, QuantportError
from quantport_transformers import QuantportConfig


def main() -> None:
    """Runs it."""
    from transformers.cli import transformers as cli
    from transformers.cli.serving import model_manager

    model_manager.ModelManager = managing(model_manager.ModelManager)  # where serve takes it from
    try:
        cli.app()
    except QuantportError as error:
        sys.exit(f"{type(error).__name__}\n{error}")


def managing(theirs: Any) -> Any:
    """The class of Transformers that loads what is served. Its ``--quantization`` takes the name of a scheme,
    or a configuration as JSON, beside its own.
    """

    class ModelManager(theirs):  # type: ignore[misc]  # transformers is not typed here
        quantization: str | None
        _config: QuantportConfig | None = None

        def _validate_args(self) -> None:
            asked = self.quantization
            if asked is not None and not asked.startswith("bnb-"):
                self._config = config_of(asked)
                self.quantization = None
            super()._validate_args()

        def get_quantization_config(self) -> Any:
            return self._config or super().get_quantization_config()

    return ModelManager


def config_of(asked: str) -> QuantportConfig:
    """The configuration that a text means.

    Raises:
        ConfigError: it is none.
    """
    if not asked.startswith("{"):
        return QuantportConfig(asked)
    try:
        return QuantportConfig(**json.loads(asked))
    except json.JSONDecodeError as error:
        found = f"no JSON: {error}"
        raise ConfigError(f"--quantization {asked}", found, '\'{"scheme": "int8"}\', or int8') from None


if __name__ == "__main__":
    main()
