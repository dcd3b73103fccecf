"""What a mutation is: one small change of a source file, by rule from its syntax tree.

Five operators: a comparison turned, an integer off by one, an argument dropped, a branch removed, operands swapped. Not
changed, since no test could say that another one would be wrong: docstrings and annotations; what a `raise` says;
`assert` and `strict=`, which check and do not compute; decorators and bases; a setting that is a plain constant (a
default, a constant of the module), which is a choice.
"""

import ast
from collections.abc import Callable, Iterator
from typing import NamedTuple

TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ORDERED = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)  # a - b is not b - a
EXTREMES = ("min", "max", "minimum", "maximum")  # of two; they take their arguments in any order
# After the first: swapped, they are no program at all.
UNORDERED = (*EXTREMES, "array_equal", "isinstance", "hasattr", "getattr", "cast", "map", "partial")


class Mutant(NamedTuple):
    """`before` in a line of a scope (the function or class it is in) becomes `after`.

    nth: of those that read alike. make: the whole file's tree with this change.
    """

    file: str
    scope: str
    number: int
    line: str
    operator: str
    before: str
    after: str
    nth: int
    make: Callable[[], ast.Module]

    @property
    def change(self) -> str:
        """What is in the list of accepted ones, and in the table."""
        return f"{self.before} -> {self.after}"

    @property
    def key(self) -> str:
        """All that tells it from others but its line's number: an edit elsewhere in the file leaves it as it is."""
        return "|".join([self.file, self.scope, self.line, self.operator, self.change, str(self.nth)])


class _Place(NamedTuple):
    """A change in the tree: this node becomes that one (None: it goes). parts: what is shown of them."""

    operator: str
    node: ast.AST
    new: ast.AST | None
    parts: tuple[str, str]


def mutants_of(file: str, source: str) -> list[Mutant]:
    """Every mutant of a source, in the order of its text."""
    lines, seen, found = source.splitlines(), {}, []
    for index, (scope, number, place) in enumerate(_places(ast.parse(source))):
        line = lines[number - 1].strip()
        alike = (scope, line, place.operator, *place.parts)
        seen[alike] = nth = seen.get(alike, -1) + 1
        found.append(Mutant(file, *alike[:1], number, line, place.operator, *place.parts, nth, _maker(source, index)))
    return found


def _maker(source: str, index: int) -> Callable[[], ast.Module]:
    def make() -> ast.Module:
        tree = ast.parse(source)
        places = list(_places(tree))
        place = places[index][2]
        return ast.fix_missing_locations(_Put(place.node, place.new).visit(tree))

    return make


class _Put(ast.NodeTransformer):
    def __init__(self, node: ast.AST, new: ast.AST | None):
        self._node, self._new = node, new

    def visit(self, node: ast.AST) -> ast.AST | None:
        return self._new if node is self._node else self.generic_visit(node)


def _places(tree: ast.Module) -> Iterator[tuple[str, int, _Place]]:
    """(scope, line number, the change) of each; the same order whenever the same source is parsed."""
    yield from _inside(tree, "", None)


def _inside(node: ast.AST, scope: str, number: int | None) -> Iterator[tuple[str, int, _Place]]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        scope = f"{scope}.{node.name}" if scope else node.name
    # Positions within an f-string differ between versions of Python: that of the whole is taken.
    own = getattr(node.iter if isinstance(node, ast.comprehension) else node, "lineno", number)
    own = own if number is None else number
    for place in _changes(node):
        yield scope, own or getattr(place.node, "lineno", 1), place
    for child in _children(node):
        yield from _inside(child, scope, own if isinstance(node, ast.JoinedStr) else number)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """What of a node may be changed."""
    match node:
        case ast.Raise() | ast.Assert() | ast.Import() | ast.ImportFrom():
            return
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield from node.body
        case ast.Lambda():
            yield node.body
        case ast.AnnAssign():
            if node.value is not None and not isinstance(node.value, ast.Constant):
                yield node.value
        case ast.Module():
            yield from (one for one in node.body if not _is_setting(one))
        case ast.Expr(ast.Constant()):
            return
        case ast.FormattedValue():
            yield node.value
        case ast.Subscript() if isinstance(node.value, ast.Name) and node.value.id[:1].isupper():
            return  # a type
        case _:
            yield from ast.iter_child_nodes(node)


def _is_setting(node: ast.stmt) -> bool:
    """NAME = a constant, several of them, or what is called with nothing else."""
    if not isinstance(node, ast.Assign):
        return False
    match node.value:
        case ast.Tuple(elts=values) | ast.Call(args=values, keywords=[]):
            return all(isinstance(value, ast.Constant) for value in values)
    return isinstance(node.value, ast.Constant)


