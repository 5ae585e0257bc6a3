"""Settings that nothing of the method uses are told, at the caller's line; those that are used are not."""

import pytest
import torch

import zokern
from tests import models


@pytest.mark.parametrize(
    ("method", "settings", "told"),
    [
        (
            zokern.MeZO,
            {"betas": (0.9, 0.99)},
            r"betas is \(0.9, 0.99\), and update='sgd' does not use it: give update='momentum' or 'adam' or 'adamezo', or",
        ),
        (zokern.MeZO, {"delta": 1e-6, "update": "momentum"}, "delta is 1e-06, and update='momentum' does not use it"),
        (zokern.MeZO, {"horizon": 5, "update": "adam"}, "horizon is 5, and update='adam' does not use it"),
        (zokern.LeZO, {"num_dropped": 1, "delta": 1e-6}, "delta is 1e-06, and update='sgd' does not use it"),
        (zokern.ES, {}, "ES maximizes what the closure returns"),
        (zokern.MeZOGV, {"curvature_dtype": torch.bfloat16}, "without smoothing there is no curvature"),
    ],
)
def test_settings_that_nothing_uses_are_told_once_and_at_the_callers_line(method, settings, told):
    with pytest.warns(zokern.ZokernWarning, match=told) as found:
        method(models.toy(), lr=1e-3, **settings)
    assert [one.filename for one in found] == [__file__]


@pytest.mark.parametrize("update", ["momentum", "adam", "adamezo"])
def test_settings_that_an_update_uses_are_not_told(update):
    used = {"betas": (0.8, 0.9), **({} if update == "momentum" else {"delta": 1e-6})}
    zokern.MeZO(models.toy(), lr=1e-3, update=update, **used, **({"horizon": 3} if update == "adamezo" else {}))
    zokern.MeZO(models.toy(), lr=1e-3)
    zokern.MeZOGV(models.toy(), lr=1e-3, smoothing=1e-8, curvature_dtype=torch.bfloat16)
