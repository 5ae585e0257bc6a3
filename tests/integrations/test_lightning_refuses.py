"""What a Lightning fit with a zokern optimizer may not be is refused before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zokern
from tests.methods import equal, weights
from tests.models import small

lightning = pytest.importorskip("lightning")

from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import SingleDeviceStrategy  # noqa: E402

from tests.integrations.modules import Loader, Plain, Tuner, trainer  # noqa: E402
from zokern.integrations.lightning import ForwardOnly  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|LeafSpec|no `val_dataloader`|in eval mode at the start|`dataloader_iter` step).*"
)


class ByHand(Tuner):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class FirstOrder(Tuner):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 1e-2)


class Iterating(Tuner):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        return self.net(next(dataloader_iter)[0])


class OwnStep(Tuner):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.step(closure=optimizer_closure)


class NoLoss(Tuner):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"logits": self.net(batch)}


class Nothing(Tuner):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return None


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (Plain, {}, TypeError, r"closure of Lightning's automatic optimization.*class Tuner\(ForwardOnly"),
        (Plain, {"count": 1, "precision": "bf16-mixed"}, TypeError, "closure of Lightning's automatic optimization"),
        (OwnStep, {}, TypeError, r"ends in super\(\)\.optimizer_step"),
        (ByHand, {}, TypeError, r"leave out self\.automatic_optimization = False"),
        (FirstOrder, {}, TypeError, "must return one of zokern's optimizers.*returned a SGD"),
        (Iterating, {}, TypeError, "takes a dataloader_iter"),
        (NoLoss, {}, TypeError, "a dict without 'loss', it has 'logits'"),
        (Nothing, {}, TypeError, "closure must return the loss as a scalar tensor, got NoneType"),
        (Tuner, {"gradient_clip_val": 1.0}, NotImplementedError, r"gradient_clip_val=1\.0\) would clip nothing"),
    ],
)
def test_a_fit_that_is_refused(kind, options, error, message):
    module = kind() if kind is ByHand else kind(placement="shadow")
    fit = trainer(**{"count": 3 if kind is not ByHand else 1, **options})
    with pytest.raises(error, match=message):
        fit.fit(module, Loader())
    assert equal(weights(module.net), weights(small()))


def test_a_training_step_that_the_mixin_does_not_see_is_refused():
    module = Tuner()
    module.training_step = lambda batch, batch_idx: module.net(batch)
    with pytest.raises(RuntimeError, match="no step was made: training_step was replaced"):
        trainer(count=1).fit(module, Loader())


def test_a_scaler_is_refused():
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(NotImplementedError, match="'16-mixed' has a GradScaler"):
        trainer(plugins=[plugin]).fit(Tuner(), Loader())


class DeepSpeedStrategy(SingleDeviceStrategy):
    """What Lightning's own is called, which needs its engine."""


class FSDPStrategy(SingleDeviceStrategy):
    pass


class Mine(FSDPStrategy):
    pass


@pytest.mark.parametrize(("kind", "message"), [(DeepSpeedStrategy, "under DeepSpeed"), (Mine, "under FSDP")])
def test_a_strategy_that_cuts_up_the_weights_is_refused(kind, message):
    with pytest.raises(NotImplementedError, match=f"Lightning: zokern does not train {message}"):
        trainer(strategy=kind("cpu")).fit(Tuner(), Loader())


def test_a_compiled_module_is_refused():
    module = torch.compile(Tuner(), backend="eager")
    with pytest.raises(NotImplementedError, match=r"self\.model = torch\.compile\(model\)"):
        trainer().fit(module, Loader())


def test_the_wrong_order_of_bases_is_refused():
    with pytest.raises(TypeError, match=r"class Wrong\(ForwardOnly, LightningModule\)"):
        type("Wrong", (lightning.LightningModule, ForwardOnly), {})
    type("Part", (ForwardOnly,), {})  # which a LightningModule follows later


def test_manual_optimization_without_the_mixin_goes_on():
    class Manual(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.optimizers().step(lambda: self.net(batch))

        def configure_optimizers(self) -> Any:
            return zokern.MeZO(self.net, 1e-2)

    module = Manual()
    fit = trainer(count=1, limit_train_batches=2)
    fit.fit(module, Loader())
    assert fit.global_step == fit.optimizers[0].counters["steps"] == 2
