"""Training on sequences that are split over a ring: the jitted step, the data, the run.

`Batch`, `StepOptions`, `TrainState`, `init_state`, `abstract_state`, `make_train_step` and `make_eval_step`
are what a loop of one's own needs. `read_config` and `train` are a run, which needs the extra `train`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch as Batch
    from .config import TrainingConfig as TrainingConfig, read_config as read_config
    from .loop import train as train
    from .options import StepOptions as StepOptions
    from .state import (
        TrainState as TrainState,
        abstract_state as abstract_state,
        init_state as init_state,
    )
    from .step import make_eval_step as make_eval_step, make_train_step as make_train_step

_HOMES = {
    "Batch": "batch",
    "StepOptions": "options",
    "TrainState": "state",
    "TrainingConfig": "config",
    "abstract_state": "state",
    "init_state": "state",
    "make_eval_step": "step",
    "make_train_step": "step",
    "read_config": "config",
    "train": "loop",
}

__all__ = [
    "Batch",
    "StepOptions",
    "TrainState",
    "TrainingConfig",
    "abstract_state",
    "init_state",
    "make_eval_step",
    "make_train_step",
    "read_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
