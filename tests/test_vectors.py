"""The conformance vectors: the files are whole and well formed, npdrt's own answers hold, prompts
give nothing away, and responses are judged, or refused, as docs/vectors.md says."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from oracle import generate, norms, primitives, steps
from oracle.cases import cases

from npdrt.cli import cli
from npdrt.conform import canonical, encoding, generated, vectors, verify
from npdrt.conform.case import Answer, Case, operands
from npdrt.conform.cases import FLAGS
from npdrt.conform.formats import FORMATS
from npdrt.conform.judge import judge, same_bits
from npdrt.conform.rules import RULES as RECORDS
from npdrt.conform.rules import SLOTS
from npdrt.conform.vectors import Vector
from npdrt.errors import Error, FileRefused
from npdrt.optim import RULES, norm

ROOT = Path(__file__).parents[1]
TAKE_PART = ROOT / "docs" / "take_part.py"
FILES = list(vectors.sums())
Json = dict[str, Any]
# rule -> accepted ulps of npdrt itself in float32, single steps, gated
OURS = {"sgd": 4, "adam": 6, "lars": 4, "lars_lesion": 4, "fromage": 4}


@pytest.fixture(scope="session")
def documents() -> dict[str, Json]:
    """Every vector file by its name."""
    return {name: vectors.read(vectors.FOLDER / name) for name in FILES}


@pytest.fixture(scope="session")
def tests(documents: dict[str, Json]) -> list[tuple[Json, Json]]:
    """Every test with its group."""
    groups = [group for document in documents.values() for group in document["testGroups"]]
    return [(group, test) for group in groups for test in group["tests"]]


@pytest.fixture(scope="session")
def loaded() -> list[Vector]:
    """Every test of an update."""
    return vectors.load()


# --- the files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_digest(name: str) -> None:
    data = (vectors.FOLDER / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == vectors.sums()[name]


def test_every_file_is_listed() -> None:
    there = {path.name for path in vectors.FOLDER.glob("*.json")} - {"schema.json"}
    assert there == set(FILES)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    data = (vectors.FOLDER / FILES[0]).read_bytes()
    (tmp_path / FILES[0]).write_bytes(data.replace(b"0.9", b"0.8") + b" ")
    (tmp_path / "SHA256SUMS").write_bytes((vectors.FOLDER / "SHA256SUMS").read_bytes())
    with pytest.raises(FileRefused, match="its SHA-256 is not that of SHA256SUMS"):
        vectors.read(tmp_path / FILES[0])


@pytest.mark.parametrize("name", FILES)
def test_counts_and_notes(name: str, documents: dict[str, Json]) -> None:
    document = documents[name]
    found = [test for group in document["testGroups"] for test in group["tests"]]
    assert document["numberOfTests"] == len(found) > 0
    assert {flag for test in found for flag in test["flags"]} <= set(document["notes"])
    if document["testGroups"][0]["type"] == "OptimizerStep":
        assert set(document["notes"]) <= set(FLAGS)


def test_no_number_is_given_twice(tests: list[tuple[Json, Json]]) -> None:
    numbers = Counter(test["tcId"] for _, test in tests)
    assert [number for number, n in numbers.items() if n > 1] == []


def test_every_rule_in_every_format(documents: dict[str, Json]) -> None:
    there = {
        (group["rule"], group["format"])
        for document in documents.values()
        for group in document["testGroups"]
        if group["type"] == "OptimizerStep"
    }
    assert there == {(rule, form) for rule in RULES for form in FORMATS}


def test_every_flag_is_asked(tests: list[tuple[Json, Json]]) -> None:
    asked = {flag for group, t in tests if group["type"] == "OptimizerStep" for flag in t["flags"]}
    assert asked == set(FLAGS)


def test_bits_fit_shapes(tests: list[tuple[Json, Json]]) -> None:
    for group, test in tests:
        if group["type"] == "OptimizerStep" and "generated" not in test:
            digits = int(np.prod(test["shape"], dtype=int)) * FORMATS[group["format"]].width // 4
            state = test["state"] or {}
            arrays = [test["w"], *(step["g"] for step in test["steps"])]
            arrays += [
                bits
                for beside in test.get("neighbour", {}).values()
                for bits in ([beside] if isinstance(beside, str) else beside)
            ]
            arrays += [state[name] for name in SLOTS if name in state]
            arrays += [e[k] for e in test["expected"] for k in ("exact", "scale", "canonical")]
            assert {len(text) for text in arrays} == {digits}, test["tcId"]
            refused = test["result"] == "error"
            assert len(test["expected"]) == (0 if refused else len(test["steps"]))


def validator(name: str) -> Any:
    """The validator of one of the forms that schema.json describes."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((vectors.FOLDER / "schema.json").read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    narrowed = {k: v for k, v in schema.items() if k != "oneOf"} | {"$ref": f"#/$defs/{name}"}
    return jsonschema.Draft202012Validator(narrowed)


