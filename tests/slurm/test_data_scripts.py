"""slurm/preprocess.sh, export.sh, debug.sh and pretrain_7b.sh under a real Slurm of two nodes, no GPUs."""

import json
import subprocess
from pathlib import Path

import pytest

from megalite.config.load import load_run
from megalite.data.indexed_dataset import IndexedDataset
from tests.slurm.cluster import Cluster
from tests.slurm.test_pretrain_script import REPOSITORY, SHOW_CHECK, SHOW_RANK, TWO_BY_ONE, read_ranks

ONE_CORE = ["--cpus-per-task=1"]
SHOW_TOOL = """
import json, sys
from pathlib import Path
name, words = Path(sys.argv[0]).stem, sys.argv[1:]
if name == "convert_to_hf" and "broken" in words[1]:
    sys.exit(1)
output = Path(words[words.index("--output") + 1])
if name == "convert_to_hf":
    output.mkdir()
    (output / "config.json").touch()
with Path("said.jsonl").open("a") as said:
    said.write(json.dumps([name, *words]) + chr(10))
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A checkout whose tools show what they are given."""
    for folder in ("launchers", "tools"):
        (tmp_path / folder).mkdir()
    for top in ("slurm", "configs"):
        (tmp_path / top).symlink_to(REPOSITORY / top)
    (tmp_path / "launchers" / "pretrain.py").write_text(SHOW_RANK)
    (tmp_path / "tools" / "preflight.py").write_text(SHOW_CHECK)
    for name in ("convert_to_hf", "evaluate"):
        (tmp_path / "tools" / f"{name}.py").write_text(SHOW_TOOL)
    return tmp_path


def script(name: str) -> Path:
    return REPOSITORY / "slurm" / name