def _changes(node: ast.AST) -> Iterator[_Place]:
    match node:
        case ast.Compare():
            yield from _turned(node)
        case ast.UnaryOp(ast.Not()):
            yield _place("comparison turned", node, node.operand)
        case ast.Constant(int(value)) if not isinstance(value, bool):
            yield from _off_by_one(node, value)
        case ast.Slice():
            yield from _edges([edge for edge in (node.lower, node.upper) if edge is not None])
        case ast.BinOp():
            yield from _arithmetic(node)
        case ast.BoolOp():
            for at in range(len(node.values)):
                rest = [value for other, value in enumerate(node.values) if other != at]
                yield _place("branch removed", node, rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))
        case ast.JoinedStr():
            yield from _formatted(node)
        case ast.If():
            yield from _branches(node)
        case ast.IfExp():
            yield _place("branch removed", node, node.body)
            yield _place("branch removed", node, node.orelse)
        case ast.comprehension():
            yield from _filters(node)
            yield from _elements(node.iter)
        case ast.For():
            yield from _elements(node.iter)
        case ast.Call():
            yield from _call(node)


def _place(operator: str, node: ast.AST, new: ast.AST, parts: tuple[str, str] | None = None) -> _Place:
    return _Place(operator, node, new, parts or (_shown(node), _shown(new)))


def _shown(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split()).replace('"', "'")  # which quotes are chosen differs between versions


def _turned(node: ast.Compare) -> Iterator[_Place]:
    for at, op in enumerate(node.ops):
        ops = [*node.ops[:at], TURNED[type(op)](), *node.ops[at + 1 :]]
        yield _place("comparison turned", node, ast.Compare(node.left, ops, node.comparators))


def _off_by_one(node: ast.Constant, value: int) -> Iterator[_Place]:
    yield _place("off by one", node, ast.Constant(value + 1))
    if value > 0:
        yield _place("off by one", node, ast.Constant(value - 1))


def _edges(edges: list[ast.expr]) -> Iterator[_Place]:
    for edge in edges:
        if not isinstance(edge, ast.Constant):
            yield _place("off by one", edge, ast.BinOp(edge, ast.Add(), ast.Constant(1)))


def _arithmetic(node: ast.BinOp) -> Iterator[_Place]:
    dropped = "branch removed" if isinstance(node.op, ast.BitAnd | ast.BitOr) else "argument dropped"
    yield _place(dropped, node, node.left)
    if not isinstance(node.op, ORDERED):
        yield _place(dropped, node, node.right)
    elif not _same(node.left, node.right):
        yield _place("operands swapped", node, ast.BinOp(node.right, node.op, node.left))


def _formatted(node: ast.JoinedStr) -> Iterator[_Place]:
    for value in node.values:
        if isinstance(value, ast.FormattedValue) and len(node.values) > 1:
            shown = f"{{{_shown(value.value)}}}"
            yield _place("argument dropped", value, ast.Constant(""), (f"'...{shown}...'", "'......'"))


def _branches(node: ast.If) -> Iterator[_Place]:
    test = _shown(node.test)
    yield _place(
        "branch removed", node, ast.If(node.test, [ast.Pass()], node.orelse), (f"if {test}: ...", "its body goes")
    )
    if node.orelse:
        yield _place(
            "branch removed", node, ast.If(node.test, node.body, []), (f"if {test}: ... else: ...", "its else goes")
        )


def _filters(node: ast.comprehension) -> Iterator[_Place]:
    for at, test in enumerate(node.ifs):
        rest = [*node.ifs[:at], *node.ifs[at + 1 :]]
        new = ast.comprehension(node.target, node.iter, rest, node.is_async)
        yield _place("branch removed", node, new, (f"for ... if {_shown(test)}", "for ..."))


def _elements(node: ast.expr) -> Iterator[_Place]:
    """Of a list or tuple that is written where it is used."""
    if isinstance(node, ast.List | ast.Tuple) and len(node.elts) > 1:
        for at in range(len(node.elts)):
            rest = [*node.elts[:at], *node.elts[at + 1 :]]
            new = ast.List(rest, ast.Load()) if isinstance(node, ast.List) else ast.Tuple(rest, ast.Load())
            yield _place("argument dropped", node, new, (f"(..., {_shown(node.elts[at])}, ...)", "(...)"))


def _call(node: ast.Call) -> Iterator[_Place]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    plain = not any(isinstance(arg, ast.Starred) for arg in node.args)
    if name == "range":
        yield from _edges(node.args)
    for at, keyword in enumerate(node.keywords):
        if keyword.arg not in (None, "strict"):
            rest = [*node.keywords[:at], *node.keywords[at + 1 :]]
            whole, parts = ast.Call(node.func, node.args, rest), f"{name}(..., {_shown(keyword)})"
            yield _place("argument dropped", node, whole, (parts, f"{name}(...)"))
    for arg in node.args:
        yield from _elements(arg)
    if not plain or len(node.args) < 2:
        return
    if name == "where" and len(node.args) == 3:
        test, yes, no = node.args
        yield _place("branch removed", node, yes)
        yield _place("branch removed", node, no)
        yield _place("operands swapped", node, ast.Call(node.func, [test, no, yes], node.keywords))
    elif name in EXTREMES and len(node.args) == 2:
        yield from (_place("argument dropped", node, arg) for arg in node.args)
    elif name not in UNORDERED:
        first, second, *rest = node.args
        yield _place("operands swapped", node, ast.Call(node.func, [second, first, *rest], node.keywords))


def _same(one: ast.expr, other: ast.expr) -> bool:
    return ast.dump(one) == ast.dump(other)
