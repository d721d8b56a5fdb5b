"""A picture of a timeline."""

import pathlib

from .trace import Timeline

__all__ = ["require_matplotlib", "save_timeline"]

TALLEST = 40.0  # inches
COLOURS = {"forward": "tab:orange", "backward": "tab:green", None: "tab:gray"}


def require_matplotlib() -> None:
    """Raises what `save_timeline` would.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'ringjax[plot]'") from error


def save_timeline(timeline: Timeline, path: str | pathlib.Path, *, title: str = "") -> None:
    """Draws for each device when it computed, and below that what it sent, with the number of the hop.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the file's suffix is no image format.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lanes = timeline.lanes
    figure = Figure(figsize=(14, min(TALLEST, 1.6 + 0.7 * len(lanes))), layout="constrained")
    axes = figure.subplots()
    for row, lane in enumerate(lanes):
        bars = [(1e3 * start, 1e3 * (stop - start)) for start, stop in lane.computing]
        axes.broken_barh(bars, (row - 0.38, 0.36), color="tab:blue")
        for sending in lane.sending:
            begin, long = 1e3 * sending.start, 1e3 * sending.seconds
            colour = COLOURS[sending.pass_]
            axes.broken_barh(
                [(begin, long)], (row + 0.02, 0.36), color=colour, alpha=0.6, edgecolor="black", linewidth=0.4
            )
            label = str(sending.hop) if "?" in sending.what else f"{sending.what.split(',')[0]} {sending.hop}"
            if long > 0.03 * 1e3 * timeline.seconds:
                axes.text(begin + long / 2, row + 0.2, label, ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(lanes)), [f"device {lane.device}" for lane in lanes])
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * timeline.seconds)
    axes.set_xlabel("milliseconds")
    shown = {sending.pass_ for lane in lanes for sending in lane.sending}
    handles = [Patch(color="tab:blue", label="computing")]
    handles += [
        Patch(color=colour, alpha=0.6, label=f"sending, {pass_ or 'pass unknown'} (what, and which hop)")
        for pass_, colour in COLOURS.items()
        if pass_ in shown
    ]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False)
    axes.set_title(title, loc="left", fontsize="medium", pad=24)
    figure.savefig(path, dpi=120)
