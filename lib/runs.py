"""One run's folder under runs/: where it is, what is in it, and from what each finished file was made.

Stages talk through these files alone. A notebook finds its folder (`folder`), asks for what an earlier one wrote (`require`) and
keeps finished work (`is_current`, `write_recipe`). Every file is written whole or not at all (`whole_file`).
"""

import ast
import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from fnmatch import fnmatch
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path

from filelock import FileLock, SoftFileLock
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent

# Which notebook writes what under runs/<run>/; the first pattern that fits counts.
WRITERS = (
    ("split.csv", "01_data_split"),
    ("dataset.json", "01_data_split"),
    ("predictions/*-validation-*", "03_fgsm_attack"),
    ("predictions/*-apgd_ce-*", "07_robustness_audit"),
    ("predictions/*-fab-*", "07_robustness_audit"),
    ("predictions/*-square-*", "07_robustness_audit"),
    ("predictions/*-from_*", "07_robustness_audit"),
    ("models/gaussian_noise*", "04_gaussian_noise_defense"),
    ("predictions/gaussian_noise*", "04_gaussian_noise_defense"),
    ("models/merged_fgsm*", "05_adversarial_training_defense"),
    ("predictions/merged_fgsm*", "05_adversarial_training_defense"),
    ("models/adversarial_training*", "05_adversarial_training_defense"),
    ("predictions/adversarial_training*", "05_adversarial_training_defense"),
    ("recipes.csv", "05_adversarial_training_defense"),
    ("augmentations.csv", "02_transfer_learning"),
    ("models/*", "02_transfer_learning"),
    ("audit/*", "07_robustness_audit"),
    ("predictions/*-none*", "02_transfer_learning"),
    ("predictions/*", "03_fgsm_attack"),
    ("attacks.csv", "03_fgsm_attack"),
    ("audit.csv", "07_robustness_audit"),
    ("certified.csv", "07_robustness_audit"),
    ("*", "06_comparison"),
)
PACKAGES = (
    "torch",
    "torchvision",
    "torchxrayvision",
    "pyautoattack",
    "numpy",
    "pandas",
    "scipy",
    "scikit-learn",
    "papermill",
)

# Under this type the output of `show_environment` holds what was found, not only in words.
ENVIRONMENT = "application/vnd.study.environment+json"

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def home():
    """The absolute folder that holds runs/ and reports/: STUDY_HOME where it is set (`~` is your home), otherwise the repository."""
    return Path(os.environ.get("STUDY_HOME") or ROOT).expanduser().absolute()


def folder(run):
    """The folder of one run, `runs/<run>` under `home()`; it need not exist yet."""
    return home() / "runs" / run


def report(run):
    """The folder of a run's last published report, `reports/<run>` under `home()`; it need not exist yet.

    Where publishing was killed while no report was in its place, this is the one put aside, until `restore_report` puts it back.
    """
    place = home() / "reports" / run
    aside = place.with_name(f".{run}.old")
    return aside if aside.exists() and not place.exists() else place


def restore_report(run):
    """Put a run's last report back in its place where publishing was killed half way (`report`)."""
    if (last := report(run)) != (place := home() / "reports" / run):
        last.rename(place)


def require(run, name):
    """The path of `runs/<run>/<name>`, which an earlier notebook wrote.

    Raises FileNotFoundError, saying which notebook to run, when it is not there.
    """
    path = folder(run) / name
    if not path.exists():
        raise FileNotFoundError(
            f"runs/{run}/{name} is missing: run notebooks/{writer(name)}.ipynb first (with run={run!r})"
        )
    return path


def writer(name):
    """The notebook that writes `runs/<run>/<name>`, such as "02_transfer_learning"; a history is written with its model."""
    name = name.replace("history/", "models/")
    return next(notebook for pattern, notebook in WRITERS if fnmatch(name, pattern))


def dataset(run):
    """What 01 noted about the images of a run: name, synthetic, images, cases, fingerprint. Raises ValueError for a damaged note."""
    about = read_json(require(run, "dataset.json"))
    if not about:
        raise ValueError(
            f"runs/{run}/dataset.json is damaged: run notebooks/01_data_split.ipynb again (with run={run!r})."
        )
    return about


def runner_parameters(run):
    """The parameters with which the runner last ran the stages of a run; empty where the notebooks were run by hand."""
    used = {}
    for file in sorted((folder(run) / "stages").glob("*.json")):
        used |= read_note(file).get("parameters", {})
    return used


def is_current(path, recipe):
    """Whether `path` was finished from this very recipe and is undamaged, so that the work need not be done again.

    recipe: a dict of JSON values with everything that the file depends on (see `code_hash`). A current file is also marked as
    used: the runner removes what has a recipe and was neither written nor asked for when its stage ran.
    """
    path = Path(path)
    if not path.is_file() or recipe_of(path) != _plain(recipe) or not is_whole(path):
        return False
    os.utime(path)
    os.utime(_recipe_file(path))
    return True


