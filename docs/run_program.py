"""Run a saved program with plain NumPy: python run_program.py PROGRAM.json INPUTS.npz OUTPUTS.npz

Inputs are named by their path in the arguments ("state/params/layers/00/weight", "x", "lr"),
random draws "draw/0", "draw/1", ...; outputs by their path in the result ("state/params/...",
"loss").
"""

import base64
import json
import sys

import numpy as np


def norm(x):
    """The 2-norm in the order of additions of docs/updates.md."""
    flat, total = x.reshape(-1).astype(np.float64), np.zeros(256)
    for start in range(0, flat.size, 65536):
        part = flat[start : start + 65536]
        rows = np.zeros((-(-part.size // 256), 256))
        rows.reshape(-1)[: part.size] = part * part
        total = total + np.add.reduce(rows, axis=0)
    while total.size > 1:
        total = total[: total.size // 2] + total[total.size // 2 :]
    return np.sqrt(total[0])


def assign(x, index, value):
    """A copy of x with x[index] replaced."""
    copy = x.copy(order="K")
    copy[index] = value
    return copy


# --- convolutions: the products, and the order of their sums, of npdrt.ops.convolution ----------


def blocks(images, size):
    """(images, rows) of every block of a convolution's output: about 1024 positions."""
    area = size[0] * size[1]
    height = -(-size[0] // max(1, round(area / 1024)))
    several = min(max(1, 1024 // area, min(8, 2048 // area)), -(-images // 2))
    several = several if area <= 512 else 1
    several = -(-images // -(-images // several))
    for n in range(0, images, several):
        for r in range(0, size[0], height):
            yield slice(n, min(n + several, images)), slice(r, min(r + height, size[0]))


def seen(x, window, images, rows):
    """What the rows of a kernel see of a block of images, (kw C, positions) each; as one where
    there are fewer than 128 taps and channels a row."""
    if x.ndim == 2:  # 1 x 1
        return [x[:, rows]]
    x, (taps, step, start, size) = x[:, images], window
    height, matrices = rows.stop - rows.start, []
    for k in range(taps[0]):
        i = (step[0] * np.arange(rows.start, rows.stop) + k + start[0])[:, None]
        parts = []
        for m in range(taps[1]):
            j = step[1] * np.arange(size[1]) + m + start[1]
            inside = (i >= 0) & (i < x.shape[2]) & (j >= 0) & (j < x.shape[3])
            near = x[:, :, np.clip(i, 0, x.shape[2] - 1), np.clip(j, 0, x.shape[3] - 1)]
            parts.append(np.where(inside, near, x.dtype.type(0)).transpose(0, 2, 3, 1))
        matrices.append(np.stack(parts).reshape(-1, height * size[1] * x.shape[1]))
    narrow = taps[0] > 1 and taps[1] * x.shape[0] < 128
    return [np.concatenate(matrices)] if narrow else matrices


def flat(x, window):
    """A 1 x 1 kernel sees one image of one column; else x, its images, and the output's size."""
    if window != ((1, 1), (1, 1), (0, 0), x.shape[2:]):
        return x, x.shape[1], window[3]
    return x.reshape(len(x), -1), 1, (x[0].size, 1)


def correlate(matrix, x, window, whole):
    """The correlation of images (C, N, H, W) with a kernel as a matrix (O, kh kw C)."""
    shape = (len(matrix), x.shape[1], *window[3])
    x, count, size = flat(x, window) if whole else (x, x.shape[1], window[3])
    y = np.empty((len(matrix), count, *size), x.dtype)
    for images, rows in blocks(count, size):
        total, parts = None, seen(x, window, images, rows)
        for a, b in zip(np.split(matrix, len(parts), axis=1), parts, strict=True):
            total = a @ b if total is None else total + a @ b
        form = (len(matrix), rows.stop - rows.start, size[1], -1)
        y[:, images, rows] = total.reshape(form).transpose(0, 3, 1, 2)
    return y.reshape(shape)


def forward(size, kernel, stride, padding):
    """Taps, step, start and size of the output of a convolution."""
    form = zip(size, kernel, stride, padding, strict=True)
    made = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in form)
    return tuple(kernel), stride, (-padding[0], -padding[1]), made


def convolve(x, weight, stride, padding, groups):
    """y[o] = sum over c, k, l of weight[o, c, k, l] x[c], shifted by k and l."""
    window = forward(x.shape[2:], weight.shape[2:], stride, padding)
    parts = zip(np.split(x, groups), np.split(weight, groups), strict=True)
    return np.concatenate(
        [correlate(w.transpose(0, 2, 3, 1).reshape(len(w), -1), a, window, True) for a, w in parts]
    )


def convolve_input(g, weight, size, stride, padding, groups):
    """Its derivative by x, for the cotangent g: a correlation with the taps that saw a pixel."""
    kernel, inner = weight.shape[2:], weight.shape[1]
    gx = np.zeros((inner * groups, g.shape[1], *size), g.dtype)
    offsets = [
        (v, w) for v in range(min(stride[0], size[0])) for w in range(min(stride[1], size[1]))
    ]
    for offset in offsets:
        axes = list(zip(offset, stride, padding, kernel, size, strict=True))
        pixels = tuple(slice(v, None, s) for v, s, _, _, _ in axes)
        taps = tuple(slice((v + p) % s, None, s) for v, s, p, _, _ in axes)
        count = tuple(len(range((v + p) % s, k, s)) for v, s, p, k, _ in axes)
        start = tuple((a[0] + a[2]) // a[1] - n + 1 for a, n in zip(axes, count, strict=True))
        made = tuple(len(range(v, n, s)) for v, s, _, _, n in axes)
        parts = zip(np.split(g, groups), np.split(weight, groups), strict=True)
        for k, (a, w) in enumerate(parts) if 0 not in count else ():
            tall = w[:, :, *taps][:, :, ::-1, ::-1].transpose(2, 3, 0, 1).reshape(-1, inner)
            found = correlate(tall.T, a, (count, (1, 1), start, made), stride == (1, 1))
            gx[k * inner : (k + 1) * inner, :, *pixels] = found
    return gx


def convolve_weight(g, x, size, stride, padding, groups):
    """Its derivative by the weight, some channels at a time."""
    window, found = forward(x.shape[2:], size, stride, padding), []
    for a, b in zip(np.split(g, groups), np.split(x, groups), strict=True):
        channels = [b[c : c + 64] for c in range(0, len(b), 64)]
        parts = max(1, 8 // len(channels))
        found.append(np.concatenate([weights(a, some, window, parts) for some in channels], axis=1))
    return np.concatenate(found)


def added(arrays):
    """((a0 + a1) + a2) + ..."""
    total = arrays[0]
    for x in arrays[1:]:
        total = total + x
    return total


def weights(g, x, window, parts):
    """The derivative (O, C, kh, kw) by the weights of the channels x: sums of the blocks, in so
    many parts at most, then of these."""
    (kh, kw), c, made = window[0], len(x), []
    x, count, size = flat(x, window)
    g = g.reshape(len(g), count, *size)
    for images, rows in blocks(count, size):
        ours = g[:, images, rows].transpose(0, 2, 3, 1).reshape(len(g), -1)
        made.append(np.stack([ours @ b.T for b in seen(x, window, images, rows)]))
    parts, n = min(parts, len(made)), len(made)
    total = added([added(made[n * k // parts : n * (k + 1) // parts]) for k in range(parts)])
    if len(total) == 1:
        return total.reshape(len(g), kh, kw, c).transpose(0, 3, 1, 2)
    return total.reshape(kh, len(g), kw, c).transpose(1, 3, 0, 2)


# --- every call ---------------------------------------------------------------------------------

OWN = {
    "convolve": convolve,
    "convolve_input": convolve_input,
    "convolve_weight": convolve_weight,
    "norm": norm,
    "assign": assign,
    "getitem": lambda x, index: x[index],
    "astype": lambda x, dtype: x.astype(dtype),
    "copy": lambda x: np.array(x, order="C"),
}


def argument(x, values):
    """An argument of a call, with arrays in the place of their numbers."""
    if isinstance(x, list):
        return tuple(argument(item, values) for item in x)
    if not isinstance(x, dict):
        return x
    if "value" in x:
        return values[x["value"]]
    return slice(*x["slice"]) if "slice" in x else float(x["float"]) if "float" in x else ...


def outputs(tree, path=()):
    """(path, number of the value) of every array in the result."""
    if "value" in tree:
        yield "/".join(path), tree["value"]
    elif "dict" in tree:
        for key, item in tree["dict"].items():
            yield from outputs(item, (*path, key))
    else:
        for i, item in enumerate(tree.get("tuple", tree.get("list", []))):
            yield from outputs(item, (*path, str(i)))


def main(program_file, inputs_file, outputs_file):
    """Make the calls one after another."""
    with open(program_file, encoding="utf-8") as file:  # noqa: PTH123
        program = json.load(file)
    given, values, forms = np.load(inputs_file), {}, program["values"]
    for entry in program["signature"]:
        if "value" in entry:
            values[entry["value"]] = given["/".join(entry["path"])]
    for number, draw in enumerate(program["draws"]):
        values[draw["value"]] = given[f"draw/{number}"]
    for entry in program["constants"]:
        form, data = forms[entry["value"]], base64.b64decode(entry["base64"])
        dtype = np.dtype(form["dtype"])
        array = np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype)
        values[entry["value"]] = array.reshape(form["shape"])
    with np.errstate(all="ignore"):
        for call in program["calls"]:
            function = OWN.get(call["function"]) or getattr(np, call["function"])
            settings = {name: argument(x, values) for name, x in call["settings"].items()}
            result = function(*argument(call["args"], values), **settings)
            values[call["result"]] = np.asarray(result)
    np.savez(outputs_file, **{path: values[i] for path, i in outputs(program["result"])})


if __name__ == "__main__":
    main(*sys.argv[1:])
