"""What a run ends with: the held-out loss by position, a sample, pictures, numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from ..inference import Engine, Sampler
from ..ring import Ring
from .evaluation import HeldOut
from .folder import RunFolder
from .metrics import read_metrics
from .pictures import draw_by_position, draw_losses
from .setup import Setup

__all__ = ["make_report", "write_sample"]

MOST_PROMPT = 1024


def make_report(
    setup: Setup,
    folder: RunFolder,
    held_out: HeldOut | None,
    parameters: Any,
    phase: Callable[[str], None],
    totals: dict[str, Any],
) -> dict[str, Any]:
    """Measures, draws, and writes the report into the folder.

    Args:
        setup: of the run.
        folder: of the run.
        held_out: measures; None if nothing is held out.
        parameters: as trained.
        phase: is told what is going on.
        totals: what the loop has to say; with `stopped`, the run will go on, and only the picture is made.
    """
    report = totals | {
        "directory": str(folder.path),
        "config": dataclasses.asdict(setup.config),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(parameters)),
        "documents": len(setup.corpus),
        "corpus_tokens": len(setup.corpus.tokens),
        "rows": len(setup.training),
        "held_out_rows": 0 if setup.held_out is None else len(setup.held_out),
        "packing": setup.training.num_tokens / (len(setup.training) * setup.training.length),
        "jax": jax.__version__,
    }
    if totals["stopped"] is None and held_out is not None:
        phase("Measuring the held-out loss by position")
        by_position = held_out.by_position(parameters)
        report["by_position"] = dataclasses.asdict(by_position) | {"gain": by_position.gain}
        if jax.process_index() == 0:
            draw_by_position(by_position, setup.training.length, folder.position_picture)
    if jax.process_index() == 0:
        metrics = read_metrics(folder.metrics)
        losses = [line for line in metrics if "loss" in line]
        report["loss"] = losses[-1]["loss"] if losses else None
        report["skipped"] = sum(bool(line["skipped"]) for line in losses)
        report["held_out"] = [
            {"step": line["step"], "loss": line["held_out_loss"]}
            for line in metrics
            if "held_out_loss" in line
        ]
        draw_losses(metrics, folder.loss_picture)
    folder.write_report(report)
    if totals["stopped"] is None and setup.config.evaluation.sample_tokens:
        # Last, and into a report that is there already: several processes need the most memory for it.
        phase("Writing a sample")
        report["sample"] = write_sample(setup, parameters)
        folder.write_report(report)
    return report


def write_sample(setup: Setup, parameters: Any) -> dict[str, str]:
    """How the model goes on after the beginning of a document that it was not trained on.

    The prompt and the text after it.
    """
    options, length = setup.config.evaluation, setup.training.length
    rows = setup.held_out or setup.training
    document = setup.corpus[rows.rows[0][0].document]
    prompt = document[: max(min(MOST_PROMPT, length - options.sample_tokens, len(document) // 2), 1)]
    if jax.process_count() > 1:
        parameters = multihost_utils.process_allgather(parameters, tiled=True)
    devices = [device for device in setup.mesh.devices.flat if device.process_index == jax.process_index()]
    ring = Ring(layout=setup.ring.layout)
    engine = Engine(
        setup.decoder,
        jax.tree.map(np.asarray, parameters),
        mesh=Mesh(np.array(devices), ("ring",), axis_types=(AxisType.Auto,)),
        ring=ring,
        dtype=setup.options.dtype,
    )
    sampler = Sampler(temperature=options.temperature)
    most = min(options.sample_tokens, length - len(prompt))
    generation = engine.generate(
        prompt.tolist(), max_tokens=most, sampler=sampler, seed=setup.config.train.seed
    )
    return {"prompt": setup.codec.decode(prompt), "text": setup.codec.decode(list(generation))}
