"""Memory of one attention call on each device, as closed forms.

What is alive at once is counted in compiled programs, and the compilers of CPUs and of GPUs differ in it.
"""

import dataclasses

from ..kernels import BlockSizes, Device, KernelName
from ..kernels.flash_tables import Launch, Pass, launch_of
from ..strategies.halves import LONGEST
from .wire import moves_queries
from .workload import F32, Choice, Shard, Workload, ring_schedule

__all__ = ["TILE", "memory"]

# Queries by keys that a kernel computes at a time.
TILE = BlockSizes().q, BlockSizes().kv
INT32 = 4
GPU = Device(platform="gpu")


def memory(
    workload: Workload,
    choice: Choice,
    *,
    training: bool,
    kernel: KernelName = "blockwise",
    device: Device = GPU,
) -> dict[str, int]:
    """Bytes on one device, of the call alone: its arguments and results, and what it needs meanwhile.

    In training results are the three gradients, and the output is needed meanwhile.

    Args:
        workload: the call.
        choice: how it is distributed.
        training: whether there is a backward pass.
        kernel: what shards meet in; `"blockwise"` is compiled for CPUs, the others for GPUs.
        device: the GPU, on whose generation the kernel's blocks depend.
    """
    shard = inside = workload.shard(choice)
    expansions = shard.item_size * shard.expansion_items
    found = {
        "inputs": shard.q + shard.given + expansions + (shard.out if training else 0),
        "outputs": shard.q + shard.given + expansions if training else shard.out,
    }
    if choice.strategy in ("ulysses", "usp"):
        inside = shard.split_by_heads(choice.inner)
    if kernel == "blockwise":
        forward = _forward(inside, choice)
        backward = _backward(inside, workload, choice)
        found["statistics"], found["tile"] = 2 * inside.statistics, _tile(inside)
        if choice.strategy in ("ulysses", "usp"):
            found["resharded"] = inside.q + inside.out
    else:
        if choice.strategy == "usp" and choice.outer == 1:
            choice = dataclasses.replace(choice, strategy="ulysses")
        forward = _fused_forward(inside, choice, found["outputs"])
        backward = _fused_backward(inside, workload, choice, found["outputs"])
    if kernel == "pallas":
        launch = launch_of(device, workload.dtype, (inside.head_dim, inside.value_dim))
        forward["lists of blocks"], backward["lists of blocks"] = _lists(inside, choice, launch)
    if kernel == "cudnn":
        forward["of a meeting"], backward["of a meeting"] = _of_a_meeting(inside, choice)
    if not training:
        found |= forward
    elif kernel == "blockwise" and choice.strategy == "ring_q" and choice.bidirectional:
        # What travels in the one pass is of no use to what travels in the other.
        found |= {name: forward.get(name, 0) + backward.get(name, 0) for name in (*forward, *backward)}
    else:
        found |= max(forward, backward, key=_total)
    if training:
        found["kept for the backward pass"] = inside.out + inside.statistics
    return {name: count for name, count in found.items() if count}


def _total(buffers: dict[str, int]) -> int:
    return sum(buffers.values())


# ---------------------------------------------------------------- blockwise, compiled for CPUs


def _decoded(shard: Shard, choice: Choice) -> int:
    """What comes out of a payload: one shard from each way at a time, made one after the other."""
    return shard.decoded * (1 + choice.bidirectional) + shard.expanded


def _forward(shard: Shard, choice: Choice) -> dict[str, int]:
    """What travels, and float32 sums; those of a float32 call are the results themselves."""
    partial = F32 * shard.out_items if shard.item_size != F32 else 0
    match choice.strategy:
        case "all_gather":
            gathered = choice.devices * (2 * shard.kv_sent + _decoded(shard, choice)) // choice.head_groups
            pieces = shard.q + shard.kv + shard.out if choice.head_groups > 1 else 0
            return {"gathered": gathered, "parts of heads": pieces, "accumulators": partial}
        case "ring_q" if choice.devices > 1:
            on_way = 2 * shard.q + 3 * F32 * shard.out_items
            on_way *= 2 if choice.bidirectional else 1
            return {"keys and values": shard.given + shard.kv, "on the way": on_way}
        case "double_ring":
            copies = 2
        case "ring" | "ring_q" | "ulysses" | "usp":
            copies = 3 if choice.bidirectional else 1
    return {
        "keys and values": shard.given + _decoded(shard, choice),
        "on the way": copies * shard.kv_sent,
        "accumulators": partial,
    }


