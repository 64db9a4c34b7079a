"""Train on real handwritten digits with Lightning and ``HessianFree``: only the optimizer's line is ours.

pip install -e '.[examples,frameworks]' && python examples/lightning_digits.py
"""

import argparse

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

import optim


class Digits(lightning.LightningModule):
    """A network of one hidden layer; nothing in it knows of second derivatives."""

    def __init__(self):
        super().__init__()
        layers = [torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10)]
        self.network = torch.nn.Sequential(*layers)

    def training_step(self, batch, _):
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        images, labels = batch
        accuracy = (self.network(images).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self):
        return optim.HessianFree(self.parameters(), weight_decay=1e-3)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args(arguments)
    lightning.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train, test = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    model = Digits()
    # One batch an epoch: each step goes far on the batch that it is given.
    trainer = lightning.Trainer(
        max_epochs=options.epochs, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(model, DataLoader(train, batch_size=len(train)))
    (result,) = trainer.validate(model, DataLoader(test, batch_size=len(test)), verbose=False)
    print(f"test accuracy {result['accuracy']:.1%}, {model.trainer.global_step} steps")
    return result["accuracy"]


if __name__ == "__main__":
    main()
