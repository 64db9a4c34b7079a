"""Curvature on part of the samples: what is honoured, what falls back and why, what is left alone."""

import copy
import io
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks

import optim
from optim.closure.calls import Calls
from optim.closure.samples import Samples
from optim.methods import sampling

N = 320
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = X[:, :3].argmax(1)

OPTIMIZERS = {
    "hessian_free": optim.HessianFree,
    "hessian_free_cg": lambda p, **o: optim.HessianFree(p, solver="cg", **o),
    "gauss_newton": optim.GaussNewton,
    "gauss_newton_cg": lambda p, **o: optim.GaussNewton(p, solver="cg", **o),
    "gauss_newton_direct": lambda p, **o: optim.GaussNewton(p, solver="direct", **o),
    "gauss_newton_nielsen": lambda p, **o: optim.GaussNewton(p, rule="nielsen", **o),
}


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def network(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *(middle or [nn.Tanh()]), nn.Linear(6, 3)).double()


def step(model, loss=None, make=optim.HessianFree, **options):
    """A step, after which the note in the report, behind the name of the loss, is returned."""
    optimizer = make(model.parameters(), **options)
    optimizer.step(loss or (lambda: F.cross_entropy(model(X), Y)))
    return optimizer.report.curvature.partition("; ")[2].rstrip(")")


