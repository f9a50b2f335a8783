"""A run that comes to no newer checkpoint is started so many times and no more."""

from megalite.training.starts import note_start


def test_starts_from_one_step_are_counted(tmp_path):
    assert [note_start(tmp_path, 0, 3) for _ in range(3)] == [None] * 3
    refusal = note_start(tmp_path, 0, 3)
    assert refusal == (
        "3 starts from step 0 have come to no newer checkpoint (stop.after_starts 3): see what ended them, "
        f"then remove {tmp_path / 'starts.json'} to try again"
    )
    assert note_start(tmp_path, 0, 3) == refusal
    assert note_start(tmp_path, 0, 4) is None
    assert note_start(tmp_path, 5, 3) is None  # there was progress
    assert note_start(tmp_path, 5, 3) is None and note_start(tmp_path, 5, 2) is not None
    (tmp_path / "starts.json").write_text("{")
    assert note_start(tmp_path, 5, 1) is None and note_start(tmp_path, 5, 1) is not None


def test_without_a_limit_a_run_is_started_as_often_as_one_likes(tmp_path):
    assert [note_start(tmp_path, 7, 0) for _ in range(9)] == [None] * 9
