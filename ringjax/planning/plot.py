"""A picture of a plan."""

import pathlib

from .plan import Plan

__all__ = ["save_plot"]


def save_plot(plan: Plan, path: str | pathlib.Path) -> None:
    """Draws the candidates' times, and the speed-up by ring size, into a file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the file's suffix is no image format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'ringjax[plot]'") from error
    if pathlib.Path(path).suffix[1:] not in (known := Figure().canvas.get_supported_filetypes()):
        raise ValueError(
            f"{str(path)!r}: a picture's name ends in one of {', '.join(f'.{x}' for x in known)}."
        )
    figure = Figure(figsize=(12, 5), layout="constrained")
    times, scaling = figure.subplots(1, 2)

    shown = [c for c in plan.candidates if c is _fastest_of(plan, c.choice.strategy)][::-1]
    labels = [candidate.choice.label for candidate in shown]
    computing = [candidate.compute_seconds for candidate in shown]
    times.barh(labels, computing, label="computing")
    times.barh(labels, [c.exposed_seconds for c in shown], left=computing, label="exposed communication")
    times.set_xlabel("seconds")
    times.set_title("the fastest of each strategy")
    times.legend()

    sizes = list(plan.seconds_by_ring_size)
    first = plan.seconds_by_ring_size[sizes[0]]
    scaling.loglog(sizes, [first / plan.seconds_by_ring_size[n] for n in sizes], "o-", label="predicted")
    scaling.loglog(sizes, [n / sizes[0] for n in sizes], "--", label="ideal")
    scaling.axvline(plan.largest_worthwhile_ring, color="gray", linewidth=0.8)
    scaling.set_xlabel("devices")
    scaling.set_title(f"times as fast as on {sizes[0]}")
    scaling.legend()
    figure.suptitle(plan.title())
    figure.savefig(path)


def _fastest_of(plan: Plan, strategy: str):
    return next(c for c in plan.candidates if c.choice.strategy == strategy)
