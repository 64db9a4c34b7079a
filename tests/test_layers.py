"""The order of imports, and the limits on size (CONTRIBUTING.md)."""

import ast
import importlib.util
import statistics
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each file may import only from the entries above its own.
ORDER = [
    "secondorder.vectors",
    "secondorder.vectors.host",
    "secondorder.vectors.flat",
    "secondorder.vectors.arguments",
    "secondorder.vectors.tree",
    "secondorder.solvers",
    "secondorder.autodiff",
    "secondorder.autodiff.compat",
    "secondorder.autodiff.graph",
    "secondorder.autodiff.guard",
    "secondorder.autodiff.switches",
    "secondorder.autodiff.compositions",
    "secondorder.autodiff.determinant",
    "secondorder.autodiff.decompose",
    "secondorder.autodiff.ladder",
    "secondorder.autodiff.convolutions",
    "secondorder.autodiff.fused",
    "secondorder.autodiff.lighter",
    "secondorder.autodiff.backward",
    "secondorder.decompose",
    "secondorder.functional",
    "secondorder.operators",
    "secondorder.operators.solve",
    "secondorder.operators.convert",
    "secondorder.operators.products",
    "secondorder.operators.linear",
    "secondorder.operators.matrix",
    "secondorder.operators.widths",
    "secondorder.operators.parameters",
    "secondorder.operators.uses",
    "secondorder.operators.layers",
    "secondorder.operators.pieces",
    "secondorder.operators.per_sample",
    "secondorder.operators.gram",
    "secondorder.operators.rows",
    "secondorder.operators.curvature",
    "secondorder.operators.output_blocks",
    "secondorder.operators.residual",
    "secondorder.operators.samples",
    "secondorder.operators.fisher",
    "secondorder.data",
    "secondorder.data.batches",
    "secondorder.data.reduction",
    "secondorder.data.passes",
    "secondorder.data.objective",
    "secondorder.influence",
    "secondorder.influence.samples",
    "secondorder.influence.draws",
    "secondorder.influence.ekfac",
    "secondorder.influence.inverse",
    "secondorder.influence.result",
    "secondorder.influence.base",
    "secondorder.influence.first_order",
    "secondorder.influence.edits",
    "secondorder.influence.refit",
    "secondorder.influence.orders",
    "secondorder.influence.storage",
    "secondorder.influence.table",
    "secondorder.influence.trust",
    "secondorder.influence.leave_one_out",
    "secondorder.influence.influence",
    "secondorder.influence.scores",
    "secondorder.plots",
    "secondorder",
    "optim.closure",
    "optim.closure.accumulation",
    "optim.closure.returned",
    "optim.closure.setting",
    "optim.closure.gradients",
    "optim.closure.edges",
    "optim.closure.losses",
    "optim.closure.coverage",
    "optim.closure.terms",
    "optim.closure.penalties",
    "optim.closure.semidefinite",
    "optim.closure.convexity",
    "optim.closure.proof",
    "optim.closure.nodes",
    "optim.closure.calls",
    "optim.closure.modes",
    "optim.closure.runs",
    "optim.closure.hidden",
    "optim.closure.evaluate",
    "optim.closure.rounding",
    "optim.closure.samples",
    "optim.closure.tape",
    "optim.closure.watch",
    "optim.closure.replay",
    "optim.closure.source",
    "optim.methods",
    "optim.methods.control",
    "optim.methods.options",
    "optim.methods.forms",
    "optim.methods.problem",
    "optim.methods.batches",
    "optim.methods.sampling",
    "optim.methods.judge",
    "optim.methods.cubic",
    "optim.methods.scale",
    "optim.methods.subspace",
    "optim.methods.basis",
    "optim.methods.grown",
    "optim.methods.formed",
    "optim.methods.decomposition",
    "optim.methods.residual",
    "optim.methods.acceleration",
    "optim.methods.factored",
    "optim.methods.truncated",
    "optim.methods.search",
    "optim.methods.step",
    "optim.optimizers",
    "optim.optimizers.report",
    "optim.optimizers.progress",
    "optim.optimizers.groups",
    "optim.optimizers.checkpoint",
    "optim.optimizers.checks",
    "optim.optimizers.sampling",
    "optim.optimizers.curvature",
    "optim.optimizers.decay",
    "optim.optimizers.scaling",
    "optim.optimizers.meter",
    "optim.optimizers.residuals",
    "optim.optimizers.problem",
    "optim.optimizers.kept",
    "optim.optimizers.stepping",
    "optim.optimizers.account",
    "optim.optimizers.base",
    "optim.optimizers.newton",
    "optim.optimizers.hessian_free",
    "optim.optimizers.gauss_newton",
    "optim.functions",
    "optim.functions.results",
    "optim.functions.variables",
    "optim.functions.bounds",
    "optim.functions.frame",
    "optim.functions.derivatives",
    "optim.functions.problem",
    "optim.functions.robust",
    "optim.functions.residuals",
    "optim.functions.run",
    "optim.functions.implicit",
    "optim.functions.multistart",
    "optim.functions.batched",
    "optim.functions.batched.control",
    "optim.functions.batched.evaluation",
    "optim.functions.batched.factors",
    "optim.functions.batched.terms",
    "optim.functions.batched.separable",
    "optim.functions.batched.state",
    "optim.functions.batched.squares",
    "optim.functions.batched.newton",
    "optim.functions.batched.fronts",
    "optim.functions.squares",
    "optim.functions.large_squares",
    "optim.functions.least_squares",
    "optim.functions.saddle",
    "optim.functions.newton",
    "optim.functions.sparse",
    "optim.functions.minimize",
    "optim.functions.data",
    "optim.functions.curve_fit",
    "optim.functions.root",
    "optim",
    "secondorder.optim",
    "secondorder.__main__",
]
IMPORTS_NOTHING = ["optim.methods.control", "optim.methods.options", "optim.optimizers.report"]
TOP_LEVEL = {
    "pyproject.toml",
    "secondorder",
    "optim",
    "tests",
    "examples",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
# Of all functions, the median and nine in ten.
MEDIAN_FUNCTION_LINES, MOST_FUNCTION_LINES = 6, 16
MAX_PARAMETERS = 8
MAX_CLASS_LINES = 200
MAX_METHODS = 12
# Mirrors of torch's signatures, SciPy's cg and minres, constructors of optimizers and public front ends,
# whose parameters users of the ecosystem expect.
MANY_PARAMETERS = {
    "embedding_bag",
    "fvp",
    "hessian",
    "jacobian",
    "hvp",
    "__init__",
    "influence",
    "cg",
    "minres",
    "least_squares",
    "minimize",
    "curve_fit",
    "root",
}

FILES = sorted(path for package in ("secondorder", "optim") for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    is_package = (ROOT / module.replace(".", "/")).is_dir()
    return module if is_package else module.rpartition(".")[0]


def layer(module: str) -> int:
    """Position of the deepest entry of ORDER that the module lies in; -1 when there is none."""
    while module:
        if module in ORDER:
            return ORDER.index(module)
        module = module.rpartition(".")[0]
    return -1


def own_imports(tree: ast.Module, package: str) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(module, package)
            full = [f"{module}.{alias.name}" for alias in node.names]
            names += [name if (ROOT / (name.replace(".", "/") + ".py")).exists() else module for name in full]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if name.split(".")[0] in ("secondorder", "optim")]


@pytest.fixture(params=FILES, ids=module_name)
def source(request):
    path = request.param
    text = path.read_text(encoding="utf-8")
    return module_name(path), text, ast.parse(text)


def test_every_file_has_a_place_in_the_order(source):
    assert layer(source[0]) >= 0


def test_imports_point_upwards(source):
    module, _, tree = source
    imports = own_imports(tree, package_of(module))
    for imported in imports:
        same_entry = layer(imported) == layer(module)
        assert layer(imported) < layer(module) or same_entry, f"{module} imports {imported}"
    if module in IMPORTS_NOTHING:
        assert imports == []


def test_optim_imports_itself_relatively(source):
    """It is loaded as ``secondorder.optim`` where another module has its name."""
    module, _, tree = source
    if not module.startswith("optim"):
        return
    absolute = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0]
    is_inside = module.split(".")[0] == "optim"
    assert not (is_inside and "optim" in [name.split(".")[0] for name in absolute])


