"""The choice of a form, and the rule for mini-batches: numbers in, numbers out."""

import math

import pytest
import torch

from optim.methods.batches import BatchNoise
from optim.methods.forms import BLOCK_COST, LEAST_SIZE, USUAL, VECTORS, choose, usual_cost
from optim.methods.problem import Trial

GENEROUS = dict(memory=2.0**40, max_iter=250, direct_limit=1000)


def form(n, usual=0.0, solver="auto", dtype=torch.float64, **options):
    return choose(solver, n, dtype, usual=usual, **{**GENEROUS, **options})


class TestForms:
    def test_a_matrix_is_formed_where_it_is_cheaper_than_the_space_has_been(self):
        limit = int(USUAL / BLOCK_COST)
        assert form(limit).name == "formed"
        assert form(limit + 1).name == "grown"
        assert form(100, usual=100 * BLOCK_COST).name == "formed"
        assert form(100, usual=99 * BLOCK_COST).name == "grown"
        assert "100 columns cost less than 60 products" in form(100, usual=60).why

    def test_not_in_single_precision_nor_past_the_limit(self):
        assert form(4, dtype=torch.float32).name == "grown"
        assert form(100, usual=100.0, direct_limit=99).name == "grown"
        assert form(4, direct_limit=0).name == "grown"

    @pytest.mark.parametrize("solver", ["subspace", "direct", "cg"])
    def test_what_is_asked_for_is_given(self, solver):
        name = {"subspace": "grown", "direct": "formed", "cg": "cg"}[solver]
        assert form(10**6 if solver != "direct" else 10**4, solver=solver)[:2] == (name, "as asked")
        # All of it, where all parameters fit.
        memory = 1.0 if solver != "direct" else 8.0 * 10**12
        assert form(10**6, solver=solver, memory=memory).name == name

    def test_a_space_that_is_asked_for_says_what_memory_leaves_of_it(self):
        assert form(10**6, solver="subspace", memory=1.0).why == "as asked, memory=1 bytes hold 1 directions"

    def test_memory_bounds_the_space_and_then_it_is_cg(self):
        n = 10**6
        vector = VECTORS * n * 4
        fits = form(n, dtype=torch.float32, memory=30.5 * vector)
        assert (fits.name, fits.max_size) == ("grown", 30)
        short = form(n, dtype=torch.float32, memory=(LEAST_SIZE - 0.5) * vector)
        assert short.name == "cg"
        assert f"hold {LEAST_SIZE - 1} directions" in short.why

    def test_a_space_ends_with_the_parameters_and_with_max_iter(self):
        assert form(50, dtype=torch.float32).max_size == 50
        assert form(5000).max_size == 250

    def test_after_steps_with_a_matrix_the_space_is_measured_again(self):
        usual, formed, steps = 100.0, form(100, usual=100.0), 0
        while form(100, usual=usual).name == "formed":
            usual, steps = usual_cost(usual, formed, 100), steps + 1
        assert 5 < steps < 30
        assert usual_cost(usual, form(100, usual=usual), 10) == pytest.approx(0.5 * (usual + 10))
        assert usual_cost(0.0, form(100), 40) == 40.0


def stepped(noise, before, after):
    return noise.stepped(before, Trial(torch.zeros(1), after))


class TestBatches:
    def test_the_same_samples_are_no_noise(self):
        noise = stepped(BatchNoise().observed(2.0, 100), 2.0, 1.0).observed(1.0005, 100)
        assert not noise.is_seen
        assert noise.rate == 1.0
        assert not noise.loses

    def test_other_samples_are_news_first_and_batches_then(self):
        noise = stepped(BatchNoise().observed(2.0, 100), 2.0, 1.0).observed(1.5, 100)
        assert (noise.is_other, noise.is_news, noise.is_seen, noise.rate) == (True, True, False, 1.0)
        noise = stepped(noise, 1.5, 0.8).observed(1.2, 100)
        assert (noise.is_other, noise.is_news, noise.is_seen, noise.rate) == (True, False, True, 0.5)

    def test_an_objective_that_was_changed_once_is_no_batch(self):
        noise = stepped(BatchNoise().observed(2.0, 100), 2.0, 1.0).observed(5.0, 100)
        for value in (4.0, 3.0, 2.0):
            noise = stepped(noise, value + 1, value).observed(value, 100)
            assert not noise.is_seen
            assert not noise.is_news

    @pytest.mark.parametrize("every", [1, 2, 3])
    def test_batches_that_stay_for_some_steps_are_batches(self, every):
        noise, seen = BatchNoise(), []
        for step in range(30):
            noise = stepped(noise.observed(2.0 if step % every == 0 else 1.0, 100), 2.0, 1.0)
            seen.append(noise.is_seen)
            assert not noise.is_news or step < 2 * every
        assert all(seen[4 * every :])

    def test_a_smaller_batch_knows_less_and_a_large_one_is_forgotten(self):
        noise = BatchNoise(changes=3.0, outputs=100.0).observed(1.0, 25)
        assert noise.part == pytest.approx(25 / 85)
        assert noise.rate == pytest.approx(0.5 * 25 / 85)
        noise = BatchNoise(outputs=10000.0)
        for _ in range(25):
            noise = noise.observed(1.0, 100)
        assert noise.part > 0.7
        assert BatchNoise().observed(1.0, 0).part == 1.0

    def test_steps_that_keep_nothing_of_their_gain_lose(self):
        noise = stepped(BatchNoise(changes=4.0).observed(2.0, 0), 2.0, 1.0)
        for _ in range(8):
            noise = noise.observed(3.0, 0).tested(2.9, 3.0)
            loses, kept = noise.loses, noise.kept
            noise = stepped(noise, 3.0, 2.0)
        assert loses
        assert -0.1 < kept < 0.1
        for _ in range(5):
            noise = stepped(noise.observed(3.0, 0).tested(3.9, 3.0), 3.0, 2.0)
        assert not noise.loses
        assert noise.kept <= 1.0

    @pytest.mark.parametrize("promised", [0.0, 1e-6, -1.0])
    def test_steps_too_small_to_tell_recover(self, promised):
        """Or damping would be doubled for ever: smaller steps say even less."""
        noise = BatchNoise(before=1.0, expected=1.0 - promised, kept=-0.5, changes=4.0)
        for _ in range(5):
            noise = noise.tested(0.9, 1.0)
        assert noise.kept > 0.5

    def test_one_bad_batch_counts_as_one(self):
        noise = stepped(BatchNoise().observed(2.0, 0), 2.0, 1.0).observed(1e9, 0).tested(0.0, 1e9)
        assert noise.kept == pytest.approx(0.7 - 0.3)

    @pytest.mark.parametrize("before", [math.nan, math.inf])
    def test_what_is_not_finite_says_nothing(self, before):
        noise = stepped(BatchNoise().observed(2.0, 0), 2.0, 1.0).observed(3.0, 0)
        assert noise.tested(before, 3.0) == noise

    def test_a_step_that_was_not_taken_promises_nothing(self):
        noise = BatchNoise().observed(2.0, 0).stepped(2.0, None)
        assert (noise.before, noise.expected) == (2.0, 2.0)
        assert noise.observed(3.0, 0).tested(5.0, 3.0).kept == 1.0
