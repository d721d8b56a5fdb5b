"""One way in: find out what a path is and open it."""

import os
import pathlib
import re

from .base import Checkpoint, CheckpointError
from .gguf_file import GGUFCheckpoint
from .gguf_header import MAGIC
from .hf_folder import HFCheckpoint

# owner/name, as the hub allows it. A path of this form that exists is a path.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a model for reading; nothing but headers is read yet.

    Args:
        path: A GGUF file (recognised by its first bytes, whatever its name), a folder with
            ``config.json`` and safetensors, or a hub name ``owner/name``, which is fetched when
            no such path exists and ``huggingface_hub`` is installed.

    Returns:
        The checkpoint, its tensors' names and shapes already checked.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        CheckpointError: If the model is damaged, incomplete, of an unknown format, or could not be
            fetched. ``UnsupportedCheckpointError`` if ringjax lacks its architecture.
        ImportError: If a GGUF file is opened without the packages of ``ringjax[llm]``.

    Example:
        >>> open_checkpoint("no-such-model.gguf")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no model at 'no-such-model.gguf': ...
    """
    found = pathlib.Path(path).expanduser()
    if found.is_dir():
        return HFCheckpoint(found)
    if found.exists():
        return _open_file(found)
    if isinstance(path, str) and _HUB_NAME.fullmatch(path) and not path.endswith(".gguf"):
        return HFCheckpoint(_fetch(path))
    raise FileNotFoundError(
        f"no model at {os.fspath(path)!r}: give a GGUF file, a folder with config.json and "
        "safetensors, or a hub name like 'owner/name'"
    )


def _open_file(path: pathlib.Path) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start == MAGIC:
        return GGUFCheckpoint(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is only the weights: give its folder, which must hold config.json too")
    raise CheckpointError(
        f"{path} is of an unknown format: it begins with {start!r} where a GGUF file has {MAGIC!r}"
    )


def _fetch(name: str) -> pathlib.Path:
    advice = (
        f"download it elsewhere and give the folder instead of {name!r} (if {name!r} was meant as "
        "a path: there is nothing at it)"
    )
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"fetching {name!r} from the hub needs huggingface_hub: pip install huggingface_hub, or {advice}"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=["*.json", "*.jinja", "*.safetensors"]
        )
    # The client raises its own, its HTTP library's and the system's errors; all mean no model.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"could not fetch {name!r} from the hub: {reason}; {advice}") from (error)
    return pathlib.Path(folder)
