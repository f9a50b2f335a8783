"""Files and folders are complete or absent, whatever fails on the way, and nothing is left behind."""

import os
import stat

import pytest

from megalite.files import aside_of, folder_aside, left_aside, sync, sync_folder, write_text, written_aside

PATH = "some.json"


def content(folder):
    """Name to text of all files below a folder, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in files}


def write_file(folder, text="new"):
    write_text(folder / PATH, text)


def write_folder(folder, text="new"):
    with folder_aside(folder / "box") as aside, (aside / PATH).open("w") as file:
        file.write(text)
        sync(file)


WRITERS = {write_file: PATH, write_folder: f"box/{PATH}"}


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk("fsync", 2) makes the second call of that name fail."""

    def fail(name, call):
        calls, real = [], getattr(os, name)

        def failing(*arguments, **options):
            calls.append(arguments)
            if len(calls) == call:
                raise OSError(28, "No space left on device")
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, failing)

    return fail


def test_text_is_utf8_and_bytes_are_as_they_are(tmp_path):
    write_text(tmp_path / "text", "é\n")
    with written_aside(str(tmp_path / "bytes"), "wb") as file:
        file.write(b"\xff\n")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\n"
    assert (tmp_path / "bytes").read_bytes() == b"\xff\n"


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_until_the_block_ends_the_old_file_stands(tmp_path, mode):
    write_file(tmp_path, "old")
    with written_aside(tmp_path / PATH, mode) as file:
        file.write("new" if mode == "w" else b"new")
        assert (tmp_path / PATH).read_text() == "old"
    assert content(tmp_path) == {PATH: "new"}


@pytest.mark.parametrize("mode", ["w", "wb"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_block_that_raises_changes_nothing(tmp_path, mode, error):
    write_file(tmp_path, "old")
    with pytest.raises(error), written_aside(tmp_path / PATH, mode) as file:
        file.write("new" if mode == "w" else b"new")
        raise error
    with pytest.raises(error), folder_aside(tmp_path / "box") as aside:
        write_file(aside)
        raise error
    assert content(tmp_path) == {PATH: "old"} and not (tmp_path / "box").exists()


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("name", "call"), [("fsync", 1), ("rename", 1)])
def test_what_fails_before_the_name_is_given_leaves_nothing(tmp_path, writer, name, call, full_disk):
    name = "replace" if (writer, name) == (write_file, "rename") else name
    full_disk(name, call)
    with pytest.raises(OSError, match="No space left"):
        writer(tmp_path)
    assert list(tmp_path.iterdir()) == []
    writer(tmp_path)  # the control: the second call is allowed
    assert content(tmp_path) == {WRITERS[writer]: "new"}


def test_a_folder_whose_names_cannot_be_synced_is_absent(tmp_path, full_disk):
    full_disk("fsync", 2)  # the file's own is the first
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("writer", "expected"),
    [(write_file, ["file", "folder"]), (write_folder, ["file", "folder", "folder"])],
)
def test_files_are_synced_before_they_get_their_name_and_folders_after(
    tmp_path, monkeypatch, writer, expected
):
    events, fsync = [], os.fsync

    def recorded(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append((kind, (tmp_path / WRITERS[writer]).exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    writer(tmp_path)
    assert [kind for kind, _ in events] == expected
    assert [published for _, published in events] == [False] * (len(expected) - 1) + [True]


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for path in (tmp_path / "absent" / PATH, tmp_path / "folder"):
        with pytest.raises(OSError) as caught:
            write_text(path, "")
        assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="elsewhere"), written_aside(tmp_path / PATH):
        raise OSError(2, "not here", "elsewhere")  # of the block: its own name


def test_a_folder_that_holds_something_is_not_replaced(tmp_path):
    write_folder(tmp_path, "old")
    with pytest.raises(OSError, match="not empty"):
        write_folder(tmp_path)
    assert content(tmp_path) == {f"box/{PATH}": "old"} and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "empty" / "box").mkdir(parents=True)
    write_folder(tmp_path / "empty")
    assert content(tmp_path / "empty") == {f"box/{PATH}": "new"}


def test_two_writers_do_not_meet_and_what_they_left_is_found(tmp_path):
    path = tmp_path / "some[1].json"
    left = sorted(aside_of(path) for _ in range(2))
    assert len(set(left)) == 2 and left_aside(path) == []
    for name in (*left, aside_of(tmp_path / "some1.json")):
        name.touch()
    assert left_aside(path) == left
    sync_folder(tmp_path)
