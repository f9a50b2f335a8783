"""A model cut over the processes of a launch continues prompts, as a user starts it."""

import io
import shlex

import pytest

from tests.checkpoint.llamas import random_llama, save_llama, tiny_run
from tests.launchers.jobs import ROOT, Job
from tests.ports import reserve_port
from tools import generate

TOOL = str(ROOT / "tools/generate.py")
OPTIONS = ["--checkpoint", "runs/first", "--temperature", "0", "--max-new-tokens", "12"]
PROMPTS = ['it\'s a "much" longer prompt', "b", "c d"]


@pytest.fixture
def folder(tmp_path):
    run = tiny_run("experts")
    save_llama(tmp_path / "runs/first/checkpoints", random_llama(run.model), run)
    return tmp_path


def on_one(folder, capsys, monkeypatch, prompts):
    """What one process prints, with its ends of lines as a file read as text has them."""
    monkeypatch.chdir(folder)
    options = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert generate.main([*OPTIONS, "--device", "cpu", *options]) == 0
    return io.StringIO(capsys.readouterr().out, newline=None).read()


def launched(launcher: str, num_ranks: int) -> list[str]:
    port = str(reserve_port())
    if launcher == "deepspeed":
        return ["deepspeed", "--num_gpus", str(num_ranks), "--master_port", port, TOOL, *OPTIONS]
    launch = ["python", "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    return [*launch, "--master-port", port, TOOL, *OPTIONS, "--device", "cpu"]


def test_deepspeed_prints_once_what_one_process_prints(folder, capsys, monkeypatch):
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    with Job([*launched("deepspeed", 2), *prompts], folder, DS_ACCELERATOR="cpu") as job:
        end = job.wait(200)
    assert end.returncode == 0, end.stderr
    expected = on_one(folder, capsys, monkeypatch, PROMPTS)
    assert expected in end.stdout  # among the launcher's own lines
    assert end.stdout.count("==>") == len(PROMPTS)


def test_torchrun_reads_standard_input_once_for_all(folder, capsys, monkeypatch):
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    command = shlex.join([*launched("torchrun", 2), "--prompt", "-"])
    with Job(["sh", "-c", f"{command} < prompts.txt"], folder) as job:
        end = job.wait(200)
    assert end.returncode == 0, end.stderr
    assert end.stdout == on_one(folder, capsys, monkeypatch, PROMPTS)


def test_a_number_of_processes_that_does_not_fit_the_model_is_one_line(folder):
    with Job([*launched("torchrun", 3), "--prompt", "x"], folder) as job:
        end = job.wait(200)
    assert end.returncode != 0 and end.stdout == ""
    [line] = end.errors
    assert "model.num_attention_heads 4 is not divisible by parallel.tp_size 3" in line
