"""Settings that all threads share are afterwards what they were (issue 13, entry 15)."""

import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import optim
from secondorder import functional
from secondorder.autodiff import switches
from secondorder.autodiff.compositions import without_cudnn
from secondorder.autodiff.decompose import decompose
from secondorder.influence.scores import influence

THREADS = 8
LIMIT = 60  # seconds; only a deadlock takes them
KERNELS = ("math", "flash", "mem_efficient", "cudnn", "overrideable")


def settings():
    return {
        **{name: getattr(torch._C, f"_get_{name}_sdp_enabled")() for name in KERNELS},
        "cudnn of layers": torch.backends.cudnn.enabled,
        "deterministic": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "stance": torch._dynamo.eval_frame._stance.stance,
    }


def set_cudnn(enabled, deterministic, benchmark):
    """By the functions beneath: torch's own tests, once imported, forbid the attributes."""
    torch._C._set_cudnn_enabled(enabled)
    torch._C._set_cudnn_deterministic(deterministic)
    torch._C._set_cudnn_benchmark(benchmark)


@pytest.fixture(autouse=True)
def restored():
    """A test that fails leaves the others what they need."""
    before = settings()
    yield
    for name in KERNELS:
        getattr(torch._C, f"_set_sdp_use_{name}")(before[name])
    set_cudnn(before["cudnn of layers"], before["deterministic"], before["benchmark"])
    torch.backends.mha.set_fastpath_enabled(before["fast path"])
    torch.compiler.set_stance(before["stance"])


def in_threads(works):
    """Each in a thread of its own; the first exception of any is raised."""
    errors = []

    def guarded(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)


class Relay:
    """Threads enter one after another and leave in the same order: the first while the others are inside."""

    def __init__(self, works):
        self._works = works
        self._inside = [threading.Event() for _ in works]
        self._done = [threading.Event() for _ in works]
        self._met = set()

    def run(self):
        in_threads([partial(self._one, index, work) for index, work in enumerate(self._works)])

    def _one(self, index, work):
        try:
            assert not index or self._inside[index - 1].wait(LIMIT)
            work(partial(self._wait, index))
            assert index in self._met
        finally:
            self._inside[index].set()
            self._done[index].set()

    def _wait(self, index):
        """Called by the work where the switches are turned; it counts the first time."""
        if index in self._met:
            return
        self._met.add(index)
        self._inside[index].set()
        gate = self._done[index - 1] if index else self._inside[-1]
        assert gate.wait(LIMIT)


def composed(x):
    """Attention by primitives, of which no switch is asked."""
    return (x @ x.mT / x.shape[-1] ** 0.5).softmax(-1) @ x


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(12, 2)
        self.wait = self.seen = lambda *_: None

    def forward(self, x):
        self.seen(x)
        h = self.first(x).view(-1, 3, 4)
        return self.last(F.scaled_dot_product_attention(h, h, h).flatten(1))


def product(wait):
    def func(x):
        wait()
        return F.scaled_dot_product_attention(x, x, x).square().sum()

    x = torch.linspace(-1, 2, 12, dtype=torch.float64).view(1, 3, 4)
    with decompose():
        got = functional.hvp(func, x, torch.ones_like(x))[1]
    torch.testing.assert_close(
        got, torch.autograd.functional.hvp(lambda x: composed(x).square().sum(), x, torch.ones_like(x))[1]
    )


def step_of(method):
    model = Attention()
    x, y = torch.randn(6, 3, 4), torch.randn(6, 2)

    @torch.no_grad()
    def loss_of(model):
        return float(F.mse_loss(model(x), y))

    def step(wait):
        def loss():
            wait()
            return F.mse_loss(model(x), y)

        optimizer, before = method(model.parameters()), loss_of(model)
        optimizer.step(loss)
        assert loss_of(model) < before

    return step


def scores(wait):
    model = Attention()
    model.seen = lambda _: wait()
    data = torch.randn(5, 3, 4), torch.randn(5, 2)
    assert influence(model, F.mse_loss, data, data, damping=10.0).scores.isfinite().all()


def recurrent(wait):
    without_cudnn(wait)()


def test_switches_are_what_they_were_after_threads():
    torch.manual_seed(0)
    steps = [step_of(method) for method in (optim.Newton, optim.HessianFree, optim.GaussNewton)]
    works = [product, *steps, scores, recurrent, product, step_of(optim.Newton)]
    assert len(works) == THREADS
    before = settings()
    for shift in range(0, THREADS, 2):
        Relay(works[shift:] + works[:shift]).run()
        assert settings() == before


def test_what_the_user_had_switched_off_stays_off():
    set_cudnn(enabled=False, deterministic=True, benchmark=True)
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        before = settings()

        def look(wait):
            with decompose():
                inside = settings()
                wait()
            assert inside == {
                **before,
                **dict.fromkeys(KERNELS, False),
                "math": True,
                "stance": "force_eager",
            }

        Relay([look] * THREADS).run()
        assert settings() == before


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_switches_are_what_they_were_after_an_exception(kind):
    before = settings()

    def fail(wait):
        with decompose():
            wait()
            raise kind

    with pytest.raises(kind):
        Relay([fail] * THREADS).run()
    assert settings() == before


def test_a_user_may_switch_inside():
    before = settings()
    with decompose():
        turned = settings()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            own = settings()
            with decompose():
                assert settings() == turned
            assert settings() == own
        assert settings() == turned
        torch.backends.cuda.enable_flash_sdp(True)
        with decompose():
            assert settings() == turned
    assert settings() == before


def test_a_user_inside_in_another_thread_does_not_turn_it_for_the_others():
    """Whoever came between puts nothing back that others need off."""
    before, seen = settings(), []

    def first(wait):
        with decompose():
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                wait()
            seen.append(settings()["flash"])

    def second(wait):
        with decompose():
            wait()
            seen.append(settings()["flash"])

    Relay([first, second, second]).run()
    assert seen == [False] * 3
    assert settings() == before


def test_a_switch_that_cannot_be_turned_turns_none():
    def refuse():
        raise RuntimeError("no")

    before = settings()
    with (
        pytest.raises(RuntimeError, match="no"),
        switches.held(*switches.MATH_ATTENTION, switches.Switch(refuse)),
    ):
        pass
    assert settings() == before


@pytest.mark.parametrize(
    "compute",
    [
        lambda f, x, v: functional.jvp(f, x, v, strategy="forward-mode")[1],
        lambda f, x, v: functional.hvp(lambda x: f(x).sum(), x, v, strategy="forward-over-reverse")[1],
        lambda f, x, _: functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
        lambda f, x, _: functional.hessian(
            lambda x: f(x).sum(), x, vectorize=True, outer_jacobian_strategy="forward-mode"
        ),
    ],
    ids=["jvp", "hvp", "jacobian", "hessian"],
)
def test_forward_mode_in_threads(compute):
    x, v = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    others = threading.Event()
    expected = compute(torch.sin, x, v)

    def func(x):
        # Time for the others to come in, if anything lets them.
        others.wait(0.05)
        return x.sin()

    def work():
        torch.testing.assert_close(compute(func, x, v), expected)

    in_threads([work] * THREADS)


def test_nested_forward_mode_is_refused_by_torch_and_does_not_hang():
    x, v = torch.tensor([1.0]), torch.tensor([1.0])

    def inner(x):
        return functional.jvp(torch.sin, x, v, strategy="forward-mode")[1]

    def work():
        with pytest.raises(RuntimeError, match="[Nn]ested"):
            functional.jvp(inner, x, v, strategy="forward-mode")

    in_threads([work])
    torch.testing.assert_close(inner(x), x.cos())
