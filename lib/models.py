"""The classifiers: DenseNet-121 on pixels in [0, 1], its starting weights, saving and loading, and two without a network."""

import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torchvision
from torch import nn

from lib import runs

with warnings.catch_warnings():  # importing it silences every warning of the process
    import torchxrayvision as xrv

XRV_RANGE = 1024.0  # TorchXRayVision's networks take pixels in [-1024, 1024]
XRV_WEIGHTS = tuple(name for name in xrv.models.model_urls if name.startswith("densenet121"))
XRV_CACHE = Path("~/.torchxrayvision/models_data")
# What a TorchXRayVision file may hold beside tensors; unpickling anything else could run code.
XRV_CLASSES = [
    xrv.models.DenseNet,
    xrv.models._DenseLayer,
    xrv.models._DenseBlock,
    xrv.models._Transition,
    nn.Sequential,
    nn.BatchNorm2d,
    nn.MaxPool2d,
    nn.ReLU,
    nn.Linear,
    nn.Conv2d,
    nn.AvgPool2d,
]


class BatchNorm(nn.BatchNorm2d):
    """torch's batch norm; with frozen weights in eval mode one multiply-add, whose backward pass sums nothing up."""

    def forward(self, x):
        if self.training or self.weight.requires_grad or x.dtype != torch.float32:
            return super().forward(x)
        scale = self.weight / (self.running_var + self.eps).sqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


class PixelDenseNet(nn.Module):
    """DenseNet-121 (Huang et al. 2017) that takes RGB pixels: float32 (N, 3, H, W) in [0, 1] to logits (N, 2), benign first.

    Scaling to the range of TorchXRayVision's networks happens inside, so attacks and pictures speak pixels.
    H and W are at least 32.
    """

    def __init__(self):
        super().__init__()
        self.network = torchvision.models.densenet121(num_classes=2)
        # With torch's 0.1 the running statistics of a short training still hold their start: after fifty small batches
        # validation lay at chance where training was nearly done.
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.3
                module.__class__ = BatchNorm

    def forward(self, images):
        return self.network((2 * images - 1) * XRV_RANGE)


