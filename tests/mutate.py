"""Takes the engine apart, one guard or one term at a time, and sees which test notices.

    python tests/mutate.py profile         # which test reaches which line
    python tests/mutate.py run [dot.py …]  # tries mutants; once noticed, never again
    python tests/mutate.py report          # the share, and the survivors

A mutant is one changed expression of one module: a guard deleted, a condition fixed,
an operand dropped, an operator or a role exchanged, a number one too large.  It is
tried on the tests that reach its line, the quickest first, within one process that has
collected all tests.  `survivors.toml` says why some may survive.  Python 3.12 or later.
"""

import argparse
import ast
import collections
import copy
import gc
import hashlib
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
import tomllib
import types

ROOT = pathlib.Path(__file__).parents[1]
HERE = pathlib.Path(tempfile.gettempdir(), "flora-mutants")
MODULES = sorted(
    str(path.relative_to(ROOT))
    for pattern in (
        "_trace/rules/*.py",
        "_trace/[idrs]*[e-t].py",
        "_algebra/*.py",
    )
    for path in (ROOT / "flora").glob(pattern)
    if path.name not in ("__init__.py", "source.py")
)
TESTS = ["tests/trace", "tests/algebra", "tests/verbs", "tests/test_variants.py",
         "tests/test_quantize.py", "tests/models/test_models.py"]  # fmt: skip

OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.BitXor: ast.BitAnd,
    ast.RShift: ast.LShift, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE,
    ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.In: ast.NotIn,
    ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
WORDS = {"in": "out", "out": "in", "stack": "out", "window": "in", "a": "b", "b": "a",
         "key": "scale", "scale": "key"}  # fmt: skip
FUNCTIONS = {"any": "all", "all": "any", "min": "max", "max": "min"}
# What can be replaced by its first argument.
WRAPPERS = {"widened", "fused", "stop_gradient", "optimization_barrier", "by_position",
            "in_slices", "densify", "whole", "on_hidden", "dequantized"}  # fmt: skip


def alternatives(node, function):
    """What may stand in a node's place."""
    match node:
        case ast.If(body=[first, *_]):
            yield replaced(node, test=ast.Constant(False))
            if not isinstance(first, ast.Raise):
                yield replaced(node, test=ast.Constant(True))
        case ast.IfExp(body=body, orelse=other):
            yield from (body, other)
        case ast.comprehension(ifs=[_, *_]):
            yield replaced(node, ifs=[])
        case ast.BoolOp(values=values):
            for i in range(len(values)):
                rest = values[:i] + values[i + 1 :]
                yield rest[0] if len(rest) == 1 else replaced(node, values=rest)
        case ast.Compare(ops=[op]) if type(op) in OPERATORS:
            yield replaced(node, ops=[OPERATORS[type(op)]()])
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.BinOp(left=left, right=right, op=op):
            yield replaced(node, op=OPERATORS[type(op)]())
            yield left
            if isinstance(op, ast.Add | ast.Mult | ast.BitOr | ast.BitAnd):
                yield right
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=str(value)) if value in WORDS:
            yield ast.Constant(WORDS[value])
        case ast.Call(func=ast.Name(name), args=args) if name in FUNCTIONS and args:
            yield replaced(node, func=ast.Name(FUNCTIONS[name], ast.Load()))
        case ast.Call(func=ast.Attribute(value=value, attr="astype")):
            yield value
        case ast.Call(args=[first, *_]) if called(node) in WRAPPERS:
            yield first
        case ast.Call(keywords=keywords):
            for i, keyword in enumerate(keywords):
                if called(node) in ("replace", "on_factors") or keyword.arg in (
                    "precision",
                    "dtype",
                ):
                    yield replaced(node, keywords=keywords[:i] + keywords[i + 1 :])
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Name(name)]) if is_bound(name, node, function):
            yield ast.Pass()


