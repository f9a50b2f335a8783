"""Matrix products of linear layers in 8-bit floating point, rounded alike in every layout.

Shapes: n tokens of a micro batch, i input and o output features, all of the whole layer.

    Y = X @ W.T        dX = dY @ W        dW = dY.T @ X

Each is A @ B.T, of A [m, k] and B [n, k]. Both are rounded with a scale s, one for each row or for all of a
tensor, such that the largest value is the format's largest:

    a = round(s A)    s = largest of the format / max |A|      A @ B.T = (a @ b.T) / (s_A s_B)

    max over k for a scale of each row, over k and the rows for one of the tensor

What a maximum is taken over may be cut: o in a column layer and i in a row layer over tp, n over cp. Then it
is taken over the ranks of the cut too, else the numbers would depend on the layout:

                     a scale of each tensor              a scale of each row
               max |X|   max |W|   max |dY|         in Y      in dX     in dW
    column     cp        tp        tp and cp        -         tp        cp
    row        tp, cp    tp        cp               tp        -         cp

Under sequence parallelism X or dY has been gathered before it is rounded. Other micro batches, and those of
other data-parallel ranks, are other tensors, in one process too: so the size of a micro batch matters.

Recipes and formats are those of torchao (torchao/float8/config.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalite.error import UserError
from megalite.kernels.products import MatrixProducts, Product, weight_gradient
from megalite.parallel.context import Group, group_size

MULTIPLE = 16  # of sizes that torch._scaled_mm takes: of what is summed over, and of the second factor's rows
CAPABILITY = (8, 9)  # of NVIDIA's first GPUs with such products
SMALLEST = 2.0**-100  # maximum that is told from 0: scales and their inverses stay within fp32


class Fp8Error(UserError):
    """Products in fp8 that cannot be computed here."""


@dataclass(frozen=True)
class Operand:
    """How one factor of a product is rounded.

    Attributes:
        dtype: e4m3, of 3 bits of mantissa, or e5m2, of a wider range.
        by_row: whether each row has a scale of its own.
        power_of_two: whether scales are rounded down to powers of two, so that they change no mantissa.
    """

    dtype: torch.dtype = torch.float8_e4m3fn
    by_row: bool = False
    power_of_two: bool = False

    def rounded(
        self, x: torch.Tensor, rows_over: Group, inner_over: Group
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [m, k] in 8 bits, and the inverse of its scale: fp32 [m, 1], or [1, 1] for one of the tensor.

        rows_over, inner_over: ranks that m and k are cut over. What is not finite makes its row, or the
        tensor, NaN.
        """
        peak = x.abs().amax(dim=1 if self.by_row else (0, 1), keepdim=True).to(torch.float32)
        for group in (inner_over,) if self.by_row else (rows_over, inner_over):
            peak = _largest_over(peak, group)
        largest = torch.finfo(self.dtype).max
        scale = largest / peak.clamp(min=SMALLEST)
        if self.power_of_two:
            scale = scale / (2 * torch.frexp(scale).mantissa)
        # Only a rounding in fp32 exceeds the largest number: the cast need not saturate.
        return (x.to(torch.float32) * scale).to(self.dtype).contiguous(), 1 / scale


def _largest_over(peak: torch.Tensor, group: Group) -> torch.Tensor:
    if group_size(group) == 1:
        return peak
    largest = peak.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest


@dataclass(frozen=True)
class RoundedProduct:
    """A @ B.T of what is left of A and B.

    fast_accumulation: whether a GPU may keep fewer bits of sums: its kernel for scales by row is slow else.
    """

    a: Operand
    b: Operand
    fast_accumulation: bool

    def __call__(
        self, a: torch.Tensor, b: torch.Tensor, *, a_over: Group, b_over: Group, inner_over: Group
    ) -> torch.Tensor:
        """a [m, k] and b [n, k] to [m, n], in a's format.

        a_over, b_over, inner_over: the ranks that m, n and k are cut over; the result is this rank's part of
        a sum over inner_over. Raises Fp8Error where n or k is no multiple of 16.
        """
        if b.size(0) % MULTIPLE or b.size(1) % MULTIPLE:
            raise Fp8Error(
                f"fp8 multiplies sizes that are multiples of {MULTIPLE}, and here [{a.size(0)}, {a.size(1)}] "
                f"meets [{b.size(1)}, {b.size(0)}]: change the layer or the micro batch, or use bf16"
            )
        a8, a_scale = self.a.rounded(a, a_over, inner_over)
        b8, b_scale = self.b.rounded(b, b_over, inner_over)
        if self.a.by_row or self.b.by_row or a.device.type == "cpu":
            # On a CPU too: there one scale of each tensor takes a path that is a hundred times slower.
            a_scale = a_scale.expand(a.size(0), 1).contiguous()
            b_scale = b_scale.expand(b.size(0), 1).contiguous()
        fast = self.fast_accumulation
        return torch._scaled_mm(a8, b8.T, a_scale, b_scale.T, out_dtype=a.dtype, use_fast_accum=fast)


