"""Pages that mkdocs makes from what the repository already says.

Nothing is written by hand per package: a method's page is its README, and each of its public
modules gets a page of the API reference, made from its docstrings.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
METHODS = {p.parent.name: p.parent for p in sorted(ROOT.glob("packages/*/pyproject.toml"))}
PACKAGES = METHODS | {"shared-core": ROOT / "shared"}
TEXTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
WORDNET_LICENSE = "packages/internet-neg/src/internet_neg/data/WORDNET_LICENSE"
FILES = ["LICENSE", "CITATION.cff", WORDNET_LICENSE]
GALLERY = ROOT / "runs" / "gallery"
TUTORIALS = ROOT / "docs" / "tutorials"


def public_modules(package: Path) -> list[str]:
    """The importable names of a package's public modules, the package itself first."""
    source = package / "src"
    names = []
    for file in source.rglob("*.py"):
        parts = file.relative_to(source).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        # The page of command lines says what a cli module has.
        if not any(part.startswith("_") or part == "cli" for part in parts):
            names.append(".".join(parts))
    return sorted(names)


def page_of(target: str) -> str:
    """The page of the site that shows a file or folder of the repository."""
    for name, folder in PACKAGES.items():
        path = folder.relative_to(ROOT).as_posix()
        if target in (path, f"{path}/README.md"):
            return f"methods/{name}.md"
    return TEXTS.get(target, target.removeprefix("docs/"))


def with_links_to_pages(text: str, folder: Path, page: str) -> str:
    """Point the links of a file in `folder`, which becomes `page`, at the site's pages."""

    def link(found: re.Match[str]) -> str:
        path, *anchor = found[1].split("#")
        file = (folder / path).resolve()
        if not file.exists() or not file.is_relative_to(ROOT):
            return found[0]  # code such as `methods[0](x)`, or a broken link, which strict refuses
        target = page_of(file.relative_to(ROOT).as_posix())
        return f"]({'#'.join([posixpath.relpath(target, posixpath.dirname(page)), *anchor])})"

    return re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", link, text)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the navigation."""
    config.nav = [
        {"Home": "index.md"},
        {"Which method": "which.md"},
        {"Methods": [{name: f"methods/{name}.md"} for name in PACKAGES]},
        {"Together": [f"tutorials/{file.name}" for file in sorted(TUTORIALS.glob("*.md"))]},
        {"The papers' runs": "recipes.md"},
        {"Command lines": "commands.md"},
        {"Measured": "measured.md"},
        {
            "API": [
                {name: [{module: f"api/{module}.md"} for module in public_modules(folder)]}
                for name, folder in PACKAGES.items()
            ]
        },
        {
            "Project": [
                {"Contributing": "contributing.md"},
                {"Benchmarks": "benchmarks.md"},
                {"Changelog": "changelog.md"},
                {"Security": "security.md"},
            ]
        },
    ]
    if (GALLERY / "index.html").is_file():
        config.nav.insert(1, {"Gallery": "gallery/index.html"})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""

    def add(path: str, content: str | bytes) -> None:
        files.append(File.generated(config, path, content=content))

    for source, page in TEXTS.items():
        file = ROOT / source
        text = file.read_text(encoding="utf-8")
        add(page, with_links_to_pages(text, file.parent, page))
    for name in FILES:
        add(name, (ROOT / name).read_bytes())
    for name, folder in PACKAGES.items():
        card = (folder / "README.md").read_text(encoding="utf-8")
        add(f"methods/{name}.md", with_links_to_pages(card, folder, f"methods/{name}.md"))
        for module in public_modules(folder):
            add(f"api/{module}.md", f"# `{module}`\n\n::: {module}\n")
    for file in [*GALLERY.glob("index.html"), *GALLERY.glob("*.png")]:
        add(f"gallery/{file.name}", file.read_bytes())
    return files
