"""What adapters do with modules: nothing is left behind, whatever was there before and however the pass ends."""

import pytest
from torch import nn, ones

from calib.extract.modules import Recorded, lacking, recording, replaced, stages


def test_a_module_has_its_own_methods_again() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError), replaced(model, extra_repr=lambda: "other"):
        assert model.extra_repr() == "other"
        raise ValueError
    assert model.extra_repr() == "in_features=2, out_features=1, bias=True" and "extra_repr" not in vars(model)
    wrapped = vars(model)["extra_repr"] = lambda: "wrapped"
    with replaced(model, extra_repr=lambda: "other"):
        assert model.extra_repr() == "other"
    assert vars(model)["extra_repr"] is wrapped


@pytest.mark.parametrize("error", [Recorded, ValueError])
def test_hooks_are_removed_and_other_errors_come_through(error: type[Exception]) -> None:
    model = nn.Linear(2, 1)

    def stop(*_: object) -> None:
        raise error

    caught = None
    try:
        with recording(model.register_forward_pre_hook(stop)):
            model(ones(1, 2))
    except ValueError as e:
        caught = e
    assert (caught is None) == (error is Recorded)
    assert not model._forward_pre_hooks and model(ones(1, 2)).shape == (1, 1)


def test_parts_that_lack_are_named_in_all_stages() -> None:
    model = nn.ModuleDict({"head": nn.ModuleList([nn.Linear(2, 1), nn.Conv2d(1, 1, 1)]), "one": nn.Linear(1, 1)})
    assert stages(model["head"]) == list(model["head"]) and stages(model["one"]) == [model["one"]]
    holder = nn.Module()
    holder.head, holder.one = model["head"], model["one"]
    assert lacking(holder, ("one", "absent.part"), ("one", "head")) == ["absent.part", "head"]
