# SPDX-License-Identifier: Apache-2.0
"""The house rules that a reader relies on: imports run one way, files are short and in the words of the field."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import mpkernels
from mpkernels.runtime import resolve
from tests.paths import ROOT

PACKAGE = ROOT / "mpkernels"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PACKAGE.rglob("*.py")
}
PYTHON = [p for folder in ("mpkernels", "tests", "bench", "examples", "tools", "hub") for p in (ROOT / folder).rglob("*.py")]
NATIVE = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h")]
MOST_LINES, MOST_LINES_OF_TESTS, MOST_LINES_OF_A_CLASS = 350, 600, 250

# Home-made terms for which the field has a word. To use instead: negative bit, FusedBackwardLink, TileConfig, partial tiles,
# producer and consumer warpgroups, WorkTile, ThreadCoord, ld.global.nc and ld.global.cs, non-temporal stores, prefetch,
# stochastic_round, segment, dot-product, MicroKernels, swap in, is_fresh, reason, alternate or interleave, CPU launch overhead,
# noise, user-facing, target, implementation or baseline, % of roofline, copy, emulator or fake, and the name of the thing.
BANNED_WORDS = {
    "seam", "seams", "scrambled", "piece", "pieces", "lend", "lends", "lent", "lending", "loan", "loans", "mastered", "refusal",
    "refusals", "luck", "lucky", "somebody", "nobody", "anybody", "everybody", "someone", "anyone", "everyone", "whoever",
    "whomever", "promise", "promises", "promised", "promising", "contender", "contenders",
}  # fmt: skip
BANNED_NAMES = {"Cut", "Ring", "Work", "Schedule", "Place", "KeepInCache", "PassCache", "Runs", "Loops", "NotNow", "NOWHERE"}
BANNED_PHRASES = (
    "put off", "finds fault", "ragged tile", "ragged edge", "ragged row", "loading warpgroup", "gives the rest away",
    "cuda words", "words of the cuda", "words of sm_90a", "past the cache", "fetches ahead", "by pairs", "multiply pairs",
    "multiplies pairs", "no right there", "take turns", "takes turns", "taking turns", "took turns", "costs the host",
    "host's time", "for people", "of the limit", "tell of ", "tells of ", "stand-in", "stand_in", "moved_up", "fence_stores",
    "to_either_side", "are_large", "least_of", "_let_grads_go", "_follow_foreign_writes", "ask_again",
)  # fmt: skip

# What a module may import of ours, by where it lies; the first prefix that fits decides.
RANKS = {
    "mpkernels.policy": 0,
    "mpkernels.testing.timing": 0,
    "mpkernels.runtime.op": 1,
    "mpkernels.runtime": 0,
    "mpkernels.ops": 2,
    "mpkernels": 3,
}
ALONE = ("mpkernels.policy", "mpkernels.runtime.compute_copy")


@functools.cache
def imports_of(module: str, *, at_import: bool = False) -> frozenset[str]:
    """Full names of the modules that `module` imports, of ours and others; `at_import`: not those inside functions."""
    tree = ast.parse(MODULES[module].read_text())
    found, todo = set(), [tree]
    while todo:
        node = todo.pop()
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        todo += ast.iter_child_nodes(node)
    return frozenset(found)


def module_of(op, implementation) -> str:
    """As mpkernels/runtime/op.py says it."""
    return f"{op.package}.{implementation.module or implementation.backend}"


IMPLEMENTATIONS = {module_of(op, implementation) for op in resolve.ops.values() for implementation in op.implementations}


def ours(names) -> set[str]:
    return {name for name in names if name.split(".")[0] == "mpkernels"}


def rank(module: str) -> int:
    return next(r for prefix, r in RANKS.items() if module == prefix or module.startswith(f"{prefix}."))


# ----- imports ---------------------------------------------------------------


@pytest.mark.parametrize("module", sorted(MODULES))
def test_layout_imports_run_one_way(module):
    """nn, functional, optim, amp, tune -> ops -> runtime.op -> runtime; policy and compute_copy are for the first of these."""
    for imported in ours(imports_of(module)):
        assert rank(imported) <= rank(module), f"{module} imports {imported}"
        assert imported not in ALONE or rank(module) == RANKS["mpkernels"], f"{module} imports {imported}"


@pytest.mark.parametrize("module", ALONE)
def test_layout_imports_nothing_of_ours(module):
    others = {name.split(".")[0] for name in imports_of(module)} - set(sys.stdlib_module_names)
    assert others == {"torch"}


def test_layout_imports_have_no_cycle():
    graph = {module: ours(imports_of(module, at_import=True)) - {module} for module in MODULES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", sorted(IMPLEMENTATIONS))
def test_layout_implementations_do_not_know_each_other(module):
    assert not ours(imports_of(module)) & IMPLEMENTATIONS


@pytest.mark.parametrize("module", sorted(MODULES))
def test_layout_references_are_not_imported(module):
    """A reference is for tests, bench, proof and tuner: the package imports none when it is imported, nor bounds and cases."""
    if not module.startswith("mpkernels.testing"):
        found = ours(imports_of(module, at_import=True)) - {"mpkernels.testing.timing"}
        assert not {name for name in found if name.endswith(".reference") or name.startswith("mpkernels.testing")}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_layout_needs_torch_only(module):
    """numpy is for references and what holds results against them, triton and transformers for files named after them."""
    allowed = {"torch", "mpkernels", *sys.stdlib_module_names}
    allowed |= {"numpy"} if module.endswith(".reference") or module.startswith("mpkernels.testing.") else set()
    allowed |= {name for name in ("triton", "transformers") if name in module}
    assert {name.split(".")[0] for name in imports_of(module, at_import=True)} <= allowed


def test_layout_declares_what_it_needs():
    """Triton and transformers may be absent; whatever else a module imports is installed with the wheel."""
    found = {name.split(".")[0] for module in MODULES for name in imports_of(module, at_import=True)}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    needed = found - set(sys.stdlib_module_names) - {"mpkernels", "triton", "transformers"}
    assert {re.match(r"[a-z]+", name)[0] for name in declared} == needed


def test_layout_ops_have_their_files():
    folders = [path for path in (PACKAGE / "ops").iterdir() if path.name != "common" and any(path.glob("*.py"))]
    assert folders
    for folder in folders:
        for name in ("__init__.py", "reference.py"):
            assert (folder / name).exists(), folder / name
    for op in resolve.ops.values():
        assert "eager" in op.backends
        assert all(module_of(op, implementation) in MODULES for implementation in op.implementations), op.name


# ----- what a file or a network could run -----------------------------------------------------

_FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "socket", "urllib", "http", "ftplib", "ssl", "asyncio", "requests"}
_FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "pickle.loads",
    "pickle.load",
}


def dangers_of(source: str) -> set[str]:
    """What in a source could run text or reach a network: forbidden imports, calls and keywords."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {name for name in names if name.split(".")[0] in _FORBIDDEN_MODULES}
        if isinstance(node, ast.Call):
            found |= {ast.unparse(node.func)} & _FORBIDDEN_CALLS
            for keyword in node.keywords:
                found |= {ast.unparse(keyword)} & {"shell=True", "weights_only=False", "trust_remote_code=True"}
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_layout_runs_no_text_and_reaches_no_network(module):
    """Files are JSON, or the user's to load: no pickle, no eval, no shell."""
    assert not dangers_of(MODULES[module].read_text())


