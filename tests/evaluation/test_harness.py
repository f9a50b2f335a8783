"""The harness on a checkpoint, against its own `hf` model on the export: the same numbers, exactly."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from megalite.evaluation.harness import Harness
from megalite.evaluation.record import Evaluation, EvaluationError
from tests.checkpoint.llamas import random_llama, save_llama, tiny_run
from tests.evaluation.harness_tasks import NEW_TOKENS, QUESTIONS, TASKS, write_tasks
from tools import convert_to_hf, evaluate

MISSING = "lm_eval is not installed: pip install 'megalite[eval]'"
END = 256


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason=MISSING)


@pytest.fixture
def local_tasks_only(monkeypatch, lm_eval):
    """Leave out what takes seconds: the harness's own thousands of tasks, and a report on the machine."""
    import lm_eval.tasks

    local = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", local)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


class Place:
    """A run's folder with a checkpoint, its export, and tasks."""

    def __init__(self, folder: Path, variant: str) -> None:
        run = tiny_run(variant)
        self.llama = random_llama(run.model)
        self.llama.lm_head.weight.data[END] *= 3  # so that some continuations end before their last token
        self.run, self.exported = folder / "run", folder / "exported"
        save_llama(self.run / "checkpoints", self.llama, run)
        where = ["--checkpoint", str(self.run / "checkpoints"), "--output", str(self.exported)]
        assert convert_to_hf.main([*where, "--dtype", "float32"]) == 0
        self.tasks = write_tasks(folder / "tasks", self.continued)

    @torch.no_grad()
    def continued_tokens(self, text: str) -> list[int]:
        """Greedy, up to the end of the text: without a cache, without the harness."""
        prompt = list(text.encode())
        found: list[int] = []
        while len(found) < NEW_TOKENS:
            token = int(self.llama(torch.tensor([prompt + found])).logits[0, -1].argmax())
            if token == END:
                break
            found.append(token)
        return found

    def continued(self, text: str) -> str:
        """Up to the end of the line."""
        return bytes(self.continued_tokens(text)).decode(errors="replace").partition("\n")[0]

    def evaluate(self, *extra: str) -> int:
        arguments = ["--include-path", str(self.tasks), "--device", "cpu", *extra]
        return evaluate.main(["--checkpoint", str(self.run), *arguments])

    def numbers(self, *extra: str) -> dict[tuple[str, str], float]:
        assert self.evaluate(*extra) == 0
        record = Evaluation.read(self.run / "evaluation.json")
        return {(row.task, row.metric): row.value for row in record.measurements}


@pytest.fixture(scope="module")
def place(tmp_path_factory, lm_eval):
    return Place(tmp_path_factory.mktemp("harness"), "plain")