@dataclass(frozen=True)
class Recipe:
    """The products of a linear layer, of (X, W), (dY, W.T) and (dY.T, X.T); None is not rounded."""

    output: RoundedProduct
    input_gradient: RoundedProduct
    weight_gradient: RoundedProduct | None


_TENSOR = Operand()
_WIDE = Operand(torch.float8_e5m2)
_ROW = Operand(by_row=True, power_of_two=True)
_TENSOR_2 = Operand(power_of_two=True)
_BY_ROW = RoundedProduct(_ROW, _ROW, fast_accumulation=True)
RECIPES = {
    "tensorwise": Recipe(
        RoundedProduct(_TENSOR, _TENSOR, fast_accumulation=True),
        RoundedProduct(_WIDE, _TENSOR, fast_accumulation=False),
        RoundedProduct(_WIDE, _TENSOR, fast_accumulation=False),
    ),
    "rowwise": Recipe(_BY_ROW, _BY_ROW, _BY_ROW),
    "rowwise_with_gw_hp": Recipe(_BY_ROW, RoundedProduct(_ROW, _TENSOR_2, fast_accumulation=True), None),
}


@dataclass(frozen=True)
class Cuts:
    """The ranks that tokens, input features and output features of a linear layer are cut over."""

    tokens: Group = None
    inputs: Group = None
    outputs: Group = None


def rounded_products(recipe: Recipe, cuts: Cuts) -> MatrixProducts:
    """The three products of a linear layer of which this rank has its part, by the table above."""
    tokens, inputs, outputs = cuts.tokens, cuts.inputs, cuts.outputs

    def output(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        over = {"a_over": tokens, "b_over": outputs, "inner_over": inputs}
        return recipe.output(x.flatten(0, -2), weight, **over).unflatten(0, x.shape[:-1])

    def input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        over = {"a_over": tokens, "b_over": inputs, "inner_over": outputs}
        return recipe.input_gradient(grad.flatten(0, -2), weight.T, **over).unflatten(0, grad.shape[:-1])

    def rounded_weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert recipe.weight_gradient is not None
        over = {"a_over": outputs, "b_over": inputs, "inner_over": tokens}
        return recipe.weight_gradient(grad.flatten(0, -2).T, x.flatten(0, -2).T, **over)

    of_weight: Product = rounded_weight_gradient if recipe.weight_gradient else weight_gradient
    return MatrixProducts(output, input_gradient, of_weight)


def choose_recipe(
    name: str,
    device: torch.device,
    precision: str,
    capability: Callable[[torch.device], tuple[int, int]] = torch.cuda.get_device_capability,
) -> Recipe | None:
    """A recipe by its name, None for "none"; Fp8Error where the device has no use for it.

    precision: of the weights, bf16, or on a CPU fp32, to see what rounding does.
    capability: what tells the version of a GPU.
    """
    if name == "none":
        return None
    is_cpu = device.type == "cpu"
    if not is_cpu and precision != "bf16":
        raise Fp8Error(
            f"fp8.recipe {name} rounds bf16 on a GPU and the DeepSpeed JSON says {precision}: enable bf16 "
            "there, or set fp8.recipe=none"
        )
    if not is_cpu and (device.type != "cuda" or torch.version.hip):
        raise Fp8Error(f"fp8.recipe {name} is for NVIDIA GPUs and this run is on others: set fp8.recipe=none")
    if not is_cpu and capability(device) < CAPABILITY:
        has, needs = (".".join(map(str, version)) for version in (capability(device), CAPABILITY))
        raise Fp8Error(
            f"fp8.recipe {name} needs GPUs of compute capability {needs} (L40, H100 and later) and this one "
            f"has {has}: set fp8.recipe=none"
        )
    return RECIPES[name]