def _backward(shard: Shard, workload: Workload, choice: Choice) -> dict[str, int]:
    """What travels and its gradient, which follows; of the float32 sums those that are no results."""
    wider = shard.item_size != F32
    dq, dkv = F32 * shard.q_items, F32 * shard.wire_items
    decoded = _decoded(shard, choice)
    match choice.strategy:
        case "all_gather":
            gathered = F32 * shard.kv_items + 2 * shard.kv_sent + decoded
            gathered = choice.devices * gathered // choice.head_groups
            pieces = 2 * shard.q + shard.kv + 2 * shard.out if choice.head_groups > 1 else 0
            return {"gathered": gathered, "parts of heads": pieces, "accumulators": dq * wider}
        case "ulysses":
            return {"keys and values": shard.kv + shard.kv_sent, "accumulators": dkv + dq * wider}
        case _ if choice.devices == 1:
            on_way, sums = dkv, dq
            decoded += shard.expanded
        case "double_ring":
            on_way, sums = 3 * shard.kv_sent + 4 * dkv, dq
            decoded += 5 * shard.expanded
        case "ring" | "ring_q" | "usp":
            queries = choice.strategy == "ring_q"
            if moves_queries(shard, ring_schedule(workload, choice), "backward", queries=queries):
                on_way, sums = 2 * (shard.q + shard.out) + 2 * dq, dkv
            else:
                on_way, sums = 2 * (shard.kv_sent + dkv), dq
            on_way *= 2 if choice.bidirectional else 1
            decoded += (8 if choice.bidirectional else 3) * shard.expanded
    return {"keys and values": shard.given + decoded, "on the way": on_way, "accumulators": sums * wider}


def _tile(shard: Shard) -> int:
    """Blocks of the kernel: logits, weights and their gradient, and the rows of one block."""
    rows = min(TILE[0], shard.queries) * shard.heads // shard.kv_heads
    return F32 * rows * (3 * min(TILE[1], shard.keys) + shard.value_dim)


# ---------------------------------------------------------------- fused kernels, compiled for GPUs