def test_no_import_inside_a_function(source):
    for function in functions(source[2]):
        inner = [n for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not inner, f"{function.name} imports inside"


def test_size_limits(source):
    _, text, tree = source
    lines = text.splitlines()
    assert len(lines) <= MAX_FILE_LINES
    for function in functions(tree):
        count = code_lines(function, lines)
        assert count <= MAX_FUNCTION_LINES, f"{function.name} has {count} lines of code"
        arguments = function.args
        parameters = [a.arg for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
        if function.name not in MANY_PARAMETERS:
            assert len([p for p in parameters if p not in ("self", "cls")]) <= MAX_PARAMETERS, function.name


def test_class_limits(source):
    for node in ast.walk(source[2]):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_CLASS_LINES, node.name
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)]
            counted = [m.name for m in methods if "overload" not in map(ast.unparse, m.decorator_list)]
            assert len(counted) <= MAX_METHODS, f"{node.name} has {len(counted)} methods"


def test_functions_are_short():
    """All of them together: the limits above are for the exceptions."""
    counts = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        counts += [code_lines(function, text.splitlines()) for function in functions(ast.parse(text))]
    counts.sort()
    assert statistics.median(counts) <= MEDIAN_FUNCTION_LINES
    assert counts[int(0.9 * len(counts))] <= MOST_FUNCTION_LINES


def test_the_library_does_not_print(source):
    if source[0] == "secondorder.__main__":
        pytest.skip("is a command")
    calls = [n for n in ast.walk(source[2]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert "print" not in {call.func.id for call in calls}


def test_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not listed:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.splitlines()}
    assert {entry for entry in top if not entry.startswith(".")} <= TOP_LEVEL


def functions(tree: ast.Module):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Of its body, without docstring, comments and empty lines."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    code = lines[body[0].lineno - 1 : function.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in code)
