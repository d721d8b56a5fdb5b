"""The table of what is supported, made from what strategies and kernels themselves answer.

`python -m ringjax.support README.md` writes it into a file, between its two marks.
"""

import dataclasses
import pathlib
import sys
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from .biases import alibi
from .kernels import BlockSizes, Device, KernelName, Operands, Rule, Tile, get_kernel
from .masks import Causal, ChunkedLocal, Full, Mask, MaskFn, PrefixLM, SlidingWindow, Tokens
from .payloads import AsIs, Cast, Latent, Payload
from .ring import Ring, Strategy
from .strategies import get_strategy

__all__ = ["FEATURES", "Feature", "reason_against", "table"]

BEGIN, END = "<!-- support table: begin -->\n", "<!-- support table: end -->\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
    """A row of the table: what to ask about.

    Attributes:
        text: how the row is called.
        mask: a mask spec.
        rule: further fields of the `Rule`.
        operands: which of the `Operands` there are.
        segments: whether there are packed documents.
        payload: what travels.
        dtype: of query, key and value.
        ring: further fields of the `Ring`.
    """

    text: str
    mask: Mask = Causal()
    rule: tuple[tuple[str, Any], ...] = ()
    operands: tuple[str, ...] = ()
    segments: bool = False
    payload: Payload = dataclasses.field(default_factory=AsIs)
    dtype: str = "float32"
    ring: tuple[tuple[str, Any], ...] = ()


def _by_distance(table, head, q_position, kv_position):
    del head
    return table[jnp.clip(q_position - kv_position, 0, table.shape[0] - 1)]


def _even(q_position, kv_position):
    return (q_position - kv_position) % 2 == 0


FEATURES: dict[str, Feature] = {
    "full": Feature(text="full attention", mask=Full()),
    "causal": Feature(text="causal"),
    "zigzag": Feature(text="zigzag layout"),
    "striped": Feature(text="striped layout"),
    "window": Feature(text="sliding window (`local_window_size`)", mask=SlidingWindow(3, 2)),
    "prefix": Feature(text="prefix-LM", mask=PrefixLM(4)),
    "chunked": Feature(text="chunked-local", mask=Causal() & ChunkedLocal(4)),
    "mask_fn": Feature(
        text="a rule of one's own (`MaskFn`), masks combined by `&` and `|`", mask=MaskFn(_even)
    ),
    "mask_array": Feature(text="boolean mask arrays, any axis broadcast", operands=("mask",)),
    "segments": Feature(text="packed documents (`segment_ids`)", segments=True),
    "positions": Feature(text="explicit `positions`, padding, sequence lengths"),
    "bias": Feature(text="bias arrays, any axis broadcast, with their gradient", operands=("bias",)),
    "bias_fn": Feature(
        text="biases as functions (`BiasFn`, `alibi`), with the gradient of their parameters",
        rule=(("bias_fn", alibi(1).fn),),
        operands=("bias_parameters",),
    ),
    "bias_table": Feature(
        text="bias functions that look parameters up by position",
        rule=(("bias_fn", _by_distance),),
        operands=("bias_parameters",),
    ),
    "soft_cap": Feature(text="soft cap of the logits", rule=(("soft_cap", 30.0),)),
    "sinks": Feature(text="attention sinks, with their gradient", operands=("sinks",)),
    "dropout": Feature(text="dropout, alike on any ring", rule=(("dropout_rate", 0.1),), operands=("seed",)),
    "groups": Feature(text="grouped and multi-query heads, value heads of another size"),
    "split": Feature(
        text="batch and heads split over other mesh axes",
        ring=(("batch_axes", "data"), ("head_axes", "model")),
    ),
    "lengths": Feature(text="T ≠ S, lengths that do not divide, shorter than the ring"),
    "low_precision": Feature(text="bfloat16, float16 in; float32 inside", dtype="bfloat16"),
    "float64": Feature(text="float64 in and inside (x64)", dtype="float64"),
    "residual": Feature(text="log-sum-exp with its exact cotangent"),
    "payload": Feature(
        text='payloads `"bfloat16"`, `"int8"`, `"float8"`, gradients straight through',
        payload=Cast("bfloat16"),
    ),
    "latent": Feature(text="latent keys and values (`latent_attention`)", payload=Latent(1)),
    "bidirectional": Feature(
        text="both directions at once (`bidirectional`)", ring=(("bidirectional", True),)
    ),
    "head_groups": Feature(
        text="keys and values in pieces, by heads (`head_groups`)", ring=(("head_groups", 2),)
    ),
}


