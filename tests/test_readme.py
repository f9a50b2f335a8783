"""What the pages tell a reader to type works, what they point to exists, and the example runs."""

import argparse
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.config.load import load_run
from megalite.config.run import RunConfig
from tests.checkpoint.llamas import random_llama, save_llama, tiny_run
from tests.harness import run_distributed
from tests.test_shipped_configs import shipped_run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
PRETRAIN = "launchers/pretrain.py --deepspeed_config configs/deepspeed/zero3.json"
GPUS_PER_NODE = 8


class ParsedError(Exception):
    """A command line that its own parser accepted."""


class PageError(ValueError):
    """A command that a reader could not run."""


def code_blocks(text: str) -> Iterator[str]:
    """Fenced blocks, and indented ones."""
    yield from re.findall(r"^```(?:sh|bash)?\n(.*?)^```", text, flags=re.M | re.S)
    yield from re.findall(r"(?:^ {4}\S.*\n(?: {5,}.*\n)*)+", text, flags=re.M)


def commands(text: str) -> list[list[str]]:
    """The words of every command of ours in a page's blocks of code."""
    lines = [line for block in code_blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    ours = [line for line in lines if re.match(rf"\s*(?:{'|'.join(CHECKS)}|slurm/\w+\.sh)\s", line)]
    return [shlex.split(line.partition(" < ")[0], comments=True) for line in ours]


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    for target in (word for word in words[1:] if "=" not in word):
        if target not in targets:
            raise PageError(f"make has no target {target}")


def check_python(words: list[str]) -> None:
    """The script's own parser must accept the options. Nothing is run."""
    if words[1].startswith("-"):
        return
    script = existing(words[1])
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def stopping(parse: Callable[..., Any]) -> Callable[..., None]:
        def parse_and_stop(self: argparse.ArgumentParser, *args: Any) -> None:
            parse(self, *args)
            raise ParsedError

        return parse_and_stop

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
        try:
            module.main(words[2:])
        except ParsedError:
            return
        except SystemExit as stop:
            raise PageError(f"{script.name} does not take {words[2:]}") from stop
    raise AssertionError(f"{script.name} parsed nothing")


def check_deepspeed(words: list[str]) -> None:
    """The launcher's parser, then the tool's or the run's: every file, key and value, and the layout."""
    from deepspeed.launcher.runner import parse_args

    launch = parse_args(words[1:])
    check_launched(launch.user_script, launch.user_args, launch.num_gpus if launch.num_gpus > 0 else 16)


def check_torchrun(words: list[str]) -> None:
    """The same of torchrun."""
    from torch.distributed.run import parse_args

    launch = parse_args(words[1:])
    world_size = int(launch.nnodes.partition(":")[0]) * int(launch.nproc_per_node)
    check_launched(launch.training_script, launch.training_script_args, world_size)


def check_launched(script: str, arguments: list[str], world_size: int) -> None:
    if existing(script) == ROOT / "tools" / "preflight.py":
        import tools.preflight

        options = tools.preflight.parser().parse_intermixed_args(arguments)
        tools.preflight.resolve(options, world_size, options.task)
    elif existing(script).parent.name == "tools":
        check_python(["python", script, *arguments])
    else:
        check_run(arguments, world_size, existing(script).stem)


def check_sbatch(words: list[str]) -> None:
    """The script, the run that it or its first argument names, and the layout on so many nodes."""
    at = next(index for index, word in enumerate(words) if word.endswith(".sh"))
    if words[at] == "slurm/submit.sh":
        return check_sbatch(["sbatch", *words[at + 2 :]])  # after RUN_DIR
    script, arguments = existing(words[at]), words[at + 1 :]
    if script.stem in ("preprocess", "export", "debug"):
        return check_worker(script.stem, arguments)
    whole = re.search(r'^exec "\$script" (.*) "\$@"$', script.read_text(encoding="utf-8"), flags=re.M)
    arguments = [*(whole[1].split() if whole else []), *arguments]
    name = arguments.pop(0)
    if name.isupper():
        return  # a placeholder
    options = dict(word.split("=", 1) for word in words[1:at] if "=" in word)
    num_tasks = int(options.get("--nodes", 2)) * int(options.get("--ntasks-per-node", GPUS_PER_NODE))
    task = load_run(str(existing(f"configs/runs/{name}.yaml")), []).task
    defaults = ["--deepspeed_config", f"configs/deepspeed/{name}.json"]
    check_run([*defaults, "--config", f"configs/runs/{name}.yaml", *arguments], num_tasks, task)


def check_worker(script: str, arguments: list[str]) -> None:
    """A script that hands its options on to a tool, or starts a command."""
    if script == "preprocess" and arguments[0] != "--merge":
        at = arguments.index("--")
        prefix, options, inputs = arguments[0], arguments[1:at], arguments[at + 1 :]
        text = ["--input", *inputs, "--output-prefix", prefix, *options]
        check_python(["python", "tools/preprocess_data.py", *text])
    elif script == "preprocess" and len(arguments) != 2:
        raise PageError(f"--merge takes one prefix, not {arguments[1:]}")
    elif script == "export":
        check_python(["python", "tools/evaluate.py", "--checkpoint", arguments[1], *arguments[2:]])


def check_run(arguments: list[str], world_size: int, task: str) -> None:
    """What a launcher checks first; the weights that a run goes on with are not there."""
    from megalite.training import start
    from megalite.training.command import configure

    if any(word.isupper() or word.startswith("runs/mine") for word in arguments):
        return  # a placeholder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "with_model_of_start", with_shipped_model)
        configure(arguments, world_size, task)


def with_shipped_model(run: RunConfig) -> RunConfig:
    """A run that goes on with a shipped one, with the model of that."""
    name = Path(run.checkpoint.start_from or "").name
    is_shipped = (ROOT / f"configs/runs/{name}.yaml").exists()
    return run.model_copy(update={"model": shipped_run(name).model}) if is_shipped else run


CHECKS = {
    "make": check_make,
    "python": check_python,
    "deepspeed": check_deepspeed,
    "torchrun": check_torchrun,
    "sbatch": check_sbatch,
}


def check(words: list[str]) -> None:
    CHECKS.get(words[0], check_sbatch)(words)


def existing(path: str) -> Path:
    if not (ROOT / path).exists():
        raise PageError(f"{path} does not exist")
    return ROOT / path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_accepted(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page.read_text(encoding="utf-8")):
        check(words)


def test_the_readme_shows_every_kind_of_command():
    assert {words[0] for words in commands(README)} == CHECKS.keys()


@pytest.mark.parametrize(
    "command",
    [
        "make coffee",
        "python tools/absent.py",
        "python tools/generate.py --checkpoint x --prompt y --absent",
        f"deepspeed --absent {PRETRAIN}",
        "deepspeed launchers/pretrain.py --deepspeed_config configs/deepspeed/absent.json",
        f"deepspeed --num_gpus 4 {PRETRAIN} parallel.tp=2",
        f"deepspeed --num_gpus 3 {PRETRAIN} parallel.tp_size=2",
        "sbatch slurm/absent.sh",
        "sbatch slurm/pretrain.sh absent",
        "sbatch --nodes=3 slurm/pretrain.sh llama3_70b",
        "sbatch slurm/pretrain_460m.sh schedule.steps=10",
        "sbatch slurm/pretrain_7b.sh parallel.pp_size=3",
        "slurm/submit.sh runs/mine slurm/pretrain_460m.sh schedule.steps=10",
        "sbatch slurm/preprocess.sh data/corpus --tokeniser=bytes -- a.jsonl",
        "sbatch slurm/export.sh runs/first exported --absent",
        f"torchrun --nproc-per-node 3 {PRETRAIN} parallel.tp_size=2",
        f"torchrun --nproc-per-node 2 {PRETRAIN.replace('launchers/pretrain', 'tools/preflight')} --absent",
    ],
)
def test_a_wrong_command_is_noticed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, SystemExit)):
        check(shlex.split(command))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_exists(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def paths_of_tree(tree: str) -> list[str]:
    """The paths that an indented tree names: an entry lies in the last folder that is indented less."""
    paths: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in tree.splitlines():
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        folders = [(at, folder) for at, folder in folders if at < depth]
        paths.append((folders[-1][1] if folders else "") + name)
        if name.endswith("/"):
            folders.append((depth, paths[-1]))
    return paths


def tree_of_readme() -> list[str]:
    return paths_of_tree(re.search(r"## The tree\s+```\n(.*?)```", README, flags=re.S)[1])


def test_the_paths_that_the_readme_names_exist():
    named = re.findall(r"`((?:tests|tools|docs|configs|slurm|megalite)/[\w/.]+)`", README)
    named += tree_of_readme()
    assert len(named) > 100
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("folder", ["launchers", "megalite", "tools"])
def test_the_tree_names_every_source_once_and_no_other(folder):
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
    named = [path for path in tree_of_readme() if path.startswith(f"{folder}/") and path.endswith(".py")]
    assert sorted(named) == sorted(path for path in sources if not path.endswith("/__init__.py"))


def test_a_tree_is_read_by_its_indentation():
    tree = "a/  a folder\n  b.py  a file\n  c/\n    d.py\n  e.py\nf.py  another\n"
    assert paths_of_tree(tree) == ["a/", "a/b.py", "a/c/", "a/c/d.py", "a/e.py", "f.py"]


def test_pictures_are_small_and_shown():
    pages = "".join(
        page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    )
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.name in pages and picture.stat().st_size < 200_000


def names_of_example(number: int) -> dict[str, Any]:
    """What an example of the page leaves behind when it is run."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(re.findall(r"```python\n(.*?)```", README, flags=re.S)[number], names)
    return names


def run_example(rank: int) -> tuple[float, int, torch.Tensor]:
    """(loss, number of pieces, gradient) of the example on this rank."""
    names = names_of_example(0)
    weight = names["layer"].up.weight
    return names["loss"].item(), weight.spec.cuts[0].num_pieces, weight.grad


def test_the_example_gives_the_same_loss_and_gradients_on_one_and_two_processes():
    [(loss, pieces, gradient)] = run_distributed(run_example, 1)
    assert pieces == 1 and loss > 0
    on_two = run_distributed(run_example, 2)
    assert [pieces for _, pieces, _ in on_two] == [2, 2]
    assert [loss for loss, _, _ in on_two] == pytest.approx([loss, loss], rel=1e-5)
    torch.testing.assert_close(torch.cat([part for _, _, part in on_two]), gradient, rtol=1e-4, atol=1e-9)
    assert not torch.allclose(on_two[0][2], on_two[1][2])


def test_the_example_continues_a_prompt_with_the_model_of_a_run(tmp_path, monkeypatch, capsys):
    run = tiny_run()
    llama = random_llama(run.model)
    save_llama(tmp_path / "runs/first/checkpoints", llama, run)
    monkeypatch.chdir(tmp_path)
    tokens = names_of_example(1)["tokens"]
    prompt = tokens[:, : len("def main(")]
    assert bytes(prompt[0].tolist()) == b"def main("
    assert tokens.equal(llama.bfloat16().generate(prompt, max_new_tokens=20, do_sample=False))
    assert capsys.readouterr().out.endswith("torch.Size([1, 29, 257])\n")
