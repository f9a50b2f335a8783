"""KTO of TRL's trainer on the same records: the same rows beside each other, the same loss, the same numbers.

A global batch of ours is a batch of one device there, since TRL mismatches answers within these.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megalite.batch import IGNORED, Batch
from megalite.config.run import RunConfig
from megalite.config.tuning import PreferenceConfig
from megalite.data.chat import open_chat
from megalite.data.packing import SampleOrder
from megalite.data.unpaired_loader import UnpairedLoader
from megalite.model.loss import Head
from megalite.model.preference import log_probabilities, log_ratio
from megalite.tokenizer.load import build_byte_tokenizer
from megalite.training.objective import UnpairedPreferences

trl = pytest.importorskip("trl")

LENGTH = 24
CONFIG = PreferenceConfig(loss="kto", beta=0.7, desirable_weight=1.5, undesirable_weight=0.8)
ROWS = [
    {"prompt": "Who is", "completion": " there?", "label": True},
    {"prompt": "So:", "completion": " nobody", "label": False},
    {"prompt": "", "completion": "begin", "label": False},
    {"prompt": "A long prompt is", "completion": " cut", "label": True},
    {"prompt": "x", "completion": "y", "label": True},
]


def models() -> list[LlamaForCausalLM]:
    """The one in training, and the reference."""
    torch.manual_seed(3)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return [LlamaForCausalLM(LlamaConfig(vocab_size=257, initializer_range=0.3, **size)) for _ in range(2)]


def trainer_of_trl(folder, model, reference) -> "trl.KTOTrainer":
    tokenizer = build_byte_tokenizer()
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    options = {"report_to": [], "use_cpu": True, "bf16": False, "max_length": LENGTH, "beta": CONFIG.beta}
    options |= {"desirable_weight": CONFIG.desirable_weight, "undesirable_weight": CONFIG.undesirable_weight}
    return trl.KTOTrainer(
        model=model,
        ref_model=reference,
        args=trl.KTOConfig(str(folder), per_device_train_batch_size=len(ROWS), **options),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer.to_backend(), **names),
    )


def our_batch(folder) -> Batch:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = build_byte_tokenizer()
    data = open_chat("unpaired", [str(path)], tokenizer, None, seq_length=LENGTH, cache_dir=folder / "cache")
    samples = data.samples(SampleOrder(LENGTH, seed=0, packing=False, shuffle=False), len(ROWS))
    slices = {"global_batch_samples": len(ROWS), "num_micro_batches": 1, "dp_rank": 0, "dp_size": 1}
    [batch] = UnpairedLoader(samples, vocab_size=257, **slices).batch(0)
    return batch


def with_references(batch: Batch, reference: LlamaForCausalLM) -> Batch:
    return replace(batch, references=log_p_of(reference, batch).detach())


def log_p_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    return log_probabilities(head_of(model, batch), batch)


def head_of(model: LlamaForCausalLM, batch: Batch) -> Head:
    logits = model(batch.input_ids).logits.transpose(0, 1)  # padding is behind, where nothing sees it

    def losses(*, labels, reduction):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction).view_as(labels)

    return losses


@pytest.mark.parametrize("is_cut_off", [False, True])
def test_rows_loss_and_numbers_are_those_of_trl(tmp_path, is_cut_off):
    """Of two models each is once the one in training: once the reference point is above 0, once cut off."""
    model, reference = models()[:: 1 if is_cut_off else -1]
    theirs, batch = trainer_of_trl(tmp_path, model, reference), our_batch(tmp_path)
    inputs = next(iter(theirs.get_train_dataloader()))
    assert_same_rows(batch, inputs, "")
    assert_same_rows(batch.mismatched, inputs, "KL_")
    assert torch.equal(inputs["label"].bool(), batch.desirable)

    loss = theirs.compute_loss(theirs.model, inputs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in theirs.model.named_parameters()}
    theirs.model.zero_grad()
    told = {name: values[-1] for name, values in theirs._metrics["train"].items()}

    batch = with_references(batch, theirs.ref_model)
    mismatched = with_references(batch.mismatched, theirs.ref_model)
    ratio = log_ratio(log_p_of(theirs.model, mismatched).detach(), [mismatched])
    point = (ratio[0] / ratio[1]).clamp(min=0)
    assert (point == 0) == (told["kl"] == 0) == is_cut_off
    context = dict.fromkeys(("tp", "cp"), SimpleNamespace(group=None))
    run = RunConfig(task="prefer", preference=CONFIG, model={"vocab_size": 257})
    objective = UnpairedPreferences(run, _Context(context))
    total = objective.loss(head_of(theirs.model, batch), replace(batch, reference_point=point.float()))
    count = objective.count(batch)
    (total / count).backward()
    torch.testing.assert_close(total / count, loss.double(), rtol=1e-5, atol=0, check_dtype=False)
    for name, parameter in theirs.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
    means = objective.means(dict(zip(objective.measures, objective.sums.tolist(), strict=True)), float(count))
    assert means.keys() <= told.keys() and len(means) == 6
    for name, value in means.items():
        # A difference of log-probabilities of up to 200 nats in fp32, whose last place there is 1.5e-5.
        assert value == pytest.approx(told[name], rel=1e-5, abs=1.5e-5), name


def assert_same_rows(rows: Batch, theirs: dict[str, torch.Tensor], prefix: str) -> None:
    """Ids and labels; ours go on to the length of a sample, and their padding is the end of text."""
    ids, is_learnt = theirs[f"{prefix}input_ids"], theirs[f"{prefix}completion_mask"].bool()
    width, real = ids.size(1), theirs[f"{prefix}attention_mask"].bool()
    assert torch.equal(rows.input_ids[:, :width].where(real, 256), ids)
    assert torch.equal(~rows.padding[:, :width], real) and rows.padding[:, width:].all()
    assert torch.equal(rows.labels[:, : width - 1], ids.where(is_learnt, IGNORED)[:, 1:])
    assert (rows.labels[:, width - 1 :] == IGNORED).all()


class _Context(dict):
    device = torch.device("cpu")
