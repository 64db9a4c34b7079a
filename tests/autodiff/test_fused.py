"""Our nodes in the graph of a gradient, against dense matrices of torch's own and finite differences."""

import contextlib

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from secondorder import Hessian, Jacobian
from secondorder.autodiff import graph
from secondorder.autodiff.decompose import decompose
from secondorder.functional import hvp, jvp, linearize_grad

DOUBLE = torch.float64
TOLERANCE = dict(rtol=1e-11, atol=1e-12)
# Of fourth-order central differences of gradients, in float64.
DIFFERENCE = dict(rtol=1e-6, atol=1e-7)
MASK = torch.tensor([[0.0, float("-inf"), 0.0, 0.0], [0.0, 0.0, float("-inf"), float("-inf")], [0.0] * 4])


def attention(x, w, b):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(x, x * w, x + b, is_causal=True)


# Each of x, shape (2, 3, 4), and of two rows of shape (4,).
OPERATIONS = {
    "gelu": lambda x, w, b: F.gelu(x * w) + b,
    "gelu_tanh": lambda x, w, b: F.gelu(x * w + b, approximate="tanh"),
    "gelu_not_contiguous": lambda x, w, b: F.gelu((x * w).transpose(0, 2)) * b[0],
    "softmax": lambda x, w, b: (x * w).softmax(-1) + b,
    "softmax_of_dim_0": lambda x, w, b: (x * w).softmax(0) * b,
    "softmax_masked": lambda x, w, b: (x * w + MASK).softmax(-1) * b,
    "softmax_not_contiguous": lambda x, w, b: (x * w).transpose(1, 2).softmax(1) * b[0],
    "log_softmax": lambda x, w, b: (x * w).log_softmax(1) + b,
    "cross_entropy": lambda x, w, b: F.cross_entropy(x * w, torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])) * b,
    "layer_norm": lambda x, w, b: F.layer_norm(x.sin(), (4,), w, b),
    "layer_norm_of_data": lambda x, w, b: F.layer_norm(x.detach(), (4,), w, b) * x.sum(),
    "layer_norm_without_bias": lambda x, w, b: F.layer_norm(x * b, (4,), w),
    "layer_norm_not_affine": lambda x, w, b: F.layer_norm(x * w, (4,)) * b,
    "layer_norm_of_two": lambda x, w, b: F.layer_norm(x * w, (3, 4), x[0].cos(), x[1]) * b,
    "layer_norm_not_contiguous": lambda x, w, b: F.layer_norm((x * w).transpose(1, 2), (3,), w[:3]) * b[0],
    "layer_norm_frozen_weight": lambda x, w, b: F.layer_norm(x * w, (4,), w.detach(), b),
    "linear": lambda x, w, b: F.linear(x.sin(), x[0] * w, b[:3]),
    "linear_of_rows": lambda x, w, b: F.linear(x[0] * w, x[1].cos(), b[1:]),
    "linear_without_bias": lambda x, w, b: F.linear(x.cos(), x[0] * w + b),
    "linear_of_itself": lambda x, w, b: F.linear(x[0], x[0] * w, b[:3]),
    "linear_of_data": lambda x, w, b: F.linear(x[0].detach(), x[1] * w, b[:3]).sin(),
    "linear_frozen_weight": lambda x, w, b: F.linear(x[0] * w, x[1].detach(), b[:3]),
    "linear_frozen_bias": lambda x, w, b: F.linear(x[0] * b, x[1] * w, b[:3].detach()),
    "product": lambda x, w, b: (x[0] * w) @ x[1].T.contiguous() * b[:3],
    "products_batched": lambda x, w, b: (x * w) @ (x + b).mT,
    "addmm_scaled": lambda x, w, b: torch.addmm(b[:3], x[0] * w, x[1].T, beta=2, alpha=3),
    "addmm_of_a_matrix": lambda x, w, b: torch.addmm(x[0, :, :3], x[0] * w, x[1].T) * b[:3],
    "addmm_of_a_column": lambda x, w, b: torch.addmm(x[0, :, :1], x[0] * w, x[1].T) * b[:3],
    "attention": attention,
}
# What torch's own nodes stay for.
LEFT_ALONE = {"addmm_scaled", "addmm_of_a_matrix", "addmm_of_a_column"}


def point(dtype=DOUBLE):
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=DOUBLE).to(dtype).requires_grad_() for shape in ((2, 3, 4), (4,), (4,))]


@pytest.fixture(params=OPERATIONS)
def name(request):
    return request.param


def loss_of(name):
    """A function with curvature of its own behind the operation, so that gradients vary."""
    operation = OPERATIONS[name]
    return lambda *tensors: operation(*tensors).sin().pow(2).sum() + tensors[1].pow(3).sum()


def has_ours(tensors):
    return any(isinstance(node, graph._PythonNode) for node in graph.nodes(tensors))


@pytest.mark.parametrize("batched", [True, False])
def test_products_equal_the_dense_matrices(name, batched):
    tensors = point()
    outputs = OPERATIONS[name](*tensors)
    H, J = (
        Hessian(loss_of(name)(*tensors), tensors, batched=batched),
        Jacobian(outputs, tensors, batched=batched),
    )
    assert has_ours(H._kept.outputs) or name in LEFT_ALONE
    dense = oracles.dense_hessian(loss_of(name), tensors)
    torch.testing.assert_close(H.dense(), dense, **TOLERANCE)
    # By the products that are shared by all passes but the first.
    torch.testing.assert_close(H.dense(), dense, **TOLERANCE)
    torch.testing.assert_close(J.dense(), oracles.dense_jacobian(OPERATIONS[name], tensors), **TOLERANCE)
    fresh = Hessian(loss_of(name)(*tensors), tensors, batched=batched, keep_graph=False)
    torch.testing.assert_close(fresh.dense(), dense, **TOLERANCE)


