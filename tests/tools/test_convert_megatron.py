"""The command that converts to and from Megatron, against megatron-core's own GPTModel on the CPU."""

import json
import pickle
import random
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megalite.checkpoint import megatron, megatron_args, megatron_conversion
from megalite.checkpoint.megatron_args import args_of_model, layout_args
from megalite.config.model import ModelConfig
from tests.checkpoint.megatrons import VARIANTS, load_gpt
from tests.harness import run_distributed
from tests.tools.conversions import (
    LIKE_MEGATRON,
    assert_same_checkpoint,
    assert_same_logits,
    assert_same_shards,
    export_to,
    import_to,
    layout_options,
    our_logits,
    saved,
    shards,
)
from tools import convert_megatron

LLAMA3 = {"rope_type": "llama3"} | megatron_args.LLAMA3
CASES = [
    *((variant, tp_size, 1, 1) for variant in VARIANTS for tp_size in (1, 2)),
    ("tied", 1, 2, 1),
    ("plain", 2, 2, 1),
    ("biases of heads", 4, 1, 1),  # with copies of key heads
    ("experts", 1, 1, 2),
    ("experts", 1, 1, 4),
    ("experts", 2, 1, 2),
    ("softmax experts", 1, 3, 2),
]


@pytest.mark.parametrize(("variant", "tp_size", "pp_size", "ep_size"), CASES)
def test_a_model_of_megatron_gives_the_same_logits_here_and_goes_back_bit_for_bit(
    tmp_path, variant, tp_size, pp_size, ep_size
):
    theirs = saved(tmp_path, variant, tp_size, pp_size, ep_size)
    assert import_to(tmp_path) == 0
    ours = our_logits(tmp_path)
    assert ours.shape[-1] == 101
    assert_same_logits(ours, theirs)
    assert export_to(tmp_path, *layout_options(tp_size, pp_size, ep_size), *LIKE_MEGATRON) == 0
    assert_same_shards(shards(tmp_path / "back"), shards(tmp_path / "megatron"))


LAYOUTS = [
    *((variant, 2, 1, 1) for variant in VARIANTS),
    ("biases of heads", 4, 1, 1),
    ("experts", 1, 1, 2),
    ("experts", 2, 1, 2),
    ("softmax experts", 1, 3, 2),
    ("experts", 1, 2, 2),  # three layers in stages of two and one
]


@pytest.mark.parametrize(("variant", "tp_size", "pp_size", "ep_size"), LAYOUTS)
def test_an_export_is_loaded_by_megatron_under_its_own_arguments(
    tmp_path, variant, tp_size, pp_size, ep_size
):
    """In another layout than it came in, every name in its place."""
    saved(tmp_path, variant)
    assert import_to(tmp_path) == 0
    assert export_to(tmp_path, *layout_options(tp_size, pp_size, ep_size), *LIKE_MEGATRON) == 0
    theirs = run_distributed(load_gpt, tp_size * pp_size * ep_size, tmp_path / "back")[-1]
    assert_same_logits(our_logits(tmp_path), theirs)


@pytest.mark.parametrize(
    ("variant", "tp_size", "pp_size", "ep_size"),
    [("plain", 1, 1, 1), ("tied", 2, 1, 1), ("plain", 1, 2, 1), ("experts", 2, 1, 1), ("experts", 1, 1, 2)],
)
def test_the_distributed_form_gives_the_same_logits(tmp_path, variant, tp_size, pp_size, ep_size):
    theirs = saved(tmp_path, variant, tp_size, pp_size, ep_size, distributed=True)
    assert import_to(tmp_path) == 0
    assert_same_logits(our_logits(tmp_path), theirs)


# Stages that are not equal


