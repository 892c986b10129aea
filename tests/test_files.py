"""Which files of a folder count, and which one a written name means."""

import os

import pytest

from lib import files


def test_what_systems_leave_is_told_from_what_people_put_there():
    left = ["._a.png", ".DS_Store", "x/Thumbs.db", "@eaDir/a.png", ".Trash-1000/a.png", "$RECYCLE.BIN/a.png"]
    left += [".Trashes", ".ipynb_checkpoints/01-checkpoint.ipynb", "__MACOSX/x/a.png", "THUMBS.DB"]
    assert all(map(files.left_by_system, left))
    assert not any(map(files.left_by_system, ["a.png", "x/y.z/a.png", "thumbs.png", "trash/a.png", "_a.png"]))


def test_a_hidden_folder_above_does_not_hide_the_images(tmp_path):
    root = tmp_path / ".cache" / "images"
    (root / "sub").mkdir(parents=True)
    for name in ("b.png", "sub/a.png", ".c.png"):
        (root / name).touch()
    assert files.below(root) == [root / "b.png", root / "sub" / "a.png"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=r"closed cannot be looked into \(Permission denied\): allow"):
        files.below(tmp_path)


def test_a_name_is_found_in_other_capitals_only_where_one_file_fits(tmp_path):
    (tmp_path / "a.png").touch()
    assert files.find(tmp_path, "A.PNG") == tmp_path / "a.png"
    (tmp_path / "a.Png").touch()
    if len(list(tmp_path.iterdir())) == 2:  # not on a disk without capital letters
        assert files.find(tmp_path, "A.PNG") == tmp_path / "A.PNG"
    assert files.find(tmp_path, "a.png") == tmp_path / "a.png"
