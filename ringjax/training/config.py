"""A training config: its sections together, read from a TOML file."""

import dataclasses
import pathlib

from ..models.config import DecoderConfig
from ..ring import Ring
from .sections import (
    DataOptions,
    EvaluationOptions,
    MeshOptions,
    ModelOptions,
    OptimizerOptions,
    RingOptions,
    RunOptions,
    TargetOptions,
    TrainOptions,
)
from .toml import ConfigError, read_toml

__all__ = ["TrainingConfig", "read_config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A training run; every section is a table of the TOML file.

    Raises:
        ConfigError: sections that do not go together.
    """

    model: ModelOptions
    """The model."""
    mesh: MeshOptions = MeshOptions()
    """The devices."""
    target: TargetOptions = TargetOptions()
    """The machine."""
    ring: RingOptions = RingOptions()
    """How attention is distributed."""
    data: DataOptions
    """The data."""
    optimizer: OptimizerOptions = OptimizerOptions()
    """The optimizer."""
    train: TrainOptions
    """The training."""
    evaluation: EvaluationOptions = EvaluationOptions()
    """The measurements."""
    run: RunOptions
    """The run's folder."""

    def __post_init__(self):
        ring, length, batch = self.make_ring(), self.data.sequence_length, self.data.batch_size
        if length % (multiple := ring.multiple(size := self.mesh.outer * self.mesh.ring)):
            raise ConfigError(
                f"data.sequence_length {length} does not fit the mesh: {ring.layout} layout over a ring of "
                f"{size} takes a multiple of {multiple}, such as {-(-length // multiple) * multiple}."
            )
        if batch % (parts := self.mesh.data * self.train.accumulate):
            raise ConfigError(
                f"data.batch_size {batch} does not divide into {parts} parts: mesh.data {self.mesh.data} "
                f"times train.accumulate {self.train.accumulate}."
            )
        if self.optimizer.warmup_steps > self.train.steps:
            raise ConfigError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} are more than train.steps "
                f"{self.train.steps}."
            )
        if self.model.checkpoint is None:
            self.check_split(self.model.decoder_config(length))

    def check_split(self, decoder: DecoderConfig) -> None:
        """Raises where the mesh cannot split a model of this shape.

        Raises:
            ConfigError: key/value heads or sizes do not divide over an axis of the mesh.
        """
        for key, axes in (
            ("num_kv_heads", ("tensor",)),
            ("intermediate_size", ("tensor",)),
            ("hidden_size", ("tensor", "ring")),
        ):
            for axis in axes:
                if (value := getattr(decoder, key)) % (size := getattr(self.mesh, axis)):
                    more = "mesh.outer" if axis == "ring" else "mesh.ring"
                    raise ConfigError(
                        f"the model's {key} {value} does not divide over mesh.{axis} {size}. Take a divisor "
                        f"of {value} there, and more devices for {more}."
                    )

    def make_ring(self) -> Ring:
        """The ring, over the axes of `MeshOptions`."""
        apart = self.mesh.outer > 1 or self.ring.strategy in ("double_ring", "usp")
        axes = ("outer", "ring") if apart else "ring"
        try:
            return Ring(axes, **dataclasses.asdict(self.ring), batch_axes=("data",), head_axes=("tensor",))
        except ValueError as error:
            raise ConfigError(f"ring: {error}") from error

    def differences(self, other: "TrainingConfig") -> list[str]:
        """The keys that make it another run than `other`, as `key old → new`.

        Another mesh, machine, ring or folder, more steps, or another rhythm of measurements and checkpoints
        is the same run.
        """
        found = []
        for section, keys in IDENTITY.items():
            mine, theirs = getattr(self, section), getattr(other, section)
            for key in keys or [field.name for field in dataclasses.fields(mine)]:
                if (new := getattr(mine, key)) != (old := getattr(theirs, key)):
                    found.append(f"{section}.{key} {old!r} → {new!r}")
        return found


# What a run is; no keys stand for all of the section.
IDENTITY: dict[str, tuple[str, ...]] = {
    "model": (),
    "data": (
        *("paths", "include", "exclude", "tokenizer", "end_token"),
        *("sequence_length", "batch_size", "held_out", "seed"),
    ),
    "optimizer": (),
    "train": ("seed", "dtype"),
}


def read_config(path: str | pathlib.Path) -> TrainingConfig:
    """The config in a TOML file.

    Raises:
        ConfigError: as in `read_toml`.
        OSError: the file cannot be read.
    """
    return read_toml(TrainingConfig, pathlib.Path(path))
