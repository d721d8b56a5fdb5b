"""Folders in the layout of the Hugging Face hub: JSON beside safetensors."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ..config import DecoderConfig
from .base import Checkpoint, CheckpointError, UnsupportedCheckpointError

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
    """Where a tensor lies; the dtype is the format's own word, known or not."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class HFCheckpoint(Checkpoint):
    """A folder with ``config.json``, safetensors and ``tokenizer.json``; dtypes stay as stored.

    Args:
        path: The folder.

    Raises:
        CheckpointError: If a file is missing or damaged; see `Checkpoint`.
        UnsupportedCheckpointError: If the model or its quantization is not supported.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._hf_config = _read_config(path)
        try:
            config = DecoderConfig.from_hf(self._hf_config)
        except NotImplementedError as error:
            raise UnsupportedCheckpointError(f"{path}: {error}") from error
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path / 'config.json'}: {error}") from error
        self._stored = _locate(path)
        super().__init__(path, config, {name: info.shape for name, info in self._stored.items()})
        for name in self.names:
            if (dtype := self._stored[name].dtype) not in _DTYPES:
                raise UnsupportedCheckpointError(
                    f"{path}: tensor {name!r} has dtype {dtype}: ringjax reads {', '.join(_DTYPES)}"
                )

    def _read(self, name: str) -> np.ndarray:
        info = self._stored[name]
        count = math.prod(info.shape)
        values = np.fromfile(info.path, _DTYPES[info.dtype], count, offset=info.offset)
        if values.size != count:
            raise CheckpointError(
                f"{info.path} changed since it was opened: tensor {name!r} needs {count} values at "
                f"byte {info.offset}, {values.size} are left"
            )
        return values.reshape(info.shape)

    def tokenizer(self) -> "Tokenizer":
        """Read ``tokenizer.json`` and its companions; see `Checkpoint.tokenizer`."""
        from ..tokenizer import Tokenizer

        file = self.path / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(
                f"{self.path} has no tokenizer.json: save the model with a recent transformers "
                "version, which writes one"
            )
        settings = _read_optional_json(self.path / "tokenizer_config.json")
        generation = _read_optional_json(self.path / "generation_config.json")
        eos_ids = [
            *_as_list(self._hf_config.get("eos_token_id")),
            *_as_list(generation.get("eos_token_id")),
        ]
        template_file = self.path / "chat_template.jinja"
        try:
            return Tokenizer.from_file(
                file,
                special_tokens={
                    key: _token_text(value)
                    for key, value in settings.items()
                    if key.endswith("_token") and isinstance(value, str | Mapping)
                },
                chat_template=(
                    template_file.read_text(encoding="utf-8")
                    if template_file.exists()
                    else _default_template(settings.get("chat_template"))
                ),
                eos_ids=eos_ids,
            )
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.exists():
        ggufs = sorted(path.glob("*.gguf"))
        hint = f"; to read {ggufs[0].name}, give that file" if ggufs else ""
        raise CheckpointError(f"{path} has no config.json, so it is no model folder{hint}")
    config = _read_json(file)
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method")
        raise UnsupportedCheckpointError(
            f"{path}: weights quantized by {method!r} are not supported: ringjax reads "
            f"{', '.join(_DTYPES)} safetensors, and quantized GGUF files"
        )
    return config


def _locate(path: pathlib.Path) -> dict[str, _Stored]:
    """Find every tensor of a folder and check that all files hold what they promise."""
    if (path / _SINGLE).exists():
        return _read_safetensors_header(path / _SINGLE)
    if not (path / _INDEX).exists():
        others = sorted(file.name for file in path.glob("*.bin"))
        hint = f"; convert {others[0]} to safetensors" if others else ""
        raise CheckpointError(f"{path} has neither {_SINGLE} nor {_INDEX}{hint}")
    weight_map = _read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / _INDEX} has no weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        # A name from the file must not lead out of the folder.
        if pathlib.PurePath(shard).name != shard:
            raise CheckpointError(f"{path / _INDEX} names a shard outside the folder: {shard!r}")
        if not (path / shard).exists():
            raise CheckpointError(f"{path}: shard {shard!r}, one of {len(shards)} in {_INDEX}, is missing")
    headers = {shard: _read_safetensors_header(path / shard) for shard in shards}
    stored = {}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{path / shard} lacks tensor {name!r}, which {_INDEX} puts there")
        stored[name] = headers[shard][name]
    return stored


def _read_safetensors_header(path: pathlib.Path) -> dict[str, _Stored]:
    """Parse the JSON header and check the file's length against it.

    References:
        https://github.com/huggingface/safetensors#format
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(prefix := file.read(8), "little")
        if len(prefix) < 8 or start > size:
            raise CheckpointError(
                f"{path} is truncated or no safetensors file: its header ends at byte {start}, the "
                f"file has {size}"
            )
        raw = file.read(start - 8)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            entries[name] = (entry["dtype"], tuple(entry["shape"]), first, last)
        end = start + max((last for _, _, _, last in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} has a damaged safetensors header: {error}") from error
    if end != size:
        raise CheckpointError(
            f"{path} is {'truncated' if end > size else 'damaged'}: its header promises {end} "
            f"bytes, the file has {size}; download it again"
        )
    stored = {}
    for name, (dtype, shape, first, last) in entries.items():
        if dtype in _DTYPES and last - first != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} cannot take {last - first} bytes"
            )
        stored[name] = _Stored(path=path, dtype=dtype, shape=shape, offset=start + first)
    return stored


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _read_optional_json(path: pathlib.Path) -> dict[str, Any]:
    return _read_json(path) if path.exists() else {}


def _as_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _token_text(value: str | Mapping[str, Any]) -> str:
    """A token is a string, or a serialized AddedToken."""
    return value if isinstance(value, str) else value["content"]


def _default_template(value: Any) -> str | None:
    """A template is a string, or several by name of which one is the default."""
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}.get("default")
    return value
