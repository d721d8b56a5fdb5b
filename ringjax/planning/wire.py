"""What each strategy sends: its collectives, how many and of how many bytes, as closed forms.

A function per strategy. The bytes are those of one device, and equal what the compiled program says.

Alphabet: t and c are the queries and keys of a device, a shard's; P, R and U the devices of the whole, the
outer and the inner axis.
"""

import dataclasses
from typing import Literal, NamedTuple

from ..schedule import Schedule
from .workload import F32, Choice, Shard, Workload, ring_schedule

NO_HEADS = "a latent has no heads to split"

__all__ = ["Axis", "Pass", "Transfer", "transfers"]

Pass = Literal["forward", "backward"]
Collective = Literal["collective-permute", "all-gather", "reduce-scatter", "all-to-all", "all-reduce"]


class Axis(NamedTuple):
    """Devices that a collective joins: `size` of them, each `stride` devices from the next."""

    size: int
    stride: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """What travels as one array, again and again.

    Attributes:
        what: its name, or those of the arrays in one parcel.
        collective: as the compiled program calls it.
        axis: the devices it joins.
        count: how often a device takes part.
        bytes_each: of the result on one device, each time.
        pass_: when.
        follows: whether it is sent one step behind what it belongs to, and home at the end.
    """

    what: str
    collective: Collective
    axis: Axis
    count: int
    bytes_each: int
    pass_: Pass
    follows: bool = False

    @property
    def bytes_sent(self) -> float:
        """What one device sends each time: of all-to-alls and gathers, what is not its own."""
        match self.collective:
            case "collective-permute":
                return self.bytes_each
            case "all-to-all" | "all-gather":
                return self.bytes_each * (self.axis.size - 1) / self.axis.size
            case "reduce-scatter":
                return self.bytes_each * (self.axis.size - 1)
            case "all-reduce":
                return 2 * self.bytes_each * (self.axis.size - 1) / self.axis.size


def transfers(workload: Workload, choice: Choice, *, training: bool) -> tuple[Transfer, ...]:
    """Everything that one device sends, forward and, in training, backward.

    The log-sum-exp is counted, which the backward pass needs, or a caller who asks for it.

    Raises:
        ValueError: the heads do not split as the strategy wants, or a latent, which has none, is to be split.
    """
    shard = workload.shard(choice)
    if workload.latent_dim is not None and (
        choice.head_groups > 1 or (choice.inner > 1 and choice.strategy != "double_ring")
    ):
        raise ValueError(f"{choice.label}: {NO_HEADS}.")
    passes: tuple[Pass, ...] = ("forward", "backward") if training else ("forward",)
    found: list[Transfer] = []
    for pass_ in passes:
        found += _channels(shard, choice, pass_)
        match choice.strategy:
            case "ring" | "ring_q":
                schedule, axis = ring_schedule(workload, choice), Axis(choice.devices)
                found += _ring(shard, schedule, axis, pass_, queries=choice.strategy == "ring_q")
            case "all_gather":
                found += _all_gather(shard, choice, pass_)
            case "ulysses":
                found += _ulysses(shard, choice.devices, pass_)
            case "usp":
                found += _ulysses(shard, choice.inner, pass_)
                inside, axis = shard.split_by_heads(choice.inner), Axis(choice.outer, choice.inner)
                found += _ring(inside, ring_schedule(workload, choice), axis, pass_, queries=False)
            case "double_ring":
                found += _double_ring(shard, choice, pass_)
        if pass_ == "backward":
            found += _expansions(shard, choice)
    return tuple(transfer for transfer in found if transfer.count and transfer.axis.size > 1)


def moves_queries(shard: Shard, schedule: Schedule, pass_: Pass, *, queries: bool) -> bool:
    """Whether queries travel and keys stay: forward as the strategy says, backward what sends fewer bytes."""
    if pass_ == "forward":
        return queries
    by_queries, by_keys = _queries_backward(shard, schedule, Axis(2)), _keys(shard, schedule, Axis(2), pass_)
    return sum(t.bytes_each for t in by_queries) < sum(t.bytes_each for t in by_keys)


def _channels(shard: Shard, choice: Choice, pass_: Pass) -> list[Transfer]:
    """What a payload with scales first agrees upon: of each channel of the keys the largest magnitude."""
    if shard.payload not in ("int8", "float8"):
        return []
    return [
        Transfer(
            what="channels",
            collective="all-reduce",
            axis=Axis(choice.devices),
            count=1,
            bytes_each=F32 * shard.batch * shard.kv_heads * shard.head_dim,
            pass_=pass_,
        )
    ]


def _expansions(shard: Shard, choice: Choice) -> list[Transfer]:
    """The gradient of what expands a latent, which every device has: both arrays, in one."""
    return [
        Transfer(
            what="expansions",
            collective="all-reduce",
            axis=Axis(choice.devices),
            count=min(1, shard.expansion_items),
            bytes_each=shard.item_size * shard.expansion_items,
            pass_="backward",
        )
    ]


