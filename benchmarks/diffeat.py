"""The extractor beside a full forward and beside an official-style loop.

Run with ``nox -s bench -- diffeat``. All on one U-Net with the layout of SD1.5, narrowed so that a
CPU can time it. The peer restates the authors' loop in the plainest way: the scheduler is copied
and its 1,000 steps rebuilt in every call, hooks on the wanted modules, and always the whole
forward. The prompt is embedded beforehand for both.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import PNDMScheduler

from diffeat import FeatureExtractor, find_activation
from diffeat.presets import build_topology
from shared_core.device import environment, measure_time, select_device
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=1)
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
    timings = measure_time(*calls.values(), device=device, repeats=arguments.repeats)
    seconds = {name: t.median for name, t in zip(calls, timings, strict=True)}
    result = {
        "note": arguments.note,
        "width": w,
        "latent_side": side,
        "batch_size": batch,
        "seconds": seconds,
        "flop_share": fx.stop_fraction(8 * side if fx.vae else side, prompt),
        "stopped_over_bare": seconds["stopped"] / seconds["bare_forward"],
        "hook_overhead": seconds["full_with_hooks"] / seconds["bare_forward"] - 1,
        "official_over_ours": seconds["official_style"] / seconds["extractor_call"],
        "environment": environment("diffeat", "diffusers"),
    }
    write_json(arguments.out / f"diffeat-{device.type}.json", result)
    print({k: v for k, v in result.items() if k != "environment"})


if __name__ == "__main__":
    main()
