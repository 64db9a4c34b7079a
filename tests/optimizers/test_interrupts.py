"""An interrupt at any moment of a step leaves everything as it was, bit for bit."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks
from torch.nn.utils.parametrizations import spectral_norm
from torch.overrides import TorchFunctionMode

import optim
import secondorder
from secondorder.operators.residual import ResidualJacobian
from secondorder.operators.samples import SampledGaussNewton

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = X[:, :3].argmax(1)
# Each raises at this many moments, evenly spread over a step.
MOMENTS = 12


class Config:
    """An optimizer of a model with buffers that a step writes to, and the closure of its steps."""

    def __init__(self, make, layers, watched=False, groups=False, dtype=None, outputs=False):
        torch.manual_seed(0)
        self.model = nn.Sequential(*layers()).double()
        given = list(self.model.parameters())
        if groups:
            given = [{"params": given[:1], "lr": 0.5, "weight_decay": 0.1}, {"params": given[1:]}]
        self.optimizer = make(given, **({"model": self.model} if watched else {}))
        self.dtype, self.outputs, self.watched = dtype, outputs, watched

    def closure(self):
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype is not None):
            outputs = self.model(X)
            loss = F.cross_entropy(outputs, Y)
        if self.outputs:
            return loss, outputs
        loss.backward()
        return loss

    def begin(self):
        """What comes before ``step`` where it has no closure."""
        if self.watched:
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(X), Y).backward()

    def step(self):
        self.optimizer.step(None if self.watched else self.closure)

    def everything(self):
        model, optimizer = self.model, self.optimizer
        tensors = [*model.parameters(), *model.buffers(), torch.get_rng_state()]
        tensors += [p.grad for p in model.parameters() if p.grad is not None]
        tensors += [t for state in optimizer.state.values() for t in state.values()]
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        identities = [[id(p.grad), p.grad is None, p.data_ptr()] for p in model.parameters()]
        settings = [torch._C._len_torch_function_stack(), torch.is_grad_enabled()]
        settings += [len(layer._forward_hooks) for layer in model]
        settings += [len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)]
        settings += [len(hooks._global_forward_hooks_with_kwargs), len(warnings.filters)]
        return [t.detach().clone() for t in tensors], copy.deepcopy(options), identities, settings


def plain():
    return nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)


def normed():
    return nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 3)


HIDDEN = nn.Tanh()


def hidden():
    return nn.Linear(4, 4), HIDDEN, nn.Linear(4, 3)


def spectral():
    return spectral_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)


CONFIGS = {
    "newton": lambda: Config(optim.Newton, normed),
    "newton_cg": lambda: Config(lambda p: optim.Newton(p, solver="cg"), normed, outputs=True),
    "hessian_free": lambda: Config(optim.HessianFree, normed),
    "hessian_free_structural": lambda: Config(
        lambda p: optim.HessianFree(p, structural_damping=1.0, structural=[HIDDEN], damping=1.0), hidden
    ),
    "hessian_free_sketched": lambda: Config(
        lambda p: optim.HessianFree(p, solver="cg", preconditioner="nystrom", preconditioner_rank=2), plain
    ),
    "hessian_free_groups": lambda: Config(optim.HessianFree, spectral, groups=True),
    "hessian_free_watched": lambda: Config(optim.HessianFree, normed, watched=True),
    "hessian_free_sampled": lambda: Config(lambda p: optim.HessianFree(p, curvature_batch=5), spectral),
    "hessian_free_watched_sampled": lambda: Config(
        lambda p, model: optim.HessianFree(p, model=model, curvature_batch=5), plain, watched=True
    ),
    "gauss_newton": lambda: Config(optim.GaussNewton, spectral),
    "gauss_newton_cg": lambda: Config(
        lambda p: optim.GaussNewton(p, solver="cg"), plain, dtype=torch.bfloat16
    ),
    "gauss_newton_subspace": lambda: Config(lambda p: optim.GaussNewton(p, solver="subspace"), plain),
    "gauss_newton_spring": lambda: Config(lambda p: optim.GaussNewton(p, spring=0.9), plain),
    "gauss_newton_rejected": lambda: Config(lambda p: optim.GaussNewton(p, damping=1e-9, rtol=1e-9), plain),
}


class Bomb:
    """Counts moments, and raises at one of them."""

    def __init__(self, at=None):
        self.count, self.at = 0, at

    def tick(self):
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt


class Calls(TorchFunctionMode):
    """Every call of a torch function, of the library's too."""

    def __init__(self, bomb):
        super().__init__()
        self.bomb = bomb

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # torch's own contexts set these on their exit: one that fails there leaves what was inside it.
        if "record_function" not in str(func) and func is not torch._C._set_grad_enabled:
            self.bomb.tick()
        return func(*args, **(kwargs or {}))


def in_functions(bomb, config, monkeypatch):
    return Calls(bomb)


def in_forwards(bomb, config, monkeypatch):
    """Of each layer: in the recorded run, and in trials."""
    for layer in config.model:
        forward = layer.forward
        monkeypatch.setattr(layer, "forward", lambda x, forward=forward: (bomb.tick(), forward(x))[1])


def in_products(bomb, config, monkeypatch):
    products = [
        (operator, name)
        for operator in (secondorder.Hessian, secondorder.GaussNewton, SampledGaussNewton)
        for name in ("_matvec", "_matmat")
    ]
    for operator, name in (*products, (ResidualJacobian, "dense")):
        product = getattr(operator, name)
        monkeypatch.setattr(
            operator, name, lambda self, *v, product=product: (bomb.tick(), product(self, *v))[1]
        )


def step_until(bomb, where, config):
    with pytest.MonkeyPatch.context() as monkeypatch:
        mode = where(bomb, config, monkeypatch)
        if mode is None:
            config.step()
        else:
            with mode:
                config.step()


def everything_is_as_before(config, before):
    tensors, *others = config.everything()
    return others == list(before[1:]) and all(map(torch.equal, tensors, before[0]))


@pytest.mark.slow
@pytest.mark.parametrize("where", [in_functions, in_forwards, in_products], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("after", [0, 2], ids=["first_step", "later"])
def test_every_kth_call(name, where, after):
    def prepared():
        config = CONFIGS[name]()
        for _ in range(after):
            config.begin()
            config.step()
        config.begin()
        return config

    counted = Bomb()
    config = prepared()
    step_until(counted, where, config)
    assert counted.count > 0
    assert after or config.optimizer.report.trials > ("rejected" in name)
    interrupted = 0
    for at in sorted({1 + round(i * (counted.count - 1) / (MOMENTS - 1)) for i in range(MOMENTS)}):
        config, bomb = prepared(), Bomb(at)
        before = config.everything()
        try:
            step_until(bomb, where, config)
        except KeyboardInterrupt:
            pass
        else:
            # Which of two ways to multiply is faster is measured: not every run makes as many calls.
            assert bomb.count < at
            continue
        interrupted += 1
        assert everything_is_as_before(config, before), at
        # It can be tried again.
        config.step()
        assert config.optimizer.report.gradient_norm > 0
    assert interrupted > 0
