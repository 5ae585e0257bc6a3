"""LightningModules by forward passes: every micro-batch is used, and Lightning's own loop, schedulers, logs and checkpoints
go on as ever."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import zokern
from tests.methods import equal, weights
from tests.models import seeded, small

lightning = pytest.importorskip("lightning")

from tests.integrations.modules import BATCHES, STEPS, Loader, Noted, Plain, Tuner, by_hand, trainer  # noqa: E402
from zokern.integrations.lightning import ForwardOnly  # noqa: E402

PLACES = [(dtype, place) for dtype in (torch.float32, torch.bfloat16) for place in ("inplace", "shadow", "stream")]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|LeafSpec|no `val_dataloader`|in eval mode at the start).*"
)


@pytest.mark.parametrize(("dtype", "place"), PLACES)
def test_a_step_is_over_every_micro_batch(dtype, place, recwarn):
    class Weighted(Tuner):
        def micro_batch_weight(self, batch: Tensor) -> float | None:
            return float(len(batch)) if place == "stream" else None

    module, noted = Weighted(dtype, placement=place), Noted()
    fit = trainer(callbacks=[noted])
    fit.fit(module, Loader(), Loader())
    model, losses = by_hand(dtype=dtype, placement=place, weighted=place == "stream")
    assert equal(weights(module.net), weights(model))
    assert noted.steps == [0, 0, 1, 1, 1, 2, 3]
    assert [bool(one) for one in noted.outputs] == [False, False, True, False, False, True, True]
    assert [one["loss"] for one in noted.outputs if one] == [pytest.approx(float(loss), rel=1e-6) for loss in losses]
    assert module.forwards == [len(batch) for batches in STEPS for _ in range(2) for batch in batches]
    (opt,) = fit.optimizers
    assert opt.counters["steps"] == 3
    assert opt.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**3)
    mean = torch.stack([model.eval()(batch) for batch in BATCHES]).float().mean()
    assert fit.callback_metrics["validation"] == pytest.approx(float(mean), rel=1e-6)
    assert not [one for one in recwarn if "returned `None`" in str(one.message)]


# --------------------------------------------------------------------------------------------------- what the class has


class Existing(Plain):
    """A dict is taken apart, and is returned with more than the loss."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        words = batch.pop("words")
        return {"loss": self.net(words), "count": len(words)}


class Above(ForwardOnly, Existing):
    pass


class Below(Above):
    """One more training_step, around the one that the mixin has already."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)


class AlsoHooks(Tuner):
    """None of them calls super()."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return self.net(batch.pop("words"))

    def on_fit_start(self) -> None:
        self.began = True

    def on_train_end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("kind", [Above, Below, AlsoHooks])
def test_training_step_as_it_is(kind):
    module, noted = kind(), Noted()
    batches = [{"words": batch} for batch in BATCHES]
    assert module.training_step(dict(batches[0]), 0) is not None  # by hand, outside of a fit
    trainer(callbacks=[noted]).fit(module, Loader(batches))
    assert equal(weights(module.net), weights(by_hand()[0]))
    assert all(batch.keys() == {"words"} for batch in batches)
    if kind is not AlsoHooks:
        assert [one["count"] for one in noted.outputs if one] == [len(batches[-1]) for batches in STEPS]
    else:
        assert module.began
        assert module.ended


def test_dropout_draws_as_in_a_loop_by_hand():
    """In training mode, as Lightning has it: the same in all forwards of a step."""

    def dropping() -> nn.Module:
        return nn.Sequential(seeded(lambda: nn.Linear(4, 8)), nn.Dropout(0.5), nn.Linear(8, 1, bias=False)).train()

    class Dropping(Tuner):
        def on_train_start(self) -> None:
            torch.manual_seed(3)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            assert self.training
            return (self.net(batch) - 1).square().mean()

    module, data = Dropping(), list(torch.ones(4, 5, 4))
    module.net, expected = dropping(), dropping()
    expected.load_state_dict(module.net.state_dict())
    trainer(count=2).fit(module, Loader(data))
    opt = zokern.MeZO(expected, 1e-2, update="momentum")
    torch.manual_seed(3)
    for i in (0, 2):
        opt.step(lambda batch: (expected(batch) - 1).square().mean(), data[i : i + 2])
        opt.param_groups[0]["lr"] *= 0.9
    assert equal(weights(module.net), weights(expected))


