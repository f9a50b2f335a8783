"""The order of the house, read from the source: who imports whom, and how long a function may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megalite"

# Room -> what of megalite it may import besides itself. Imports point down only.
ROOMS = {
    "config": set(),
    "kernels": set(),
    "parallel": {"kernels"},
    "tokenizer": set(),
    "data": set(),
    "pipeline": {"parallel"},
    "model": {"kernels", "parallel", "config"},
    "optimizer": {"kernels", "parallel", "config"},
    "plan": {"optimizer", "pipeline", "model", "kernels", "parallel", "config"},
    "checkpoint": {"model", "parallel", "config"},
    "watch": set(),
    "measure": {"plan", "model", "kernels", "parallel", "config"},
    "inspection": {"checkpoint", "measure", "model", "parallel", "config"},
    "evaluation": {"checkpoint", "measure", "tokenizer", "data", "model", "parallel", "config"},
    "report": {
        "inspection",
        "evaluation",
        "measure",
        "checkpoint",
        "pipeline",
        "model",
        "parallel",
        "config",
    },
    "generation": {"checkpoint", "tokenizer", "model", "parallel", "config"},
    "training": {
        "evaluation",
        "measure",
        "plan",
        "watch",
        "checkpoint",
        "optimizer",
        "pipeline",
        "model",
        "data",
        "tokenizer",
        "kernels",
        "parallel",
        "config",
    },
    "dryrun": {"training", "optimizer", "pipeline", "model", "kernels", "parallel", "config"},
    "preflight": {"training", "checkpoint", "optimizer", "model", "data", "parallel", "config"},
}
# Foreign systems come in by one door each: module -> where it may be imported.
DOORS = {
    "deepspeed": ["training/engine.py", "kernels/adamw.py"],  # a kernel of it
    "apex": ["kernels/"],
    "amp_C": ["kernels/"],  # of apex
    "liger_kernel": ["kernels/"],
    "lm_eval": ["evaluation/harness.py"],
    "vl_convert": ["report/bundle.py"],
    "jinja2": ["report/page.py", "tokenizer/template.py"],
    "transformers": ["tokenizer/", "checkpoint/", "evaluation/live.py"],
    "torch": [
        "checkpoint/",
        "data/",
        "dryrun/",
        "evaluation/",
        "generation/",
        "inspection/",
        "kernels/",
        "measure/",
        "model/",
        "optimizer/",
        "parallel/",
        "pipeline/",
        "preflight/",
        "training/",
        "batch.py",
    ],
    "yaml": ["config/"],
    "pydantic": ["config/", "checkpoint/"],
}
PURE = ["parallel/topology.py", "model/flops.py", "training/lr_schedule.py"]
PURE += [f"pipeline/{name}.py" for name in ("actions", "orders", "partition", "placement", "schedule")]
PURE += ["pipeline/timeline.py", "pipeline/transfers.py"]
PURE += ["kernels/limits.py", "optimizer/kinds.py", "parallel/vocabulary.py", "parallel/slots.py"]
PURE += [f"plan/{path.name}" for path in (PACKAGE / "plan").glob("*.py")]
PURE += [f"dryrun/{name}.py" for name in ("links", "log", "match", "play", "roster")]
LONGEST_FUNCTION_LINES = 60


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Every module that a source imports, wherever it does so; `from a import b` is both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_violations(where: str, tree: ast.AST) -> Iterator[str]:
    room = where.partition("/")[0]
    for module in imported_modules(tree):
        top, _, rest = module.partition(".")
        target = rest.partition(".")[0]
        if module.startswith("."):
            yield f"{where} imports {module}: write the full name"
        if top in {"launchers", "tools", "benchmarks", "tests"}:
            yield f"{where} imports {module}: nothing in megalite may"
        if top == "megalite" and room in ROOMS and target in ROOMS.keys() - ROOMS[room] - {room}:
            yield f"{where} imports {module}: {room} may import only {sorted(ROOMS[room])}"
        if top in DOORS and not any(where.startswith(door) for door in DOORS[top]):
            yield f"{where} imports {module}: its doors are {DOORS[top]}"
        if top in {"torch", "numpy"} and where in PURE:
            yield f"{where} imports {module}: it is pure arithmetic"


def source_violations(where: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        environment = isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv"}
        if environment and where != "training/environment.py":
            yield f"{where}, line {node.lineno}: only training/environment.py reads the environment"
        if isinstance(node, ast.Global):
            yield f"{where}, line {node.lineno}: pass {', '.join(node.names)} instead of a global"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION_LINES:
                yield f"{where}: {node.name} has {lines} lines, at most {LONGEST_FUNCTION_LINES}: cut it"


def violations(where: str, source: str) -> list[str]:
    """What the file at `where`, relative to megalite/, does against the order of the house."""
    tree = ast.parse(source)
    found = [*import_violations(where, tree), *source_violations(where, tree)]
    imports_environment = any(name in {"os.environ", "os.getenv"} for name in imported_modules(tree))
    if imports_environment and where != "training/environment.py":
        found.append(f"{where} imports the environment: only training/environment.py reads it")
    if Path(where).name in {"utils.py", "misc.py", "common.py", "helpers.py"}:
        found.append(f"{where}: name the file after the one thing that it holds")
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_every_source_keeps_the_order_of_the_house(path):
    assert violations(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")) == []


def test_every_room_is_in_the_order():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms <= ROOMS.keys()
    assert [
        room for room in rooms if not (PACKAGE / room / "__init__.py").exists()
    ] == []  # else not installed


def test_imports_point_down_only():
    def below(room):
        return ROOMS[room] | {deeper for target in ROOMS[room] for deeper in below(target)}

    assert [room for room in ROOMS if room in below(room)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "launchers").glob("*.py")), ids=lambda path: path.name)
def test_a_launcher_stays_under_eighty_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("parallel/linear.py", "from megalite.config.model import ModelConfig"),
        ("parallel/linear.py", "from megalite import config"),
        ("pipeline/runner.py", "import megalite.model.llama"),
        ("data/loader.py", "def f():\n    from megalite.model import llama"),
        ("checkpoint/save.py", "from megalite.training import engine"),
        ("model/llama.py", "import tools.demo"),
        ("model/llama.py", "from .block import Block"),
        ("model/flops.py", "import torch"),
        ("config/run.py", "import torch"),
        ("training/loop.py", "import deepspeed"),
        ("training/loop.py", "from deepspeed.runtime import engine"),
        ("evaluation/perplexity.py", "import lm_eval"),
        ("model/llama.py", "import os\nos.environ['RANK']"),
        ("model/llama.py", "import os\nos.getenv('RANK')"),
        ("model/llama.py", "from os import environ"),
        ("model/llama.py", "def f():\n    global x"),
        ("model/utils.py", ""),
        ("model/llama.py", "def f():\n" + "    pass\n" * 60),
    ],
)
def test_a_violation_is_caught(where, source):
    assert len(violations(where, source)) >= 1


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("training/engine.py", "import deepspeed, torch\nfrom megalite.model.llama import Llama"),
        ("training/environment.py", "import os\nos.environ['RANK']"),
        ("model/llama.py", "import torch\nimport megalite.model.block\ndef f():\n" + "    pass\n" * 59),
    ],
)  # fmt: skip
def test_the_order_allows_what_it_should(where, source):
    assert violations(where, source) == []
