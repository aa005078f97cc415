# SPDX-License-Identifier: Apache-2.0
"""Which cells a query over their metadata names.

A query comes from elsewhere: from a model's provenance, a run's configuration, a sheet. So it is parsed and computed
here, and nothing of it is handed to an evaluator. The language is the part of `DataFrame.query` that chooses rows:
names of columns (in backticks where they are no Python names), numbers, texts, lists, comparisons, ``in``, ``and``,
``or``, ``not``, ``&``, ``|``, ``~``, arithmetic, and the methods of `METHODS`.
"""

import ast
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from megacell.core.errors import UsageError
from megacell.store.sources.container import ROW_NAMES

Array = np.ndarray[Any, Any]
LONGEST, SHOWN = 10_000, 200  # characters of a query, and of one in a message
METHODS = ("isin", "isna", "notna", "str.contains", "str.startswith", "str.endswith")
_PIECE = re.compile(  # texts, with what is escaped in them; names in backticks; the words that pandas has for and, or
    r"""(?P<text>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|`(?P<name>[^`]+)`|(?P<word>[&|])""", re.DOTALL
)
_SPELLED = {"&": " and ", "|": " or "}
_QUOTED = "quoted_{}_"  # stands for a name in backticks while the query is parsed
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_COMPUTE: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip


class _Wrong(Exception):
    """What is wrong with a query, in words."""


def matching(query: str, columns: Sequence[str], read: Callable[[list[str]], pd.DataFrame], where: str) -> Array:
    """Return which cells a query over their metadata names: bool [cells].

    Parameters
    ----------
    query : str
        Such as ``cell_type == "B" and age > 50``. What is missing fulfils no comparison but ``!=``.
    columns : sequence of str
        Names that there are.
    read : callable
        Returns the frame of the columns that the query names, and of no others; "index" names the cells' own names.
    where : str
        For messages.

    Raises
    ------
    UsageError
        A query that cannot be understood or computed, or is no condition.
    """
    known = f"columns are {', '.join(columns)}" if columns else "there is no column"
    shown = repr(query if len(query) <= SHOWN else f"{query[:SHOWN]}…")
    try:
        tree, quoted = _parse(query)
        named = _names(tree, quoted)
        if unknown := sorted(named - {*columns, ROW_NAMES}):
            raise _Wrong(f"there is no column {unknown[0]!r}")
        frame = read([column for column in (*columns, ROW_NAMES) if column in named])
        found = _Query(frame, quoted).condition(tree)
    except _Wrong as error:
        raise UsageError(f"{where}: the query {shown} fails: {error}; {known}") from None
    except (ArithmeticError, TypeError, ValueError, RecursionError, MemoryError) as error:  # of values that do not fit
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{where}: the query {shown} fails: {line}; {known}") from None
    if not isinstance(found, pd.Series):
        raise UsageError(f"{where}: the query {shown} names no column; {known}")
    return found.astype("boolean").fillna(value=False).to_numpy(bool)


def _parse(query: str) -> tuple[ast.expr, dict[str, str]]:
    """Return a query's tree, and the columns that stood in backticks by what stands for them in it."""
    if len(query) > LONGEST:
        raise _Wrong(f"it has {len(query):,} characters, and {LONGEST:,} at most are taken")
    quoted: dict[str, str] = {}

    def spell(piece: re.Match[str]) -> str:
        if piece["word"]:
            return _SPELLED[piece["word"]]
        if not piece["name"]:
            return piece[0]
        stand_in = _QUOTED.format(len(quoted))
        quoted[stand_in] = piece["name"]
        return f" {stand_in} "

    try:
        return ast.parse(_PIECE.sub(spell, query).strip(), mode="eval").body, quoted
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        said = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply, or holds what is no text"
        raise _Wrong(f"it cannot be understood ({said})") from None


def _names(tree: ast.expr, quoted: dict[str, str]) -> set[str]:
    return {quoted.get(node.id, node.id) for node in ast.walk(tree) if isinstance(node, ast.Name)}


