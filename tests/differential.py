"""Random calls of the six functions, ours against ``torch.autograd.functional``.

``Case(seed)`` draws one call: function, structure of inputs and outputs, shapes, dtypes, layouts, flags,
vector, grad mode, and errors. ``compare(ours, case)`` runs both sides and returns what differs, or None.
``python tests/differential.py 20000`` runs that many with fresh seeds.
"""

from __future__ import annotations

import random
import sys
import warnings

import torch
import torch.autograd.functional as reference
import torch.nn.functional as F
import zoo
from torch import Tensor
from torch.utils import _pytree as pytree

import secondorder.functional

PRODUCTS = ("vjp", "jvp", "vhp", "hvp")
MATRICES = ("jacobian", "hessian")
SHAPES = [(), (1,), (2,), (3,), (2, 2), (1, 1), (0,), (2, 1, 2)]
LAYOUTS = ["plain"] * 5 + ["strided", "expanded", "transposed", "sparse"]
DTYPES = [torch.float64] * 5 + [torch.float32, torch.complex128]
# The same operations in another order: rounding of the precision in which the function computes, on
# numbers of size 1 to 100.
DOUBLE, SINGLE = 1e-10, 2e-4


def dense(x):
    return x.to_dense() if x.layout is not torch.strided else x


def scalars(xs):
    """A nonlinear number from each tensor."""
    return [(dense(x).sin() + 0.3 * dense(x) ** 3).sum() for x in xs]


def mixed(xs):
    return sum(s * (i + 1) for i, s in enumerate(scalars(xs))) ** 2


def hooked(xs):
    """A hook that is not linear: it acts in every backward pass, and ``vhp`` is not ``hvp``."""
    y = dense(xs[0]) * 2
    if y.requires_grad:
        y.register_hook(lambda g: g.sin())
    return (y**3).sum() * y.sum()


def in_place(xs):
    y = dense(xs[0]).clone()
    y.mul_(y).cos_()
    return (y * dense(xs[-1]).sum()).sum()


def convolved(xs):
    """Two convolutions, of the first input and of what comes out, by their sum."""
    y = dense(xs[0]).reshape(1, 1, -1)
    if not y.numel():
        return y.sum()
    kernel = y.sum().reshape(1, 1, 1)
    y = F.conv1d(F.conv1d(y, kernel, kernel.reshape(1)).sin(), kernel**2)
    return y.sum() ** 2


def captured(xs):
    return mixed(xs) * CAPTURED.square().sum()


# Each of torch's warnings every time, not once a process: both sides must give it.
torch.set_warn_always(True)
CAPTURED = torch.tensor([0.5, -1.5], dtype=torch.float64, requires_grad=True)

