"""Steps without a closure: what ``backward`` was called on is computed again, through ``model=``."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

import optim
import secondorder
from optim.methods.formed import Formed
from optim.methods.grown import Grown
from optim.methods.residual import Residual
from optim.methods.truncated import Truncated

OPTIMIZERS = {"newton": optim.Newton, "hessian_free": optim.HessianFree, "gauss_newton": optim.GaussNewton}


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def network(dtype=torch.float64):
    """With dropout and running statistics: what must be the same in all evaluations, and move once."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


X = zoo.vector(96, 1).view(24, 4)
Y = (X[:, :3] + 0.1).argmax(1)


def backward_only(model, optimizer, compute):
    optimizer.zero_grad()
    compute(model)
    return optimizer.step()


def with_closure(model, optimizer, compute):
    def closure():
        optimizer.zero_grad()
        return compute(model)

    return optimizer.step(closure)


def pair(make, compute, steps=4, model=network, **options):
    """Losses, model and optimizer with a closure and without, from the same random state."""
    results = []
    for step, watched in ((with_closure, False), (backward_only, True)):
        net = model()
        optimizer = make(net.parameters(), **({"model": net} if watched else {}), **options)
        torch.manual_seed(3)
        losses = [float(step(net, optimizer, compute)) for _ in range(steps)]
        results.append((losses, net, optimizer, torch.rand(1)))
    return results


def cross_entropy(model):
    loss = F.cross_entropy(model(X), Y)
    loss.backward()
    return loss


def module_loss(model):
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)(model(input=X), Y)
    loss.backward()
    return loss


def micro_batches(model):
    total = 0.0
    for x, y in zip(X.split(8), Y.split(8), strict=True):
        loss = F.cross_entropy(model(x), y) / 3
        loss.backward()
        total += loss.item()
    return total


def vector_loss(model):
    losses = F.cross_entropy(model(X), Y, reduction="none")
    weights = torch.linspace(0.5, 1.5, 24, dtype=losses.dtype) / 24
    losses.backward(gradient=weights)
    return losses.detach() @ weights


def two_losses(model):
    z = model(X)
    loss = F.cross_entropy(z, Y)
    loss += 0.1 * F.mse_loss(z, torch.ones_like(z))
    torch.autograd.backward([loss])
    return loss


def assembled(model):
    """Views, writes to a new tensor, random numbers after the model."""
    z = F.dropout(2 * model(X), 0.1)
    z[:, 0] += 1
    whole = torch.zeros_like(z)
    whole[:12], whole[12:] = z[:12], z[12:] * 0.5
    loss = F.cross_entropy(whole.T.T, Y)
    loss.backward()
    return loss


def written_to(model):
    """Writes to tensors that were there before, by an operator and by a norm."""
    mean, hold = torch.zeros_like(X[0, :3]), torch.zeros_like(X[:, :3])
    z = F.batch_norm(model(X), mean, torch.ones_like(mean), training=True)
    torch.ops.aten.add_.Tensor(hold, z)
    loss = F.cross_entropy(torch.sigmoid_(input=hold), Y)
    loss.backward()
    return loss


def two_calls(model):
    loss = F.mse_loss(model(X), torch.zeros_like(X[:, :3])) + F.cross_entropy(model(-X), Y)
    loss.backward()
    return loss


def autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(X), Y)
    loss.backward()
    return loss


