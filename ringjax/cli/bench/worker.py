"""The process of one contender: `python -m ringjax.cli.bench.worker BENCHMARK NAME SETTINGS`."""

import json
import sys

__all__: list[str] = []


def main() -> None:
    """Answers each line of standard input, a JSON object, with another on standard output."""
    benchmark, name, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    match benchmark:
        case "attention":
            from .attention_contenders import make_contender
        case "machine":
            from .machine import make_contender
        case "training":
            from .training_contenders import make_contender
        case _:
            from .generation_contenders import make_contender
    answer = make_contender(name, settings)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
