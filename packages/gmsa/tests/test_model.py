"""The model against the same computation with transformers' own classes."""

import copy
import hashlib

import pytest
import torch
import torch.nn.functional as F

from gmsa import GMSAConfig, GMSAModel, SoftTokens

FAMILIES = ["llama", "qwen3", "qwen2", "mistral", "gemma", "gemma2", "phi3"]


def reference(lm, model, ids, r, *, encoder_norm=True, lsa_norm=True):
    """First k blocks, final norm, group means, first blocks, final norm: from the whole model.

    `lm` is a copy of the base before anything was put on it; the LoRA is folded in by hand.
    """
    k, depth = model.config.encoder_layers, model.config.lsa_layers
    encoder = copy.deepcopy(lm)
    scale = model.config.lora_alpha / model.config.lora_r
    lora = dict(model.encoder.named_parameters())
    with torch.no_grad():
        for name, parameter in encoder.model.named_parameters():
            a = lora.get(name.replace(".weight", ".lora_A.default.weight"))
            if a is not None:
                b = lora[name.replace(".weight", ".lora_B.default.weight")]
                parameter += scale * b @ a
    states = encoder.model(input_ids=ids, output_hidden_states=True).hidden_states
    hidden = states[k] if k < len(lm.model.layers) or not encoder_norm else None
    hidden = states[-1] if hidden is None else hidden
    if encoder_norm and k < len(lm.model.layers):
        hidden = lm.model.norm(hidden)
    merged = torch.stack([hidden[:, j : j + r].mean(1) for j in range(0, ids.shape[1], r)], 1)
    out = lm.model(inputs_embeds=merged, output_hidden_states=True).hidden_states[depth]
    return lm.model.norm(out) if lsa_norm else out


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_soft_tokens_are_what_the_method_says(family, tiny_lm, tiny_gmsa, ragged) -> None:
    lm = tiny_lm(family)
    model = tiny_gmsa(family, lm=copy.deepcopy(lm))
    ids, _ = ragged([11, 11])
    expected = reference(lm, model, ids, 4)
    soft = model.compress(ids, rate=4)
    assert soft.embeds.shape == (2, 3, 16)
    torch.testing.assert_close(soft.embeds, expected, atol=2e-5, rtol=2e-5)
    plain = tiny_gmsa(
        family, lm=copy.deepcopy(lm), fresh=True, encoder_final_norm=False, lsa_final_norm=False
    )
    bare = reference(lm, plain, ids, 3, encoder_norm=False, lsa_norm=False)
    torch.testing.assert_close(plain.compress(ids, rate=3).embeds, bare, atol=2e-5, rtol=2e-5)


