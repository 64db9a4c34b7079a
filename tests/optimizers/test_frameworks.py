"""Training frameworks, with the user's code as it is: only the line that makes the optimizer differs.

They run where they are installed: ``pip install -e '.[frameworks]'``.
"""

import copy
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch.utils.data import DataLoader, TensorDataset

import optim

OPTIMIZERS = {"newton": optim.Newton, "hessian_free": optim.HessianFree, "gauss_newton": optim.GaussNewton}
# The frameworks' own warnings are theirs.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_digits.py"


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def dataset():
    inputs = zoo.vector(600, 1).view(150, 4).float()
    return TensorDataset(inputs, (inputs[:, 0] * inputs[:, 1] > 0).long())


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))


def loss_of(model):
    inputs, targets = dataset().tensors
    with torch.no_grad():
        return F.cross_entropy(model(inputs), targets).item()


class TestLightning:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("lightning")

    @staticmethod
    def module(make):
        import lightning

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.network = network()

            def training_step(self, batch, _):
                return F.cross_entropy(self.network(batch[0]), batch[1])

            def configure_optimizers(self):
                optimizer = make(self.parameters())
                scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
                return {"optimizer": optimizer, "lr_scheduler": scheduler}

        return Module()

    @staticmethod
    def trainer(folder, epochs=10, **options):
        import lightning

        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        return lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", default_root_dir=folder, **quiet, **options
        )

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"gradient_clip_val": 1.0},
            {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
            {"precision": "bf16-mixed"},
        ],
        ids=["plain", "clipping", "clipping_values", "bf16-mixed"],
    )
    def test_automatic_optimization(self, make, options, tmp_path):
        module = self.module(make)
        before = loss_of(module.network)
        trainer = self.trainer(tmp_path, enable_checkpointing=False, **options)
        trainer.fit(module, DataLoader(dataset(), batch_size=150))
        assert trainer.global_step == 10
        assert loss_of(module.network) < 0.8 * before
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.99**10)

    def test_accumulation_is_noticed(self, make, tmp_path):
        """The closure that Lightning gives holds the last micro-batch only."""
        module = self.module(make)
        before = loss_of(module.network)
        trainer = self.trainer(tmp_path, enable_checkpointing=False, accumulate_grad_batches=3)
        with pytest.warns(UserWarning, match="added to that of 2 backward pass") as caught:
            trainer.fit(module, DataLoader(dataset(), batch_size=50))
        assert sum("2 backward pass" in str(warning.message) for warning in caught) == 1
        assert trainer.global_step == 10
        assert loss_of(module.network) < 0.9 * before

    def test_manual_optimization(self, make, tmp_path):
        import lightning

        class Manual(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.network = network()
                self.automatic_optimization = False

            def training_step(self, batch, _):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self.network(batch[0]), batch[1]))
                optimizer.step()

            def configure_optimizers(self):
                return make(self.parameters(), model=self.network)

        module = Manual()
        before = loss_of(module.network)
        trainer = self.trainer(tmp_path, enable_checkpointing=False)
        trainer.fit(module, DataLoader(dataset(), batch_size=150))
        assert trainer.global_step == 10
        assert trainer.optimizers[0].report.accepted
        assert loss_of(module.network) < 0.8 * before

    def test_checkpoint_and_resume(self, make, tmp_path):
        loader = DataLoader(dataset(), batch_size=150)
        whole = self.module(make)
        self.trainer(tmp_path / "whole", 6, enable_checkpointing=False).fit(whole, loader)
        first = self.module(make)
        trainer = self.trainer(tmp_path / "first", 3)
        trainer.fit(first, loader)
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        resumed = self.module(make)
        self.trainer(tmp_path / "resumed", 6).fit(resumed, loader, ckpt_path=tmp_path / "c.ckpt")
        for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    def test_the_example(self, capsys):
        accuracy = runpy.run_path(str(EXAMPLE))["main"](["--epochs", "15"])
        assert accuracy > 0.9
        assert "test accuracy" in capsys.readouterr().out


