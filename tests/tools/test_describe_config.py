import runpy
from pathlib import Path

from megalite.config.load import known_keys

ROOT = Path(__file__).parent.parent.parent
TOOL = runpy.run_path(str(ROOT / "tools/describe_config.py"))
PAGE = ROOT / "docs/configuration.md"


def test_the_shipped_page_is_what_the_code_says():
    assert PAGE.read_text(encoding="utf-8") == TOOL["describe"](), "run: python tools/describe_config.py"


def test_every_key_and_its_meaning_are_on_the_page():
    page = TOOL["describe"]()
    missing = [
        key for key, field in known_keys().items() if field.description and key.split(".")[-1] not in page
    ]
    assert missing == []
    assert "hiden_size" not in page


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, capsys):
    assert TOOL["main"](["--output", str(tmp_path / "no" / "such.md")]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {tmp_path / 'no' / 'such.md'}: No such file or directory\n"


def test_the_page_is_written_where_it_is_asked_for(tmp_path):
    assert TOOL["main"](["--output", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == TOOL["describe"]()
