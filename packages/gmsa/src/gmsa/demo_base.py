"""The demo's language of facts and the small language model that speaks it.

A context is a list of facts, each of seven tokens: a name, a relation and a value of two tokens
each, and a full stop. The model restates contexts and answers by copying. Its weights come with the
package (``demo_base.safetensors``), as a pretrained model would; ``python -m gmsa.demo_base`` makes
them anew.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared_core.device import seed_everything
from shared_core.errors import InputError
from shared_core.run import atomic_path, progress

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "RESTATE",
    "base_scores",
    "continue_text",
    "facts",
    "load_base",
    "optimize",
    "tiny_model",
    "tokenizer",
    "train_base",
]

PAD, BOS, EOS, RESTATE, DOT = range(5)
NAMES, RELATIONS, VALUES = 7, 23, 31
VOCABULARY = 96
WEIGHTS = Path(__file__).with_name("demo_base.safetensors")


def facts(rows: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw contexts with a question each.

    Args:
        rows: How many.
        count: Facts a context, with names that differ.
        generator: Of the draws.

    Returns:
        Contexts ``[rows, 7 count]``, questions ``[rows, 5]`` (restate, name, relation) and answers
        ``[rows, 2]``.

    Examples:
        >>> context, question, answer = facts(2, 3, torch.Generator().manual_seed(0))
        >>> context.shape, question.shape, answer.shape
        (torch.Size([2, 21]), torch.Size([2, 5]), torch.Size([2, 2]))
    """
    name = torch.rand(rows, 64, generator=generator).argsort(1)[:, :count]
    relation = torch.randint(4, (rows, count), generator=generator)
    value = torch.randint(64, (rows, count), generator=generator)
    parts = [
        NAMES + name // 8,
        NAMES + 8 + name % 8,
        RELATIONS + 2 * relation,
        RELATIONS + 1 + 2 * relation,
        VALUES + 16 * relation + value // 8,
        VALUES + 16 * relation + 8 + value % 8,
        torch.full_like(name, DOT),
    ]
    table = torch.stack(parts, 2)
    asked = table[torch.arange(rows), torch.randint(count, (rows,), generator=generator)]
    questions = torch.cat([torch.full((rows, 1), RESTATE), asked[:, :4]], 1)
    return table.flatten(1), questions, asked[:, 4:6]


def tiny_model(seed: int = 0) -> Any:
    """An untrained Llama of 0.1 million parameters.

    Examples:
        >>> tiny_model().config.num_hidden_layers
        3
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    seed_everything(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            tie_word_embeddings=True,
            initializer_range=0.05,
            max_position_embeddings=512,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def tokenizer() -> Any:
    """The language's tokenizer: words of two letters.

    Examples:
        >>> tokenizer()("ba be .", add_special_tokens=False)["input_ids"]
        [6, 7, 4]
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"][: VOCABULARY - 6]
    words = ["<pad>", "<s>", "</s>", "Restate", ".", "<unk>", *syllables]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def optimize(
    parameters: list[Any], loss: Callable[[], Tensor], steps: int, lr: float,
    tick: Callable[[], None],
) -> list[float]:  # fmt: skip
    """AdamW with 10 % warm-up and cosine.

    Args:
        parameters: What trains.
        loss: Draws a batch and gives its loss.
        steps: How many.
        lr: The highest learning rate.
        tick: Called after each step.

    Returns:
        The losses.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm), lr / 20),
        ],
        [warm],
    )
    losses = []
    for _ in range(steps):
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(value.item())
        tick()
    return losses


def train_base(
    steps: int, seed: int = 0, *, count: int = 4, tick: Callable[[], None] = lambda: None
) -> Any:
    """Train the model to restate contexts and to go on from the beginning of a fact.

    Args:
        steps: Of 24 contexts each.
        seed: Of weights and contexts.
        count: Facts of the longest contexts.
        tick: Called after each step.

    Examples:
        >>> train_base(1).training
        False
    """
    model = tiny_model(seed)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        drawn = int(torch.randint(2, count + 1, (1,), generator=generator))
        context, question, answer = facts(24, drawn, generator)
        begin = torch.full((len(context), 1), BOS)
        if torch.rand((), generator=generator) < 0.5:
            question, answer = torch.full_like(begin, RESTATE), context
        ids = torch.cat([begin, context, question, answer], 1)
        start = ids.shape[1] - answer.shape[1]
        logits = model(ids).logits[:, :-1].transpose(1, 2)
        each = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none")
        return each[:, start - 1 :].mean() + 0.2 * each[:, : start - 1].mean()

    model.train()
    optimize(list(model.parameters()), loss, steps, 3e-3, tick)
    return model.eval()


@torch.no_grad()
def continue_text(model: Any, context: Tensor, question: Tensor, new: int = 2) -> Tensor:
    """Greedy tokens of a plain language model after context and question ``[rows, new]``."""
    ids = torch.cat([torch.full((len(context), 1), BOS), context, question], 1)
    found: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    answers: Tensor = found[:, ids.shape[1] :]
    return answers


def base_scores(
    model: Any, *, rows: int = 256, count: int = 4, seed: int = 10**6
) -> dict[str, Any]:
    """The shares of tokens restated and of questions answered from the whole context."""
    context, question, answer = facts(rows, count, torch.Generator().manual_seed(seed))
    restate = torch.full((rows, 1), RESTATE)
    restated = continue_text(model, context, restate, context.shape[1])
    return {
        "restated": float((restated == context).float().mean()),
        "answered": float(
            (continue_text(model, context, question) == answer).all(1).float().mean()
        ),
    }


def load_base() -> Any:
    """The trained model that comes with the package.

    Raises:
        InputError: If its weights are missing or damaged.

    Examples:
        >>> sum(p.numel() for p in load_base().parameters())
        129472
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = tiny_model()
    try:
        stored = load_file(WEIGHTS)
        model.load_state_dict({k: v.float() for k, v in stored.items()}, strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{WEIGHTS} cannot be read ({error}); install gmsa again") from error
    return model.eval()


def main(steps: int = 3500) -> None:
    """Train the model and write its weights, in half precision, beside this file."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    with progress(total=steps, description="training the base", unit="step") as bar:
        model = train_base(steps, tick=lambda: bar.update())
    tensors = {k: v.detach().half() for k, v in model.named_parameters()}
    with atomic_path(WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    print(base_scores(load_base()))


if __name__ == "__main__":
    main()