def is_whole(path):
    """Whether a finished file is as it was when `write_recipe` noted it; False where there is no such note."""
    return read_json(_recipe_file(path)).get("sha256") == file_hash(path)


def write_recipe(path, recipe):
    """Note, atomically and as the last step, from what the finished file `path` was made.

    The note stands under "recipe" and "sha256" in the JSON beside it (`models/baseline.json` for
    `models/baseline.safetensors`, `x.json` for `x.csv.gz`).
    """
    write_json(_recipe_file(path), {"recipe": _plain(recipe), "sha256": file_hash(path)})


@contextlib.contextmanager
def whole_file(path):
    """`with whole_file(path) as part:` what is written to the file `part` becomes `path` at the end, or nothing does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_parts(path.parent)
    part = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.part")
    try:
        with writing(path):
            yield part
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _remove_parts(folder):
    """Remove what killed processes left half written here. Only this machine's: on a share, another's may still be at work."""
    ours = re.compile(rf"\..+\.{re.escape(platform.node())}\.(\d{{1,9}})\.part")
    for name in os.listdir(folder):
        if part := ours.fullmatch(name):
            try:
                os.kill(int(part[1]), 0)  # sends nothing, only asks whether the process is there
            except ProcessLookupError:
                Path(folder, name).unlink(missing_ok=True)
            except OSError:  # there, and another user's
                pass


@contextlib.contextmanager
def locked(path, timeout=-1):
    """`with locked(path):` one process at a time, across all that share the folder. timeout: seconds to wait, -1 for ever.

    Without file locks, a file ending in .held is used instead. A killed process leaves it behind; only the same machine can tell
    that its owner is gone. Raises filelock.Timeout when another process has it.
    """
    path = Path(path)
    lock = FileLock(path, timeout)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        held = path.with_name(f"{path.name}.held")
        print(
            f"{path.parent} has no file locks ({error.strerror}): the file {held.name} is used as a lock. If a study waits although the one "
            "on another machine was killed, delete that file. A local disk (STUDY_HOME) avoids this.",
            file=sys.stderr,
        )
        lock = SoftFileLock(held, timeout)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def writing(path):
    """While `path` is written: an OSError because the disk is full says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        words = (
            f"could not write {path} ({error.strerror}): free some space and run again, finished work is kept"
        )
        raise OSError(error.errno, words) from error


def code_hash(*parts):
    """Twelve hexadecimal digits over the code that these parts of `lib` stand on: `code_hash(training.train, "models")`.

    parts: functions, classes, or names of modules; None and what is defined elsewhere do not count. With a function counts all
    that it reaches by name in `lib`, but not this module: keeping files makes no numbers. Comments, docstrings and layout do not
    count either: hours of training are not thrown away for a better sentence or for a function that they never call.
    """
    ahead, reached = [], {}
    defined_in = lru_cache(lambda module: _definitions(_source(module)))  # each file is read once a call
    for part in parts:
        if isinstance(part, str):
            ahead += [(part, name) for name in defined_in(part)[0]]
        elif getattr(part, "__module__", "").startswith("lib."):
            ahead.append((part.__module__.removeprefix("lib."), part.__qualname__.split(".")[0]))
    while ahead:
        module, name = ahead.pop()
        definitions, imported = defined_in(module)
        if (module, name) in reached or name not in definitions:
            continue
        reached[module, name] = ast.unparse(definitions[name])
        for node in ast.walk(definitions[name]):
            match node:
                case ast.Name(id=other):
                    ahead.append(imported.get(other, (module, other)))
                case ast.Attribute(value=ast.Name(id=other), attr=attribute) if other in imported:
                    ahead.append((imported[other][0], attribute))
    return digest(sorted([*key, code] for key, code in reached.items()))[:12]


def _source(module):
    return (ROOT / "lib" / f"{module}.py").read_text("utf-8")


@lru_cache
def _definitions(source):
    """What a module of `lib` defines at its top, by name, without docstrings, and what it imports of `lib`, but for `runs`.

    The second is {name: (module, name there)}, of a whole module (module, "").
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    definitions, imported = {}, {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            definitions |= dict.fromkeys(names, node)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lib":
            module = node.module.removeprefix("lib").removeprefix(".")
            whole = {name: (name, "") for alias in node.names if (name := alias.name) != "runs"}
            parts = {
                alias.asname or alias.name: (module, alias.name) for alias in node.names if module != "runs"
            }
            imported |= parts if module else whole
    return definitions, imported


def file_hash(path):
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value):
    """The sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _plain(value):
    return json.loads(json.dumps(value))


def _recipe_file(path):
    path = Path(path)
    return path.with_name(path.name.removesuffix(".gz")).with_suffix(".json")


