"""Types of 1024 ranks, checked on one: what is whole, cut, or part of a sum over tp, and whose gradient is.

`spmd_types` gives each tensor a type on each axis of the mesh (in brackets its gradient's):

    V varies [V]    R the same on all ranks [P]    P part of a sum [R]    I the same, as is its gradient [I]

and each operation of torch a rule; I mixes with nothing, P goes through linear operations alone. Parameters
have their types from their ShardSpecs. Of our own autograd Functions none is declared, but the cross entropy:
the product's own forward and backward run on typed tensors, and what fits is the type (see Typed). The
collectives run on a "fake" group, in a forked process, so that this one stays clean.

What is not seen: along which dimension a tensor is cut, for types are local; and key/value heads that have
copies, whose axis is none of the mesh's.
"""

import inspect
import multiprocessing
import re
import traceback
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megalite.batch import Batch
from megalite.config.model import ModelConfig
from megalite.kernels.choice import Kernels
from megalite.kernels.products import MatrixProducts
from megalite.kernels.rotation import rotate_by_formula
from megalite.model.llama import LlamaStage
from megalite.model.rope import RotaryEmbedding
from megalite.model.share import StageShare
from megalite.parallel import column as column_product
from megalite.parallel import cross_entropy, embedding, head, linear, mappings, plan
from megalite.parallel.context import ParallelContext, group_size
from megalite.parallel.embedding import VocabParallelEmbedding
from megalite.parallel.linear import Column, ColumnParallelLinear, MergedColumnLinear, RowParallelLinear
from megalite.parallel.norm import ParallelRMSNorm
from megalite.parallel.plan import LayerPlan
from megalite.parallel.shard import spec_of
from megalite.parallel.topology import Topology

spmd = pytest.importorskip("spmd_types", reason="spmd_types is an extra of the tests: pip install spmd_types")
from spmd_types.checker import typecheck  # noqa: E402

I, P, R, V = spmd.I, spmd.P, spmd.R, spmd.V  # noqa: E741
PP, DP, TP = 16, 8, 8
S, B, H, OUT, VOCAB = 16, 2, 64, 128, 100
MODEL = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=H,
    intermediate_size=OUT,
    num_hidden_layers=2 * PP,
    num_attention_heads=8,
    num_key_value_heads=8,
)
GRADIENT = {V: V, R: P, P: R, I: I}


