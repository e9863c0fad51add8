"""Networks by name, the paper's with it, those of the user's own code; places for noise; weights from files."""

from bmrs.models.factory import network_from
from bmrs.models.placement import NoisePlace, place_noise
from bmrs.models.registry import NETWORKS, Network, build_network
from bmrs.models.resnet import resnet18, resnet20, resnet50, resnet56
from bmrs.models.small import MLP, LeNet5, lenet5_caffe, lenet_300_100
from bmrs.models.vgg import vgg16_bn
from bmrs.models.vit import vit_b16, vit_small
from bmrs.models.weights import LoadedWeights, load_weights

__all__ = [
    "MLP",
    "NETWORKS",
    "LeNet5",
    "LoadedWeights",
    "Network",
    "NoisePlace",
    "build_network",
    "lenet5_caffe",
    "lenet_300_100",
    "load_weights",
    "network_from",
    "place_noise",
    "resnet18",
    "resnet20",
    "resnet50",
    "resnet56",
    "vgg16_bn",
    "vit_b16",
    "vit_small",
]