def clipped(model):
    loss = F.cross_entropy(model(X), Y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    return loss


def masked(model):
    """Without a gradient but not constant: masks, conditions, indices, detached weights, pseudo-labels."""
    z = model(X)
    margin = 1 - (2 * F.one_hot(Y, 3) - 1) * z
    hinge = (margin * (margin > 0)).mean()
    robust = torch.where(z.abs() < 0.5, 0.5 * z.square(), z.abs() - 0.125).mean()
    positive = z[z > 0].square().mean()
    weighted = (F.cross_entropy(z, Y, reduction="none") * z.detach().softmax(1).amax(1)).mean()
    own = F.cross_entropy(z, z.argmax(1))
    loss = hinge + robust + positive + weighted + 0.1 * own + 1e-3 * z.square().mean()
    loss.backward()
    return loss


def zero_gradient_first(model):
    """A backward pass that leaves zeros is not one that was thrown away."""
    z = model(X)
    F.mse_loss(z, z.detach()).backward(retain_graph=True)
    loss = F.cross_entropy(z, Y)
    loss.backward()
    return loss


COMPUTE = [
    masked,
    zero_gradient_first,
    cross_entropy,
    module_loss,
    micro_batches,
    vector_loss,
    two_losses,
    assembled,
    written_to,
    two_calls,
    autocast,
    clipped,
]


@pytest.mark.filterwarnings("ignore:.* found no Gauss-Newton matrix")  # of masked
@pytest.mark.parametrize("compute", COMPUTE, ids=lambda f: f.__name__)
@pytest.mark.slow
def test_steps_are_those_of_the_closure(compute, make):
    (losses, model, optimizer, number), (ours, watched, again, drawn) = pair(make, compute)
    # A loss that is returned as a number comes back in single precision.
    assert ours == pytest.approx(losses, rel=1e-6 if compute is micro_batches else 1e-9)
    for a, b in zip(model.parameters(), watched.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9)
    # Running statistics moved once for each call, random numbers were drawn once.
    for a, b in zip(model.buffers(), watched.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert torch.equal(number, drawn)
    assert again.report.curvature == optimizer.report.curvature
    assert again.report.accepted


def test_a_report_says_what_it_would_with_a_closure():
    (_, _, optimizer, _), (_, _, again, _) = pair(optim.GaussNewton, cross_entropy)
    for ours, theirs in zip(again.report, optimizer.report, strict=True):
        assert ours == (pytest.approx(theirs, rel=1e-9) if isinstance(theirs, float) else theirs)


@pytest.mark.parametrize("where", ["compiled", "inner", "in_place"])
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_compiled_models(where, make):
    torch._dynamo.reset()
    model = network()
    optimizer_model = model
    if where == "in_place":
        model.compile(backend="eager")
        called = model
    else:
        called = torch.compile(model, backend="eager")
        optimizer_model = called if where == "compiled" else model
    optimizer = make(model.parameters(), model=optimizer_model)
    torch.manual_seed(3)
    losses = [float(backward_only(called, optimizer, cross_entropy)) for _ in range(4)]
    assert losses == pytest.approx(pair(make, cross_entropy)[0][0], rel=1e-9)
    torch._dynamo.reset()


def test_grad_scaler(make):
    model = network(torch.float32)
    optimizer = make(model.parameters(), model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(X.float()), Y)
        scaler.scale(loss).backward()
        losses.append(float(scaler.step(optimizer)))
        scaler.update()
    assert losses[-1] < 0.9 * losses[0]
    # That of the loss itself.
    assert optimizer.report.gradient_norm < 10


def test_grad_scaler_that_skips_a_step():
    model = network(torch.float32)
    optimizer = optim.GaussNewton(model.parameters(), model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X.float()), Y)
        scaler.scale(loss * factor).backward()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        moved = not all(map(torch.equal, before, model.parameters()))
        assert moved == (factor == 1.0)
    # The backward that was skipped was dropped.
    assert optimizer.report.loss == pytest.approx(loss.item(), rel=1e-5)


def test_grad_scaler_with_a_closure_is_refused(make):
    model = network(torch.float32)
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X.float()), Y)
        scaler.scale(loss).backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="a GradScaler scales it.*give the optimizer model= and call"):
        optimizer.step(closure)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    # And the other way round torch refuses.
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=closure)


def penalised(model):
    penalty = sum(p.square().sum() for p in model.parameters())
    (F.cross_entropy(model(X), Y) + 0.1 * penalty).backward()


def clipped_by_value(model):
    F.cross_entropy(model(X), Y).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def doubled(model):
    F.cross_entropy(model(X), Y).backward()
    for p in model.parameters():
        p.grad *= 2


