"""Encoders of both libraries: cut towers, given embeddings, placeholders, wrong tokenizers."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from internet_neg import HFClipEncoder, InterNegError, OpenClipEncoder
from internet_neg.encoders import DualEncoder
from internet_neg.models import load_encoder
from internet_neg.transforms import load_transform
from shared_core.contrastive import WordTokenizer

TEXTS = ["a", "a photo of a red star", "star of photo red star of a photo"]


def padded_features(encoder: OpenClipEncoder, texts: list[str]) -> Tensor:
    with torch.no_grad():
        return encoder.model.encode_text(encoder.tokenize(texts), normalize=True)


def unit_features(encoder: Any, texts: list[str], **options: Any) -> Tensor:
    return torch.nn.functional.normalize(encoder.encode_text(texts, **options), dim=-1)


@pytest.mark.smoke
@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("pool", ["argmax", "eos"])
def test_a_causal_tower_is_cut_without_a_change(
    make_open_clip: Callable[..., Any], custom: bool, pool: str
) -> None:
    tokenizer = WordTokenizer(["a", "photo", "red", "star", "of"], 12)
    encoder = make_open_clip(custom, tokenizer, pool_type=pool, eos_id=tokenizer.eot_id)
    assert isinstance(encoder, DualEncoder)
    assert encoder.useful_length(encoder.tokenize(TEXTS[:1])) == 3
    full = padded_features(encoder, TEXTS)
    assert torch.allclose(unit_features(encoder, TEXTS), full, atol=2e-6)
    for batch in (1, 2):
        assert torch.allclose(unit_features(encoder, TEXTS, batch_size=batch), full, atol=2e-6)


@pytest.mark.parametrize("text", [{"no_causal_mask": True}, {"embed_cls": True}])
def test_other_towers_run_in_full(make_open_clip: Callable[..., Any], text: dict[str, Any]) -> None:
    encoder = make_open_clip(True, None, **text)
    ids = encoder.tokenize(TEXTS)
    assert encoder.useful_length(ids) == 12
    full = padded_features(encoder, TEXTS)
    assert torch.allclose(unit_features(encoder, TEXTS), full, atol=2e-6)


@pytest.mark.parametrize(
    ("custom", "text"), [(False, {}), (True, {}), (True, {"no_causal_mask": True})]
)
def test_a_words_own_embedding_gives_the_words_features(
    make_open_clip: Callable[..., Any], custom: bool, text: dict[str, Any]
) -> None:
    encoder = make_open_clip(custom, None, **text)
    check_placeholder_path(encoder)


def check_placeholder_path(encoder: Any, word: str = "star") -> None:
    from internet_neg.inversion import InversionTemplates

    placeholder, token = encoder.placeholder
    templates = InversionTemplates(encoder, ["a photo of a {}", "{}"])
    assert torch.equal(templates.at.sum(1), torch.ones(2, dtype=torch.long))
    assert (templates.ids[templates.at] == token).all()
    ids = encoder.tokenize([word])[0]
    other = encoder.tokenize([placeholder])[0]
    own = encoder.token_embedding(ids[ids != other][None])[0]
    found = templates.encode(encoder, own.expand(2, -1), torch.tensor([0, 1]))
    expected = encoder.encode_text([f"a photo of a {word}", word])
    expected = torch.nn.functional.normalize(expected, dim=-1)
    assert torch.allclose(found, expected, atol=1e-5)
    hooks = encoder._embedding._forward_hooks
    assert not hooks


def test_the_scale_ignores_a_logit_bias(make_open_clip: Callable[..., Any]) -> None:
    encoder = make_open_clip()
    assert encoder.scale == pytest.approx(torch.tensor(2.0).exp().item())
    encoder.model.logit_scale.data = torch.tensor([2.0])  # open_clip's nonscalar_logit_scale
    assert encoder.scale == pytest.approx(torch.tensor(2.0).exp().item())


def test_fingerprints_tell_weights_apart(make_open_clip: Callable[..., Any]) -> None:
    encoder = make_open_clip()
    name = encoder.fingerprint()
    assert encoder.fingerprint() == name
    weight = encoder.model.positional_embedding.data
    weight[3, 3] += 1e-3
    assert encoder.fingerprint() != name
    weight[3, 3] -= 1e-3


def test_cut_texts_are_noted(make_open_clip: Callable[..., Any]) -> None:
    encoder = make_open_clip()
    with pytest.warns(UserWarning, match=r"1 of 2 texts reach the end .* \(12 tokens\)"):
        long = encoder.encode_text(["a star", "red " * 40])
    ids = encoder.tokenize(["red " * 40])[0]
    assert ids[-1] == encoder.tokenize(["a"])[0, 2]  # the end is kept
    with torch.no_grad():
        assert torch.allclose(long[1], encoder.model.encode_text(ids[None])[0], atol=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"pool_type": "eos", "eos_id": 63}, "reads at token 63"),
        ({"pool_type": "argmax"}, "largest token id"),
    ],
)
def test_a_tokenizer_whose_end_is_elsewhere_is_refused(
    make_open_clip: Callable[..., Any], text: dict[str, Any], message: str
) -> None:
    class EndIsSmall(WordTokenizer):
        def __call__(self, texts: Any) -> Tensor:
            ids = super().__call__(texts)
            return torch.where(ids == self.eot_id, torch.tensor(2), ids)

    with pytest.raises(InterNegError, match=message):
        make_open_clip(False, EndIsSmall(["a", "photo", "red", "of"], 12), **text)


def test_a_placeholder_that_is_no_token_is_refused(mini: OpenClipEncoder) -> None:
    encoder = OpenClipEncoder(mini.model, mini._tokenizer, mini.preprocess, placeholder="two words")
    with pytest.raises(InterNegError, match="'two words' is one token"):
        _ = encoder.placeholder


class HFTokenizer:
    """The words of `WordTokenizer` with the call of transformers'."""

    def __init__(self, context: int) -> None:
        self.words = WordTokenizer(["a", "photo", "red", "star", "of", "the", "night"], context)

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Tensor]:
        assert options["padding"] == "max_length"
        assert options["max_length"] == self.words.context_length
        return {"input_ids": self.words(texts)}