class _Query:
    """Computes a tree over a frame; a value is a Series [cells], a constant, or a list of constants."""

    def __init__(self, frame: pd.DataFrame, quoted: dict[str, str]) -> None:
        self._quoted = quoted
        index = pd.Series(frame.index).reset_index(drop=True)
        self._columns = {ROW_NAMES: index, **{str(c): frame[c].reset_index(drop=True) for c in frame.columns}}

    def condition(self, node: ast.expr) -> Any:
        """Return a part of the query that has to be true or false, by cell or for all."""
        value = self.value(node)
        kind = pd.api.types.infer_dtype(value, skipna=True) if isinstance(value, pd.Series) else type(value).__name__
        if kind not in ("boolean", "empty", "bool"):
            raise _Wrong(f"{ast.unparse(node)[:80]!r} is no condition on cells; compare it with something")
        return value.astype("boolean") if isinstance(value, pd.Series) else value

    def value(self, node: ast.expr) -> Any:
        """Return the value of a part of the query."""
        match node:
            case ast.Name(id=name):
                return self._columns[self._quoted.get(name, name)]
            case ast.Constant(value=bool() | int() | float() | str() | None as constant):
                return constant
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return [self._constant(part) for part in parts]
            case ast.BoolOp(op=op, values=parts):
                join = operator.and_ if isinstance(op, ast.And) else operator.or_
                joined = self.condition(parts[0])
                for part in parts[1:]:
                    joined = join(joined, self.condition(part))
                return joined
            case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=part):
                value = self.condition(part)
                return ~value if isinstance(value, pd.Series) else not value
            case ast.UnaryOp(op=ast.USub(), operand=part):
                return -self._number(part)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _COMPUTE:
                return self._computed(self._number(left), op, self._number(right))
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self._compared(left, ops, others)
            case ast.Call(func=ast.Attribute()):
                return self._called(node)
        raise _Wrong(f"{ast.unparse(node)[:80]!r} is not part of a query; methods that are: {', '.join(METHODS)}")

    def _constant(self, node: ast.expr) -> Any:
        value = self.value(node)
        if isinstance(value, pd.Series | list):
            raise _Wrong(f"a list holds numbers and texts, not {ast.unparse(node)[:80]!r}")
        return value

    def _number(self, node: ast.expr) -> Any:
        value = self.value(node)
        if isinstance(value, pd.Series) and pd.api.types.is_numeric_dtype(value.dtype):
            return value
        if isinstance(value, int | float):
            return value
        raise _Wrong(f"{ast.unparse(node)[:80]!r} is no number")

    @staticmethod
    def _computed(left: Any, op: ast.operator, right: Any) -> Any:
        if not isinstance(left, pd.Series) and not isinstance(right, pd.Series):
            left, right = float(left), float(right)  # whole numbers of Python grow without bound
        return _COMPUTE[type(op)](left, right)

    def _compared(self, left: ast.expr, ops: Sequence[ast.cmpop], others: Sequence[ast.expr]) -> Any:
        """Return a comparison, which may be a chain: ``18 < age <= 65``."""
        found: Any = True
        one = self.value(left)
        for op, node in zip(ops, others, strict=True):
            other = self.value(node)
            found = found & self._pair(one, op, other, ast.unparse(left)[:80])
            one, left = other, node
        return found

    @staticmethod
    def _pair(one: Any, op: ast.cmpop, other: Any, text: str) -> Any:
        if isinstance(op, ast.In | ast.NotIn) or isinstance(other, list):
            if not isinstance(one, pd.Series) or not isinstance(other, list):
                raise _Wrong(f"a column is asked for in a list of values: {text} in ['a', 'b']")
            if not isinstance(op, ast.In | ast.NotIn | ast.Eq | ast.NotEq):
                raise _Wrong(f"{text!r} is compared with a list; ask for one value, or with in")
            inside = one.isin(other)
            return ~inside if isinstance(op, ast.NotIn | ast.NotEq) else inside
        if type(op) not in _COMPARE or isinstance(one, list):
            raise _Wrong(f"the comparison of {text!r} is not part of a query")
        if isinstance(one, pd.Series) and isinstance(other, pd.Series) and one.dtype != other.dtype:
            one, other = (x.astype(object) if x.dtype == "category" else x for x in (one, other))
        return _COMPARE[type(op)](one, other)

    def _called(self, node: ast.Call) -> Any:
        """Return what one of `METHODS` gives of a column."""
        target: ast.expr = node.func
        path: list[str] = []
        while isinstance(target, ast.Attribute):
            path.insert(0, target.attr)
            target = target.value
        method = ".".join(path)
        if method not in METHODS or not isinstance(target, ast.Name) or node.keywords:
            raise _Wrong(f"{ast.unparse(node)[:80]!r} is not part of a query; methods that are: {', '.join(METHODS)}")
        column, given = self.value(target), [self.value(each) for each in node.args]
        match method, given:
            case "isna", []:
                return column.isna()
            case "notna", []:
                return column.notna()
            case "isin", [list(values)]:
                return column.isin(values)
            case (("str.contains" | "str.startswith" | "str.endswith"), [str(text)]):
                return self._text(column, method, text)
        takes = {"isna": "nothing", "notna": "nothing", "isin": "a list"}.get(method, "a text")
        raise _Wrong(f"{method}() takes {takes}")

    @staticmethod
    def _text(column: pd.Series, method: str, text: str) -> pd.Series:
        if method == "str.contains" and re.search(r"[\^$*+?{}\[\]\\|()]", text):
            raise _Wrong("str.contains looks for a text as it stands, and takes no regular expression")
        texts = column.astype(object).where(column.notna(), "").astype(str).str
        if method == "str.contains":
            found = texts.contains(text, regex=False)
        else:
            found = texts.startswith(text) if method == "str.startswith" else texts.endswith(text)
        return found & column.notna()
