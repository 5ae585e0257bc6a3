"""A loop with accelerate: 8 micro-batches a step, an lr schedule, and the same run again from a saved state."""

import tempfile

import torch
from accelerate import Accelerator

import zokern
from zokern.integrations.accelerate import prepare

torch.manual_seed(0)
x = torch.randn(250, 8)
data = torch.utils.data.TensorDataset(x, x.sum(dim=1, keepdim=True))
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=8)

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).eval()
opt = prepare(accelerator, zokern.MeZO(model, lr=1e-2, num_samples=4))
scheduler = torch.optim.lr_scheduler.ExponentialLR(opt.optimizer, 0.999)
model, loader, scheduler = accelerator.prepare(model, torch.utils.data.DataLoader(data, batch_size=8), scheduler)


def loss(batch: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


def train(epochs: int) -> None:
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                opt.step(loss, batch, weight=len(batch[0]))  # makes a step at every 8th, and at the end of the data
                scheduler.step()


train(1)
print(f"{opt.metrics['loss']:.3f} after {opt.counters['steps']} steps, {opt.counters['forwards']} forwards")
train(19)
with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    train(4)
    uninterrupted = [p.detach().clone() for p in model.parameters()]
    accelerator.load_state(folder)
train(4)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), uninterrupted, strict=True))
print(f"{opt.metrics['loss']:.3f} after {opt.counters['steps']} steps, lr {scheduler.get_last_lr()[0]:.4f}")
