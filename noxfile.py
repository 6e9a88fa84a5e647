"""Every check and every product of the repository is a session here: ``nox -l`` lists them.

Packages are found by looking: ``shared`` and every folder of ``packages/`` that has a
``pyproject.toml``. A new package needs no change in this file.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nox
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"  # `uv sync` makes a used environment exact again
nox.options.error_on_external_run = True
nox.options.sessions = [
    "lint",
    "typecheck",
    "tests",
    "integration",
    "isolated",
    "together",
    "docs",
    "build",
]

ROOT = Path(__file__).parent
RUNS = ROOT / "runs"
GALLERY = RUNS / "gallery"
# Sessions run on the Python that runs nox, unless the packages do not support that one.
PYTHON = None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "3.13"
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": ""}
# Tests start many processes; what one has compiled of torch and others, the next need not.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
PIP = ["python", "-m", "pip", "--isolated", "--disable-pip-version-check"]  # no settings, no index


@dataclass(frozen=True)
class Package:
    """One distribution of the workspace, as its ``pyproject.toml`` describes it."""

    folder: Path
    dist: str
    module: str
    script: str | None
    requires: tuple[str, ...]
    groups: frozenset[str]

    def __str__(self) -> str:
        return self.dist


def discover() -> dict[str, Package]:
    """Read the workspace's packages, the shared core first."""
    found = {}
    for file in [ROOT / "shared/pyproject.toml", *sorted(ROOT.glob("packages/*/pyproject.toml"))]:
        data = nox.project.load_toml(file)
        project = data["project"]
        [module] = [p.parent.name for p in file.parent.glob("src/*/__init__.py")]
        found[project["name"]] = Package(
            folder=file.parent.relative_to(ROOT),
            dist=project["name"],
            module=module,
            script=next(iter(project.get("scripts", {})), None),
            requires=tuple(
                canonicalize_name(Requirement(line).name) for line in project["dependencies"]
            ),
            groups=frozenset(data.get("dependency-groups", {})),
        )
    return found


PACKAGES = discover()
per_package = nox.parametrize("package", [nox.param(p, id=p.dist) for p in PACKAGES.values()])


def closure(package: Package) -> list[Package]:
    """The package and the workspace members it needs at run time, the needed ones first."""
    chain: dict[str, Package] = {}
    for name in package.requires:
        if name in PACKAGES:
            chain |= {p.dist: p for p in closure(PACKAGES[name])}
    return [*chain.values(), package]


def chosen(session: nox.Session) -> list[Package]:
    """The packages named after ``--``, or all of them."""
    names = [word for word in session.posargs if not word.startswith("-")]
    if unknown := sorted(set(names) - set(PACKAGES)):
        session.error(f"no package {', '.join(unknown)}; there are: {', '.join(PACKAGES)}")
    return [PACKAGES[name] for name in names] or list(PACKAGES.values())


def sync(session: nox.Session, *options: str, location: Path | None = None) -> Path:
    """Make an environment hold exactly what the lock says for these options, and nothing else."""
    python = session.virtualenv.location
    target = str(location or python)
    session.run_install(
        *["uv", "sync", "--locked", "--quiet", f"--python={python}", *options],
        env={"UV_PROJECT_ENVIRONMENT": target},
        external=True,
    )
    return Path(target)


def pytest(session: nox.Session, package: Package, *options: str, **keywords: object) -> None:
    """Run a package's tests and doctests with its shape annotations checked."""
    session.run(
        *["python", "-m", "pytest", str(package.folder / "tests"), str(package.folder / "src")],
        *["--doctest-modules", f"--jaxtyping-packages={package.module},beartype.beartype"],
        *options,
        *session.posargs,
        **keywords,
    )


def gpu_name() -> str | None:
    """The first CUDA device as the driver names it; asked without installing anything."""
    if not (tool := shutil.which("nvidia-smi")):
        return None
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    names = answer.stdout.strip().splitlines()
    return names[0] if answer.returncode == 0 and names else None


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    sync(session, "--only-group=lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check", "--diff")


