"""What sources may not do, so that the library runs on any accelerator: no run is needed to see it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for package in ("secondorder", "optim") for path in (ROOT / package).rglob("*.py"))

# Functions of torch that make a tensor where ``device=`` says, else on the default device.
FACTORIES = {
    *("zeros", "ones", "empty", "full", "eye", "arange", "linspace", "logspace", "tensor", "scalar_tensor"),
    *("rand", "randn", "randint", "randperm", "normal", "tril_indices", "triu_indices", "as_tensor"),
}
# Of torch.linalg, those that look on the host whether they succeeded. There are forms that do not: solve_ex,
# inv_ex, cholesky_ex.
WAITING = {
    "cholesky",
    "solve",
    "inv",
    "eigh",
    "eigvalsh",
    "eig",
    "eigvals",
    "svd",
    "svdvals",
    "lstsq",
    "pinv",
}
# A line says so where it waits on purpose.
REASON = "# waits: "


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def complaints(text):
    tree, lines, found = ast.parse(text), text.splitlines(), []
    for call in calls(tree):
        name = ast.unparse(call.func)
        head, _, last = name.rpartition(".")
        if head == "torch" and last in FACTORIES and "device" not in {k.arg for k in call.keywords}:
            # Where it is given a tensor, or moved, the device is known.
            found.append((call.lineno, f"{name} without a device"))
        if head == "torch.linalg" and last in WAITING:
            comments = lines[max(call.lineno - 3, 0) : call.end_lineno]
            if not any(REASON in line for line in comments):
                found.append((call.lineno, f"{name} waits, and no comment says why"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.cuda", "torch.mps", "torch.xpu"):
            found.append((node.lineno, f"{ast.unparse(node)} is of one accelerator"))
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.split(":")[0] == "cuda"
        ):
            found.append((node.lineno, "names a device"))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_name_no_device(path):
    assert complaints(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    ["x = torch.zeros(3)", "torch.linalg.eigh(A)", "torch.cuda.synchronize()", "x.to('cuda:0')"],
)
def test_the_rules_find_what_they_are_for(line):
    assert len(complaints(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "x = torch.zeros(3, device=b.device)",
        "torch.linalg.eigh(A)  # waits: for small ones",
        "x.new_zeros(3)",
    ],
)
def test_the_rules_leave_the_rest_alone(line):
    assert complaints(line) == []
