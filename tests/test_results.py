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
    assert "other is skipped: it is a report on other images" in capsys.readouterr().err


def test_leakage_is_told_only_between_runs_whose_models_were_made_alike(monkeypatch, capsys):
    monkeypatch.setattr(results.evaluation, "read_piece", lambda path: path.parent.name)
    used = {"run": "one", "split_by": "image", "seed": 0, "epochs": 8, "epsilons": [4]}
    other = {
        "alike": {"parameters": used | {"run": "alike", "split_by": "case", "seed": 1, "epsilons": [1, 2]}},
        "longer": {"parameters": used | {"split_by": "case", "epochs": 16}},
    }
    assert results.tables(other, used) == ["alike"]
    assert "the models of longer were made otherwise" in capsys.readouterr().err
