"""GMSA beside a pipeline in the authors' style and beside the whole prompt: time and memory.

Run with ``nox -s bench -- gmsa``; ``gmsa bench`` prints the same. Measured on one thread of a CPU,
or on a GPU:

- ``compress``: soft tokens of 2048 tokens with the vocabulary of Qwen3 (151,936), beside causal
  language models whose logits are thrown away and pooling in a loop;
- ``merge``: group merging of ragged rows beside that loop, and of full rows beside a copy;
- ``train``: a step of the autoencoding stage beside one with logits at every position;
- ``answer``: from context to answer beside the whole prompt, compressed now or stored before;
- ``store``: reading a document beside compressing it again, and bytes a second;
- ``stream``: peak memory of a long context in exact pieces beside at once.
"""

import argparse
from pathlib import Path
from typing import Any

from gmsa.bench import CASES, against_targets, run_case
from shared_core.device import environment, select_device
from shared_core.run import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--machine", default="idle", help="Say whether it was loaded.")
    arguments = parser.parse_args()
    device = select_device(arguments.device)
    path = arguments.out / f"gmsa-{device.type}.json"
    results: dict[str, Any] = {}
    for name in arguments.cases.split(","):
        results[name] = run_case(name, device, arguments.repeats)
        found = {
            "targets": against_targets(results),
            **results,
            "repeats": arguments.repeats,
            "machine": arguments.machine,
            "environment": environment("gmsa", "transformers"),
        }
        write_json(path, found)  # after each case, so that an interruption costs one
    print(path)


if __name__ == "__main__":
    main()
