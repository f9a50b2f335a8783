"""Exports in Megatron's distributed form: megatron-core loads all of them, in any layout."""

import io
import json
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from megalite.checkpoint import megatron_conversion, megatron_distributed
from megalite.checkpoint.load import read_config
from megalite.checkpoint.megatron_conversion import Target, export_megatron
from megalite.checkpoint.weights import Weights
from tests.checkpoint.llamas import random_llama, save_llama, tiny_run
from tests.checkpoint.megatrons import VARIANTS, load_distributed
from tests.harness import run_distributed
from tests.tools.conversions import (
    LIKE_MEGATRON,
    assert_same_checkpoint,
    assert_same_logits,
    export_to,
    import_to,
    our_logits,
    saved,
)

DISTRIBUTED = ["--ckpt-format", "torch_dist"]


def sizes(tp_size: int = 1, pp_size: int = 1, ep_size: int = 1, **others: Any) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": tp_size,
        "pipeline_model_parallel_size": pp_size,
        "expert_model_parallel_size": ep_size,
        "expert_tensor_parallel_size": tp_size,
        **others,
    }


def exported(where: Path, variant: str, *options: str) -> Path:
    """Of Megatron's own random model, by way of ours."""
    saved(where, variant)
    assert import_to(where) == 0
    assert export_to(where, *DISTRIBUTED, *(options or LIKE_MEGATRON)) == 0
    return where / "back"


def index_of(folder: Path) -> Metadata:
    return pickle.loads((folder / "iter_0000000" / ".metadata").read_bytes())


LAYOUTS = [
    *((variant, sizes(tp_size=2)) for variant in VARIANTS),
    ("plain", sizes()),
    ("plain", sizes(tp_size=2, pp_size=2)),
    ("tied", sizes(pp_size=2, tp_size=2)),
    ("biases of heads", sizes(tp_size=4)),
    ("experts", sizes(ep_size=4)),
    ("experts", sizes(tp_size=2, ep_size=2)),
    ("softmax experts", sizes(pp_size=3)),
    ("experts", sizes(pp_size=2, decoder_last_pipeline_num_layers=1)),
    ("plain", sizes(tp_size=2, padded_vocab_size=104)),  # another padding than it was written with
]


@pytest.mark.parametrize(("variant", "layout"), LAYOUTS)
def test_megatron_loads_an_export_in_any_layout(tmp_path, variant, layout):
    """Every key that it asks for, and none besides; the logits are ours."""
    folder = exported(tmp_path, variant)
    num_ranks = (
        layout["tensor_model_parallel_size"]
        * layout["pipeline_model_parallel_size"]
        * layout["expert_model_parallel_size"]
    )
    theirs = run_distributed(load_distributed, num_ranks, folder, layout)[-1]
    assert_same_logits(our_logits(tmp_path), theirs)


@pytest.mark.parametrize("variant", ["tied", "experts", "softmax experts"])
@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_an_export_comes_in_again_bit_for_bit(tmp_path, variant, layers):
    folder = exported(tmp_path, variant, "--dtype", "float32", "--transformer-impl", layers)
    again = tmp_path / "again"
    again.mkdir()
    folder.rename(again / "megatron")
    assert import_to(again) == 0
    assert_same_checkpoint(again, tmp_path)


# Written out from megatron-core's source: there is no transformer engine without a GPU.
OF_ENGINE = {
    "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.1.self_attention.linear_qkv.weight",
    "decoder.layers.1.self_attention.linear_qkv._extra_state/shard_0_1",
    "decoder.layers.1.self_attention.core_attention._extra_state/shard_0_1",
    "decoder.layers.1.self_attention.linear_proj.weight",
    "decoder.layers.1.self_attention.linear_proj._extra_state/shard_0_1",
    "decoder.layers.1.pre_mlp_layernorm.weight",
    "decoder.layers.1.pre_mlp_layernorm._extra_state/shard_0_1",
    "decoder.layers.1.mlp.router.weight",
    "decoder.layers.1.mlp.router.expert_bias",
    "decoder.layers.1.mlp.experts.experts.linear_fc1.weight",
    "decoder.layers.1.mlp.experts.experts.linear_fc2.weight",
    *(
        f"decoder.layers.1.mlp.experts.experts.linear_fc{i}._extra_state/shard_{expert}_4"
        for i in (1, 2)
        for expert in range(4)
    ),
    "decoder.layers.1.mlp.shared_experts.linear_fc1.weight",
    "decoder.layers.1.mlp.shared_experts.linear_fc1._extra_state/shard_0_1",
    "decoder.layers.1.mlp.shared_experts.linear_fc2.weight",
    "decoder.layers.1.mlp.shared_experts.linear_fc2._extra_state/shard_0_1",
}