def build(pretrained="none", weights_dir="", seed=0):
    """A DenseNet-121 with new classifier, in eval mode, on the CPU.

    pretrained: "none", one of XRV_WEIGHTS (chest X-rays; downloaded to `weights_dir`, by default TorchXRayVision's own
    cache), or the path of a checkpoint written by `save`. The random parts depend on `seed` only.
    Raises ValueError for an unknown name or a file that does not fit, ConnectionError where a download fails.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PixelDenseNet()
    if pretrained in XRV_WEIGHTS:
        state = _expand_to_rgb(_load_xrv(pretrained, weights_dir).state_dict())
        own = model.network.state_dict()
        state = {
            name: value for name, value in state.items() if name in own and not name.startswith("classifier.")
        }
        left_over = [name for name in own if name not in state and not name.startswith("classifier.")]
        if left_over:
            raise ValueError(
                f"The weights {pretrained!r} lack {len(left_over)} layers, {left_over[0]} first: not a DenseNet-121."
            )
        model.network.load_state_dict(state, strict=False)
    elif str(pretrained).endswith(".safetensors"):
        model = load(pretrained)
    elif pretrained != "none":
        raise ValueError(
            f"Unknown starting weights {pretrained!r}: use 'none', one of {', '.join(XRV_WEIGHTS)}, or the path of a .safetensors file."
        )
    return model.eval()


def untouched(model, seed=0):
    """The layers that still hold the random start of `build("none", seed=seed)`: what starting weights did not reach."""
    fresh = build("none", seed=seed).state_dict()
    return [
        name.removesuffix(".weight")
        for name, value in model.state_dict().items()
        if name.endswith(".weight") and torch.equal(value, fresh[name])
    ]


def _expand_to_rgb(state):
    """The first convolution for three channels: its response to a gray image stays what it was."""
    first = state["features.conv0.weight"]
    return state | {"features.conv0.weight": first.repeat(1, 3, 1, 1) / 3}


def _load_xrv(name, weights_dir=""):
    """The whole model that TorchXRayVision stores under this name, read without running code from the file."""
    url = xrv.models.model_urls[name]["weights_url"]
    folder = Path(weights_dir or XRV_CACHE).expanduser()
    path = folder / os.path.basename(url)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            runs.download(url, path, f"downloading {name}")
        except ConnectionError as error:
            raise ConnectionError(
                f"{error}. Offline? Put the file {path.name} into {folder}, name its folder in weights_dir, or start from pretrained: none."
            ) from error
    try:
        # torch does not look at the checksums in the file.
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"{part} is not as it was written")
        with torch.serialization.safe_globals(XRV_CLASSES):
            model = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for damaged and for unsafe files
        raise ValueError(
            f"{path} is damaged or holds something other than a TorchXRayVision DenseNet: {error}. Delete it to download it anew."
        ) from error
    if not isinstance(model, xrv.models.DenseNet):
        raise ValueError(
            f"{path} holds a {type(model).__name__}, not a TorchXRayVision DenseNet: delete it to download it anew."
        )
    if broken := _not_finite(model.state_dict()):
        raise ValueError(
            f"{path} holds values that are not finite numbers, in {broken[0]} first: delete it to download it anew."
        )
    return model


def save(model, path, made):
    """Write the weights as safetensors and, beside them, `made` (how they were made) as JSON. Whole or not at all."""
    content = safetensors.torch.save({name: value.contiguous() for name, value in model.state_dict().items()})
    with runs.whole_file(path) as part:
        part.write_bytes(content)
    runs.write_recipe(path, made)


def copy(path, other):
    """Make `other` the same checkpoint as `path`, the record of how it was made included. Nothing where they are one."""
    if path != other:
        for kept, copied in (
            (file, other.with_suffix(file.suffix)) for file in (path, path.with_suffix(".json"))
        ):
            with runs.whole_file(copied) as part:
                part.write_bytes(kept.read_bytes())


def load(path):
    """The model of a checkpoint written by `save`, in eval mode. Raises FileNotFoundError, or ValueError where it does not fit."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No checkpoint {path}: train it, or give the path of a .safetensors file.")
    if runs.is_damaged(path):
        raise ValueError(
            f"{path} is damaged, it is not as it was written: train it anew, or copy it again with the .json beside it."
        )
    try:
        state = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): train it anew or copy it again.") from error
    if broken := _not_finite(state):
        raise ValueError(
            f"{path} holds values that are not finite numbers, in {broken[0]} first: train it anew."
        )
    model = PixelDenseNet()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit: a DenseNet-121 with two outputs is needed. {str(error).splitlines()[1].strip()}"
        ) from error
    return model.eval()


def _not_finite(state):
    """The names of the tensors of a checkpoint that hold NaN or infinities."""
    return [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]


def color_features(pixels):
    """float64 (n, 6): mean and standard deviation of R, G, B of uint8 or float images (n, H, W, 3) in one value range."""
    return np.stack(
        [
            np.concatenate([image.mean((0, 1)), image.std((0, 1))])
            for image in (np.asarray(p, np.float64) for p in pixels)
        ]
    )


def fit_color_only(pixels, labels):
    """The color_only model: an SVM on six numbers an image. What it reaches needs no network.

    Returns a function from images (n, H, W, 3) to margins (n,), malignant where positive.
    """
    # Here, since most notebooks need none of it and importing it takes a second.
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    classifier = make_pipeline(StandardScaler(), SVC(class_weight="balanced")).fit(
        color_features(pixels), labels
    )
    return lambda images: classifier.decision_function(color_features(images))


def always_malignant(images):
    """The model that answers malignant whatever it is shown: margins (n,) of one."""
    return np.ones(len(images))