def recipe_of(path):
    """What `write_recipe` noted of how a file was made; {} where there is no note."""
    noted = read_json(_recipe_file(path)).get("recipe")
    return noted if isinstance(noted, dict) else {}


def is_damaged(path):
    """Whether a file is not what `write_recipe` noted; False where nothing was noted."""
    return _recipe_file(path).exists() and not is_whole(path)


def precision(folder):
    """What a run's checkpoints were trained in, "bfloat16", say: the parameter "auto" does not tell."""
    recipes = map(recipe_of, (folder / "models").glob("*.json"))
    found = {recipe["precision"].removeprefix("torch.") for recipe in recipes if "precision" in recipe}
    return " and ".join(sorted(found))


def discard(path):
    """Remove finished work and the recipe beside it."""
    for file in (Path(path), _recipe_file(path)):
        file.unlink(missing_ok=True)


def read_json(path):
    """The object in a JSON file; {} where there is none, or a damaged one."""
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_note(path):
    """What `write_note` wrote; {} where there is nothing, or not what was written."""
    note = read_json(path)
    return note if note.pop("sha256", None) == digest(note) else {}


def write_note(path, note):
    """Write an object as JSON with its own checksum, so that whoever reads it can rely on what it holds."""
    write_json(path, note | {"sha256": digest(_plain(note))})


def write_json(path, value):
    """Write a JSON file, whole or not at all. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def download(url, path, said):
    """The file at `url` as `path`; half a download, kept beside it as .part, goes on where it ended. said: what progress is called.

    Raises ConnectionError, without a full stop so that the caller can go on, where the network fails.
    """
    import pooch  # here, since few runs download anything

    pooch.get_logger().setLevel("WARNING")  # the bar says what is downloaded
    part = path.with_name(f"{path.name}.part")
    resuming = partial(_resuming, part=part, said=said)
    with locked(path.with_name(f".{path.name}.lock")):  # two runs that start together download once
        pooch.retrieve(url, known_hash=None, fname=path.name, path=path.parent, downloader=resuming)


def _resuming(url, output_file, _, part, said):
    """A downloader for pooch that goes on where an earlier one ended: what came so far is kept in `part`."""
    import requests
    import urllib3

    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with requests.get(url, stream=True, timeout=60, headers=headers) as answer:
            if answer.headers.get("Content-Range") == f"bytes */{have}":
                os.replace(part, output_file)  # all of it had come before
                return
            if answer.status_code == requests.codes.requested_range_not_satisfiable:
                part.unlink()
                raise ConnectionError(f"{url} is shorter than what was kept of it. Run again to start anew")
            answer.raise_for_status()
            length = int(answer.headers.get("Content-Length") or 0)
            if answer.status_code != requests.codes.partial_content:
                if length < have:
                    raise requests.RequestException(
                        f"what came is another page, or shorter than what is kept; delete {part} to start anew"
                    )
                have = 0  # a server that cannot go on sends everything again
            total = have + length if length else None
            progress = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=said)
            with writing(part), progress, open(part, "ab" if have else "wb") as file:
                # The bytes as they come, not unzipped on the way even where the server says that they may be.
                for chunk in answer.raw.stream(2**20, decode_content=False):
                    file.write(chunk)
                    progress.update(len(chunk))
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        kept = f"{part.stat().st_size / 1e6:,.1f} MB are kept" if part.exists() else "nothing was kept"
        raise ConnectionError(f"Could not download {url} ({error}); {kept}. Run again to go on") from error
    os.replace(part, output_file)


def write_table(path, frame):
    """Write a DataFrame as CSV, whole or not at all."""
    write_text(path, frame.to_csv(index=False))


def read_table(path):
    """A table that `write_table` wrote, names of images and cases as text."""
    import pandas as pd

    text = dict.fromkeys(("image", "case", "label"), str)
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, "utf-8")


def environment():
    """What computes in this process: {"versions": {package: version}, "device", "commit"}."""
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    return {"versions": versions, "device": device_name(), "commit": commit()}


def show_environment():
    """Show in a notebook what computes there; the runner takes it from the executed notebook (`ENVIRONMENT`)."""
    from IPython.display import display

    found = environment()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    said = f"{versions}\non {found['device']}, code at commit {found['commit'] or 'unknown (not under git)'}"
    display({"text/plain": said, ENVIRONMENT: found}, raw=True)


def commit():
    """The short commit of the code, with "-dirty" where code or profiles differ from it; "" outside of git.

    Reports are left out: publishing one must not make the next one's commit look changed.
    """

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return ""
        changed = git("status", "--porcelain", "--", "lib", "notebooks", "pyproject.toml", "requirements.txt")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def device_name():
    """The machine that computes, in words: the name of the GPU, otherwise "cpu" with its cores and architecture."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {os.cpu_count()} cores, {platform.machine()}"