def test_the_parts_of_an_array_are_merged_to_the_documents_in_their_order(
    cluster: Cluster, tmp_path: Path
) -> None:
    texts = [f"text of file {number}" for number in range(5)]
    files = [tmp_path / f"{number}.jsonl" for number in range(5)]
    for file, text in zip(files, texts, strict=True):
        file.write_text(json.dumps({"text": text}) + "\n")
    prefix = str(tmp_path / "corpus")
    arguments = [prefix, "--tokenizer=bytes", "--append-eod", "--", *map(str, files)]
    array = cluster.submit(
        script("preprocess.sh"), *arguments, options=["--array=0-1", *ONE_CORE], cwd=REPOSITORY
    )
    after = [f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes", *ONE_CORE]
    merge = cluster.submit(script("preprocess.sh"), "--merge", prefix, options=after, cwd=REPOSITORY)
    job = cluster.wait(merge, timeout_seconds=180)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log + cluster.log(array)

    assert [len(IndexedDataset(f"{prefix}.part-{part}_text_document")) for part in range(2)] == [2, 3]
    whole = IndexedDataset(f"{prefix}_text_document")
    assert [bytes(whole[at][:-1].tolist()).decode() for at in range(len(whole))] == texts


def complaint_of(cluster: Cluster, name: str, *arguments: str, options: list[str]) -> str:
    job_id = cluster.submit(script(name), *arguments, options=[*options, *ONE_CORE], cwd=REPOSITORY)
    job = cluster.wait(job_id, timeout_seconds=60)
    assert job.state == "FAILED" and job.log.startswith("error: ") and job.log.count("\n") == 1, job.log
    return job.log


def test_what_cannot_be_preprocessed_or_merged_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    tell = lambda *arguments, options=(): complaint_of(  # noqa: E731
        cluster, "preprocess.sh", *arguments, options=list(options)
    )
    prefix = str(tmp_path / "p")
    assert "submit with sbatch --array" in tell(prefix, "--", "a.jsonl")
    assert "no inputs" in tell(prefix, "a.jsonl", options=["--array=0-0"])
    assert "preprocess the parts first" in tell("--merge", prefix)
    assert "write --json-key=NAME" in tell(
        prefix, "--json-key", "title", "--", "a.jsonl", options=["--array=0-0"]
    )


def test_parts_of_another_command_are_neither_kept_nor_merged(cluster: Cluster, tmp_path: Path) -> None:
    prefix = str(tmp_path / "p")
    tell = lambda *arguments, options=("--array=0-0",): complaint_of(  # noqa: E731
        cluster, "preprocess.sh", *arguments, options=list(options)
    )
    (tmp_path / "p.parts").write_text("3\ncontent\n--json-key=content\n--\na\nb\nc\n")
    for part in (0, 1):
        (tmp_path / f"p.part-{part}_content_document.idx").touch()
    assert f"part 2 of 3 is not there ({prefix}.part-2_content_document.idx)" in tell("--merge", prefix)
    assert "is of other inputs, options or tasks" in tell(prefix, "--json-key=content", "--", "a", "b", "c")
    alone = tell(prefix, "--json-key=content", "--", "a", "b", "c", options=["--array=2"])
    assert "the array has 1 tasks up to 2: give all of it, --array=0-N" in alone


def test_an_export_after_a_job_is_verified_and_then_measured(cluster: Cluster, stand_in: Path) -> None:
    trained = cluster.submit(script("pretrain_460m.sh"), options=TWO_BY_ONE, cwd=stand_in)
    (stand_in / "run").mkdir()
    words = ["run", "exported", "--perplexity", "data/p"]
    after = [f"--dependency=afterok:{trained}", *ONE_CORE]
    job_id = cluster.submit(script("export.sh"), *words, options=after, cwd=stand_in)
    job = cluster.wait(job_id, timeout_seconds=60)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    said = [json.loads(line) for line in (stand_in / "said.jsonl").read_text().splitlines()]
    evaluation = ["--output", "exported/evaluation.json", "--perplexity", "data/p"]
    assert said == [
        ["convert_to_hf", "--checkpoint", "run", "--output", "exported", "--verify"],
        ["evaluate", "--checkpoint", "exported", *evaluation],
    ]


def test_an_export_that_fails_is_not_measured(cluster: Cluster, stand_in: Path) -> None:
    (stand_in / "broken").mkdir()
    words = ["broken", "exported", "--perplexity", "data/p"]
    job_id = cluster.submit(script("export.sh"), *words, options=ONE_CORE, cwd=stand_in)
    assert cluster.wait(job_id, timeout_seconds=60).state == "FAILED"
    assert not (stand_in / "said.jsonl").exists()
    assert "RUN_DIR is 'absent'" in complaint_of(cluster, "export.sh", "absent", "out", options=[])


def test_a_debug_session_trains_on_the_nodes_that_it_is_given(cluster: Cluster, stand_in: Path) -> None:
    options = [*TWO_BY_ONE, "--time=00:05:00", "--quiet"]
    command = ["slurm/debug.sh", *options, "--", "slurm/pretrain_460m.sh", "seed=2"]
    done = subprocess.run(
        command, cwd=stand_in, env=cluster.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = read_ranks(stand_in)
    assert [rank["SLURMD_NODENAME"] for rank in ranks] == ["n1", "n2"]
    assert ranks[0]["arguments"][-1] == "seed=2"


def test_the_7b_run_has_tensor_and_pipeline_parallelism_and_zero_3(cluster: Cluster, stand_in: Path) -> None:
    job_id = cluster.submit(script("pretrain_7b.sh"), "seed=7", options=TWO_BY_ONE, cwd=stand_in)
    job = cluster.wait(job_id, timeout_seconds=60)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    arguments = read_ranks(stand_in)[0]["arguments"]
    assert arguments[:4] == [
        *("--deepspeed_config", "configs/deepspeed/llama2_7b.json"),
        *("--config", "configs/runs/llama2_7b.yaml"),
    ]
    run = load_run(str(REPOSITORY / arguments[3]), arguments[4:], str(REPOSITORY / arguments[1]))
    assert (run.parallel.tp_size, run.parallel.pp_size, run.seed) == (2, 2, 7)
    deepspeed = json.loads((REPOSITORY / arguments[1]).read_text())
    assert deepspeed["zero_optimization"]["stage"] == 3
    micro_batch, batch = deepspeed["train_micro_batch_size_per_gpu"], deepspeed["train_batch_size"]
    assert batch % (64 // 4 * micro_batch) == 0  # its 64 GPUs divide into the layout, and the batch over them