UNEQUAL = [
    ({"num_layers": 3, "decoder_first_pipeline_num_layers": 1}, 2),
    ({"num_layers": 5, "decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 2}, 3),
    ({"pipeline_model_parallel_layout": [["embedding"], ["decoder"] * 2, ["loss"]]}, 3),
]


@pytest.mark.parametrize(("told", "pp_size"), UNEQUAL)
def test_stages_may_have_unequal_numbers_of_layers(tmp_path, told, pp_size):
    theirs = saved(tmp_path, "plain", 1, pp_size, **told)
    assert import_to(tmp_path) == 0
    assert_same_logits(our_logits(tmp_path), theirs)
    ends = [
        option
        for name, size in told.items()
        if name.startswith("decoder")
        for option in (f"--{name.replace('_', '-')}", str(size))
    ]
    if ends:
        assert export_to(tmp_path, *layout_options(1, pp_size), *ends, *LIKE_MEGATRON) == 0
        assert_same_shards(shards(tmp_path / "back"), shards(tmp_path / "megatron"))


def test_stages_that_cannot_be_equal_are_loaded_by_megatron(tmp_path, capfd):
    """Five layers in four stages, by the numbers that are printed and stand in the arguments."""
    saved(tmp_path, "tied", num_layers=5)
    assert import_to(tmp_path) == 0
    assert export_to(tmp_path, *layout_options(1, 4), *LIKE_MEGATRON) == 0
    told = "--decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 1"
    assert told in capfd.readouterr().err
    assert_same_logits(our_logits(tmp_path), run_distributed(load_gpt, 4, tmp_path / "back")[-1])


TOLD: list[tuple[dict[str, Any], list[int], str]] = [
    ({}, [1, 1], ""),
    ({}, [3, 2], "--decoder-first-pipeline-num-layers 3 --decoder-last-pipeline-num-layers 2"),
    ({"use_qk_norm": True, "rms_norm_eps": 1e-6}, [2], "--norm-epsilon 1e-06 --qk-layernorm"),
    ({"rope_scaling": LLAMA3 | {"factor": 16.0}}, [2], "--rope-scaling-factor 16.0 --use-rope-scaling"),
    ({"rope_scaling": LLAMA3 | {"factor": 8.0}}, [2], "--use-rope-scaling"),
    (
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        [2],
        "--rotary-seq-len-interpolation-factor 4",
    ),
]


@pytest.mark.parametrize(("fields", "stages", "options"), TOLD)
def test_what_megatron_does_not_take_from_a_checkpoint_is_told(fields, stages, options):
    args = args_of_model(ModelConfig(**fields)) | layout_args(1, stages, 1)
    assert convert_megatron.to_be_told(args) == options


# Spellings


@pytest.mark.parametrize("variant", ["biases", "experts"])
def test_the_names_of_transformer_engine_are_written_and_read(tmp_path, variant):
    saved(tmp_path, variant)
    assert import_to(tmp_path) == 0
    assert export_to(tmp_path, "--dtype", "float32") == 0
    names = {name for _, name in shards(tmp_path / "back")}
    layer = "decoder.layers.1."
    assert f"{layer}self_attention.linear_qkv.layer_norm_weight" in names
    assert f"{layer}input_layernorm.weight" not in names
    if variant == "experts":
        assert {f"{layer}mlp.experts.linear_fc1.weight3", f"{layer}pre_mlp_layernorm.weight"} <= names
        assert not any("local_experts" in name for name in names)
        assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in names
    else:
        assert f"{layer}mlp.linear_fc1.layer_norm_weight" in names
    again = tmp_path / "again"
    (again / "megatron").mkdir(parents=True)
    shutil.copytree(tmp_path / "back", again / "megatron", dirs_exist_ok=True)
    assert import_to(again) == 0
    assert_same_checkpoint(again, tmp_path)


def test_an_export_is_of_bfloat16_but_for_the_routers_biases(tmp_path):
    saved(tmp_path, "experts")
    assert import_to(tmp_path) == 0
    assert export_to(tmp_path) == 0
    back = {name: tensor.dtype for (_, name), tensor in shards(tmp_path / "back").items()}
    biases = {name for name, dtype in back.items() if dtype == torch.float32}
    assert biases == {f"decoder.layers.{layer}.mlp.router.expert_bias" for layer in (1, 2)}
    assert set(back.values()) == {torch.float32, torch.bfloat16}


# Wrong converters


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    where = tmp_path_factory.mktemp("two_by_two")
    return where / "megatron", saved(where, "plain", 2, 2)


def whole_shards(tensor, model, layout, rank):
    """The halves of fc1 are taken for one stack."""
    if "linear_fc1.weight" not in tensor.row.engine:
        return RIGHT_BLOCKS(tensor, model, layout, rank)
    stack = [(part, 0, part.shape[0]) for part in tensor.parts]
    rows = sum(part.shape[0] for part in tensor.parts)
    bands = megatron._cut(stack, rows, layout.tp_size, rank)
    return [megatron.Block(part, (first, 0), (rows, part.shape[1])) for part, first, rows in bands]


def rows_for_columns(tensor, model, layout, rank):
    if tensor.row.cut != "columns" or tensor.parts[0].shape[0] != tensor.parts[0].shape[1]:
        return RIGHT_BLOCKS(tensor, model, layout, rank)
    return RIGHT_BLOCKS(tensor._replace(row=tensor.row._replace(cut="rows")), model, layout, rank)


def up_first(tensor, model, layout, rank):
    if "linear_fc1.weight" in tensor.row.engine:
        tensor = tensor._replace(parts=tensor.parts[::-1])
    return RIGHT_BLOCKS(tensor, model, layout, rank)


def no_groups(parts, model):
    return [(part, 0, part.shape[0]) for part in parts]


def groups_turned_round(parts, model):
    size, last = model.head_dim, model.num_key_value_heads - 1
    return [
        (part, first if part is parts[0] else last * size - first, rows)
        for part, first, rows in RIGHT_GROUPS(parts, model)
    ]


def no_offset(folder, model):
    return [stage._replace(first_layer=0) for stage in RIGHT_STAGES(folder, model)]


def offsets_turned_round(folder, model):
    stages = RIGHT_STAGES(folder, model)
    firsts = [stage.first_layer for stage in stages]
    return [s._replace(first_layer=f) for s, f in zip(stages, firsts[::-1], strict=True)]


def vocabulary_without_padding(stack, layout):
    return sum(rows for _, _, rows in stack)


RIGHT_BLOCKS, RIGHT_GROUPS, RIGHT_STAGES = megatron.blocks, megatron._groups, megatron_conversion._stages
FAULTS: list[tuple[object, str, Callable]] = [
    (megatron_conversion, "blocks", whole_shards),
    (megatron_conversion, "blocks", rows_for_columns),
    (megatron_conversion, "blocks", up_first),
    (megatron, "_groups", no_groups),
    (megatron, "_groups", groups_turned_round),
    (megatron_conversion, "_stages", no_offset),
    (megatron_conversion, "_stages", offsets_turned_round),
    (megatron, "_num_rows", vocabulary_without_padding),
    (convert_megatron, "model_of_args", lambda args, where, _: RIGHT_MODEL(args, where, 112)),
]
RIGHT_MODEL = convert_megatron.model_of_args


def gives_the_same_logits(where: Path, theirs: torch.Tensor) -> bool:
    try:
        if import_to(where) != 0:
            return False
        ours = our_logits(where)
    except (AssertionError, IndexError, RuntimeError):
        return False
    same = ours.shape[-1] == 101
    return same and bool((ours - theirs[..., :101]).abs().max() <= 1e-5 * theirs.abs().max())


CONTROL: tuple[object, str, Callable | None] = (None, "", None)


@pytest.mark.parametrize(
    ("module", "name", "wrong"), [CONTROL, *FAULTS], ids=lambda value: getattr(value, "__name__", "")
)
def test_a_wrong_converter_is_noticed(two_by_two, tmp_path, monkeypatch, module, name, wrong):
    folder, theirs = two_by_two
    shutil.copytree(folder, tmp_path / "megatron")
    if module:
        monkeypatch.setattr(module, name, wrong)
    assert gives_the_same_logits(tmp_path, theirs) == (module is None)


# Refusals

MODEL = {  # of plain, as Hugging Face names it
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def copied(two_by_two, tmp_path) -> Path:
    """The folder of the iteration."""
    shutil.copytree(two_by_two[0], tmp_path / "megatron")
    return tmp_path / "megatron" / "iter_0000007"


def change(folder: Path, ranks: str, edit: Callable[[dict], object]) -> None:
    """Edit what is in the files of some ranks."""
    files = list(folder.glob(f"{ranks}/model_optim_rng.pt"))
    assert files
    for file in files:
        with torch.serialization.safe_globals([Namespace]):
            state = torch.load(file)
        edit(state)
        torch.save(state, file)


def assert_refused(where: Path, capsys, message: str, *extra: str) -> None:
    """In one line, with nothing written."""
    capsys.readouterr()
    assert import_to(where, *extra) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], captured.err
    assert captured.out == "" and not (where / "run").exists()


def set_args(**values) -> Callable[[dict], object]:
    return lambda state: vars(state["args"]).update(values)


def drop(name: str) -> Callable[[dict], object]:
    return lambda state: state["model"].pop(name)


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], object]:
    return lambda state: state["model"].update({name: make(state["model"][name])})


