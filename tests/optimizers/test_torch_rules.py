"""The rules of torch's own suite: TestOptimRenewed (its test behind ours), test_lrscheduler, test_swa_utils.

What test_contract.py (C) and test_optimizers.py (O) have is not repeated. What does not apply:

fused, foreach, capturable   no loop over parameters to fuse; a step decides on the host: TypeError (C)
differentiable               a step keeps no graph of itself: TypeError (C)
complex parameters           TypeError by design, which names view_as_real (O)
sparse gradients             RuntimeError by design, the model is dense: here
several devices or dtypes    ValueError by design, there is one model for all: here; dtypes (O)
all parameters frozen        RuntimeError by design, it is a mistake (O); torch does nothing
step() after backward        TypeError without model=, as a step evaluates the loss again (O)
load_nontensor_step          no counter of steps in the state; moves between devices need the devices
compiled optimizers          as torch's LBFGS: not compiled but run as they are, here
"""

import copy
import functools
import gc
import io
import pickle
import weakref
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.optim import lr_scheduler, optimizer, swa_utils
from torch.testing import assert_close

import optim

PARAMETERS = {False: nn.Module.parameters, True: nn.Module.named_parameters}
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
X, Y = zoo.vector(10, 1).view(5, 2), zoo.vector(5, 2).view(5, 1)
# Steps that differ by rounding alone, which depends on where in memory torch's kernels find their operands.
SAME, EXACT = dict(rtol=1e-8, atol=1e-10), dict(rtol=0, atol=0)
both = pytest.mark.parametrize("flag", [False, True])


class Run(NamedTuple):
    model: nn.Module
    optimizer: torch.optim.Optimizer
    closure: object

    def steps(self, number=3):
        return [self.optimizer.step(self.closure).item() for _ in range(number)]


@pytest.fixture(params=[optim.Newton, optim.HessianFree, optim.GaussNewton], ids=lambda cls: cls.__name__)
def make(request):
    return request.param


