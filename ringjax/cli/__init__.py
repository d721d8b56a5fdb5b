"""The command `ringjax`."""

import sys
from collections.abc import Sequence
from typing import Any

from .errors import CommandError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; exits with 0, with 2 after a one-line error for wrong input, 130 if interrupted."""
    try:
        _command(sys.argv[1:] if arguments is None else arguments).run()
    except CommandError as error:
        print(f"ringjax: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the output has seen enough.
        sys.stderr.close()
        sys.exit(0)


def _command(arguments: Sequence[str]) -> Any:
    """What the arguments ask for; the imports take a while, and may be interrupted too."""
    try:
        import tyro
    except ImportError:
        sys.exit("ringjax: the command needs more packages: pip install 'ringjax[llm]'")
    from .aot import Aot, AotConfig
    from .ask import Ask
    from .bench import Bench
    from .doctor import Doctor
    from .plan import PlanCommand
    from .trace import Trace
    from .train import Train

    # Options that are a file's keys: it has to be read first.
    if list(arguments[:1]) == ["train"]:
        return Train.parse(arguments[1:])
    if list(arguments[:1]) == ["aot"] and "".join(arguments[1:2]).endswith(".toml"):
        return AotConfig.parse(arguments[1:])
    return tyro.extras.subcommand_cli_from_dict(
        {
            "aot": Aot,
            "ask": Ask,
            "bench": Bench,
            "doctor": Doctor,
            "plan": PlanCommand,
            "trace": Trace,
            "train": Train,
        },
        prog="ringjax",
        description="Exact attention over sequences that no single device can hold.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
    )