def _ring(shard: Shard, schedule: Schedule, axis: Axis, pass_: Pass, *, queries: bool) -> list[Transfer]:
    if not moves_queries(shard, schedule, pass_, queries=queries):
        return _keys(shard, schedule, axis, pass_)
    send = _queries_forward if pass_ == "forward" else _queries_backward
    return send(shard, schedule, axis)


def _followed(schedule: Schedule) -> int:
    """Permutes of what follows a shard: as many as there are hops, and one more.

    The first leg's starts at the rank's own shard, so its way has a hop more than the others'; each leg's
    last hop is the one home.
    """
    return schedule.hops + 1 if schedule.hops else 0


def _keys(shard: Shard, schedule: Schedule, axis: Axis, pass_: Pass) -> list[Transfer]:
    """Keys and values travel; backward, their float32 gradient follows them."""
    permute = _permute(axis, pass_)
    sent = [permute("kv", schedule.hops, shard.kv_sent)]
    if pass_ == "backward":
        sent.append(permute("dkv", _followed(schedule), F32 * shard.wire_items, follows=True))
    return sent


def _queries_forward(shard: Shard, schedule: Schedule, axis: Axis) -> list[Transfer]:
    """Queries travel, and their float32 partial results follow them home."""
    permute = _permute(axis, "forward")
    partial = F32 * shard.out_items + shard.statistics
    return [
        permute("q", schedule.hops, shard.q),
        permute("partial", _followed(schedule), partial, follows=True),
    ]


def _queries_backward(shard: Shard, schedule: Schedule, axis: Axis) -> list[Transfer]:
    """Queries, their cotangents and statistics travel, and the float32 gradient of the queries follows."""
    permute = _permute(axis, "backward")
    parcel = shard.q + shard.out + 2 * shard.statistics
    return [
        permute("q, dout, lse, delta", schedule.hops, parcel),
        permute("dq", _followed(schedule), F32 * shard.q_items, follows=True),
    ]


def _permute(axis: Axis, pass_: Pass):
    def permute(what: str, count: int, bytes_each: int, *, follows: bool = False) -> Transfer:
        return Transfer(
            what=what,
            collective="collective-permute",
            axis=axis,
            count=count,
            bytes_each=bytes_each,
            pass_=pass_,
            follows=follows,
        )

    return permute


def _all_gather(shard: Shard, choice: Choice, pass_: Pass) -> list[Transfer]:
    """Keys and values are gathered, in groups of heads; backward again, and the gradient is scattered."""
    axis, groups = Axis(choice.devices), choice.head_groups

    def each(what: str, collective: Collective, bytes_each: int) -> Transfer:
        return Transfer(
            what=what, collective=collective, axis=axis, count=groups, bytes_each=bytes_each, pass_=pass_
        )

    sent = [each("kv", "all-gather", choice.devices * shard.kv_sent // groups)]
    if pass_ == "backward":
        sent.append(each("dkv", "reduce-scatter", F32 * shard.wire_items // groups))
    return sent


def _ulysses(shard: Shard, size: int, pass_: Pass) -> list[Transfer]:
    """All-to-alls from shards of tokens to shards of heads, and back."""
    require_heads_that_split(shard.heads, size)
    repeated = shard.with_repeated_kv_heads(size)
    there = {"q": shard.q, "kv": repeated.kv_sent}
    if pass_ == "forward":
        back = {"out": shard.out, "lse": shard.statistics}
    else:
        there |= {"dout": shard.out, "lse": shard.statistics, "delta": shard.statistics}
        # Copies of a head's gradient are summed in float32; whatever else comes back is rounded before.
        dkv = shard.kv if repeated.kv_heads == shard.kv_heads else F32 * repeated.kv_items
        back = {"dq": shard.q, "dkv": dkv}
    return [
        Transfer(
            what=what, collective="all-to-all", axis=Axis(size), count=1, bytes_each=bytes_each, pass_=pass_
        )
        for what, bytes_each in (there | back).items()
    ]


def require_heads_that_split(heads: int, size: int) -> None:
    """Refuses an all-to-all over more devices than the heads divide by, and says which they do."""
    if heads % size:
        sizes = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"heads={heads} do not split over {size} devices: an all-to-all gives each device whole heads, "
            f"so its axis has a size of {', '.join(map(str, sizes))}."
        )


def _double_ring(shard: Shard, choice: Choice, pass_: Pass) -> list[Transfer]:
    """Keys and values go round an inner ring, and once in each round one step on the outer one.

    Their gradient goes round the inner ring as a whole, and so is back where the outer step starts.
    """
    rounds, size = choice.outer, choice.inner
    inner, outer = _permute(Axis(size), pass_), _permute(Axis(rounds, size), pass_)
    sent = [
        inner("kv", rounds * (size - 1), shard.kv_sent),
        outer("kv", rounds - 1, shard.kv_sent),
    ]
    if pass_ == "backward":
        dkv = F32 * shard.wire_items
        sent += [
            inner("dkv", rounds * size, dkv, follows=True),
            outer("dkv", rounds, dkv, follows=True),
        ]
    return sent