@nox.session(python=PYTHON)
def typecheck(session: nox.Session) -> None:
    """Check the types of all packages with mypy, strictly."""
    groups = ["--group=test", "--group=docs", "--group=typecheck"]
    sync(session, "--all-packages", "--all-extras", *groups)
    session.run("mypy", *session.posargs)


@nox.session(python=PYTHON)
@nox.parametrize("device", [nox.param("cpu", id="cpu"), nox.param("cuda", id="cuda")])
@per_package
def tests(session: nox.Session, package: Package, device: str) -> None:
    """Run one package's tests where only what it declares is installed, on cpu or cuda."""
    if device == "cuda" and not gpu_name():
        session.skip("no CUDA device: nvidia-smi finds none on this machine")
    sync(session, f"--package={package}", "--all-extras", "--group=test")
    if device == "cpu":
        pytest(session, package, "-m", "not cuda", env=CPU_ONLY)
        return
    no_tests = 5  # pytest's exit code when it found nothing to run
    pytest(session, package, "-m", "cuda", success_codes=[0, no_tests])
    session.log(f"cuda tests ran on {gpu_name()}; '0 selected' above: {package} has none")


@nox.session(python=PYTHON)
def integration(session: nox.Session) -> None:
    """Run the tests of several packages together (tests/), all of them installed."""
    sync(session, "--all-packages", "--all-extras", "--group=test")
    session.run("python", "-m", "pytest", "tests", *session.posargs, env=CPU_ONLY)


