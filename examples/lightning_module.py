"""A LightningModule that is trained by forward passes, with accumulation and a schedule, and goes on from a checkpoint."""

import logging
import tempfile
import warnings

import lightning
import torch

import zokern
from zokern.integrations.lightning import ForwardOnly

warnings.filterwarnings("ignore", module="lightning")  # advice on workers and progress bars
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Tuner(ForwardOnly, lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> object:
        opt = zokern.MeZO(self, lr=1e-2, num_samples=4)
        return {"optimizer": opt, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(opt, 0.99)}


def fit(module: Tuner, epochs: int, checkpoint: str | None = None) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=epochs, accumulate_grad_batches=8, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=checkpoint)
    print(f"loss {trainer.callback_metrics['loss']:.3f} after {trainer.global_step} steps")
    return trainer


x = torch.randn(250, 8, generator=torch.Generator().manual_seed(1))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=8)

fit(Tuner(), 1)
whole, part = Tuner(), Tuner()
fit(whole, 12)
with tempfile.TemporaryDirectory() as folder:
    fit(part, 8).save_checkpoint(f"{folder}/last.ckpt")
    again = Tuner()
    fit(again, 12, f"{folder}/last.ckpt")
assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
