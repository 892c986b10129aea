import json

import pytest

from lib import results


def test_a_report_to_compare_with_must_be_there_and_stand_on_the_same_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STUDY_HOME", str(tmp_path))
    here = {"fingerprint": "1"}
    assert results.published([], here) == {}
    with pytest.raises(FileNotFoundError, match="No published report 'other' to compare with: run it first"):
        results.published(["other"], here)
    folder = tmp_path / "reports" / "other"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"dataset": here}))
    assert list(results.published(["other"], here)) == ["other"]
    assert capsys.readouterr().err == ""
    assert results.published(["other"], {"fingerprint": "2"}) == {}
    assert "other stands on other images" in capsys.readouterr().err
