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
EXAMPLE = Path(__file__).parent.parent / "examples" / "lightning_digits.py"


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
            {"precision": "bf16-mixed"},
        ],
        ids=["plain", "clipping", "bf16-mixed"],
    )
    def test_automatic_optimization(self, make, options, tmp_path):
        module = self.module(make)
        before = loss_of(module.network)
        trainer = self.trainer(tmp_path, enable_checkpointing=False, **options)
        trainer.fit(module, DataLoader(dataset(), batch_size=150))
        assert trainer.global_step == 10
        assert loss_of(module.network) < 0.8 * before
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.99**10)

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


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(make, precision):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    plain = network()
    before = loss_of(copy.deepcopy(plain))
    model, optimizer, loader = accelerator.prepare(
        plain, make(plain.parameters()), DataLoader(dataset(), batch_size=150)
    )
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99))
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
