"""The pictures: methods side by side, error along the text, κ where it sits, λ over a text."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shared_core.plots import COLORS, new_figure

if TYPE_CHECKING:
    from bridge_garden.demo import KappaPicture
    from bridge_garden.exposure import ExposureReport
    from shared_core.run import RunFolder

__all__ = [
    "plot_comparison",
    "plot_kappa",
    "plot_positions",
    "plot_strip",
    "save_strip",
    "strip_html",
]

KINDS = {"start": COLORS[7], "filler": COLORS[2], "op": COLORS[0], "result": COLORS[3]}
LABELS = {
    "start": "start",
    "filler": "filler (garden)",
    "op": "operation",
    "result": "result (bridge)",
}


def plot_comparison(methods: Mapping[str, Any], teacher_entropy: float) -> Any:
    """Bridge accuracy against garden entropy, and the two parts of the inference error.

    Args:
        methods: What `bridge_garden.demo.summarize` returned, by title.
        teacher_entropy: In nats.
    """
    figure, (left, right) = new_figure(1, 2, figsize=(10.2, 4.0))
    for i, (title, entry) in enumerate(methods.items()):
        x, y = entry["garden_entropy"], entry["bridge_accuracy"]
        left.errorbar(
            x["mean"],
            y["mean"],
            xerr=x["standard_error"],
            yerr=y["standard_error"],
            fmt="o",
            color=COLORS[i % len(COLORS)],
            label=title,
        )
    left.axvline(teacher_entropy, color="grey", linestyle=":")
    left.annotate(
        "teacher ", (teacher_entropy, left.get_ylim()[1]), color="grey", ha="right", va="top"
    )
    left.set_xlabel("entropy in gardens (nats): diversity")
    left.set_ylabel("right results in own texts: safety on bridges")
    left.set_title("The dilemma: up and to the right is better")
    left.legend(fontsize="small")
    # Hard labels and reverse KL give some tokens no mass: their forward KL is off the scale.
    least = min(e["inference"]["mean"] for e in methods.values())
    shown = {t: e for t, e in methods.items() if e["inference"]["mean"] < 5 * least}
    names = list(shown)
    fit = [shown[t]["fit"]["mean"] for t in names]
    bias = [shown[t]["bias"]["mean"] for t in names]
    errors = [shown[t]["inference"]["standard_error"] or 0 for t in names]
    right.barh(names, fit, color=COLORS[0], label="training fit")
    right.barh(names, bias, left=fit, xerr=errors, color=COLORS[1], label="exposure bias")
    right.set_ylim(len(names) + 0.4, -0.6)  # room for the legend below the bars
    right.set_xlabel("inference error (forward KL per position, nats)")
    right.set_title("Inference error of those on this scale")
    right.legend(fontsize="small", loc="lower right", ncols=2)
    return figure


def plot_positions(reports: Mapping[str, "ExposureReport"]) -> Any:
    """Excess loss on the student's own prefixes, accumulated along the text.

    Args:
        reports: By title.
    """
    figure, axes = new_figure(1, 1, figsize=(7.2, 3.8))
    for i, (title, report) in enumerate(reports.items()):
        pairs = zip(report.per_position_inference, report.per_position_fit, strict=True)
        total, line = 0.0, []
        for own, theirs in pairs:
            total += own - theirs
            line.append(total)
        axes.plot(range(1, len(line) + 1), line, color=COLORS[i % len(COLORS)], label=title)
    axes.set_xlabel("position in the text")
    axes.set_ylabel("accumulated exposure bias (nats)")
    axes.set_title("Exposure bias grows with the text")
    axes.legend(fontsize="small")
    return figure


def plot_kappa(picture: "KappaPicture") -> Any:
    """Exact κ(s) by place, against λ, and the exposure bias that each place causes.

    Args:
        picture: What `bridge_garden.demo.kappa_picture` returned.
    """
    figure, axes = new_figure(1, 3, figsize=(13.5, 3.8))
    places = range(1, len(picture.kinds) + 1)
    colors = [KINDS[k] for k in picture.kinds]
    axes[0].bar(places, picture.by_place, color=colors)
    axes[0].set_xlabel("place in the text")
    axes[0].set_ylabel("mean κ(s)")
    axes[0].set_title("Exact κ(s), every token tried")
    for kind, color in KINDS.items():
        at = [i for i, k in enumerate(picture.score_kinds) if k == kind]
        axes[1].scatter(
            [picture.scores[i] for i in at],
            [picture.weights[i] for i in at],
            s=12,
            alpha=0.6,
            color=color,
            label=LABELS[kind],
        )
    axes[1].set_xlabel("κ(s)")
    axes[1].set_ylabel("λ = 1 - max π_T")
    axes[1].set_title("The confidence weight against κ(s)")
    axes[1].legend(fontsize="small")
    axes[2].bar(places, picture.decomposition.attribution, color=colors)
    axes[2].set_xlabel("place in the text")
    axes[2].set_ylabel("exposure bias caused here")
    axes[2].set_title("Where exposure bias is caused")
    return figure


def plot_strip(tokens: Sequence[str], values: Sequence[float], label: str) -> Any:
    """A text whose tokens are coloured by a value.

    Args:
        tokens: The texts of the tokens.
        values: One per token; NaN stays white.
        label: What the colour means.
    """
    import math

    import matplotlib as mpl

    known = [v for v in values if math.isfinite(v)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    norm = mpl.colors.Normalize(low, high if high > low else low + 1)
    cmap = mpl.colormaps["YlOrRd"]
    columns, width = 88, 0
    lines: list[list[tuple[int, str, float]]] = [[]]
    for token, value in zip(tokens, values, strict=True):
        text = token.replace("\n", "⏎").replace("\t", "→") or "·"
        if width + len(text) > columns and lines[-1]:
            lines.append([])
            width = 0
        lines[-1].append((width, text, value))
        width += len(text)
    figure, axes = new_figure(1, 1, figsize=(11, 0.9 + 0.34 * len(lines)))
    axes.set_axis_off()
    axes.set_xlim(0, columns)
    axes.set_ylim(len(lines), 0)
    for row, line in enumerate(lines):
        for start, text, value in line:
            color = cmap(norm(value)) if math.isfinite(value) else (1, 1, 1, 0)
            ink = "white" if math.isfinite(value) and norm(value) > 0.65 else "black"
            for i, letter in enumerate(text):
                axes.add_patch(
                    mpl.patches.Rectangle((start + i, row + 0.08), 1, 0.84, color=color, lw=0)
                )
                axes.text(
                    start + i + 0.5,
                    row + 0.5,
                    letter,
                    ha="center",
                    va="center",
                    family="monospace",
                    fontsize=8.5,
                    color=ink,
                )
    figure.colorbar(
        mpl.cm.ScalarMappable(norm, cmap),
        ax=axes,
        label=label,
        orientation="horizontal",
        fraction=0.25 if len(lines) < 4 else 0.08,
        aspect=60,
    )
    return figure


def strip_html(tokens: Sequence[str], values: Sequence[float], label: str) -> str:
    """The same strip as a page of HTML; hovering shows the value.

    Args:
        tokens: The texts of the tokens, escaped.
        values: One per token; NaN stays white.
        label: What the colour means.
    """
    import math

    known = [v for v in values if math.isfinite(v)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    spans = []
    for token, value in zip(tokens, values, strict=True):
        if not math.isfinite(value):
            spans.append(f"<span>{token}</span>")
            continue
        share = (value - low) / (high - low) if high > low else 0.0
        style = f"background:rgba(214,94,0,{share:.3f})"
        spans.append(f'<span style="{style}" title="{value:.4f}">{token}</span>')
    body = "".join(spans)
    return (
        f'<!doctype html><meta charset="utf-8"><title>{label}</title><p>{label}</p>'
        f'<pre style="font-size:16px;white-space:pre-wrap">{body}</pre>\n'
    )


def save_strip(
    run: "RunFolder", name: str, tokens: Sequence[str], values: Sequence[float], label: str
) -> None:
    """Write the strip of a text into a run folder, as ``NAME.png`` and ``NAME.html``.

    Args:
        run: The folder.
        name: Of the files.
        tokens: The texts of the tokens.
        values: One per token; NaN stays white.
        label: What the colour means.
    """
    import html

    from shared_core.run import atomic_path

    run.save_figure(name, plot_strip(tokens, values, label))
    with atomic_path(run.path / f"{name}.html") as temporary:
        page = strip_html([html.escape(token) for token in tokens], values, label)
        temporary.write_text(page, encoding="utf-8")
