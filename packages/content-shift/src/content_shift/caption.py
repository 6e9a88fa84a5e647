"""Fine-grained prompts by a captioner (paper A.1: Kosmos-2)."""

from typing import Any

import torch
from torch import Tensor

from content_shift.presets import CAPTIONER
from shared_core.errors import InputError, MissingExtraError

__all__ = ["Captioner"]


class Captioner:
    """Captions of images by any image-to-text model of transformers.

    Args:
        model: Hub id or folder.
        prompt: Beginning of the caption.
        device: Where it runs.
        dtype: Of its weights.
        max_new_tokens: Length of a caption, at most.

    Raises:
        MissingExtraError: If transformers is not installed.
        InputError: If the model cannot be loaded.
    """

    def __init__(
        self,
        model: str = CAPTIONER,
        *,
        prompt: str = "An image of",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_new_tokens: int = 64,
    ) -> None:
        try:
            import transformers
        except ImportError as error:
            raise MissingExtraError("content-shift", "caption", "transformers") from error
        try:
            self.processor: Any = transformers.AutoProcessor.from_pretrained(model)
            self.model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                model, dtype=dtype
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"the captioner {model} cannot be loaded: {reason}") from error
        self.model.to(device).eval().requires_grad_(False)
        self.prompt, self.max_new_tokens = prompt, max_new_tokens

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> list[str]:
        """Captions of images ``[B, 3, H, W]`` in [0, 1]; the same ones every time."""
        images = [(image * 255).round().to(torch.uint8).cpu() for image in pixels]
        given = self.processor(
            images=images, text=[self.prompt] * len(images), return_tensors="pt"
        ).to(self.model.device)
        given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
        tokens = self.model.generate(
            **given, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1
        )
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        if hasattr(self.processor, "post_process_generation"):
            texts = [self.processor.post_process_generation(text)[0] for text in texts]
        return [text.strip() for text in texts]
