"""A bucket of four features beside four separate runs in the authors' style, on one CPU or GPU.

Run with ``nox -s bench -- content-shift``. The U-Net has the layout of SD1.5, narrowed so that a
CPU can time it; VAE, text tower and ControlNet are real diffusers and transformers classes of
matching width. The peer restates the authors' seven commands in the plainest way: each run encodes
the images and the prompt anew, finds edges anew, copies the scheduler and rebuilds its 1,000 steps,
runs the whole forward, and LoRA weights are merged into a backbone of their own. It is not charged
for loading models or for writing files. On the CPU it is processor time of one thread that is
measured, which other work on the machine disturbs less; ratios are medians over rounds, each round
running both. What a bucket spares is also counted in operations, for this model and for SD1.5.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from content_shift import FeatureSpec, Inputs, Recipe, canny, gate, train_lora
from content_shift import techniques as T
from content_shift._state import session
from diffeat import FeatureExtractor, PromptEmbedding, find_activation
from diffeat.presets import build_topology
from shared_core.device import environment, measure_time, peak_memory, select_device
from shared_core.run import write_json

LAYERS = "sd15-legacy"


def build(width: int, device: torch.device) -> tuple[FeatureExtractor, ControlNetModel]:
    torch.manual_seed(0)
    w = width
    unet = build_topology(
        "sd15", device="cpu", block_out_channels=(w, 2 * w, 4 * w, 4 * w), cross_attention_dim=64
    ).to(device)
    net = ControlNetModel.from_unet(unet).to(device).eval().requires_grad_(False)
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        nn.init.normal_(layer.weight, 0, 0.05)
    vae = AutoencoderKL(
        block_out_channels=(w // 2, w, 2 * w, 2 * w), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=8,
    ).to(device)  # fmt: skip
    tower = CLIPTextModel(
        CLIPTextConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=12,
                       num_attention_heads=4)
    ).to(device)  # fmt: skip

    def text(prompts: Any) -> PromptEmbedding:
        ids = torch.zeros(len(prompts), 77, dtype=torch.long, device=device)
        for row, prompt in zip(ids, prompts, strict=True):
            known = torch.tensor([ord(c) for c in prompt][:77])
            row[: len(known)] = known
        with torch.no_grad():
            return PromptEmbedding(tower(ids)[0])

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    for module in (vae, tower):
        module.eval().requires_grad_(False)
    return FeatureExtractor(unet, scheduler=scheduler, layers=LAYERS, vae=vae, text=text), net


def keep(maps: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, given: Any, output: Any) -> None:
        maps[name] = output if isinstance(output, Tensor) else output[0]

    return hook


def separate_runs(
    fx: FeatureExtractor, backbones: list[Any], net: Any, prompts: list[str],
    controlled: list[bool], images: Tensor,
) -> list[dict[str, Tensor]]:  # fmt: skip
    found = []
    for backbone, prompt, control in zip(backbones, prompts, controlled, strict=True):
        with torch.no_grad():
            latents = fx.encode_images(images)
            states = fx.text([prompt]).states.expand(len(images), -1, -1)
            scheduler = copy.deepcopy(fx.schedule.scheduler)
            scheduler.set_timesteps(1000)
            t = scheduler.timesteps[949]
            x_t = scheduler.add_noise(latents, fx.make_noise(latents), t[None])
            given: dict[str, Any] = {}
            if control:
                edges = canny(images)
                down, mid = net(x_t, t, states, edges, return_dict=False)
                given = {
                    "down_block_additional_residuals": down, "mid_block_additional_residual": mid,
                }  # fmt: skip
            maps: dict[str, Tensor] = {}
            handles = []
            for name in fx.layers:
                module = backbone.get_submodule(find_activation(fx.backbone, name).module_path)
                handles.append(module.register_forward_hook(keep(maps, name)))
            backbone(x_t, t, states, **given)
            for handle in handles:
                handle.remove()
        found.append(maps)
    return found


def rounds(
    calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
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


def operations(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def spared_on_sd15() -> dict[str, float]:
    """Operations of SD1.5's own parts at 512 x 512, and of both ways to run these four recipes."""
    with torch.device("meta"):
        unet = build_topology("sd15")
        net = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        image, x = torch.zeros(1, 3, 512, 512), torch.zeros(1, 4, 64, 64)
        t, states = torch.zeros(1), torch.zeros(1, 77, 768)
        of_vae = operations(lambda: vae.encode(image))
        of_unet = operations(lambda: unet(x, t, states))
        of_net = operations(lambda: net(x, t, states, image))
    forwards = 4 * of_unet + 2 * of_net
    return {
        "encoder": of_vae, "unet": of_unet, "controlnet": of_net,
        "separate_over_bucket": (4 * of_vae + forwards) / (of_vae + forwards),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--note", default="")
    arguments = parser.parse_args()
    device = select_device(arguments.device)
    fx, net = build(arguments.width, device)
    images = torch.rand(arguments.batch_size, 3, arguments.side, arguments.side, device=device)
    folders = []
    for i in range(2):
        folder = tempfile.mkdtemp()
        train_lora(fx, images, ["a"], out=folder, rank=4, alpha=4, lr=0.01, steps=1, seed=i)
        folders.append(folder)
    prompts = ["a horse, high quality", "a horse", "a horse", "a photo of a horse"]
    recipes = [
        Recipe(T.Prompt(prompts[0])),
        T.Prompt(prompts[1]) + T.ControlNet(net),
        T.Prompt(prompts[2]) + T.LoRA(folders[0]),
        T.Prompt(prompts[3]) + T.ControlNet(net) + T.LoRA(folders[1]),
    ]
    backbones = [fx.backbone, fx.backbone]
    for folder in folders:  # a merged model for each LoRA
        other = copy.deepcopy(fx.backbone)
        other.load_lora_adapter(
            folder, prefix="unet", weight_name="pytorch_lora_weights.safetensors"
        )
        other.fuse_lora()
        other.unload_lora()
        backbones.append(other)
    controlled = [False, True, False, True]
    specs = [FeatureSpec(str(i), r) for i, r in enumerate(recipes)]
    kept = [t for r in recipes for t in r.techniques]

    def bucket() -> list[Any]:
        inputs = Inputs.prepare(fx, images)
        found = []
        for spec in specs:
            with spec.recipe.applied(fx) as opened:
                found.append(spec.recipe.features(fx, opened, inputs, t=50))
        return found

    calls: dict[str, Callable[[], Any]] = {
        "separate": lambda: separate_runs(fx, backbones, net, prompts, controlled, images),
        "bucket": bucket,
    }
    with session(fx, kept):
        theirs, ours = (call() for call in calls.values())
        apart = max(
            float((a[n] - b[n]).norm() / a[n].norm())
            for a, b in zip(theirs, ours, strict=True)
            for n in a
        )
        each = rounds(calls, device, arguments.repeats)
        counted = {name: operations(call) for name, call in calls.items()}
        with peak_memory(device) as memory:
            bucket()
    seconds = {name: statistics.median(values) for name, values in each.items()}
    one = Recipe(T.Prompt("a"))
    features = one(fx, images)
    reference = one(fx, images, t=0, noise="none")
    parts = {
        "extraction": lambda: one(fx, images),
        "eq_1": lambda: [gate.difference(features[n], reference[n]) for n in features],
    }
    for name, values in rounds(parts, device, arguments.repeats).items():
        seconds[name] = statistics.median(values)
    size = sum(p.numel() * p.element_size() for p in fx.backbone.parameters())
    control_size = sum(p.numel() * p.element_size() for p in net.parameters())
    result = {
        "note": arguments.note,
        "width": arguments.width,
        "image_side": arguments.side,
        "batch_size": arguments.batch_size,
        "seconds": seconds,
        "separate_over_bucket": statistics.median(
            a / b for a, b in zip(each["separate"], each["bucket"], strict=True)
        ),
        "operations_separate_over_bucket": counted["separate"] / counted["bucket"],
        "operations_of_sd15": spared_on_sd15(),
        "largest_relative_difference": apart,
        "score_share_of_extraction": seconds["eq_1"] / seconds["extraction"],
        "weights_separate_bytes": 3 * size + control_size,
        "weights_bucket_bytes": size + control_size,
        "bucket_peak_bytes": memory.bytes,
        "environment": environment("content-shift", "diffeat", "diffusers", "peft"),
    }
    write_json(arguments.out / f"content_shift-{device.type}.json", result)
    print({k: v for k, v in result.items() if k != "environment"})


if __name__ == "__main__":
    main()