@pytest.mark.smoke
@torch.no_grad()
def test_fresh_lora_is_the_base_and_merging_changes_nothing(tiny_lm, tiny_gmsa, ragged) -> None:
    ids, _ = ragged([9])
    lm = tiny_lm()
    model = tiny_gmsa(lm=copy.deepcopy(lm), fresh=True)
    hidden = model.encoder(input_ids=ids).last_hidden_state
    whole = lm.model(input_ids=ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(hidden, lm.model.norm(whole))
    trained = tiny_gmsa(lm=copy.deepcopy(lm))
    before = trained.compress(ids, rate=2)
    assert not torch.allclose(before.embeds, model.compress(ids, rate=2).embeds, atol=1e-3)
    trained.merge_encoder_lora()
    torch.testing.assert_close(
        trained.compress(ids, rate=2).embeds, before.embeds, atol=1e-5, rtol=1e-5
    )
    for parameter, original in zip(trained.decoder.parameters(), lm.parameters(), strict=True):
        assert torch.equal(parameter, original)
    with pytest.raises(ValueError, match="save before merge_encoder_lora"):
        trained.save_pretrained("nowhere")


@pytest.mark.parametrize("settings", [{}, {"merging": "memory", "alignment": "linear"},
                                      {"merging": "embeddings", "alignment": "none"}])  # fmt: skip
@torch.no_grad()
def test_a_batch_equals_its_rows_alone(settings, tiny_gmsa, ragged) -> None:
    model = tiny_gmsa("qwen3", **settings)
    lengths = [11, 3, 7, 1]
    ids, mask = ragged(lengths)
    prompts, prompt_mask = ragged([2, 4, 0, 3], seed=5)
    labels, label_mask = ragged([3, 1, 4, 2], seed=7)
    labels = labels.masked_fill(~label_mask, -100)
    rates = torch.tensor([4, 2, 3, 10])
    soft = model.compress(ids, mask, rates)
    assert soft.lengths.tolist() == [3, 2, 3, 1]
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    texts = model.generate(soft, prompts, prompt_mask, **options)
    whole = model(ids, mask, prompts, prompt_mask, labels, rates)
    losses = []
    for b, n in enumerate(lengths):
        alone = model.compress(ids[b : b + 1, :n], rate=int(rates[b]))
        torch.testing.assert_close(soft[b : b + 1].embeds, alone.embeds, atol=1e-5, rtol=1e-5)
        m = int(prompt_mask[b].sum())
        one = model.generate(alone, prompts[b : b + 1, :m], **options)
        assert texts[b].tolist() == one[0].tolist()
        t = int(label_mask[b].sum())
        out = model(
            ids[b : b + 1, :n],
            prompt_ids=prompts[b : b + 1, :m],
            labels=labels[b : b + 1, :t],
            rate=int(rates[b]),
        )
        losses.append(out.loss * t)
        assert out.num_label_tokens == t
    assert whole.num_label_tokens == 10
    torch.testing.assert_close(whole.loss, sum(losses) / 10, atol=1e-5, rtol=1e-5)


@pytest.mark.smoke
@torch.no_grad()
def test_padding_never_matters(tiny_gmsa, ragged) -> None:
    model = tiny_gmsa()
    ids, mask = ragged([9, 5])
    expected = model.compress(ids, mask, 4)
    changed = ids.masked_fill(~mask, 17)
    assert torch.equal(model.compress(changed, mask, 4).embeds, expected.embeds)
    left = torch.stack([torch.roll(row, int((~m).sum())) for row, m in zip(ids, mask, strict=True)])
    left_mask = mask.flip(1)
    assert torch.equal(model.compress(left, left_mask.long(), 4).embeds, expected.embeds)
    holes = torch.zeros(2, 18, dtype=torch.long)
    hole_mask = torch.zeros(2, 18, dtype=torch.bool)
    holes[:, ::2], hole_mask[:, ::2] = ids, mask
    assert torch.equal(model.compress(holes, hole_mask, 4).embeds, expected.embeds)
    assert torch.equal(model.compress(ids.int(), mask, 4).embeds, expected.embeds)


@torch.no_grad()
def test_later_tokens_do_not_reach_earlier_soft_tokens(tiny_gmsa, ragged) -> None:
    model = tiny_gmsa()
    ids, _ = ragged([12])
    changed = ids.clone()
    changed[:, 8:] = 5
    before, after = model.compress(ids, rate=4).embeds, model.compress(changed, rate=4).embeds
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2], after[:, 2])


def logits_by_hand(model, ids, prompts, targets, rate):
    table = model.get_input_embeddings()
    soft = model.compress(ids, rate=rate).embeds
    sequence = torch.cat([soft, table(prompts), table(targets)], 1)
    logits = model.decoder(inputs_embeds=sequence).logits
    start = soft.shape[1] + prompts.shape[1] - 1
    return logits[:, start : start + targets.shape[1]]


@pytest.mark.smoke
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("m", [3, 0])
def test_the_loss_is_the_cross_entropy_by_hand(family, m, tiny_gmsa, ragged) -> None:
    model = tiny_gmsa(family)
    ids, _ = ragged([9, 9])
    prompts, targets = ragged([3, 3], seed=8)[0][:, :m], ragged([4, 4], seed=9)[0]
    out = model(ids, prompt_ids=prompts, labels=targets, rate=4)
    logits = logits_by_hand(model, ids, prompts, targets, 4)
    torch.testing.assert_close(out.loss, F.cross_entropy(logits.transpose(1, 2), targets))
    assert out.num_correct == (logits.argmax(-1) == targets).sum()
    compressed = model(soft=model.compress(ids, rate=4), prompt_ids=prompts, labels=targets)
    torch.testing.assert_close(compressed.loss, out.loss)


