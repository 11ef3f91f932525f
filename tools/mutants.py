# SPDX-License-Identifier: Apache-2.0
"""Mutation tests: change one place of the source, run the tests of that file, and list the changes that no test notices.

Python's places are found in the syntax tree and sampled by a hash, so that a sample stays as it is while other places change;
those of C++ are written in mutants.toml, as are the tests of each file and the changes that change nothing, with the reason. It
works on a copy of the tree, without CUDA sources. What was killed is remembered in build/mutants.jsonl, until the file or its
tests change; what survived runs again.
"""

import argparse
import ast
import copy
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import hypothesis  # noqa: F401
import pytest
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "mutants"
RESULTS = ROOT / "build" / "mutants.jsonl"
TIMEOUT = 600  # seconds of one run of tests: an endless loop counts as noticed
BAR = 0.95

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutant:
    file: str
    old: str  # for Python the function, the line and the place in it, for C++ the text, which the file has once
    new: str
    source: str  # the whole file, changed
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        return named(self.file, self.old, self.new)

    @property
    def key(self) -> str:
        """Of the change and of all that decides whether it is noticed."""
        texts = [self.name, (ROOT / self.file).read_text(), *((ROOT / test).read_text() for test in self.tests)]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def named(file: str, old: str, new: str) -> str:
    return f"{file}: {' '.join(old.split())}  ->  {' '.join(new.split())}"


