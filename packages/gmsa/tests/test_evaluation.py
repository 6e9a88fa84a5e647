"""The scores, the baselines and the compressor for strings."""

import sys
import types
import warnings

import pytest

from gmsa import qa_metrics, reconstruction_metrics
from gmsa.baselines import answer_plain, llmlingua2, shorten, truncate
from gmsa.demo import tell, tiny_compressor
from gmsa.demo_base import load_base, tokenizer
from gmsa.evaluation import bert_score, text_metrics
from gmsa.presets import PRESETS
from shared_core.errors import MissingExtraError


def test_losses_are_told() -> None:
    results = {
        "pooling, tuned": {0: {"qa": 0.55}, 1: {"qa": 0.56}},
        "truncation": {0: {"qa": 0.2}, 1: {"qa": 0.22}},
        "GMSA": {0: {"qa": 0.50}, 1: {"qa": 0.51}},
    }
    told = tell(results, 4)
    assert "-5.0 (standard error 0.0) against pooling, tuned." in told
    assert "+29.5" in told
    noisy = {"other": {0: {"qa": 0.4}, 1: {"qa": 0.6}}, "GMSA": {0: {"qa": 0.5}, 1: {"qa": 0.51}}}
    assert "within the noise" in tell(noisy, 4)


@pytest.mark.smoke
def test_scores() -> None:
    found = qa_metrics(["The Eiffel Tower!", "it is Rome"], [["eiffel tower"], ["Paris", "Rome"]])
    assert found == {"em": 0.5, "sub_em": 1.0, "f1": 0.75, "f1_first": 0.5}
    scores = reconstruction_metrics([[1, 2, 9, 4], [5]], [[1, 2, 3, 4], [5]])
    assert scores == {"prefix_em": 0.75, "token_acc": 0.8, "exact": 0.5}
    assert reconstruction_metrics([[9, 1]], [[1, 1]])["prefix_em"] == 0
    with pytest.raises(ValueError, match="1 predictions for 0"):
        qa_metrics(["a"], [])


@pytest.mark.parametrize(
    ("prediction", "references", "em", "f1"),
    [
        ("", [""], 1, 1), ("the", ["a"], 1, 1), ("", ["x"], 0, 0), ("x", [""], 0, 0),
        ("Ünïcode, yes", ["ünïcode yes"], 1, 1), ("b a", ["a b", "b a"], 1, 1),
    ],
)  # fmt: skip
def test_normal_forms(prediction, references, em, f1) -> None:
    found = qa_metrics([prediction], [references])
    assert (found["em"], found["f1"]) == (em, f1)
    assert found["sub_em"] >= found["em"]


def test_bleu_and_rouge_are_the_libraries() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    from shared_core.metrics.text import rouge_l

    said = ["the cat is on the mat", "a dog barks here today"]
    true = ["the cat sat on the mat", "a dog barks there today"]
    found = text_metrics(said, true)
    assert found["bleu"] == sacrebleu.corpus_bleu(said, [true]).score / 100
    assert found["rougeL"] == pytest.approx(
        sum(rouge_l(s, t) for s, t in zip(said, true, strict=True)) / 2
    )
    assert found["rouge1"] == pytest.approx((5 / 6 + 4 / 5) / 2)
    both = reconstruction_metrics([[1]], [[1]], (said, true))
    assert both["bleu"] == found["bleu"]


def test_bertscore_of_a_local_encoder(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bert_score")
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel

    words = tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    words.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    words.model_max_length = 64
    words.save_pretrained(tmp_path)
    BertModel(
        BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=16)
    ).save_pretrained(tmp_path)  # fmt: skip
    same = bert_score(["ba be bi"], ["ba be bi"], str(tmp_path))
    assert same == pytest.approx(1, abs=1e-5)
    assert bert_score(["ba be bi"], ["ca du do"], str(tmp_path)) < same
    with pytest.raises(ValueError, match="cannot be loaded"):
        bert_score(["a"], ["a"], str(tmp_path / "none"))