def _lists(shard: Shard, choice: Choice, launch: Launch) -> tuple[int, int]:
    """Verdicts on pairs of blocks, and the orders in which each block meets the others, in either pass."""
    keys = shard.keys * (choice.devices if choice.strategy == "all_gather" else 1)

    def count(pass_: Pass) -> int:
        tile = pass_.blocks or launch.block_sizes
        return -(-shard.queries // tile.q) * -(-keys // tile.kv)

    # The verdicts, and three arrays of int32 to sort them; those of the keys stay until these are done.
    return 4 * INT32 * count(launch.forward), 4 * INT32 * max(count(launch.dq), count(launch.dkv))


def _is_cut(shard: Shard, choice: Choice) -> bool:
    """Whether half of the heads of the own shard come last, and are copied for it; both ways show no copy."""
    is_long = max(shard.queries, shard.keys) > LONGEST
    return shard.heads > 1 and not is_long and not choice.bidirectional


def _of_a_meeting(shard: Shard, choice: Choice) -> tuple[int, int]:
    """What cuDNN makes of shards that meet, until it is merged, in either pass; without its own workspace."""
    ways = 1 + choice.bidirectional
    match choice.strategy:
        case "all_gather" | "ulysses":
            return shard.out, 0
        case _ if choice.devices == 1:
            return 0, shard.kv
        case "ring_q":
            return 0, ways * (shard.q + shard.kv + shard.out)
        case "ring" | "usp" | "double_ring":
            return ways * 2 * shard.out, ways * (shard.q + shard.kv + shard.out)


def _fused_forward(shard: Shard, choice: Choice, outputs: int) -> dict[str, int]:
    """What travels, and float32 sums; where nothing else is alive, the results' place holds some of it."""
    partial = F32 * shard.out_items if shard.item_size != F32 else 0
    ways = 1 + choice.bidirectional
    decoded = shard.decoded
    if shard.latent_dim is not None:
        decoded *= 1 + ways  # as it is expanded, and as the kernel takes it
    match choice.strategy:
        case "all_gather":
            # As it comes, and by heads: one after the other.
            gathered = shard.kv_sent + max(shard.kv_sent, shard.decoded)
            if shard.latent_dim is not None:
                gathered += shard.k  # put together from what is expanded and what all heads share
            found = _gathered(gathered, choice)
            if choice.head_groups > 1:
                found["parts of heads"] = max(shard.q + shard.kv + partial - outputs, 0)
            return found
        case _ if choice.devices == 1:
            given = shard.decoded + shard.given + partial
            return {"keys and values": max(decoded, given) - partial, "accumulators": partial}
        case "ring_q":
            on_way = ways * (2 * shard.q + 3 * F32 * shard.out_items)
            halves = (shard.q + shard.kv) // 2 if _is_cut(shard, choice) else 0
            return {"keys and values": shard.kv, "on the way": on_way, "half of the heads": halves}
        case "ulysses":
            # By tokens and by heads, and then as the sums are made of it.
            resharding = max(2 * shard.kv, shard.q + partial)
            encoded = shard.kv_sent if shard.decoded else 0
            return {"keys and values": shard.kv, "resharded": max(resharding + encoded - outputs, 0)}
        case "double_ring":
            copies = 4
        case "ring" | "usp":
            copies = 2 * ways
    return {
        "keys and values": decoded,
        "on the way": copies * shard.kv_sent,
        "accumulators": partial,
        "resharded": shard.q if choice.strategy == "usp" and choice.inner > 1 else 0,
    }


def _fused_backward(shard: Shard, workload: Workload, choice: Choice, outputs: int) -> dict[str, int]:
    """What travels and its gradient; where nothing does, gradients are summed where the results will be."""
    dq, dkv = F32 * shard.q_items, F32 * shard.wire_items
    decoded = shard.decoded
    if shard.latent_dim is not None:
        # As it is expanded, and as the kernel takes it and gives its gradient.
        decoded = 2 * (1 + choice.bidirectional) * (decoded + shard.expanded)
    match choice.strategy:
        case "all_gather":
            gathered = shard.kv + F32 * shard.kv_items
            gathered += 0 if shard.latent_dim is None else shard.kv_sent
            found = _gathered(gathered, choice)
            # Then in the order in which they are scattered, which for one head is the same.
            scattered = _gathered(F32 * shard.kv_items, choice)["gathered"]
            as_made = shard.batch * shard.kv_heads == choice.head_groups
            found["accumulators"] = dq // choice.head_groups if as_made else max(dq, scattered)
            if choice.head_groups > 1:
                # Of all groups, and a half more of the keys' gradient than there is in the end.
                parts = shard.q + shard.kv + shard.out + dq + 3 * dkv // 2
                found["parts of heads"] = max(parts - outputs, 0)
            return found
        case "ulysses":
            sums = max(dq + dkv - outputs, 0)
            return {"resharded": shard.q + shard.out, "keys and values": shard.kv, "accumulators": sums}
        case _ if choice.devices == 1:
            sums = max(dq + dkv + shard.expanded - outputs, 0)
            return {"keys and values": shard.given + shard.decoded, "accumulators": sums}
        case "double_ring":
            return {
                "keys and values": decoded,
                "on the way": 2 * shard.kv_sent + 4 * dkv,
                "accumulators": dq,
            }
        case "ring" | "ring_q" | "usp":
            queries = choice.strategy == "ring_q"
            if moves_queries(shard, ring_schedule(workload, choice), "backward", queries=queries):
                decoded, on_way, sums = shard.kv, 2 * (shard.q + shard.out) + 2 * dq, dkv
                if _is_cut(shard, choice):
                    # Only dq is on its way home then.
                    halves = (shard.q + shard.out + shard.kv + dkv) // 2
                    on_way = max(on_way, 2 * dq + halves)
            else:
                on_way, sums = 2 * (shard.kv_sent + dkv), dq
            return {
                "keys and values": decoded,
                "on the way": on_way * (1 + choice.bidirectional),
                "accumulators": sums,
                "resharded": shard.q + shard.out if choice.strategy == "usp" and choice.inner > 1 else 0,
            }


def _gathered(each: int, choice: Choice) -> dict[str, int]:
    """Of all ranks, for the heads that are gathered at a time."""
    return {"gathered": choice.devices * each // choice.head_groups}
