"""Does the loss react to the weights? A model, and a copy of it that a closure runs by mistake."""

import copy

import torch

import zokern

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).eval()
x = torch.randn(256, 8)
y = x.sum(dim=1, keepdim=True)

opt = zokern.MeZO(model, lr=1e-2)
result = zokern.check(opt, lambda: torch.nn.functional.mse_loss(model(x), y))
print(result)
assert result.ok

average = copy.deepcopy(model)
wrong = zokern.check(opt, lambda: torch.nn.functional.mse_loss(average(x), y))
print("\n".join(one.text for one in wrong.verdicts if one.suspicious))
assert not wrong.ok
assert [row.name for row in wrong.without_effect] == [name for name, _ in model.named_parameters()]