@pytest.mark.parametrize("name", FILES)
def test_schema_of_files(name: str, documents: dict[str, Json]) -> None:
    assert [error.message for error in validator("vectorFile").iter_errors(documents[name])] == []


def test_the_schema_refuses(documents: dict[str, Json]) -> None:
    text = json.dumps(documents["lars_lesion_float16.json"])
    for old, new in (('"tcId"', '"tcid"'), ('"result": "valid"', '"result": "fine"'),
                     ('"w": "', '"w": "x'), ('"ulps"', '"norms"')):  # fmt: skip
        changed = json.loads(text.replace(old, new, 1))
        assert not validator("vectorFile").is_valid(changed), old


def test_generation_gives_the_same_bytes() -> None:
    """Of two small files; `python -m tests.oracle.generate --check` does all."""
    context = generate.mp_context()
    every = chain(cases(), generated.cases())
    asked = [c for c in every if (c.rule, c.format) == ("lars_lesion", "float16")]
    answered = [generate.answered(case, context) for case in asked]
    flags = {flag: FLAGS[flag] for flag in sorted({f for case in asked for f in case.flags})}
    groups = generate.update_groups("lars_lesion", "float16", answered)
    title = "Updates of lars_lesion in float16; rules: docs/updates.md"
    found = generate.text(generate.document(title, groups, flags))
    assert found == (vectors.FOLDER / "lars_lesion_float16.json").read_bytes()
    groups = generate.numbered(norms.groups(), generate.NUMBERS["norms"])
    found = generate.text(generate.document(norms.TITLE, groups, norms.FLAGS))
    assert found == (vectors.FOLDER / "norms.json").read_bytes()


# --- npdrt's own answers --------------------------------------------------------------------------


def ours(case: Case) -> tuple[Answer, ...]:
    """npdrt.optim's answers to a case."""
    rule = RULES[case.rule](lr=0.0, **case.settings)
    params = {"w": np.asarray(case.w, dtype=case.format)}
    if case.neighbour is not None:
        params["beside"] = np.asarray(case.neighbour.w, dtype=case.format)
    state = rule.init(params)
    for name, value in (case.state or {}).items():
        key = name if name in state else f"w/{name}"
        state[key] = np.asarray(value, dtype=state[key].dtype)
    answers = []
    for k, step in enumerate(case.steps):
        params["w"], g = operands(params["w"], np.asarray(step.g, dtype=case.format), case.layout)
        grads = {"w": g}
        if case.neighbour is not None:
            grads["beside"] = np.asarray(case.neighbour.g[k], dtype=case.format)
        params, state = rule.update(params, grads, state, lr=float(step.lr))
        slots = {k[2:]: np.float64(v) for k, v in state.items() if k.startswith("w/")}
        answers.append(Answer(params["w"].astype(np.float64), slots))
    return tuple(answers)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", ["float16", "float32", "float64"])
def test_our_bits_are_canonical(rule: str, form: str, loaded: list[Vector]) -> None:
    """Every test, gated or not, slots included; learning rates that are none are refused."""
    for test in (t for t in loaded if (t.case.rule, t.case.format) == (rule, form)):
        if test.case.result == "error":
            with pytest.raises(Error, match="lr must be a finite number >= 0"):
                ours(test.case)
            continue
        judged = judge(test, ours(test.case))
        assert judged.bits, (test.case.id, test.case.comment, judged.worst)
        assert judged.slots == (), (test.case.id, test.case.comment)
        assert judged.accurate or test.case.result == "acceptable" or not judged.gated


@pytest.mark.parametrize("rule", RULES)
def test_our_error(rule: str, loaded: list[Vector]) -> None:
    """In float32, gated single steps."""
    mine = [t for t in loaded if t.case.rule == rule and t.case.format == "float32"]
    for test in mine:
        case = test.case
        if case.result == "valid" and len(case.steps) == 1:
            plain = rule == "sgd" and not case.settings["momentum"]
            ulps = judge(test, ours(case)).worst.ulps
            accepted = 2 if plain else OURS.get(rule, RECORDS[rule].ulps)
            assert ulps <= accepted, (case.id, case.comment, ulps)


