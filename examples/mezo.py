"""MeZO on a small regression, and the same run again from a saved state: the same bits."""

import io

import torch

import zokern

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).eval()
x = torch.randn(256, 8)
y = x.sum(dim=1, keepdim=True)


def loss() -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(x), y)


opt = zokern.MeZO(model, lr=1e-2, num_samples=4)
print(f"before: {opt.step(loss):.3f}")
for _ in range(500):
    opt.step(loss)

saved = io.BytesIO()
torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, saved)
for _ in range(10):
    opt.step(loss)
uninterrupted = [p.clone() for p in model.parameters()]

state = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
model.load_state_dict(state["model"])
opt = zokern.MeZO(model, lr=1e-2, num_samples=4)
opt.load_state_dict(state["opt"])
for _ in range(10):
    opt.step(loss)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), uninterrupted, strict=True))
print(f"after {opt.counters['steps']} steps and {opt.counters['passes']} passes: {opt.metrics['loss']:.3f}")
