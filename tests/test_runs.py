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
        ("predictions/merged_fgsm-none-case0.csv.gz", "05_adversarial_training_defense"),
        ("predictions.csv.gz", "06_comparison"),
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
    runs.write_recipe(path, recipe)
    assert runs.is_current(path, recipe)
    assert not runs.is_current(path, recipe | {"steps": 21})
    path.write_text("tabl")
    assert not runs.is_current(path, recipe)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Writes the modules of a small lib and gives a function from parts to their code hash."""
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "lib").mkdir()

    def write(**modules):
        for name, source in modules.items():
            (tmp_path / "lib" / f"{name}.py").write_text(source)
        return runs.code_hash

    return write


def defined(name):
    """What a function called `name` in lib.one looks like to `code_hash`; also one made inside it."""

    def function():
        pass

    function.__module__, function.__qualname__ = "lib.one", name
    return function


ONE = """
from lib import two, runs
from lib.two import WORDS

STEPS: int = 3
def step(x): return x + two.SIZE
def climb(x): return [step(x) for _ in range(STEPS)]
def rest(x): return runs.folder(x)
def say(x): return WORDS
"""
TWO = "SIZE = 1\nWORDS = 'one'\nOTHER = 0\n"


@pytest.mark.parametrize(
    "module, old, new, moved",
    [
        ("one", "x + two.SIZE", "x - two.SIZE", {"step", "climb"}),
        ("one", "STEPS: int = 3", "STEPS: int = 4", {"climb"}),
        ("two", "SIZE = 1", "SIZE = 2", {"step", "climb"}),
        ("two", "'one'", "'two'", {"say"}),
        ("one", "runs.folder(x)", "runs.home()", {"rest"}),
        ("one", "def step(x): return", 'def step(x):\n    """Adds."""\n    return', set()),
        ("one", "STEPS: int = 3", "STEPS: int = (3)  # steps", set()),
    ],
)
def test_code_hash_follows_what_a_function_reaches(library, module, old, new, moved):
    sources = {"one": ONE, "two": TWO, "runs": "def folder(x): return x"}
    of = library(**sources)
    names = ["step", "climb", "rest", "say"]
    before = [of(defined(name)) for name in names]
    library(**{module: sources[module].replace(old, new)})
    after = [of(defined(name)) for name in names]
    assert {name for name, a, b in zip(names, before, after, strict=True) if a != b} == moved


def test_code_hash_takes_modules_and_what_lies_elsewhere_does_not_count(library):
    of = library(one=ONE, two=TWO, runs="x = 1")
    assert of("one", "two") == of("two", "one") != of("one")
    assert of(defined("climb.<locals>.inner")) == of(defined("climb"), None, json.dumps, str)
    before = of("one")
    library(two=TWO.replace("1", "2"))
    assert of("one") != before, "what a module reaches in another counts"
    library(runs="x = 2", two=TWO)
    assert of("one") == before, "keeping files makes no numbers"


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