def test_baselines_shorten() -> None:
    words = tokenizer()
    text = "ba be bi bo bu"
    assert truncate(text, words, 2) == "ba be bi"
    assert shorten("truncation-end", words)(text, 4) == "bo bu"
    assert shorten("full", words)(text, 4) == text
    with pytest.raises(ValueError, match="accepted: full"):
        shorten("magic", words)


@pytest.mark.usefixtures("without_type_checks")
def test_llmlingua2_is_asked_for_the_rate(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llmlingua", None)
    with pytest.raises(MissingExtraError, match="llmlingua is not installed"):
        llmlingua2()
    asked = []

    class PromptCompressor:
        def __init__(self, name, *, device_map, use_llmlingua2):
            if name == "gone":
                raise OSError("no such weights\nmore")
            assert use_llmlingua2

        def compress_prompt(self, context, rate):
            asked.append((context, rate))
            return {"compressed_prompt": context[0][:2]}

    fake = types.ModuleType("llmlingua")
    fake.PromptCompressor = PromptCompressor
    monkeypatch.setitem(sys.modules, "llmlingua", fake)
    assert shorten("llmlingua2", None)("ba be", 4) == "ba"
    assert asked == [(["ba be"], 0.25)]
    with pytest.raises(ValueError, match="LLMLingua-2 cannot load gone: no such weights; give"):
        llmlingua2("gone")


def test_plain_answers_in_a_batch_equal_those_alone() -> None:
    model, words = load_base(), tokenizer()
    contexts, prompts = ["ba be bi bo bu", "", "ca ce"], ["Restate", "ba be", "Restate ca"]
    both = answer_plain(model, words, contexts, prompts, max_new_tokens=4)
    alone = [
        answer_plain(model, words, [c], [p], max_new_tokens=4)[0]
        for c, p in zip(contexts, prompts, strict=True)
    ]
    assert both == alone
    with pytest.raises(ValueError, match=r"has no \{prompt\}"):
        answer_plain(model, words, ["a"], ["b"], template="{context}")


def test_answers_and_budgets() -> None:
    compressor = tiny_compressor()
    texts = ["ba be bi bo bu", "ca ce"]
    soft = compressor.compress(texts, target_tokens=2)
    assert soft.lengths.tolist() == [2, 2]
    options = {"max_new_tokens": 3}
    both = compressor.answer(["ba", "be bi"], texts, 2, **options)
    alone = [
        compressor.answer(q, t, 2, **options) for q, t in zip(["ba", "be bi"], texts, strict=True)
    ]
    assert both == alone
    shared = compressor.answer(["ba", "be bi"], texts[0], 2, **options)
    assert shared[0] == alone[0]
    pieces = compressor.compress(texts, 2, chunk_size=3)
    assert pieces.lengths.tolist() == [3, 1]
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        compressor.compress(["ba", ""])
    assert compressor.compress(["ba", ""], allow_empty=True).lengths.tolist() == [1, 0]
    with pytest.raises(ValueError, match="2 questions for 3"):
        compressor.answer(["a", "b"], [*texts, "ba"])
    with pytest.raises(ValueError, match="target_tokens is 0"):
        compressor.compress("ba", target_tokens=0)


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p.model])
def test_presets_build_on_their_architecture(name, tiny_lm) -> None:
    from gmsa import GMSAConfig, GMSAModel

    preset = PRESETS[name]
    family = "qwen3" if "Qwen3" in preset.model else "llama"
    config = GMSAConfig(
        encoder_layers=preset.encoder_layers, lsa_layers=preset.lsa_layers, lora_r=2,
        rates=preset.rates, rate_sampling=preset.rate_sampling,
    )  # fmt: skip
    model = GMSAModel.from_backbone(tiny_lm(family, layers=9), config)
    assert len(model.encoder.layers) == 8
    assert len(model.lsa.layers) == 1
