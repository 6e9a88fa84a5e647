"""A small language model of the text that CPython ships: a teacher where none is at hand."""

from typing import Any

import torch

from shared_core.run import progress

__all__ = ["SENTENCE", "small_teacher"]

SENTENCE = (
    "If the first expression is true, the second expression is not evaluated, and the value of the "
    "first is returned; otherwise a TypeError exception is raised."
)
"""A sentence in the manner of that text, which does not occur in it."""


def small_teacher(
    steps: int = 300, *, vocab: int = 512, width: int = 96, window: int = 64, seed: int = 0
) -> tuple[Any, Any]:
    """Train a Llama of two layers on the language reference of Python, and a tokenizer for it.

    Args:
        steps: Of 16 windows each; 300 take about half a minute.
        vocab: Size of the byte-pair vocabulary.
        width: Of the hidden states.
        window: Tokens of a text.
        seed: Of weights and order.

    Returns:
        The model, in evaluation mode, and its tokenizer.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from shared_core.data.text import pydoc_documents, train_bpe

    texts = [document.text for document in pydoc_documents("train")]
    raw = train_bpe(texts, vocab)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    ids = torch.tensor([i for text in texts for i in raw.encode(text).ids])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab,
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=4 * window,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in progress(range(steps), description="teacher", unit="step"):
        starts = torch.randint(len(ids) - window, (16, 1), generator=generator)
        batch = ids[starts + torch.arange(window)]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer
