"""Downloading against a small server of our own, with an archive in the database's form."""

import io
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool

import pandas as pd
import pytest

from lib import data, database, runs


@pytest.fixture(scope="module")
def images(drawn):
    """Name in the database's tree -> bytes, of a few drawn images."""
    return {
        f"BreaKHis_v1/{path.relative_to(drawn)}": path.read_bytes()
        for path in sorted(drawn.rglob("*.png"))[:6]
    }


def pack(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content or b""))
    return packed.getvalue()


@pytest.fixture
def server():
    """`server(content, cut=None, ranges=True)`: a URL that serves the bytes; its `asked` lists the ranges that were asked for.

    cut: after so many bytes the connection breaks, the first time.
    """
    running = []

    def serve(content, cut=None, ranges=True, length=True):
        cuts = [cut] if cut else []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                serve.asked.append(asked)
                if "missing" in self.path:
                    return self.send_error(404)
                start = int(asked[6:-1]) if asked and ranges else 0
                if asked and start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.end_headers()
                    return
                self.send_response(206 if asked and ranges else 200)
                if length:
                    self.send_header("Content-Length", str(len(content) - start))
                self.send_header("Content-Encoding", "x-gzip")  # as some servers label .tar.gz
                self.end_headers()
                self.wfile.write(content[start : cuts.pop() if cuts else None])

            def log_message(self, *_):
                pass

        running.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}/BreaKHis_v1.tar.gz"

    serve.asked = []
    yield serve
    for one in running:
        one.shutdown()
        one.server_close()


def names_in(folder):
    names = sorted(path.name for path in folder.rglob("*") if path.is_file())
    return [name for name in names if not name.endswith(".lock")]


