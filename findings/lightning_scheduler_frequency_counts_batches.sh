#!/usr/bin/env bash
# Lightning's frequency of a scheduler with interval="step" counts batches of the epoch, not optimizer steps.
#
# configure_optimizers documents frequency as how many epochs or steps pass between calls to scheduler.step(). With
# interval="step", Lightning takes the batch's number within the epoch and asks whether frequency divides it. It asks only
# at batches where the optimizer steps. Under accumulate_grad_batches=4, frequency 2 and 4 thus do what 1 does, and 8
# every second step. The count begins anew in each epoch: of 10 batches, accumulated by 4, the steps fall on 4, 8 and 10,
# so with frequency 3 the scheduler never moves. Without accumulation it does not move either, where frequency is more
# than the batches of an epoch. Nothing is told.
#
# It matters to whoever turns accumulation on or changes a batch size, and keeps a schedule in steps. What helps:
# frequency 1, and the period in the scheduler itself (StepLR(optimizer, step_size=3)), which then counts optimizer steps.
#
# In zokern: nothing is changed; the page says to leave frequency 1 (docs/lightning.md#what-a-step-does).
#
# Seen in lightning 2.6.6 with torch 2.13.0 on a CPU. Needs python3 with venv.
# Subject: fine-tuning frameworks
# 2026-11-28
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0 lightning==2.6.6 numpy

cat > seen.py <<'PYTHON'
import lightning
import torch
from torch.optim.lr_scheduler import StepLR


class Net(lightning.LightningModule):
    def __init__(self, frequency, period):
        super().__init__()
        self.net, self.frequency, self.period = torch.nn.Linear(2, 1), frequency, period

    def training_step(self, batch, batch_idx):
        return self.net(batch).mean()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 1.0)
        scheduler = StepLR(optimizer, self.period, gamma=0.5)
        config = {"scheduler": scheduler, "interval": "step", "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": config}


def halved(frequency, accumulate, batches, epochs, period=1):
    quiet = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
    )
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, accumulate_grad_batches=accumulate, **quiet
    )
    trainer.fit(Net(frequency, period), torch.utils.data.DataLoader(torch.ones(batches, 2)))
    times = -torch.tensor(trainer.optimizers[0].param_groups[0]["lr"]).log2().int().item()
    print(
        f"frequency {frequency}, accumulate {accumulate}, {epochs} x {batches} batches:",
        f"{trainer.global_step} steps, lr halved {times} times" + (f" (period {period})" if period > 1 else ""),
    )


print("torch", torch.__version__.split("+")[0], "lightning", lightning.__version__)
for frequency in (1, 2, 4, 8):
    halved(frequency, accumulate=4, batches=24, epochs=1)
halved(3, accumulate=4, batches=10, epochs=4)
halved(20, accumulate=1, batches=10, epochs=6)
halved(1, accumulate=4, batches=10, epochs=4, period=3)
PYTHON
venv/bin/python -W ignore seen.py 2>errors.txt | tee seen.txt || { cat errors.txt; exit 1; }
cat > wanted.txt <<'TEXT'
frequency 1, accumulate 4, 1 x 24 batches: 6 steps, lr halved 6 times
frequency 2, accumulate 4, 1 x 24 batches: 6 steps, lr halved 6 times
frequency 4, accumulate 4, 1 x 24 batches: 6 steps, lr halved 6 times
frequency 8, accumulate 4, 1 x 24 batches: 6 steps, lr halved 3 times
frequency 3, accumulate 4, 4 x 10 batches: 12 steps, lr halved 0 times
frequency 20, accumulate 1, 6 x 10 batches: 60 steps, lr halved 0 times
frequency 1, accumulate 4, 4 x 10 batches: 12 steps, lr halved 4 times (period 3)
TEXT
tail -n 7 seen.txt | diff - wanted.txt || { echo "CHANGED"; exit 1; }
echo "as described"
