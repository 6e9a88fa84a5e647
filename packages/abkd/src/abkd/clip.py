"""Distilling the image tower of an open_clip model over a teacher's fixed text features.

The setting of the paper's base-to-new tables (that of PromptKD, Li et al., CVPR 2024): student and
teacher score the same classes by the teacher's text features; the student learns deep prompts and a
projector on unlabelled images, everything else is frozen.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader

from abkd.classifier import fit
from abkd.divergence import ab_divergence
from abkd.presets import Preset
from shared_core.errors import InputError, MissingExtraError
from shared_core.run import RunFolder, atomic_path

__all__ = ["CLIPDistiller", "CLIPSettings", "DeepPrompts", "text_features", "train_clip"]


class DeepPrompts(nn.Module):
    """Learned tokens put behind the image's own, anew in each of the first blocks.

    Args:
        tower: An image tower of open_clip with a ``transformer``.
        count: Tokens a block.
        depth: Blocks, from the first on.

    Raises:
        InputError: If the tower has no such blocks, or fewer than `depth`.
    """

    def __init__(self, tower: nn.Module, count: int = 4, depth: int = 9) -> None:
        super().__init__()
        blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
        if blocks is None:
            raise InputError(
                f"the student's tower ({type(tower).__name__}) takes no prompts; use a vision "
                "transformer of open_clip, or prompts=0"
            )
        if not 1 <= depth <= len(blocks) or count < 1:
            raise InputError(
                f"{count} prompts in {depth} blocks; accepted: 1 prompt or more, in 1 to "
                f"{len(blocks)} blocks"
            )
        self.count, self.depth = count, depth
        width = tower.transformer.width  # type: ignore[union-attr]
        self.tokens = nn.Parameter(0.02 * torch.randn(depth, count, int(width)))  # type: ignore[arg-type]

    @contextlib.contextmanager
    def inserted(self, tower: Any) -> Iterator[None]:
        """While the block runs, the tower's forward carries the prompts."""
        transformer = tower.transformer
        blocks, axis = transformer.resblocks, 1 if transformer.batch_first else 0

        def before(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                del module
                x = args[0]
                own = x if index == 0 else x.narrow(axis, 0, x.shape[axis] - self.count)
                shape = (len(x), -1, -1) if axis == 1 else (-1, x.shape[1], -1)
                prompts = self.tokens[index].to(x.dtype).unsqueeze(1 - axis).expand(*shape)
                return (torch.cat([own, prompts], axis), *args[1:])

            return hook

        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            del module, args
            return output.narrow(axis, 0, output.shape[axis] - self.count)

        handles = [blocks[i].register_forward_pre_hook(before(i)) for i in range(self.depth)]
        handles.append(blocks[-1].register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class CLIPDistiller(nn.Module):
    """A student tower, with prompts and a projector, beside a teacher's over one set of texts.

    Both score image x by scale · f(x)·T with unit features. The loss is λ D^(α,β)(p‖q) on
    unlabelled images: (1, 0) is the divergence of PromptKD. (The authors' own KL baseline divides
    by the classes too and doubles the weight, so its λ = 200 is not one of this loss.)

    Args:
        student_tower: An image tower of open_clip, frozen here.
        teacher_tower: Likewise.
        texts: The teacher's text features ``[C, D]``, one a class.
        logit_scale: Scale of the cosine similarities.
        alpha: α.
        beta: β.
        temperature: T.
        kd_weight: λ.
        prompts: Learned tokens a block; 0 for none.
        depth: Blocks with prompts.

    Attributes:
        learned: What is trained and saved: prompts and projector.

    Raises:
        InputError: If the texts do not fit the teacher, or the tower takes no prompts.
    """

    def __init__(
        self,
        student_tower: nn.Module,
        teacher_tower: nn.Module,
        texts: Float[Tensor, "classes width"],
        *,
        logit_scale: float = 100.0,
        alpha: float = 0.8,
        beta: float = 0.4,
        temperature: float = 1.0,
        kd_weight: float = 100.0,
        prompts: int = 4,
        depth: int = 9,
    ) -> None:
        super().__init__()
        self.student = student_tower.requires_grad_(False).eval()
        self.teacher = teacher_tower.requires_grad_(False).eval()
        self.register_buffer("texts", F.normalize(texts.detach().float(), dim=-1))
        widths = [_width(t) for t in (student_tower, teacher_tower)]
        if texts.shape[-1] != widths[1]:
            raise InputError(
                f"the texts have {texts.shape[-1]} features and the teacher's images {widths[1]}; "
                "encode the texts with the teacher's text tower"
            )
        parts: dict[str, nn.Module] = {
            "projector": nn.Sequential(
                nn.Linear(widths[0], widths[1]),
                nn.BatchNorm1d(widths[1]),
                nn.ReLU(),
                nn.Linear(widths[1], widths[1]),
            )
        }
        if prompts:
            parts["prompts"] = DeepPrompts(student_tower, prompts, depth)
        self.learned = nn.ModuleDict(parts)
        self.scale, self.alpha, self.beta = logit_scale, alpha, beta
        self.temperature, self.kd_weight = temperature, kd_weight

    def train(self, mode: bool = True) -> "CLIPDistiller":
        """The learned parts alone; the towers stay in eval mode."""
        super().train(mode)
        self.student.eval()
        self.teacher.eval()
        return self

    def _score(self, features: Tensor) -> Tensor:
        assert isinstance(self.texts, Tensor)
        return self.scale * F.normalize(features.float(), dim=-1) @ self.texts.T

    def student_logits(self, images: Tensor) -> Float[Tensor, "batch classes"]:
        """The student's scores of the classes."""
        carried: Any = contextlib.nullcontext()
        if "prompts" in self.learned:
            found = self.learned["prompts"]
            assert isinstance(found, DeepPrompts)
            carried = found.inserted(self.student)
        with carried:
            features = self.student(images)
        return self._score(self.learned["projector"](features))

    def forward(self, images: Tensor, teacher_images: Tensor | None = None) -> Float[Tensor, ""]:
        """The loss of a batch of unlabelled images.

        Args:
            images: As the student's preprocessing makes them, ``[B, 3, H, W]``.
            teacher_images: The same images for the teacher, where that differs.
        """
        with torch.no_grad():
            theirs = self._score(self.teacher(images if teacher_images is None else teacher_images))
        mine = self.student_logits(images)
        loss = ab_divergence(mine, theirs, self.alpha, self.beta, temperature=self.temperature)
        return self.kd_weight * loss


def _width(tower: nn.Module) -> int:
    found = getattr(tower, "output_dim", None)
    if found is None:
        raise InputError(f"{type(tower).__name__} has no output_dim; pass a model's .visual")
    return int(found)


@torch.no_grad()
def text_features(
    model: Any, tokenizer: Any, names: Sequence[str], template: str
) -> Float[Tensor, "classes width"]:
    """Unit features of one sentence a class, by a CLIP's text tower.

    Raises:
        InputError: If the template does not hold ``{}`` once, or a name is blank.
    """
    from shared_core.data.prompts import fill

    sentences = fill(template, [name.replace("_", " ") for name in names])
    device = next(model.parameters()).device
    found: Tensor = F.normalize(model.encode_text(tokenizer(sentences).to(device)).float(), dim=-1)
    return found


@dataclass(frozen=True)
class CLIPSettings:
    """A distillation of CLIP towers; all of it is written to ``config.json``.

    Args:
        student: An architecture of open_clip, or ``local-dir:FOLDER``.
        teacher: Likewise.
        data: ``digits``, ``shapes``, a folder or file of images, or a hub id.
        student_weights: A tag of open_clip or a file.
        teacher_weights: Likewise.
        label_column: The column of labels (for the evaluation), if it is not clear.
        template: The sentence of a class.
        alpha: α.
        beta: β.
        temperature: T.
        kd_weight: λ.
        prompts: Learned tokens a block.
        depth: Blocks with prompts.
        lr: Learning rate of SGD, cosine after one epoch at 1e-5.
        batch_size: Images of a step.
        epochs: Passes over the data.
        seed: Of weights and order.
    """

    student: str
    teacher: str
    data: str
    student_weights: str | None = None
    teacher_weights: str | None = None
    label_column: str | None = None
    template: str = "a photo of a {}."
    alpha: float = 0.8
    beta: float = 0.4
    temperature: float = 1.0
    kd_weight: float = 100.0
    prompts: int = 4
    depth: int = 9
    lr: float = 1e-4
    batch_size: int = 8
    epochs: int = 20
    seed: int = 0

    @classmethod
    def from_preset(cls, preset: Preset, **changes: Any) -> "CLIPSettings":
        """The settings of a CLIP preset, with changes; the data are the user's.

        Examples:
            >>> from abkd.presets import get_preset
            >>> CLIPSettings.from_preset(get_preset("clip-base-to-new"), data="digits").depth
            9
        """
        if preset.teacher is None or "data" not in changes:
            raise InputError("the preset names no data: pass --data with one of the 11 data sets")
        settings = cls(
            preset.student,
            preset.teacher,
            preset.data,
            student_weights=preset.more["student_weights"],
            teacher_weights=preset.more["teacher_weights"],
            alpha=preset.alpha,
            beta=preset.beta,
            temperature=preset.temperature,
            kd_weight=preset.kd_weight,
            prompts=preset.more["prompts"],
            depth=preset.more["depth"],
            lr=preset.lr,
            batch_size=preset.batch_size,
            epochs=preset.epochs,
        )
        return replace(settings, **changes)


def _load(name: str, weights: str | None) -> Any:
    """Model, preprocessing and tokenizer."""
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError("abkd", "clip", "open_clip") from error
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
        return model.eval(), preprocess, open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"open_clip cannot load {name!r} (weights {weights}): {reason}") from error


class _Pairs(torch.utils.data.Dataset[tuple[Tensor, Tensor, int]]):
    """Each image as the student and as the teacher wants it, and its label."""

    def __init__(self, images: Any, mine: Any, theirs: Any) -> None:
        self.images, self.mine, self.theirs = images, mine, theirs

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image, label = self.images[index]
        return self.mine(image), self.theirs(image), label


def train_clip(
    settings: CLIPSettings, out: Path, device: str = "auto", *, resume: bool = False
) -> dict[str, Any]:
    """Distil on the training images of all classes, without labels; score base and new classes.

    The first half of the classes is base, the second new, as in CoOp's protocol; each half is
    scored among its own classes. The learned parts and the text features are left in
    ``out/student.safetensors``.

    Raises:
        InputError: If something cannot be loaded, or the folder holds another run.
        MissingExtraError: If open_clip is not installed.
    """
    from accelerate import Accelerator
    from safetensors.torch import save_file

    from shared_core.data.loading import load_images

    torch.manual_seed(settings.seed)
    accelerator = Accelerator(cpu=device == "cpu")
    student, mine, _ = _load(settings.student, settings.student_weights)
    teacher, theirs, tokenizer = _load(settings.teacher, settings.teacher_weights)
    data = [
        load_images(settings.data, split=split, label_column=settings.label_column)
        for split in ("train", "test")
    ]
    names = data[0].class_names
    distiller = CLIPDistiller(
        student.visual, teacher.visual, text_features(teacher, tokenizer, names, settings.template),
        logit_scale=float(teacher.logit_scale.detach().exp()), alpha=settings.alpha,
        beta=settings.beta,
        temperature=settings.temperature, kd_weight=settings.kd_weight, prompts=settings.prompts,
        depth=settings.depth,
    )  # fmt: skip
    run = RunFolder(out, resume=resume)
    run.write_config("abkd train", asdict(settings), distributions=["abkd", "open_clip_torch"])
    optimizer = torch.optim.SGD(distiller.learned.parameters(), lr=settings.lr, momentum=0.9)
    total = max(settings.epochs - 1, 1)

    def rate(epoch: int) -> float:
        if epoch == 0 and settings.epochs > 1:
            return min(1.0, 1e-5 / settings.lr)
        return 0.5 * (1 + math.cos(math.pi * max(epoch - 1, 0) / total))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    loaders = [
        DataLoader(_Pairs(d, mine, theirs), batch_size=settings.batch_size, shuffle=i == 0,
                   drop_last=i == 0 and len(d) > settings.batch_size)
        for i, d in enumerate(data)
    ]  # fmt: skip
    model, ready, train_loader, test_loader = accelerator.prepare(distiller, optimizer, *loaders)
    half = (len(names) + 1) // 2

    def loss_of(batch: Any, epoch: int) -> Tensor:
        del epoch
        loss: Tensor = model(batch[0], batch[1])
        return loss

    def accuracies() -> dict[str, float]:
        distiller.eval()
        right, count = [0, 0], [0, 0]
        with torch.no_grad():
            for images, _, labels in test_loader:
                logits = distiller.student_logits(images)
                logits, labels = accelerator.gather_for_metrics((logits, labels))
                for side, low, high in ((0, 0, half), (1, half, len(names))):
                    rows = (labels >= low) & (labels < high)
                    found = logits[rows, low:high].argmax(-1) + low
                    right[side] += int((found == labels[rows]).sum())
                    count[side] += int(rows.sum())
        base, new = (100 * r / max(c, 1) for r, c in zip(right, count, strict=True))
        mean = 2 * base * new / (base + new) if base + new else 0.0
        return {"base": base, "new": new, "harmonic": mean}

    history = fit(
        distiller.learned, loss_of, train_loader, ready, scheduler, settings.epochs,
        accelerator=accelerator, modules=[model], evaluate=accuracies, seed=settings.seed, run=run,
        resume=resume, settings=asdict(settings),
    )  # fmt: skip
    state = {**distiller.learned.state_dict(), "texts": distiller.texts}
    with atomic_path(out / "student.safetensors") as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary)
    metrics = {**{k: history[-1][k] for k in ("base", "new", "harmonic")}, "history": history}
    run.write_metrics(metrics)
    return metrics