def test_without_encoder_and_rate_one_it_is_the_plain_language_model(tiny_lm, tiny_gmsa, ragged):
    lm = tiny_lm("qwen2")
    model = tiny_gmsa(lm=copy.deepcopy(lm), merging="embeddings", alignment="none")
    ids, mask = ragged([6, 4])
    prompts, prompt_mask = ragged([2, 3], seed=4)
    targets, target_mask = ragged([3, 2], seed=6)
    labels = targets.masked_fill(~target_mask, -100)
    loss = model(ids, mask, prompts, prompt_mask, labels, rate=1).loss
    total = 0.0
    for b in range(2):
        x, q, y = ids[b][mask[b]], prompts[b][prompt_mask[b]], targets[b][target_mask[b]]
        logits = lm(input_ids=torch.cat([x, q, y])[None]).logits[0]
        start = len(x) + len(q) - 1
        total += F.cross_entropy(logits[start : start + len(y)], y, reduction="sum")
    torch.testing.assert_close(loss, total / target_mask.sum())


@pytest.mark.smoke
@torch.no_grad()
def test_inputs_embeds_in_a_plain_generate(tiny_gmsa, ragged) -> None:
    model = tiny_gmsa()
    ids, mask = ragged([9, 4])
    prompts, prompt_mask = ragged([2, 3], seed=4)
    soft = model.compress(ids, mask, 2)
    embeds, attention = model.decoder_inputs(soft, prompts, prompt_mask)
    plain = model.decoder.generate(
        inputs_embeds=embeds, attention_mask=attention.long(), max_new_tokens=6, do_sample=False
    )
    assert torch.equal(plain, model.generate(soft, prompts, prompt_mask, max_new_tokens=6))
    assert torch.equal(
        plain, model.generate(soft.unbatch(), prompts, prompt_mask, max_new_tokens=6)
    )


def hashes(module) -> dict[str, str]:
    return {
        n: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
        for n, p in module.named_parameters(remove_duplicate=False)
    }


