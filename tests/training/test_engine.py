"""What the engine refuses before anything is built."""

import pytest

from megalite.training.engine import EngineError, check_version


@pytest.mark.parametrize("version", ["0.19.8", "0.19.9", "0.19.8+cpu", "0.19.12"])
def test_a_version_whose_inside_was_read_is_taken(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.19.7", "0.18.9", "0.20.0", "1.0.0"])
def test_any_other_version_is_refused_in_one_line_with_both_numbers_and_the_remedy(version):
    with pytest.raises(EngineError) as refused:
        check_version(version)
    assert str(refused.value) == (
        f"DeepSpeed {version} is installed and megalite was tested with 0.19.8: "
        "pip install 'deepspeed~=0.19.8'"
    )