# ----- Python -----------------------------------------------------------------


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    new = copy.deepcopy(node)
    match new:
        case ast.BoolOp() | ast.BinOp() if type(new.op) in SWAPS:
            new.op = SWAPS[type(new.op)]()
            yield new
        case ast.Compare():
            for i, op in enumerate(new.ops):
                other = copy.deepcopy(new)
                other.ops[i] = SWAPS[type(op)]()
                yield other
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield new.operand
        case ast.IfExp():
            yield ast.IfExp(new.test, new.orelse, new.body)
        case ast.Constant(value=bool()):
            yield ast.Constant(not new.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(new.value + 1)
        case ast.Return(value=ast.expr()) if not (isinstance(new.value, ast.Constant) and new.value.value in (None, False)):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield ast.Pass()
        case ast.If(test=ast.Call() | ast.Name() | ast.Attribute() | ast.BoolOp() | ast.NamedExpr()):
            yield ast.UnaryOp(ast.Not(), new.test)


def python_mutants(file: str, tests: tuple[str, ...]) -> Iterator[Mutant]:
    data = (ROOT / file).read_bytes()
    lines = data.splitlines(keepends=True)
    offset = lambda line, column: sum(map(len, lines[: line - 1])) + column
    seen = Counter()
    todo: list[tuple[ast.AST, str]] = [(ast.parse(data), "module")]
    while todo:
        node, function = todo.pop(0)
        inside = list(ast.iter_child_nodes(node))
        match node:
            case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.arg() | ast.Import() | ast.ImportFrom():
                continue  # words and types are not behaviour
            case ast.keyword(arg="strict" | "frozen"):  # of zip and of dataclasses: assertions
                continue
            case ast.If(test=ast.Name("TYPE_CHECKING")):
                continue
            case ast.AnnAssign():
                inside = [node.value] if node.value else []
            case ast.FunctionDef():
                function = node.name
                inside = [*node.body, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]
        todo[:0] = [(child, function) for child in inside]
        for new in changed(node):
            place = node.test if isinstance(node, ast.If) else node
            start, end = offset(place.lineno, place.col_offset), offset(place.end_lineno, place.end_col_offset)
            text = f"({ast.unparse(new)})" if isinstance(new, ast.expr) else ast.unparse(new)
            old = f"{function}: {lines[place.lineno - 1].decode().strip()}  [{data[start:end].decode()}]"
            seen[old, text] += 1
            old += f" {seen[old, text]}" if seen[old, text] > 1 else ""
            yield Mutant(file, old, text, (data[:start] + text.encode() + data[end:]).decode(), tests)


def sample(mutants: list[Mutant], count: int) -> list[Mutant]:
    order = sorted(mutants, key=lambda m: hashlib.sha256(m.name.encode()).digest())
    return sorted(order[:count], key=lambda m: m.file)


# ----- C++ ----------------------------------------------------------------------


def cpp_mutants(entries: list[dict]) -> Iterator[Mutant]:
    for entry in entries:
        file, old, new = entry["file"], entry["old"], entry["new"]
        source = (ROOT / file).read_text()
        if source.count(old) == 1:
            yield Mutant(file, old, new, source.replace(old, new), tuple(entry["tests"]))
        else:
            print(f"stale     {named(file, old, new)} (the file has it {source.count(old)} times)")


# ----- running --------------------------------------------------------------------


def copy_tree() -> None:
    """The files that git knows or would add, and the built library; without CUDA sources, which take long to compile."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in [*listed.stdout.splitlines(), "mpkernels/_C.abi3.so"]:
        source, target = ROOT / name, TREE / name
        if source.is_file() and not (target.exists() and target.read_bytes() == source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def build() -> tuple[int, str]:
    for path in TREE.glob("csrc/**/*.cu"):
        path.unlink()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def run_tests(tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest in a fork: torch, which takes longer to import than most tests, is imported once."""
    log = TREE / "pytest.log"
    child = os.fork()
    if child == 0:
        signal.alarm(TIMEOUT)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(TREE)
        os.environ.update(PYTHONPATH=str(TREE), PYTHONDONTWRITEBYTECODE="1")
        sys.dont_write_bytecode = True
        sys.path[0] = str(TREE)
        os._exit(pytest.main(["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "-m", "not sweep and not release", *tests]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), log.read_text()


def outcome(mutant: Mutant, compiled: bool) -> str:
    path = TREE / mutant.file
    original = path.read_text()
    path.write_text(mutant.source)
    try:
        if compiled and build()[0]:
            return "does not compile"
        code, said = run_tests(mutant.tests)
        if code == pytest.ExitCode.USAGE_ERROR or code == pytest.ExitCode.NO_TESTS_COLLECTED:
            sys.exit(f"pytest ended with {code}:\n{said}")
        return "killed" if code else "survived"
    finally:
        path.write_text(original)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=["*"], help="sources, folders or globs; all in mutants.toml by default")
    parser.add_argument("--python", type=int, default=150, metavar="N", help="how many mutations of Python")
    parser.add_argument("--hours", type=float, default=3)
    parser.add_argument("--list", action="store_true", help="show the mutations and run none")
    arguments = parser.parse_args()

    table = tomllib.loads((ROOT / "tools" / "mutants.toml").read_text())
    wanted = lambda file: any(fnmatch(file, glob) or file.startswith(f"{glob}/") for glob in arguments.files)
    tests_of = {str(p.relative_to(ROOT)): tests for glob, tests in table["tests"].items() for p in sorted(ROOT.glob(glob))}
    python = [m for file, tests in tests_of.items() if wanted(file) for m in python_mutants(file, tuple(tests))]
    equivalent = {named(e["file"], e["old"], e["new"]) for e in table["equivalent"]}
    python = [m for m in sample(python, arguments.python) if m.name not in equivalent]
    cpp = [m for m in cpp_mutants(table["cpp"]) if wanted(m.file)]
    if arguments.list:
        print(*(m.name for m in [*python, *cpp]), sep="\n")
        return

    os.nice(5)
    copy_tree()
    before = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    known = {row["key"]: row["outcome"] for row in before if row["outcome"] != "survived"}
    end = time.monotonic() + arguments.hours * 3600
    counts, survivors = Counter(), []
    for language, mutants in (("Python", python), ("C++", cpp)):
        todo = [m for m in mutants if m.key not in known]
        if language == "C++" and todo and (failed := build())[0]:
            sys.exit(failed[1])
        for tests in {m.tests for m in todo}:
            if (failed := run_tests(tests))[0]:
                sys.exit(f"fails without a mutation: {tests}\n{failed[1]}")
        for mutant in mutants:
            result = known.get(mutant.key)
            if result is None and time.monotonic() < end:
                result = outcome(mutant, language == "C++")
                with RESULTS.open("a") as file:
                    file.write(json.dumps({"key": mutant.key, "name": mutant.name, "outcome": result}) + "\n")
            result = result or "not run"
            print(f"{result:9} {mutant.name}", flush=True)
            counts[language, result] += 1
            survivors += [mutant.name] if result == "survived" else []
    killed = sum(n for (_, result), n in counts.items() if result == "killed")
    print(*(f"survived: {name}" for name in survivors), sep="\n")
    print(", ".join(f"{language}: {n} {result}" for (language, result), n in sorted(counts.items())))
    share = killed / max(killed + len(survivors), 1)
    print(f"{share:.1%} of {killed + len(survivors)} killed, {BAR:.0%} wanted; {len(equivalent)} known as equivalent")
    sys.exit(share < BAR)


if __name__ == "__main__":
    main()
