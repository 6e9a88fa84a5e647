"""The gallery page: what it says, that it is sound HTML, and how a real browser lays it out."""

import contextlib
import functools
import html.parser
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MAGENTA = (255, 0, 255)
VOID = {"meta", "img", "link", "br", "hr"}


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs/gallery.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gallery"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def add_package(root: Path, dist: str, description: str = "A method.", readme: str = "") -> None:
    folder = root / "packages" / dist
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "{dist}"\ndescription = {json.dumps(description)}\n'
        f'[project.scripts]\n{dist} = "{dist}.cli:main"\n'
    )
    (folder / "README.md").write_text(readme)


def add_run(root: Path, dist: str, summary: Any, *, seconds: float = 12.3) -> Path:
    folder = root / "runs" / dist / "demo"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"command": f"{dist} demo"}))
    (folder / "metrics.json").write_text(
        json.dumps({"summary": summary, "timing": {"seconds": seconds}})
    )
    return folder


def add_record(root: Path, **records: dict[str, Any]) -> None:
    (root / "runs/gallery").mkdir(parents=True, exist_ok=True)
    (root / "runs/gallery/runs.json").write_text(json.dumps(records))


def write(gallery: ModuleType, root: Path) -> str:
    page = gallery.write_gallery(root, root / "runs", root / "runs/gallery")
    text = page.read_text(encoding="utf-8")
    check_html(text)
    return text