FC2, NORM = "decoder.layers.0.mlp.linear_fc2.weight", "decoder.layers.0.input_layernorm.weight"
EDITS = [
    ("*", set_args(swiglu=False), "swiglu is False and megalite computes True only"),
    ("*", set_args(normalization="LayerNorm"), "normalization is LayerNorm and megalite computes RMSNorm"),
    ("*", set_args(position_embedding_type="yarn"), "position_embedding_type is yarn"),
    ("*", set_args(rotary_percent=0.5), "rotary_percent is 0.5 and megalite computes 1.0 only"),
    ("*", set_args(rotary_interleaved=True), "rotary_interleaved is True"),
    ("*", set_args(hidden_size=None), "have no hidden_size: describe the model (--model-config)"),
    ("*", set_args(num_query_groups=3), "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
    ("*", set_args(num_layers=4), "has 2 layers, in stages of [1, 1], and the model 4"),
    ("*", set_args(ffn_hidden_size=64), "linear_fc1.weight has shape [48, 32] on each of 2 ranks"),
    ("*", set_args(vocab_size=200), "an embedding of 112 rows and the model a vocabulary of 200"),
    ("*", set_args(expert_model_parallel_size=2), "expert_model_parallel_size was 2 and there"),
    ("*", set_args(num_experts=4, expert_tensor_parallel_size=1), "expert_tensor_parallel_size is 1 and"),
    ("*", set_args(virtual_pipeline_model_parallel_size=2), "virtual_pipeline_model_parallel_size is 2"),
    ("*", set_args(tensor_model_parallel_size=4), "tensor_model_parallel_size was 4 and there"),
    ("*", set_args(num_experts=4, moe_router_num_groups=2), "moe_router_num_groups is 2"),
    ("*", set_args(num_experts=4, moe_layer_freq=2), "moe_layer_freq is 2"),
    ("*", lambda state: state.update(checkpoint_version=2.0), "has checkpoint version 2.0"),
    ("*", lambda state: state.pop("args"), "does not tell the model: describe it (--model-config)"),
    ("*", lambda state: state.update(model0=state.pop("model")), "of several virtual stages"),
    ("mp_rank_01_000", drop(FC2), "mp_rank_01_000/model_optim_rng.pt has no decoder.layers.0.mlp.linear_fc2"),
    ("*_000", put(FC2, lambda t: t[:, 1:]), "linear_fc2.weight has shape [32, 23] on each of 2 ranks"),
    ("mp_rank_01_001", put(FC2, lambda t: t[:, 1:]), "has unequal shapes [(32, 24), (32, 23)]"),
    ("mp_rank_01_001", put(NORM, lambda t: t + 1), "differs among tensor-parallel ranks, which hold"),
    ("*", put(FC2, lambda t: t.to(torch.int8)), "is torch.int8, expected one of torch.float32"),
    ("*_001", lambda state: state["model"].update(extra=torch.ones(1)), "there is extra in "),
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "edit", "message"), EDITS)
def test_a_checkpoint_that_is_not_ours_is_refused(copied, tmp_path, capsys, ranks, edit, message):
    change(copied, f"mp_rank_{ranks}" if ranks.startswith("*") else ranks, edit)
    assert_refused(tmp_path, capsys, message)


