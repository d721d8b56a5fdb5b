"""What a run needs before its first step, made from its config, which is found wrong here or nowhere."""

import dataclasses
import functools as ft
import pathlib
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from ..models import Decoder, DecoderConfig, load_parameters
from ..models.checkpoints import Checkpoint, open_checkpoint
from ..models.embedded import Progress as Fetching, embedded_model_path
from ..ring import Ring
from .config import TrainingConfig
from .corpus import Codec, Corpus, open_codec, read_corpus, split
from .observer import Observer
from .options import StepOptions
from .packing import PackedRows
from .sections import MeshOptions, ModelOptions

__all__ = ["Setup", "decoder_of", "make_mesh", "prepare", "step_options"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """A run, ready to begin.

    Attributes:
        config: what it was made from.
        mesh: the devices.
        ring: how sequence, rows and heads are distributed over them.
        codec: between text and tokens.
        corpus: all documents.
        training: rows to train on.
        held_out: rows to measure on; None if nothing is held out.
        decoder: the model's shape.
        parameters: of the checkpoint, to begin with; None begins with random ones.
    """

    config: TrainingConfig
    mesh: Mesh
    ring: Ring
    codec: Codec
    corpus: Corpus
    training: PackedRows
    held_out: PackedRows | None
    decoder: DecoderConfig
    parameters: Any

    @property
    def make_model(self) -> Any:
        """Makes the model, as the step wants it."""
        return ft.partial(Decoder, self.decoder)

    @property
    def options(self) -> StepOptions:
        """How a step computes."""
        return step_options(self.config)


def step_options(config: TrainingConfig) -> StepOptions:
    """How a step computes."""
    train = config.train
    return StepOptions(
        remat=train.remat,
        loss_chunk=train.loss_chunk,
        mlp_chunk=train.mlp_chunk,
        accumulate=train.accumulate,
        dtype=train.dtype,
        clip_norm=config.optimizer.clip_norm,
        xla_flags=config.target.xla_flags,
    )


def make_mesh(options: MeshOptions) -> Mesh:
    """The mesh of a config, over the devices that JAX has.

    Raises:
        ValueError: there are not so many, or, in more processes than one, not just as many.
    """
    devices, wanted = jax.devices(), options.num_devices
    if wanted > len(devices) or (jax.process_count() > 1 and wanted != len(devices)):
        shape = " × ".join(f"mesh.{name} {size}" for name, size in options.shape.items() if size > 1)
        raise ValueError(
            f"{shape or 'mesh.ring 1'} asks for {wanted} devices, and JAX has {len(devices)} "
            f"({devices[0].device_kind}) in {jax.process_count()} process(es). Change it: --mesh.ring."
        )
    return jax.make_mesh(
        tuple(options.shape.values()),
        tuple(options.shape),
        axis_types=(AxisType.Auto,) * len(options.shape),
        devices=devices[:wanted],
    )


def prepare(config: TrainingConfig, mesh: Mesh, observer: Observer = Observer()) -> Setup:
    """Reads the data and the model.

    Args:
        config: of the run.
        mesh: of `make_mesh`.
        observer: is told how much was fetched and read.

    Raises:
        ConfigError: the mesh cannot split the model.
        ValueError: the data are missing or too few, or the model does not suit them.
        CheckpointError: the checkpoint or tokenizer cannot be read.
        NotImplementedError: a checkpoint with parts that the decoder lacks.
    """
    data = config.data

    def fetching(_: str, done: int, total: int) -> None:
        observer.fetching(done, total)

    decoder, checkpoint = decoder_of(config.model, data.sequence_length, fetching)
    config.check_split(decoder)
    codec = open_codec(data.tokenizer, data.end_token, fetching)
    if codec.vocab_size > decoder.vocab_size:
        raise ValueError(
            f"data.tokenizer {data.tokenizer!r} needs a vocabulary of {codec.vocab_size}, but the model's is "
            f"{decoder.vocab_size}. Give model.vocab_size {codec.vocab_size} or more, or the model's own "
            f"tokenizer."
        )
    corpus = read_corpus(
        data.paths, codec, include=data.include, exclude=data.exclude, progress=observer.reading
    )
    training, held_out = split(corpus, data.held_out)
    return Setup(
        config=config,
        mesh=mesh,
        ring=config.make_ring(),
        codec=codec,
        corpus=corpus,
        training=PackedRows(corpus, training, data.sequence_length),
        held_out=PackedRows(corpus, held_out, data.sequence_length) if len(held_out) else None,
        decoder=decoder,
        parameters=None if checkpoint is None else load_parameters(checkpoint),
    )


def decoder_of(
    options: ModelOptions, length: int, fetching: Fetching | None = None
) -> tuple[DecoderConfig, Checkpoint | None]:
    """The model's shape, for sequences of so many tokens, and the checkpoint that it comes from, opened.

    `fetching` is the progress of `embedded_model_path`.

    Raises:
        ValueError: the checkpoint was made for shorter sequences.
        CheckpointError: the checkpoint cannot be read.
        NotImplementedError: a checkpoint with parts that the decoder lacks.
    """
    if options.checkpoint is None:
        return options.decoder_config(length), None
    embedded = options.checkpoint == "embedded"
    path = embedded_model_path(fetching) if embedded else pathlib.Path(options.checkpoint)
    checkpoint = open_checkpoint(path)
    decoder = checkpoint.config
    if options.rope_theta is not None:
        decoder = dataclasses.replace(decoder, rope_theta=options.rope_theta)
    elif length > decoder.max_position_embeddings:
        raise ValueError(
            f"data.sequence_length {length} is more than the context of {decoder.max_position_embeddings} "
            f"that model.checkpoint {options.checkpoint!r} was made for. To train it on longer ones, raise "
            f"model.rope_theta from {decoder.rope_theta:g}."
        )
    context = max(length, decoder.max_position_embeddings)
    return dataclasses.replace(decoder, max_position_embeddings=context), checkpoint
