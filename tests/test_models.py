import functools
import http.server
import json
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torchxrayvision as xrv

from lib import models, runs

NAME = "densenet121-res224-all"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with a randomly initialized whole model, stored as TorchXRayVision stores its own, and that model."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    model = xrv.models.DenseNet(
        num_classes=18, in_channels=1, growth_rate=32, block_config=(6, 12, 24, 16), num_init_features=64
    )
    model.op_threshs = torch.ones(18)
    path = folder / xrv.models.model_urls[NAME]["weights_url"].split("/")[-1]
    torch.save(model, path)
    return path, model.eval()


def features(network, images):
    return torch.relu(network.features(images)).mean((2, 3))


def test_xray_weights_arrive_in_every_layer_and_answer_gray_images_as_before(stored):
    path, theirs = stored
    model = models.build(NAME, path.parent)
    own, other = model.network.state_dict(), theirs.state_dict()
    for name, value in own.items():
        if name not in ("features.conv0.weight", "classifier.weight", "classifier.bias"):
            assert torch.equal(value, other[name]), name
    gray = torch.rand(2, 1, 64, 64)
    scaled = (2 * gray - 1) * 1024
    with torch.no_grad():
        assert torch.allclose(
            features(model.network, scaled.expand(-1, 3, -1, -1)),
            features(theirs, scaled),
            rtol=1e-3,
            atol=1e-4,
        )
        assert model(gray.expand(-1, 3, -1, -1)).shape == (2, 2)


