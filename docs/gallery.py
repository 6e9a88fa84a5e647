"""Write the gallery: one static page that shows what every package's demo computed here.

Reads the run folders ``<runs>/<distribution>/demo`` and, for the wall time and the outcome,
``<out>/runs.json`` as ``nox -s demo`` keeps it. Needs nothing but Python.
"""

import argparse
import json
import os
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Method:
    """One package with a demo, as its ``pyproject.toml`` and README describe it."""

    dist: str
    title: str
    description: str
    script: str


@dataclass(frozen=True)
class Demo:
    """What is known about one run of one demo.

    Attributes:
        command: The command as typed.
        seconds: Wall time, if known.
        trouble: Why there is no result, in a sentence; ``None`` where there is one.
        message: What the demo saw, in its own words.
        rows: Its table, one mapping a row.
        picture: The picture's path, if it has one.
    """

    command: str
    seconds: float | None = None
    trouble: str | None = None
    message: str = ""
    rows: Sequence[Mapping[str, Any]] = field(default_factory=list)
    picture: Path | None = None


def read_methods(root: Path) -> list[Method]:
    """Find the packages below ``packages/`` that have a command, by name."""
    methods = []
    for file in sorted(root.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        if not project.get("scripts"):
            continue
        readme = file.parent / "README.md"
        lines = readme.read_text(encoding="utf-8").splitlines() if readme.is_file() else []
        title = next((line[2:].strip() for line in lines if line.startswith("# ")), project["name"])
        script = next(iter(project["scripts"]))
        methods.append(Method(project["name"], title, project.get("description", ""), script))
    return methods


def read_demo(method: Method, folder: Path, record: Mapping[str, Any] | None) -> Demo:
    """Read one run folder.

    Args:
        method: The package.
        folder: The run folder; it need not exist.
        record: The entry of ``runs.json``, if there is one: ``command``, ``seconds``, ``worked``.
    """
    record = record or {}
    seconds = record.get("seconds")
    command = str(record.get("command") or f"{method.script} demo --quick")
    again = f"uvx nox -s demo -- {method.dist}"
    if record.get("worked") is False:
        return Demo(command, seconds, f"This demo failed; “{again} --debug” shows why.")
    if not folder.is_dir():
        return Demo(command, seconds, f"Not run yet; “{again}” runs it.")
    try:
        if not record:
            command = str(_load(folder / "config.json")["command"])
        metrics = _load(folder / "metrics.json")
        summary = metrics["summary"]
        message, rows = str(summary["message"]), [dict(row) for row in summary["rows"]]
        name = summary.get("picture")
        if seconds is None:
            seconds = metrics.get("timing", {}).get("seconds")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        return Demo(command, seconds, f"The run left no summary that can be read ({why}).")
    picture = None
    # A name with a path in it could point outside the run folder.
    if name and Path(name).name == name and (folder / name).is_file():
        picture = folder / name
    return Demo(command, seconds, None, message, rows, picture)


def _load(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} does not hold a JSON object")
    return value


def format_cell(value: Any) -> str:
    """Write a table cell for a reader: four significant digits, a dash where there is nothing."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return str(value)


def format_seconds(seconds: float) -> str:
    """Write a duration: 8.1 s, 42 s, 3 min 20 s."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _is_number(text: str) -> bool:
    return text.lstrip("+-−±<>≤≥~ ")[:1].isdigit() or text == "–"


def render_table(rows: Sequence[Mapping[str, Any]], label: str) -> str:
    """Render rows as a table that scrolls inside its card where it is too wide.

    Args:
        rows: One mapping a row; columns appear in the order in which the rows bring them.
        label: What the table holds, for a screen reader.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return ""
    cells = [[format_cell(row.get(column)) for column in columns] for row in rows]
    numeric = [all(_is_number(line[i]) for line in cells) for i in range(len(columns))]

    def row(line: Sequence[str], tag: str) -> str:
        start = '<th scope="col"' if tag == "th" else "<td"
        parts = [
            start + (' class="n">' if right else ">") + f"{escape(text)}</{tag}>"
            for text, right in zip(line, numeric, strict=True)
        ]
        return f"<tr>{''.join(parts)}</tr>"

    body = "\n".join(row(line, "td") for line in cells)
    head = row([str(column) for column in columns], "th")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">\n'
        f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>\n"
    )


def render_card(method: Method, demo: Demo) -> str:
    """Render one method's card; its picture is expected beside the page as ``<dist>.png``."""
    parts = [
        f'<article class="card" id="{escape(method.dist)}">',
        f"<h2>{escape(method.title)}</h2>",
        f"<p>{escape(method.description)}</p>",
    ]
    if demo.trouble:
        parts.append(f'<p class="trouble">{escape(demo.trouble)}</p>')
    if demo.picture:
        alt = f"Chart from the {method.title} demo; what it shows is said below it."
        source = f"{escape(method.dist)}.png"
        # The link is for small screens: it opens the picture at its own size.
        parts.append(f'<a href="{source}"><img src="{source}" alt="{escape(alt)}"></a>')
    table = render_table(demo.rows, f"Numbers of the {method.title} demo")
    if table:
        parts.append(table.rstrip())
    if demo.message:
        parts.append(f'<p class="message">{escape(demo.message)}</p>')
    took = f"<span>{format_seconds(demo.seconds)}</span>" if demo.seconds is not None else ""
    parts.append(f'<p class="run"><code>{escape(demo.command)}</code>{took}</p>')
    parts.append("</article>")
    return "\n".join(parts) + "\n"


STYLE = """\
:root { color-scheme: light dark; --page: #f5f5f3; --card: #fff; --text: #1c1c1a; --soft: #5d5d58;
  --line: #d9d9d4; --accent: #005a8f; --bad: #a63200; }
@media (prefers-color-scheme: dark) {
  :root { --page: #161615; --card: #21211f; --text: #ecece8; --soft: #a9a9a2; --line: #3d3d39;
    --accent: #6cb8e6; --bad: #ff9a6b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.25rem; background: var(--page);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { margin: 0 0 .25rem; font-size: 1.6rem; line-height: 1.2; }
h2 { margin: 0; font-size: 1.2rem; line-height: 1.3; }
p { margin: 0; }
header p, footer { color: var(--soft); }
a { color: var(--accent); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .75rem 0 1.25rem; padding: 0;
  list-style: none; }
nav a { display: inline-block; padding: .25rem 0; }
main { display: grid; gap: 1.25rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }
.card { display: flex; flex-direction: column; gap: .75rem; padding: 1rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.card img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff;
  border-radius: .25rem; }
.scroll { overflow-x: auto; background:
  linear-gradient(var(--card) 0 0) right / 2rem no-repeat local,
  linear-gradient(to left, var(--line), transparent) right / .75rem no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--card); }
.n { text-align: right; }
.message { white-space: pre-line; }
.trouble { color: var(--bad); font-weight: 600; }
.run { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .25rem 1rem;
  margin-top: auto; padding-top: .5rem; color: var(--soft); font-size: .9rem; }
code { overflow-wrap: anywhere; font: .9em ui-monospace, monospace; }
footer { margin-top: 1.25rem; font-size: .9rem; }
"""


def render_page(cards: Sequence[tuple[Method, Demo]]) -> str:
    """Render the whole page."""
    links = "\n".join(
        f'<li><a href="#{escape(m.dist)}">{escape(m.title)}</a></li>' for m, _ in cards
    )
    nav = f'<nav aria-label="Methods">\n<ul>\n{links}\n</ul>\n</nav>\n' if cards else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>tenfold: the gallery</title>\n"
        f"<style>\n{STYLE}</style>\n</head>\n<body>\n"
        "<header>\n<h1>tenfold: the gallery</h1>\n"
        "<p>Every picture and number below was computed on this machine, by the command "
        f"under it.</p>\n{nav}</header>\n<main>\n"
        + "".join(render_card(method, demo) for method, demo in cards)
        + "</main>\n<footer>The run folders beside this page hold the settings, the versions and "
        "all numbers of each demo.</footer>\n</body>\n</html>\n"
    )


def write_gallery(root: Path, runs: Path, out: Path) -> Path:
    """Write ``index.html`` and the pictures into `out`.

    Args:
        root: The repository.
        runs: The folder that holds ``<distribution>/demo``.
        out: The folder of the page; made if absent.

    Returns:
        The page.
    """
    out.mkdir(parents=True, exist_ok=True)
    record_file = out / "runs.json"
    record = _load(record_file) if record_file.is_file() else {}
    cards = []
    for method in read_methods(root):
        demo = read_demo(method, runs / method.dist / "demo", record.get(method.dist))
        target = out / f"{method.dist}.png"
        target.unlink(missing_ok=True)
        if demo.picture:
            shutil.copyfile(demo.picture, target)
        cards.append((method, demo))
    page = out / "index.html"
    temporary = out / ".index.html.tmp"
    temporary.write_text(render_page(cards), encoding="utf-8")
    os.replace(temporary, page)
    return page


def main() -> None:
    """Read the options and write the page."""
    parser = argparse.ArgumentParser(description="Write the gallery page of the demos' runs.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the runs are")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs/gallery", help="where the page goes"
    )
    options = parser.parse_args()
    print(write_gallery(options.root, options.runs, options.out))


if __name__ == "__main__":
    main()
