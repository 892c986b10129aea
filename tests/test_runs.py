import errno
import json
import os
import subprocess
import sys

import pytest
from filelock import Timeout

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


def test_a_damaged_note_on_the_images_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_HOME", str(tmp_path))
    runs.write_json(runs.folder("quick") / "dataset.json", {"synthetic": True})
    assert runs.dataset("quick") == {"synthetic": True}
    for text in ("{", "[]", ""):
        (runs.folder("quick") / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match=r"quick/dataset\.json is damaged: run notebooks/01_data_split"):
            runs.dataset("quick")


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


def test_a_tilde_in_study_home_is_the_users_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STUDY_HOME", "~/study")
    assert runs.home() == tmp_path / "study"


def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(tmp_path):
    code = "import os, sys; from lib import runs\nwith runs.whole_file(sys.argv[1]) as part:\n part.touch(); os._exit(9)"
    for name in ("a.csv", "b.csv"):
        subprocess.run([sys.executable, "-c", code, tmp_path / name], cwd=runs.ROOT)
    (left,) = tmp_path.iterdir()  # the second removed the first one's
    gone = left.name.split(".")[-2]
    kept = {
        left.name.replace(gone, str(os.getppid())),
        f".a.csv.elsewhere.{gone}.part",
        "archive.tar.gz.part",
    }
    for name in kept:
        (tmp_path / name).touch()
    runs.write_text(tmp_path / "c.csv", "")
    assert {path.name for path in tmp_path.iterdir()} == kept | {"c.csv"}
    with runs.whole_file(tmp_path / "c.csv") as part:
        part.touch()
        runs.write_text(tmp_path / "d.csv", "")
        assert part.exists(), "this process's own"
    assert {path.name for path in tmp_path.iterdir()} == kept | {"c.csv", "d.csv"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_share_without_locks_is_said_and_something_else_stands_for_one(
    tmp_path, monkeypatch, capsys, number
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with runs.locked(tmp_path / ".lock"):
        with pytest.raises(Timeout), runs.locked(tmp_path / ".lock", timeout=0):
            pass
        words = capsys.readouterr().err
        assert (
            f"{tmp_path} has no file locks ({os.strerror(number)}): the file .lock.held is used as a lock"
            in words
        )
    with runs.locked(tmp_path / ".lock", timeout=0):
        pass


def test_another_error_of_a_lock_is_told_as_it_is(tmp_path):
    with pytest.raises(IsADirectoryError), runs.locked(tmp_path):
        pass


def test_what_a_killed_process_held_without_locks_is_free_again(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    code = (
        "import errno, fcntl, os, sys; from lib import runs\n"
        "def refuse(*_): raise OSError(errno.ENOLCK, 'No locks available')\n"
        "fcntl.flock = refuse\n"
        "with runs.locked(sys.argv[1]): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / ".lock"], cwd=runs.ROOT).returncode == 9
    assert (tmp_path / ".lock.held").exists()
    with runs.locked(tmp_path / ".lock", timeout=5):
        pass