def test_products_equal_finite_differences(name):
    tensors = point()
    v = tuple(map(torch.randn_like, tensors))
    x = torch.cat([t.detach().view(-1) for t in tensors])
    flat_v = torch.cat([t.view(-1) for t in v])

    def gradient(flat):
        parts = [
            p.view(t.shape).requires_grad_() for p, t in zip(flat.split([24, 4, 4]), tensors, strict=True)
        ]
        grads = torch.autograd.grad(loss_of(name)(*parts), parts, allow_unused=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in grads])

    if any(word in name for word in ("data", "frozen")):
        pytest.skip("constants would move")
    h = 2e-5
    near, far = (gradient(x + s * flat_v) - gradient(x - s * flat_v) for s in (h, 2 * h))
    expected = (8 * near - far) / (12 * h)
    product = hvp(loss_of(name), tuple(t.detach() for t in tensors), v)[1]
    torch.testing.assert_close(torch.cat([p.reshape(-1) for p in product]), expected, **DIFFERENCE)


def test_functional_products_equal_torchs(name):
    tensors = tuple(t.detach() for t in point())
    v = tuple(map(torch.randn_like, tensors))
    expected = torch.autograd.functional.vhp(loss_of(name), tensors, v)[1]
    for product in (hvp(loss_of(name), tensors, v)[1], linearize_grad(loss_of(name), tensors)[2](v)):
        torch.testing.assert_close(product, expected, **TOLERANCE)
    expected = torch.autograd.functional.jvp(OPERATIONS[name], tensors, v)[1]
    torch.testing.assert_close(jvp(OPERATIONS[name], tensors, v)[1], expected, **TOLERANCE)


def third(gradient, tensors, v):
    """The gradient of ``v' H v``."""
    product = torch.autograd.grad(gradient, tensors, v, create_graph=True, allow_unused=True)
    curvature = sum((p * u).sum() for p, u in zip(product, v, strict=True) if p is not None)
    grads = torch.autograd.grad(curvature, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True)]


def test_third_derivatives_through_our_nodes(name):
    """Against torch's; of layer norm, where that is wrong in torch, against its composition."""
    tensors = point()
    v = tuple(map(torch.randn_like, tensors))
    own = Hessian(loss_of(name)(*tensors), tensors)._kept.outputs
    with decompose() if "norm" in name else contextlib.nullcontext():
        loss = loss_of(name)(*tensors)
    torchs = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    torch.testing.assert_close(third(own, tensors, v), third(torchs, tensors, v), **TOLERANCE)


def test_single_precision(name):
    dense = oracles.dense_hessian(loss_of(name), point())
    tensors = point(torch.float32)
    found = Hessian(loss_of(name)(*tensors), tensors).dense()
    # Rounding of the point, of sums of a few dozen terms and of what curves them.
    torch.testing.assert_close(found.double(), dense, rtol=1e-3, atol=2e-4 * float(dense.abs().max()))


def test_half_precision_is_torchs_own():
    tensors = point(torch.bfloat16)
    loss = F.gelu(tensors[0] * tensors[1]).square().sum() + tensors[2].square().sum()
    H = Hessian(loss, tensors)
    assert not has_ours(H._kept.outputs)
    v = torch.ones(H.shape[0], dtype=torch.bfloat16)
    expected = H @ v
    grads = torch.autograd.grad(loss, tensors, create_graph=True)
    product = torch.autograd.grad(grads, tensors, [torch.ones_like(t) for t in tensors])
    assert torch.equal(expected, torch.cat([p.view(-1) for p in product]))


def test_the_hook_of_a_user_on_a_node_is_heard():
    """What it makes of a result is not what our node would."""
    x = torch.randn(5, dtype=DOUBLE, requires_grad=True)
    y = F.gelu(x)
    y.grad_fn.register_hook(lambda results, _: (results[0] * x,))
    H = Hessian(y.square().sum(), [x])
    g = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
    dense = torch.stack(
        [torch.autograd.grad(g, x, e, retain_graph=True)[0] for e in torch.eye(5, dtype=DOUBLE)]
    )
    torch.testing.assert_close((torch.eye(5, dtype=DOUBLE) @ H), dense, **TOLERANCE)


def test_the_graph_of_the_user_is_as_before():
    tensors = point()
    loss = loss_of("layer_norm")(*tensors)
    before = graph.HookCount()
    H = Hessian(loss, tensors)
    assert not before.has_grown()
    assert has_ours(H._kept.outputs)
    assert not has_ours(torch.autograd.grad(loss, tensors, create_graph=True))


def test_a_tensor_changed_in_place_is_noticed():
    x = torch.randn(4, dtype=DOUBLE, requires_grad=True)
    H = Hessian(F.gelu(x).square().sum(), [x])
    for _ in range(3):
        H @ torch.ones(4, dtype=DOUBLE)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        H @ torch.ones(4, dtype=DOUBLE)


def test_inside_a_checkpoint():
    tensors = tuple(t.detach() for t in point())
    v = tuple(map(torch.randn_like, tensors))
    calls = []

    def block(x, w, b):
        calls.append(1)
        return F.layer_norm(F.gelu(F.linear(x, x[0] * w, b[:3])), (3,)).softmax(-1)

    def func(x, w, b):
        return checkpoint(block, x, w, b, use_reentrant=False).pow(3).sum()

    expected = torch.autograd.functional.vhp(func, tensors, v)[1]
    torchs, calls[:] = len(calls), []
    torch.testing.assert_close(hvp(func, tensors, v)[1], expected, **TOLERANCE)
    assert len(calls) <= torchs