def overwritten(model):
    inputs = X.clone()
    F.cross_entropy(model(inputs), Y).backward()
    inputs.add_(0.1)


NOT_THE_GRADIENT = {
    penalised: "computed from parameters outside of model=",
    clipped_by_value: "what .grad holds is not the gradient of the loss",
    doubled: "2 times the gradient of the loss",
    overwritten: "changed in place after it was used",
}


@pytest.mark.parametrize("compute", NOT_THE_GRADIENT, ids=lambda f: f.__name__)
def test_what_is_not_the_gradient_of_the_model_is_not_tried(compute):
    model = network()
    optimizer = optim.GaussNewton(model.parameters(), model=model, solver="direct")

    def step():
        backward_only(model, optimizer, compute)
        assert optimizer.report.accepted
        assert optimizer.report.new_loss != optimizer.report.new_loss
        assert optimizer.param_groups[0]["damping"] is None

    with pytest.warns(UserWarning, match=NOT_THE_GRADIENT[compute]):
        step()
    step()  # once: warnings are errors


def test_a_closure_leaves_no_outputs_behind():
    model, seen = network(), []
    optimizer = optim.HessianFree(model.parameters(), model=model)

    def closure():
        optimizer.zero_grad()
        outputs = model(X)
        seen.append(weakref.ref(outputs))
        loss = F.cross_entropy(outputs, Y)
        loss.backward()
        return loss

    optimizer.step(closure)
    gc.collect()
    assert len(seen) > 1
    assert all(outputs() is None for outputs in seen)


def test_parameters_used_after_the_model_are_seen():
    """A head that is not a part of the module: its weights are leaves of what is computed again."""
    body, head = network(), nn.Linear(3, 3).double()
    optimizer = optim.GaussNewton([*body.parameters(), *head.parameters()], model=body)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(head(body(X)), Y).backward()
        losses.append(float(optimizer.step()))
    assert losses[-1] < losses[0]
    assert head.weight.grad.abs().max() > 0


def test_two_models_as_in_adversarial_training():
    torch.manual_seed(0)
    generator, critic = nn.Linear(2, 4).double(), nn.Linear(4, 1).double()
    ours = optim.GaussNewton(generator.parameters(), model=generator)
    theirs = optim.GaussNewton(critic.parameters(), model=critic)
    noise, ones = X[:, :2], torch.ones(24, 1, dtype=torch.float64)
    for _ in range(3):
        theirs.zero_grad()
        fake = generator(noise)
        loss = F.binary_cross_entropy_with_logits(critic(X), ones)
        loss = loss + F.binary_cross_entropy_with_logits(critic(fake.detach()), 0 * ones)
        loss.backward()
        assert float(theirs.step()) == pytest.approx(loss.item())
        ours.zero_grad()
        loss = F.binary_cross_entropy_with_logits(critic(fake), ones)
        loss.backward()
        assert float(ours.step()) == pytest.approx(loss.item())
        assert ours.report.accepted


class TestWatchedTensors:
    """What the user sees is a tensor like any other."""

    @pytest.fixture
    def loss(self):
        self.model = network()
        self.optimizer = optim.HessianFree(self.model.parameters(), model=self.model)
        return F.cross_entropy(self.model(X), Y)

    def test_print(self, loss):
        plain = F.cross_entropy(copy.deepcopy(network())(X), Y)
        assert repr(loss).startswith("tensor(")
        assert "grad_fn=<NllLossBackward0>" in repr(loss)
        assert f"{loss:.2f}" == f"{loss.item():.2f}"
        assert repr([loss]).count("tensor(") == 1
        assert type(plain) is torch.Tensor

    def test_leave_the_graph(self, loss):
        assert type(loss.detach().numpy()).__name__ == "ndarray"
        assert isinstance(loss.item(), float)
        assert not torch.stack([loss.detach(), loss.detach()]).requires_grad
        assert repr(loss.detach()).startswith("tensor(")
        assert loss.shape == ()
        assert loss.is_leaf is False

    def test_save(self, loss):
        file = io.BytesIO()
        torch.save(loss, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert type(loaded) is torch.Tensor
        assert loaded.item() == loss.item()
        assert type(pickle.loads(pickle.dumps(self.model(X).detach()))) is torch.Tensor

    def test_a_running_sum_of_losses_goes_on_over_steps(self, loss):
        total = 0
        for _ in range(3):
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(X), Y)
            total = total + loss
            loss.backward()
            assert self.optimizer.step() == loss

    def test_without_gradients_nothing_is_watched(self):
        model = network()
        optimizer = optim.HessianFree(model.parameters(), model=model)
        with torch.no_grad():
            assert type(model(X)) is torch.Tensor
        assert optimizer.step() is None


