"""Print lines of code (no comments, docstrings or blanks) by folder beside the guide."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
GUIDE = {
    "engine": (3050, ["npdrt/*.py", "npdrt/ops/*.py", "npdrt/optim/*.py"]),
    "kernels": (700, ["npdrt/kernels/*.py"]),
    "program": (2500, ["npdrt/program/*.py"]),
    "trust": (1200, ["npdrt/trust/*.py"]),
    "conform": (3400, ["npdrt/conform/*.py", "npdrt/conform/*/*.py"]),
    "store": (850, ["npdrt/store/*.py"]),
    "frechet": (400, ["npdrt/frechet/*.py"]),
    "cli": (1750, ["npdrt/cli/*.py"]),
    "models": (1050, ["models/*.py"]),
    "train": (1150, ["train/*.py"]),
    "studies": (1750, ["train/studies/*.py"]),
    "data": (1800, ["data/*.py"]),
}
BLANK = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def code_lines(path: Path) -> int:
    """Lines of a file that hold code."""
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines: set[int] = set()
    for token in tokens:
        if token.type not in BLANK and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        holders = ast.Module, ast.ClassDef, ast.FunctionDef
        if isinstance(node, holders) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


if __name__ == "__main__":
    for folder, (guide, patterns) in GUIDE.items():
        files = [path for pattern in patterns for path in ROOT.glob(pattern)]
        print(f"{folder:8} {sum(map(code_lines, files)):5} lines of code (guide {guide})")
