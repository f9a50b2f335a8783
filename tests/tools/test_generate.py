"""The command that continues a prompt."""

import pytest
import torch

from tests.checkpoint.llamas import random_llama, save_llama, tiny_run
from tools import generate


def save(tmp_path, variant="plain", **data):
    run = tiny_run(variant, **data)
    llama = random_llama(run.model)
    save_llama(tmp_path / "checkpoints", llama, run)
    return llama


def run_tool(tmp_path, *extra: str) -> int:
    where = ["--checkpoint", str(tmp_path / "checkpoints"), "--device", "cpu"]
    return generate.main([*where, "--prompt", "def f(x):", "--max-new-tokens", "12", *extra])


def text_of(tmp_path, capsys, *extra: str) -> str:
    assert run_tool(tmp_path, *extra) == 0
    return capsys.readouterr().out


@torch.no_grad()
def greedy(llama, prompt: bytes, num_tokens: int) -> bytes:
    """The reference: the whole sequence again for each token, without a cache."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(llama(torch.tensor([tokens])).logits[0, -1].argmax()))
    return bytes(tokens[len(prompt) :])


@pytest.mark.parametrize("variant", ["plain", "experts", "tied experts"])
def test_without_temperature_it_prints_the_likeliest_continuation(tmp_path, capsys, variant):
    llama = save(tmp_path, variant)
    expected = greedy(llama, b"def f(x):", 12).decode(errors="replace")
    assert text_of(tmp_path, capsys, "--temperature", "0") == expected + "\n"


def test_a_seed_repeats_its_text_and_another_seed_gives_another(tmp_path, capsys):
    save(tmp_path)
    first = text_of(tmp_path, capsys, "--seed", "1")
    assert text_of(tmp_path, capsys, "--seed", "1") == first
    assert text_of(tmp_path, capsys, "--seed", "2") != first


def test_an_empty_prompt_begins_a_document(tmp_path, capsys):
    save(tmp_path)
    assert text_of(tmp_path, capsys, "--prompt", "")


def test_text_appears_when_its_characters_are_whole(capsys):
    printer = generate.Printer(generate.load_tokenizer("bytes"), end_of_text=256)
    printer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    seen = []
    for token in [*"aé".encode(), 256]:
        printer.put(torch.tensor([token]))
        seen.append(capsys.readouterr().out)
    printer.end()
    assert seen == ["a", "", "é", ""]
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--checkpoint", "absent"], "no checkpoint in absent: expected RUN_DIR/checkpoints"),
        (["--tokenizer", "absent"], "absent: no such file or folder"),
        (
            ["--max-new-tokens", "56"],
            "prompt of 9 tokens and --max-new-tokens 56 exceed the model's max_position_embeddings 64",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, extra, message):
    save(tmp_path)
    assert run_tool(tmp_path, *extra) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]


def test_a_router_that_transformers_has_not_is_refused_in_one_line(tmp_path, capsys):
    run = tiny_run("experts")
    model = run.model.model_copy(update={"scoring_func": "softmax"})
    save_llama(tmp_path / "checkpoints", random_llama(run.model), run.model_copy(update={"model": model}))
    assert run_tool(tmp_path) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "scoring_func is softmax" in lines[0]


def test_a_run_without_a_tokenizer_asks_for_one(tmp_path, capsys):
    save(tmp_path, train=["corpus"])
    assert run_tool(tmp_path) == 2
    assert "names no tokenizer: name it with --tokenizer" in capsys.readouterr().err
    assert run_tool(tmp_path, "--tokenizer", "bytes") == 0


@pytest.mark.parametrize(
    "extra", [["--max-new-tokens", "0"], ["--temperature", "-1"], ["--temperature", "x"]]
)
def test_a_number_out_of_range_is_refused(tmp_path, capsys, extra):
    with pytest.raises(SystemExit) as stop:
        run_tool(tmp_path, *extra)
    assert stop.value.code == 2
    assert f"{extra[1]!r} is not a" in capsys.readouterr().err