def test_the_keys_of_transformer_engine_are_written(tmp_path):
    index = index_of(exported(tmp_path, "experts", "--dtype", "float32"))
    assert {key for key in index.state_dict_metadata if key.startswith("decoder.layers.1.")} == OF_ENGINE
    assert "decoder.final_layernorm._extra_state/shard_0_1" in index.state_dict_metadata


def test_heads_norms_of_transformer_engine_have_a_state_in_each_layer(tmp_path):
    index = index_of(exported(tmp_path, "norms of heads", "--dtype", "float32"))
    states = {key for key in index.state_dict_metadata if "_layernorm._extra_state" in key}
    of_layers = {
        f"decoder.layers.self_attention.{kind}_layernorm._extra_state/shard_{layer}_2"
        for kind in "qk"
        for layer in range(2)
    }
    assert states == of_layers | {"decoder.final_layernorm._extra_state/shard_0_1"}


def test_an_export_is_of_bfloat16_but_for_the_routers_biases(tmp_path):
    index = index_of(exported(tmp_path, "experts", "--transformer-impl", "local"))
    dtypes = {
        key: entry.properties.dtype
        for key, entry in index.state_dict_metadata.items()
        if hasattr(entry, "properties")
    }
    biases = {key for key, dtype in dtypes.items() if dtype == torch.float32}
    assert biases == {f"decoder.layers.{layer}.mlp.router.expert_bias" for layer in (1, 2)}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}


def test_the_folder_is_what_megatron_expects(tmp_path):
    folder = exported(tmp_path, "plain")
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "0"
    assert {path.name for path in (folder / "iter_0000000").iterdir()} == {
        *(".metadata", "metadata.json", "common.pt"),
        *("__0_0.distcp", "__0_1.distcp", "__0_2.distcp"),  # the ends, and each layer
    }
    assert json.loads((folder / "iter_0000000" / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }


def test_layers_that_all_have_experts_are_stacks_under_megatrons_own_frequency(tmp_path):
    """Which is 1, and not a list of ones: then Megatron would ask for each layer by name."""
    folder = exported(tmp_path, "softmax experts")
    key = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert index_of(folder).state_dict_metadata[key].size == (3, 4, 40, 32)
    with torch.serialization.safe_globals([Namespace]):
        assert torch.load(folder / "iter_0000000" / "common.pt")["args"].moe_layer_freq == 1


# Memory


def test_no_more_than_a_tensor_is_held(tmp_path, monkeypatch):
    """Each tensor that was read is gone when the next one is."""
    checkpoint = save_llama(tmp_path / "checkpoints", random_llama(tiny_run().model), tiny_run())
    alive, most = set[int](), 0

    class Held(torch.Tensor):
        def __del__(self) -> None:
            alive.discard(id(self))

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal most
        tensor = RIGHT_SHARD(*arguments).as_subclass(Held)
        alive.add(id(tensor))
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(megatron_conversion, "_shard", counted)
    monkeypatch.setattr(megatron_distributed.torch, "save", lambda tensor, file: file.write(b"."))
    export_megatron(
        Weights(checkpoint, read_config(checkpoint).model), tmp_path / "out", Target("torch_dist")
    )
    assert most == 1


RIGHT_SHARD = megatron_conversion._shard


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch, capfd):
    saved(tmp_path, "plain")
    assert import_to(tmp_path) == 0
    calls = iter(range(5))

    def fails(*arguments: Any) -> torch.Tensor:
        if next(calls, None) is None:
            raise OSError(28, "No space left on device", "back")
        return RIGHT_SHARD(*arguments)

    monkeypatch.setattr(megatron_conversion, "_shard", fails)
    assert export_to(tmp_path, *DISTRIBUTED) == 2
    assert "No space left on device" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "run"]


# Chunks that are not what they should be: what reads them believes nothing that the index says


@pytest.fixture(scope="module")
def readable(tmp_path_factory) -> Path:
    return exported(tmp_path_factory.mktemp("readable"), "plain")


WORDS = "embedding.word_embeddings.weight"
AT_START = MetadataIndex(WORDS, torch.Size((0, 0)))


class Trap:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


TOUCH = Trap(Path.touch, (Path("sprung"),))
OF_NUMPY = Trap(np.savetxt, ("sprung", [1]))  # whose names are passed over, and not run