SCALARS = {
    "mixed": mixed,
    "linear": lambda xs: sum(dense(x).sum() for x in xs),
    "quadratic": lambda xs: sum((dense(x) ** 2).sum() for x in xs),
    "ignores_all_but_first": lambda xs: scalars(xs)[0] ** 2,
    "constant": lambda xs: torch.tensor(2.0, dtype=torch.float64),
    "constant_with_graph": lambda xs: CAPTURED.sum(),
    "captures": captured,
    "of_shape_one": lambda xs: mixed(xs).reshape(1, 1),
    "in_place": in_place,
    "detached_factor": lambda xs: mixed(xs) * dense(xs[0]).detach().sum(),
    "random": lambda xs: mixed(xs) * torch.rand((), dtype=torch.float64),
    "skewed": lambda xs: zoo.Skewed.apply(dense(xs[0])) * scalars(xs)[-1],
    "hooked": hooked,
    "real_of_complex": lambda xs: sum((dense(x) * dense(x).conj()).real.sum() for x in xs) ** 2,
    "norm": lambda xs: sum(torch.linalg.vector_norm(dense(x) + 1.5) for x in xs),
    "norm_at_zero": lambda xs: (
        mixed(xs) + sum(torch.linalg.vector_norm(dense(x) - dense(x).detach()) for x in xs)
    ),
    "convolved": convolved,
    "single_precision": lambda xs: mixed([dense(x).real.to(torch.float32) for x in xs]),
    "first_itself": lambda xs: xs[0],
}
VECTORS = {
    "elementwise": lambda xs: dense(xs[0]) * mixed(xs),
    "pair": lambda xs: (dense(xs[0]).exp(), dense(xs[-1]).reshape(-1) * mixed(xs)),
    "tuple_of_one": lambda xs: (dense(xs[0]).square(),),
    "with_constant": lambda xs: (mixed(xs), torch.ones(2, dtype=torch.float64)),
    "without_elements": lambda xs: dense(xs[0]).reshape(-1)[:0],
    "same_twice": lambda xs: (lambda y: (y, y))(dense(xs[0]) * 2),
    "inputs_themselves": tuple,
}
WRONG = {
    "list": lambda xs: [mixed(xs)],
    "number": lambda xs: 1.0,
    "none": lambda xs: None,
    "tuple_with_number": lambda xs: (mixed(xs), 2.0),
    "raises": lambda xs: (_ for _ in ()).throw(KeyError("from the function")),
    "integer": lambda xs: torch.tensor(3),
}
VECTOR_KINDS = ["right"] * 6 + ["none", "none", "grad", "complex", "float32"]
VECTOR_KINDS += ["wrong_size", "wrong_count", "list", "number"]


