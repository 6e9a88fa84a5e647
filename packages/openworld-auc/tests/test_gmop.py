"""Prompts against the backbones' own text encoders; the objective against its formula; files."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from openworld_auc import GMoP, GMoPConfig, GMoPTrainer, PromptLearner
from openworld_auc.backbone import HFBackbone, OpenClipBackbone, as_backbone, load_backbone
from openworld_auc.fusion import erf_scores
from openworld_auc.prompts import encode_prompts, template_features
from openworld_auc.train import TrainConfig, evaluation, extract_features
from shared_core.contrastive import WordTokenizer
from shared_core.errors import InputError
from shared_core.run import RunFolder

BASE, NEW = ["red star", "blue bar", "green ring", "red ring", "blue star"], ["pink dog", "cat"]
WORDS = ["a photo of a the dog cat pink red star blue bar green ring"]
TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 2}
VISION = {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32}


def open_clip_model(kind="CLIP", seed=0, **text):
    import open_clip.model as m

    tokenizer = WordTokenizer.from_texts(WORDS, context_length=16)
    if text.get("pool_type") == "eos":
        text["eos_id"] = tokenizer.eot_id
    torch.manual_seed(seed)
    config = {**TEXT, "vocab_size": tokenizer.vocab_size, **text}
    made = getattr(m, kind)(embed_dim=24, vision_cfg=VISION, text_cfg=config)
    return made, tokenizer, made.encode_text


def hf_model(end_id=None):
    transformers = pytest.importorskip("transformers")
    tokenizer = WordTokenizer.from_texts(WORDS, context_length=16)
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16,
        "vocab_size": tokenizer.vocab_size, "eos_token_id": end_id or tokenizer.eot_id,
        "bos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    )
    return model, tokenizer, lambda ids: model.get_text_features(ids).pooler_output


BACKBONES = {
    "CLIP": lambda: open_clip_model(),
    "CLIP eos": lambda: open_clip_model(pool_type="eos"),
    "CustomTextCLIP": lambda: open_clip_model("CustomTextCLIP"),
    "CustomTextCLIP linear": lambda: open_clip_model("CustomTextCLIP", proj_bias=True),
    "HF": lambda: hf_model(),
    "HF old": lambda: hf_model(2),
}


@pytest.fixture
def backbone():
    model, tokenizer, _ = open_clip_model()
    return OpenClipBackbone(model, tokenizer)


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_literal_prompt_is_the_backbones_own(kind) -> None:
    model, tokenizer, encode = BACKBONES[kind]()
    backbone = as_backbone(model, tokenizer)
    assert type(backbone) is (HFBackbone if kind.startswith("HF") else OpenClipBackbone)
    with torch.no_grad():
        own = F.normalize(encode(tokenizer([f"a photo of a {n}." for n in BASE])), dim=-1)
        learner = PromptLearner(backbone, 4, init="a photo of a")
        embeds, ends = learner(backbone, BASE)
        [found] = encode_prompts(backbone, [(learner, BASE)])
    assert embeds.shape[1] < 16  # what comes after the end is cut off
    assert ends.tolist() == [7] * 5
    assert torch.allclose(found, own, atol=1e-5)
    assert torch.allclose(template_features(backbone, BASE), own, atol=1e-5)
    images = torch.randn(2, 3, 32, 32)
    features = backbone.encode_image(images)
    assert torch.allclose(features.norm(dim=1), torch.ones(2), atol=1e-5)


def test_prompts_encoded_together_or_in_chunks_are_the_same(backbone) -> None:
    g = torch.Generator().manual_seed(0)
    short, long = (PromptLearner(backbone, n, generator=g) for n in (2, 6))
    together = encode_prompts(backbone, [(short, BASE), (long, NEW)])
    chunked = encode_prompts(backbone, [(short, BASE), (long, NEW)], chunk=3)
    for learner, names, one, other in zip(
        (short, long), (BASE, NEW), together, chunked, strict=True
    ):
        [alone] = encode_prompts(backbone, [(learner, names)])
        assert torch.allclose(one, alone, atol=1e-5)
        assert torch.allclose(other, alone, atol=1e-5)
    gradients = []
    for features in (together, chunked):
        short.zero_grad()
        features[0][:, 0].sum().backward(retain_graph=True)
        gradients.append(short.ctx.grad.clone())
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("chunk", [None, 3])
def test_a_prefix_that_is_computed_once_changes_nothing(kind, chunk) -> None:
    model, tokenizer, _ = BACKBONES[kind]()
    backbone = as_backbone(model, tokenizer)
    g = torch.Generator().manual_seed(0)
    prompts = [(PromptLearner(backbone, n, generator=g), names) for n, names in
               ((4, BASE), (2, NEW), (7, BASE[1:]))]  # fmt: skip
    found, gradients = [], []
    for options in ({}, {"prefix_cache": True, "chunk": chunk}):
        texts = encode_prompts(backbone, prompts, **options)
        # A loss that depends on every number of every class.
        loss = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in texts)
        found.append(torch.cat(texts))
        gradients.append(torch.autograd.grad(loss, [learner.ctx for learner, _ in prompts]))
    assert torch.allclose(*found, atol=1e-5)
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 1e-3
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


# torch.compile looks at .grad of its arguments and hides the warning, but not as an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(("prefix_cache", "chunk"), [(False, None), (True, 10)])
def test_training_is_the_same_compiled_and_with_shared_prefixes(backbone, prefix_cache, chunk):
    features = batch()
    contexts = []
    for options in ({}, {"prefix_cache": prefix_cache, "chunk": chunk, "compile": "aot_eager"}):
        model = GMoP(backbone, BASE, config=GMoPConfig(n_ctx_detector=3, **options))
        GMoPTrainer(model, features, config=TrainConfig(lr=0.2, epochs=2, batch_size=8)).fit()
        contexts.append(model.contexts())
    for name, tensor in contexts[0].items():
        assert torch.allclose(contexts[1][name], tensor, atol=1e-5)


def test_nothing_is_tokenised_twice(backbone) -> None:
    calls = []
    tokenizer = backbone.tokenizer
    backbone.tokenizer = lambda texts: calls.append(texts) or tokenizer(texts)
    model = GMoP(backbone, BASE, config=GMoPConfig(n_ctx_detector=3))
    model.loss(*batch())
    seen = len(calls)
    model.loss(*batch())
    assert len(calls) == seen
    model.set_classes(NEW, [*BASE[:-1], "green star"])  # other names are tokenised
    model.loss(*batch())
    assert len(calls) > seen


def batch(n=20, seed=1):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, 24, generator=g), dim=1), torch.arange(n) % 5


@pytest.mark.smoke
@pytest.mark.parametrize("gate", ["sigmoid", "prob", "hard", "none"])
@pytest.mark.parametrize("padding", [False, True])
def test_the_objective_is_its_formula(backbone, gate, padding) -> None:
    config = GMoPConfig(
        n_ctx_detector=3, k=3, lam=0.7, alpha=0.3, gate=gate, official_padding=padding
    )
    model = GMoP(backbone, BASE, config=config)
    f, y = batch()
    found = model.loss(f, y)
    scale = backbone.model.logit_scale.exp()
    p_g = (scale * f @ encode_prompts(backbone, [(model.classifier, BASE)])[0].T).softmax(1)
    p_h = (scale * f @ template_features(backbone, BASE).T).softmax(1)

    def phi(p, i):
        value = float(p[i, y[i]].detach())
        hard = float(p[i].argmax() == y[i])
        sigmoid = 1 / (1 + torch.tensor(-value).exp().item())
        return {"sigmoid": sigmoid, "prob": value, "hard": hard, "none": 1.0}[gate]

    warm = auc = 0.0
    for k in range(3):
        new = [c for c in range(5) if c % 3 == k]
        base = [c for c in range(5) if c not in new]
        names = [BASE[c] for c in base + ([k] if padding and k < 2 else [])]
        text = encode_prompts(backbone, [(model.detectors[k], names)])[0]
        p = (scale * f @ text.T).softmax(1).detach()
        rows_b = [i for i in range(20) if int(y[i]) in base]
        rows_n = [i for i in range(20) if int(y[i]) in new]
        warm += -sum(float(p[i, base.index(int(y[i]))].log()) for i in rows_b) / len(rows_b)
        pairs = sum(
            phi(p_g, i) * phi(p_h, j) * float(1 - p[i].max() + p[j].max()) ** 2
            for i in rows_b
            for j in rows_n
        )
        auc += pairs / (len(rows_b) * len(rows_n))
    ce = -float(p_g[range(20), y].log().mean().detach())
    assert found["ce"].item() == pytest.approx(ce, rel=1e-4)
    assert found["warm"].item() == pytest.approx(warm / 3, rel=1e-4)
    assert found["auc"].item() == pytest.approx(auc / 3, rel=1e-4)
    total = ce + 0.3 * warm / 3 + 0.7 * auc / 3
    assert found["total"].item() == pytest.approx(total, rel=1e-4)


def gradient_of_g(backbone, **changes):
    model = GMoP(backbone, BASE, config=GMoPConfig(n_ctx_detector=3, **changes))
    model.loss(*batch())["total"].backward()
    return model.classifier.ctx.grad.clone()


def test_gates_and_weights_change_the_gradient_of_g_only_as_they_should(backbone) -> None:
    f, y = batch()
    model = GMoP(backbone, BASE, config=GMoPConfig(n_ctx_detector=3))
    [text] = encode_prompts(backbone, [(model.classifier, BASE)])
    F.cross_entropy(backbone.scale * f @ text.T, y).backward()
    coop = model.classifier.ctx.grad
    assert torch.equal(gradient_of_g(backbone, lam=0.0, alpha=0.0), coop)
    assert torch.allclose(gradient_of_g(backbone), coop, atol=1e-5)
    leaking = gradient_of_g(backbone, detach_gate=False)
    assert not torch.allclose(leaking, coop, rtol=1e-4, atol=1e-6)


def test_classifiers_of_ones_own_take_the_places_of_g_and_h(backbone) -> None:
    f, y = batch()
    model = GMoP(backbone, BASE, config=GMoPConfig(n_ctx_detector=3))
    g = backbone.scale * f @ encode_prompts(backbone, [(model.classifier, BASE)])[0].T
    h = backbone.scale * f @ template_features(backbone, BASE).T
    own = g.detach().requires_grad_()
    found = model.loss(f, y, base_logits=own, new_logits=h)
    expected = model.loss(f, y)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5)
    found["total"].backward()
    assert model.classifier.ctx.grad is None
    assert torch.allclose(own.grad, (g.softmax(1) - F.one_hot(y, 5)).detach() / 20, atol=1e-6)
    other = model.loss(f, y, new_logits=torch.zeros(20, 5))
    assert other["auc"].item() != pytest.approx(expected["auc"].item(), rel=1e-5)


def test_some_detectors_a_step_estimate_all(backbone) -> None:
    f, y = batch()
    model = GMoP(backbone, BASE, config=GMoPConfig(n_ctx_detector=3))
    whole = model.loss(f, y)
    some = [model.loss(f, y, detectors=[k]) for k in range(3)]
    for name in ("warm", "auc"):
        mean = sum(part[name].item() for part in some) / 3
        assert mean == pytest.approx(whole[name].item(), rel=1e-4)
    few = GMoP(backbone, BASE, config=GMoPConfig(n_ctx_detector=3))
    recipe = TrainConfig(epochs=1, batch_size=10, detectors_per_step=1, lr=0.2)
    start = few.contexts()
    GMoPTrainer(few, (f, y), config=recipe).fit()  # two steps: the first two of three detectors
    moved = [not torch.equal(start[n], t) for n, t in few.contexts().items()]
    assert moved == [True, True, True, False]


def test_erf_weighs_ranks_by_uncertainty(backbone) -> None:
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(30, 7, generator=g).double()
    p = logits.softmax(1)
    largest, total = p[:, :4].amax(1), p[:, :4].sum(1)

    def rank(x):
        return [(sum(float(v < w) for v in x) + 0.5) / len(x) for w in x]

    expected = []
    for row, s, a, b in zip(p.tolist(), total.tolist(), rank(total), rank(largest), strict=True):
        h_s = -(s * math.log2(s) + (1 - s) * math.log2(1 - s))
        h_m = -sum(q * math.log(q) for q in row) / math.log(7)
        expected.append((h_m * a + h_s * b) / (h_s + h_m))
    assert erf_scores(logits, 4).tolist() == pytest.approx(expected, rel=1e-9)
    model = GMoP(backbone, BASE, config=GMoPConfig(detector="erf")).set_classes(NEW).eval()
    f, _ = batch()
    [text] = encode_prompts(backbone, [(model.classifier, BASE + NEW)])
    ranked = erf_scores(backbone.scale * f @ text.T.detach(), 5)
    assert torch.allclose(model.detect(f), ranked, atol=1e-5)
    # Testing ranks all test images together, not each domain among itself.
    scores, _, _ = evaluation(model, (f[:8], torch.zeros(8).long()), (f[8:], torch.ones(12).long()))
    assert torch.allclose(scores, ranked, atol=1e-5)
    with pytest.raises(ValueError, match="5 of 5 columns are base"):
        erf_scores(torch.zeros(2, 5), 5)


def test_a_batch_without_pairs_trains_g_alone(backbone) -> None:
    model = GMoP(backbone, BASE, config=GMoPConfig(n_ctx_detector=3, k=2))
    f, _ = batch(1)
    found = model.loss(f, torch.tensor([1]))
    found["total"].backward()
    assert found["auc"].item() == found["warm"].item() == 0
    assert found["total"].item() == found["ce"].item()


def test_detectors_at_test_time(backbone) -> None:
    f, _ = batch()
    config = GMoPConfig(n_ctx_detector=3)
    model = GMoP(backbone, BASE, config=config).set_classes(NEW).eval()
    output = model(features=f)
    expected = []
    for k in range(3):
        [text] = encode_prompts(backbone, [(model.detectors[k], BASE + NEW)])
        p = (backbone.scale * f @ text.T).softmax(1)
        expected.append(p[:, [c for c in range(5) if c % 3 != k]].amax(1).detach())
    assert torch.allclose(torch.stack(output.detector_scores), torch.stack(expected), atol=1e-5)
    assert torch.allclose(output.base_score, torch.stack(expected).amax(0), atol=1e-5)
    assert output.base_score.dtype == torch.float32
    more = model.set_classes([*NEW, "dog"])(features=f).base_score
    assert bool((more <= output.base_score).all())  # a larger denominator
    model.set_classes(NEW)
    # The same contexts with other readings of them.
    readings = {}
    for name, change in {
        "pseudo": {"detector_vocab": "pseudo"},
        "logodds": {"score_space": "logodds"},
        "mean": {"fuse": "mean"},
        "mcm": {"detector": "mcm"},
        "sum": {"detector": "sum"},
    }.items():
        other = GMoP(backbone, BASE, config=replace(config, **change)).set_classes(NEW).eval()
        readings[name] = other(features=f).base_score
    assert bool((readings["pseudo"] >= output.base_score - 1e-6).all())
    assert torch.allclose(readings["logodds"], output.base_score.logit(), atol=1e-3)
    assert torch.allclose(readings["mean"], torch.stack(expected).mean(0), atol=1e-5)
    assert bool((readings["sum"] >= readings["mcm"]).all())
    [text] = encode_prompts(backbone, [(model.classifier, BASE + NEW)])
    p = (backbone.scale * f @ text.T).softmax(1).detach()
    assert torch.allclose(readings["sum"], p[:, :5].sum(1), atol=1e-5)
    assert torch.allclose(readings["mcm"], p[:, :5].amax(1), atol=1e-5)


def test_some_of_the_trained_classes_keep_their_parts(backbone, tmp_path) -> None:
    f, y = batch()
    model = GMoP(backbone, BASE, config=GMoPConfig(n_ctx_detector=3))
    some = [3, 0, 4]  # in another order; detector 0 counts the first two as new
    names = [BASE[c] for c in some]
    model.set_classes(NEW, names).eval()
    output = model(features=f)
    expected = []
    for k in range(3):
        [text] = encode_prompts(backbone, [(model.detectors[k], names + NEW)])
        p = (backbone.scale * f @ text.T).softmax(1)
        expected.append(p[:, [i for i, c in enumerate(some) if c % 3 != k]].amax(1).detach())
    assert torch.allclose(torch.stack(output.detector_scores), torch.stack(expected), atol=1e-5)
    own = (backbone.scale * f @ template_features(backbone, NEW).T).detach()
    assert torch.allclose(output.new_logits, own, atol=1e-4)
    with pytest.raises(ValueError, match="some of the trained classes"):
        model.loss(f, y)
    model.save_pretrained(tmp_path)
    loaded = GMoP.from_pretrained(tmp_path, backbone, template="a photo of the {}")
    assert (loaded.base_classes, loaded.config.template) == (BASE, "a photo of the {}")
    again = loaded.set_classes(NEW, names)(features=f)
    assert torch.equal(again.base_score, output.base_score)
    with pytest.raises(ValueError, match="knows only pseudo-new ones"):
        model.set_classes(NEW, [BASE[0], BASE[3]])


def test_class_order_and_stages(backbone) -> None:
    f, _ = batch()
    config = GMoPConfig(detector="mcm", template="a photo of the {}")
    model = GMoP(backbone, BASE, config=config).set_classes(NEW).eval()
    turned = GMoP(backbone, BASE[::-1], config=config).set_classes(NEW).eval()
    assert torch.allclose(
        turned(features=f).base_logits, model(features=f).base_logits.flip(1), atol=1e-4
    )
    images = torch.randn(3, 3, 32, 32)
    output = model(images)
    assert torch.equal(model.detect(model.encode_image(images)), output.base_score)
    low, high = (model.predict(images, t) for t in (-1.0, 2.0))
    assert low == [BASE[i] for i in output.base_logits.argmax(1)]
    assert high == [NEW[i] for i in output.new_logits.argmax(1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_scores_apart(backbone, dtype) -> None:
    f, _ = batch(40)
    model = GMoP(backbone, BASE, config=GMoPConfig(n_ctx_detector=3)).set_classes(NEW).eval()
    exact = model(features=f).base_score
    with torch.autocast("cpu", dtype=dtype):
        model.set_classes(NEW)
        mixed = model(features=f).base_score
    assert mixed.dtype == torch.float32
    assert len(mixed.unique()) == len(exact.unique()) == 40
    # Probabilities so near 1 that float32 rounds them to 1 stay apart as log-odds.
    config = GMoPConfig(detector="mcm", score_space="logodds")
    sharp = GMoP(backbone, BASE, config=config).set_classes(NEW).eval()
    logits = torch.cat([40 + torch.arange(20.0)[:, None], torch.zeros(20, 6)], 1)
    assert len(sharp._untuned_score(logits).unique()) == 20
    assert len(sharp._untuned_score(logits).sigmoid().unique()) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains_float32_contexts(backbone, dtype, tmp_path) -> None:
    f, y = batch(40)
    config, recipe = GMoPConfig(n_ctx_detector=3), TrainConfig(lr=0.2, epochs=4)
    exact = GMoPTrainer(GMoP(backbone, BASE, config=config), (f, y), config=recipe).fit()
    model = GMoP(backbone, BASE, config=config)
    run, mixed = RunFolder(tmp_path / "run"), replace(recipe, dtype=dtype)
    history = GMoPTrainer(model, (f, y), config=mixed, run=run).fit()
    assert {t.dtype for t in model.contexts().values()} == {torch.float32}
    assert history[-1]["ce"] < history[0]["ce"]
    assert history[0]["ce"] == pytest.approx(exact[0]["ce"], rel=0.05)
    assert history[0]["ce"] != exact[0]["ce"]
    again = GMoP(backbone, BASE, config=config)
    run = RunFolder(tmp_path / "run", resume=True)
    assert GMoPTrainer(again, (f, y), config=mixed, run=run, resume=True).fit() == history


def test_training_moves_contexts_only_and_resumes_to_the_same(backbone, tmp_path) -> None:
    before = {n: p.clone() for n, p in backbone.state_dict().items()}
    f, y = batch(40)
    config, recipe = GMoPConfig(n_ctx_detector=3), TrainConfig(lr=0.2, epochs=6)
    model = GMoP(backbone, BASE, config=config)
    assert {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad} == {"ctx"}
    history = GMoPTrainer(model, (f, y), config=recipe, run=RunFolder(tmp_path / "a")).fit()
    assert history[-1]["ce"] < history[0]["ce"]
    assert all(torch.equal(p, before[n]) for n, p in backbone.state_dict().items())

    class StopError(Exception):
        pass

    def stop(record):
        stop.count += 1
        if stop.count == 3:
            raise StopError

    stop.count = 0
    half = GMoP(backbone, BASE, config=config)
    run = RunFolder(tmp_path / "b")
    with pytest.raises(StopError):
        GMoPTrainer(half, (f, y), config=recipe, run=run).fit(stop)
    again = GMoP(backbone, BASE, config=config)
    run = RunFolder(tmp_path / "b", resume=True)
    resumed = GMoPTrainer(again, (f, y), config=recipe, run=run, resume=True).fit()
    assert resumed == history
    for name, tensor in again.contexts().items():
        assert torch.equal(tensor, model.contexts()[name])
    with pytest.raises(ValueError, match="other settings or data"):
        GMoPTrainer(again, (f, y), config=replace(recipe, lr=1.0), run=run, resume=True).fit()
    report = GMoPTrainer(again.set_classes(NEW), (f, y)).evaluate((f, y), (f, y % 2))
    assert 0 <= report.openworld_auc <= report.base_acc * report.new_acc


def test_files_are_small_and_come_back(backbone, tmp_path) -> None:
    f, _ = batch()
    model = GMoP(backbone, BASE, config=GMoPConfig(n_ctx_detector=3)).set_classes(NEW).eval()
    model.save_pretrained(tmp_path)
    loaded = GMoP.from_pretrained(tmp_path, backbone)
    for one, other in zip(loaded(features=f)[:3], model(features=f)[:3], strict=True):
        assert torch.equal(one, other)
    other_names = ["cat", "dog", "ring", "bar", "star"]
    assert loaded.set_classes(["pink ring"], other_names)(features=f).base_logits.shape == (20, 5)
    size = (tmp_path / "contexts.safetensors").stat().st_size
    numbers = (4 + 3 * 3) * 32
    assert size < 4 * numbers + 1000
    # The width and contexts of ViT-B/16.
    wide, tokenizer, _ = open_clip_model(width=512, heads=8, layers=1, context_length=24)
    GMoP(wide, BASE, tokenizer=tokenizer).save_pretrained(tmp_path / "wide")
    assert 4 * 26_624 < (tmp_path / "wide" / "contexts.safetensors").stat().st_size < 200_000
    (tmp_path / "contexts.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        GMoP.from_pretrained(tmp_path, backbone)
    with pytest.raises(ValueError, match="is missing"):
        GMoP.from_pretrained(tmp_path / "nowhere", backbone)


def test_features_are_cached_by_model_and_data(backbone, tmp_path) -> None:
    data = [(torch.randn(3, 32, 32), i % 2) for i in range(5)]
    first = extract_features(backbone, data, cache=tmp_path, batch_size=2)
    again = extract_features(backbone, data, cache=tmp_path)
    assert torch.equal(first[0], again[0])
    assert len(list(tmp_path.iterdir())) == 1
    other = OpenClipBackbone(*open_clip_model(seed=5)[:2])
    extract_features(other, data, cache=tmp_path)
    extract_features(backbone, data[::-1], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    for number in range(5):  # each image counts, not some of them
        one = list(data)
        one[number] = (one[number][0] + 1e-3, one[number][1])
        extract_features(backbone, one, cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == 4 + number
    with pytest.raises(ValueError, match="no images"):
        extract_features(backbone, [])


@pytest.mark.usefixtures("without_type_checks")
def test_bad_input(backbone) -> None:
    f, y = batch()
    for names, message in (
        (["a_star", "a star"], "are both 'a star'"),
        (["star", " "], "base class name 1 is empty"),
        ([*BASE[:4], "red star bar ring " * 4], "of class 'red star bar ring red"),
    ):
        with pytest.raises(ValueError, match=message):
            GMoP(backbone, names, config=GMoPConfig(k=2, n_ctx_detector=3))
    model = GMoP(backbone, BASE, config=GMoPConfig(n_ctx_detector=3))
    with pytest.raises(ValueError, match="'red star' is in both lists"):
        model.set_classes(["red_star"])
    with pytest.raises(ValueError, match="the detectors part 5"):
        model.set_classes(NEW, ["one", "two"])
    with pytest.raises(ValueError, match=r"label 5 is outside \[0, 5\)"):
        model.loss(f, y + 1)
    with pytest.raises(ValueError, match="20 features, but 3 labels"):
        model.loss(f, y[:3])
    with pytest.raises(ValueError, match="exactly one of images and features"):
        model()
    with pytest.raises(ValueError, match="name them with set_classes"):
        model.predict(torch.randn(1, 3, 32, 32), 0.5)
    with pytest.raises(ValueError, match="the model takes 16; shorten"):
        GMoP(backbone, BASE, config=GMoPConfig(n_ctx_detector=14)).loss(f, y)
    with pytest.raises(ValueError, match="k is 6 for 5 base classes"):
        GMoP(backbone, BASE, config=GMoPConfig(k=6))
    with pytest.raises(ValueError, match="gate is 'soft'"):
        GMoPConfig(gate="soft")
    with pytest.raises(ValueError, match="chunk is 0; accepted: at least one"):
        GMoPConfig(chunk=0)
    with pytest.raises(ValueError, match=r"compile is 'fast'; accepted: .*inductor"):
        GMoPConfig(compile="fast")
    with pytest.raises(ValueError, match=r"has to hold \{\} exactly once"):
        GMoP(backbone, BASE, config=GMoPConfig(template="a photo"))
    with pytest.raises(ValueError, match="is 4 tokens, n_ctx is 3"):
        PromptLearner(backbone, 3, init="a photo of a")
    assert GMoP(backbone, ["Star", "star"], config=GMoPConfig(detector="mcm")).base_classes[0]
    with pytest.raises(ValueError, match=r"base_logits has shape \[20, 4\]; accepted: \[20, 5\]"):
        model.loss(f, y, base_logits=torch.zeros(20, 4))
    with pytest.raises(ValueError, match="detectors_per_step is 4; accepted: up to k = 3"):
        GMoPTrainer(model, (f, y), config=TrainConfig(detectors_per_step=4))
    for changes, message in (
        ({"lr": 0}, "lr=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"detectors_per_step": 0}, "detectors_per_step is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**changes)
    with pytest.raises(ValueError, match="dtype 'int8' is not known"):
        GMoPTrainer(model, (f, y), config=TrainConfig(dtype="int8")).fit()
    for train, message in (
        ((f[:0], y[:0]), "0 features"),
        ((f, y + 3), "labels reach from 3 to 7"),
        ((f * torch.nan, y), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            GMoPTrainer(model, train)


def test_blocks_of_another_make_share_no_prefix() -> None:
    model, tokenizer, _ = open_clip_model()
    model.transformer.resblocks[0].ln_1_kv = torch.nn.LayerNorm(32)  # as for cross-attention
    with pytest.raises(InputError, match="prefix_cache is for text towers of plain attention"):
        GMoP(model, BASE, config=GMoPConfig(prefix_cache=True), tokenizer=tokenizer)
    GMoP(model, BASE, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["CLIP", "CLIP eos", "CustomTextCLIP", "HF", "HF old"])
def test_a_tokenizer_that_ends_elsewhere_is_refused(kind) -> None:
    model, tokenizer, _ = BACKBONES[kind]()
    as_backbone(model, tokenizer)

    def other(texts):  # ends texts with another token, as another model's tokenizer would
        ids = tokenizer(texts)
        return torch.where(ids == tokenizer.eot_id, 2, ids)

    with pytest.raises(ValueError, match="does not read where the tokenizer ends a text"):
        as_backbone(model, other)


def test_weights_get_the_activation_they_were_trained_with(monkeypatch) -> None:
    import open_clip

    model, tokenizer, _ = open_clip_model()
    asked = []

    def create(name, pretrained):
        asked.append((name, pretrained))
        return model, None, torch.tensor

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: tokenizer)
    with pytest.warns(UserWarning, match="openai were trained with QuickGELU: taking ViT-B-16-qui"):
        assert load_backbone("ViT-B-16", "openai")[1] is torch.tensor
    load_backbone("ViT-B-16-quickgelu", "openai")
    load_backbone("ViT-B-16", "laion2b_s34b_b88k")
    assert asked == [
        ("ViT-B-16-quickgelu", "openai"),
        ("ViT-B-16-quickgelu", "openai"),
        ("ViT-B-16", "laion2b_s34b_b88k"),
    ]


def test_models_that_are_read_elsewhere_are_refused() -> None:
    with pytest.raises(ValueError, match="pools by 'last'"):
        as_backbone(*open_clip_model("CustomTextCLIP", pool_type="last")[:2])
    with pytest.raises(ValueError, match="is not causal"):
        as_backbone(*open_clip_model("CustomTextCLIP", no_causal_mask=True)[:2])
    with pytest.raises(ValueError, match="pass tokenizer="):
        as_backbone(open_clip_model()[0])
    with pytest.raises(ValueError, match="Linear is no known"):
        as_backbone(torch.nn.Linear(2, 2), list)
