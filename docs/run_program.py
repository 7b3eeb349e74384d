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


OWN = {
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
