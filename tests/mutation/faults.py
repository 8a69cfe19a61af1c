"""What a fault is, where the code can have one, and how it is put in.

A fault is a swapped comparison, sum, product or connective, a condition turned round, a number one larger.
"""

import ast
import copy
import random

SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
         ast.Mult: ast.FloorDiv, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}


def places(tree):
    """What can be changed in a module: (node, name of what) in the order of the source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield node, "comparison"
        elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS and not _is_text(node):
            yield node, "operator"
        elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield node, "condition"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node, "number"


def _is_text(node):
    """Whether an operation is about strings, where another operator is a TypeError at once."""
    operands = (node.left, node.right) if isinstance(node, ast.BinOp) else ()
    return any(isinstance(part, (ast.JoinedStr, ast.List)) or isinstance(part, ast.Constant) and isinstance(part.value, str)
               for part in operands)


def mutate(source, number):
    """The source with its place ``number`` changed, a line that tells what changed, and the lines of that statement."""
    tree = ast.parse(source)
    node, kind = list(places(tree))[number]
    lines = _statement(tree, getattr(node, "test", node))
    before = ast.unparse(copy.deepcopy(getattr(node, "test", node)))
    if kind == "comparison":
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif kind == "operator":
        node.op = SWAPS[type(node.op)]()
    elif kind == "condition":
        node.test = ast.UnaryOp(ast.Not(), node.test)
    else:
        node.value += 1
    return ast.unparse(tree), f"line {node.lineno}: {before[:60]} → {ast.unparse(getattr(node, 'test', node))[:60]}", lines


def _statement(tree, node):
    """The lines of the statement that holds an expression; of one with a body the expression's own."""
    simple = [statement for statement in ast.walk(tree) if isinstance(statement, ast.stmt) and not hasattr(statement, "body")
              and statement.lineno <= node.lineno and node.end_lineno <= statement.end_lineno]
    holder = simple[0] if simple else node
    return range(holder.lineno, holder.end_lineno + 1)


def draw(root, count, seed, folders):
    """(module, place) of the faults in the project at ``root``, at random and without repetition."""
    every = []
    for folder in folders:
        for path in sorted((root / "telechat" / folder).rglob("*.py")):
            number = sum(1 for _ in places(ast.parse(path.read_text(encoding="utf-8"))))
            every += [(path.relative_to(root), place) for place in range(number)]
    return random.Random(seed).sample(every, min(count, len(every)))