def test_nothing_is_kept_after_a_step():
    model = network()
    optimizer = optim.HessianFree(model.parameters(), model=model)
    x = X.clone()
    loss = F.cross_entropy(model(x), Y)
    loss.backward()
    inputs = weakref.ref(x)
    del x
    assert inputs() is not None
    optimizer.step()
    assert inputs() is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_were_thrown_away_are_no_step(make, set_to_none):
    model = network()
    optimizer = make(model.parameters(), model=model)
    before = [p.detach().clone() for p in model.parameters()]
    cross_entropy(model)
    optimizer.zero_grad(set_to_none)
    assert optimizer.step() is None
    assert all(map(torch.equal, before, model.parameters()))


def test_a_graph_from_before_the_last_step():
    # A linear model is one that torch differentiates again after its parameters moved.
    model = nn.Linear(4, 3).double()
    optimizer = optim.HessianFree(model.parameters(), model=model)
    loss = F.cross_entropy(model(X), Y)
    loss.backward(retain_graph=True)
    optimizer.step()
    loss.backward()
    with pytest.raises(RuntimeError, match="computed before the last step"):
        optimizer.step()


def test_a_validation_with_gradients_is_not_kept():
    model = network()
    optimizer = optim.HessianFree(model.parameters(), model=model)
    x = X.clone()
    inputs = weakref.ref(x)
    F.cross_entropy(model(x), Y)
    del x
    gc.collect()
    assert inputs() is None
    assert not optimizer._source.watcher.tape.passes.roots


def test_the_hooks_go_with_the_optimizer():
    model = network()
    optimizer = optim.HessianFree(model.parameters(), model=model)
    gone = weakref.ref(optimizer)
    loss = F.cross_entropy(model(X), Y)
    del optimizer
    gc.collect()
    assert gone() is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert type(model(X)) is torch.Tensor
    loss.backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on(copied, make):
    model = network()
    optimizer = make(model.parameters(), model=model)
    backward_only(model, optimizer, cross_entropy)
    twin, again = copied((model, optimizer))
    losses = []
    for net, opt in ((model, optimizer), (twin, again)):
        torch.manual_seed(4)
        losses.append([float(backward_only(net, opt, cross_entropy)) for _ in range(3)])
    # To rounding, which depends on where in memory torch's kernels find their operands.
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_training_and_evaluation_are_as_they_were():
    model = network()
    optimizer = optim.HessianFree(model.parameters(), model=model)
    cross_entropy(model)
    model.eval()
    with torch.no_grad():
        model(X)
    optimizer.step()
    # Batch statistics and dropout masks of the call in training: .grad is the gradient of it.
    assert optimizer.report.accepted
    assert optimizer.report.new_loss < optimizer.report.loss
    assert not any(module.training for module in model.modules())


def test_a_state_that_is_carried_over():
    """As in truncated back-propagation: detached in place, or not."""
    torch.manual_seed(0)
    model = nn.GRU(4, 3).double()
    optimizer = optim.GaussNewton(model.parameters(), model=model)
    state, losses = None, []
    for step in range(6):
        optimizer.zero_grad()
        outputs, state = model(X.view(6, 4, 4), state)
        F.mse_loss(outputs, torch.ones_like(outputs)).backward()
        losses.append(float(optimizer.step()))
        state = state.detach() if step % 2 else state.detach_()
    assert losses[-1] < losses[0]


