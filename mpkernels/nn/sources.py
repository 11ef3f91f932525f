# SPDX-License-Identifier: Apache-2.0
"""What the source of a forward says: whether it has one path only, so that one trace shows all that it does."""

import ast
import builtins
import functools
import inspect
import linecache
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType

from torch import nn

_BRANCHES = (
    ast.If, ast.IfExp, ast.BoolOp, ast.While, ast.Try, ast.TryStar, ast.Match, ast.Lambda, ast.FunctionDef, ast.Yield
)  # fmt: skip
_ALL_MODULES = {"children", "named_children", "modules", "named_modules", "get_submodule", "_modules"}


def has_branches(module: nn.Module) -> bool:
    """Whether `module.forward`, or a function of the model's own that it calls, has another path than the one traced.

    True as well where there is no source, and where it keeps something in an attribute, which a trace does not show.
    """
    return any(node is None or _is_branched(node, module) for _, node in _reached(type(module)))


def read_elsewhere(classes: Sequence[type], attribute: str) -> bool:
    """Whether a method that no forward reaches may call what `self.<attribute>` is. Its parameters do not count.

    classes: of the modules from the root to the one that has the attribute.
    """
    helpers = {function.__name__ for function, _ in _reached(classes[-1])} - {"forward"}
    sought = {attribute} | helpers | _ALL_MODULES
    return any(node is None or sought & _named(node) for cls in classes for node in map(_definition, _unreached(cls)))


def _unreached(cls: type) -> list[FunctionType]:
    """The methods of the model's own classes that `cls.forward` does not reach, but for `__init__`.

    NOTE: transformers puts one into nn.Module itself.
    """
    own = [base for base in reversed(cls.__mro__) if not base.__module__.startswith("torch.")]
    members = {name: member for base in own for name, member in vars(base).items()}
    methods = [getattr(member, "fget", None) or getattr(member, "__func__", member) for member in members.values()]
    known = [members.get("__init__"), *(function for function, _ in _reached(cls))]
    return [f for f in methods if isinstance(f, FunctionType) and f not in known]


def _named(node: ast.FunctionDef) -> set:
    """Attributes and strings in a function, but for attributes of which it takes the weight or the bias."""
    parts = list(_parts(node))
    attributes = {part for part in parts if isinstance(part, ast.Attribute)}
    attributes -= {part.value for part in attributes if part.attr in ("weight", "bias")}
    return {part.attr for part in attributes} | {part.value for part in parts if isinstance(part, ast.Constant)}


def _reached(cls: type) -> Iterator[tuple[Callable | None, ast.FunctionDef | None]]:
    """`cls.forward` and the functions of the model's own that it calls, with their definitions, None without source."""
    todo, seen = [getattr(cls, "forward", None)], set()
    while todo:
        function = todo.pop()
        if function in seen:
            continue
        seen.add(function)
        node = _definition(function)
        yield function, node
        for part in _parts(node) if node is not None else ():
            called = _resolve(part, cls, function) if isinstance(part, ast.Name | ast.Attribute) else None
            if isinstance(called, FunctionType) and not called.__module__.startswith("torch."):
                todo.append(called)


def _parts(node: ast.FunctionDef) -> Iterator[ast.AST]:
    return (part for statement in node.body for part in ast.walk(statement))


def _is_branched(node: ast.FunctionDef, module: nn.Module) -> bool:
    parts = list(_parts(node))
    loops = [part for part in parts if isinstance(part, ast.For | ast.comprehension)]
    counted = {part.id for loop in loops for part in ast.walk(loop.target) if isinstance(part, ast.Name)}
    assigned = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)} - counted
    called = [part.func for part in parts if isinstance(part, ast.Call)]
    return (
        any(isinstance(part, _BRANCHES) or _is_kept(part) for part in parts)
        or not all(_over_modules(loop, module) for loop in loops)
        or any(_may_vary(function, assigned, counted) or _is_state(function, module) for function in called)
    )


def _is_kept(part: ast.AST) -> bool:
    return isinstance(part, ast.Attribute | ast.Subscript) and isinstance(part.ctx, ast.Store)


def _may_vary(function: ast.expr, assigned: set[str], counted: set[str]) -> bool:
    """Whether what is called is computed: `{True: torch.relu, False: F.gelu}[self.training]`, or a variable that holds it."""
    if isinstance(function, ast.Subscript) and isinstance(function.value, ast.Attribute):  # self.layers[0]
        index = function.slice.operand if isinstance(function.slice, ast.UnaryOp) else function.slice
        return not (isinstance(index, ast.Constant) or (isinstance(index, ast.Name) and index.id in counted))
    return function.id in assigned if isinstance(function, ast.Name) else not isinstance(function, ast.Attribute)


def _is_state(expression: ast.expr, module: nn.Module) -> bool:
    """Whether it starts from a plain attribute of a module: another function, or list, may stand there later."""
    path = []
    while isinstance(expression, ast.Attribute | ast.Subscript):
        path += [expression.attr] if isinstance(expression, ast.Attribute) else []
        expression = expression.value
    if not (isinstance(expression, ast.Name) and expression.id == "self"):
        return False
    for name in reversed(path):
        if name in vars(module):
            return True
        module = module._modules.get(name)
        if module is None:
            return False
    return False


def _over_modules(loop: ast.For | ast.comprehension, module: nn.Module) -> bool:
    """Whether it runs over modules that are an attribute of self, as a loop over layers does, and over all of them."""
    iterated = loop.iter
    if isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Name) and iterated.func.id == "enumerate":
        iterated = iterated.args[0]
    over_self = isinstance(iterated, ast.Attribute) and isinstance(iterated.value, ast.Name) and iterated.value.id == "self"
    return over_self and not _is_state(iterated, module) and not getattr(loop, "ifs", ())


def _resolve(name: ast.expr, cls: type, function):
    """What a (dotted) name stands for: a method after `self`, else a global; None for what is not known before a call."""
    if isinstance(name, ast.Name):
        return inspect.unwrap(function).__globals__.get(name.id, getattr(builtins, name.id, None))
    if not isinstance(name, ast.Attribute):
        return None
    if isinstance(name.value, ast.Name) and name.value.id == "self":
        return inspect.getattr_static(cls, name.attr, None)
    if isinstance(name.value, ast.Call) and isinstance(name.value.func, ast.Name) and name.value.func.id == "super":
        above = [vars(base) for base in cls.__mro__]
        while above and function not in above.pop(0).values():
            pass
        return next((names[name.attr] for names in above if name.attr in names), None)
    owner = _resolve(name.value, cls, function)
    return None if owner is None else getattr(owner, name.attr, None)


def _definition(function) -> ast.FunctionDef | None:
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    found = _definitions(code.co_filename) if code is not None else {}
    return found.get((code.co_name, code.co_firstlineno)) if found else None


@functools.lru_cache(maxsize=64)
def _definitions(filename: str) -> dict[tuple[str, int], ast.FunctionDef]:
    """Every function of a file by its name and first line."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:  # not a file of Python
        return {}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {(f.name, min([f.lineno, *(d.lineno for d in f.decorator_list)])): f for f in functions}
