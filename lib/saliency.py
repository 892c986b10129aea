"""Where in an image a model finds its answer: the gradient at each pixel, and Grad-CAM. Both by captum, of the answer's lead.

The lead is the logit of the class that the model answers minus that of the other.
"""

from captum.attr import LayerGradCam, Saliency
from torch import nn
from torch.nn.functional import interpolate

from lib import models


def input_gradient(model, images):
    """How much each pixel moves the answer (Simonyan et al. 2014): the largest size of the lead's gradient over the channels.

    images: float32 (n, 3, H, W) in [0, 1]; model in eval mode. Returns float32 (n, H, W), in logits for a change of 1.
    """
    return Saliency(_lead(model)).attribute(images.clone().requires_grad_()).amax(1)


def grad_cam(model, images):
    """Which parts speak for the answer (Grad-CAM, Selvaraju et al. 2017), from the last features of a `models.PixelDenseNet`.

    images: float32 (n, 3, H, W) in [0, 1]; model in eval mode. Returns float32 (n, H, W), at least 0, drawn out from one value for
    32 x 32 pixels.
    """
    # torchvision rectifies the features in place, so that a hook on them sees what they were before.
    rectified, network = nn.ReLU(), model.network
    layers = nn.Sequential(
        network.features, rectified, nn.AdaptiveAvgPool2d(1), nn.Flatten(), network.classifier
    )
    pixels = (2 * images - 1) * models.XRV_RANGE
    found = LayerGradCam(_lead(layers), rectified).attribute(pixels.requires_grad_(), relu_attributions=True)
    return interpolate(found, images.shape[2:], mode="bilinear").squeeze(1).detach()


METHODS = {"input gradient": input_gradient, "Grad-CAM": grad_cam}


def _lead(model):
    def lead(images):
        logits = model(images)
        return logits.max(1).values - logits.min(1).values

    return lead