def test_an_output_that_is_the_input():
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x), x

    model, x = Field(), X.clone().requires_grad_()
    optimizer = optim.GaussNewton(model.parameters(), model=model)
    for _ in range(3):
        optimizer.zero_grad()
        u, same = model(x)
        (slope,) = torch.autograd.grad(u.sum(), same, create_graph=True)
        ((slope - 1) ** 2).mean().backward()
        assert optimizer.step() is not None
        assert optimizer.report.rho == optimizer.report.rho
    assert type(x) is torch.Tensor
    assert same is x


def test_a_meter_does_not_keep_what_it_counted():
    model = network()
    optimizer = optim.HessianFree(model.parameters(), model=model)
    meter, losses = torch.zeros((), dtype=torch.float64), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        meter += loss.detach()
        losses.append(loss.detach())
    assert type(meter) is torch.Tensor
    gc.collect()
    # Of the last loss only, which is still here.
    assert sum(type(o).__name__ == "_Call" for o in gc.get_objects()) <= 1
    assert meter == sum(losses)


def test_hooks_of_the_module_that_came_later():
    model, twin = network(), network()
    optimizer = optim.GaussNewton(model.parameters(), model=model)
    reference = optim.GaussNewton(twin.parameters())
    for net in (model, twin):
        net.register_forward_hook(lambda module, args, output: F.softplus(output))
        net.register_forward_hook(lambda module, args, output: 2 * output)
    torch.manual_seed(3)
    losses = [float(backward_only(model, optimizer, cross_entropy)) for _ in range(3)]
    torch.manual_seed(3)
    expected = [float(with_closure(twin, reference, cross_entropy)) for _ in range(3)]
    assert losses == pytest.approx(expected, rel=1e-9)


def test_buffers_that_are_given_another_tensor():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.net(x)

    model = Counting()
    optimizer = optim.HessianFree(model.parameters(), model=model)
    backward_only(model, optimizer, cross_entropy)
    assert model.calls == 1


def test_a_loss_that_cannot_be_computed_again():
    """Random numbers of a generator of its own."""
    model, generator = network(), torch.Generator().manual_seed(0)
    optimizer = optim.GaussNewton(model.parameters(), model=model)
    model.register_forward_pre_hook(
        lambda module, args: (args[0] + torch.randn(24, 4, generator=generator, dtype=torch.float64),)
    )
    cross_entropy(model)
    state = generator.get_state()
    with pytest.warns(UserWarning, match=r"the loss was [\d.]+ and is [\d.]+ when it is computed again"):
        optimizer.step()
    assert torch.equal(generator.get_state(), state)


def test_a_module_that_grew_since():
    model = network()
    optimizer = optim.GaussNewton(model.parameters(), model=model)
    cross_entropy(model)
    model.add_module("another", nn.Identity())
    assert optimizer.step() is not None


def test_gradients_switched_off_in_the_module():
    class Frozen(nn.Module):
        def forward(self, x):
            torch.set_grad_enabled(False)
            return x

    model = nn.Sequential(network(), Frozen())
    optimizer = optim.GaussNewton(model.parameters(), model=model)
    try:
        model(X)
    finally:
        torch.set_grad_enabled(True)
    assert not optimizer._source.watcher._calls


def test_a_full_backward_hook_on_the_module_is_named():
    model = network()
    optimizer = optim.GaussNewton(model.parameters(), model=model)
    model.register_full_backward_hook(lambda *_: None)
    x = X.clone().requires_grad_()
    F.cross_entropy(model(x), Y).backward()
    with pytest.raises(RuntimeError, match="full backward hooks"):
        optimizer.step()


def test_a_forward_that_raises_is_forgotten():
    model = network()
    optimizer = optim.HessianFree(model.parameters(), model=model)
    with pytest.raises(RuntimeError):
        model(X[:, :2])
    assert not optimizer._source.watcher._calls
    assert optimizer.step() is None
    assert float(backward_only(model, optimizer, cross_entropy)) > 0