def numbers(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# What is taken.


@pytest.mark.parametrize(
    ("wanted", "note"),
    [
        ("auto", "64"),
        (50, "50"),
        (0.5, "160"),
        (torch.tensor(7), "7"),
        (1e-9, "1"),
        (None, ""),
        (1.0, ""),
        (N, ""),
    ],
)
def test_sizes(make, wanted, note, request):
    if "gauss_newton_direct" in request.node.name and wanted == "auto":
        # What is decomposed is of all of them.
        note = ""
    expected = f"{note} of {N} samples" if note else ""
    assert step(network(), make=make, curvature_batch=wanted) == expected


@pytest.mark.parametrize("wanted", [0, -3, 0.0, 1.5, "half", True, float("nan"), [3]], ids=str)
def test_another_size_is_an_error(wanted):
    with pytest.raises(ValueError, match="curvature_batch must be .* a closure or None, got"):
        optim.HessianFree(network().parameters(), curvature_batch=wanted)


def test_newton_has_no_such_option():
    with pytest.raises(TypeError, match="curvature_batch"):
        optim.Newton(network().parameters(), curvature_batch="auto")


def test_few_samples_are_all_taken_and_nothing_is_said():
    model = network()
    few = 255
    assert step(model, lambda: F.cross_entropy(model(X[:few]), Y[:few])) == ""
    # Also of a loss that is of no one module's outputs.
    w = next(model.parameters())
    assert step(model, lambda: F.mse_loss(X[:few] @ w.T, X[:few, :1].expand(few, 6))) == ""


def test_all_samples_are_the_step_without_the_option(make):
    """Bit for bit; and with all but one of the samples alike, of which one is left out, to rounding."""
    models = [network() for _ in range(2)]
    for model, wanted in zip(models, (None, 1.0), strict=True):
        optimizer = make(model.parameters(), curvature_batch=wanted)
        for _ in range(3):
            optimizer.step(lambda model=model: F.cross_entropy(model(X), Y))
    assert torch.equal(numbers(models[0]), numbers(models[1]))


def test_samples_that_are_alike_stand_for_all(make):
    """Of N copies of one sample any part is as good as all: the same step, to rounding."""
    models, x, y = [network() for _ in range(2)], X[:1].expand(N, 4), Y[:1].expand(N)
    for model, wanted in zip(models, (None, 5), strict=True):
        optimizer = make(model.parameters(), damping=1e-2, curvature_batch=wanted)
        optimizer.step(lambda model=model: F.cross_entropy(model(x), y))
    assert optimizer.report.curvature.endswith("5 of 320 samples)")
    torch.testing.assert_close(numbers(models[0]), numbers(models[1]), rtol=1e-10, atol=1e-12)


TAILS = {
    "weights of classes": lambda z: F.cross_entropy(z, Y, weight=torch.tensor([1.0, 2.0, 3.0]).double()),
    "ignored classes": lambda z: F.cross_entropy(z, Y, ignore_index=1),
    "probabilities as targets": lambda z: F.cross_entropy(z, X[:, :3].softmax(1)),
    "sum": lambda z: F.cross_entropy(z, Y, reduction="sum"),
    "not reduced": lambda z: (F.cross_entropy(z, Y, reduction="none") * X[:, 0].abs()).mean(),
    "fused": lambda z: F.nll_loss(z.log_softmax(1), Y),
    "by hand": lambda z: (z - X[:, :3]).square().sum() / N,
    "two losses": lambda z: F.mse_loss(z[:, :1], X[:, :1]) + F.huber_loss(z[:, 1:], X[:, 1:3]),
    "a view": lambda z: F.cross_entropy(z.view(N, 3, 1), Y[:, None]),
    "rows that are left out": lambda z: F.cross_entropy(z[: N // 2], Y[: N // 2]),
    "probabilities": lambda z: F.mse_loss(z.softmax(1), X[:, :3]),
    "convex, unknown": lambda z: (z - X[:, :3]).cosh().log().mean(),
}


@pytest.mark.parametrize("name", TAILS)
def test_the_loss_may_be_any_of_one_module(name):
    model = network()
    assert (
        step(model, lambda: TAILS[name](model(X)), strict=True, curvature_batch=100) == f"100 of {N} samples"
    )


def gauss_newton_times(model, tail, v):
    """``J^T M J v`` by torch's own products, one after another."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    parts = tuple(
        part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)
    )

    def outputs(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (X,))

    z, u = torch.func.jvp(outputs, parameters, parts)
    if tail is TAILS["probabilities"]:
        soft = torch.func.jvp(lambda z: z.softmax(1), (z,), (u,))[1]
        u = torch.func.vjp(lambda z: z.softmax(1), z)[1](soft * (2 / z.numel()))[0]
    else:
        u = torch.autograd.functional.vhp(tail, z.detach(), u.detach())[1]
    pulled = torch.func.vjp(outputs, *parameters)[1](u)
    return torch.cat([part.flatten() for part in pulled]).detach()


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        z = self.net(x)
        return torch.cat([z, z.sin(), z.cos(), 2 * z, z.square(), z.tanh()], 1)


CASES = {name: (network, tail) for name, tail in TAILS.items()}
CASES["too many outputs to form blocks"] = (Wide, lambda z: F.cross_entropy(z, Y))


@pytest.mark.parametrize("name", CASES)
def test_on_average_it_is_the_matrix_of_all(name, monkeypatch):
    """What is drawn differs by step, what it is an estimate of does not: a product, against torch's own."""
    (make_model, tail), products, original = CASES[name], [], Samples.gauss_newton
    model = make_model()
    v = torch.randn(numbers(model).numel(), dtype=torch.float64)

    def noted(*args):
        operator = original(*args)
        products.append(operator @ v)
        return operator

    monkeypatch.setattr(Samples, "gauss_newton", noted)
    optimizer = optim.HessianFree(model.parameters(), lr=1e-30, curvature_batch=0.5, max_iter=1)
    draws = 60
    for _ in range(draws):
        optimizer.step(lambda: tail(model(X)))
    found = torch.stack(products)
    assert len(found) == draws
    expected = gauss_newton_times(model, tail, v)
    one, mean = ((part - expected).norm() for part in (found[0], found.mean(0)))
    # The mean of 60 is off by an eighth of what one is, on average.
    assert mean < 0.3 * one
    assert 0 < one < 0.7 * expected.norm()


def test_own_terms_of_parameters_are_kept_exactly():
    """A penalty so heavy that nothing else matters: a step as exact as with all samples."""
    model = network()

    def loss():
        return F.cross_entropy(model(X), Y) + 1e6 * sum(p.square().sum() for p in model.parameters())

    assert step(model, loss, curvature_batch=20, damping=1e-20).startswith("20 of")
    assert numbers(model).abs().max() < 1e-5


def test_a_module_with_more_outputs_and_keywords():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.extra = network(), nn.Linear(4, 1).double()

        def forward(self, *, inputs, scale):
            hidden = {"logits": scale * self.net(inputs), "extra": self.extra(inputs)}
            return hidden, inputs.sum()

    model = Two()

    def loss():
        out, _ = model(inputs=X, scale=2.0)
        return F.cross_entropy(out["logits"], Y) + F.mse_loss(out["extra"], X[:, :1])

    assert step(model, loss, curvature_batch=30) == f"30 of {N} samples"


def test_modules_without_parameters_are_a_part_of_the_loss():
    model, criterion, scale = network(), nn.CrossEntropyLoss(), nn.Hardtanh(-50, 50)
    assert step(model, lambda: criterion(scale(model(X)), Y), curvature_batch=30) == f"30 of {N} samples"


def test_sequences_by_rows():
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            self.rnn, self.head = nn.RNN(2, 5, batch_first=batch_first), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    for batch_first in (True, False):
        model, x = Tagger(batch_first), torch.randn(N, 7, 2)
        note = step(
            model, lambda model=model, x=x: F.cross_entropy(model(x).flatten(0, 1), torch.arange(7 * N) % 3)
        )
        assert note == (f"64 of {N} samples" if batch_first else MIXES)


def test_a_model_without_a_closure():
    model = network()
    optimizer = optim.HessianFree(model.parameters(), model=model, curvature_batch=40)
    for _ in range(3):
        before = optimizer.report.new_loss if optimizer.report else float("inf")
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        assert "40 of 320 samples" in optimizer.report.curvature
        assert optimizer.report.new_loss < before


def test_a_grad_scaler():
    model = network().float()
    optimizer = optim.HessianFree(model.parameters(), model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(X.float()), Y)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert "64 of 320 samples" in optimizer.report.curvature
        assert optimizer.report.new_loss < optimizer.report.loss


def test_autocast():
    model = network().float()

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(X.float())
        return F.cross_entropy(out.float(), Y)

    assert step(model, loss) == f"64 of {N} samples"


def test_groups_decay_and_maximize(make):
    model = network()
    groups = [
        {"params": model[0].parameters(), "weight_decay": 0.1, "damping_scale": 3.0},
        {"params": model[2].parameters(), "lr": 0.0},
    ]
    optimizer = make(groups, maximize=True, curvature_batch=50)
    still = copy.deepcopy(model[2].state_dict())
    for _ in range(3):
        optimizer.step(lambda: -F.cross_entropy(model(X), Y))
        assert optimizer.report.new_loss <= optimizer.report.loss
        assert "50 of 320 samples" in optimizer.report.curvature
    assert all(torch.equal(still[name], value) for name, value in model[2].state_dict().items())


def test_outputs_that_the_closure_returns():
    model = network()

    def closure(outputs):
        z = model(X)
        return F.cross_entropy(z, Y), outputs(z)

    assert step(model, lambda: closure(lambda z: z), curvature_batch=30) == f"30 of {N} samples"
    # Linear in the outputs, by mistake: as without the option.
    optimizer = optim.HessianFree(model.parameters())

    def linear():
        z = model(X).log_softmax(1)
        return F.nll_loss(z, Y), z

    with pytest.warns(UserWarning, match="linear in the outputs"):
        optimizer.step(linear)
    assert optimizer.report.curvature.startswith("hessian (")


def test_many_outputs_a_sample():
    """More than blocks are formed for."""
    model, x = network(nn.Tanh(), nn.Linear(6, 6)), X
    model.add_module("last", nn.Linear(3, 40).double())
    assert step(model, lambda: F.cross_entropy(model(x), 13 * Y), curvature_batch=30) == f"30 of {N} samples"


@pytest.mark.parametrize("width", [3, 20], ids=["blocks are formed", "blocks are not formed"])
def test_no_tensor_is_made_without_a_device(width, monkeypatch):
    for owner, name in (
        (Samples, "of"),
        (Samples, "curvatures"),
        (Samples, "gauss_newton"),
        (sampling, "draw"),
    ):
        original = getattr(owner, name)

        def on_meta(*args, original=original):
            with torch.device("meta"):
                return original(*args)

        monkeypatch.setattr(owner, name, on_meta)
    model = nn.Sequential(network(), nn.Linear(3, width).double())
    assert step(model) == f"64 of {N} samples"


# What falls back.

MIXES = "all samples: the module makes another output of a sample among others"


class Fixed(nn.Module):
    """Knows how many samples there are."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x.view(N, 4))


class Centred(Fixed):
    def forward(self, x):
        return self.net(x - x.mean(0))


class Reused(Fixed):
    """Writes to a buffer, and fails of less than all samples."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        torch.rand(3)
        out = self.net(x)
        if len(x) < N:
            raise ValueError("too few")
        return out


def batch_norm():
    model = network(nn.BatchNorm1d(6), nn.Tanh())
    return model, lambda: F.cross_entropy(model(X), Y), MIXES


def dropout():
    model = network(nn.Tanh(), nn.Dropout(0.5))
    return model, lambda: F.cross_entropy(model(X), Y), MIXES


def attention_over_samples():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0).double()
    return layer, lambda: F.mse_loss(layer(X), X), MIXES


def centred():
    model = Centred()
    return model, lambda: F.cross_entropy(model(X), Y), MIXES


def other_parameters():
    model = network()
    own = nn.ParameterList([p.detach().clone() for p in model.parameters()])
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def loss():
        values = dict(zip(dict(model.named_parameters()), own, strict=True))
        return F.cross_entropy(torch.func.functional_call(model, values, (X,)), Y)

    return own, loss, "all samples: the loss was computed from no module's outputs"


def two_modules():
    model = network()
    loss = lambda: F.cross_entropy(model[2](torch.tanh(model[0](X))), Y)  # noqa: E731
    return model, loss, "all samples: the loss was computed from 2 calls of modules"


def two_calls():
    model = network()
    loss = lambda: F.cross_entropy(model(X), Y) + F.mse_loss(model(2 * X), X[:, :3])  # noqa: E731
    return model, loss, "all samples: the loss was computed from 2 calls of modules"


def loss_inside():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, y):
            return F.cross_entropy(self.net(x), y)

    model = Whole()
    return model, lambda: model(X, Y), None


def coupled_loss():
    model = network()
    loss = lambda: (model(X) - X[:, :3]).square().mean().sqrt()  # noqa: E731
    return model, loss, "all samples: the loss of a sample depends on the outputs of others"


def across_samples():
    model = network()
    loss = lambda: F.mse_loss(model(X).T @ X, torch.ones(3, 4, dtype=torch.float64))  # noqa: E731
    return model, loss, "all samples: the loss of a sample depends on the outputs of others"


def fixed():
    model = Fixed()
    return model, lambda: F.cross_entropy(model(X), Y), "all samples: the module refuses a part of its inputs"


def no_rows():
    torch.manual_seed(0)
    table = nn.Linear(N, 4).double()
    why = "all samples: the module's inputs have no row for each sample"
    eye = torch.ones(4, N, dtype=torch.float64)

    class Grid(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = table

        def forward(self, x):
            return self.table(x).reshape(2, 8).T

    model = Grid()
    return model, lambda: F.mse_loss(model(eye), torch.ones(8, 2, dtype=torch.float64)), why


def differentiated():
    model = network()

    def loss():
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.square().mean()

    return model, loss, "all samples: the loss was computed from no module's outputs"


FALLBACKS = [
    batch_norm,
    dropout,
    attention_over_samples,
    centred,
    other_parameters,
    two_modules,
    two_calls,
    coupled_loss,
    across_samples,
    fixed,
    no_rows,
    differentiated,
]


@pytest.mark.parametrize("case", FALLBACKS, ids=lambda case: case.__name__)
def test_what_is_not_of_samples_is_the_step_of_all(case):
    """With a reason, and one warning where a size was asked for; the same step, bit for bit."""
    model, loss, why = case()
    torch.manual_seed(3)
    state = copy.deepcopy(model.state_dict())
    with pytest.warns(
        UserWarning, match="was asked for curvature_batch=20, but takes all samples: "
    ) as caught:
        note = step(model, loss, curvature_batch=20)
    assert len(caught) == 1
    assert note.startswith(why)
    results = [numbers(model)]
    for wanted in (None, 0.5):
        model.load_state_dict(state)
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step(model, loss, curvature_batch=wanted)
        results.append(numbers(model))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_loss_without_gauss_newton_matrix_is_no_part():
    model, loss, _ = loss_inside()
    assert step(model, loss, curvature_batch=None) == ""
    with pytest.warns(UserWarning, match="takes all samples"):
        step(model, loss, curvature_batch=20)


def test_auto_says_nothing_but_in_the_report():
    model, loss, why = batch_norm()
    assert step(model, loss).startswith(why)


def test_a_compiled_module_and_data_parallel():
    model = network()
    parallel = nn.DataParallel(model)
    assert step(model, lambda: F.cross_entropy(parallel(X), Y)) == f"64 of {N} samples"
    compiled = torch.compile(model, backend="eager")
    assert step(model, lambda: F.cross_entropy(compiled(X), Y)) == f"64 of {N} samples"
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_module():
    model = network()
    scripted = torch.jit.trace(model, X)
    note = step(model, lambda: F.cross_entropy(scripted(X), Y))
    assert note == f"64 of {N} samples" or note.startswith("all samples")


def test_calls_inside_of_a_transform_are_not_noted():
    model = network()

    def loss():
        return F.cross_entropy(torch.vmap(model)(X), Y)

    note = step(model, loss)
    assert note == "all samples: the loss was computed from no module's outputs"


def test_calls_of_another_thread_are_not_noted():
    model, other = network(), network()

    def loss():
        thread = threading.Thread(target=lambda: other(X))
        thread.start()
        thread.join()
        return F.cross_entropy(model(X), Y)

    assert step(model, loss) == f"64 of {N} samples"


# What is left alone.


def test_buffers_random_state_and_gradients(make):
    model = network(nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3)).eval()
    gradients = [torch.autograd.grad(F.cross_entropy(model(X), Y), list(model.parameters()))]
    state, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    assert step(model, make=make, curvature_batch=30) == f"30 of {N} samples"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, model.buffers(), buffers))
    for parameter, gradient in zip(model.parameters(), gradients[0], strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def hook_count():
    return [
        len(getattr(hooks, name))
        for name in dir(hooks)
        if name.startswith("_global_") and isinstance(getattr(hooks, name), dict)
    ]


def test_an_error_in_the_second_call_leaves_no_trace():
    model = Reused()
    counts, state = hook_count(), torch.get_rng_state()
    torch.rand(3)
    after, filters = torch.get_rng_state(), list(warnings.filters)
    torch.set_rng_state(state)
    note = step(model, lambda: F.cross_entropy(model(X), Y))
    assert note == "all samples: the module refuses a part of its inputs: too few"
    assert model.calls == 1
    assert torch.equal(torch.get_rng_state(), after)
    assert hook_count() == counts
    assert warnings.filters == filters


def test_an_error_in_the_closure_leaves_no_hook():
    model, counts, filters = network(), hook_count(), list(warnings.filters)

    def closure():
        model(X)
        raise KeyboardInterrupt

    optimizer = optim.HessianFree(model.parameters())
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert hook_count() == counts
    assert warnings.filters == filters


def test_calls_that_end_by_an_exception_do_not_hide_later_ones():
    model, broken = network(), Reused()
    with Calls([torch.device("cpu")]) as calls:
        with pytest.raises(ValueError, match="too few"):
            broken(X[:3])
        model(X)
    assert [call.module for call in calls.made] == [model]


def test_hooks_of_the_user_fire_in_the_second_call_as_in_a_trial():
    model, seen = network(), []
    model.register_forward_hook(lambda *_: seen.append(len(_[2])))
    step(model, curvature_batch=30)
    assert seen.count(30) == 1


def test_a_hook_that_changes_outputs_is_a_part_of_the_loss():
    model = network()
    model.register_forward_hook(lambda module, args, out: 3 * out)
    assert step(model, curvature_batch=30) == f"30 of {N} samples"


def test_inputs_and_targets_stay_as_they_are():
    model, x = network(), X.clone()
    step(model, lambda: F.cross_entropy(model(x), Y), curvature_batch=30)
    assert torch.equal(x, X)
    assert x._version == 0


# From step to step.


def test_the_share_doubles_after_a_wrong_model_only():
    model = network(nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
    optimizer = optim.HessianFree(model.parameters())
    labels, share, shares = torch.arange(N) % 3, 0.2, []
    for _ in range(40):
        optimizer.step(lambda: F.cross_entropy(model(X), labels))
        assert f"{round(share * N)} of" in optimizer.report.curvature or share == 1.0
        share = min(1.0, 2 * share) if optimizer.report.rho <= 0.25 else share
        assert optimizer.param_groups[0]["curvature_share"] == pytest.approx(share)
        shares.append(share)
    assert len(set(shares)) > 1


def test_samples_are_drawn_anew():
    model = network()
    optimizer, seen = optim.HessianFree(model.parameters(), curvature_batch=10), []
    model.register_forward_hook(lambda _, args, out: seen.append(args[0]) if len(args[0]) == 10 else None)
    for _ in range(2):
        optimizer.step(lambda: F.cross_entropy(model(X), Y))
    assert not torch.equal(*seen)


@pytest.mark.parametrize("wanted", ["auto", 50])
def test_a_resumed_run_is_the_uninterrupted_one(make, wanted):
    model = network().float()
    x = X.float()

    def run(model, optimizer):
        for _ in range(4):
            optimizer.step(lambda: F.cross_entropy(model(x), Y))
        return optimizer.report

    optimizer = make(model.parameters(), curvature_batch=wanted)
    run(model, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    again = copy.deepcopy(model)
    resumed = make(again.parameters(), curvature_batch=wanted)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    first, second = run(model, optimizer), run(again, resumed)
    assert first.curvature == second.curvature
    # A formed matrix is made in batches or by a loop, as is faster: two runs may differ by rounding.
    if not optimizer.report.form.startswith("formed"):
        assert torch.equal(numbers(model), numbers(again))


def test_checkpoints_from_before_the_option_load():
    model = network()
    optimizer = optim.HessianFree(model.parameters())
    state = optimizer.state_dict()
    for name in ("curvature_batch", "curvature_share", "curvature_draws"):
        del state["param_groups"][0][name]
    optimizer.load_state_dict(state)
    optimizer.step(lambda: F.cross_entropy(model(X), Y))
    assert "64 of" in optimizer.report.curvature


def test_products_and_set_up_count_by_their_part():
    model = network()
    optimizer = optim.HessianFree(model.parameters(), curvature_batch=0.25, max_trials=1, max_extension=1.0)
    optimizer.step(lambda: F.cross_entropy(model(X), Y))
    report = optimizer.report
    # Gradient, module and graph on a quarter, products; the closure run twice in a first step, and a trial.
    expected = 1 + 0.25 * 4 / 3 * (1 + report.products) + 2 / 3
    assert report.gradient_equivalents == pytest.approx(expected)


# A closure of its own.


def test_a_closure_of_a_part_has_the_curvature_of_its_loss(make):
    models = [network() for _ in range(2)]
    rows = torch.arange(0, N, 4)
    calls = []

    def part():
        calls.append(1)
        models[0].zero_grad()
        loss = F.cross_entropy(models[0](X[rows]), Y[rows])
        loss.backward()
        return loss

    optimizer = make(models[0].parameters(), curvature_batch=part)
    optimizer.step(lambda: F.cross_entropy(models[0](X), Y))
    assert optimizer.report.curvature == "gauss-newton (cross_entropy; part by a closure)"
    assert len(calls) == 1
    gradients = torch.autograd.grad(F.cross_entropy(models[1](X), Y), list(models[1].parameters()))
    for parameter, gradient in zip(models[0].parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)
    products = optimizer.report.products
    plain = make(models[1].parameters(), curvature_batch=None)
    plain.step(lambda: F.cross_entropy(models[1](X), Y))
    assert not torch.equal(numbers(models[0]), numbers(models[1]))
    assert optimizer.report.gradient_equivalents < 2 + products * 4 / 3


def test_a_closure_of_all_is_the_step_of_all(make):
    models = [network() for _ in range(2)]
    closures = [lambda model=model: F.cross_entropy(model(X), Y) for model in models]
    for model, closure, part in zip(models, closures, (closures[0], None), strict=True):
        optimizer = make(model.parameters(), curvature_batch=part)
        for _ in range(2):
            optimizer.step(closure)
    assert torch.equal(numbers(models[0]), numbers(models[1]))


def test_the_closure_of_a_part_is_copied_and_kept_in_no_checkpoint():
    model = network()
    optimizer = optim.HessianFree(model.parameters(), curvature_batch=lambda: F.cross_entropy(model(X), Y))
    optimizer.step(lambda: F.cross_entropy(model(X), Y))
    assert optimizer.state_dict()["param_groups"][0]["curvature_batch"] is None
    # The closure evaluates the model of before, whose parameters are the copy's.
    again = copy.copy(optimizer)
    again.step(lambda: F.cross_entropy(model(X), Y))
    assert again.report.curvature.endswith("part by a closure)")


def test_an_error_in_the_closure_of_a_part_restores():
    model = network()
    optimizer = optim.HessianFree(model.parameters(), curvature_batch=lambda: None)
    before = numbers(model)
    with pytest.raises(TypeError, match="closure must return the loss"):
        optimizer.step(lambda: F.cross_entropy(model(X), Y))
    assert torch.equal(numbers(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_the_closure_of_a_part_has_the_random_numbers_that_come_next():
    model, drawn = network(), []

    def part():
        rows = torch.randperm(N)[:50]
        drawn.append(rows)
        return F.cross_entropy(model(X[rows]), Y[rows])

    optimizer = optim.HessianFree(model.parameters(), curvature_batch=part)
    for _ in range(2):
        optimizer.step(lambda: F.cross_entropy(model(X), Y))
    assert not torch.equal(*drawn)