def test_mixed_bfloat16_is_autocast_in_each_forward():
    module, expected = Tuner(), small()
    fit = trainer(precision="bf16-mixed", limit_train_batches=3)
    fit.fit(module, Loader())
    with torch.autocast("cpu", torch.bfloat16):
        loss = zokern.MeZO(expected, 1e-2, update="momentum").step(expected, BATCHES[:3])
    assert equal(weights(module.net), weights(expected))
    assert torch.equal(fit.optimizers[0].metrics["loss"], loss)


def test_by_its_older_name():
    older = pytest.importorskip("pytorch_lightning")

    class Older(ForwardOnly, older.LightningModule):
        training_step, configure_optimizers = Plain.training_step, Plain.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.net, self.options, self.forwards = small(), {"lr": 1e-2, "update": "momentum"}, []

    module = Older()
    trainer(kind=older.Trainer).fit(module, Loader())
    assert equal(weights(module.net), weights(by_hand()[0]))


# ------------------------------------------------------------------------------------------------------ logs, schedulers


def test_what_is_logged_is_logged_once_with_the_mean_over_the_forwards():
    class Logging(Tuner):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.seen.append((len(batch), float(loss)))
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.log_dict(
                {"count": 1, "words": torch.tensor(len(batch))}, on_epoch=True, on_step=False, reduce_fx="sum"
            )
            return loss

    module = Logging(lr=0.0)
    module.seen = []
    fit = trainer()
    fit.fit(module, Loader())
    means = [sum(loss for size, loss in module.seen if size == len(batch)) / 2 for batch in BATCHES]
    metrics = {name: float(value) for name, value in fit.callback_metrics.items()}
    assert metrics["count"] == len(BATCHES)
    assert metrics["words"] == sum(map(len, BATCHES))
    assert metrics["loss_step"] == pytest.approx(means[-1], rel=1e-6)
    words = sum(mean * len(batch) for mean, batch in zip(means, BATCHES, strict=True)) / sum(map(len, BATCHES))
    assert metrics["loss_epoch"] == pytest.approx(words, rel=1e-6)


def test_schedulers_of_epochs_and_of_metrics():
    class Scheduled(Tuner):
        def configure_optimizers(self) -> Any:
            opt = zokern.MeZO(self.net, 1e-9)
            plateau = ReduceLROnPlateau(opt, patience=0, threshold=0.99, factor=0.5, eps=0.0)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": plateau, "monitor": "validation"}}

    module = Scheduled()
    fit = trainer(epochs=4)
    fit.fit(module, Loader(), Loader())
    assert fit.optimizers[0].param_groups[0]["lr"] == 1e-9 * 0.5**3


# ------------------------------------------------------------------------------------------------------------ checkpoints


