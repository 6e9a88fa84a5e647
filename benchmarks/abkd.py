"""The α-β-divergence and the fused loss beside the formulas written out plainly: time and memory.

Run with ``nox -s bench -- abkd``. The plain forms are two softmaxes and three powers (the α-β
formula as one would write it down) and ``F.kl_div`` of two log-softmaxes. Where they are installed
(the group ``bench``), TRL's JSD and Liger-Kernel's JSD with heads run beside ours.
"""

import argparse
from pathlib import Path

from abkd.bench import measure_losses
from shared_core.device import environment, select_device
from shared_core.run import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--machine", default="idle", help="Say whether it was loaded.")
    parser.add_argument("--short", action="store_true", help="The small case only.")
    arguments = parser.parse_args()
    device = select_device(arguments.device)
    # The large one has heads only, and one round: the plain chain needs gigabytes there.
    cases = [(192, 50_257, 64, False), (4096, 32_000, 32, True)][: 1 if arguments.short else 2]
    result: dict[str, object] = {}
    for tokens, classes, width, large in cases:
        result[f"{tokens} tokens, {classes} classes, width {width}"] = measure_losses(
            tokens,
            classes,
            width,
            repeats=1 if large else arguments.repeats,
            warmup=0 if large else 1,
            device=device,
            heads_only=large,
        )
    result["machine"] = arguments.machine
    result["environment"] = environment("abkd", "trl", "liger-kernel")
    path = arguments.out / f"abkd-{device.type}.json"
    write_json(path, result)
    print(path)


if __name__ == "__main__":
    main()
