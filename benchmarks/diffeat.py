"""The extractor beside a full forward and beside an official-style loop.

Run with ``nox -s bench -- diffeat``. All on one U-Net with the layout of SD1.5, narrowed so that a
CPU can time it. The peer restates the authors' loop in the plainest way: the scheduler is copied
and its 1,000 steps rebuilt in every call, hooks on the wanted modules, and always the whole
forward. The prompt is embedded beforehand for both. On the CPU it is processor time that is
measured, which other work on the machine disturbs less; ratios are medians over rounds, each round
running every call once. On a GPU, memory is how far the peak rises in a call. Keypoint
matching is measured beside the plain way, which enlarges the features, and
ranking in one pass beside one pass for each activation, on the demo's small model.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import PNDMScheduler
from torch.nn import functional as F

from diffeat import FeatureExtractor, find_activation, list_activations, rank
from diffeat.demo import build_extractor, shapes_data
from diffeat.presets import build_topology
from diffeat.probe import nn_correspondence
from shared_core.device import environment, measure_time, peak_memory, select_device
from shared_core.run import write_json


def official_style(
    fx: FeatureExtractor, latents: torch.Tensor, prompt: torch.Tensor
) -> dict[str, Any]:
    scheduler = copy.deepcopy(fx.schedule.scheduler)
    scheduler.set_timesteps(1000)
    t = scheduler.timesteps[950]
    x_t = scheduler.add_noise(latents, torch.randn_like(latents), t[None])
    states = prompt.expand(len(latents), -1, -1)
    found, handles = {}, []
    for name in fx.layers:
        module = fx.backbone.get_submodule(find_activation(fx.backbone, name).module_path)
        handles.append(module.register_forward_hook(lambda m, a, o, n=name: found.update({n: o})))
    with torch.no_grad():
        fx.backbone(x_t, t, states)
    for handle in handles:
        handle.remove()
    return found


def rounds(calls: dict[str, Any], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of every call in every round."""
    if device.type != "cpu":
        timings = measure_time(*calls.values(), device=device, repeats=repeats)
        return {name: list(t.seconds) for name, t in zip(calls, timings, strict=True)}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            if turn:
                found[name].append(time.process_time() - begin)
    return found


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def matching(device: torch.device, channels: int) -> dict[str, Any]:
    """Peak memory and time of finding keypoints, ours and by enlarging the features."""
    maps = torch.randn(2, channels, 128, 128, device=device)
    points = torch.randint(512, (12, 2), device=device).float()

    def ours() -> torch.Tensor:
        return nn_correspondence(maps[:1], maps[1:], points)

    def plain() -> torch.Tensor:
        big = [F.interpolate(m[None], (512, 512), mode="bilinear")[0] for m in maps]
        where = points.long()
        a = F.normalize(big[0][:, where[:, 1], where[:, 0]], dim=0)
        return (a.T @ F.normalize(big[1].flatten(1), dim=0)).argmax(1)

    found: dict[str, Any] = {"channels": channels}
    for call in (ours, plain):
        begin = time.process_time()
        with peak_memory(device) as peak:
            call()
        seconds = time.process_time() - begin
        found[call.__name__] = {"seconds": seconds, "peak_bytes": peak.bytes}
    return found


def ranking(repeats: int) -> dict[str, Any]:
    """Processor time of ranking 12 activations in one pass, and in a pass for each."""
    fx = build_extractor()
    train, test = shapes_data(8, "train")[:2], shapes_data(8, "test")[:2]
    names = [i.name for i in list_activations(fx.backbone) if i.stage == "up"][-12:]

    def together() -> None:
        rank(fx, train, test, classes=4, candidates=names, prompt="", bootstrap=0)

    def each() -> None:
        for name in names:
            rank(fx, train, test, classes=4, candidates=[name], prompt="", bootstrap=0)

    seconds = rounds({"one_pass": together, "each": each}, torch.device("cpu"), repeats)
    return {"activations": len(names), "each_over_one_pass": ratio(seconds, "each", "one_pass")}


def small_overhead(repeats: int) -> float:
    """Hooks of the demo's model, one layer at its end, without a stop."""
    fx = build_extractor()
    x, states = torch.randn(4, 12, 16, 16), torch.randn(4, 6, 32)
    fx.layers = ["unet-out"]

    def bare() -> None:
        with torch.no_grad():
            fx.backbone(x, 50, states)

    calls = {"bare": bare, "hooked": lambda: fx.run(x, 50, states, stop=False)}
    return ratio(rounds(calls, torch.device("cpu"), repeats), "hooked", "bare") - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--channels", type=int, default=480, help="of the matched maps")
    parser.add_argument("--note", default="")
    arguments = parser.parse_args()
    device = select_device(arguments.device)
    w = arguments.width
    torch.manual_seed(0)
    unet = build_topology(
        "sd15", device="cpu", block_out_channels=(w, 2 * w, 4 * w, 4 * w), cross_attention_dim=64
    ).to(device)
    scheduler = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    fx = FeatureExtractor(unet, scheduler=scheduler, layers="sd15-practical")
    side, batch = arguments.side, arguments.batch_size
    latents = torch.randn(batch, 4, side, side, device=device)
    prompt = torch.randn(1, 77, 64, device=device)

    def bare() -> None:
        with torch.no_grad():
            unet(latents, 50, prompt.expand(batch, -1, -1))

    calls = {
        "bare_forward": bare,
        "full_with_hooks": lambda: fx.run(latents, 50, prompt, stop=False),
        "stopped": lambda: fx.run(latents, 50, prompt),
        "extractor_call": lambda: fx(latents=latents, prompt=prompt),
        "official_style": lambda: official_style(fx, latents, prompt),
    }
    each = rounds(calls, device, arguments.repeats)
    seconds = {name: statistics.median(values) for name, values in each.items()}
    memory = {}
    for name in ("bare_forward", "stopped", "full_with_hooks"):
        with peak_memory(device) as peak:
            kept = calls[name]()
        memory[name] = peak.bytes if device.type != "cpu" else None  # the heap is there already
        del kept
    result = {
        "note": arguments.note,
        "width": w,
        "latent_side": side,
        "batch_size": batch,
        "seconds": seconds,
        "flop_share": fx.stop_fraction(8 * side if fx.vae else side, prompt),
        "stopped_over_bare": ratio(each, "stopped", "bare_forward"),
        "hook_overhead": ratio(each, "full_with_hooks", "bare_forward") - 1,
        "official_over_ours": ratio(each, "official_style", "extractor_call"),
        "peak_bytes": memory,
        "hook_overhead_of_demo_model": small_overhead(5 * arguments.repeats),
        "ranking": ranking(3),
        "matching": matching(device, arguments.channels),
        "environment": environment("diffeat", "diffusers"),
    }
    batched = "" if batch == 1 else f"-batch{batch}"
    write_json(arguments.out / f"diffeat-{device.type}{batched}.json", result)
    print({k: v for k, v in result.items() if k != "environment"})


if __name__ == "__main__":
    main()
