"""What several tests share: a small drawn tree, real images where they are, and one smoke study, killed once on its way."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from PIL import Image

from lib import data, database, image_list, runs, synthetic

BREAKHIS = Path(os.environ.get("BREAKHIS_ROOT", runs.ROOT.parent / "shared" / "breakhis"))


@pytest.fixture(scope="session")
def breakhis():
    """The folder of real images; tests that need it say so where it is missing."""
    if not (BREAKHIS / "BreaKHis_v1").is_dir():
        pytest.skip(f"no real images at {BREAKHIS}: set BREAKHIS_ROOT to a folder that holds BreaKHis_v1")
    return BREAKHIS


@pytest.fixture(scope="session")
def listing():
    """The database's 7,909 file names and their published folds; tests that need it say so where it is missing."""
    if not (BREAKHIS / "listing.csv").is_file():
        pytest.skip(f"no list of the database's file names at {BREAKHIS / 'listing.csv'}")
    return pd.read_csv(BREAKHIS / "listing.csv")


@pytest.fixture(scope="session")
def published():
    """An index with the database's published counts; cases are made up."""
    rows = []
    for k, (subtype, counts) in enumerate(database.COUNTS.items()):
        for magnification, count in zip(data.MAGNIFICATIONS, counts, strict=True):
            letter = "B" if k < 4 else "M"
            rows += [
                data.parse_name(f"SOB_{letter}_{subtype}-14-{1000 * k + n % 12}-{magnification}-{n:03d}.png")
                for n in range(count)
            ]
    return pd.DataFrame(rows).assign(path="", sha256=[str(n) for n in range(len(rows))])


@pytest.fixture
def full_disk():
    """`with full_disk(size):` no file can be written past `size` bytes: the system refuses, as a full disk does."""

    @contextlib.contextmanager
    def limit(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def snapshot():
    """`snapshot(folder)`: the bytes of every file in it."""
    return lambda folder: {
        path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Twenty drawn cases with one image each."""
    return synthetic.draw_tree(
        tmp_path_factory.mktemp("drawn") / "tree", cases=20, images_per_case=1, magnifications=(100,)
    )


@pytest.fixture(scope="session")
def own_once(drawn, tmp_path_factory):
    """What `own` copies."""
    folder, rows = tmp_path_factory.mktemp("own"), []
    (folder / "slides").mkdir()
    for number, row in enumerate(data.index_images(drawn).itertuples()):
        path = folder / "slides" / f"{row.label[0]}{number}.jpg"
        with Image.open(row.path) as image:
            image.crop((120, 0, 580, 460)).save(path)
        rows.append((f"slides/{path.name}", row.label, f"patient {number // 2}", 250))
    pd.DataFrame(rows, columns=image_list.LISTED).to_csv(folder / data.LIST, index=False)
    return folder


@pytest.fixture
def own(own_once, tmp_path):
    """A folder of images named in another way, as square JPEG tiles, and their list."""
    return shutil.copytree(own_once, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The home folder of a smoke study that was killed after its first epoch and started again, and what it printed then."""
    home = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, "-m", "lib.study", "smoke", "--home", str(home)]
    options = {"cwd": runs.ROOT, "text": True, "start_new_session": True}
    with open(home / "first.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **options)
        deadline = time.monotonic() + 240
        resumable = home / "runs" / "smoke" / "models" / "source_200X.resume"
        while not resumable.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert resumable.exists(), (home / "first.log").read_text()
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # the kernel, which has a session of its own
            if each.cwd().startswith(str(home)):
                each.kill()
    again = subprocess.run(command, capture_output=True, timeout=600, **options)
    assert again.returncode == 0, again.stdout + again.stderr
    return home, again.stdout + again.stderr