def test_layout_finds_what_runs_text():
    source = """
import pickle, urllib.request as u
from socket import create_connection
def f(path):
    return eval(path), torch.load(path, weights_only=False), subprocess.run(path, shell=True)
"""
    expected = {"pickle", "urllib.request", "socket", "eval", "torch.load", "weights_only=False", "shell=True"}
    assert dangers_of(source) == expected


# ----- files ---------------------------------------------------------------


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_layout_python_headers(path):
    """The SPDX line, then a docstring that says what the file is."""
    text = path.read_text()
    assert text.startswith('# SPDX-License-Identifier: Apache-2.0\n"""')
    assert (ast.get_docstring(ast.parse(text)) or "").strip()


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: str(p.relative_to(ROOT)))
def test_layout_native_headers(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "// SPDX-License-Identifier: Apache-2.0"
    assert lines[1].startswith("// ")


def texts() -> list:
    """Sources and pages; not this file, which has the words."""
    kinds = (".py", ".cpp", ".cu", ".cuh", ".h", ".sh", ".toml", ".md", ".yml", ".ipynb")
    folders = ("mpkernels", "csrc", "tests", "bench", "tools", "docs", "examples", "hub", "notebooks", ".ci", ".github")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    return sorted({*found, *ROOT.glob("*.md"), *ROOT.glob("*.py"), ROOT / "Makefile"} - {Path(__file__).resolve()})


def banned_in(text: str) -> set[str]:
    """Words, names and phrases, wherever lines break; `_` parts the words of a name."""
    lower, words = " ".join(text.lower().split()), re.findall(r"[A-Za-z0-9]+", text)
    found = {word for word in words if word.lower() in BANNED_WORDS} | {phrase for phrase in BANNED_PHRASES if phrase in lower}
    return found | BANNED_NAMES.intersection(re.findall(r"\w+", text))


def test_layout_uses_the_words_of_the_field():
    found = {str(path.relative_to(ROOT)): banned_in(path.read_text()) for path in texts()}
    assert not {path: words for path, words in found.items() if words}


@pytest.mark.parametrize("text", ["by the luck of", "they take\n    turns", "Whoever", "class Runs:", "a_stand_in", "Lent"])
def test_layout_knows_home_made_words(text):
    assert banned_in(text)


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_layout_files_and_classes_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= (MOST_LINES_OF_TESTS if path.is_relative_to(ROOT / "tests") else MOST_LINES)
    classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    assert not [node.name for node in classes if node.end_lineno - node.lineno >= MOST_LINES_OF_A_CLASS]


# ----- schemas ---------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(resolve.ops))
def test_layout_schemas_have_no_text(name):
    """A `str` argument of a compiled op leaks: enums are ints."""
    schema = getattr(torch.ops.mpkernels, name).default._schema
    assert schema.arguments
    assert not [a.name for a in schema.arguments if "str" in str(a.type)]


@pytest.mark.parametrize("name", sorted(resolve.ops))
def test_layout_ops_that_write_say_so(name):
    """Names of ops that write end with `_`; they return nothing, the others write nothing."""
    schema = getattr(torch.ops.mpkernels, name).default._schema
    assert schema.is_mutable == name.endswith("_")
    assert bool(schema.returns) != schema.is_mutable


# ----- import ---------------------------------------------------------------

IMPORT = """
import os, sys
import torch
if HIDE_TRITON:
    sys.modules["triton"] = None
bad = []
def hook(event, args):
    if event in ("os.putenv", "os.unsetenv", "os.mkdir", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
        bad.append((event, str(args)[:200]))
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        bad.append((event, str(args)[:200]))
sys.addaudithook(hook)
environment = dict(os.environ)
import mpkernels
assert not bad, bad
assert dict(os.environ) == environment
assert not torch.cuda.is_initialized()
new = [m for m in sys.modules if m.startswith(("torch._inductor", "torch.utils.cpp_extension"))]
assert not new, new
assert not [m for m in sys.modules if m.startswith("mpkernels.") and (m in IMPLEMENTATIONS or m.endswith(".reference"))]
assert not [m for m in sys.modules if m.startswith("mpkernels.testing.") and m != "mpkernels.testing.timing"]
x = torch.ones(2, 3)
assert mpkernels.functional.linear_act(x, x).shape == (2, 2)
assert mpkernels.is_available("eager")
if HIDE_TRITON:
    assert not mpkernels.is_available("triton")
    assert mpkernels.why_not("triton").startswith("triton is not installed")
print("done")
"""


@pytest.mark.parametrize("hide_triton", [False, True], ids=["as it is", "without triton"])
def test_layout_import_does_no_work(hide_triton):
    """No CUDA, no compiler, no process, no file, no environment; and it needs no triton."""
    script = f"HIDE_TRITON, IMPLEMENTATIONS = {hide_triton}, {IMPLEMENTATIONS}\n{IMPORT}"
    result = subprocess.run([sys.executable, "-B", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "done\n", result.stderr


def test_layout_version_is_the_projects():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert mpkernels.__version__ == version[1]