def trains(model, ids, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(steps):
        model(ids, prompt_ids=ids[:, :2], labels=ids, rate=3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize(("family", "per_block"), [("llama", 9), ("qwen3", 11)])
def test_each_stage_trains_what_it_should(family, per_block, tiny_gmsa, ragged) -> None:
    model = tiny_gmsa(family, lsa_layers=1)
    ids, _ = ragged([8, 8])
    model.freeze_for_stage("autoencoding")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * model.config.encoder_layers + per_block
    assert all("lora_" in n or n.startswith("lsa.layers.") for n in trained)
    before = hashes(model)
    trains(model, ids)
    after = hashes(model)
    assert {n for n in before if before[n] != after[n]} == set(trained)

    model.freeze_for_stage("keft")
    decoder = {n for n in after if n.startswith("decoder.")}
    soft = model.compress(ids, rate=3).embeds.detach()
    trains(model, ids)
    last = hashes(model)
    changed = {n for n in after if after[n] != last[n]}
    assert changed == decoder
    assert torch.equal(model.compress(ids, rate=3).embeds, soft)
    assert model.config.decoder_tuning == "full"


def test_keft_with_lora_keeps_the_base_shared(tiny_gmsa, ragged) -> None:
    model = tiny_gmsa()
    ids, _ = ragged([8])
    model.freeze_for_stage("keft", "lora")
    shared = model.encoder.layers[0].self_attn.q_proj.base_layer.weight
    assert shared is model.decoder.model.layers[0].self_attn.q_proj.base_layer.weight
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 3
    before = hashes(model)
    trains(model, ids)
    after = hashes(model)
    assert {n for n in before if before[n] != after[n]} == trained
    with pytest.raises(ValueError, match="already has LoRA"):
        model.freeze_for_stage("keft", "full")


def test_dropout_is_on_only_where_something_trains(tiny_gmsa) -> None:
    model = tiny_gmsa(lora_dropout=0.1)
    model.train()
    assert model.encoder.training
    assert not model.decoder.training
    model.freeze_for_stage("keft")
    model.train()
    assert not model.encoder.training
    assert not model.lsa.training
    assert model.decoder.training


@pytest.mark.parametrize("part", ["encoder", "decoder", "all"])
def test_checkpointed_activations_give_equal_gradients(part, tiny_gmsa, ragged) -> None:
    gradients, runs = [], []
    for checkpointed in ("none", part):
        model = tiny_gmsa()
        counts = {"encoder": 0, "decoder": 0}
        blocks = {"encoder": model.encoder.layers[0], "decoder": model.decoder.model.layers[0]}
        for name, block in blocks.items():

            def count(*_, name=name, counts=counts):
                counts[name] += 1

            block.self_attn.register_forward_pre_hook(count)
        model.checkpoint_activations(checkpointed)
        model.train()
        ids, _ = ragged([9, 9])
        model(ids, prompt_ids=ids[:, :2], labels=ids, rate=3).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        runs.append(counts)
    assert runs[0] == {"encoder": 1, "decoder": 1}
    # The frozen decoder's activations are recomputed too: gradients go through it.
    assert runs[1] == {n: 2 if part in (n, "all") else 1 for n in ("encoder", "decoder")}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    with pytest.raises(ValueError, match="accepted: none, encoder"):
        model.checkpoint_activations("half")


@torch.no_grad()
@pytest.mark.parametrize("settings", [
    {"alignment": "linear"}, {"alignment": "none"}, {"lsa_init": "random"},
    {"merging": "memory", "alignment": "linear"}, {"lsa_layers": 3, "encoder_layers": 3},
])  # fmt: skip
def test_ablations_compress(settings, tiny_gmsa, ragged) -> None:
    ids, _ = ragged([9])
    paper, other = tiny_gmsa(), tiny_gmsa(**settings)
    soft = other.compress(ids, rate=4)
    assert soft.embeds.shape == (1, 3, 16)
    assert soft.embeds.isfinite().all()
    assert not torch.allclose(soft.embeds, paper.compress(ids, rate=4).embeds, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tiny_lm, tiny_gmsa, ragged) -> None:
    lm = tiny_lm()
    lm.model.norm.weight.mul_(50)  # the last norms of large models are that large
    ids, mask = ragged([9, 5])
    exact = tiny_gmsa(lm=copy.deepcopy(lm)).compress(ids, mask, 4)
    half = tiny_gmsa(lm=copy.deepcopy(lm)).to(dtype)
    soft = half.compress(ids, mask, 4)
    assert soft.embeds.dtype == dtype
    assert soft.embeds.isfinite().all()
    error = (soft.embeds.float() - exact.embeds).norm() / exact.embeds.norm()
    assert error < 0.1
    assert half(ids, mask, ids[:, :2], labels=ids, rate=4).loss.isfinite()


@torch.no_grad()
def test_rows_without_tokens(tiny_gmsa, ragged) -> None:
    model = tiny_gmsa()
    ids, mask = ragged([5, 4])
    mask[1] = False
    soft = model.compress(ids, mask, 4)
    assert soft.lengths.tolist() == [2, 0]
    assert soft.ratio.tolist() == [2.5, 1.0]
    nothing = model.compress(ids, torch.zeros_like(mask), 4)
    assert nothing.embeds.shape == (2, 0, 16)
    closed_book = model.generate(nothing, ids, max_new_tokens=3, min_new_tokens=3)
    plain = model.decoder.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3,
        do_sample=False,
    )  # fmt: skip
    assert torch.equal(closed_book, plain[:, 5:])
    with pytest.raises(ValueError, match="neither soft tokens nor a prompt"):
        model.generate(nothing)


@pytest.mark.usefixtures("without_type_checks")
def test_bad_input(tiny_lm, tiny_gmsa, ragged) -> None:
    model = tiny_gmsa()
    ids, mask = ragged([5, 4])
    for call, message in (
        (lambda: model.compress(ids.float()), "accepted: whole numbers"),
        (lambda: model.compress(ids, mask[:, 1:]), "attention_mask has shape"),
        (lambda: model.compress(ids, mask, 0), "rate is 0"),
        (lambda: model.compress(torch.ones(1, 300, dtype=torch.long)), "chunk_size"),
        (lambda: model(ids), "forward needs labels"),
        (lambda: model(labels=ids), "either input_ids or soft"),
        (lambda: model.freeze_for_stage("third"), "accepted: autoencoding, keft"),
        (lambda: model.freeze_for_stage("keft", "half"), "accepted: full, lora"),
        (lambda: GMSAConfig(alignment="mlp"), "accepted: lsa, linear, none"),
        (lambda: GMSAConfig(encoder_layers=0), "encoder_layers is 0"),
        (lambda: tiny_gmsa(encoder_layers=4), "1 to 3"),
        (lambda: tiny_gmsa(lsa_layers=4), "1 to 3"),
        (lambda: GMSAModel.from_backbone("no/such-model"), "cannot be loaded"),
        (lambda: tiny_gmsa(merging="memory", memory_tokens=1).compress(ids, mask, 1), "memory tok"),
        (lambda: model.decoder_inputs(SoftTokens(torch.zeros(1, 1, 8), mask[:1, :1],
                                                 ids[0, :1], ids[0, :1])), "another compressor"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(TypeError, match="supported: Llama"):
        GMSAModel.from_backbone(gpt2)
