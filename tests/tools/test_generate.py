"""The command that continues a prompt."""

import io

import pytest
import torch

from megalite.checkpoint.model import build_megalite_model, megalite_logits
from megalite.checkpoint.weights import Weights
from megalite.tokenizer.load import build_byte_tokenizer
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
        found = llama(torch.tensor([tokens]))
        tokens.append(int(getattr(found, "logits", found)[0, -1].argmax()))
        if tokens[-1] == 256:  # the end of text, which "b" comes to and other prompts do not
            break
    return bytes(token for token in tokens[len(prompt) :] if token != 256)


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
    where = ["--checkpoint", str(tmp_path), "--device", "cpu", "--max-new-tokens", "12", "--temperature", "0"]
    assert generate.main([*where, "--prompt", ""]) == 0
    text = capsys.readouterr().out
    assert generate.main([*where, "--prompt", "<|endoftext|>"]) == 0
    assert capsys.readouterr().out == text


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


def test_a_model_that_transformers_has_not_continues_prompts_as_well(tmp_path, capsys):
    run = tiny_run("experts")
    run = run.model_copy(update={"model": run.model.model_copy(update={"scoring_func": "softmax"})})
    checkpoint = save_llama(tmp_path / "checkpoints", random_llama(run.model), run)
    stage = build_megalite_model(Weights(checkpoint, run.model))
    expected = greedy(lambda tokens: megalite_logits(stage, tokens), b"def f(x):", 12)
    assert text_of(tmp_path, capsys, "--temperature", "0") == expected.decode(errors="replace") + "\n"


def test_a_run_without_a_tokenizer_asks_for_one(tmp_path, capsys):
    save(tmp_path, train=["corpus"])
    assert run_tool(tmp_path) == 2
    assert "names no tokenizer: name it with --tokenizer" in capsys.readouterr().err
    assert run_tool(tmp_path, "--tokenizer", "bytes") == 0


@pytest.mark.parametrize("path", ["", "checkpoints", "checkpoints/step-00000010"])
def test_a_checkpoint_is_named_by_its_run_its_folder_or_itself(tmp_path, capsys, path):
    save(tmp_path)
    assert text_of(tmp_path, capsys, "--checkpoint", str(tmp_path / path))


PROMPTS = ["a much longer prompt", "b", "c d"]


def each_on_its_own(llama) -> str:
    texts = [greedy(llama, prompt.encode(), 12).decode(errors="replace") for prompt in PROMPTS]
    return "".join(f"==> {prompt} <==\n{text}\n\n" for prompt, text in zip(PROMPTS, texts, strict=True))


@pytest.mark.parametrize("variant", ["plain", "experts"])
@pytest.mark.parametrize("batch_size", ["1", "2", "8"])
def test_several_prompts_are_continued_as_each_alone_is(tmp_path, capsys, variant, batch_size):
    llama = save(tmp_path, variant)
    extra = [word for prompt in PROMPTS[1:] for word in ("--prompt", prompt)]
    where = ["--checkpoint", str(tmp_path), "--prompt", PROMPTS[0], *extra, "--max-new-tokens", "12"]
    assert generate.main([*where, "--device", "cpu", "--temperature", "0", "--batch-size", batch_size]) == 0
    assert capsys.readouterr().out == each_on_its_own(llama)


def test_prompts_are_read_from_standard_input_one_a_line(tmp_path, capsys, monkeypatch):
    llama = save(tmp_path)
    where = ["--checkpoint", str(tmp_path), "--device", "cpu", "--max-new-tokens", "12"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS) + "\n"))
    assert generate.main([*where, "--prompt", "-", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == each_on_its_own(llama)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert generate.main([*where, "--prompt", "-"]) == 2
    assert capsys.readouterr().err == "error: no prompt on standard input: write one a line\n"


def test_the_text_ends_before_the_first_stop_text(tmp_path, capsys):
    llama = save(tmp_path)
    text = greedy(llama, b"def f(x):", 12).decode(errors="replace")
    places = [i for i in range(1, 11) if "\N{REPLACEMENT CHARACTER}" not in text[i : i + 2]]
    first, later = text[places[0] :][:2], text[places[-1] :][:2]
    shown = text_of(tmp_path, capsys, "--temperature", "0", "--stop", later, "--stop", first)
    assert shown == text[: text.find(first)] + "\n" != text + "\n"


def test_one_likely_token_leaves_nothing_to_draw(tmp_path, capsys):
    save(tmp_path)
    likeliest = text_of(tmp_path, capsys, "--temperature", "0")
    assert text_of(tmp_path, capsys, "--top-k", "1") == likeliest
    assert text_of(tmp_path, capsys, "--top-p", "1e-6", "--temperature", "2") == likeliest
    assert text_of(tmp_path, capsys, "--temperature", "2") != likeliest


def test_a_chat_template_frames_the_prompt(tmp_path, capsys):
    llama = save(tmp_path)
    build_byte_tokenizer().save(tmp_path / "tokenizer")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    (tmp_path / "tokenizer/chat_template.jinja").write_text(template)
    extra = ["--temperature", "0", "--chat", "--tokenizer", str(tmp_path / "tokenizer")]
    expected = greedy(llama, b"<user>def f(x):<answer>", 12).decode(errors="replace")
    assert text_of(tmp_path, capsys, *extra) == expected + "\n"
    assert run_tool(tmp_path, "--chat") == 2
    assert capsys.readouterr().err == (
        "error: bytes has no chat template: name a Jinja file or one of chatml, llama3, plain with "
        "--chat-template\n"
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--max-new-tokens", "0"], "'0' is not a whole number above 0"),
        (["--batch-size", "x"], "'x' is not a whole number above 0"),
        (["--temperature", "-1"], "'-1' is not a number of at least 0"),
        (["--temperature", "inf"], "'inf' is not a number of at least 0"),
        (["--top-k", "1.5"], "'1.5' is not a whole number of at least 0"),
        (["--top-p", "0"], "'0' is not a number above 0 and of at most 1"),
        (["--top-p", "1.1"], "'1.1' is not a number above 0 and of at most 1"),
        (["--seed", "-1"], "'-1' is not a whole number of at least 0"),
        (["--stop", ""], "an empty text stands everywhere"),
        (["--device", "gpu"], "'gpu' is not a device of this machine"),
    ],
)
def test_a_value_that_cannot_be_is_refused(tmp_path, capsys, extra, message):
    with pytest.raises(SystemExit) as stop:
        run_tool(tmp_path, *extra)
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {extra[0]}: " in line and message in line


def test_one_rank_speaks_of_a_mistake_for_all(capsys, monkeypatch):
    monkeypatch.setattr(generate.time, "sleep", lambda seconds: None)
    for rank in (1, 0):
        assert capsys.readouterr().err == ""
        with pytest.raises(SystemExit):
            generate.parse_on_rank(["--top-p", "2"], rank)
    assert "--top-p" in capsys.readouterr().err
