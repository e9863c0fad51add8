"""Small networks: the paper's (arXiv 2406.01345, Appendix C) and LeCun's in the sizes that pruning is compared on."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from bmrs.checks import check_integer
from bmrs.models.arguments import check_image
from bmrs.noise.activations import ACTIVATION_LAYERS
from bmrs.noise.layer import NoiseLayer
from bmrs_kernels.options import Activation, Backend, Granularity


class MLP(nn.Sequential):
    """Perceptron with tanh and noise after every hidden layer (Appendix C.1).

    A first layer in_features → hidden, ``num_blocks`` further layers hidden → hidden, then hidden →
    num_classes. Inputs of any shape (N, ...) with in_features elements an example are flattened.

    Args:
        in_features: elements of one example.
        num_blocks: hidden layers after the first one.
        hidden: width of every hidden layer.
        num_classes: number of outputs (logits).
        noise: False gives the dense network, with the same initial weights for the same
            ``torch.manual_seed``.
        granularity: see `bmrs.NoiseLayer`.
        backend: see `bmrs.NoiseLayer`.
    """

    def __init__(
        self,
        *,
        in_features: int,
        num_blocks: int,
        hidden: int,
        num_classes: int = 10,
        noise: bool = True,
        granularity: Granularity = "element",
        backend: Backend = "auto",
    ) -> None:
        check_integer("num_blocks", num_blocks, minimum=0)
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        width = in_features
        for i in range(num_blocks + 1):
            layers[f"hidden{i}"] = nn.Linear(width, hidden)
            layers[f"hidden{i}_tanh"] = _activation("tanh", hidden, noise, granularity, backend)
            width = hidden
        layers["classes"] = nn.Linear(width, num_classes)
        super().__init__(layers)


class LeNet5(nn.Sequential):
    """LeNet-5 for images of shape (N, c, 32, 32), with noise after every ReLU (Appendix C.2).

    6·c and 16·c filters of 5×5, each with ReLU, noise and 2×2 max pooling, then linear layers of 120·c and
    84·c units, each with ReLU and noise.

    Args:
        in_channels: c, the channels of the images.
        num_classes: number of outputs (logits).
        noise: False gives the dense network, with the same initial weights for the same
            ``torch.manual_seed``.
        granularity: see `bmrs.NoiseLayer`.
        backend: see `bmrs.NoiseLayer`.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        num_classes: int = 10,
        noise: bool = True,
        granularity: Granularity = "element",
        backend: Backend = "auto",
    ) -> None:
        def relu(num_structures: int) -> nn.Module:
            return _activation("relu", num_structures, noise, granularity, backend)

        c = in_channels
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(c, 6 * c, 5),
                conv1_relu=relu(6 * c),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(6 * c, 16 * c, 5),
                conv2_relu=relu(16 * c),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                hidden1=nn.Linear(16 * c * 5 * 5, 120 * c),
                hidden1_relu=relu(120 * c),
                hidden2=nn.Linear(120 * c, 84 * c),
                hidden2_relu=relu(84 * c),
                classes=nn.Linear(84 * c, num_classes),
            )
        )


def mlp(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 32,
    num_blocks: int = 7,
    hidden: int = 100,
) -> MLP:
    """Return the paper's perceptron without noise, see `MLP`, for images of shape (N, in_channels, image_size²)."""
    check_image(num_classes, in_channels, image_size)
    return MLP(
        in_features=in_channels * image_size**2,
        num_blocks=num_blocks,
        hidden=hidden,
        num_classes=num_classes,
        noise=False,
    )


def lenet5(*, num_classes: int = 10, in_channels: int = 1, image_size: int = 32) -> LeNet5:
    """Return the paper's LeNet-5 without noise, see `LeNet5`; raise ValueError unless images are 32×32."""
    check_image(num_classes, in_channels, image_size)
    if image_size != 32:
        raise ValueError(
            f"image_size of lenet5 must be 32, got {image_size}: pad the images, or take lenet5_caffe for 28"
        )
    return LeNet5(in_channels=in_channels, num_classes=num_classes, noise=False)


def lenet5_caffe(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 28,
    widths: tuple[int, int, int] = (20, 50, 500),
) -> nn.Sequential:
    """Return LeNet-5 in the widths of Caffe's example, 20-50-800-500: 431,080 parameters for 28×28 images.

    Two 5×5 convolutions without padding, each with ReLU and 2×2 max pooling, and a hidden layer with ReLU. Caffe's own
    file has the last ReLU alone; papers on pruning have all three.

    Args:
        num_classes: number of outputs (logits).
        in_channels: channels of the images.
        image_size: their height and width in pixels, 16 or more.
        widths: filters of both convolutions, and units of the hidden layer.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is too small.
    """
    check_image(num_classes, in_channels, image_size, minimum=16)
    first, second, hidden = widths
    side = ((image_size - 4) // 2 - 4) // 2
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(in_channels, first, 5),
            conv1_relu=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(first, second, 5),
            conv2_relu=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            hidden=nn.Linear(second * side**2, hidden),
            hidden_relu=nn.ReLU(),
            classes=nn.Linear(hidden, num_classes),
        )
    )


def lenet_300_100(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 28,
    widths: tuple[int, int] = (300, 100),
) -> nn.Sequential:
    """Return LeNet-300-100 (LeCun et al. 1998) with ReLU: 266,610 parameters for 28×28 images.

    Args:
        num_classes: number of outputs (logits).
        in_channels: channels of the images.
        image_size: their height and width in pixels.
        widths: units of both hidden layers.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is less than 1.
    """
    check_image(num_classes, in_channels, image_size)
    first, second = widths
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            flatten=nn.Flatten(),
            hidden1=nn.Linear(in_channels * image_size**2, first),
            hidden1_relu=nn.ReLU(),
            hidden2=nn.Linear(first, second),
            hidden2_relu=nn.ReLU(),
            classes=nn.Linear(second, num_classes),
        )
    )


def _activation(
    activation: Activation, num_structures: int, noise: bool, granularity: Granularity, backend: Backend
) -> nn.Module:
    """Return an activation with noise fused behind it, or the bare activation: one module either way."""
    if not noise:
        return ACTIVATION_LAYERS[activation]()
    return NoiseLayer(num_structures, granularity=granularity, activation=activation, backend=backend)