def theirs(place, **options) -> dict[tuple[str, str], float]:
    """What lm_eval's own `hf` model measures on the exported folder."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(place.exported)},
        tasks=list(TASKS),
        device="cpu",
        batch_size=8,
        task_manager=TaskManager(include_path=str(place.tasks), include_defaults=False),
        **options,
    )
    return {
        (task, key.removesuffix(",none")): value
        for task, numbers in results["results"].items()
        for key, value in numbers.items()
        if key.endswith(",none") and "stderr" not in key
    }


@pytest.mark.usefixtures("local_tasks_only")
@pytest.mark.parametrize("variant", ["plain", "experts"])
def test_a_checkpoint_gives_the_numbers_of_its_export_in_every_kind_of_task(tmp_path, lm_eval, variant):
    place = Place(tmp_path, variant)
    found = place.numbers("--tasks", ",".join(TASKS))
    assert found == theirs(place)
    assert {task for task, _ in found} == set(TASKS) and len(found) == 6
    assert found["tiny_generate", "exact_match"] == 0.5
    ended = [len(place.continued_tokens(text)) < NEW_TOKENS for text in QUESTIONS]
    assert any(ended) and not all(ended)
    assert found["tiny_rolling", "byte_perplexity"] > 100  # of a random model


@pytest.mark.usefixtures("local_tasks_only")
def test_fewshot_and_limit_reach_the_harness(place, capsys):
    found = place.numbers("--tasks", ",".join(TASKS), "--num-fewshot", "1", "--limit", "3")
    assert found == theirs(place, num_fewshot=1, limit=3)
    record = Evaluation.read(place.run / "evaluation.json")
    assert {row.num_samples for row in record.measurements} == {3}
    assert {row.num_fewshot for row in record.measurements} == {1}
    assert record.settings["limit"] == 3


@pytest.mark.usefixtures("local_tasks_only")
def test_an_exported_folder_is_evaluated_and_its_table_printed(place, capsys, tmp_path):
    of_checkpoint = place.numbers("--tasks", "tiny")
    capsys.readouterr()
    output = tmp_path / "new" / "e.json"
    assert (
        place.evaluate("--checkpoint", str(place.exported), "--tasks", "tiny", "--output", str(output)) == 0
    )
    record = Evaluation.read(output)
    assert {(row.task, row.metric): row.value for row in record.measurements} == of_checkpoint
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"\| task +\| few-shot \| metric +\| value +\| standard error \| samples \|", lines[0]
    )
    assert len(lines) == 2 + len(record.measurements)
    assert lines[2].split(" | ")[2].strip() == "acc"


def folders_of_reference(lm_eval) -> list[Path]:
    """Where the harness has the tasks of megalite_reference."""
    names = ("arc", "hellaswag", "mmlu/default", "truthfulqa", "winogrande", "wikitext")
    return [Path(lm_eval.__file__).parent / "tasks" / name for name in names]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tasks", "tiny,tiny_choice"], "--tasks: Duplicate task"),
        (["--tasks", "tiny_chioce"], "there is no task tiny_chioce: did you mean tiny_choice"),
        (["--tasks", "tiny", "--include-path", "absent"], "--include-path: there is no folder absent"),
        (["--tasks", "tiny", "--tokenizer", "absent.json"], "absent.json: no such file"),
    ],
)
@pytest.mark.usefixtures("local_tasks_only")
def test_a_mistake_is_one_line(place, capsys, extra, message):
    assert place.evaluate(*extra) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.usefixtures("local_tasks_only")
def test_data_that_is_not_here_is_one_line(lm_eval):
    with pytest.raises(EvaluationError, match="the data of megalite_reference cannot be had: ") as stop:
        Harness(["megalite_reference"], [*folders_of_reference(lm_eval), evaluate.TASK_FOLDER])
    assert "\n" not in str(stop.value)


def test_without_the_harness_one_line_says_how_to_get_it(monkeypatch):
    for module in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EvaluationError, match=r"found nothing: pip install 'megalite\[eval\]'$"):
        Harness(["tiny"])


def test_the_reference_group_has_the_few_shot_counts_of_the_open_llm_leaderboard(lm_eval):
    folder = Path(lm_eval.__file__).parent / "tasks" / "benchmarks"
    leaderboard = yaml.safe_load((folder / "openllm.yaml").read_text(encoding="utf-8"))
    ours = yaml.safe_load((evaluate.TASK_FOLDER / "megalite_reference.yaml").read_text(encoding="utf-8"))
    counts = {row["task"].removesuffix("_mc2"): row["num_fewshot"] for row in ours["task"]}
    expected = {row["task"]: row["num_fewshot"] for row in leaderboard["task"]}
    assert counts == {task: n for task, n in expected.items() if task != "gsm8k"} | {"wikitext": 0}
    from lm_eval.tasks import TaskManager

    folders = [str(folder) for folder in folders_of_reference(lm_eval)]
    known = TaskManager(include_path=folders, include_defaults=False).all_tasks
    assert {row["task"] for row in ours["task"]} <= set(known)