def test_weights_are_downloaded_once_into_the_given_folder(stored, tmp_path, monkeypatch, full_disk):
    path, theirs = stored
    requests, cuts, asked = [], [], []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self):
            asked.append(self.headers["Range"])
            return super().send_head()

        def copyfile(self, source, outputfile):
            outputfile.write(source.read(cuts.pop() if cuts else -1))

        def log_message(self, *_):
            requests.append(self.path)

    handler = functools.partial(Handler, directory=str(path.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{path.name}"
        monkeypatch.setitem(xrv.models.model_urls, NAME, {**xrv.models.model_urls[NAME], "weights_url": url})
        with full_disk(10_000), pytest.raises(OSError, match=r"free some space and run again"):
            models.build(NAME, tmp_path / "cache")
        cuts.append(path.stat().st_size // 2)
        with pytest.raises(ConnectionError, match=r"14\.\d MB are kept\. Run again to go on\. Offline\?"):
            models.build(NAME, tmp_path / "cache")
        assert not (tmp_path / "cache" / path.name).exists(), "half a file is not taken for the whole"
        for _ in range(2):
            model = models.build(NAME, tmp_path / "cache")
        server.shutdown()
    assert len(requests) == 3
    left = [file.name for file in (tmp_path / "cache").iterdir() if not file.name.endswith(".lock")]
    assert left == [path.name]
    assert asked[0] is None and asked[2] == f"bytes={path.stat().st_size // 2}-", (
        "what came is asked for no more"
    )
    name = "features.denseblock4.denselayer16.conv2.weight"
    assert torch.equal(model.network.state_dict()[name], theirs.state_dict()[name])


def test_offline_says_what_to_do(tmp_path, monkeypatch):
    nowhere = {**xrv.models.model_urls[NAME], "weights_url": "http://127.0.0.1:9/weights.pt"}
    monkeypatch.setitem(xrv.models.model_urls, NAME, nowhere)
    with pytest.raises(ConnectionError, match=r"weights\.pt into .*weights_dir.*none"):
        models.build(NAME, tmp_path)
    assert list(tmp_path.glob("[!.]*")) == []


class Harmful:
    def __reduce__(self):
        return (print, ("code in a weights file ran",))


@pytest.mark.parametrize("content", [pickle.dumps(Harmful()), b"damaged"])
def test_damaged_and_unsafe_weights_are_refused(stored, tmp_path, content, capsys):
    (tmp_path / stored[0].name).write_bytes(content)
    with pytest.raises(ValueError, match="damaged or holds something other"):
        models.build(NAME, tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_one_flipped_byte_in_downloaded_weights_is_noticed(stored, tmp_path):
    content = bytearray(stored[0].read_bytes())
    content[len(content) // 2] ^= 1  # within a tensor, where torch itself reads on without a word
    (tmp_path / stored[0].name).write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged .* is not as it was written\. Delete it to download"):
        models.build(NAME, tmp_path)


def test_weights_that_are_not_finite_are_refused(stored, tmp_path):
    with torch.serialization.safe_globals(models.XRV_CLASSES):
        model = torch.load(stored[0], weights_only=True)
    model.features.conv0.weight.data[0, 0, 0, 0] = float("nan")
    torch.save(model, tmp_path / stored[0].name)
    with pytest.raises(ValueError, match=r"not finite numbers, in features\.conv0\.weight first: delete it"):
        models.build(NAME, tmp_path)


def test_an_unknown_class_in_a_weights_file_is_named(stored, tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.GELU()), tmp_path / stored[0].name)
    with pytest.raises(ValueError, match="GELU"):
        models.build(NAME, tmp_path)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=NAME):
        models.build("densenet121-res224-everything")


def test_checkpoints_come_back_with_how_they_were_made(tmp_path):
    model = models.build("none", seed=1)
    assert torch.equal(
        model.network.classifier.weight, models.build("none", seed=1).network.classifier.weight
    )
    path = tmp_path / "models" / "a.safetensors"
    models.save(model, path, {"start": "none"})
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(models.build(str(path))(images), model(images))
    assert json.loads(path.with_suffix(".json").read_text())["recipe"] == {"start": "none"}


def test_a_checkpoint_that_is_missing_damaged_or_does_not_fit(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="train it"):
        models.load(path)
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="damaged"):
        models.load(path)
    models.save(models.build("none"), path, {})
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged, it is not as it was written: train it anew"):
        models.load(path)
    models.save(torch.nn.Linear(2, 2), path, {})
    with pytest.raises(ValueError, match="does not fit"):
        models.load(path)
    for value in (float("nan"), float("inf")):
        broken = models.build("none")
        broken.network.classifier.bias.data[1] = value
        models.save(broken, path, {})
        with pytest.raises(
            ValueError, match=r"not finite numbers, in network\.classifier\.bias first: train it"
        ):
            models.load(path)


def test_frozen_batch_norm_answers_as_torchs_own_does():
    generator = torch.Generator().manual_seed(0)
    own, x = models.BatchNorm(5), 3 * torch.randn((4, 5, 6, 7), generator=generator)
    torchs = torch.nn.BatchNorm2d(5)
    with torch.no_grad():
        for value in own.state_dict().values():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    torchs.load_state_dict(own.state_dict())
    for module in (own, torchs):
        module.eval().requires_grad_(False)
    answers = []
    for module in (own, torchs):
        shown = x.clone().requires_grad_(True)
        answer = module(shown)
        answers += [answer.detach(), torch.autograd.grad(answer.square().sum(), shown)[0]]
    torch.testing.assert_close(answers[:2], answers[2:])
    assert all(torch.equal(own.state_dict()[name], value) for name, value in torchs.state_dict().items())


def test_importing_leaves_warnings_on():
    """torchxrayvision silences all of them when it is imported first."""
    code = "import warnings; from lib import models; warnings.warn('still heard')"
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "still heard" in done.stderr


def test_color_only_sees_color_and_nothing_else():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    colored = rng.integers(90, 110, (60, 8, 8, 3)) + 60 * labels[:, None, None, None] * np.array([1, 0, 0])
    answer = models.fit_color_only(colored, labels)
    assert ((answer(colored) > 0) == labels).all()
    shuffled = colored.reshape(60, 64, 3)[:, rng.permutation(64)].reshape(colored.shape)
    assert np.allclose(answer(shuffled), answer(colored))
    assert (models.always_malignant(colored) > 0).all()
