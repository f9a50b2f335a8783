"""Initial weights: any part is drawn by itself, to the bit; all are independent, of their distribution.

Statistics are of n = 2^20 draws of a fixed seed. A mean or correlation of independent ones has a standard
deviation of 1/sqrt(n), the standard deviation one of 1/sqrt(2n), and the Kolmogorov-Smirnov distance exceeds
1.95/sqrt(n) once in a thousand: five deviations, and 1.95, are allowed.
"""

from statistics import NormalDist

import numpy as np
import pytest
import torch

from megalite.parallel.context import ParallelContext
from megalite.parallel.draws import key_of
from megalite.parallel.shard import cut_spec, normal_initializer, sharded_parameter, uniform_initializer
from megalite.parallel.topology import Topology

STD = 0.3
NORMAL, UNIFORM = normal_initializer(seed=3, std=STD), uniform_initializer(seed=3)
SHAPES = [(1000,), (5,), (300, 200), (2, 64), (700, 65), (3, 40, 70), (2, 3, 10, 129)]
BOTH = pytest.mark.parametrize("init", [NORMAL, UNIFORM], ids=["normal", "uniform"])


def boxes_of(shape: tuple[int, ...], number: int) -> list[tuple[slice, ...]]:
    """Some parts of any size, single numbers and empty ones among them."""
    chance = np.random.default_rng(sum(shape))
    ends = [[sorted(chance.integers(0, size + 1, 2)) for size in shape] for _ in range(number)]
    single = [tuple(int(at) for at in chance.integers(0, shape)) for _ in range(number)]
    boxes = [tuple(slice(int(a), int(b)) for a, b in box) for box in ends]
    return boxes + [tuple(slice(at, at + 1) for at in place) for place in single]


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_part_drawn_by_itself_is_that_of_the_whole(init, shape):
    whole = init("w", shape)
    assert whole.dtype == torch.float32 and tuple(whole.shape) == shape
    for box in boxes_of(shape, 20):
        assert torch.equal(init("w", shape, box), whole[box]), box


@pytest.mark.parametrize("dim", [0, 1])
def test_ranks_hold_the_parts_of_one_tensor(dim):
    whole = NORMAL("w", (120, 360))
    for size in (2, 3, 4):
        parts = []
        for rank in range(size):
            context = ParallelContext(Topology(size, tp_size=size), rank)
            parts.append(sharded_parameter(cut_spec(context, "w", (120, 360), dim), NORMAL).detach())
        assert torch.equal(torch.cat(parts, dim), whole)


def test_a_part_of_a_tensor_that_no_machine_could_hold():
    box = (slice(5 << 30, (5 << 30) + 3), slice(1000, 1100))
    assert NORMAL("w", (1 << 40, 1 << 30), box).unique().numel() == 300


def test_a_number_is_what_philox_and_the_quantile_function_make_of_its_place():
    """By Python's own quantile function, whose error is 1e-9 here; fp32 rounds by 6e-8."""
    whole = NORMAL("w", (50, 200))
    for row, column in [(0, 0), (0, 7), (0, 8), (49, 199), (17, 64), (23, 130)]:
        counter = [row * 8 + column % 64 // 8, column // 64, 0, 0]
        bits = np.random.Philox(key=key_of(3, "w"), counter=counter).random_raw(4).view(np.int32)
        uniform = (int(bits[column % 8]) + 0.5) / 2**32 + 0.5
        assert whole[row, column].item() == pytest.approx(NormalDist().inv_cdf(uniform) * STD, rel=1e-7)


N = 1 << 20
FIVE = 5 / N**0.5


def scores(init=NORMAL, name="w") -> torch.Tensor:
    return init(name, (1 << 10, 1 << 10)).double() / STD


def test_they_are_normal():
    drawn = scores().flatten().sort().values
    assert abs(drawn.mean()) < FIVE and abs(drawn.std() - 1) < FIVE / 2**0.5
    steps = torch.arange(N + 1) / N
    below = torch.special.ndtr(drawn)
    distance = torch.maximum((steps[1:] - below).max(), (below - steps[:-1]).max())
    assert distance < 1.95 / N**0.5
    assert 4.2 < drawn[-1] < 6.2 and -6.2 < drawn[0] < -4.2  # P(largest of n < 4.2) = 1e-6, of > 6.2 3e-4


def test_uniform_ones_are_uniform_within_their_bound():
    drawn = UNIFORM("w", (1 << 10, 1 << 10)).double().flatten().sort().values * 32  # 1/sqrt(1024)
    assert -1 < drawn[0] < -1 + 1e-4 and 1 - 1e-4 < drawn[-1] < 1
    assert ((drawn + 1) / 2 - (torch.arange(N) + 0.5) / N).abs().max() < 1.95 / N**0.5


@pytest.mark.parametrize(
    "step", [(0, 1), (1, 0), (0, 8), (0, 64), (8, 0), (1, 1), (0, 512), (64, 64)], ids=str
)
def test_neighbours_are_independent(step):
    """Next to each other, a count of the generator apart, and a stream apart; sizes too."""
    drawn = scores()
    moved = drawn.roll(step, dims=(0, 1))
    assert abs((drawn * moved).mean()) < FIVE
    assert abs(((drawn.square() - 1) * (moved.square() - 1)).mean() / 2) < FIVE


def test_names_and_seeds_are_independent():
    drawn = scores()
    for other in (scores(name="v"), scores(normal_initializer(seed=4, std=STD))):
        assert abs((drawn * other).mean()) < FIVE and abs((drawn * other.T).mean()) < FIVE
