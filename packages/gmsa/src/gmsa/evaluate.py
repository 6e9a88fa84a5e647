"""Runs of the evaluation protocol: predictions into a folder, and their scores."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gmsa.baselines import answer_plain, shorten
from gmsa.compressor import GMSACompressor
from gmsa.evaluation import bert_score, qa_metrics, reconstruction_metrics, text_metrics
from shared_core.checkpoints import check_same
from shared_core.errors import InputError
from shared_core.run import RunFolder, progress, to_plain

__all__ = [
    "Predictions",
    "evaluate_qa",
    "evaluate_reconstruction",
    "finish",
    "predict",
    "qa_figure",
]


class Predictions:
    """The lines of ``predictions.jsonl``, of which a resumed run keeps those that are there.

    Args:
        folder: Where the file is.
        settings: What the predictions depend on; a resumed run has to have the same.
        resume: Go on with the file that is there.

    Raises:
        InputError: If there is one and it is not to be resumed, or was made with other settings.

    Examples:
        >>> folder = getfixture("tmp_path")
        >>> rows = Predictions(folder, {})
        >>> list(rows.fill("gmsa", 4, 2, lambda some: [{"text": str(i)} for i in some], 1))
        [{'text': '0'}, {'text': '1'}]
        >>> len(Predictions(folder, {}, resume=True))
        2
    """

    NAME = "predictions.jsonl"

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = folder / self.NAME
        self._rows: dict[tuple[str, int, int], dict[str, Any]] = {}
        if not self.path.is_file():
            return
        if not resume:
            raise InputError(
                f"{folder} holds the predictions of an earlier run; continue it with --resume, or "
                "choose another --out"
            )
        check_same(settings, folder)
        whole = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line)
                key = (row.pop("method"), row.pop("rate"), row.pop("index"))
            except (ValueError, KeyError, AttributeError):
                break  # what a killed run left of its last line
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            self._rows[key] = row
        with open(self.path, "rb+") as file:
            file.truncate(whole)

    def __len__(self) -> int:
        return len(self._rows)

    def fill(
        self,
        method: str,
        rate: int,
        count: int,
        make: Callable[[list[int]], list[dict[str, Any]]],
        batch_size: int,
    ) -> Iterator[dict[str, Any]]:
        """The rows 0 to `count` of a method at a rate; those that lack are made and written.

        Args:
            method: Its name.
            rate: The rate.
            count: How many rows.
            make: From some indices to their rows.
            batch_size: How many at a time.
        """
        todo = [i for i in range(count) if (method, rate, i) not in self._rows]
        starts = range(0, len(todo), batch_size)
        for begin in progress(starts, description=f"{method} at {rate}x", unit="batch"):
            some = todo[begin : begin + batch_size]
            rows = make(some)
            lines = []
            for index, row in zip(some, rows, strict=True):
                self._rows[method, rate, index] = row
                lines.append({"method": method, "rate": rate, "index": index, **row})
            text = "".join(
                json.dumps(to_plain(line), ensure_ascii=False, allow_nan=False) + "\n"
                for line in lines
            )
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
        for index in range(count):
            yield self._rows[method, rate, index]


def predict(
    name: str,
    settings: Mapping[str, Any],
    out: Path | None,
    count: int,
    make: Callable[[list[int]], list[dict[str, Any]]],
    *,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """The rows of a command: into a run's folder where there is one, going on there if asked to.

    Args:
        name: The command.
        settings: What its rows depend on.
        out: The folder, or none.
        count: How many rows.
        make: From some indices to their rows.
        resume: Keep the rows that the folder has.

    Raises:
        InputError: If there is nothing to resume, or it was another run.

    Examples:
        >>> predict("answer", {}, None, 2, lambda some: [{"text": str(i)} for i in some])
        [{'text': '0'}, {'text': '1'}]
    """
    if out is None:
        if resume:
            raise InputError("--resume needs the --out of the run to continue")
        return make(list(range(count)))
    run = RunFolder(out)
    predictions = Predictions(run.path, settings, resume=resume)
    run.write_config(f"gmsa {name}", settings, distributions=["gmsa", "transformers"])
    return list(predictions.fill(name, 0, count, make, 8))


def finish(out: Path | None, metrics: Mapping[str, Any]) -> None:
    """Write a command's metrics into a run's folder, where there is one.

    Examples:
        >>> finish(None, {})
    """
    if out is not None:
        RunFolder(out).write_metrics(metrics)


def evaluate_qa(
    compressor: GMSACompressor,
    records: Sequence[Mapping[str, Any]],
    rates: Sequence[int],
    predictions: Predictions,
    *,
    baselines: Sequence[str] = (),
    base: Any = None,
    batch_size: int = 8,
    prompt_template: str = "{prompt}",
    baseline_template: str = "{context}\n{prompt}",
    llmlingua2_model: str | None = None,
    **gen_kwargs: Any,
) -> list[dict[str, Any]]:
    """Answer questions from compressed contexts, and as baselines do, and score the answers.

    Args:
        compressor: The compressor.
        records: See `gmsa.data.read_records`.
        rates: Compression rates.
        predictions: Where the answers go.
        baselines: Some of `gmsa.baselines.BASELINES`.
        base: The language model of the baselines; the compressor's decoder by default.
        batch_size: Questions answered together.
        prompt_template: Around each question after soft tokens.
        baseline_template: Around context and question of the baselines.
        llmlingua2_model: See `gmsa.baselines.llmlingua2`.
        gen_kwargs: Those of ``generate``.

    Returns:
        A row a method and rate: ``em``, ``sub_em``, ``f1``, ``f1_first`` in [0, 1], and the mean
        achieved ``ratio`` of context tokens to what took their place.
    """
    tokenizer = compressor.tokenizer
    model = compressor.model.decoder if base is None else base
    place = str(model.get_input_embeddings().weight.device)
    methods = {
        name: shorten(name, tokenizer, llmlingua2_model=llmlingua2_model, device=place)
        for name in baselines
    }

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def compressed(rate: int) -> Callable[[list[int]], list[dict[str, Any]]]:
        def make(some: list[int]) -> list[dict[str, Any]]:
            rows = [records[i] for i in some]
            soft = compressor.compress([r["input"] for r in rows], rate, batch_size=batch_size)
            answers = compressor.answer(
                [r["prompt"] for r in rows], soft, prompt_template=prompt_template,
                batch_size=batch_size, **gen_kwargs,
            )  # fmt: skip
            return [
                {"prediction": a, "tokens": n, "kept": g}
                for a, n, g in zip(
                    answers, soft.n_tokens.tolist(), soft.lengths.tolist(), strict=True
                )
            ]

        return make

    def baseline(name: str, rate: int) -> Callable[[list[int]], list[dict[str, Any]]]:
        def make(some: list[int]) -> list[dict[str, Any]]:
            rows = [records[i] for i in some]
            contexts = [methods[name](r["input"], rate) for r in rows]
            answers = answer_plain(
                model, tokenizer, contexts, [r["prompt"] for r in rows],
                template=baseline_template, **gen_kwargs,
            )  # fmt: skip
            return [
                {"prediction": a, "tokens": tokens(r["input"]), "kept": tokens(c)}
                for a, r, c in zip(answers, rows, contexts, strict=True)
            ]

        return make

    plan = [("gmsa", rate, compressed(rate)) for rate in rates]
    for name in methods:
        # Nothing of these two depends on the rate.
        plan += [
            (name, rate, baseline(name, rate))
            for rate in ((1,) if name in ("full", "closed-book") else rates)
        ]
    table = []
    references = [record["answer"] for record in records]
    for name, rate, make in plan:
        rows = list(predictions.fill(name, rate, len(records), make, batch_size))
        scores = qa_metrics([row["prediction"] for row in rows], references)
        kept = sum(row["kept"] for row in rows)
        ratio = sum(row["tokens"] for row in rows) / kept if kept else None
        table.append({"method": name, "rate": rate, **scores, "ratio": ratio, "items": len(rows)})
    return table


def evaluate_reconstruction(
    compressor: GMSACompressor,
    records: Sequence[Mapping[str, Any]],
    rates: Sequence[int],
    predictions: Predictions,
    *,
    max_tokens: int | None = None,
    batch_size: int = 8,
    libraries: bool = True,
    bertscore_model: str | None = None,
    **gen_kwargs: Any,
) -> list[dict[str, Any]]:
    """Restate contexts from their soft tokens and score what comes out.

    Args:
        compressor: A compressor after its autoencoding stage.
        records: With ``input``.
        rates: Compression rates.
        predictions: Where the texts go.
        max_tokens: Only so many first tokens of a context.
        batch_size: Contexts restated together.
        libraries: Whether BLEU and ROUGE are wanted.
        bertscore_model: The encoder of BERTScore, if wanted.
        gen_kwargs: Those of ``generate``.

    Returns:
        A row a rate: ``prefix_em``, ``token_acc``, ``exact``, and the texts' scores.
    """
    tokenizer, instruction = compressor.tokenizer, compressor.model.config.restate_instruction
    references = [
        tokenizer(record["input"], add_special_tokens=False)["input_ids"][:max_tokens]
        for record in records
    ]
    texts = [tokenizer.decode(ids) for ids in references]
    table = []
    for rate in rates:

        def make(some: list[int], rate: int = rate) -> list[dict[str, Any]]:
            soft = compressor.compress_ids([references[i] for i in some], rate)
            new = compressor.answer_ids(
                [instruction] * len(some), soft,
                max_new_tokens=1 + max(len(references[i]) for i in some), **gen_kwargs,
            )  # fmt: skip
            # A row is cut where its own context ended, whatever longer rows are beside it.
            rows = [ids[: 1 + len(references[i])] for i, ids in zip(some, new, strict=True)]
            return [{"ids": ids, "prediction": tokenizer.decode(ids)} for ids in rows]

        rows = list(predictions.fill("gmsa", rate, len(records), make, batch_size))
        scores = reconstruction_metrics([row["ids"] for row in rows], references)
        restated = [row["prediction"] for row in rows]
        if libraries:
            scores |= text_metrics(restated, texts)
        if bertscore_model is not None:
            place = str(compressor.model.get_input_embeddings().weight.device)
            scores["bertscore"] = bert_score(restated, texts, bertscore_model, device=place)
        table.append({"method": "gmsa", "rate": rate, **scores, "items": len(rows)})
    return table


def qa_figure(table: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> Any:
    """A figure of scores by rate, a line a method and a panel a score.

    Examples:
        >>> rows = [{"method": "gmsa", "rate": 4, "em": 0.5}]
        >>> qa_figure(rows, ["em"]).axes[0].get_ylabel()
        'em'
    """
    from shared_core.plots import COLORS, new_figure

    figure, axes = new_figure(1, len(keys), squeeze=False)
    methods = list(dict.fromkeys(row["method"] for row in table))
    for axis, key in zip(axes[0], keys, strict=True):
        rates = sorted({row["rate"] for row in table if row["method"] == methods[0]})
        for number, method in enumerate(methods):
            rows = [row for row in table if row["method"] == method]
            color = COLORS[number % len(COLORS)]
            if len(rows) == 1 and len(rates) > 1:
                axis.axhline(rows[0][key], color=color, linestyle="--", label=method)
            else:
                xs, ys = [r["rate"] for r in rows], [r[key] for r in rows]
                axis.plot(xs, ys, marker="o", color=color, label=method)
        axis.set_xscale("log", base=2)
        axis.set_xticks(rates, [f"{r}x" for r in rates])
        axis.minorticks_off()
        axis.set_xlabel("compression rate")
        axis.set_ylabel(key)
        axis.set_ylim(0, 1)
    axes[0][0].legend()
    return figure