def chunks_at(*starts: int, rows: int) -> Callable[[Path, Metadata], None]:
    """The embedding's chunks, all of them copies of its first rows."""

    def edit(folder: Path, index: Metadata) -> None:
        written = torch.load(io.BytesIO(bytes_at(folder, index.storage_data[AT_START])))[:rows].clone()
        torch.save(written, folder / "chunk")
        chunks = index.state_dict_metadata[WORDS].chunks
        chunks.clear()
        for start in starts:
            chunks.append(ChunkStorageMetadata(torch.Size((start, 0)), written.shape))
            place = _StorageInfo("chunk", 0, (folder / "chunk").stat().st_size)
            index.storage_data[MetadataIndex(WORDS, torch.Size((start, 0)))] = place

    return edit


def bytes_at(folder: Path, place: _StorageInfo) -> bytes:
    return (folder / place.relative_path).read_bytes()[place.offset :][: place.length]


def holding(what: object) -> Callable[[Path, Metadata], None]:
    def edit(folder: Path, index: Metadata) -> None:
        chunks_at(0, rows=128)(folder, index)
        torch.save(what, folder / "chunk")
        place = index.storage_data[AT_START]
        place.length = (folder / "chunk").stat().st_size

    return edit


def cut_short(folder: Path, index: Metadata) -> None:
    index.storage_data[AT_START].length -= 100


CHUNKS = [
    (chunks_at(0, 64, rows=64), None),
    (chunks_at(64, 0, rows=64), None),
    (chunks_at(0, 32, rows=64), f"{WORDS} has chunks that overlap: get it again"),
    (chunks_at(0, 65, rows=64), f"{WORDS} has a chunk outside its shape [128, 32]: get it again"),
    (chunks_at(-64, 0, rows=64), f"{WORDS} has a chunk outside its shape"),
    (chunks_at(64, rows=64), f"{WORDS} has 2048 of 4096 numbers: get it again"),
    (chunks_at(rows=64), f"{WORDS} has 0 of 4096 numbers: get it again"),
    (cut_short, "__0_0.distcp cannot be read: "),
    (holding(torch.ones(128, 31)), f"does not hold {WORDS} in the shape [128, 32] of .metadata"),
    (holding(TOUCH), "chunk would run "),
    (holding(OF_NUMPY), f"does not hold {WORDS} in the shape [128, 32] of .metadata"),
]


@pytest.mark.parametrize(("edit", "message"), CHUNKS)
def test_chunks_that_do_not_make_up_a_tensor_are_refused(
    readable, tmp_path, capsys, monkeypatch, edit, message
):
    """In one line, with nothing written and nothing run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(readable, tmp_path / "megatron")
    folder, index = tmp_path / "megatron" / "iter_0000000", index_of(tmp_path / "megatron")
    edit(folder, index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert import_to(tmp_path) == (0 if message is None else 2)
    if message is None:  # a control
        return
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_a_chunk_may_have_several_layers(readable, tmp_path):
    """Ours has one of each; here all of a stack are one."""
    for name in ("one", "other"):
        shutil.copytree(readable, tmp_path / name / "megatron")
    folder, index = tmp_path / "one" / "megatron" / "iter_0000000", index_of(tmp_path / "one" / "megatron")
    stacks = [
        key for key, entry in index.state_dict_metadata.items() if len(getattr(entry, "chunks", "")) > 1
    ]
    assert len(stacks) == 6
    for key in stacks:
        entry = index.state_dict_metadata[key]
        places = [index.storage_data.pop(MetadataIndex(key, chunk.offsets)) for chunk in entry.chunks]
        layers = [torch.load(io.BytesIO(bytes_at(folder, place))) for place in places]
        torch.save(torch.cat(layers), folder / key)
        start = torch.Size([0] * len(entry.size))
        entry.chunks[:] = [ChunkStorageMetadata(start, entry.size)]
        index.storage_data[MetadataIndex(key, start)] = _StorageInfo(key, 0, (folder / key).stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert import_to(tmp_path / "one") == 0 and import_to(tmp_path / "other") == 0
    assert_same_checkpoint(tmp_path / "one", tmp_path / "other")


def test_an_index_that_holds_code_runs_none(readable, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(readable, tmp_path / "megatron")
    for trap, message in ((TOUCH, ".metadata would run "), (OF_NUMPY, ".metadata is no index of a dist")):
        (tmp_path / "megatron" / "iter_0000000" / ".metadata").write_bytes(pickle.dumps(trap))
        assert import_to(tmp_path) == 2
        assert message in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["megatron"]
