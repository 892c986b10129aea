import json
import subprocess

import pytest

from lib import runs


def test_require_says_which_notebook_writes_the_missing_file(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_HOME", str(tmp_path))
    for name, notebook in [
        ("split.csv", "01_data_split"),
        ("models/baseline.safetensors", "02_transfer_learning"),
        ("predictions/baseline-none.csv.gz", "02_transfer_learning"),
        ("predictions/baseline-pgd.csv.gz", "03_fgsm_attack"),
        ("models/gaussian_noise_fold2.safetensors", "04_gaussian_noise_defense"),
        ("history/merged_fgsm.csv", "05_adversarial_training_defense"),
        ("results.json", "06_comparison"),
    ]:
        expected = rf"runs/quick/{name} is missing: run notebooks/{notebook}.ipynb first \(with run='quick'\)"
        with pytest.raises(FileNotFoundError, match=expected):
            runs.require("quick", name)
    (tmp_path / "runs" / "quick").mkdir(parents=True)
    (tmp_path / "runs" / "quick" / "split.csv").touch()
    assert runs.require("quick", "split.csv") == tmp_path / "runs" / "quick" / "split.csv"


def test_finished_work_is_current_only_with_its_recipe_and_undamaged(tmp_path):
    path, recipe = tmp_path / "baseline-pgd.csv.gz", {"steps": 20, "epsilons": (1, 2)}
    assert not runs.is_current(path, recipe)
    path.write_text("table")
    (tmp_path / "baseline-pgd.json").write_text('{"note": "kept"}')
    assert not runs.is_current(path, recipe)
    runs.write_recipe(path, recipe)
    assert runs.is_current(path, recipe)
    assert json.loads((tmp_path / "baseline-pgd.json").read_text())["note"] == "kept"
    assert not runs.is_current(path, recipe | {"steps": 21})
    path.write_text("tabl")
    assert not runs.is_current(path, recipe)


def test_code_hash_follows_the_named_modules():
    assert runs.code_hash("study", "report") == runs.code_hash("report", "study")
    assert runs.code_hash("study") != runs.code_hash("report")


def test_code_hash_follows_code_not_words(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    module = tmp_path / "lib" / "one.py"
    module.parent.mkdir()

    def of(source):
        module.write_text(source)
        return runs.code_hash("one")

    plain = of("def f(x):\n    return x + 1\n")
    assert plain != of("def f(x):\n    return x + 2\n")
    assert plain == of('"""A module."""\n\ndef f(x):\n    """Adds."""\n    return (x + 1)  # one\n')


def test_the_commit_says_when_code_differs_but_not_when_a_report_does(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path.resolve())
    assert runs.commit() == ""

    def git(*arguments):
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True
        )

    for name in ("lib/data.py", "reports/quick/summary.md"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    clean = runs.commit()
    assert len(clean) == 12
    (tmp_path / "reports/quick/summary.md").write_text("2")
    assert runs.commit() == clean
    (tmp_path / "lib/data.py").write_text("2")
    assert runs.commit() == f"{clean}-dirty"