class Sound(html.parser.HTMLParser):
    """Checks what a browser forgives: open or crossed elements, repeated ids, no alt text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), (tag, attrs)
        assert tag not in {"script", "iframe", "link", "object"}
        assert not [name for name in given if name.startswith("on")]
        if tag == "img":
            assert given["alt"]
            self.sources.append(given["src"])
        if "id" in given:
            self.ids.append(given["id"])
        if "href" in given:
            self.links.append(given["href"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            assert "url(" not in data
            assert "@import" not in data


def check_html(text: str) -> Sound:
    assert text.startswith("<!DOCTYPE html>\n")
    sound = Sound()
    sound.feed(text)
    sound.close()
    assert sound.open == []
    assert len(sound.ids) == len(set(sound.ids))
    assert set(sound.links) <= {f"#{name}" for name in sound.ids} | set(sound.sources)
    assert all(re.fullmatch(r"[\w.-]+\.png", source) for source in sound.sources)
    return sound


SUMMARY = {
    "message": "Focal beat SGD by 1.0 ± 0.2 points.",
    "rows": [
        {"method": "SGD", "accuracy": 0.91924, "tail": "86.1 ± 4"},
        {"method": "Focal", "accuracy": 0.9295, "extra": None},
    ],
    "picture": "sharpness.png",
}


@pytest.mark.smoke
def test_a_card_shows_title_description_picture_table_message_command_and_time(
    gallery: ModuleType, tmp_path: Path
) -> None:
    add_package(tmp_path, "focal-sam", "Sharpness for the tail.", "# Focal-SAM\n\nText.\n")
    folder = add_run(tmp_path, "focal-sam", SUMMARY)
    Image.new("RGB", (40, 20), MAGENTA).save(folder / "sharpness.png")
    add_record(
        tmp_path,
        **{"focal-sam": {"command": "focal-sam demo --quick", "seconds": 31.4, "worked": True}},
    )
    page = write(gallery, tmp_path)
    assert (
        '<h2>Focal-SAM</h2>\n<p>Sharpness for the tail.</p>\n<a href="focal-sam.png"><img ' in page
    )
    assert (
        '<thead><tr><th scope="col">method</th><th scope="col" class="n">accuracy</th>'
        '<th scope="col" class="n">tail</th><th scope="col" class="n">extra</th></tr></thead>'
    ) in page
    assert '<tr><td>SGD</td><td class="n">0.9192</td><td class="n">86.1 ± 4</td>' in page
    assert '<td class="n">–</td></tr>' in page
    assert "Focal beat SGD by 1.0 ± 0.2 points." in page
    assert "<code>focal-sam demo --quick</code><span>31 s</span>" in page
    with Image.open(tmp_path / "runs/gallery/focal-sam.png") as picture:
        assert picture.size == (40, 20)


def test_without_a_record_the_run_folder_tells_command_and_time(
    gallery: ModuleType, tmp_path: Path
) -> None:
    add_package(tmp_path, "abkd")
    add_run(tmp_path, "abkd", {"message": "m", "rows": []}, seconds=200)
    page = write(gallery, tmp_path)
    assert "<h2>abkd</h2>" in page
    assert "<code>abkd demo</code><span>3 min 20 s</span>" in page
    assert "<table" not in page
    assert "<img" not in page


def test_a_failed_demo_gets_a_card_that_says_so_and_none_of_the_old_numbers(
    gallery: ModuleType, tmp_path: Path
) -> None:
    add_package(tmp_path, "abkd")
    folder = add_run(tmp_path, "abkd", SUMMARY)
    Image.new("RGB", (4, 4)).save(folder / "sharpness.png")
    write(gallery, tmp_path)
    assert (tmp_path / "runs/gallery/abkd.png").is_file()
    add_record(tmp_path, abkd={"command": "abkd demo --quick", "seconds": 1.5, "worked": False})
    page = write(gallery, tmp_path)
    assert "This demo failed; “uvx nox -s demo -- abkd --debug” shows why." in page
    assert "Focal beat SGD" not in page
    assert "<code>abkd demo --quick</code><span>1.5 s</span>" in page
    assert not (tmp_path / "runs/gallery/abkd.png").exists()


def test_a_demo_that_was_not_run_says_how_to_run_it(gallery: ModuleType, tmp_path: Path) -> None:
    add_package(tmp_path, "abkd")
    assert "Not run yet; “uvx nox -s demo -- abkd” runs it." in write(gallery, tmp_path)


@pytest.mark.parametrize(
    "metrics",
    [
        "{",
        "[]",
        "{}",
        '{"summary": "good"}',
        '{"summary": {"message": "m", "rows": [1]}}',
        '{"summary": {"message": "m", "rows": null}}',
    ],
)
def test_a_broken_run_folder_spoils_its_own_card_only(
    gallery: ModuleType, tmp_path: Path, metrics: str
) -> None:
    add_package(tmp_path, "abkd")
    add_package(tmp_path, "lede")
    add_run(tmp_path, "lede", SUMMARY)
    folder = add_run(tmp_path, "abkd", SUMMARY)
    (folder / "metrics.json").write_text(metrics)
    page = write(gallery, tmp_path)
    assert page.count("The run left no summary that can be read") == 1
    assert page.count("Focal beat SGD") == 1


@pytest.mark.parametrize("picture", ["../../secret.png", "/etc/passwd", "missing.png", None, ""])
def test_a_picture_comes_from_the_run_folder_or_not_at_all(
    gallery: ModuleType, tmp_path: Path, picture: str | None
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    add_package(tmp_path, "abkd")
    (tmp_path / "runs").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "runs/secret.png")
    add_run(tmp_path, "abkd", {**SUMMARY, "picture": picture})
    assert "<img" not in write(gallery, tmp_path)
    assert not (tmp_path / "runs/gallery/abkd.png").exists()


def test_everything_is_escaped(gallery: ModuleType, tmp_path: Path) -> None:
    evil = "\"'><script>alert(1)</script>&"
    add_package(tmp_path, "abkd", evil, f"# {evil}\n")
    folder = add_run(
        tmp_path, "abkd", {"message": evil, "rows": [{evil: evil}], "picture": "p.png"}
    )
    Image.new("RGB", (4, 4)).save(folder / "p.png")
    add_record(tmp_path, abkd={"command": evil, "seconds": 1, "worked": True})
    page = write(gallery, tmp_path)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;") >= 7


def test_packages_without_a_command_have_no_card(gallery: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "packages/tool").mkdir(parents=True)
    (tmp_path / "packages/tool/pyproject.toml").write_text('[project]\nname = "tool"\n')
    assert "<article" not in write(gallery, tmp_path)


def test_the_page_is_written_again_over_an_old_one(gallery: ModuleType, tmp_path: Path) -> None:
    add_package(tmp_path, "abkd")
    write(gallery, tmp_path)
    add_run(tmp_path, "abkd", SUMMARY)
    assert "Focal beat SGD" in write(gallery, tmp_path)
    assert [p.name for p in (tmp_path / "runs/gallery").iterdir()] == ["index.html"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        ("", "–"),
        (True, "yes"),
        (3, "3"),
        (0.123456, "0.1235"),
        (-12.5, "-12.5"),
        (1234567.0, "1,234,567"),
        (1e-7, "1e-07"),
        ("a", "a"),
        ([1, 2], "[1, 2]"),
    ],
)
def test_cells_are_written_for_a_reader(gallery: ModuleType, value: Any, text: str) -> None:
    assert gallery.format_cell(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s")],
)
def test_times_are_written_for_a_reader(gallery: ModuleType, seconds: float, text: str) -> None:
    assert gallery.format_seconds(seconds) == text


def test_the_script_runs_by_hand(tmp_path: Path) -> None:
    add_package(tmp_path, "abkd")
    words = ["--root", tmp_path, "--runs", tmp_path / "runs", "--out", tmp_path / "page"]
    run = subprocess.run(
        [sys.executable, ROOT / "docs/gallery.py", *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert Path(run.stdout.strip()) == tmp_path / "page/index.html"
    assert "Not run yet" in (tmp_path / "page/index.html").read_text(encoding="utf-8")


# --- in a real browser -------------------------------------------------------------------------

CHROMIUM = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
WIDTHS = [320, 390, 699, 1280]
# The page itself holds no script, so a second page shows it in a frame, measures it there at each
# width, and posts what it saw.
PROBE = """<!DOCTYPE html><meta charset="utf-8"><title>probe</title>
<body style="margin:0"><iframe style="border:0;height:800px"></iframe><script>
const frame = document.querySelector("iframe");
const paint = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
frame.onload = async () => {
  const page = frame.contentDocument, root = page.documentElement, seen = [];
  for (const width of WIDTHS) {
    frame.style.width = width + "px";
    await paint();
    const cards = [...page.querySelectorAll(".card")].map(card => card.getBoundingClientRect());
    const text = [...page.querySelectorAll("h1, h2, p, code, td, th")];
    seen.push({
      width, visible: root.clientWidth, scrolled: root.scrollWidth,
      columns: new Set(cards.map(card => Math.round(card.left))).size,
      right: Math.max(...cards.map(card => card.right)),
      images: [...page.images].map(image =>
        [image.complete, image.naturalWidth, image.naturalHeight,
         image.getBoundingClientRect().width, image.getBoundingClientRect().height]),
      tables: [...page.querySelectorAll(".scroll")].map(box => [box.clientWidth, box.scrollWidth]),
      smallest: Math.min(...text.map(t => parseFloat(getComputedStyle(t).fontSize))),
    });
  }
  await fetch("/report", {method: "POST", body: JSON.stringify(seen)});
};
frame.src = "/index.html";
</script>"""


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, [*CHROMIUM, "firefox", "firefox-esr"])), None)


def browser_command(browser: str, profile: Path, *options: str) -> list[str]:
    profile.mkdir(exist_ok=True)
    if "firefox" in Path(browser).name:
        return [browser, "--headless", "--no-remote", "--profile", str(profile), *options]
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    # Inside a container there is neither a sandbox to have nor a large /dev/shm.
    contained = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"]
    start = [browser, "--headless", f"--user-data-dir={profile}"]
    return [*start, *quiet, *contained, *options]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the gallery and the probe, keeps the report and the paths asked for."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path != "/probe.html":
            super().do_GET()
            return
        body = PROBE.replace("WIDTHS", json.dumps(WIDTHS)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.server.report = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.reported.set()

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked, server.report, server.reported = [], None, threading.Event()
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def browser() -> str:
    found = find_browser()
    if found is None:
        pytest.skip("no browser: neither chromium, google-chrome nor firefox is on the PATH")
    return found


@pytest.fixture
def made_up_gallery(gallery: ModuleType, tmp_path: Path) -> Path:
    """A gallery of four cards that tries the layout: wide, long, failed, not run."""
    wide = [{f"a rather long column name {i}": i / 7 for i in range(12)} for _ in range(3)]
    long = {**SUMMARY, "message": "unbreakable" * 40, "rows": wide}
    for dist, summary, size in [("good", SUMMARY, (40, 20)), ("wide", long, (3000, 1500))]:
        add_package(tmp_path, dist, "What it does, told at some length. " * 5)
        folder = add_run(tmp_path, dist, summary)
        Image.new("RGB", size, MAGENTA).save(folder / "sharpness.png")
    add_package(tmp_path, "failed")
    add_package(tmp_path, "never-run")
    command = "failed demo --quick --with-an-option=" + "x" * 200
    add_record(tmp_path, failed={"command": command, "seconds": 1, "worked": False})
    write(gallery, tmp_path)
    return tmp_path / "runs/gallery"


def test_a_browser_shows_the_page_whole_on_a_phone_and_on_a_desktop(
    browser: str, made_up_gallery: Path, tmp_path: Path
) -> None:
    with serving(made_up_gallery) as server:
        url = f"http://127.0.0.1:{server.server_port}/probe.html"
        command = browser_command(browser, tmp_path / "profile", "--remote-debugging-port=0", url)
        with open(tmp_path / "browser.log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            assert server.reported.wait(60), (tmp_path / "browser.log").read_text()[-2000:]
        finally:
            process.terminate()
            process.wait(20)
    assert set(server.asked) <= {
        *["/probe.html", "/index.html", "/good.png", "/wide.png", "/favicon.ico"]
    }
    for seen in server.report:
        width = seen["width"]
        assert seen["visible"] <= width
        assert seen["scrolled"] <= seen["visible"], f"the page scrolls sideways at {width} px"
        assert seen["right"] <= seen["visible"]
        assert (seen["columns"] == 1) == (width < 700)
        assert seen["smallest"] >= 12
        assert [image[:3] for image in seen["images"]] == [[True, 40, 20], [True, 3000, 1500]]
        for _, natural_width, natural_height, shown_width, shown_height in seen["images"]:
            assert 0 < shown_width <= min(natural_width, seen["visible"])
            assert shown_width / shown_height == pytest.approx(natural_width / natural_height, 0.02)
        [_, (box, content)] = seen["tables"]
        assert content > box, "the wide table was meant to scroll inside its card"


def test_a_browser_paints_the_pictures(browser: str, made_up_gallery: Path, tmp_path: Path) -> None:
    target = tmp_path / "screenshot.png"
    with serving(made_up_gallery) as server:
        url = f"http://127.0.0.1:{server.server_port}/index.html"
        options = [f"--screenshot={target}", "--window-size=1280,1400", url]
        if "firefox" in Path(browser).name:
            options = ["--screenshot", str(target), "--window-size=1280,1400", url]
        command = browser_command(browser, tmp_path / "profile", *options)
        subprocess.run(command, check=True, capture_output=True, timeout=90)
    with Image.open(target) as screenshot:
        pixels = screenshot.convert("RGB")
        counts = {color: n for n, color in pixels.getcolors(pixels.width * pixels.height)}
    assert pixels.width == 1280
    assert counts[MAGENTA] > 10_000
    assert counts[max(counts, key=counts.__getitem__)] < 0.9 * pixels.width * pixels.height
