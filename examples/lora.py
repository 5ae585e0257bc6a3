"""A LoRA adapter of PEFT, trained with forward passes only: the base stays, and a few hundred numbers are saved."""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import zokern

torch.manual_seed(0)
x = torch.randn(256, 8)
base = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).eval()
before = {name: p.clone() for name, p in base.state_dict().items()}
y = base(x).detach() + x[:, :1]  # what the base says, and something that it does not know

model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"])).eval()


def loss() -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(x), y)


opt = zokern.MeZO(model, lr=1e-2, eps=1e-2, num_samples=4)  # the adapter is all that asks to be trained
first = float(opt.step(loss))
for _ in range(100):
    last = float(opt.step(loss))
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"loss {first:.3f} -> {last:.3f}, {trained} numbers trained")
assert last < first / 2
assert all(torch.equal(model.get_base_model().state_dict()[name.replace(".", ".base_layer.")], p)
           for name, p in before.items())  # fmt: skip

with tempfile.TemporaryDirectory() as directory:
    model.save_pretrained(directory)
    other = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).eval()
    other.load_state_dict(before)
    assert torch.equal(PeftModel.from_pretrained(other, directory).eval()(x), model(x))
