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


def blocks(images, size, limit=1024):
    """(images, rows) of every block of a convolution's output: about so many positions."""
    area = size[0] * size[1]
    height = -(-size[0] // max(1, round(area / limit)))
    several = min(max(1, limit // area, min(8, 2 * limit // area)), -(-images // 2))
    several = several if 2 * area <= limit else 1
    several = -(-images // -(-images // several))
    for n in range(0, images, several):
        for r in range(0, size[0], height):
            yield slice(n, min(n + several, images)), slice(r, min(r + height, size[0]))


def near(x, rows, columns):
    """The pixels of x (C, N, H, W) in rows and columns, images last; 0 outside."""
    i, j = np.asarray(rows)[:, None], np.asarray(columns)
    inside = (i >= 0) & (i < x.shape[2]) & (j >= 0) & (j < x.shape[3])
    found = x[:, :, np.clip(i, 0, x.shape[2] - 1), np.clip(j, 0, x.shape[3] - 1)]
    pixels = np.where(inside, found, x.dtype.type(0)).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels)  # a BLAS may round other layouts differently


def seen(x, window, images, rows):
    """What the rows of a kernel see of a block of images, (kw C, positions) each; as one where
    there are fewer than 128 taps and channels a row."""
    if x.ndim == 2:  # 1 x 1
        return [x[:, rows]]
    x, (taps, step, start, size, _) = x[:, images], window
    height, matrices = rows.stop - rows.start, []
    for k in range(taps[0]):
        down = step[0] * np.arange(rows.start, rows.stop) + k + start[0]
        across = step[1] * np.arange(size[1]) + start[1]
        parts = [near(x, down, across + m) for m in range(taps[1])]
        matrices.append(np.stack(parts).reshape(-1, height * size[1] * x.shape[1]))
    narrow = taps[0] > 1 and taps[1] * x.shape[0] < 128
    return [np.concatenate(matrices)] if narrow else matrices


def flat(x, window):
    """A 1 x 1 kernel sees one image of one column; else x, its images, and the output's size."""
    if window[:4] != ((1, 1), (1, 1), (0, 0), x.shape[2:]):
        return x, x.shape[1], window[3]
    return x.reshape(len(x), -1), 1, (x[0].size, 1)


def correlate(taps, x, window, whole, transposed=False):
    """The correlation of images (C, N, H, W) with a kernel (kh, kw, O, C), or transposed."""
    if by_tiles(window, x.shape[1], *taps.shape[2:]):
        return correlate_tiles(taps, x, window, transposed)
    if transposed:
        matrix = taps.reshape(-1, taps.shape[3]).T
    else:
        matrix = taps.transpose(2, 0, 1, 3).reshape(taps.shape[2], -1)
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


# --- form "winograd", for 3x3 of stride 1: F(2x2, 3x3), as in npdrt.ops.winograd -----------------

TILE = ((0, np.subtract, 2), (1, np.add, 2), (2, np.subtract, 1), (3, np.subtract, 1))


def by_tiles(window, images, outputs, channels):
    """Whether a correlation is made of tiles: 2x2 outputs by 16 products."""
    (taps, step, _, (height, width), form), (h, w) = window, tiles(window)
    fits = (form, taps, step) == ("winograd", (3, 3), (1, 1)) and 24 * h * w <= 9 * height * width
    return fits and min(images * h * w, outputs, channels) >= 64


def tiles(window):
    """How many tiles an image is high and wide."""
    return -(-window[3][0] // 2), -(-window[3][1] // 2)


def scale(largest):
    """The powers of 2 that make large numbers small; 1 for all others."""
    bits = np.finfo(largest.dtype).maxexp
    limit, step, one = 2.0 ** (bits * 3 // 8), 2.0 ** (bits * 5 // 16), np.ones_like(largest)
    once = np.where(largest > limit, one / step, one)
    return np.where(largest > limit * step, one / step / step, once)


def pixels(x, window, rows):
    """The pixels of the tiles in some rows, [column][row] of (C, rows, columns, images), and their
    scales."""
    i, j = window[2]
    down, across = 2 * np.arange(rows.start, rows.stop) + i, 2 * np.arange(tiles(window)[1]) + j
    d = [[near(x, down + a, across + b) for a in range(4)] for b in range(4)]
    return d, scale(np.abs(d).max((0, 1, 2)))


def seen_by_tiles(d, scales):
    """B' d B of tiles, times their scales, as [column][row] of matrices (C, tiles)."""
    d = [[pixel * scales for pixel in column] for column in d]
    sums = [[f(d[k][a], d[m][a]) for a in range(4)] for k, f, m in TILE]
    return [[f(s[k], s[m]).reshape(len(s[0]), -1) for k, f, m in TILE] for s in sums]


def transformed(g):
    """G g, along the first axis."""
    half, total = g.dtype.type(0.5), g[0] + g[2]
    return np.stack([g[0], (total + g[1]) * half, (total - g[1]) * half, g[2]])


def restored(d):
    """G' d, along the first axis."""
    half = (d[1] + d[2]) * d.dtype.type(0.5)
    return np.stack([half + d[0], (d[1] - d[2]) * d.dtype.type(0.5), half + d[3]])


def correlate_tiles(taps, x, window, transposed):
    """`correlate`, of tiles."""
    scaled = scale(np.abs(taps).max())
    kernel = transformed(transformed(taps * scaled).swapaxes(0, 1))  # [column, row] (O, C)
    kernel = kernel.swapaxes(2, 3) if transposed else kernel
    y = np.empty((kernel.shape[2], x.shape[1], *window[3]), x.dtype)
    for images, rows in blocks(x.shape[1], tiles(window), 512):
        made, (d, scales) = [], pixels(x[:, images], window, rows)
        for u, v in zip(kernel, seen_by_tiles(d, scales), strict=True):
            m = [a @ b for a, b in zip(u, v, strict=True)]
            made.append((m[1] + m[2] + m[0], m[1] - m[2] + m[3]))
        form = (len(y), rows.stop - rows.start, tiles(window)[1], -1)
        for i in (0, 1):
            down = slice(2 * rows.start + i, min(2 * rows.stop, window[3][0]), 2)
            a, b, c, d = (column[i].reshape(form).transpose(0, 3, 1, 2) for column in made)
            for j, value in ((0, b + c + a), (1, b - c + d)):
                value = value / scales.transpose(2, 0, 1) / scaled
                to = y[:, images, down, j::2]
                to[...] = value[:, :, : to.shape[2], : to.shape[3]]
    return y


def weights_by_tiles(g, x, window):
    """The derivative (O, C, 3, 3) by the weights, of tiles."""
    made = []
    for images, rows in blocks(x.shape[1], tiles(window), 512):
        down, across = 2 * np.arange(rows.start, rows.stop), 2 * np.arange(tiles(window)[1])
        y = [[near(g[:, images], down + a, across + b) for a in (0, 1)] for b in (0, 1)]
        d, scales = pixels(x[:, images], window, rows)
        balance = scales / scale(np.abs(y).max((0, 1, 2)))
        y = [np.stack(column) / balance for column in y]
        columns = (y[0], y[0] + y[1], y[0] - y[1], y[1])
        ours = [(c[0], c[0] + c[1], c[0] - c[1], c[1]) for c in columns]
        theirs = seen_by_tiles(d, balance)
        products = [
            [a.reshape(len(g), -1) @ b.T for a, b in zip(left, right, strict=True)]
            for left, right in zip(ours, theirs, strict=True)
        ]
        made.append(np.array(products))
    total = added(in_parts(made, 8 // min(4, max(1, len(g) * len(x) // 16384))))
    rows = np.stack([restored(column) for column in total])  # [column][row of the kernel]
    return restored(rows).transpose(2, 3, 1, 0)


def forward(size, kernel, stride, padding, form):
    """Taps, step, start and size of the output of a convolution, and its form."""
    axes = zip(size, kernel, stride, padding, strict=True)
    made = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in axes)
    return tuple(kernel), stride, (-padding[0], -padding[1]), made, form


def convolve(x, weight, stride, padding, groups, form):
    """y[o] = sum over c, k, l of weight[o, c, k, l] x[c], shifted by k and l."""
    window = forward(x.shape[2:], weight.shape[2:], stride, padding, form)
    parts = zip(np.split(x, groups), np.split(weight, groups), strict=True)
    return np.concatenate([correlate(w.transpose(2, 3, 0, 1), a, window, True) for a, w in parts])


def convolve_input(g, weight, size, stride, padding, groups, form):
    """Its derivative by x, for the cotangent g: a correlation with the taps that saw a pixel."""
    kernel, inner = weight.shape[2:], weight.shape[1]
    gx = np.zeros((inner * groups, g.shape[1], *size), g.dtype)
    whole = stride == (1, 1)
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
            flipped = w[:, :, *taps][:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
            found = correlate(flipped, a, (count, (1, 1), start, made, form), whole, True)
            gx[k * inner : (k + 1) * inner, :, *pixels] = found
    return gx


def convolve_weight(g, x, size, stride, padding, groups, form):
    """Its derivative by the weight, some channels at a time."""
    window, found = forward(x.shape[2:], size, stride, padding, form), []
    for a, b in zip(np.split(g, groups), np.split(x, groups), strict=True):
        if by_tiles(window, a.shape[1], len(a), len(b)):
            found.append(weights_by_tiles(a, b, window))
            continue
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


def in_parts(made, parts):
    """The sums of consecutive parts, so many at most."""
    parts, n = min(parts, len(made)), len(made)
    return [added(made[n * k // parts : n * (k + 1) // parts]) for k in range(parts)]


def weights(g, x, window, parts):
    """The derivative (O, C, kh, kw) by the weights of the channels x: sums of the blocks, in so
    many parts at most, then of these."""
    (kh, kw), c, made = window[0], len(x), []
    x, count, size = flat(x, window)
    g = g.reshape(len(g), count, *size)
    for images, rows in blocks(count, size):
        ours = g[:, images, rows].transpose(0, 2, 3, 1).reshape(len(g), -1)
        made.append(np.stack([ours @ b.T for b in seen(x, window, images, rows)]))
    total = added(in_parts(made, parts))
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
