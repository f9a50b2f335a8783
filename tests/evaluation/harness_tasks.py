"""Local tasks of each kind for lm-evaluation-harness."""

import json
from collections.abc import Callable
from pathlib import Path

TEXTS = [
    "né is a name",
    "if x: return y",
    "def f(x):",
    "the file",
    "a b c d e",
    "1 + 1 = 2",
    "tiny",
    "ab" * 60,
]
CHOICE = """\
task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
fewshot_split: test
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """\
task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
GENERATE = """\
task: tiny_generate
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{continuation}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: %d
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
NEW_TOKENS = 8
GROUP = "group: tiny\ntask:\n  - tiny_choice\n  - tiny_rolling\n"
TASKS = ("tiny_choice", "tiny_rolling", "tiny_generate")
QUESTIONS = [text[: 2 + 3 * i] for i, text in enumerate(TEXTS)]  # unlike lengths: batches are filled up


def write_tasks(folder: Path, continued: Callable[[str], str]) -> Path:
    """The folder, filled with task files and their data.

    continued: what the model makes of a text: the first half of the answers of tiny_generate.
    """
    folder.mkdir()
    rows = [
        {
            "question": QUESTIONS[i],
            "choices": [text[4:40] or "?", text[:3], text[40::-1]],
            "answer": i % 3,
            "text": text,
            "continuation": continued(QUESTIONS[i]) + "?" * (i // 4),
        }
        for i, text in enumerate(TEXTS)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    for name, text in zip(TASKS, (CHOICE, ROLLING, GENERATE % NEW_TOKENS), strict=True):
        (folder / f"{name}.yaml").write_text(text + source, encoding="utf-8")
    (folder / "tiny.yaml").write_text(GROUP, encoding="utf-8")
    return folder