def test_our_norms(tests: list[tuple[Json, Json]]) -> None:
    """Within one unit of float64."""
    for group, test in tests:
        if group["type"] == "Norm" and group["format"] != "bfloat16":
            x = norms.elements(group, test).astype(group["format"])
            exact, got = encoding.unhexed(test["norm"]), float(norm(x))
            if test["result"] == "valid":
                assert abs(got - exact) <= np.spacing(exact), test["tcId"]


# --- generated tests ------------------------------------------------------------------------------


GENERATED = [rule for rule in RULES if RECORDS[rule].generated]


def of_generated(tests: list[tuple[Json, Json]]) -> list[tuple[Json, Json]]:
    """The generated tests with their groups."""
    return [(group, test) for group, test in tests if "generated" in test]


def test_generated_tests_are_large_or_long(tests: list[tuple[Json, Json]]) -> None:
    """Above 1,024 and 65,536 elements, past 300 and 5,000 steps, of every rule that has such tests,
    in both formats: products of large matrices take too long in 400 bits."""
    found = of_generated(tests)
    assert [rule for rule in RULES if rule not in GENERATED] == ["muon"]
    for rule in GENERATED:
        for form in ("float32", "float64"):
            mine = [
                t
                for g, t in found
                if (g["rule"], g["format"]) == (rule, form) and t["result"] == "valid"
            ]
            elements = sorted({int(np.prod(t["shape"])) for t in mine if t["flags"][0] == "LARGE"})
            steps = sorted({t["generated"] for t in mine if t["flags"][0] == "LONG"})
            assert len(elements) == len(steps) == 2
            assert 1024 < elements[0] <= 65_536 < elements[1]
            assert 300 < steps[0] <= 5000 < steps[1]
            assert all(n % 256 for n in elements)
    assert {len(test["sample"]["at"]) for _, test in found} == {64, 63}


def test_the_stored_elements_are_close_to_our_answers(
    tests: list[tuple[Json, Json]], loaded: list[Vector]
) -> None:
    """The exact elements are not npdrt's own, and npdrt's are as good as elsewhere."""
    by_id = {vector.case.id: vector for vector in loaded}
    for group, test in (pair for pair in of_generated(tests) if not vectors.spared(pair[1])):
        vector = by_id[test["tcId"]]
        if test["result"] != "valid":
            assert group["format"] in ("bfloat16", "float16"), test["tcId"]
            continue
        answers = tuple(e.canonical for e in vector.expected)
        judged = judge(vector, answers)
        steps = len(answers)
        assert judged.bits
        least = 16.0 if vector.case.settings.get("centered") else 6.0  # v - m^2 cancels
        assert judged.worst.ulps <= max(least, 0.4 * steps), (test["tcId"], judged.worst)
        if test["flags"] == ["LARGE"]:  # one stored element that is wrong is seen
            k, i = test["sample"]["at"][-1]
            exact = vector.expected[k].exact.copy()
            exact.reshape(-1)[i] += 1.0
            spoilt = [
                replace(e, exact=exact) if n == k else e for n, e in enumerate(vector.expected)
            ]
            assert not judge(replace(vector, expected=tuple(spoilt)), answers).accurate


