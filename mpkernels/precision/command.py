# SPDX-License-Identifier: Apache-2.0
"""`python -m mpkernels advise script.py:make` and `python -m mpkernels plan script.py:make`."""

import argparse
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpkernels.precision.advise import advise
from mpkernels.precision.plan import plan


def main(command: str, arguments: list[str]) -> int:
    """0, or 1 with a sentence where the arguments, or the model, are not what they must be."""
    returns = {"advise": "(model, step)", "plan": "(make_model, make_batch)"}[command]
    parser = argparse.ArgumentParser(
        prog=f"python -m mpkernels {command}", description=f"mpk.{command}, as its docstring says."
    )
    parser.add_argument("script", metavar="SCRIPT.py:FUNCTION", help=f"a function without arguments that returns {returns}")
    parser.add_argument("--policies", nargs="+", metavar="POLICY")
    parser.add_argument("--memory", type=float, metavar="BYTES")
    if command == "advise":
        parser.add_argument("--loss-scale", type=float, metavar="SCALE")
        parser.add_argument("--loss-budget", type=float, metavar="CHANGE")
        parser.add_argument("--json", action="store_true", help="print all numbers as JSON instead of a table")
        parser.add_argument("--html", metavar="FILE", help="write the picture of the ranges too")
    else:
        parser.add_argument("--optimizers", nargs="+", metavar="NAME")
        parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="N")
    given = vars(parser.parse_args(arguments))
    script, as_json, html = given.pop("script"), given.pop("json", False), given.pop("html", None)
    options = {name: value for name, value in given.items() if value is not None}
    try:
        first, second = function_of(script)()
        found = (advise if command == "advise" else plan)(first, second, **options)
    except (RuntimeError, TypeError, ValueError, OSError, AttributeError, SyntaxError) as error:
        print(error, file=sys.stderr)
        return 1
    print(found.to_json() if as_json else found)
    if command == "advise" and not as_json:
        print(*("\n" + found.why(name) for name in found.policy), sep="")
    if html is not None:
        found.to_html(html)
    return 0


def function_of(script: str) -> Callable[[], Any]:
    """The function that `path.py:name` says; the file is run as a module that is not `__main__`."""
    path, _, name = script.rpartition(":")
    if not path or not name:
        raise ValueError(f"expected SCRIPT.py:FUNCTION, got {script!r}")
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    sys.path.insert(0, str(Path(path).resolve().parent))  # what it imports lies beside it
    names = runpy.run_path(path)
    if name not in names:
        raise ValueError(f"{path} has no {name!r}")
    return names[name]