@nox.session(python=PYTHON, reuse_venv=False)
@per_package
def isolated(session: nox.Session, package: Package) -> None:
    """Install one package's wheel with pip in a fresh environment and use it outside the tree."""
    with tempfile.TemporaryDirectory(prefix=f"{package}-") as folder:
        work = Path(folder).resolve()
        install_wheels(session, [package], work)
        check_only_declared(session, [package])
        shutil.copytree(
            ROOT / package.folder / "tests",
            work / "tests",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        shutil.copy(ROOT / "pyproject.toml", work)  # the settings of pytest
        with session.chdir(work):
            session.run("python", "-c", f"import {package.module} as m; print(m.__file__)")
            if package.script:
                session.run(package.script, "--help", silent=True)
                demo_run = [package.script, "demo", "--quick", "--out", str(work / "demo")]
                session.run(*demo_run, env=CPU_ONLY | {"HF_HUB_OFFLINE": "1"})
            smoke = ["-m", "smoke and not cuda", "-p", "no:cacheprovider"]
            session.run("python", "-m", "pytest", "tests", *smoke, env=CPU_ONLY)


@nox.session(python=PYTHON, reuse_venv=False)
def together(session: nox.Session) -> None:
    """Install the wheels of all packages in one fresh environment; tell sizes and import times."""
    packages = list(PACKAGES.values())
    with tempfile.TemporaryDirectory(prefix="together-") as folder:
        work = Path(folder).resolve()
        wheels = install_wheels(session, packages, work)
        check_only_declared(session, packages)
        with session.chdir(work):
            for package in packages:
                if package.script:
                    session.run(package.script, "--help", silent=True)
                took = session.run(
                    "python", "-c", IMPORT_TIME, package.module, silent=True, log=False
                )
                size = wheels[package.dist].stat().st_size / 1024
                session.log(f"{package}: wheel {size:.0f} KiB, import {str(took).strip()}")


IMPORT_TIME = """
import importlib, sys, time
import torch
start = time.perf_counter()
importlib.import_module(sys.argv[1])
print(f"{time.perf_counter() - start:.3f} s beyond torch's")
"""


def install_wheels(
    session: nox.Session, packages: Sequence[Package], work: Path
) -> dict[str, Path]:
    """Build the wheels of packages and their siblings, and install them with pip.

    The third parties come as locked. Our own come from the files and never from an index, where
    their names may belong to somebody else.
    """
    files = {}
    members = [member for package in packages for member in closure(package)]
    for member in dict.fromkeys([PACKAGES["shared-core"], *members]):
        wheels = work / "wheels" / member.dist
        session.run_install(
            *["uv", "build", "--wheel", "--quiet", f"--package={member}", f"--out-dir={wheels}"],
            external=True,
        )
        [files[member.dist]] = wheels.glob("*.whl")
    third_parties = work / "third-parties.txt"
    whose = [f"--package={package}" for package in packages]
    session.run_install(
        *["uv", "export", "--locked", "--quiet", *whose, "--group=test"],
        *["--no-emit-workspace", "--no-hashes", f"--output-file={third_parties}"],
        external=True,
    )
    session.install("--no-deps", "--requirement", str(third_parties), "pip")
    asked = {f"{dist}[testing]" if dist == "shared-core" else dist: f for dist, f in files.items()}
    session.run_install(
        *[*PIP, "install", "--no-index", "--quiet"],
        *[f"{name} @ {file.as_uri()}" for name, file in asked.items()],
        env={"PIP_CONFIG_FILE": os.devnull},
    )
    session.run(*PIP, "check")
    return files


def check_only_declared(session: nox.Session, packages: Sequence[Package]) -> None:
    """Fail unless the installed distributions are exactly what the wheels' metadata ask for."""
    report = session.run(*PIP, "inspect", silent=True, log=False, stderr=None)
    inspected = json.loads(str(report))
    installed = {
        canonicalize_name(entry["metadata"]["name"]): entry["metadata"].get("requires_dist", [])
        for entry in inspected["installed"]
    }
    environment = {**default_environment(), **inspected["environment"]}
    asked: set[tuple[str, str]] = set()
    waiting = [("shared-core", "testing")]
    waiting += [(str(canonicalize_name(package.dist)), "") for package in packages]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in asked:
            continue
        asked.add((name, extra))
        if extra:
            waiting.append((name, ""))
        for line in installed.get(name, ()):
            needed = Requirement(line)
            if not needed.marker or needed.marker.evaluate({**environment, "extra": extra}):
                target = canonicalize_name(needed.name)
                waiting += [(target, e) for e in ("", *needed.extras)]
    names = {name for name, _ in asked}
    undeclared = sorted(set(installed) - names - {"pip"})
    missing = sorted(names - set(installed))
    if undeclared or missing:
        session.error(f"undeclared but installed {undeclared}, missing {missing}")
    session.log(f"{len(installed)} distributions installed, each declared by the wheels")


@nox.session(python=PYTHON, default=False)
@per_package
def lowest(session: nox.Session, package: Package) -> None:
    """Run one package's tests with the lowest versions that it says it accepts."""
    folders = [str(member.folder) for member in closure(package)]
    editable = [f"--editable={folder}" for folder in folders]
    session.run_install(
        *["uv", "pip", "install", "--resolution=lowest-direct", "--exact", *editable],
        *["--group", f"{package.folder}/pyproject.toml:test", "--all-extras"],
        *["-r", f"{package.folder}/pyproject.toml"],
        external=True,
    )
    # Old versions warn about the newer ones of what they need themselves; that is not ours to mend.
    pytest(session, package, "-m", "not cuda", "-W", "default", env=CPU_ONLY)


@nox.session(python=PYTHON, default=False)
@per_package
def fuzz(session: nox.Session, package: Package) -> None:
    """Run one package's property tests with twenty times the examples, new ones each time."""
    sync(session, f"--package={package}", "--all-extras", "--group=test")
    environment = CPU_ONLY | {"TENFOLD_FUZZ": "20"}
    pytest(session, package, "-m", "hypothesis and not cuda", env=environment)


@nox.session(python=PYTHON, default=False)
@per_package
def coverage(session: nox.Session, package: Package) -> None:
    """Measure which lines and branches of one package its own tests reach."""
    sync(session, f"--package={package}", "--all-extras", "--group=test")
    session.install("coverage[toml]>=7.6")  # the next sync takes it out again
    report = RUNS / "coverage" / f"{package}.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    data = {"COVERAGE_FILE": str(report.with_suffix(".data")), "COVERAGE_CORE": "ctrace"}
    session.run(
        *["coverage", "run", "--branch", f"--source={package.folder}/src", "-m", "pytest"],
        *[f"{package.folder}/tests", f"{package.folder}/src", "--doctest-modules"],
        *["-m", "not cuda", *session.posargs],
        env=CPU_ONLY | data,
    )
    session.run("coverage", "json", "--quiet", f"-o{report}", env=data)
    session.run("coverage", "report", "--skip-covered", env=data)


@nox.session(python=PYTHON, default=False, venv_backend="none")
def audit(session: nox.Session) -> None:
    """Look the locked versions up among the known vulnerabilities (asks the network)."""
    session.run("uv", "audit", "--locked", external=True)


@nox.session(python=PYTHON, default=False)
def demo(session: nox.Session) -> None:
    """Run the demos and write the page runs/gallery/index.html (-- --full, -- <package>)."""
    GALLERY.mkdir(parents=True, exist_ok=True)
    record_file = GALLERY / "runs.json"
    record = json.loads(record_file.read_text()) if record_file.is_file() else {}
    options = [word for word in session.posargs if word.startswith("-") and word != "--full"]
    quick = [] if "--full" in session.posargs else ["--quick"]
    failed = []
    for package in chosen(session):
        if not package.script:
            continue
        command = [package.script, "demo", *quick]
        session.log(f"{package}: {' '.join(command)}")
        folder = RUNS / package.dist / "demo"
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        try:
            environment = sync(
                session, f"--package={package}", location=ROOT / ".nox/demos" / package.dist
            )
            start = time.perf_counter()
            binary = shutil.which(package.script, path=environment / _binaries()) or package.script
            session.run(
                *[binary, *command[1:], *options, "--out", str(folder.relative_to(ROOT))],
                external=True,
            )
            worked = True
        except nox.command.CommandFailed:
            failed.append(package.dist)
            worked = False
        seconds = round(time.perf_counter() - start, 1)
        record[package.dist] = {
            "command": " ".join(command),
            "seconds": seconds,
            "worked": worked,
        }
        record_file.write_text(json.dumps(record, indent=2) + "\n")
    session.run("python", "docs/gallery.py", "--runs", str(RUNS), "--out", str(GALLERY))
    session.log(f"the gallery: {(GALLERY / 'index.html').as_uri()}")
    if failed:
        session.error(f"demos that failed: {', '.join(failed)}")


def _binaries() -> str:
    return "Scripts" if os.name == "nt" else "bin"


@nox.session(python=PYTHON, default=False)
def bench(session: nox.Session) -> None:
    """Measure the packages beside their peers, into benchmarks/results/ (-- <package>).

    Fails where a ratio has become worse than in the results before, by more than noise.
    """
    before = Path(session.create_tmp()) / "before"
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(ROOT / "benchmarks/results", before)
    for package in chosen(session):
        file = Path("benchmarks") / f"{package.module}.py"
        if not (ROOT / file).is_file():
            session.log(f"{package}: no {file}")
            continue
        groups = [f"--group={name}" for name in ("test", "bench") if name in package.groups]
        sync(session, f"--package={package}", "--all-extras", *groups)
        options = [word for word in session.posargs if word.startswith("-")]
        # -P: the folder of a script named like its package must not shadow the package.
        session.run("python", "-P", str(file), "--out", "benchmarks/results", *options)
    session.run("python", "benchmarks/compare.py", "--before", str(before), "--page")


@nox.session(python=PYTHON)
def docs(session: nox.Session) -> None:
    """Build the site into site/, warnings being errors."""
    sync(session, "--only-group=docs")
    # Not --quiet: it hides warnings from --strict too.
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(python=PYTHON)
def build(session: nox.Session) -> None:
    """Build every package's sdist and wheel into dist/ and check them (-- <package>)."""
    sync(session, "--only-group=release")
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for package in chosen(session):
        session.run(
            *["uv", "build", "--quiet", f"--package={package}", f"--out-dir={dist}"], external=True
        )
    session.run("twine", "check", "--strict", *map(str, _artefacts(dist)))


def _artefacts(dist: Path) -> Iterable[Path]:
    return sorted([*dist.glob("*.whl"), *dist.glob("*.tar.gz")])
