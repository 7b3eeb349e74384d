"""Networks; each file reads top to bottom."""

from npdrt.models.bert import BERT
from npdrt.models.mlp import MLP
from npdrt.models.mnist_resnet import MNISTResNet
from npdrt.models.resnet import ResNet18, ResNet50
from npdrt.models.skipnet import SkipNet
from npdrt.models.transformer import Transformer

MODELS = {
    "mlp": MLP,
    "resnet18": ResNet18,
    "resnet50": ResNet50,
    "mnist-resnet": MNISTResNet,
    "skipnet": SkipNet,
    "transformer": Transformer,
    "bert": BERT,
}

__all__ = [
    "BERT",
    "MLP",
    "MODELS",
    "MNISTResNet",
    "ResNet18",
    "ResNet50",
    "SkipNet",
    "Transformer",
]
