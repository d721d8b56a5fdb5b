"""Readers of model files: GGUF, Hugging Face folders and hub names."""

from .base import (
    Checkpoint as Checkpoint,
    CheckpointError as CheckpointError,
    UnsupportedCheckpointError as UnsupportedCheckpointError,
)
from .opening import open_checkpoint as open_checkpoint
