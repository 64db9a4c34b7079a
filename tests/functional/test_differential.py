"""The differential test of the six functions, and proof that it can fail: broken variants are caught."""

import importlib
import shutil
import sys
from pathlib import Path

import differential
import pytest

import secondorder.functional

CASES = 3000
ARGUMENTS = "vectors/arguments.py"
PRODUCTS = "functional/products.py"
SECOND_ORDER = "functional/second_order.py"
MATRICES = "functional/matrices.py"
STRATEGIES = "functional/strategies.py"
GRAPH = "autodiff/graph.py"

# What is broken: the file, the text, and what stands there instead.
MUTANTS = {
    "lists_are_accepted": (
        ARGUMENTS,
        "is_tuple = isinstance(value, tuple)",
        "is_tuple = isinstance(value, tuple | list)",
    ),
    "index_in_the_message": (ARGUMENTS, 'f"value at index {index}"', 'f"value at index {index + 1}"'),
    "inputs_are_not_fresh": (
        ARGUMENTS,
        "return tensor.detach().requires_grad_(requires_grad)",
        "return tensor.requires_grad_(requires_grad)",
    ),
    "graph_to_the_inputs_is_cut": (ARGUMENTS, "if create_graph and tensor.requires_grad:", "if False:"),
    "sparse_inputs_are_viewed": (
        ARGUMENTS,
        "tensor.clone() if tensor.is_sparse else tensor.view_as(tensor)",
        "tensor.view_as(tensor)",
    ),
    "length_of_v_is_not_checked": (ARGUMENTS, "if len(v) != len(like):", "if False:"),
    "size_of_v_is_not_checked": (ARGUMENTS, "if given.size() != expected.size():", "if False:"),
    "entry_is_always_named": (
        ARGUMENTS,
        'f"Entry {index} in " if like_is_tuple else ""',
        'f"Entry {index} in "',
    ),
    "tuple_of_one_is_a_scalar": (
        ARGUMENTS,
        "    if is_tuple:\n        raise",
        "    if False:\n        raise",
    ),
    "vectors_are_summed": (ARGUMENTS, "    if outputs[0].nelement() != 1:\n", "    if False:\n"),
    "strict_ignores_outputs": (ARGUMENTS, "if strict and not tensor.requires_grad:", "if False:"),
    "strict_ignores_constant_gradients": (
        ARGUMENTS,
        "if strict and grad is not None and not grad.requires_grad:",
        "if False:",
    ),
    "strict_ignores_missing_gradients": (
        ARGUMENTS,
        "        if grad is None:\n            if strict:",
        "        if grad is None:\n            if False:",
    ),
    "strict_ignores_create_graph": (
        ARGUMENTS,
        "elif strict and create_graph and not grad.requires_grad:",
        "elif False:",
    ),
    "results_are_not_detached": (
        ARGUMENTS,
        "tensors if create_graph else tuple(",
        "tensors if True else tuple(",
    ),
    "results_are_always_tuples": (ARGUMENTS, "return results if is_tuple else results[0]", "return results"),
    "v_is_checked_after_the_call": (
        SECOND_ORDER,
        "        vector = arguments.input_vector(v, inputs, is_inputs_tuple, create_graph, name)\n        hooks = graph.HookCount()\n        value, aux = arguments.call_scalar(func, inputs, name, strict, has_aux)\n",
        "        hooks = graph.HookCount()\n        value, aux = arguments.call_scalar(func, inputs, name, strict, has_aux)\n        vector = arguments.input_vector(v, inputs, is_inputs_tuple, create_graph, name)\n",
    ),
    "custom_functions_are_taken_for_symmetric": (
        GRAPH,
        "is_custom = is_custom or _is_custom(node, name)",
        "pass",
    ),
    "hooks_are_not_seen": (
        GRAPH,
        "return bool(RemovableHandle.next_id - HookCount.own != self._start)",
        "return False",
    ),
    "grad_mode_of_the_caller": (
        PRODUCTS,
        '    with torch.enable_grad():\n        is_inputs_tuple, inputs = arguments.as_tuple(inputs, "inputs", "vjp")',
        '    if True:\n        is_inputs_tuple, inputs = arguments.as_tuple(inputs, "inputs", "vjp")',
    ),
    "hvp_is_called_vhp_in_errors": (SECOND_ORDER, 'return_grad, "hvp")', 'return_grad, "vhp")'),
    "jvp_forgets_v": (
        PRODUCTS,
        "columns = arguments.grad(grads, duals, vector,",
        "columns = arguments.grad(grads, duals, None,",
    ),
    "jvp_loses_its_graph": (
        PRODUCTS,
        "columns = arguments.grad(grads, duals, vector, create_graph=create_graph)",
        "columns = arguments.grad(grads, duals, vector)",
    ),
    "output_index_is_the_inputs": (
        STRATEGIES,
        'f"independent of input {index}. This is not allowed in "',
        'f"independent of input {index + 1}. This is not allowed in "',
    ),
    "jacobian_rows_lose_their_graph": (
        STRATEGIES,
        "(element,), inputs, create_graph=create_graph, retain_graph=True",
        "(element,), inputs, create_graph=False, retain_graph=True",
    ),
    "batched_rows_are_shifted": (
        STRATEGIES,
        "first, last = max(rows.start, start)",
        "first, last = 1 + max(rows.start, start)",
    ),
    "blocks_are_transposed": (
        STRATEGIES,
        "    return tuple(zip(*columns, strict=True))\n",
        "    return tuple(map(tuple, columns))\n",
    ),
    "strict_and_vectorize_go_together": (MATRICES, "if options.vectorize and options.strict:", "if False:"),
    "forward_mode_without_vectorize": (MATRICES, "if not options.vectorize:", "if False:"),
    "unknown_strategy_is_reverse": (
        MATRICES,
        'if self.strategy not in ("forward-mode", "reverse-mode"):',
        "if False:",
    ),
    "hessian_forgets_strict": (
        MATRICES,
        "arguments.require_grad_of_jacobian(filled, options.strict)",
        "pass",
    ),
}


def first_difference(module, cases=CASES):
    for seed in range(cases):
        case = differential.Case(seed)
        found = differential.compare(module, case)
        if found:
            return f"{case}: {found}"
    return None


@pytest.mark.slow
def test_equals_torch_on_random_calls():
    assert first_difference(secondorder.functional) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_variant_is_caught(name, tmp_path, monkeypatch):
    file, old, new = MUTANTS[name]
    package = f"mutant_{name}"
    source = Path(secondorder.__file__).parent
    target = tmp_path / package
    wings = ("vectors", "autodiff", "functional")
    for wing in wings:
        (target / wing).mkdir(parents=True)
    (target / "__init__.py").touch()
    for path in (path for wing in wings for path in (source / wing).glob("*.py")):
        text = path.read_text(encoding="utf-8").replace("from secondorder", f"from {package}")
        if str(path.relative_to(source)) == file:
            assert text.count(old) >= 1, "the mutant's text is gone from the source"
            text = text.replace(old, new)
        (target / path.relative_to(source)).write_text(text, encoding="utf-8")
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module(f"{package}.functional")
    try:
        assert first_difference(module) is not None
    finally:
        for loaded in [m for m in sys.modules if m.startswith(package)]:
            del sys.modules[loaded]