class Case:
    """One random call."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._rng = rng = random.Random(seed)
        self.name = rng.choice(PRODUCTS + MATRICES)
        family = rng.random()
        scalar_only = self.name in ("vhp", "hvp", "hessian")
        pool = SCALARS if family < (0.9 if scalar_only else 0.45) else VECTORS
        pool = WRONG if family > 0.95 else pool
        self.function = rng.choice(sorted(pool))
        self.body = pool[self.function]
        self.is_tuple = rng.random() < 0.5
        self.specs = [self._spec() for _ in range(rng.randint(1, 3) if self.is_tuple else 1)]
        self.bad_inputs = rng.choice(["list", "number"]) if rng.random() < 0.03 else ""
        self.flags = {"create_graph": rng.random() < 0.4, "strict": rng.random() < 0.3}
        if self.name in MATRICES:
            self.flags["vectorize"] = rng.random() < 0.4
            if rng.random() < 0.25:
                strategy = rng.choice(["forward-mode", "forward-mode", "reverse-mode", "sideways"])
                self.flags["strategy" if self.name == "jacobian" else "outer_jacobian_strategy"] = strategy
        self.vector = rng.choice(VECTOR_KINDS)
        self.grad_mode = rng.random() < 0.7

    def __repr__(self) -> str:
        return (
            f"Case(seed={self.seed}: {self.name} of {self.function}, inputs={self.specs}, "
            f"tuple={self.is_tuple}, bad={self.bad_inputs!r}, {self.flags}, v={self.vector}, "
            f"grad_mode={self.grad_mode})"
        )

    @property
    def is_single(self) -> bool:
        return self.function == "single_precision" or any(spec[2] is torch.float32 for spec in self.specs)

    @property
    def is_sparse(self) -> bool:
        return any(spec[1] == "sparse" for spec in self.specs)

    @property
    def forward(self) -> bool:
        return "forward-mode" in self.flags.values()

    def _spec(self):
        rng = self._rng
        graph = rng.choice(["none", "none", "leaf", "inner"])
        return rng.choice(SHAPES), rng.choice(LAYOUTS), rng.choice(DTYPES), graph, rng.randint(0, 10**6)

    def inputs(self):
        """Fresh leaves and the inputs made of them."""
        leaves, tensors = [], []
        for shape, layout, dtype, graph, seed in self.specs:
            leaf = make(shape, layout, dtype, seed)
            if graph != "none":
                leaf.requires_grad_()
            leaves.append(leaf)
            tensor = leaf * 1.5 if graph == "inner" else leaf
            # A view made here would be inside the graph.
            tensors.append(tensor)
        value = tuple(tensors) if self.is_tuple else tensors[0]
        if self.bad_inputs == "list":
            value = list(value) if self.is_tuple else [value]
        if self.bad_inputs == "number":
            value = (*value, 2.0) if self.is_tuple else 2.0
        return leaves, value

    def v(self, tensors):
        """The vector, shaped like what it must match."""
        single = not isinstance(tensors, tuple)
        like = (tensors,) if single else tensors
        if self.vector in ("none", "number") or not all(isinstance(t, Tensor) for t in like):
            return 2.0 if self.vector == "number" else None
        parts = [make(tuple(t.shape), "plain", t.dtype, self.seed + i) for i, t in enumerate(like)]
        if self.vector == "grad":
            parts = [p.requires_grad_() if p.is_floating_point() or p.is_complex() else p for p in parts]
        if self.vector == "complex":
            parts = [p.to(torch.complex128) for p in parts]
        if self.vector == "float32":
            parts = [p.real.float() if p.is_complex() else p.float() for p in parts]
        if self.vector == "wrong_size":
            parts[-1] = make((*parts[-1].shape, 2), "plain", torch.float64, 1)
        if self.vector == "wrong_count":
            parts.append(parts[0])
        if self.vector == "list":
            return parts
        return tuple(parts) if not single or self.vector == "wrong_count" else parts[0]


def make(shape, layout, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    if dtype.is_complex:
        real = draw

        def draw(*size):
            return torch.complex(real(*size).real.double(), real(*size).real.double()).to(dtype)

    if layout == "sparse" and len(shape) and 0 not in shape and not dtype.is_complex:
        return draw(*shape).to_sparse()
    if layout == "strided" and len(shape):
        return draw(*(2 * s for s in shape))[tuple(slice(None, None, 2) for _ in shape)]
    if layout == "expanded" and len(shape):
        return draw(1, *shape[1:]).expand(shape)
    if layout == "transposed" and len(shape) >= 2:
        return draw(*shape[::-1]).permute(*reversed(range(len(shape))))
    return draw(*shape)


def observe(module, case: Case):
    """Everything that can be seen of one call."""
    leaves, inputs = case.inputs()
    given = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    states = [(t.requires_grad, t._version) for t in given]
    torch.manual_seed(case.seed)
    if case.name == "vjp":
        try:
            like = case.body([t.detach() for t in given])
        except (KeyError, IndexError, AttributeError):
            like = None
    else:
        like = inputs if isinstance(inputs, Tensor | tuple) else None
    arguments = () if case.name in MATRICES else (case.v(like),)
    events = []

    def func(*xs):
        fresh = not any(x is t for x in xs for t in given)
        # Grad mode is not compared under forward mode, where torch leaves it as it was.
        events.append(("call", len(xs), (fresh, torch.is_grad_enabled()) if not case.forward else None))
        return case.body(xs)

    torch.manual_seed(case.seed)
    with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(case.grad_mode):
        warnings.simplefilter("always")
        try:
            result = getattr(module, case.name)(func, inputs, *arguments, **case.flags)
            outcome = ("value", result)
        except Exception as error:  # whatever torch raises is the truth
            outcome = ("error", type(error), str(error))
        events.append(("grad mode after", torch.is_grad_enabled() == case.grad_mode))
    events.append(("random state", torch.rand(()).item()))
    events.append(("states", states == [(t.requires_grad, t._version) for t in given]))
    events.append(("grads", [leaf.grad is None for leaf in leaves], CAPTURED.grad is None))
    # Torch warns of its own use of torch.jit once a process, when forward mode is first used.
    texts = {str(w.message)[:60] for w in caught}
    events.append(("warnings", sorted(t for t in texts if "torch.jit.script" not in t)))
    third = third_derivative(outcome, leaves) if case.flags["create_graph"] else None
    return outcome, events, third


def third_derivative(outcome, leaves):
    """A derivative through the results with respect to the leaves and a captured tensor."""
    targets = [t for t in (*leaves, CAPTURED) if t.requires_grad]
    results = [t for t in pytree.tree_leaves(outcome[1:]) if isinstance(t, Tensor) and t.requires_grad]
    if not results or not targets:
        return None
    total = sum((t.abs() ** 2).sum() for t in results)
    try:
        grads = torch.autograd.grad(total, targets, allow_unused=True)
    except RuntimeError as error:
        return str(error)
    # Where there is no path autograd may say None or give zeros.
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, targets, strict=True)]


def difference(mine, theirs, detached, tolerance) -> str | None:
    """What differs between two results, in words, or None."""
    if isinstance(theirs, list) and detached:
        theirs = tuple(theirs)
    if type(mine) is not type(theirs):
        return f"type {type(mine).__name__} for {type(theirs).__name__}"
    if isinstance(mine, tuple | list):
        if len(mine) != len(theirs):
            return f"length {len(mine)} for {len(theirs)}"
        found = (difference(a, b, detached, tolerance) for a, b in zip(mine, theirs, strict=True))
        return next((d for d in found if d), None)
    if not isinstance(mine, Tensor):
        return None if mine == theirs else f"{mine!r} for {theirs!r}"
    return difference_of_tensors(mine, theirs, detached, tolerance)


def difference_of_tensors(mine, theirs, detached, tolerance):
    if detached and (mine.dtype, theirs.dtype) == (torch.float64, torch.float32):
        # In forward mode the dtype is the output's; torch's vmap forgets to promote a 0-dim tangent.
        theirs = theirs.double()
    for what in ("shape", "dtype", "layout", "device"):
        if getattr(mine, what) != getattr(theirs, what):
            return f"{what} {getattr(mine, what)} for {getattr(theirs, what)}"
    if not detached:
        if mine.requires_grad != theirs.requires_grad:
            return f"requires_grad {mine.requires_grad}"
        if (mine.grad_fn is None) != (theirs.grad_fn is None):
            return f"grad_fn {mine.grad_fn}"
    a, b = dense(mine.detach()), dense(theirs.detach())
    if not torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
        return f"values {a} for {b}"
    return None


def repaired(case: Case, outcome) -> bool:
    """Torch's own defects, which ours does not share (README, what differs from torch)."""
    if outcome[0] != "error":
        # Its hvp gives numbers there.
        is_left = case.name in ("vhp", "hessian") and case.function == "norm_at_zero"
        return is_left and any(bool(t.isnan().any()) for t in pytree.tree_leaves(outcome[1]))
    text = outcome[2]
    empty = "stack expects a non-empty TensorList" in text or "batch size" in text or "size 0" in text
    return empty or (case.forward and case.flags.get("vectorize", False))


def compare(ours, case: Case) -> str | None:
    mine, my_events, my_third = observe(ours, case)
    theirs, their_events, their_third = observe(reference, case)
    if repaired(case, theirs):
        return None
    if case.forward and mine[0] == theirs[0] == "error" and case.flags.get("vectorize", False):
        # The operation that forward mode lacks is named by another layer of torch.
        return None
    if case.is_sparse and mine[0] == theirs[0] == "error" and "parse" in mine[2] + theirs[2]:
        # Sparse tensors lack many operations; which one is met first is not part of the contract.
        return None
    tolerance = SINGLE if case.is_single else DOUBLE
    found = difference(mine, theirs, case.forward, tolerance)
    if found is None and my_events != their_events:
        found = f"events {my_events} for {their_events}"
    return found or difference(my_third, their_third, False, 100 * tolerance)


def main(count: int, first: int) -> int:
    failures = 0
    for seed in range(first, first + count):
        case = Case(seed)
        found = compare(secondorder.functional, case)
        if found:
            failures += 1
            print(f"{case}\n    {found[:300]}")
    print(f"{count - failures} passed, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    start = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**9)
    sys.exit(main(count, start))