class TestAccelerate:
    @staticmethod
    def prepared(make, model, **options):
        accelerate = pytest.importorskip("accelerate")
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True, **options)
        size = 150 // options.get("gradient_accumulation_steps", 1)
        loader = DataLoader(dataset(), batch_size=size)
        model, optimizer, loader = accelerator.prepare(model, make(model), loader)
        scheduler = accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99))
        return accelerator, model, optimizer, loader, scheduler

    @pytest.mark.parametrize("precision", ["no", "bf16"])
    def test_with_a_closure(self, make, precision):
        plain = network()
        before = loss_of(copy.deepcopy(plain))
        accelerator, model, optimizer, loader, scheduler = self.prepared(
            lambda m: make(m.parameters()), plain, mixed_precision=precision
        )
        for _ in range(10):
            for inputs, targets in loader:

                def closure(inputs=inputs, targets=targets):
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(inputs), targets)
                    accelerator.backward(loss)
                    return loss

                optimizer.step(closure)
                scheduler.step()
        assert loss_of(accelerator.unwrap_model(model).float()) < 0.8 * before

    @pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 3}])
    def test_without_a_closure(self, make, options):
        """The loop of its documentation; micro-batches are all computed again: steps are tried."""
        plain = network()
        before = loss_of(copy.deepcopy(plain))
        made = []
        accelerator, model, optimizer, loader, scheduler = self.prepared(
            lambda m: made.append(make(m.parameters(), model=m)) or made[0], plain, **options
        )
        for _ in range(10):
            for inputs, targets in loader:
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(inputs), targets)
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
        assert made[0].report.rho > 0
        assert loss_of(accelerator.unwrap_model(model).float()) < 0.8 * before


class TestTransformers:
    """The Trainer of Hugging Face, on a small BERT with random weights."""

    @staticmethod
    def trained(make, folder, monkeypatch, size=64, **options):
        transformers = pytest.importorskip("transformers")
        monkeypatch.setenv("TQDM_DISABLE", "1")
        torch.manual_seed(0)
        shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=2, **shape)
        model = transformers.BertForSequenceClassification(config)
        tokens = torch.randint(0, 50, (64, 8))
        data = [{"input_ids": row, "labels": (row[0] > 25).long()} for row in tokens]
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=size,
            learning_rate=1.0,
            use_cpu=True,
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
            seed=0,
            **{"max_steps": 8, "save_strategy": "no", **options},
        )
        optimizer = make(model.parameters(), model=model)
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        return trainer, optimizer

    @staticmethod
    def losses(trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    @pytest.mark.parametrize(
        "options",
        [{}, {"bf16": True}, {"size": 16, "gradient_accumulation_steps": 4}, {"max_grad_norm": 0.0}],
        ids=["plain", "bf16", "accumulation", "no_clipping"],
    )
    def test_trainer(self, make, options, tmp_path, monkeypatch, recwarn):
        trainer, optimizer = self.trained(make, tmp_path, monkeypatch, **options)
        trainer.train()
        losses = self.losses(trainer)
        assert len(losses) == 8
        assert losses[-1] < 0.97 * losses[0]
        # It was tried: all of .grad was seen to come from the model.
        assert optimizer.report.rho == optimizer.report.rho
        assert not [w for w in recwarn if "without trying" in str(w.message)]

    def test_checkpoint_and_resume(self, make, tmp_path, monkeypatch):
        saving = dict(save_strategy="steps", save_steps=4)
        whole, _ = self.trained(make, tmp_path / "whole", monkeypatch, **saving)
        whole.train()
        resumed, _ = self.trained(make, tmp_path / "whole", monkeypatch, **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
        assert self.losses(resumed) == pytest.approx(self.losses(whole), rel=1e-2)


class TestIgnite:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("ignite")

    @pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}])
    def test_supervised_trainer(self, make, options):
        import ignite.engine

        model = network()
        before = loss_of(model)
        optimizer = make(model.parameters(), model=model)
        trainer = ignite.engine.create_supervised_trainer(model, optimizer, F.cross_entropy, **options)
        size = 150 // options.get("gradient_accumulation_steps", 1)
        trainer.run(DataLoader(dataset(), batch_size=size), max_epochs=10)
        assert optimizer.report.rho > 0
        assert loss_of(model) < 0.8 * before
