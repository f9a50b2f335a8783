"""What the watch is told of training: each place has its limits, and waits are known for what they are."""

from math import inf

from deepspeed.runtime.zero.partition_parameters import AllGatherHandle
from torch import distributed

from megalite.config.load import known_keys
from megalite.config.watch import WatchConfig
from megalite.parallel.mappings import wait_for
from megalite.parallel.node_memory import NodeMemory
from megalite.pipeline.p2p import Arrival, Peers
from megalite.training.places import WAITS_IN, Place, limits_of

WATCH = WatchConfig(
    stopped_seconds=1, step_seconds=2, factor=3, start_up_seconds=4, saving_seconds=5, evaluation_seconds=6
)


def test_every_place_has_limits_by_keys_that_exist():
    limits = limits_of(WATCH)
    assert set(limits) == set(Place)
    keys = {key for limit in limits.values() for key in (limit.setting, limit.silent_setting)}
    assert keys < known_keys().keys()
    assert {limits[place].seconds for place in (Place.READING, Place.PASSES, Place.OPTIMIZER)} == {2}
    assert (limits[Place.SAVING].seconds, limits[Place.VALIDATION].seconds) == (5, 6)
    assert {limit.factor for limit in limits.values()} == {0, 3}


def test_start_up_may_be_as_silent_as_it_may_be_long_and_teaches_nothing():
    for place in (Place.START_UP, Place.FIRST_STEP):
        limit = limits_of(WATCH)[place]
        assert (limit.seconds, limit.silent_seconds, limit.factor) == (4, 4, 0)
        assert limit.silent_setting == "watch.start_up_seconds"
    assert limits_of(WATCH)[Place.READING].silent_seconds == 1


def test_zero_seconds_watch_for_nothing():
    off = WatchConfig(
        stopped_seconds=0, step_seconds=0, start_up_seconds=0, saving_seconds=0, evaluation_seconds=0
    )
    assert {(limit.seconds, limit.silent_seconds) for limit in limits_of(off).values()} == {(inf, inf)}
    only_silence = limits_of(off.model_copy(update={"stopped_seconds": 7.0}))[Place.SAVING]
    assert (only_silence.seconds, only_silence.silent_seconds) == (inf, 7)


def test_the_defaults_speak_before_the_collectives_do():
    """NCCL ends a rank that waits after 10 minutes, gloo after 30."""
    assert WatchConfig().stopped_seconds < WatchConfig().step_seconds < 600


def test_what_waits_for_other_ranks_is_known_by_its_place_in_the_source():
    waiting = [
        distributed.all_reduce.__wrapped__,
        distributed.barrier.__wrapped__,
        Arrival.wait,
        Peers.finish,
        wait_for,
        NodeMemory._listen,
        AllGatherHandle.wait,
    ]
    codes = [f"{function.__code__.co_filename}:{function.__name__}" for function in waiting]
    assert [code for code in codes if not any(part in code for part in WAITS_IN)] == []
    assert not any(part in f"{limits_of.__code__.co_filename}:{limits_of.__name__}" for part in WAITS_IN)
