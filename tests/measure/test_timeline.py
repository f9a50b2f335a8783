"""A rank's timeline on disk: what was written is read, and a trace viewer finds what it needs."""

import json

import pytest

from megalite.measure.timeline import (
    LANES,
    RankTimeline,
    Span,
    TimelineError,
    found_timelines,
    pipelines_of,
    read_timelines,
    timeline_path,
    write_merged,
    write_timeline,
)


def timeline(rank, world_size=2, step=3):
    spans = [
        Span("compute", "forward 0", 0.5, 0.75, {"action": "Forward", "micro_batch": 0, "chunk": 0}),
        Span("transfer", "activation 0", 0.25, 0.5, {"peer": 1 - rank}),
        Span("transfer", "activation 1", 0.375, 0.625, {"peer": 1 - rank}),  # overlaps the first
        Span("update", "optimizer", 1.0, 1.25),
    ]
    facts = {"world_size": world_size, "pp_size": 2, "pp_rank": rank, "step": step, "num_micro_batches": 2}
    facts |= {"pipeline_schedule": "1f1b", "num_chunks": 1, "clock_error_seconds": 0.001}
    return RankTimeline(rank, {"rank": rank, **facts}, tuple(spans))


def write(folder, *timelines):
    for each in timelines:
        write_timeline(timeline_path(folder, each.rank), each)


def test_what_was_written_is_read(tmp_path):
    write(tmp_path, timeline(1), timeline(0))
    found = read_timelines(tmp_path)
    assert [each.facts for each in found] == [timeline(0).facts, timeline(1).facts]
    for each in found:
        assert sorted(each.spans, key=repr) == sorted(timeline(each.rank).spans, key=repr)


def test_a_trace_has_a_process_for_each_rank_and_pairs_for_spans_that_overlap(tmp_path):
    write_merged(tmp_path / "timeline.json", [timeline(0), timeline(1)])
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    for rank in range(2):
        mine = [event for event in events if event["pid"] == rank]
        named = {event["tid"]: event["args"]["name"] for event in mine if event["name"] == "thread_name"}
        assert list(named.values()) == list(LANES)
        [forward] = [event for event in mine if event["name"] == "forward 0"]
        assert (forward["ph"], forward["ts"], forward["dur"]) == ("X", 0.5e6, 0.25e6)  # microseconds
        assert named[forward["tid"]] == "compute"
        begun = {event["id"]: event["ts"] for event in mine if event["ph"] == "b"}
        ended = {event["id"]: event["ts"] for event in mine if event["ph"] == "e"}
        assert {(begun[i], ended[i]) for i in begun} == {(0.25e6, 0.5e6), (0.375e6, 0.625e6)}
    assert len({event["id"] for event in events if event["ph"] == "b"}) == 4  # none shared by ranks


def test_a_recording_that_is_not_there_or_not_whole_is_refused(tmp_path):
    with pytest.raises(TimelineError, match=r"holds no timeline-rank0.json: set logging.timeline_at_step"):
        read_timelines(tmp_path)
    write(tmp_path, timeline(1))
    with pytest.raises(TimelineError, match="timelines of 1 ranks and the run had 2"):
        read_timelines(tmp_path)
    write(tmp_path, timeline(0, step=5))
    with pytest.raises(TimelineError, match="of the steps 3, 5"):
        read_timelines(tmp_path)
    timeline_path(tmp_path, 0).write_text('{"traceEvents": []}', encoding="utf-8")
    with pytest.raises(TimelineError, match=r"timeline-rank0.json is no timeline of megalite"):
        read_timelines(tmp_path)


def test_a_recording_of_some_ranks_or_without_facts_is_found_and_not_taken_for_a_whole_one(tmp_path):
    span = {"ph": "X", "cat": "compute", "name": "forward 0", "ts": 1e6, "dur": 5e5}
    timeline_path(tmp_path, 10).write_text(json.dumps({"traceEvents": [span]}), encoding="utf-8")
    write(tmp_path, timeline(2))
    assert [each.rank for each in found_timelines(tmp_path)] == [2, 10]
    [alone] = [each for each in found_timelines(tmp_path) if each.rank == 10]
    assert (alone.facts, alone.spans) == ({}, (Span("compute", "forward 0", 1.0, 1.5),))
    with pytest.raises(TimelineError, match=r"timeline-rank10.json does not say world_size in otherData"):
        read_timelines(tmp_path)


WHOLE = {"ph": "X", "cat": "compute", "name": "forward 0", "ts": 1e6, "dur": 5e5}


@pytest.mark.parametrize(
    ("span", "facts", "reason"),
    [
        ({"dur": 0}, {}, "no spans that take time"),
        ({"args": [1]}, {}, "TypeError|ValueError"),
        ({"args": {"action": "Forward", "chunk": 0}}, {}, "is no action of a micro batch and a chunk"),
        (
            {"args": {"action": "Forward", "micro_batch": "0", "chunk": 0}},
            {},
            "is no action of a micro batch",
        ),
        ({}, {"step": "3"}, "step is '3', expected a whole number from 0 on"),
        ({}, {"num_micro_batches": 0}, "num_micro_batches is 0, expected a whole number from 1 on"),
    ],
)
def test_what_no_recording_holds_is_told_in_one_line(span, facts, reason, tmp_path):
    content = {"traceEvents": [WHOLE | span], "otherData": facts}
    timeline_path(tmp_path, 0).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(TimelineError, match=rf"timeline-rank0.json is no timeline of megalite \(.*{reason}"):
        found_timelines(tmp_path)


def test_ranks_of_a_pipeline_stand_together_by_stage():
    def placed(rank, pipeline, pp_rank):
        return RankTimeline(rank, {"pipeline": pipeline, "pp_rank": pp_rank}, ())

    timelines = [placed(0, 0, 1), placed(1, 1, 0), placed(2, 0, 0), placed(3, 1, 1)]
    assert [[each.rank for each in ranks] for ranks in pipelines_of(timelines)] == [[2, 0], [1, 3]]
    assert pipelines_of([RankTimeline(rank, {}, ()) for rank in (1, 0)]) == [
        [RankTimeline(rank, {}, ()) for rank in (0, 1)]
    ]
