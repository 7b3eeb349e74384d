"""Networks; each file reads top to bottom. `Model` says what a model has and may have."""

from typing import Any, ClassVar, Protocol

from npdrt.arrays import Array, Device, Params
from npdrt.models.bert import BERT
from npdrt.models.gan import GAN
from npdrt.models.mlp import MLP
from npdrt.models.mnist_resnet import MNISTResNet
from npdrt.models.resnet import ResNet18, ResNet50
from npdrt.models.skipnet import SkipNet
from npdrt.models.transformer import Transformer


class Model(Protocol):
    """A model: a frozen dataclass whose fields are its settings, with `init` and `__call__`.

    The training loop fills fields of these names from the data: inputs, outputs, image_shape (it
    is then given images, (batch, channels, height, width), else rows (batch, inputs)) and
    vocabulary (it is then given integer tokens).

    A model may also have, and the training loop looks for

        apply(params, buffers, x, *, train, random) -> (output, buffers)
            the forward pass in training mode, if it is not `__call__`: dropout, batch statistics
        buffers(seed, device, dtype) -> buffers
            arrays that a step changes without a gradient; `__call__` then takes them as buffers=
        shapes() -> {name: shape}
            the parameters in definition order, for what needs no values (`npdrt explain`)
        defaults: {field: value}
            a class variable: values of fields that the dataclass leaves without a default
        generate, discriminate, noise: as `npdrt.models.GAN` has them
            the model is trained as two networks against each other, whose parameters are below
            generator/ and discriminator/
        standardise: str
            a class variable: the standardisation of data that is used unless the configuration
            names another (`npdrt.data.load`)
        first_values: str
            a class variable: the field that names a file of initial values; a run that is resumed
            does not read it, because the checkpoint has newer ones

    `npdrt.models.weights` reads and writes models that also have pytorch_names().
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # a dataclass has it

    def init(self, seed: int = 0, device: str | Device = "cpu", dtype: str = "float32") -> Params:
        """The initial parameters: a function of these arguments alone."""

    def __call__(self, params: Params, x: Array) -> Any:
        """The output in evaluation mode: logits or predicted targets (batch, ...)."""


MODELS: dict[str, type[Model]] = {
    "mlp": MLP,
    "resnet18": ResNet18,
    "resnet50": ResNet50,
    "mnist-resnet": MNISTResNet,
    "skipnet": SkipNet,
    "transformer": Transformer,
    "bert": BERT,
    "gan": GAN,
}

__all__ = [
    "BERT",
    "GAN",
    "MLP",
    "MODELS",
    "MNISTResNet",
    "Model",
    "ResNet18",
    "ResNet50",
    "SkipNet",
    "Transformer",
]