@pytest.mark.parametrize("rule", GENERATED)
def test_two_ways_to_npdrts_answers(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page in plain Python and npdrt.optim give a generated case the same bits."""
    found = [
        c
        for c in generated.cases()
        if c.rule == rule and "PLAINER" not in c.flags and c.w.size * len(c.steps) < 3000
        and c.format != "bfloat16"
    ]  # fmt: skip
    assert len(found) == 6 + 3 * (rule == "sgd")  # with dampening too
    for case in found:
        answers = []
        for limit in (0, 10**9):
            monkeypatch.setattr(canonical, "PLAIN", limit)
            answers.append(list(canonical.answers(case)))
        for one, other in zip(*answers, strict=True):
            assert same_bits(one.w, other.w)
            assert one.slots.keys() == other.slots.keys()
            assert all(same_bits(one.slots[n], other.slots[n]) for n in one.slots)


def test_generated_numbers_are_in_the_prompts(prompts: Path) -> None:
    """As in the case that is judged; a reader of prompts draws nothing."""
    found = json.loads(prompts.read_bytes())["testGroups"]
    asked = {t["tcId"]: (g, t) for g in found if g["type"] == "OptimizerStep" for t in g["tests"]}
    cases = [c for c in generated.cases() if c.id in asked]
    assert len(cases) == len(GENERATED) * sum(len(row.formats) for row in generated.ROWS) + 4
    for case in cases:
        assert set(asked[case.id][1]["flags"]) <= {"LARGE", "LONG"}
        read = vectors.case_from(*asked[case.id])
        assert read.id == case.id
        assert same_bits(read.w, case.w)
        assert [s.lr for s in read.steps] == [s.lr for s in case.steps]
        assert all(same_bits(a.g, b.g) for a, b in zip(read.steps, case.steps, strict=True))


# --- prompts --------------------------------------------------------------------------------------


def call(*words: Any) -> Result:
    """`npdrt vectors words`, in this process."""
    return CliRunner().invoke(cli, ["vectors", *map(str, words)], prog_name="npdrt")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    done = call("export", path)
    assert done.exit_code == 0, done.output
    return path


def keys(value: Any) -> Iterator[str]:
    """Every key of a JSON value, at any depth."""
    if isinstance(value, dict):
        yield from value
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            yield from keys(item)


def test_prompts_hold_no_answers(prompts: Path, tests: list[tuple[Json, Json]]) -> None:
    found = json.loads(prompts.read_bytes())
    answers = {"expected", "exact", "canonical", "scale", "slots", "norms", "norm", "ulps"}
    answers |= {"tolerance", "value", "vjp", "loss", "grads"}
    for group in found["testGroups"]:  # whose settings may be called what they like
        asked = [{k: v for k, v in test.items() if k != "state"} for test in group["tests"]]
        assert not answers & set(keys(asked))
        assert not answers & set(group)
    asked = [test["tcId"] for group in found["testGroups"] for test in group["tests"]]
    assert sorted(asked) == sorted(test["tcId"] for _, test in tests if not vectors.spared(test))
    for group in found["testGroups"]:  # thousands of steps are all of one form
        group["tests"] = [t for t in group["tests"] if len(t.get("steps", ())) < 1000]
    assert validator("prompts").is_valid(found)


def test_export_of_a_part(tmp_path: Path, prompts: Path) -> None:
    assert call("export", "--rule", "lars", "--format", "float16", tmp_path / "a").exit_code == 0
    groups = json.loads((tmp_path / "a").read_bytes())["testGroups"]
    assert {(group["rule"], group["format"]) for group in groups} == {("lars", "float16")}
    assert call("export", "--format", "float32", tmp_path / "b").exit_code == 0
    groups = json.loads((tmp_path / "b").read_bytes())["testGroups"]
    assert {group["type"] for group in groups} == set(verify.LEVELS) | {"OptimizerStep"}
    assert "float64" not in (tmp_path / "b").read_text().replace('"scalars": "float64', "").replace(
        '"accumulation": "float64"', ""
    )
    again = call("export", prompts)
    assert (again.exit_code, again.stdout) == (2, "")
    assert "already exists; give --force" in again.stderr
    assert call("export", "--force", "--rule", "fromage", tmp_path / "a").exit_code == 0


def test_export_in_full(tmp_path: Path) -> None:
    """The files as they are, with digests that `sha256sum -c` takes, and the schema."""
    done = call("export", "--as", "full", "--rule", "lars_lesion", tmp_path / "full")
    assert done.exit_code == 0, done.output
    listed = vectors.sums(tmp_path / "full")
    assert set(listed) == {f"lars_lesion_{form}.json" for form in FORMATS}
    assert all(vectors.read(tmp_path / "full" / name) for name in listed)
    names = {path.name for path in (tmp_path / "full").iterdir()}
    assert names == {*listed, "SHA256SUMS", "schema.json"}
    assert call("export", "--as", "full", tmp_path / "full").exit_code == 2


def test_list(monkeypatch: pytest.MonkeyPatch, tests: list[tuple[Json, Json]]) -> None:
    done = call("list")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in FILES)
    found = json.loads(call("list", "--json").stdout)
    assert found["whole"] is True
    assert found["tests"] == len(tests)
    assert sum(sum(row["levels"].values()) for row in found["files"]) == len(tests)
    changed = {**vectors.sums(), "norms.json": "0" * 64}
    monkeypatch.setattr(vectors, "sums", lambda: changed)
    done = call("list")
    assert done.exit_code == 1
    assert "missing or changed" in done.stdout


# --- responses ------------------------------------------------------------------------------------


def participate(source: str, prompts: Path, folder: Path) -> Path:
    """The response of a program like docs/take_part.py."""
    (folder / "program.py").write_text(source)
    words = [sys.executable, folder / "program.py", prompts, folder / "response.json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "response.json"


@pytest.fixture(scope="session")
def response(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The response of docs/take_part.py."""
    return participate(TAKE_PART.read_text(), prompts, tmp_path_factory.mktemp("response"))


def test_take_part(response: Path) -> None:
    done = call("verify", response)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("take_part passes: fromage: agrees.\n")
    assert "not attempted: " in done.stdout
    assert validator("response").is_valid(json.loads(response.read_bytes()))
    assert call("verify", response, "--rule", "fromage", "--format", "float32").exit_code == 0


def test_take_part_needs_no_npdrt() -> None:
    text = TAKE_PART.read_text()
    assert "import npdrt" not in text
    assert "from npdrt" not in text
    assert sum(bool(line.strip()) for line in text.splitlines()) < 60


def test_what_is_named_must_be_answered(response: Path) -> None:
    done = call("verify", response, "--rule", "fromage")
    assert done.exit_code == 1
    assert "no answer to" in done.stdout
    done = call("verify", response, "--rule", "sgd")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "has no answer to any test that you asked about" in done.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "clause"),
    [
        (" / w.dtype.type(np.sqrt(1 + lr * lr))", "", "prefactor"),
        ("np.sqrt(1 + lr * lr)", "(1 + lr * lr)", "prefactor"),
        ("norm(w) / norm(g) if", "norm(g) / norm(w) if", "ratio"),
        ("norm(g) > 0 else lr", "norm(g) > 0 else 0.0", "zero norm"),
        ("norm(g) if norm(w)", "max(norm(g), 1e-6) if norm(w)", "zero norm"),
        ("float(read(bound)) * norm(w)", "float(read(bound))", "norm bound"),
        ("(w - w.dtype", "(w + w.dtype", "direction"),
    ],
)
def test_a_planted_error_is_named(
    right: str, wrong: str, clause: str, prompts: Path, tmp_path: Path
) -> None:
    text = TAKE_PART.read_text()
    assert text.count(right) == 1
    planted = participate(text.replace(right, wrong), prompts, tmp_path)
    done = call("verify", planted, "--json")
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    (rule,) = found["rules"]
    assert found["passes"] is rule["passes"] is False
    if wrong.startswith("max"):  # the floor of another dialect, on the gradient alone
        assert rule["verdict"] in ("deviates", "unknown")
    else:
        assert rule["verdict"] == "deviates"
        assert f"`{clause}`" in rule["sentence"]