# Whichever the strategy, a kernel is asked the same: those beside `blockwise` stand under one. Every cell of
# these columns can be tried on a CPU.
COLUMNS: tuple[tuple[Strategy, KernelName], ...] = (
    *((strategy, "blockwise") for strategy in get_args(Strategy)),
    ("ring", "pallas"),
)
# What only a GPU can run: its cells say what is taken, in bfloat16 where a feature names no other dtype.
ON_GPUS: tuple[tuple[Strategy, KernelName], ...] = (("ring", "cudnn"), ("ring", "tokamax"))
GPU = Device(platform="gpu", kind="NVIDIA H100 80GB HBM3")
assert {kernel for _, kernel in (*COLUMNS, *ON_GPUS)} == set(get_args(KernelName))


def reason_against(feature: Feature, strategy: Strategy, kernel: KernelName) -> str | None:
    """None where the combination is supported, or why it is not."""
    try:
        Ring(("outer", "inner"), strategy=strategy, kernel=kernel, **dict(feature.ring))
    except ValueError as error:
        return str(error).partition("): ")[2]
    zeros: Any = np.zeros((1, 8), np.int32)
    tokens = Tokens(zeros, zeros if feature.segments else None)
    operands: dict[str, Any] = {name: np.zeros(OPERAND_SHAPES[name], np.float32) for name in feature.operands}
    device, dtype = Device(), feature.dtype
    if (strategy, kernel) in ON_GPUS:
        device, dtype = GPU, "bfloat16" if dtype == "float32" else dtype
    tile = Tile(
        q=tokens,
        kv=tokens,
        operands=Operands(**operands),
        rule=Rule(mask=feature.mask, scale=1.0, **dict(feature.rule)),
        block_sizes=BlockSizes(),
        device=device,
    )
    return get_strategy(strategy).supports(tile, feature.payload) or get_kernel(kernel).supports(
        tile, jnp.dtype(dtype), device.platform, (64, 64)
    )


OPERAND_SHAPES = {
    "bias": (1, 1, 8, 8), "mask": (1, 1, 8, 8), "bias_parameters": (1,), "sinks": (1,), "seed": (3,),
}  # fmt: skip


def table() -> str:
    """Features by strategies and kernels, in Markdown; the reasons against are footnotes."""
    notes: list[str] = []

    def cell(feature: Feature, strategy: Strategy, kernel: KernelName) -> str:
        if (reason := reason_against(feature, strategy, kernel)) is None:
            return "GPU" if (strategy, kernel) in ON_GPUS else "yes"
        if reason not in notes:
            notes.append(reason)
        return f"no [{notes.index(reason) + 1}]"

    columns = *COLUMNS, *ON_GPUS
    lines = [
        f"| | {' | '.join(f'`{s}`, `{k}`' for s, k in columns)} |",
        f"| --- |{' --- |' * len(columns)}",
        *(
            f"| {feature.text} | {' | '.join(cell(feature, *column) for column in columns)} |"
            for feature in FEATURES.values()
        ),
    ]
    footnotes = [f"\n[{number}] {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([*lines, *footnotes]) + "\n"


def _write(path: pathlib.Path) -> None:
    before, rest = path.read_text().split(BEGIN)
    path.write_text(before + BEGIN + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    _write(pathlib.Path(sys.argv[1]))