class Saving(lightning.Callback):
    """A checkpoint after each batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-{batch_idx}.ckpt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_run_goes_on_with_the_same_bits(dtype, tmp_path):
    """Also from the middle of an epoch, and of an accumulation, whose micro-batches a checkpoint has."""

    class Weighted(Tuner):
        def micro_batch_weight(self, batch: Tensor) -> float:
            return float(len(batch))

        def transfer_batch_to_device(self, batch: Tensor, device: torch.device, dataloader_idx: int) -> Tensor:
            moved.append(len(batch))
            return batch

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["own"] = True

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            assert checkpoint["own"]

    moved: list[int] = []
    whole = Weighted(dtype)
    trainer(epochs=2, callbacks=[Saving(tmp_path)]).fit(whole, Loader())
    model, _ = by_hand(2, dtype=dtype, weighted=True)
    assert equal(weights(whole.net), weights(model))
    for saved, used in {"0-0": 0, "0-1": 0, "0-2": 3, "0-6": 7, "1-4": 10}.items():
        moved = []
        again, fit = Weighted(dtype), trainer(epochs=2)
        with torch.no_grad():
            again.net.norm.weight.zero_()
        fit.fit(again, Loader(), ckpt_path=tmp_path / f"{saved}.ckpt", weights_only=True)
        assert equal(weights(again.net), weights(model)), saved
        assert sorted(moved) == sorted(len(batch) for batch in (BATCHES * 2)[used:])  # those that wait, too
        assert fit.global_step == fit.optimizers[0].counters["steps"] == 6
        assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**6)


WAITS = {"update": "sgd", "distribution": "lowrank:1", "placement": "forward", "eps": 0.1, "lr": 0.03}


class Looking(Tuner):
    """What its validation and the end of that have seen after each step; a step looks at the model as validation does."""

    def on_validation_epoch_end(self) -> None:
        with torch.no_grad():
            self.__dict__.setdefault("seen", []).append(float(self.net(BATCHES[0])))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.validation_step(batch, batch_idx)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if not self.trainer.training:
            self.__dict__.setdefault("seen", []).append(float(self.net(batch)))


def test_updates_that_wait_are_shown_and_folded(tmp_path):
    """Validation between steps has them, and a fit ends with a fold; a checkpoint in the middle of a window has folded
    copies, to which nothing is added twice."""
    modules = {}
    for fold_every in (1, 4):
        module = modules[fold_every] = Looking(fold_every=fold_every, **WAITS)
        fit = trainer(1, callbacks=[Saving(tmp_path)], val_check_interval=1)
        fit.fit(module, Loader(), Loader(BATCHES[:1]))
        assert fit.optimizers[0].pending == 0
    assert fit.optimizers[0].counters["passes"] == 2  # of 7 steps
    plain, seen = (torch.tensor(module.seen) for module in modules.values())
    assert torch.allclose(plain, seen, rtol=0, atol=1e-4)
    assert (plain[::2].diff().abs() > 1e-3).all()  # else it would not show
    last = torch.load(tmp_path / "0-6.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(p, last[name]) for name, p in module.named_parameters())
    for saved, waiting in {"0-1": 0, "0-3": 1, "0-5": 0}.items():
        again, fit = Looking(fold_every=4, **WAITS), trainer(1)
        fit.fit(again, Loader(), ckpt_path=tmp_path / f"{saved}.ckpt", weights_only=True)
        assert fit.optimizers[0].counters["steps"] == 7
        for p, q in zip(again.parameters(), module.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-5)
        assert not waiting or equal(weights(again.net), weights(module.net))  # nothing waited there
    copy.deepcopy(module)


def test_averages_of_weights_are_refused_while_updates_wait():
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    fit = trainer(1, callbacks=[StochasticWeightAveraging(1e-2)])
    with pytest.raises(NotImplementedError, match="fold_every is 4, and StochasticWeightAveraging averages"):
        fit.fit(Tuner(fold_every=4, **WAITS), Loader())


def test_a_validation_that_raises_leaves_the_module_as_it_was():
    class Raises(Tuner):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            raise KeyError("mine")

    module, fit = Raises(fold_every=4, **WAITS), trainer(1, val_check_interval=1)
    with pytest.raises(KeyError, match="mine"):
        fit.fit(module, Loader(), Loader())
    assert type(module.net.head.weight) is nn.Parameter
    assert fit.optimizers[0].fold() == 1


def test_micro_batches_that_no_step_uses_are_told():
    class Stopping(Tuner):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            self.trainer.should_stop = batch_idx == 4

    module = Stopping()
    fit = trainer()
    with pytest.warns(zokern.ZokernWarning, match="when the training ended, 2 micro-batches had been collected"):
        fit.fit(module, Loader())
    assert fit.global_step == 1


def test_what_waits_belongs_to_its_fit(tmp_path):
    trainer(callbacks=[Saving(tmp_path)]).fit(Tuner(), Loader())
    module = Tuner.load_from_checkpoint(tmp_path / "0-1.ckpt")
    trainer().fit(module, Loader())
    assert equal(weights(module.net), weights(by_hand()[0]))


def test_a_step_that_raises_leaves_the_weights_and_what_waits():
    class Broken(Tuner):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if len(self.forwards) == 4:
                raise OSError("no more")
            return super().training_step(batch, batch_idx)

    module = Broken(placement="shadow")
    with pytest.raises(OSError, match="no more"):
        trainer().fit(module, Loader())
    assert equal(weights(module.net), weights(small()))
    saved: dict[str, Any] = {}
    module.on_save_checkpoint(saved)
    assert [args[1] for args in saved["zokern_waiting"]["arguments"]] == [0, 1]
    module.forwards = [0] * 5
    with pytest.warns(zokern.ZokernWarning, match="when another fit began, 2 micro-batches had been collected"):
        trainer().fit(module, Loader())
    assert equal(weights(module.net), weights(by_hand(placement="shadow")[0]))