def test_a_closure_counts_where_there_is_one():
    """With model= too."""
    model = network()
    optimizer = optim.GaussNewton(model.parameters(), model=model)
    twin = network()
    reference = optim.GaussNewton(twin.parameters())
    torch.manual_seed(3)
    losses = [float(with_closure(model, optimizer, cross_entropy)) for _ in range(3)]
    torch.manual_seed(3)
    expected = [float(with_closure(twin, reference, cross_entropy)) for _ in range(3)]
    assert losses == pytest.approx(expected, rel=1e-9)


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_a_trail_that_is_lost(make):
    model = network()
    optimizer = make(model.parameters(), model=model)
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(Custom.apply(model(X)), Y).backward()
    with pytest.raises(RuntimeError, match="no backward pass through the outputs of model= was seen"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("model", [lambda x: x, "model", [nn.Linear(1, 1)]])
def test_model_must_be_a_module(make, model):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got"):
        make([torch.ones(2, requires_grad=True)], model=model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_everything_as_it_was(make, error, monkeypatch):
    model = network()
    optimizer = make(model.parameters(), model=model)
    cross_entropy(model)
    state = [
        t.clone() for t in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))
    ]
    random = torch.get_rng_state()

    def interrupted(*_):
        raise error("in the solve")

    for form in (Grown, Formed, Residual, Truncated):
        monkeypatch.setattr(form, "solve", interrupted)
    with pytest.raises(error, match="in the solve"):
        optimizer.step()
    now = (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))
    assert all(map(torch.equal, state, now))
    assert torch.equal(torch.get_rng_state(), random)
    monkeypatch.undo()
    # The same step, taken after all.
    assert float(optimizer.step()) > optimizer.report.new_loss


def test_autocast_is_that_of_the_call():
    """Float64, as above, it leaves alone."""

    def compute(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = model(X.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(z @ torch.eye(3), Y)
        loss.backward()
        return loss

    (losses, *_), (ours, *_) = pair(optim.GaussNewton, compute, model=lambda: network(torch.float32))
    assert ours == pytest.approx(losses, rel=1e-6)


def test_gradients_off_and_targets_written_to_are_those_of_the_call():
    def compute(model):
        z = model(X)
        with torch.no_grad():
            scale = z.abs().amax(1, keepdim=True) + 1
        # Read before and after it is written to, in every evaluation.
        board = torch.ones_like(X[:, :3])
        board += z / scale
        loss = F.cross_entropy(board * z.sign().mul_(0.5).add_(1), Y)
        loss.backward()
        return loss

    (losses, *_), (ours, *_) = pair(optim.GaussNewton, compute)
    assert ours == pytest.approx(losses, rel=1e-9)


def test_a_multiple_of_the_gradient_scales_the_curvature():
    model = nn.Linear(4, 3).double()
    optimizer = optim.GaussNewton(model.parameters(), model=model, damping=0.5, solver="direct")
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(X), Y)
    G = secondorder.GaussNewton(F.cross_entropy(z := model(X), Y), z, parameters).dense()
    g = torch.cat([t.flatten() for t in torch.autograd.grad(F.cross_entropy(model(X), Y), parameters)])
    before = torch.cat([p.detach().flatten() for p in parameters])
    optimizer.zero_grad()
    loss.backward()
    for parameter in parameters:
        parameter.grad *= 3
    with pytest.warns(UserWarning, match="3 times the gradient"):
        optimizer.step()
    step = torch.cat([p.detach().flatten() for p in parameters]) - before
    expected = -torch.linalg.solve(3 * G + 0.5 * torch.eye(len(g), dtype=g.dtype), 3 * g)
    torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-12)


def test_hooks_of_the_module_that_were_there_before():
    """They see what the call was given, once."""

    def hooked():
        model = network()
        model.register_forward_pre_hook(lambda module, args: (2 * args[0] + 1,))
        return model

    (losses, *_), (ours, *_) = pair(optim.GaussNewton, cross_entropy, model=hooked)
    assert ours == pytest.approx(losses, rel=1e-9)
