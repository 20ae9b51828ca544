"""A mirror for the code: the length of its lines, functions, files and folders.

It also counts how much of the code is explained.

``python benchmarks/house.py lightning_maml datamodules`` prints a table with one column; separate
trees by ``--``, or give installed packages by name (``torchmetrics``), to see them side by side.
The numbers are to be looked at, not to be reached: no line is split and no docstring padded for
them.
"""

import argparse
import ast
import importlib.util
import io
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

LONG = 100
IGNORED = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
DOCUMENTED = ast.Module | ast.ClassDef | FUNCTIONS


def files_of(name: str) -> list[Path]:
    """Return the Python files of a folder, or of an installed package."""
    folder = Path(name)
    if not folder.is_dir():
        package = importlib.util.find_spec(name)
        if package is None or package.origin is None:
            raise SystemExit(f"Expected a folder or an installed package but got {name}.")
        folder = Path(package.origin).parent
    # resolved, so that a folder and a link to it count once
    return sorted({path.resolve() for path in folder.rglob("*.py")})


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that are docstrings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines.update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return lines


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yield the functions and methods with parameters that users may call."""
    holders: list[ast.Module | ast.ClassDef] = [tree]
    holders += [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    for holder in holders:
        for node in holder.body:
            if (
                isinstance(node, ast.FunctionDef)
                and not node.name.startswith("_")
                and parameters(node)
            ):
                yield node


def parameters(function: ast.FunctionDef) -> list[str]:
    """Return the names of a function's parameters, without ``self`` and ``cls``."""
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def describe(paths: list[Path]) -> dict[str, str]:
    """Return the figures of a tree, in words."""
    code_of_functions: list[int] = []
    lengths: list[int] = []
    folders: Counter[Path] = Counter()
    tokens = comprehensions = long = comments = code = lines = 0
    documented = public = 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        explained = docstring_lines(tree)
        code_lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            row = token.start[0]
            if token.type == tokenize.COMMENT:
                comments += 1
            elif token.type not in IGNORED and row not in explained:
                tokens += 1
                code_lines.update(range(row, token.end[0] + 1))
        rows = text.splitlines()
        lines += len(rows)
        long += sum(len(row) > LONG for row in rows)
        code += len(code_lines)
        lengths.append(len(rows))
        folders[path.parent] += path.name != "__init__.py"
        for node in ast.walk(tree):
            comprehensions += isinstance(node, COMPREHENSIONS)
            if isinstance(node, FUNCTIONS):
                body = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                code_of_functions.append(len(code_lines.intersection(body)))
        for function in public_functions(tree):
            public += 1
            documented += "Args:" in (ast.get_docstring(function) or "")
    deciles = statistics.quantiles(code_of_functions, n=10)
    function_lengths = f"{deciles[4]:.0f} / {deciles[8]:.0f} / {max(code_of_functions)}"
    return {
        "files, folders, lines": f"{len(paths)}, {len(folders)}, {lines}",
        "files in the largest folder": f"{max(folders.values())}",
        "file lines, median / max": f"{statistics.median(lengths):.0f} / {max(lengths)}",
        "function lines of code, median / p90 / max": function_lengths,
        "tokens per line of code": f"{tokens / code:.1f}",
        "comprehensions per 100 lines of code": f"{100 * comprehensions / code:.1f}",
        f"lines over {LONG} columns": f"{100 * long / lines:.1f} %",
        "comment lines / code lines": f"{100 * comments / code:.1f} %",
        "public functions with `Args:`": f"{documented} of {public}",
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "trees", nargs="+", help="folders or packages; commas join several to one column"
    )
    columns = {
        name: describe([path for part in name.split(",") for path in files_of(part)])
        for name in parser.parse_args().trees
    }
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for figure in next(iter(columns.values())):
        print(f"| {figure} | " + " | ".join(column[figure] for column in columns.values()) + " |")


if __name__ == "__main__":
    sys.exit(main())