class World:
    """The mesh of a fake job, the product on it with typed collectives, and its layers."""

    def __init__(self, sequence_parallel):
        sizes = {"pp": PP, "dp": DP, "tp": TP}
        mesh = dist.device_mesh.init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        self.mesh, self.sequence_parallel = mesh, sequence_parallel
        groups = {(axis,): mesh.get_group(axis) for axis in sizes}
        topology = Topology(PP * DP * TP, pp_size=PP, tp_size=TP)
        context = ParallelContext(topology, 0, torch.device("cpu"), groups)
        self.pp, self.dp, self.tp = groups.values()
        products = MatrixProducts(self._output, self._input_gradient, self._weight_gradient)
        # The autograd function of a rotation has no types.
        kernels = Kernels(rotation=rotate_by_formula, products=products)
        self.plan = LayerPlan(context, sequence_parallel, kernels=kernels)
        self.residual = V if sequence_parallel else I

    def typed(self, x, *, tp, dp=V, pp=V):
        """A tensor with its types declared."""
        return spmd.assert_type(x, {self.pp: pp, self.dp: dp, self.tp: tp})

    def type_of(self, x):
        return [spmd.get_axis_local_type(x, group) for group in (self.pp, self.dp, self.tp)]

    def built(self, layer, *args, **options):
        """A module with the types of its parameters, which follow from how they are cut."""
        with spmd.no_typecheck():
            module = layer(*args, **options)
        for parameter in module.parameters():
            self.typed(parameter, dp=R, tp=V if spec_of(parameter).cuts else I)
        for table in [m for m in module.modules() if isinstance(m, VocabParallelEmbedding)]:
            table.leave = partial(self._sum_of_rows, table.leave)
        return module

    def _sum_of_rows(self, leave, rows, group):
        """A row that lies elsewhere is zero here: what is looked up is part of a sum."""
        return leave(spmd.reinterpret(rows, self.tp, src=V, dst=P), group)

    def activation(self, size=H, *, length=S, tp):
        return self.typed(torch.randn(length, B, size).requires_grad_(), tp=tp)

    def entering(self):
        """What enters a block: cut along the sequence, or whole with a whole gradient."""
        return self.activation(length=S // TP if self.sequence_parallel else S, tp=self.residual)

    def ids(self):
        return self.typed(torch.randint(VOCAB, (B, S)), pp=R, tp=R)

    def leaves_as(self, x, tp):
        assert self.type_of(x)[1:] == [V, tp], f"gives {self.type_of(x)[2]} on tp where {tp} is expected"

    # Products: of which operand a dimension is cut over tp, the other must be whole.
    def _output(self, x, weight):
        is_row = spec_of(weight).cuts[0].dim == 1
        y = F.linear(x if is_row else self._whole(x), weight)
        return self._part_of_sum(y, self.tp) if is_row else y

    def _input_gradient(self, grad, weight):
        is_row = spec_of(weight).cuts[0].dim == 1
        y = (self._whole(grad) if is_row else grad) @ weight
        return y if is_row else self._part_of_sum(y, self.tp)

    def _weight_gradient(self, grad, x):
        self._whole(x if spmd.get_axis_local_type(grad, self.tp) is V else grad)
        return self._part_of_sum(grad.flatten(0, -2).T @ x.flatten(0, -2), self.dp)  # over all tokens

    def _whole(self, x):
        return spmd.assert_type(x, {self.tp: R})

    def _part_of_sum(self, x, group):
        return spmd.reinterpret(x, group, src=V, dst=P).clone()  # not a view: backward adds to it in place


class Typed:
    """In place of an autograd Function: runs its forward and its backward on typed tensors.

    Within a Function R and I are one, the same on all ranks; outside, its output is I if the backward takes
    a gradient that is the same on all ranks, and R if it takes one that is part of a sum. Raises
    SpmdTypeError if neither gives the inputs the gradients that their types ask for.
    """

    def __init__(self, function, world):
        self.function, self.world = function, world

    def apply(self, *args):
        for same in (I, R):
            context = SimpleNamespace()
            inside = [self._inside(x) if isinstance(x, torch.Tensor) else x for x in args]
            context.needs_input_grad = [self._is_learnt(x) for x in args]
            context.save_for_backward = lambda *saved, c=context: setattr(c, "saved_tensors", saved)
            outputs = self.function.forward(context, *inside)
            is_tuple = isinstance(outputs, tuple)
            outputs = tuple(self._outside(y, same) for y in (outputs if is_tuple else (outputs,)))
            try:
                self._check_gradients(args, self.function.backward(context, *map(self._gradient, outputs)))
            except spmd.SpmdTypeError as error:
                reason = error
                continue
            return outputs if is_tuple else outputs[0]
        raise spmd.SpmdTypeError(f"backward of {self.function.__qualname__}: {reason}")

    def _is_learnt(self, x):
        return isinstance(x, torch.Tensor) and x.requires_grad

    def _new(self, x, types):
        pp, dp, tp = types
        with spmd.no_typecheck():
            new = x.detach().clone().requires_grad_()
        self.world.typed(new, pp=pp, dp=dp, tp=tp)
        if hasattr(x, "spec"):
            new.spec = x.spec
        return new

    def _inside(self, x):
        return self._new(x, [R if kind is I else kind for kind in self.world.type_of(x)])

    def _outside(self, y, same):
        pp, dp, tp = self.world.type_of(y)
        return self._new(y, [pp, dp, same if tp is R else tp])

    def _gradient(self, y):
        return self._inside(self._new(y, [GRADIENT[kind] for kind in self.world.type_of(y)]))

    def _check_gradients(self, args, grads):
        for x, grad in zip(args, grads, strict=True):
            if self._is_learnt(x):
                wanted = [R if GRADIENT[kind] is I else GRADIENT[kind] for kind in self.world.type_of(x)]
                if self.world.type_of(grad) != wanted:
                    raise spmd.SpmdTypeError(
                        f"an input of types {self.world.type_of(x)} on pp, dp and tp has a gradient of types "
                        f"{self.world.type_of(grad)}, not {wanted}"
                    )


def typed_starts(world):
    """The collectives of mappings.py by the types that they take and give."""
    cut = spmd.S(0)
    rules = {
        "start_all_reduce": (spmd.all_reduce, P, R),
        "start_all_gather": (spmd.all_gather, cut, R),
        "start_reduce_scatter": (spmd.reduce_scatter, P, cut),
    }

    def started(collective, src, dst):
        def start(x, group):
            return (x if group_size(group) == 1 else collective(x, group, src=src, dst=dst)), None

        return start

    return {getattr(mappings, name): started(*rule) for name, rule in rules.items()}


def type_the_pair(pair, world, starts):
    """Typed collectives in the Function that a mapping has in its closure."""
    (cell,) = [c for c in pair.__closure__ if inspect.isclass(c.cell_contents)]
    function = cell.cell_contents
    for method in (function.forward, function.backward):
        for inner in method.__closure__ or ():
            if callable(inner.cell_contents):
                inner.cell_contents = starts.get(inner.cell_contents, inner.cell_contents)
    cell.cell_contents = Typed(function, world)


def type_the_product(world):
    """Typed collectives in the mappings and the column layer; in this process alone."""
    starts = typed_starts(world)
    for pair in PAIRS:
        type_the_pair(pair, world, starts)
    for start, typed in starts.items():
        setattr(column_product, start.__name__, typed)
    column_product._ColumnLinear = Typed(column_product._ColumnLinear, world)

    def losses(*, logits, labels):
        each = spmd.rules.einsum("sb_,sb->sb", logits, labels)
        return spmd.rules.all_reduce(each, world.tp, src=V, dst=I)

    def losses_of_tokens(logits, labels, coefficients=None, **_):
        assert spmd.get_axis_local_type(logits, world.tp) is V  # which stay so, as their gradients
        with spmd.no_typecheck():
            each = logits.detach().sum(dim=-1)
        return world.typed(each, tp=R)

    head.losses_in_place = losses_of_tokens
    for start, typed in starts.items():
        setattr(head, start.__name__, typed)

    def scaled(gradient, scale):
        assert spmd.get_axis_local_type(scale, world.tp) in (R, I)
        with spmd.no_typecheck():
            product = gradient * scale
        pp, dp, tp = world.type_of(gradient)  # a part of a sum over dp, each times the same number
        return world.typed(product, pp=pp, dp=dp, tp=tp)

    head._scaled = scaled
    head._LossSum = Typed(head._LossSum, world)
    cross_entropy._VocabParallelCrossEntropy.spmd_typecheck = staticmethod(losses)
    tables = RotaryEmbedding.tables

    def same_on_all_ranks(self, x, positions=None):
        with spmd.no_typecheck():
            found = [table.clone() for table in tables(self, x, positions)]
        return tuple(world.typed(table, pp=R, dp=R, tp=R) for table in found)

    RotaryEmbedding.tables = same_on_all_ranks


PAIRS = [
    mappings.copy_to_tp,
    mappings.reduce_from_tp,
    mappings.gather_sequence,
    mappings.scatter_sequence,
]


def column(world):
    layer = world.built(ColumnParallelLinear, H, OUT, world.plan, bias=True)
    world.leaves_as(layer(world.entering()), V)


def merged_column(world):
    columns = [Column("q", OUT), Column("k", OUT, cut_over="kv")]
    layer = world.built(MergedColumnLinear, H, columns, world.plan, bias=True)
    for y in layer(world.entering()):
        world.leaves_as(y, V)


def row(world):
    layer = world.built(RowParallelLinear, OUT, H, world.plan, bias=True)
    world.leaves_as(layer(world.activation(OUT // TP, tp=V)), world.residual)


def table(world):
    layer = world.built(VocabParallelEmbedding, VOCAB, H, world.plan)
    world.leaves_as(layer(world.ids().T), world.residual)


def norm(world):
    world.leaves_as(world.built(ParallelRMSNorm, H, world.plan)(world.entering()), world.residual)


def loss(world):
    logits, group = world.activation(OUT, tp=V), world.plan.tp_group
    losses = cross_entropy.vocab_parallel_cross_entropy(logits, world.ids().T, vocab_size=VOCAB, group=group)
    world.leaves_as(losses, I)


def gathered(world):
    """The one mapping that no layer uses."""
    world.leaves_as(mappings.gather_sequence(world.activation(length=S // TP, tp=V), world.tp), R)


def stage(world, rank):
    """A share of two layers; its embedding and head are where it is first or last."""
    share = StageShare(range(2 * rank, 2 * rank + 2), rank == 0, rank == PP - 1)
    module = world.built(LlamaStage, MODEL, world.plan, share)
    batch = Batch(input_ids=world.ids(), labels=world.ids())
    y = module(None if share.has_embedding else world.entering(), batch)
    world.leaves_as(y, I if share.has_head else world.residual)


first_stage, middle_stage, last_stage = (partial(stage, rank=rank) for rank in (0, 7, PP - 1))
CHECKS = {check.__name__: check for check in (column, merged_column, row, table, norm, loss, gathered)} | {
    "first_stage": first_stage,
    "middle_stage": middle_stage,
    "last_stage": last_stage,
}


def gathered_there_and_back(world):
    """A control: two halves that are not conjugate."""
    pair = mappings._pair(mappings.start_all_gather, mappings.start_all_gather)
    type_the_pair(pair, world, typed_starts(world))
    pair(world.activation(length=S // TP, tp=V), world.tp)


def summed_there_and_back(world):
    """The same: a sum whose gradient, whole as it is, is summed again."""
    pair = mappings._pair(mappings.start_all_reduce, mappings.start_all_reduce)
    type_the_pair(pair, world, typed_starts(world))
    partial_sum = spmd.reinterpret(world.activation(tp=V), world.tp, src=V, dst=P)
    world.leaves_as(pair(partial_sum, world.tp), I)


CONTROLS = {check.__name__: check for check in (gathered_there_and_back, summed_there_and_back)}


def error_of(check, sequence_parallel, forget=None):
    """What the checker says to a check in a forked process; an empty text if all is well.

    forget: (module, name) of a collective that does nothing.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_check_here, args=(sender, check, sequence_parallel, forget))
    process.start()
    sender.close()
    try:
        status, text = receiver.recv()
    finally:
        process.join()
    assert status != "failed", text
    return text


def _check_here(sender, check, sequence_parallel, forget):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("fake", rank=0, world_size=PP * DP * TP)
        world = World(sequence_parallel)
        type_the_product(world)
        if forget is not None:
            module, name = forget
            nothing = (lambda x, group: (x, None)) if name.startswith("start") else (lambda x, group: x)
            setattr(module, name, nothing)
        with spmd.set_current_mesh(world.mesh), typecheck():
            (CHECKS | CONTROLS)[check](world)
        answer = ("checked", "")
    except (spmd.SpmdTypeError, AssertionError) as error:
        answer = ("checked", f"{type(error).__name__}: {error}")
    except BaseException:
        answer = ("failed", traceback.format_exc())
    sender.send(answer)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("check", CHECKS)
def test_every_layer_and_stage_has_the_types_that_its_shards_ask_for(check, sequence_parallel):
    assert error_of(check, sequence_parallel) == ""


MIXED, SUM = "Invariant type on axis mesh_tp cannot mix", "Partial type on axis mesh_tp"
NOT_WHOLE, GRADIENT_OF = (
    "mismatch on axis mesh_tp: tensor has .*V, expected .*R",
    "has a gradient of types .*P",
)
FORGOTTEN = [  # module and name of a collective, with sequence parallelism or not, where it is missed, how
    (linear, "reduce_from_tp", False, {"row": MIXED, "middle_stage": MIXED}),
    (embedding, "reduce_from_tp", False, {"table": "gives .*P on tp", "first_stage": MIXED}),
    (linear, "scatter_sequence", True, {"row": SUM}),  # in a stage torch refuses the shapes before
    (embedding, "scatter_sequence", True, {"table": "gives .*P on tp", "first_stage": SUM}),
    (plan, "copy_to_tp", True, {"norm": MIXED, "row": MIXED, "middle_stage": MIXED}),
    (mappings, "gather_sequence", True, {"gathered": "gives .*V on tp"}),
    (column_product, "start_all_gather", True, {"column": NOT_WHOLE, "middle_stage": NOT_WHOLE}),
    (column_product, "start_reduce_scatter", True, {"column": GRADIENT_OF, "middle_stage": GRADIENT_OF}),
    (column_product, "start_all_reduce", False, {"merged_column": GRADIENT_OF, "last_stage": GRADIENT_OF}),
]


@pytest.mark.parametrize(("module", "name", "sequence_parallel", "errors"), FORGOTTEN)
def test_control_a_forgotten_collective_is_an_error_of_types(module, name, sequence_parallel, errors):
    for check, error in errors.items():
        assert re.search(error, error_of(check, sequence_parallel, forget=(module, name))), check


@pytest.mark.parametrize(
    ("check", "error"),
    [
        ("gathered_there_and_back", "backward of .*Pair"),
        ("summed_there_and_back", "gives .*R on tp where .*I is expected"),
    ],
)
def test_control_a_pair_that_is_not_conjugate_is_an_error_of_types(check, error):
    assert re.search(error, error_of(check, sequence_parallel=False))