def hf_model(kind: str, eos: int = 2) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs internet-neg[hf]")
    sides = {
        "text_config": {
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 12,
            "eos_token_id": eos,
            "projection_size": 16,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
    }
    config = {"clip": transformers.CLIPConfig, "siglip": transformers.SiglipConfig}[kind](**sides)
    model = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model(config)
    for parameter in made.parameters():
        parameter.data.mul_(3.0)
    made.logit_scale.data.fill_(2.0)
    return made


@pytest.mark.parametrize(("kind", "eos"), [("clip", 2), ("clip", 11), ("siglip", 11)])
def test_hugging_face_models(kind: str, eos: int) -> None:
    model, tokenizer = hf_model(kind, eos), HFTokenizer(12)
    assert tokenizer.words.eot_id == 11
    encoder = HFClipEncoder(model, tokenizer, lambda image: image)
    with torch.no_grad():
        full = model.get_text_features(input_ids=tokenizer.words(TEXTS)).pooler_output
        full = torch.nn.functional.normalize(full, dim=-1)
        pixels = torch.rand(2, 3, 16, 16)
        images = model.get_image_features(pixel_values=pixels).pooler_output
    length = 12 if kind == "siglip" else 3
    assert encoder.useful_length(encoder.tokenize(TEXTS[:1])) == length
    assert torch.allclose(unit_features(encoder, TEXTS), full, atol=2e-6)
    assert torch.allclose(encoder.encode_image(pixels), images)
    check_placeholder_path(encoder)


def test_hugging_face_errors() -> None:
    with pytest.raises(InterNegError, match="tokenizer that the model was trained with"):
        HFClipEncoder(hf_model("clip", 7), HFTokenizer(12), lambda image: image)
    with pytest.raises(InterNegError, match="Linear is no CLIP-like model"):
        HFClipEncoder(torch.nn.Linear(2, 2), HFTokenizer(12), lambda image: image)


def test_a_hugging_face_model_from_a_local_folder(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="needs internet-neg[hf]")
    hf_model("clip").save_pretrained(tmp_path)
    vocab = {"<|startoftext|>": 0, "a</w>": 1, "$</w>": 2, "photo</w>": 3, "<|endoftext|>": 31}
    vocab |= {letter: i for i, letter in enumerate("aphotosr$", start=4)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[])
    tokenizer.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(
        tmp_path
    )
    import PIL.Image

    encoder = load_encoder(str(tmp_path))
    assert encoder.source == {"library": "hf", "model": str(tmp_path), "pretrained": None}
    assert encoder.preprocess(PIL.Image.new("RGB", (20, 30))).shape == (3, 16, 16)
    assert encoder.encode_text(["a", "a $"]).shape == (2, 512)


def test_openais_weights_get_the_activation_they_were_trained_with(
    mini: OpenClipEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    asked = []

    def create(name: str, **options: Any) -> Any:
        asked.append((name, options["pretrained"]))
        return mini.model, None, mini.preprocess

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: mini._tokenizer)
    with pytest.warns(UserWarning, match="trained with QuickGELU: taking ViT-B-16-quickgelu"):
        encoder = load_encoder("ViT-B-16", "openai")
    assert asked == [("ViT-B-16-quickgelu", "openai")]
    assert encoder.source["model"] == "ViT-B-16-quickgelu"
    load_encoder("vit-b16")
    load_encoder("ViT-B-16", "laion2b_s34b_b88k")
    assert asked[1:] == [("ViT-B-16-quickgelu", "openai"), ("ViT-B-16", "laion2b_s34b_b88k")]
    # Weights and architecture in one, of open_clip's making, not transformers'.
    for name in ("hf-hub:owner/clip", "local-dir:some/folder"):
        source = load_encoder(name).source
        assert asked[-1] == (name, None)
        assert source == {"library": "open_clip", "model": name, "pretrained": None}
        load_encoder(name, None, library=source["library"])  # as a saved detector asks for it


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-16", None, "which weights for ViT-B-16"),
        ("ViT-Z-99", "openai-quickgelu", "open_clip cannot load 'ViT-Z-99'"),
        ("./no/such/folder", None, "transformers cannot load"),
    ],
)
def test_models_that_cannot_be_loaded(model: str, pretrained: str | None, message: str) -> None:
    if "transformers" in message:
        pytest.importorskip("transformers", reason="needs internet-neg[hf]")
    with pytest.raises(InterNegError, match=message):
        load_encoder(model, pretrained)


def test_openoods_transform_in_the_size_of_the_model() -> None:
    import PIL.Image
    from open_clip import image_transform

    ramp = torch.arange(300).clamp(max=255).byte().expand(400, 300).numpy()
    image = PIL.Image.fromarray(ramp).convert("RGB")
    for side in (224, 32):
        own = image_transform(side, is_train=False)
        found = load_transform("openood", SimpleNamespace(preprocess=own))(image)
        assert found.shape == (3, side, side)
        # The middle 224 of 256: of the ramp, more is cut away than by the model's own.
        assert found.std() < 0.95 * own(image).std()
