"""Answers the prompts of `npdrt vectors export` for fromage, in NumPy alone.

npdrt vectors export prompts.json
python docs/take_part.py prompts.json response.json
npdrt vectors verify response.json
"""

import json
import sys
from pathlib import Path

import numpy as np

TYPES = {"float32": ">f4", "float64": ">f8"}


def read(bits, type=">f8", shape=()):
    return np.frombuffer(bytes.fromhex(bits), type).astype(type[1:]).reshape(shape)


def norm(x):
    return float(np.sqrt(np.sum(np.square(x, dtype="f8"))))


def fromage(w, g, lr):
    scale = lr * norm(w) / norm(g) if norm(w) > 0 and norm(g) > 0 else lr
    scale = scale if scale <= np.finfo(w.dtype).max else lr
    return (w - w.dtype.type(scale) * g) / w.dtype.type(np.sqrt(1 + lr * lr))


def answer(test, type, bound):
    if not all(0 <= read(step["lr"]) < np.inf for step in test["steps"]):
        return {"tcId": test["tcId"], "error": "lr must be a finite number >= 0"}
    w, steps = read(test["w"], type, test["shape"]), []
    largest = None if bound is None else float(read(bound)) * norm(w)
    for step in test["steps"]:
        w = fromage(w, read(step["g"], type, test["shape"]), float(read(step["lr"])))
        if largest is not None and norm(w) > largest:
            w = w * w.dtype.type(largest / norm(w))
        steps.append({"w": np.asarray(w, type).tobytes().hex()})
    return {"tcId": test["tcId"], "steps": steps}


np.seterr(all="ignore")
groups = json.loads(Path(sys.argv[1]).read_text())["testGroups"]
answers = [
    answer(test, TYPES[group["format"]], group["settings"]["norm_bound"])
    for group in groups
    if group.get("rule") == "fromage" and group["format"] in TYPES
    for test in group["tests"]
]
response = {"npdrtVectors": 1, "implementation": "take_part", "answers": answers}
Path(sys.argv[2]).write_text(json.dumps(response))