def test_a_file_or_folder_that_is_not_there_is_refused(copied, tmp_path, capsys):
    file = copied / "mp_rank_00_001" / "model_optim_rng.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[:-500])
    assert_refused(tmp_path, capsys, "model_optim_rng.pt cannot be read: ")
    file.unlink()
    assert_refused(tmp_path, capsys, "has no mp_rank_00_001/model_optim_rng.pt, and it has others")
    shutil.rmtree(copied / "mp_rank_00_001")
    assert_refused(tmp_path, capsys, "has no mp_rank_00_001/model_optim_rng.pt, and it has others")
    shutil.copytree(copied / "mp_rank_00_000", copied / "mp_rank_00_001_003")
    assert_refused(tmp_path, capsys, "has files of several layouts, with 2 and 3 numbers in their names")
    (copied / "mp_rank_00_001_003").rename(copied / "mp_rank_00_x")
    assert_refused(tmp_path, capsys, "mp_rank_00_x is no rank's folder: expected mp_rank_TT")
    shutil.rmtree(copied)
    assert_refused(tmp_path, capsys, "latest_checkpointed_iteration.txt says '7' and ")
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").unlink()
    assert_refused(
        tmp_path, capsys, "is no checkpoint of Megatron: neither mp_rank_00/model_optim_rng.pt nor"
    )


