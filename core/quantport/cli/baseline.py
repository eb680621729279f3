"""What Transformers gives to the command line: the tokenizer, the 16-bit original, and quiet."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from quantport.checkpoint import read_config
from quantport.checkpoint.quantport_format import is_quantport
from quantport.errors import BudgetError, CheckpointError, ConfigError, QuantportError
from quantport.loading.load_model import load as quantport_load
from quantport.loading.locate import locate
from quantport.loading.save_model import OWN


def _transformers(asked: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise CheckpointError(
            asked, "Transformers is not installed", "pip install 'quantport[transformers]'"
        ) from None


@contextmanager
def hushed() -> Iterator[None]:
    """Inside, Transformers shows no bars and logs errors only: the command line speaks for itself."""
    _transformers("run a model")
    logs = importlib.import_module("transformers.utils.logging")
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


def tokenizer(directory: Path, place: Mapping[str, str] | None = None) -> Any:
    """The tokenizer of a checkpoint directory, or of a file that has one inside.

    Args:
        directory: Of the checkpoint, or the file.
        place: The arguments with which Transformers finds it, where that takes more than the directory.

    Raises:
        CheckpointError: it has no config, or no tokenizer that can be read.
    """
    place = place or {"pretrained_model_name_or_path": str(directory)}
    if len(place) == 1 and not (directory / "config.json").exists():
        found = (
            "no config.json there"
            if directory.is_dir()
            else "a file, not a directory"
            if directory.exists()
            else "no such path"
        )
        raise CheckpointError(
            f"run {directory}", found, "a Transformers checkpoint directory with a tokenizer"
        )
    read_config(directory)  # its own error: Transformers blames the tokenizer
    try:
        return _transformers(f"run {directory}").AutoTokenizer.from_pretrained(**place)
    except QuantportError:
        raise
    except Exception as error:  # Transformers and tokenizers raise a zoo of types, plain Exception among them
        found = (
            f"{type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        )
        suggestion = "tokenizer.json and tokenizer_config.json beside config.json"
        raise CheckpointError(f"read the tokenizer of {directory}", found, suggestion) from error


def find(directory: Path, baseline: str | None) -> Path:
    """The checkpoint of the 16-bit original: the model itself unless it is quantized."""
    if baseline is None and is_quantport(directory):
        found = "it is quantized already: its 16-bit original is not there"
        raise ConfigError(
            f"--compare of {directory}", found, "--baseline with the checkpoint that it was made from"
        )
    base = directory if baseline is None else locate(baseline)
    if baseline is not None and not (base / "config.json").exists():
        raise ConfigError(
            f"--baseline {baseline}", "no config.json there", "the checkpoint directory of the 16-bit model"
        )
    if baseline is not None and is_quantport(base):
        raise ConfigError(f"--baseline {baseline}", "it is quantized itself", "the 16-bit model")
    return base


def chats(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_text(tokenizer: Any, prompt: str) -> str:
    """A prompt as the first message of a chat, up to where the answer begins.

    Raises:
        ConfigError: there is no chat template, or it fails.
    """
    asked, suggestion = f"--chat with --prompt {prompt!r}", "--no-chat"
    if not chats(tokenizer):
        raise ConfigError(asked, "the tokenizer has no chat template", suggestion)
    messages = [{"role": "user", "content": prompt}]
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # what a template raises, of jinja or of its own
        found = f"the chat template raised {type(error).__name__}: {error}"
        raise ConfigError(asked, found, suggestion) from error


class Sample(NamedTuple):
    """A text to compare on, and where it is from."""

    text: str
    source: str


def sample(directory: Path, base: Path, text: Path | None) -> Sample:
    """The text to compare on: what was asked for; or eval.txt in or beside the model or its original; or the
    help that comes with Python.
    """
    places = [
        d / "eval.txt"
        for d in dict.fromkeys((directory, directory.resolve().parent, base, base.resolve().parent))
    ]
    path = text or next((p for p in places if p.is_file()), None)
    if path is None:
        topics = importlib.import_module("pydoc_data.topics").topics
        return Sample("\n\n".join(topics.values()), f"the help of Python {platform.python_version()}")
    try:
        return Sample(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", "") or str(error)
        raise ConfigError(f"--text {path}", found, "a readable file of plain text in UTF-8") from None


def positions(directory: Path, place: Mapping[str, str] | None = None) -> int | None:
    """The longest text that the model of a checkpoint takes, in tokens; None when its configuration does not
    say. Arguments as for `tokenizer`.
    """
    try:
        place = place or {"pretrained_model_name_or_path": str(directory)}
        config = _transformers(f"run {directory}").AutoConfig.from_pretrained(**place)
    except Exception:  # loading says what is wrong with it
        return None
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def is_decoded(model: Any, directory: Path) -> bool:
    """Whether what a model is compared with is the checkpoint that it was loaded from, decoded."""
    plan = model.quantport_plan
    return plan.format_name not in ("plain", OWN) and Path(plan.source) == directory


def load(model: Any, directory: Path) -> Any:
    """Loads the 16-bit original beside its quantized model: the same class, dtype and device. Where only a
    checkpoint of another quantizer is there, its weights in BF16.

    Raises:
        BudgetError: there is no room for both.
    """
    device = model.quantport_plan.device
    if is_decoded(model, directory):
        return quantport_load(directory, "bf16", device=device, dtype=model.dtype)
    needed = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    room = None if device.memory is None else device.memory - model.quantport_plan.after
    if room is not None and needed > room:
        found = (
            f"BF16 needs {needed / 1e9:.1f} GB beside the quantized model; {max(room, 0) / 1e9:.1f} GB "
            "are free"
        )
        raise BudgetError(
            f"--compare on {device}", found, "run without --compare, or a device with more memory"
        )
    try:
        base = type(model).from_pretrained(directory, dtype=model.dtype)
    except Exception as error:  # Transformers raises a zoo of types
        found = f"Transformers says {type(error).__name__}: {str(error).strip()[:300]}"
        raise CheckpointError(
            f"load the original in {directory}", found, "--baseline with the 16-bit checkpoint"
        ) from error
    return base.to(device.torch_device).eval()
