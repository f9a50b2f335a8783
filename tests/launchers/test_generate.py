"""A model cut over the processes of a launch continues prompts, as a user starts it."""

import io
import shlex

import pytest

from megalite.checkpoint.format import step_folder
from megalite.checkpoint.peft_folder import export_adapter
from tests.checkpoint.adapters import LORA, random_factors, save_factors
from tests.checkpoint.llamas import random_llama, save_llama, tiny_run
from tests.generation.talkers import MAX_NEW_TOKENS, MESSAGES, save_talker
from tests.launchers.jobs import ROOT, Job
from tests.ports import reserve_port
from tests.tokenizer.chat_tokenizer import build_chat_tokenizer
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


def test_deepspeed_holds_the_conversation_of_one_process(folder, capsys, monkeypatch):
    """With an adapter in PEFT's format and the Hugging Face folder of its base: both are read in parts."""
    talker = save_talker(folder / "talker", "chatml")
    talker.llama.save_pretrained(folder / "hf")
    tuned = talker.run.model_copy(update={"lora": LORA})
    step = step_folder(talker.checkpoints, 10)
    adapter = save_factors(folder / "tuned", tuned, step, random_factors(talker.llama))
    export_adapter(adapter, folder / "peft", "float32", add_files=build_chat_tokenizer().save)
    messages = [*MESSAGES[:2], "x " * 200, "/new", *MESSAGES]
    (folder / "messages.txt").write_text("".join(f"{message}\n" for message in messages))
    options = ["--checkpoint", "peft", "--base", "hf", "--chat", "--chat-template", "chatml"]
    options += ["--temperature", "0", "--max-new-tokens", str(MAX_NEW_TOKENS)]
    port = str(reserve_port())
    command = shlex.join(["deepspeed", "--num_gpus", "2", "--master_port", port, TOOL, *options])
    with Job(["sh", "-c", f"{command} < messages.txt"], folder, DS_ACCELERATOR="cpu") as job:
        end = job.wait(200)
    assert (end.returncode, len(end.errors)) == (0, 1), end.stderr
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", (folder / "messages.txt").open())
    capsys.readouterr()
    assert generate.main([*options, "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    expected = io.StringIO(printed.out, newline=None).read()
    assert expected in end.stdout and len(expected.splitlines()) >= 6
    assert printed.err.splitlines() == end.errors