@pytest.fixture(scope="module")
def distributed(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("distributed")
    saved(where, "plain", distributed=True)
    return where / "megatron"


def test_a_damaged_distributed_form_is_refused(distributed, tmp_path, capsys):
    shutil.copytree(distributed, tmp_path / "megatron")
    folder = tmp_path / "megatron" / "iter_0000007"
    index = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(index[:-100])
    assert_refused(tmp_path, capsys, ".metadata cannot be read: ")
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert_refused(tmp_path, capsys, ".metadata would run ")
    (folder / ".metadata").write_bytes(index)
    config = tmp_path / "model.yaml"
    for num_layers, message in [
        (3, "has no decoder.layers.2.self_attention.linear_qkv.layer_norm_weight, which the model has"),
        (1, "linear_qkv.layer_norm_weight in "),
    ]:
        config.write_text(yaml.safe_dump({"model": MODEL | {"num_hidden_layers": num_layers}}))
        assert_refused(tmp_path, capsys, message, "--model-config", str(config))
    for file in folder.glob("*.distcp"):
        file.unlink()
    assert_refused(tmp_path, capsys, ".distcp is missing, and .metadata names it")
    assert not (tmp_path / "sprung").exists()


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_is_named_and_not_run(copied, tmp_path, capsys):
    change(copied, "mp_rank_00_000", lambda state: state.update(a=Trap(tmp_path / "sprung")))
    assert_refused(tmp_path, capsys, "model_optim_rng.pt would run ")
    assert not (tmp_path / "sprung").exists()


class OfNumpy(Trap):
    """Whose name is passed over, as those of random generators are, and not run."""

    def __reduce__(self):
        return (np.savetxt, (self.path, [1]))


def test_what_is_passed_over_is_not_run(copied, two_by_two, tmp_path):
    change(copied, "mp_rank_00_000", lambda state: state.update(a=OfNumpy(tmp_path / "sprung")))
    assert gives_the_same_logits(tmp_path, two_by_two[1])
    assert not (tmp_path / "sprung").exists()


def test_enums_and_states_of_random_generators_are_passed_over(copied, two_by_two, tmp_path):
    from megatron.core.transformer.enums import AttnBackend

    states = {"np": np.random.get_state(), "python": random.getstate(), "torch": torch.get_rng_state()}

    def add(state):
        state["args"].attention_backend = AttnBackend.auto
        state["args"].params_dtype = torch.bfloat16
        state["rng_state"] = [states]

    change(copied, "mp_rank_*", add)
    assert gives_the_same_logits(tmp_path, two_by_two[1])


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_the_model_may_be_described_by_a_file(copied, two_by_two, tmp_path, suffix):
    change(copied, "mp_rank_*", lambda state: state.pop("args"))
    config = tmp_path / f"config.{suffix}"
    of_run, of_hf = {"model": MODEL}, MODEL | {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    config.write_text(yaml.safe_dump(of_run) if suffix == "yaml" else json.dumps(of_hf))
    assert import_to(tmp_path, "--model-config", str(config)) == 0
    assert_same_logits(our_logits(tmp_path), two_by_two[1])


def test_without_a_vocabulary_size_the_padding_stays(copied, two_by_two, tmp_path, capsys):
    change(copied, "mp_rank_*", set_args(vocab_size=None))
    assert import_to(tmp_path) == 0
    ours = our_logits(tmp_path)
    assert ours.shape[-1] == 112 and "vocabulary of 112" in capsys.readouterr().err
    assert_same_logits(ours, two_by_two[1])
    shutil.rmtree(tmp_path / "run")
    assert import_to(tmp_path, "--vocab-size", "101") == 0
    assert our_logits(tmp_path).shape[-1] == 101


def test_what_is_there_is_not_written_over(copied, tmp_path, capsys):
    assert import_to(tmp_path) == 0
    assert import_to(tmp_path) == 2
    assert "has checkpoints already: name another output" in capsys.readouterr().err
    assert export_to(tmp_path) == 0
    assert export_to(tmp_path) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp-size", "3"], "tensor parallel size 3 does not divide num_attention_heads 4"),
        (["--tp-size", "32"], "tensor parallel size 32 does not divide num_attention_heads 4"),
        (["--pp-size", "3"], "pipeline parallel size 3 is more than num_hidden_layers 2"),
        (["--ep-size", "2"], "expert parallel size is 2 and this model has no experts"),
        (
            ["--pp-size", "2", "--decoder-first-pipeline-num-layers", "2"],
            "2 layers less 2 at the ends leave 0 for 1 stages, which Megatron has equal and not empty",
        ),
        (
            ["--ckpt-format", "torch_dist", "--tp-size", "2"],
            "--tp-size is 2 and the distributed form is",
        ),
        (
            ["--ckpt-format", "torch_dist", "--decoder-last-pipeline-num-layers", "1"],
            "--decoder-last-pipeline-num-layers is 1 and the distributed form is of no ranks",
        ),
    ],
)
def test_a_layout_that_there_is_not_is_refused(copied, tmp_path, capsys, options, message):
    assert import_to(tmp_path) == 0
    capsys.readouterr()
    assert export_to(tmp_path, *options) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "run"]