def replaced(node, **fields):
    """A copy of a node with other fields."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def called(call):
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def is_bound(name, node, function):
    """Whether a name has a value before an assignment."""
    return any(
        getattr(x, "arg", getattr(x, "id", "")) == name and x.lineno < node.lineno
        for x in ast.walk(function)
        if isinstance(x, ast.arg | ast.Name)
    )


def places(tree):
    """`{line: place}`: the function and the line in it, which outlive other edits."""
    found = {}
    for parent in ast.walk(tree):
        for node in (
            parent.body if isinstance(parent, ast.Module | ast.ClassDef) else ()
        ):
            if isinstance(node, ast.FunctionDef):
                name = f"{getattr(parent, 'name', '')}.{node.name}"
                for line in range(node.lineno, node.end_lineno + 1):
                    found[line] = f"{name}:{line - node.lineno}"
    return found


class Mutant:
    """One change to one module."""

    def __init__(self, module, function, node, new, parents):
        self.module, self.node, self.new = module, node, new
        old, text = ast.unparse(node), ast.unparse(new)
        if isinstance(node, ast.If):
            old, text = f"if {ast.unparse(node.test)}", ast.unparse(new.test)
        self.key = f"{module.removeprefix('flora/')} {function.name}: {old} → {text}"
        self.source = hashlib.sha256(ast.unparse(function).encode()).hexdigest()[:16]
        line = node.lineno if hasattr(node, "lineno") else node.target.lineno
        while not isinstance(node, ast.stmt):
            node = parents[node]
        # With a condition that never holds, only a test for which it held can differ.
        fixed = isinstance(node, ast.If) and ast.unparse(new).startswith("if False")
        self.lines = [node.body[0].lineno] if fixed else [line, node.lineno]
        guard = fixed and isinstance(node.body[0], ast.Raise)
        guard = guard or (isinstance(new, ast.Pass) and "require" in old)
        self.order = not guard, hashlib.sha256(self.key.encode()).digest()

    def code(self, tree, path):
        """The module with that change, compiled."""

        class Change(ast.NodeTransformer):
            def visit(_, node):
                return self.new if node is self.node else super().visit(node)

        changed = copy.deepcopy(tree, {id(self.node): self.node})
        changed = ast.fix_missing_locations(Change().visit(changed))
        return compile(changed, path, "exec")


def mutants(module):
    """The tree of a module, and its mutants."""
    tree = ast.parse((ROOT / module).read_text())
    parents = {child: node for node in ast.walk(tree)
               for child in ast.iter_child_nodes(node)}  # fmt: skip
    skipped, found, count = set(), [], collections.Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            unread = [node.returns, *node.decorator_list, *ast.walk(node.args)]
            skipped |= {x for part in unread if part for x in ast.walk(part)}
        elif isinstance(node, ast.AnnAssign):
            skipped |= {*ast.walk(node.annotation)}
        elif isinstance(node, ast.Raise | ast.JoinedStr):
            skipped |= {*ast.walk(node)} - {node}
        elif isinstance(node, ast.Call) and called(node) in ("isinstance", "LoraError"):
            skipped |= {x for arg in node.args[1:] for x in ast.walk(arg)}
    for node in ast.walk(tree):
        function, inner = node, None
        while function in parents:
            function = parents[function]
            inner = function if isinstance(function, ast.FunctionDef) else inner
        if node in skipped or inner is None:
            continue
        if isinstance(node, ast.Raise) and isinstance(parents[node], ast.If):
            continue  # the guard is a mutant already
        for new in alternatives(node, inner):
            mutant = Mutant(module, inner, node, new, parents)
            count[mutant.key] += 1
            if (n := count[mutant.key]) > 1:
                mutant.key += f" ({n})"
            found.append(mutant)
    return tree, found


class Session:
    """A pytest plugin that runs collected tests again and again."""

    def __init__(self, work):
        self.work = work
        self.failed, self.when = "", {}

    def pytest_configure(self):
        from hypothesis import Phase, settings

        phases = [Phase.explicit, Phase.generate]
        settings.register_profile(
            "mutate", settings.get_profile("flora"), phases=phases
        )
        settings.load_profile("mutate")

    def pytest_runtestloop(self, session):
        self.items = {item.nodeid: item for item in session.items}
        self.work(self)
        return True

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed, self.why = report.nodeid, report.longreprtext

    def notices(self, names, seconds):
        """The first test that fails, or ''."""
        signal.signal(signal.SIGPROF, out_of_time)
        retraced()
        for name in names:
            if name not in self.items:
                continue
            item, self.failed = self.items[name], ""
            item._initrequest()
            signal.setitimer(signal.ITIMER_PROF, seconds)  # of this process alone
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            signal.setitimer(signal.ITIMER_PROF, 0)
            if self.failed:
                return name
        return ""


def out_of_time(*_):
    raise TimeoutError


ORIGINALS = []


def retraced():
    """JAX forgets what it has traced of the functions that are jitted at import."""
    import jax

    from flora._algebra import forms
    from flora._trace.compat import INLINE
    from flora._trace.rules import dot, product

    def fresh(fn):
        return types.FunctionType(fn.__code__, fn.__globals__, fn.__name__)

    if not ORIGINALS:
        ORIGINALS[:] = product._once.__wrapped__, forms.products.__wrapped__
    once, products = map(fresh, ORIGINALS)
    product._once = jax.jit(once, static_argnums=0, inline=INLINE)
    products = jax.custom_vjp(products, nondiff_argnums=(0, 1))
    products.defvjp(forms._forward, forms._backward)
    dot._products = jax.jit(products, static_argnums=(0, 1), inline=INLINE)


def run_pytest(tests, work):
    """Collects the tests and hands them over."""
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT)]
    os.environ |= {
        "PYTEST_XDIST_WORKER": "mutate",  # or the conftest makes a cache of its own
        "JAX_COMPILATION_CACHE_DIR": str(HERE / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    sys.dont_write_bytecode = True
    import pytest

    quiet = ["-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:terminal"]
    usual = ("addopts=--import-mode=importlib -m 'not slow and not third_party and not "
             "tpu_compiler and not peft'")  # fmt: skip
    return pytest.main([*quiet, "-o", usual, *tests], plugins=[Session(work)])


def profile(session):
    """Which lines of the engine each test reaches, and how long it takes."""
    monitoring, tests, reached = sys.monitoring, {}, set()
    modules = {str(ROOT / module): module for module in MODULES}
    at = {m: places(ast.parse((ROOT / m).read_text())) for m in MODULES}

    def reach(code, line):
        if code.co_filename in modules:
            reached.add((modules[code.co_filename], line))
        return monitoring.DISABLE

    tool = monitoring.COVERAGE_ID
    monitoring.use_tool_id(tool, "mutate")
    monitoring.register_callback(tool, monitoring.events.LINE, reach)
    monitoring.set_events(tool, monitoring.events.LINE)
    for i, name in enumerate(session.items):
        reached.clear()
        monitoring.restart_events()
        start = time.process_time()
        if session.notices([name], 600):
            print("fails without any change:", name)
            continue
        lines = {}
        for module, line in sorted(reached):
            if line in at[module]:
                lines.setdefault(module, []).append(at[module][line])
        tests[name] = {"seconds": time.process_time() - start, "lines": lines}
        if i % 20 == 0:
            print(i, len(session.items), flush=True)
    name = hashlib.sha256(" ".join(session.items).encode()).hexdigest()[:16]
    (HERE / f"profile-{name}.json").write_text(json.dumps(tests))


def profiles():
    found = {}
    for path in sorted(HERE.glob("profile-*.json"), key=lambda x: x.stat().st_mtime):
        found |= json.loads(path.read_text())
    return found


def chosen(mutant, reached, kills, limit):
    """The tests that reach a mutant, those likely to notice first."""
    for place in mutant.places:
        at = (mutant.module, place)
        if found := [name for name, test in reached.items() if at in test["lines"]]:
            break
    own = f"test_{pathlib.Path(mutant.module).name}"
    refused = [t for t in found if "require" in mutant.key and "refus" in t]

    def cost(t):
        likely = (1 + kills[t]) * (4 if own in t else 1) * (20 if t in refused else 1)
        return (reached[t]["seconds"] + 0.1) / likely

    found.sort(key=cost)
    total, tests = 0, []
    for name in found:
        total += reached[name]["seconds"]
        if tests and total > limit:
            break
        tests.append(name)
    return tests


def functions(code):
    """The functions of a code object, those inside functions too."""
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield (const.co_qualname, const.co_firstlineno, const.co_freevars), const
            yield from functions(const)


class Changed:
    """While it is entered, functions of a module run as the mutant has them."""

    def __init__(self, module, code):
        self.path, self.new = str(ROOT / module), dict(functions(code))

    def __enter__(self):
        self.old = []
        for f in gc.get_objects():
            if isinstance(f, types.FunctionType):
                code = f.__code__
                key = code.co_qualname, code.co_firstlineno, code.co_freevars
                if code.co_filename == self.path and key in self.new:
                    self.old.append((f, code))
                    f.__code__ = self.new[key]

    def __exit__(self, *_):
        for f, code in self.old:
            f.__code__ = code


def work(todo, reached, limit):
    """Tries mutants in a session; a line of `results.jsonl` for each."""

    def attempt(session):
        kills = collections.Counter(one.get("by") for one in results_of().values())
        log = (HERE / "results.jsonl").open("a")

        def write(mutant, **what):
            line = {"key": mutant.key, "source": mutant.source, "limit": limit,
                    "line": mutant.lines[-1], **what}  # fmt: skip
            log.write(json.dumps(line, ensure_ascii=False) + "\n")
            log.flush()

        since = []
        for mutant, tree in todo:
            tests = chosen(mutant, reached, kills, limit)
            write(mutant, status="noticed", by="a crash")
            start, found = time.time(), ""
            if tests:
                code = mutant.code(tree, str(ROOT / mutant.module))
                with Changed(mutant.module, code):
                    found = session.notices(tests, 60)
            status = "noticed" if found else "survived" if tests else "not reached"
            took = round(time.time() - start, 1)
            write(mutant, status=status, by=found, tests=len(tests), took=took)
            print("." if found else f"\n{status} {mutant.lines[-1]} {mutant.key}\n",
                  end="", flush=True)  # fmt: skip
            kills[found] += 1
            since += [(mutant, found)] if found else []
            if len(since) == 40 or (mutant, tree) == todo[-1]:
                killers = sorted({found for _, found in since})
                if wrong := session.notices(killers, 60):
                    print("\nfails without a change:", wrong, session.why)
                    for one, _ in since:
                        write(one, status="untried")
                    os._exit(3)
                since = []

    return attempt


def run(modules, limit, jobs, only):
    results, reasons, reached = results_of(), known(), profiles()
    for test in reached.values():
        test["lines"] = {(m, i) for m, every in test["lines"].items() for i in every}
    todo = []
    for module in modules:
        tree, found = mutants(module)
        at = places(tree)
        for mutant in found:
            before = results.get(mutant.key, {})
            done = before.get("status") == "noticed" or before.get("limit", 0) >= limit
            done = done and before.get("status") != "untried"
            done = done and before.get("source") == mutant.source
            if only in mutant.key and (only or not done) and mutant.key not in reasons:
                mutant.places = [at.get(line, "") for line in mutant.lines]
                todo.append((mutant, tree))
    todo.sort(key=lambda pair: pair[0].order)  # guards, then all others at random
    print(len(todo), "to try")
    names = sorted({name.split("::")[0] for name in reached})
    for i in range(jobs):
        if not os.fork():
            sys.exit(run_pytest(names, work(todo[i::jobs], reached, limit)))
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(jobs)]
    print("\nended with", codes)


def results_of():
    path = HERE / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {one["key"]: one for one in map(json.loads, lines)}


def known():
    """`{key: reason}` of the survivors that change nothing a caller can see."""
    with open(ROOT / "tests/survivors.toml", "rb") as file:
        return tomllib.load(file)


def report(modules):
    reasons, results = known(), results_of()
    totals = collections.Counter()
    for module in modules:
        count = collections.Counter()
        for mutant in mutants(module)[1]:
            one = results.get(mutant.key, {})
            status = one.get("status", "untried")
            if mutant.key in reasons and status != "noticed":
                status = "listed"
            count[status] += 1
            if status not in ("noticed", "listed", "untried"):
                print(f"{status}, line {one['line']}: {mutant.key}")
        totals += count
        print(module, dict(count))
    tried = totals.total() - totals["untried"]
    print(dict(totals), f"{totals['noticed'] / max(tried, 1):.1%} of {tried} noticed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["profile", "run", "report"])
    parser.add_argument(
        "modules", nargs="*", help="parts of their names; all by default"
    )
    parser.add_argument(
        "--limit", type=float, default=20, help="seconds for a survivor"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="a part of a mutant's name")
    args = parser.parse_args()
    HERE.mkdir(exist_ok=True)
    if args.what == "profile":
        run_pytest(args.modules or TESTS, profile)
        return
    modules = [
        m for m in MODULES if not args.modules or any(x in m for x in args.modules)
    ]
    if args.what == "report":
        report(modules)
    else:
        run(modules, args.limit, args.jobs, args.only)


if __name__ == "__main__":
    main()
