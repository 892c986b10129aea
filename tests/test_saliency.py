import pytest
import torch
from torch.nn.functional import interpolate, relu

from lib import models, saliency


@pytest.fixture(scope="module")
def model():
    return models.build("none", seed=0)


@pytest.fixture(scope="module")
def batch():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_grad_cam_is_the_class_activation_map(model, batch):
    """Where the features are averaged and weighted by one layer, Grad-CAM has a closed form (Zhou et al. 2016)."""
    with torch.no_grad():
        features = relu(model.network.features((2 * batch - 1) * models.XRV_RANGE))
        decided = model(batch).argmax(1)
        rows = model.network.classifier.weight
        weights = rows[decided] - rows[1 - decided]
        expected = relu((weights[:, :, None, None] * features).sum(1, keepdim=True)) / features[0, 0].numel()
    expected = interpolate(expected, (64, 64), mode="bilinear").squeeze(1)
    found = saliency.grad_cam(model, batch)
    assert found.shape == (3, 64, 64) and found.max() > 0
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * expected.max().item())


def test_the_input_gradient_is_the_slope_of_the_lead():
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2))
    images = torch.rand(2, 3, 8, 8)
    weight = linear[1].weight
    expected = (weight[1] - weight[0]).abs().reshape(3, 8, 8).amax(0)
    found = saliency.input_gradient(linear, images)
    assert torch.allclose(found, expected.detach().expand(2, 8, 8), atol=1e-6)


@pytest.mark.parametrize("method", saliency.METHODS.values(), ids=list(saliency.METHODS))
def test_looking_changes_nothing(model, batch, method):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = batch.clone()
    method(model, batch)
    assert torch.equal(batch, given) and not batch.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.network.features._forward_hooks