def test_it_is_downloaded_once_and_says_how_to_cite(server, images, tmp_path, capfd):
    url = server(pack(images | {"BreaKHis_v1/README.txt": b"words"}))
    root = database.fetch(tmp_path / "data", url)
    assert len(data.index_images(root)) == len(images)
    assert names_in(tmp_path) == sorted([*(name.rsplit("/")[-1] for name in images), "README.txt"])
    assert "Cite Spanhol" in (shown := capfd.readouterr().err) and "downloading BreaKHis" in shown
    assert database.fetch(tmp_path / "data", url) == root
    assert server.asked == [None], "the second time nothing is asked for"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_goes_on_where_it_ended(server, images, tmp_path, ranges):
    content = pack(images)
    url = server(content, cut=len(content) // 2, ranges=ranges)
    with pytest.raises(ConnectionError, match=r"are kept\. Run again to go on"):
        database.fetch(tmp_path, url)
    assert not (tmp_path / "BreaKHis_v1").exists()
    assert len(data.index_images(database.fetch(tmp_path, url))) == len(images)
    first, second = server.asked
    assert first is None and second > "bytes=1"


def test_what_was_kept_of_a_longer_file_is_dropped(server, images, tmp_path):
    (tmp_path / "BreaKHis_v1.tar.gz.part").write_bytes(bytes(10**7))
    url = server(pack(images))
    with pytest.raises(ConnectionError, match="shorter than what was kept"):
        database.fetch(tmp_path, url)
    assert database.fetch(tmp_path, url).is_dir()


@pytest.mark.parametrize("length", [True, False])
def test_another_page_in_its_place_loses_nothing_that_was_kept(server, images, tmp_path, length):
    """A network that wants a login answers every request with a page of its own."""
    content = pack(images)
    part = tmp_path / "BreaKHis_v1.tar.gz.part"
    part.write_bytes(content[:-100])
    with pytest.raises(
        ConnectionError, match=r"another page, or shorter than what is kept.*Run again to go on"
    ):
        database.fetch(tmp_path, server(b"<html>log in</html>", ranges=False, length=length))
    assert part.read_bytes() == content[:-100]
    assert len(data.index_images(database.fetch(tmp_path, server(content)))) == len(images)


def test_a_database_that_is_there_is_used_where_no_lock_can_be_made(tmp_path):
    root = tmp_path / "BreaKHis_v1"
    root.mkdir()
    assert database.fetch(tmp_path) == root and list(tmp_path.iterdir()) == [root]


def test_an_error_of_the_server_is_said(server, tmp_path):
    url = server(b"").replace("BreaKHis_v1", "missing")
    with pytest.raises(ConnectionError, match=r"404.*nothing was kept"):
        database.fetch(tmp_path, url)


def test_two_runs_that_start_together_download_once(server, images, tmp_path):
    url = server(pack(images))
    with ThreadPool(2) as pool:
        roots = pool.map(lambda _: database.fetch(tmp_path, url), range(2))
    assert roots[0] == roots[1] and len(data.index_images(roots[0])) == len(images)
    assert server.asked == [None]


def test_a_whole_download_that_was_killed_before_its_end_is_not_repeated(server, images, tmp_path):
    (tmp_path / "BreaKHis_v1.tar.gz.part").write_bytes(content := pack(images))
    assert len(data.index_images(database.fetch(tmp_path, server(content)))) == len(images)
    assert server.asked == [f"bytes={len(content)}-"]


def test_a_full_disk_keeps_what_came(server, images, tmp_path, full_disk):
    url = server(content := pack(images))
    with full_disk(len(content) // 2), pytest.raises(OSError, match="free some space and run again"):
        database.fetch(tmp_path, url)
    assert len(data.index_images(database.fetch(tmp_path, url))) == len(images)
    assert server.asked[1].startswith("bytes=")


@pytest.mark.parametrize("name", ["../outside.png", "BreaKHis_v1/../../outside.png", "/tmp/outside.png"])
def test_an_archive_that_reaches_out_of_its_folder_is_refused(server, images, tmp_path, name):
    url = server(pack(images | {name: b"x"}))
    with pytest.raises(ValueError, match="reaches out of its folder"):
        database.fetch(tmp_path / "data", url)
    assert names_in(tmp_path) == []


def test_links_are_left_out(server, images, tmp_path):
    root = database.fetch(tmp_path, server(pack(images | {"BreaKHis_v1/link.png": None})))
    assert names_in(root) == sorted(name.rsplit("/")[-1] for name in images)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-2000], lambda content: b"<html>not here</html>"]
)
def test_a_damaged_archive_is_deleted_and_said(server, images, tmp_path, damage):
    with pytest.raises(ValueError, match="damaged or not BreaKHis"):
        database.fetch(tmp_path, server(damage(pack(images))))
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("names", [("both", "both/a.png"), ("both/a.png", "both"), ("x" * 300 + ".png",)])
def test_an_archive_whose_names_no_folder_can_hold_is_deleted_and_said(server, images, tmp_path, names):
    """A name that is both a file and a folder, or too long: the archive would end the next run as well."""
    url = server(pack(images | {f"BreaKHis_v1/{name}": b"x" for name in names}))
    with pytest.raises(
        ValueError, match=r"damaged or not BreaKHis .*: deleted, run again to download it anew"
    ):
        database.fetch(tmp_path, url)
    assert names_in(tmp_path) == []
    assert len(data.index_images(database.fetch(tmp_path, server(pack(images))))) == len(images)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_however_it_is_packed_a_damaged_archive_is_deleted(images, tmp_path, kind):
    archive = tmp_path / "BreaKHis_v1.tar.gz"
    with tarfile.open(archive, f"w:{kind}") as tar:
        for name, content in images.items():
            (tmp_path / "image").write_bytes(content)
            tar.add(tmp_path / "image", name)
    content = bytearray(archive.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or not BreaKHis"):
        database.fetch(tmp_path)
    assert names_in(tmp_path) == ["image"]


def test_a_disk_that_fails_while_unpacking_does_not_cost_the_archive(images, tmp_path, full_disk):
    (tmp_path / "BreaKHis_v1.tar.gz").write_bytes(pack(images))
    with full_disk(10_000), pytest.raises(OSError, match="free some space and run again"):
        database.fetch(tmp_path)
    assert names_in(tmp_path) == ["BreaKHis_v1.tar.gz"]
    assert len(data.index_images(database.fetch(tmp_path))) == len(images)


def test_what_systems_put_into_archives_is_not_unpacked(server, images, tmp_path):
    left = [f"BreaKHis_v1/{name}" for name in ("._a.png", "sub/.DS_Store", "__MACOSX/a.png", "Thumbs.db")]
    root = database.fetch(tmp_path, server(pack(images | dict.fromkeys(left, b"x"))))
    assert names_in(root) == sorted(name.rsplit("/")[-1] for name in images)


def test_without_network_it_says_what_to_do(tmp_path):
    with pytest.raises(
        ConnectionError,
        match=r"nothing was kept\. Run again to go on, or put it there by hand as .*BreaKHis_v1\.tar\.gz",
    ):
        database.fetch(tmp_path, "http://127.0.0.1:9/BreaKHis_v1.tar.gz")


def test_files_beside_the_folder_are_left_out_and_another_archive_is_said(server, images, tmp_path):
    root = database.fetch(tmp_path / "one", server(pack(images | {"._BreaKHis_v1": b"x"})))
    assert names_in(tmp_path / "one") == names_in(root) and len(names_in(root)) == len(images)
    with pytest.raises(ValueError, match="holds no folder BreaKHis_v1"):
        database.fetch(tmp_path / "two", server(pack({"other/README.txt": b"x"})))


def test_make_data_says_what_is_there_and_fails_only_where_it_is_not_all(drawn, tmp_path):
    command = [sys.executable, "-m", "lib.database"]
    done = subprocess.run([*command, str(drawn)], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "is incomplete: 20 of 7909 images" in done.stderr
    (tmp_path / "BreaKHis_v1").mkdir()
    for k, (subtype, counts) in enumerate(database.COUNTS.items()):
        for magnification, count in zip(data.MAGNIFICATIONS, counts, strict=True):
            for n in range(count):
                name = f"SOB_{'B' if k < 4 else 'M'}_{subtype}-14-{k}-{magnification}-{n:03}.png"
                (tmp_path / "BreaKHis_v1" / name).touch()
    done = subprocess.run([*command, str(tmp_path)], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("BreaKHis_v1 is complete")


def test_what_a_copy_lacks_is_counted(drawn):
    lacks = database.missing(data.index_images(drawn))
    assert lacks.startswith("20 of 7909 images; A at 40X: 0 of 114")
    with pytest.raises(
        ValueError, match=r"A at 40X: 0 of 114.*Complete that folder.*or set allow_incomplete"
    ):
        database.check(data.index_images(drawn))
    database.check(data.index_images(drawn), allow_incomplete=True)
    assert sum(map(sum, database.COUNTS.values())) == database.TOTAL


def test_the_official_folds_are_read_as_published(listing, tmp_path):
    index = pd.DataFrame([data.parse_name(name) for name in listing["file"]])
    assert database.missing(index) == ""
    for fold in database.FOLDS:
        lines = index["image"] + "|" + index["magnification"].astype(str) + "|1|" + listing[fold]
        (tmp_path / f"ds{fold}.txt").write_text("\n".join(lines) + "\n")
    table = database.split_by_fold(tmp_path, index, index)
    assert len(table) == 5 * 7909
    for number, fold in enumerate(database.FOLDS):
        rows = table[table["fold"] == number]
        assert (rows["split"].replace("validation", "train").to_numpy() == listing[fold].to_numpy()).all()
        held = rows[rows["split"] != "test"].groupby(["label", "magnification"])["split"]
        shares = held.value_counts(normalize=True).xs("validation", level="split")
        assert len(shares) == 8 and shares.between(0.095, 0.1).all(), "in each magnification"
        crossing = data.cases_on_two_sides(rows[rows["split"] != "validation"])
        assert 6 <= len(crossing) <= 8, "by patient folder: some cases lie on both sides"

    unknown = "SOB_M_DC-14-99999-100-001.png"
    with open(tmp_path / "dsfold1.txt", "a") as file:
        file.write(f"{unknown}|100|1|train\n")
    with pytest.raises(
        ValueError, match=rf"names 1 images that the database does not hold, the first {unknown}"
    ):
        database.split_by_fold(tmp_path, index, index)


def test_fold_files_that_do_not_fit_are_named(drawn, tmp_path):
    index = data.index_images(drawn)
    with pytest.raises(FileNotFoundError, match=r"No dsfold1\.txt under"):
        database.split_by_fold(tmp_path, index, index)
    line = f"{index['image'][0]}|100|1|train\n"
    for text, message in {
        "cat.png|100|1|train\n": r"dsfold1\.txt: 'cat\.png' is no name of a BreaKHis image",
        "|100|1|train\n": r"dsfold1\.txt: '' is no name of a BreaKHis image",
        line: "says nothing of 19 images",
        line + line: f"names {index['image'][0]} twice",
        line.replace("train", "train|1"): "a line has more than four parts. Take the file anew from mkfold",
    }.items():
        for fold in database.FOLDS:
            (tmp_path / f"ds{fold}.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            database.split_by_fold(tmp_path, index, index)
    (tmp_path / "dsfold1.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"dsfold1\.txt: 'utf-8' .*Take the file anew"):
        database.split_by_fold(tmp_path, index, index)
    for left in (".Trash-1000", "__MACOSX", "copy"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "dsfold1.txt").touch()
    with pytest.raises(ValueError, match=r"2 files dsfold1\.txt under .*: leave one"):
        database.split_by_fold(tmp_path, index, index)