# Experts over ranks


@pytest.fixture(scope="module")
def experts_over_ranks(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("experts")
    saved(where, "experts", ep_size=2)
    return where / "megatron"


ROUTER, EXPERT = "decoder.layers.1.mlp.router.weight", "decoder.layers.2.mlp.experts.local_experts.1."
EXPERT_EDITS = [
    (put(ROUTER, lambda t: t + 1), "router.weight differs among expert-parallel ranks, which"),
    (drop(f"{EXPERT}linear_fc2.weight"), "mp_rank_00_001/model_optim_rng.pt has no "),
    (
        put(f"{EXPERT}linear_fc1.weight", lambda t: t[:-2]),
        "linear_fc1.weight3 has shape [38, 32] on",
    ),
    (lambda state: state["model"].update({f"{EXPERT}extra": torch.ones(1)}), "there is decoder.layers.2.mlp"),
]


@pytest.mark.parametrize(("edit", "message"), EXPERT_EDITS)
def test_ranks_of_experts_that_do_not_fit_are_refused(experts_over_ranks, tmp_path, capsys, edit, message):
    shutil.copytree(experts_over_ranks, tmp_path / "megatron")
    change(tmp_path / "megatron" / "iter_0000007", "mp_rank_00_001", edit)
    assert_refused(tmp_path, capsys, message)


def test_a_missing_rank_of_experts_is_noticed(experts_over_ranks, tmp_path, capsys):
    shutil.copytree(experts_over_ranks, tmp_path / "megatron")
    shutil.rmtree(tmp_path / "megatron" / "iter_0000007" / "mp_rank_00_001")
    assert_refused(tmp_path, capsys, "expert_model_parallel_size was 2 and there are files of 1: add")


def test_numbers_of_files_that_experts_cannot_be_shared_out_among_are_refused(
    experts_over_ranks, tmp_path, capsys
):
    shutil.copytree(experts_over_ranks, tmp_path / "megatron")
    folder = tmp_path / "megatron" / "iter_0000007"
    shutil.copytree(folder / "mp_rank_00_001", folder / "mp_rank_00_002")
    change(folder, "*", set_args(expert_model_parallel_size=3))
    assert_refused(tmp_path, capsys, "expert parallel size 3 does not divide n_routed_experts 4")