def fresh(make, params=nn.Module.parameters, model=None, **options):
    """A network, an optimizer of what ``params`` takes from it, and the closure of torch's tests."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    made = make(params(model), **options)

    def closure():
        made.zero_grad()
        loss = F.mse_loss(model(X), Y)
        loss.backward()
        return loss

    return Run(model, made, closure)


def assert_same_steps(ours, theirs):
    losses = ours.steps()
    assert losses == pytest.approx(theirs.steps(), rel=1e-8)
    assert losses == sorted(losses, reverse=True)
    assert_close(ours.model.state_dict(), theirs.model.state_dict(), **SAME)


def two_groups(**options):
    return lambda m: [{"params": m[0].parameters()}, {"params": m[2].parameters(), **options}]


def vector(*entries, **options):
    return torch.tensor(entries, dtype=torch.float64, requires_grad=True, **options)


@functools.cache
def error_inputs():
    # Torch's helpers need expecttest, and freeze the flags of torch.backends, which this context thaws.
    with torch.backends.__allow_nonbracketed_mutation():
        helpers = pytest.importorskip("torch.testing._internal.common_optimizers")
    return helpers.get_error_inputs_for_all_optims("cpu", torch.float32)


class TestParameters:
    @pytest.mark.parametrize("index", range(6))
    def test_errors_of_all_optimizers(self, make, index):  # test_errors: none is of an option that we lack
        wanted = dict(zip(range(6), error_inputs(), strict=True))[index]
        check = pytest.warns if issubclass(wanted.error_type, Warning) else pytest.raises
        with check(wanted.error_type, match=wanted.error_regex):
            make(wanted.optimizer_error_input.params, **wanted.optimizer_error_input.kwargs)

    def test_a_group_that_is_added_must_be_a_dict(self, make):
        with pytest.raises(TypeError, match="param_group must be a dict, but got <class 'list'>"):
            make([vector(1.0)]).add_param_group([vector(2.0)])

    def test_refused_ones_stay_as_they_were(self, make):
        with pytest.raises(ValueError, match=r"one dtype on one device, got .* on cpu and .* on meta"):
            make([vector(1.0), vector(1.0, device="meta")]).step(lambda: None)
        model = nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Linear(2, 1))
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="must be dense, got a sparse one; use sparse=False"):
            make(model.parameters()).step(lambda: F.mse_loss(model(torch.tensor([1])), torch.ones(1, 1)))
        assert_close(model.state_dict(), before, **EXACT)

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_a_tensor_lr_is_its_number(self, make, shape):  # test_tensor_lr
        ours = fresh(make, two_groups(lr=torch.full(shape, 0.25)), lr=torch.full(shape, 0.5))
        assert_same_steps(ours, fresh(make, two_groups(lr=0.25), lr=0.5))

    def test_a_vanishing_lr_of_a_group(self, make):  # test_param_groups_lr
        w, irrelevant = vector(1.0, 2.0), vector(-1.0, 3.0)
        made = make([{"params": [w], "lr": 1.0}, {"params": [irrelevant]}], lr=1e-28)
        losses = Run(None, made, lambda: F.mse_loss(w * irrelevant, torch.ones_like(w))).steps(5)
        assert losses[-1] < 0.1 * losses[0]
        assert irrelevant.tolist() == [-1.0, 3.0]

    @both
    def test_weight_decay_of_a_group_at_zero_gradients(self, make, flag):  # test_param_groups_weight_decay
        """A gradient of zero is a step, None is none (torch on zero_grad): by a closure, by model=."""
        model, ones = nn.Linear(1, 1).double(), torch.ones(3, 1, dtype=torch.float64)
        nn.init.constant_(model.weight, 0.25), nn.init.constant_(model.bias, 0.25)
        groups = [{"params": [model.weight], "weight_decay": 1.0}, {"params": [model.bias]}]
        options = {} if make is optim.Newton else {"damping": 1.0}
        made = make(groups, model=model if flag else None, **options)
        if flag:
            (0 * F.mse_loss(model(ones), ones)).backward()
        made.step(None if flag else lambda: 0 * F.mse_loss(model(ones), ones))
        # To zero; half of the way where the damping, 1, is as large as the decay.
        assert model.weight.item() == pytest.approx(0.0 if make is optim.Newton else 0.125, abs=1e-12)
        assert model.bias.item() == 0.25

    def test_not_contiguous_ones(self, make):  # test_forloop_goes_right_direction
        ours = fresh(make)
        ours.model[0].weight.data = torch.stack([ours.model[0].weight.data] * 2, dim=-1)[..., 0]
        assert_same_steps(ours, fresh(make))
        assert not ours.model[0].weight.is_contiguous()

    def test_empty_ones_change_nothing(self, make):  # test_fused_matches_forloop
        empty = vector()
        run = fresh(make, lambda model: [*model.parameters(), empty])
        run = run._replace(closure=lambda model=run.model: F.mse_loss(model(X) + empty.sum(), Y))
        assert_same_steps(run, fresh(make))
        assert empty.grad.shape == (0,)

    def test_frozen_ones_change_nothing_and_may_be_thawed(self, make):
        ours = fresh(make)
        ours.model[0].requires_grad_(False)
        assert_same_steps(ours, fresh(make, lambda model: model[2].parameters()))
        before = copy.deepcopy(ours.model)
        ours.model[0].requires_grad_(True)
        ours.steps(1)
        assert not any(map(torch.equal, ours.model.parameters(), before.parameters()))

    def test_another_default_dtype(self, make, request):
        w = nn.Parameter(torch.ones(2))
        made = make([w])
        request.addfinalizer(functools.partial(torch.set_default_dtype, torch.float32))
        torch.set_default_dtype(torch.float64)
        loss = made.step(lambda: F.mse_loss(w.sin(), torch.zeros_like(w)))
        assert made.report.accepted
        assert {t.dtype for t in (w, w.grad, loss, *made.state[w].values())} == {torch.float32}


class TestStep:
    @both
    @pytest.mark.parametrize("grad", [None, torch.zeros(2)])
    def test_without_gradients_it_does_nothing(self, make, grad, flag):  # test_step_is_noop_for_zero_grads
        model = nn.ParameterList([nn.Parameter(torch.ones(2))])
        made = make(model.parameters(), model=model if flag else None)
        model[0].grad, before = grad, copy.deepcopy(made.state_dict()["param_groups"])
        assert made.step() is None
        assert model[0].tolist() == [1.0, 1.0]
        assert made.state_dict()["param_groups"] == before

    def test_results_are_of_one_kind(self, make):  # test_second_order_optims_return_consistent_types
        run = fresh(make)
        losses = [run.optimizer.step(run.closure)]
        run.optimizer.param_groups[0]["lr"] = 0.0
        losses.append(run.optimizer.step(closure=run.closure))
        assert all(type(x) is torch.Tensor and x.shape == () and not x.requires_grad for x in losses)

    @both
    def test_zero_grad(self, make, flag):
        ours = fresh(make)
        ours.optimizer.zero_grad = functools.partial(ours.optimizer.zero_grad, set_to_none=flag)
        assert_same_steps(ours, fresh(make))
        grads = [p.grad for p in ours.model.parameters()]
        ours.optimizer.zero_grad()
        assert [p.grad is None for p in ours.model.parameters()] == [flag] * 4
        assert [bool(grad.any()) for grad in grads] == [flag] * 4

    @pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # of torch 2.10 to 2.12
    def test_the_profiler_names_it(self, make):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fresh(make).steps(2)
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts[f"Optimizer.step#{make.__name__}.step"] == 2
        assert counts[f"Optimizer.zero_grad#{make.__name__}.zero_grad"] >= 2

    def test_under_torch_compile_it_runs_as_it_is(self, make):  # excluded_optimizer_classes of eval_frame.py
        ours = fresh(make)
        ours.optimizer.step = torch.compile(ours.optimizer.step, backend="eager")
        assert_same_steps(ours, fresh(make))

    def test_no_reference_cycle_is_left(self, make, request):  # test_no_cyclic_references_in_step
        gc.disable()
        request.addfinalizer(gc.enable)
        run = fresh(make)
        scheduler = lr_scheduler.LambdaLR(run.optimizer, lambda epoch: 1.0)
        loss = run.optimizer.step(run.closure)
        scheduler.step()
        references = [weakref.ref(thing) for thing in (run.optimizer, scheduler, run.model[0].weight, loss)]
        del run, scheduler, loss
        assert [reference() for reference in references] == [None] * 4


class TestHooks:
    def test_of_steps_until_they_are_removed(self, make):  # test_step_all_hooks
        run, sgd, seen = fresh(make), torch.optim.SGD([vector(1.0)]), []
        handles = [optimizer.register_optimizer_step_pre_hook(lambda *_: seen.append(0))]
        handles.append(optimizer.register_optimizer_step_post_hook(lambda *_: seen.append(5)))
        for each in (run.optimizer, sgd):
            handles.append(each.register_step_pre_hook(lambda *_: seen.append(1)))
            handles.append(each.register_step_post_hook(lambda *_: seen.append(2)))
        try:
            run.steps(1), sgd.step(), run.steps(1)
        finally:
            for handle in handles:
                handle.remove()
        run.steps(1)
        assert seen == [0, 1, 2, 5] * 3

    def test_of_steps_may_replace_the_arguments(self, make):
        w, seen = vector(2.0), []
        made, closure = make([w]), lambda factor=1: factor * F.mse_loss(w, torch.zeros_like(w))
        larger = functools.partial(closure, 3)
        made.register_step_post_hook(lambda _, *given: seen.append(given))
        made.register_step_pre_hook(lambda o, args, kwargs: ((o,), {"closure": larger}))
        assert made.step(closure).item() == 12.0
        assert seen == [((made,), {"closure": larger})]
        made.register_step_pre_hook(lambda *_: 3)
        with pytest.raises(RuntimeError, match=r"must return None or a tuple of \(new_args, new_kwargs\)"):
            made.step(closure)

    def test_of_state_dict(self, make):  # test_state_dict_pre_post_hook
        made, order = make([vector(1.0)]), []
        made.register_state_dict_pre_hook(lambda o: o.state.update(test=len(order)))
        made.register_state_dict_pre_hook(lambda _: order.append("first"), prepend=True)
        made.register_state_dict_post_hook(lambda _, s: {**s, "seen": s["state"].pop("test"), "order": 2})
        made.register_state_dict_post_hook(lambda _, s: s.update(order=1, added=1), prepend=True)
        state = made.state_dict()
        assert [state[name] for name in ("seen", "order", "added", "state")] == [1, 2, 1, {}]

    @pytest.mark.parametrize(("prepend", "expected"), [(False, [0.003, "post"]), (True, ["post", 0.002])])
    def test_of_load_state_dict(self, make, prepend, expected):  # test_load_state_dict_pre_post_hook
        made, seen = make([vector(1.0)]), []
        another = copy.deepcopy(made.state_dict())
        another["param_groups"][0]["lr"] = 0.003
        made.register_load_state_dict_pre_hook(lambda _, s: s["param_groups"][0].update(lr=0.002))
        made.register_load_state_dict_pre_hook(lambda *_: another, prepend=prepend)
        made.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
        made.register_load_state_dict_post_hook(lambda _: seen.append("post"), prepend=prepend)
        made.load_state_dict(made.state_dict())
        assert seen == expected


class TestState:
    def test_is_printed(self, make):  # test_optimizer_can_be_printed
        lines = repr(fresh(make, two_groups(lr=0.5)).optimizer).splitlines()
        assert lines.count("    lr: 1.0") == lines.count("    lr: 0.5") == 1
        frame = [f"{make.__name__} (", "Parameter Group 0", "", "Parameter Group 1", ")"]
        assert [line for line in lines if not line.startswith("    ")] == frame

    def test_is_not_empty_after_a_step(self, make):  # test_non_empty_state
        # Numbers are learned in the group; the last space is kept by parameter.
        run = fresh(make)
        run.steps()
        state, (group,) = run.optimizer.state_dict().values()
        learned = {"radius" if make is optim.Newton else "damping", "batch_noise"}
        defaults = run.optimizer.defaults.items()
        others = {"usual_products", "ritz_values", "gradient_norm", "residual_cost"}
        assert {k for k, default in defaults if group[k] != default} - others == learned
        shapes = {i: {name: t.shape for name, t in entry.items()} for i, entry in state.items()}
        if run.optimizer.report.form.startswith(("formed", "residual")):
            assert make is not optim.HessianFree
            assert shapes == {}
        else:
            size = len(group["ritz_values"]) - 2
            assert size > 0
            assert shapes == {
                i: {"ritz_vectors": (size, *p.shape)} for i, p in enumerate(run.model.parameters())
            }

    @pytest.mark.parametrize("names", [(False, False), (False, True), (True, False), (True, True)])
    def test_goes_on_alike_when_loaded(self, make, names):  # test_save_load_equality_with_weights_only
        ours = fresh(make, PARAMETERS[names[0]], lr=torch.tensor(0.9))
        ours.steps()
        theirs = fresh(make, PARAMETERS[names[1]], model=copy.deepcopy(ours.model))
        state, file = ours.optimizer.state_dict(), io.BytesIO()
        torch.save(state, file)
        given = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        theirs.optimizer.load_state_dict(given)
        assert given["param_groups"] == state["param_groups"]
        loaded, (group,) = theirs.optimizer.state_dict().values()
        assert_close(loaded, state["state"], **EXACT)
        assert group.get("param_names") == (NAMES if any(names) else None)
        assert_same_steps(ours, theirs)

    @pytest.mark.parametrize("way", ["load", "deepcopy", "pickle"])
    def test_of_a_copy_is_the_same_and_looks_the_same(self, make, way):  # test_state_dict_deterministic
        ours, again = fresh(make).optimizer, fresh(make).optimizer
        if way == "load":
            again.load_state_dict(ours.state_dict())
        else:
            again = copy.deepcopy(ours) if way == "deepcopy" else pickle.loads(pickle.dumps(ours))
        assert again.state_dict() == ours.state_dict()
        assert repr(again) == repr(ours)

    def test_public_attributes_are_copied(self, make):  # test_deepcopy_copies_all_public_attrs
        run = fresh(make)
        run.steps(1)
        again = copy.deepcopy(run.optimizer)
        assert {*vars(again)} >= {name for name in vars(run.optimizer) if not name.startswith("_")}
        assert again.report == run.optimizer.report

    def test_without_any_option_gets_the_defaults(self, make):  # test_can_load_older_state_dict
        ours = fresh(make)
        ours.optimizer.load_state_dict({"state": {}, "param_groups": [{"params": [0, 1, 2, 3]}]})
        assert_same_steps(ours, fresh(make))

    def test_is_loaded_by_names(self, make):  # by a hook, as the documentation of load_state_dict says
        ours = fresh(make, nn.Module.named_parameters)
        ours.steps()
        theirs = fresh(make, lambda m: reversed([*m.named_parameters()]), model=copy.deepcopy(ours.model))

        def by_name(loading, state):
            saved, names = state["param_groups"][0], loading.param_groups[0]["param_names"]
            order = [saved["params"][saved["param_names"].index(name)] for name in names]
            return {**state, "param_groups": [{**saved, "params": order, "param_names": names}]}

        theirs.optimizer.register_load_state_dict_pre_hook(by_name)
        theirs.optimizer.load_state_dict(ours.optimizer.state_dict())
        states = [[run.optimizer.state[p] for p in run.model.parameters()] for run in (ours, theirs)]
        assert_close(*states, **EXACT)
        assert_same_steps(ours, theirs)

    @pytest.mark.parametrize("text", ["different number of parameter groups", "doesn't match the size of"])
    def test_of_another_size_is_refused(self, make, text):
        made = fresh(make, two_groups()).optimizer
        state = copy.deepcopy(made.state_dict())
        (state["param_groups"] if "number" in text else state["param_groups"][1]["params"]).pop()
        with pytest.raises(ValueError, match=text):
            made.load_state_dict(state)

    @both
    def test_in_distributed_checkpoints(self, make, flag):  # a step on zero gradients must make the state
        dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
        options = dcp.StateDictOptions(flatten_optimizer_state_dict=flag)
        ours = fresh(make)
        ours.steps()
        state = dcp.get_optimizer_state_dict(ours.model, ours.optimizer, options=options)
        theirs = fresh(make, model=copy.deepcopy(ours.model))
        dcp.set_optimizer_state_dict(theirs.model, theirs.optimizer, state, options=options)
        assert_close(*([s for s in r.optimizer.state.values() if s] for r in (ours, theirs)), **EXACT)
        assert_same_steps(ours, theirs)


class TestSchedulers:
    @pytest.mark.parametrize("name", ["ReduceLROnPlateau", "StepLR", "SWALR"])
    def test_write_into_a_tensor_lr(self, make, name):  # test_lrscheduler: with the rates of SGD
        tensors, rates = [torch.tensor(0.5, dtype=torch.float64) for _ in range(2)], []
        options = {"ReduceLROnPlateau": {"patience": 0}, "StepLR": {"step_size": 2}, "SWALR": {"swa_lr": 0.1}}
        scheduler = functools.partial(getattr(lr_scheduler, name, swa_utils.SWALR), **options[name])
        runs = [fresh(kind, lr=tensor) for kind, tensor in zip((make, torch.optim.SGD), tensors, strict=True)]
        for run, made in [(run, scheduler(run.optimizer)) for run in runs]:
            for _ in range(4):
                run.steps(1)
                made.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                rates.append(float(run.optimizer.param_groups[0]["lr"]))
        assert rates == pytest.approx(rates[4:] * 2)
        assert len({*rates[4:]}) > 1
        # Before torch 2.10 some schedulers put a number in its place.
        ours, theirs = (run.optimizer.param_groups[0]["lr"] is tensors[i] for i, run in enumerate(runs))
        assert ours == theirs

    @both
    def test_averaged_models(self, make, flag):
        """The average of a model that is watched does not count as a call of it."""
        average = swa_utils.get_ema_multi_avg_fn(0.9) if flag else swa_utils.get_swa_multi_avg_fn()
        weights = [0.81, 0.09, 0.1] if flag else [1 / 3] * 3
        alone, (model, _, zero_grad_and_backward), seen = fresh(make), fresh(make), []
        made = make(model.parameters(), model=model)
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
        for _ in weights:
            zero_grad_and_backward()
            F.mse_loss(averaged(X), Y).backward()
            made.step()
            averaged.update_parameters(model)
            seen.append(copy.deepcopy(model.state_dict()))
        alone.steps()
        assert_close(seen[-1], alone.model.state_dict(), **SAME)
        means = {key: sum(w * s[key] for w, s in zip(weights, seen, strict=True)) for key in seen[0]}
        assert_close(dict(averaged.module.state_dict()), means)