def own_answers(tests: list[tuple[Json, Json]]) -> list[Json]:
    """npdrt's answers to norms, primitives and training steps."""
    answers = []
    for group, test in tests:
        if group["type"] == "Norm":
            values = norms.elements(group, test)
            answers.append({"tcId": test["tcId"], "norm": encoding.hexed(float(norm(values)))})
        elif group["type"] in ("Primitive", "TrainingStep"):
            module: Any = primitives if group["type"] == "Primitive" else steps
            answers.append({"tcId": test["tcId"], **module.answer(group, test)})
    return answers


def write(path: Path, answers: Any, **changes: Any) -> Path:
    """A response file."""
    path.write_text(json.dumps({"npdrtVectors": 1, "answers": answers, **changes}))
    return path


def test_the_other_kinds(tests: list[tuple[Json, Json]], tmp_path: Path) -> None:
    """Norms, primitives and training steps: npdrt's pass; changed, left out and refused ones."""
    answers = own_answers(tests)
    done = call("verify", write(tmp_path / "ours.json", answers))
    assert done.exit_code == 0, done.stdout
    assert done.stdout.startswith("ours passes: C2: ")
    assert validator("response").is_valid(json.loads((tmp_path / "ours.json").read_bytes()))
    answers[0]["norm"] = encoding.hexed(2.0)
    answers[-1] = {"tcId": answers[-1]["tcId"], "error": "no\x1b[31m \ud800"}
    value = next(a for a in answers if "value" in a and a["value"]["bits"])
    value["value"]["bits"] = value["value"]["bits"][::-1]
    done = call("verify", write(tmp_path / "odd.json", answers[:1] + answers[2:]))
    assert done.exit_code == 1
    assert "no answer to 1 test" in done.stdout
    assert "refused: no\\x1b[31m \\ud800" in done.stdout
    assert done.stdout.count(" tolerances\n") >= 2


