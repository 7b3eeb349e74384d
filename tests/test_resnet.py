"""Models of images: counts, names, and values, gradients and statistics beside PyTorch."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import backends
import numpy as np
import pytest
from test_program import check

from npdrt import Error, check_gradients, ops, optim, record, value_and_grad
from npdrt.models import MNISTResNet, ResNet18, ResNet50, SkipNet
from npdrt.models.layers import unit_map
from npdrt.random import Random
from npdrt.train.step import State, Task, make_step

SMALL = (3, 8, 8)  # of ResNet-18: its last stage sees one pixel
KINDS = {
    "pre-activation": ResNet18(width=4, image_shape=SMALL),
    "pre-activation, modified": ResNet18(width=4, image_shape=SMALL, shortcut="modified"),
    "post-activation": ResNet18(width=4, image_shape=SMALL, pre_activation=False),
    "post-activation, modified": ResNet18(
        width=4, image_shape=SMALL, pre_activation=False, shortcut="modified"
    ),
    "bottleneck": ResNet50(width=4, image_shape=(3, 32, 32), outputs=7),
    "bottleneck, modified": ResNet50(
        width=4, image_shape=(3, 64, 64), outputs=7, shortcut="modified"
    ),
    "chain": MNISTResNet(variant="chain"),
    "residual": MNISTResNet(variant="residual"),
    "modified": MNISTResNet(variant="modified"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def count(model: Any) -> int:
    """The parameters of a model, from their shapes."""
    return sum(math.prod(shape) for shape in model.shapes().values())


def batch(model: Any, examples: int = 6, dtype: str = "float64") -> tuple[Any, Any]:
    """Normal images and labels."""
    x = Random(0, "images").normal((examples, *model.image_shape)).astype(dtype)
    return x, (Random(0, "labels").words(examples) % model.outputs).astype(np.int64)


def start(model: Any, dtype: str = "float64") -> tuple[Any, Any]:
    """Parameters, with gains and biases that are not 1 and 0, and buffers likewise."""
    params, buffers = model.init(seed=1, dtype=dtype), model.buffers(seed=1, dtype=dtype)
    for name, value in {**params, **buffers}.items():
        if value.ndim == 1:
            moved = Random(2, name).uniform(value.shape, 0.5, 1.5).astype(dtype)
            into = buffers if name in buffers else params
            into[name] = moved if name.endswith(("weight", "var")) else moved - dtype_one(dtype)
    return params, buffers


def dtype_one(dtype: str) -> Any:
    return np.ones((), dtype)


# --- names and counts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (ResNet18(), 11_171_146),
        (ResNet18(outputs=100), 11_217_316),
        (ResNet18(shortcut="modified"), 11_171_146),
        (ResNet18(pre_activation=False), 11_173_962),
        (ResNet50(), 25_557_032),
        (ResNet50(shortcut="modified"), 25_557_032),
        *((MNISTResNet(variant=variant), 9_970) for variant in ("chain", "residual", "modified")),
    ],
    ids=str,
)
def test_parameter_counts(model: Any, expected: int) -> None:
    assert count(model) == expected


def test_names_and_order() -> None:
    names = list(ResNet18().shapes())
    assert names[:9] == [
        "stem/weight",
        "stages/00/blocks/00/norm1/weight",
        "stages/00/blocks/00/norm1/bias",
        "stages/00/blocks/00/conv1/weight",
        "stages/00/blocks/00/norm2/weight",
        "stages/00/blocks/00/norm2/bias",
        "stages/00/blocks/00/conv2/weight",
        "stages/00/blocks/01/norm1/weight",
        "stages/00/blocks/01/norm1/bias",
    ]
    assert names[-2:] == ["linear/weight", "linear/bias"]
    shortcuts = [name for name in names if "shortcut" in name]
    assert shortcuts == [f"stages/0{s}/blocks/00/shortcut/weight" for s in (1, 2, 3)]
    assert list(ResNet18(pre_activation=False).shapes())[:3] == [
        "stem/weight",
        "norm/weight",
        "norm/bias",
    ]
    assert list(ResNet18().buffers())[:2] == [
        "stages/00/blocks/00/norm1/running_mean",
        "stages/00/blocks/00/norm1/running_var",
    ]


@kinds
def test_init_makes_the_shapes(kind: str) -> None:
    model = KINDS[kind]
    params, buffers = model.init(seed=0), model.buffers(seed=0)
    assert {name: value.shape for name, value in params.items()} == model.shapes()
    assert list(params) == list(model.shapes())
    assert {str(v.dtype) for v in (*params.values(), *buffers.values())} == {"float32"}
    again = model.init(seed=0)
    assert all(np.array_equal(again[name], params[name]) for name in params)


def test_the_authors_initialisation_is_pytorchs() -> None:
    """Kernels and biases uniform within 1 / sqrt(fan-in), norms 1 and 0."""
    params = ResNet18().init(seed=0)
    for name, value in params.items():
        if value.ndim == 1 and name != "linear/bias":
            assert (value == (1.0 if name.endswith("weight") else 0.0)).all()
            continue
        fan_in = math.prod(params[name.replace("bias", "weight")].shape[1:])
        assert np.abs(value).max() <= 1 / math.sqrt(fan_in)
        assert np.std(value) == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.2)


def test_variants_share_their_first_weights() -> None:
    first = [MNISTResNet(variant=v).init(seed=3) for v in ("chain", "residual", "modified")]
    first += [ResNet18(shortcut=s, width=4).init(seed=3) for s in ("convolution", "modified")]
    for a, b in ((first[0], first[1]), (first[0], first[2]), (first[3], first[4])):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_he_initialisation() -> None:
    weight = ResNet18(init="he").init(seed=0)["stages/03/blocks/01/conv2/weight"]
    assert np.std(weight) == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet18(shortcut="none"), "unknown shortcut 'none'; use one of convolution, mod"),
        (lambda: MNISTResNet(variant="a"), "unknown variant 'a'; use one of chain, residual, mod"),
        (lambda: MNISTResNet(image_shape=(1, 32, 32)), r"images of \(1, 28, 28\); got \(1, 32, 32"),
        (lambda: ResNet18(image_shape=(3, 32)), r"expected image_shape .* got \(3, 32\) and 10"),
        (lambda: ResNet18(width=0), "ResNet18: width must be at least 1; got 0"),
        (lambda: ResNet50(width=-3), "ResNet50: width must be at least 1; got -3"),
        (lambda: ResNet18(init="hee"), "unknown initialisation 'hee'"),
        (lambda: SkipNet(inputs=4, outputs=3, width=2), "expected widths d_0"),
        (lambda: SkipNet(inputs=4, outputs=3, hidden=0), "hidden must be at least 1; got 0"),
    ],
)
def test_fields_that_do_not_fit(make: Any, message: str) -> None:
    with pytest.raises(Error, match=message):
        make()


def test_inputs_and_buffers_that_do_not_fit() -> None:
    model = KINDS["pre-activation"]
    params, buffers = start(model)
    with pytest.raises(Error, match=r"expected images \(N, 3, height, width\), or rows of"):
        model(params, np.zeros((2, 5)), buffers=buffers)
    with pytest.raises(Error, match=r"needs the buffer stages/00/blocks/00/norm1/running_mean"):
        model(params, np.zeros((2, 3, 8, 8)))


@kinds
def test_a_model_is_a_plain_dataclass(kind: str) -> None:
    model = KINDS[kind]
    assert pickle.loads(pickle.dumps(model)) == copy.deepcopy(model) == model
    assert dataclasses.replace(model, outputs=3).outputs == 3


# --- beside PyTorch --------------------------------------------------------------------------


def torch_unit(torch: Any, x: Any, channels: int, stride: int, before: int) -> Any:
    pooled = stride * torch.nn.functional.avg_pool2d(x, stride)
    after = channels - x.shape[1] - before
    return torch.nn.functional.pad(pooled, (0, 0, 0, 0, before, after))


def torch_twin(torch: Any, model: Any) -> Any:
    """The model in PyTorch, written from the papers: modules in the order of our parameters."""
    nn, relu = torch.nn, torch.relu
    modified = getattr(model, "shortcut", "") == "modified"

    def conv(a: int, b: int, size: int, stride: int = 1, padding: int = 0, bias: bool = False):  # type: ignore[no-untyped-def]
        return nn.Conv2d(a, b, size, stride, padding, bias=bias)

    class Short(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, a: int, b: int, stride: int, norm: bool):
            super().__init__()
            self.conv, self.stride, self.b = conv(a, b, 1, stride), stride, b
            self.norm = nn.BatchNorm2d(b) if norm else nn.Identity()

        def forward(self, x: Any) -> Any:
            y = self.norm(self.conv(x))
            if modified:
                before = math.ceil((self.b - x.shape[1]) / 2)
                y = y + torch_unit(torch, x, self.b, self.stride, before)
            return y

    class Pre(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, a: int, b: int, stride: int):
            super().__init__()
            self.n1, self.c1 = nn.BatchNorm2d(a), conv(a, b, 3, stride, 1)
            self.n2, self.c2 = nn.BatchNorm2d(b), conv(b, b, 3, 1, 1)
            self.short = Short(a, b, stride, False) if stride > 1 or a != b else None

        def forward(self, x: Any) -> Any:
            a = relu(self.n1(x))
            skip = x if self.short is None else self.short(a)
            return self.c2(relu(self.n2(self.c1(a)))) + skip

    class Post(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, a: int, b: int, stride: int):
            super().__init__()
            self.c1, self.n1 = conv(a, b, 3, stride, 1), nn.BatchNorm2d(b)
            self.c2, self.n2 = conv(b, b, 3, 1, 1), nn.BatchNorm2d(b)
            self.short = Short(a, b, stride, True) if stride > 1 or a != b else nn.Identity()

        def forward(self, x: Any) -> Any:
            return relu(self.n2(self.c2(relu(self.n1(self.c1(x))))) + self.short(x))

    class Bottle(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, a: int, b: int, stride: int):
            super().__init__()
            self.c1, self.n1 = conv(a, b, 1), nn.BatchNorm2d(b)
            self.c2, self.n2 = conv(b, b, 3, stride, 1), nn.BatchNorm2d(b)
            self.c3, self.n3 = conv(b, 4 * b, 1), nn.BatchNorm2d(4 * b)
            wide = stride > 1 or a != 4 * b
            self.short = Short(a, 4 * b, stride, True) if wide else nn.Identity()

        def forward(self, x: Any) -> Any:
            h = relu(self.n2(self.c2(relu(self.n1(self.c1(x))))))
            return relu(self.n3(self.c3(h)) + self.short(x))

    def stages(block: Any, sizes: list[int], growth: int) -> list[Any]:
        made, a, w = [], model.width, model.width
        for s, blocks in enumerate(sizes):
            for b in range(blocks):
                made.append(block(a, w * 2**s, 2 if s and not b else 1))
                a = w * 2**s * growth
        return made

    class Mnist(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.stem = conv(1, 5, 5, bias=True)
            self.n11, self.c11 = nn.BatchNorm2d(5), conv(5, 5, 5, 1, 2, True)
            self.n12, self.c12 = nn.BatchNorm2d(5), conv(5, 5, 5, 1, 2, True)
            self.n21, self.c21 = nn.BatchNorm2d(5), conv(5, 20, 3, 2, 1, True)
            self.n22, self.c22 = nn.BatchNorm2d(20), conv(20, 20, 3, 1, 0, True)
            self.short = conv(5, 20, 1, 3, 0, True)
            self.n, self.linear = nn.BatchNorm1d(320), nn.Linear(320, model.outputs)

        def forward(self, x: Any) -> Any:
            x = nn.functional.avg_pool2d(self.stem(x), 2)
            h = self.c12(relu(self.n12(self.c11(relu(self.n11(x))))))
            h = h if model.variant == "chain" else h + x
            a = relu(self.n21(h))
            h = self.c22(relu(self.n22(self.c21(a))))
            if model.variant != "chain":
                h = h + self.short(a)
            if model.variant == "modified":
                h = h + torch_unit(torch, a, 20, 3, 7)
            return self.linear(relu(self.n(h.flatten(1))))

    class Mean(nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, x: Any) -> Any:
            return x.mean((2, 3))

    channels = model.image_shape[0]
    if isinstance(model, MNISTResNet):
        return Mnist()
    if isinstance(model, ResNet50):
        stem = [conv(channels, model.width, 7, 2, 3), nn.BatchNorm2d(model.width), nn.ReLU()]
        inner = [nn.MaxPool2d(3, 2, 1), *stages(Bottle, [3, 4, 6, 3], 4)]
        return nn.Sequential(*stem, *inner, Mean(), nn.Linear(32 * model.width, model.outputs))
    stem = [conv(channels, model.width, 3, 1, 1)]
    if not model.pre_activation:
        stem += [nn.BatchNorm2d(model.width), nn.ReLU()]
    inner = stages(Pre if model.pre_activation else Post, [2] * 4, 1)
    return nn.Sequential(*stem, *inner, Mean(), nn.Linear(8 * model.width, model.outputs))


def assert_same(found: Any, expected: Any, limit: float) -> None:
    """Within `limit` of the largest element over all arrays."""
    assert list(found) == list(expected)
    largest = max(np.abs(v).max() for v in expected.values())
    errors = {name: np.abs(found[name] - v).max() / largest for name, v in expected.items()}
    assert max(errors.values()) <= limit, max(errors, key=lambda name: errors[name])


def both(torch: Any, model: Any, train: bool, dtype: str, examples: int = 6) -> Any:
    """`(logits, gradients, buffers)` of npdrt and of PyTorch, from the same parameters."""
    params, buffers = start(model, dtype)
    x, y = batch(model, examples, dtype)
    twin = torch_twin(torch, model).to(getattr(torch, dtype)).train(train)
    with torch.no_grad():
        for theirs, ours in zip(twin.parameters(), params.values(), strict=True):
            theirs.copy_(torch.from_numpy(ours))
        stored = [b for b in twin.buffers() if b.ndim]
        for theirs, ours in zip(stored, buffers.values(), strict=True):
            theirs.copy_(torch.from_numpy(ours))
    logits = twin(torch.from_numpy(x))
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(y)).backward()
    grads = {
        name: p.grad.numpy() if p.grad is not None else np.zeros(p.shape)
        for name, p in zip(params, twin.parameters(), strict=True)
    }
    left = {name: b.numpy() for name, b in zip(buffers, stored, strict=True)}
    theirs = ({"logits": logits.detach().numpy()}, grads, left)

    def loss(p: Any) -> Any:
        found, after = model.apply(p, buffers, x, train=train)
        return ops.softmax_cross_entropy(found, y), (found, after)

    (_, (found, after)), ours = value_and_grad(loss, has_aux=True)(params)
    return ({"logits": found}, ours, after), theirs


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@kinds
def test_equals_pytorch(kind: str, train: bool) -> None:
    torch = pytest.importorskip("torch")
    ours, theirs = both(torch, KINDS[kind], train, "float64")
    for found, expected, limit in zip(ours, theirs, (1e-9, 1e-9, 1e-12), strict=True):
        assert_same(found, expected, limit)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_equals_pytorch_at_its_full_size(train: bool) -> None:
    """ResNet-18 of the authors on images of 32x32, in float64."""
    torch = pytest.importorskip("torch")
    ours, theirs = both(torch, ResNet18(), train, "float64", examples=4)
    for found, expected, limit in zip(ours, theirs, (1e-9, 1e-9, 1e-12), strict=True):
        assert_same(found, expected, limit)


@pytest.mark.parametrize("kind", ["pre-activation", "modified"])
def test_is_close_to_pytorch_in_single_precision(kind: str) -> None:
    torch = pytest.importorskip("torch")
    ours, theirs = both(torch, KINDS[kind], True, "float32")
    for found, expected, limit in zip(ours, theirs, (1e-3, 1e-2, 1e-4), strict=True):
        assert_same(found, expected, limit)


@pytest.mark.parametrize("kind", ["pre-activation, modified", "bottleneck", "modified"])
def test_every_backend(kind: str, backend: backends.Backend) -> None:
    """Loss, gradients and running statistics of one step in training mode."""
    model = KINDS[kind]
    params, buffers = start(model)
    x, y = batch(model, 3)

    def loss(p: Any, b: Any, x: Any, y: Any) -> Any:
        found, after = model.apply(p, b, x, train=True)
        return ops.softmax_cross_entropy(found, y), after

    step = value_and_grad(loss, has_aux=True)
    (_, after), grads = step(params, buffers, x, y)
    on_it = ({n: backend.asarray(a) for n, a in d.items()} for d in (params, buffers))
    (_, moved), found = step(*on_it, backend.asarray(x), backend.asarray(y))
    for ours, theirs in ((found, grads), (moved, after)):
        assert_same({name: backend.to_host(v) for name, v in ours.items()}, theirs, 1e-9)


# --- modes, rows, programs -------------------------------------------------------------------


@kinds
def test_modes_and_rows(kind: str) -> None:
    """Evaluation mode leaves the buffers; rows are images; labels come through `Task`."""
    model = KINDS[kind]
    params, buffers = start(model)
    x, _ = batch(model)
    logits, kept = model.apply(params, buffers, x)
    assert all(kept[name] is buffers[name] for name in buffers)
    rows = x.reshape(len(x), -1)
    np.testing.assert_array_equal(model(params, rows, buffers=buffers), logits)
    np.testing.assert_array_equal(
        Task(model, model.outputs).predict(params, buffers, x, None), logits
    )
    trained, moved = model.apply(params, buffers, x, train=True)
    assert list(moved) == list(buffers)
    assert all((moved[name] != buffers[name]).any() for name in buffers)
    assert np.abs(trained - logits).max() > 1e-3


@pytest.mark.parametrize("kind", ["pre-activation", "post-activation, modified", "modified"])
def test_gradients_equal_differences(kind: str) -> None:
    """Central differences in random directions through the whole net in training mode."""
    model = KINDS[kind]
    params, buffers = start(model)
    x, y = batch(model)

    def loss(p: Any) -> Any:
        return ops.softmax_cross_entropy(model.apply(p, buffers, x, train=True)[0], y)

    assert check_gradients(loss, params, directions=2, tolerance=1e-5).error < 1e-5


@kinds
def test_a_step_can_be_recorded(kind: str) -> None:
    """A training step replays to the bits of the eager one, running statistics included."""
    model, opt = KINDS[kind], optim.fromage(lr=0.01, norm_bound=1.0)
    params, buffers = model.init(seed=1), model.buffers(seed=1)
    state = State(params, buffers, opt.init(params))
    step = make_step(Task(model, model.outputs), opt)
    args = (state, *batch(model, dtype="float32"), 0.01, Random(0, "train", 0))
    check(step, *args)
    program = record(step, *args)
    for _ in range(2):
        args = (program(*args).state, *args[1:])
    eager = step(step(state, *args[1:]).state, *args[1:])
    left = (args[0].params, args[0].buffers)
    for found, expected in zip(left, (eager.state.params, eager.state.buffers), strict=True):
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


# --- the unit map ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "size", "stride", "to", "before", "ones"),
    [(2, 8, 2, 4, 1, 32), (5, 12, 3, 20, 7, 80), (2, 3, 1, 8, 3, 18), (3, 4, 2, 4, 1, 12)],
)
def test_the_unit_map_is_a_partial_isometry(
    channels: int, size: int, stride: int, to: int, before: int, ones: int
) -> None:
    """Singular values 1 for every pooled number, 0 for every channel of zeros."""
    inputs = channels * size * size
    basis = np.eye(inputs).reshape(inputs, channels, size, size).transpose(1, 0, 2, 3)
    found = unit_map(basis, channels=to, stride=stride, before=before)
    matrix = found.transpose(0, 2, 3, 1).reshape(-1, inputs)
    values = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(values[:ones], 1, rtol=1e-12)
    np.testing.assert_allclose(values[ones:], 0, atol=1e-12)
    filled = np.flatnonzero(np.abs(found).sum((1, 2, 3)))
    np.testing.assert_array_equal(filled, np.arange(before, before + channels))


# --- the network of Theorem 5.1 --------------------------------------------------------------


def test_skipnet_is_its_formula() -> None:
    model = SkipNet(inputs=5, outputs=3, depth=3, width=4, hidden=6, eps=0.2, delta=0.3)
    params = model.init(seed=0, dtype="float64")
    assert {name: p.shape for name, p in params.items()} == {
        "layers/00/weight": (4, 5),
        "layers/01/outer": (4, 6),
        "layers/01/inner": (6, 4),
        "layers/01/bias": (6, 1),
        "layers/02/outer": (3, 6),
        "layers/02/inner": (6, 4),
        "layers/02/bias": (6, 1),
    }
    x = Random(0, "x").normal((4, 5))

    def wn(w: Any) -> Any:
        return w / np.sqrt(0.2 + (w * w).sum(1, keepdims=True))

    w = params["layers/00/weight"]
    z = w / np.sqrt(0.2 + w * w) @ x.T
    for layer, rows in (("01", 4), ("02", 3)):
        u, v, c = (params[f"layers/{layer}/{name}"] for name in ("outer", "inner", "bias"))
        z = z[:rows] + 0.7 / math.sqrt(rows * 6) * wn(u) @ np.tanh(wn(v) @ z + c)
    np.testing.assert_allclose(model(params, x), z.T, rtol=1e-13)


def test_skipnet_meets_its_bound() -> None:
    """Theorem 4.7 on the model's own parameters: lambda(DF) is above its bound, and above 0."""
    model = SkipNet(inputs=5, outputs=3, depth=3, width=4, hidden=6)
    params, x = model.init(seed=2, dtype="float64"), Random(0, "x").normal((4, 5))
    found = model.net.bound(model.net.system.at(model.thetas(params), x.T))
    assert found.guaranteed
    assert found.lhs <= found.rhs
    assert found.lhs > 0
    check_gradients(
        lambda p: ops.softmax_cross_entropy(model(p, x), np.arange(4) % 3), params, method="complex"
    )


def test_the_modified_shortcut_needs_sizes_that_halve() -> None:
    """A convolution of stride 2 rounds an odd size up, an average pool down."""
    model = ResNet18(width=2, image_shape=(1, 7, 7), shortcut="modified")
    with pytest.raises(Error, match="expected a height and a width that 2 divides; got 7 and 7"):
        model(model.init(seed=0), np.zeros((2, 1, 7, 7), np.float32), buffers=model.buffers(seed=0))