STEP = {"w": "00000000"}


def changed(answers: Any) -> Callable[[Path], Path]:
    """A response with these answers."""
    return lambda path: write(path, answers)


def raw(data: bytes) -> Callable[[Path], Path]:
    """A response of these bytes."""

    def made(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return made


MALFORMED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "not JSON": (raw(b"{"), "not JSON"),
    "not text": (raw(b"\xff\xfe\x00"), "not JSON"),
    "deep": (raw(b"[" * 200_000), "not JSON"),
    "a list": (raw(b"[]"), "Expected `object`, got `array`"),
    "another version": (
        raw(b'{"npdrtVectors": 2, "answers": []}'), 'expected "npdrtVectors": 1'),
    "no answers": (raw(b'{"npdrtVectors": 1}'), "the key answers is missing"),
    "no number": (changed([{"steps": []}]), "the key tcId is missing - at `$.answers[0]`"),
    "twice": (changed([{"tcId": 1, "steps": [STEP]}] * 2), "two answers to test 1"),
    "unknown": (changed([{"tcId": 10**9, "steps": [STEP]}]), "which does not exist"),
    "negative": (changed([{"tcId": -1, "steps": [STEP]}]), "which does not exist"),
    "no steps": (changed([{"tcId": 1}]), "steps with w and slots; 'steps' is missing"),
    "steps no list": (changed([{"tcId": 1, "steps": 7}]), "test 1: expected steps"),
    "too many steps": (changed([{"tcId": 1, "steps": [STEP] * 9}]), "test 1: expected 1 steps"),
    "short": (changed([{"tcId": 1, "steps": [{"w": "00"}]}]), "test 1: expected"),
    "odd digits": (changed([{"tcId": 1, "steps": [{"w": "0" * 23}]}]), "test 1: expected"),
    "no digits": (changed([{"tcId": 1, "steps": [{"w": "x" * 24}]}]), "test 1: expected"),
    "no text": (changed([{"tcId": 1, "steps": [{"w": 0.5}]}]), "test 1: expected a text of hex"),
    "slots no dict": (changed([{"tcId": 1, "steps": [{"w": "0" * 24, "slots": 1}]}]), "test 1"),
    "norm": (changed([{"tcId": 100_001, "norm": "00"}]), "expected a float64 as 16 hex digits"),
    "no norm": (changed([{"tcId": 100_001, "w": "00"}]), "expected a norm"),
    "no vjp": (changed([{"tcId": 200_001, "value": 1}]), "test 200001: expected a value"),
    "arrays": (
        changed([{"tcId": 200_001, "value": {"dtype": "int64", "shape": [1], "values": [10**99]},
                  "vjp": [None]}]), "test 200001"),
    "training": (changed([{"tcId": 300_001, "loss": 1, "grads": {}, "params": {}}]), "300001"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_responses(name: str, tmp_path: Path) -> None:
    make, expected = MALFORMED[name]
    path = make(tmp_path / "response.json")
    done = call("verify", path, "--html", tmp_path / "x.html")
    assert (done.exit_code, done.stdout) == (3, ""), done.output
    assert done.stderr.startswith(f"Error: {path}: ")
    assert expected in done.stderr
    assert len(done.stderr) < 600
    assert not (tmp_path / "x.html").exists()


def test_no_response_and_a_huge_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = call("verify", tmp_path / "nowhere.json")
    assert done.exit_code == 2
    assert "does not exist" in done.stderr
    monkeypatch.setattr(vectors, "LIMIT", 10)
    done = call("verify", write(tmp_path / "huge.json", []))
    assert done.exit_code == 3
    assert "more than the limit of 10" in done.stderr


def test_a_response_that_only_refuses(tmp_path: Path) -> None:
    """No verdict on the rule, and exit code 1."""
    group = next(vectors.groups("OptimizerStep", rule="fromage"))
    answers = [{"tcId": test["tcId"], "error": "not yet"} for test in group["tests"]]
    done = call("verify", write(tmp_path / "none.json", answers))
    assert done.exit_code == 1
    assert "no verdict: it raises on" in done.stdout
    assert "not yet" in done.stdout
