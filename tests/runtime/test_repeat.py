"""Remembered calls: found for tensors that are laid out alike, and for no others."""

import pytest
import torch

from kvfold.runtime import internals, repeat

if not internals.FOUND:
    pytest.skip("this torch lacks the internals", allow_module_level=True)


@pytest.fixture(autouse=True)
def nothing_known():
    repeat.forget()
    yield
    repeat.forget()


def tensors():
    return torch.zeros(4, 8), torch.zeros(3, dtype=torch.int32)


def launch(pointers):
    """Stands for a kernel's launch."""


def test_a_call_with_the_same_layouts_is_found():
    repeat.remember("key", tensors(), launch)
    assert repeat.find("key", tensors()) is launch
    assert repeat.find("other", tensors()) is None
    values = tensors()
    values[0].fill_(3)  # values do not count
    assert repeat.find("key", values) is launch


CHANGES = {
    "shape": lambda x: torch.zeros(5, 8),
    "stride": lambda x: torch.zeros(4, 16)[:, :8],
    "dtype": lambda x: x.bfloat16(),
    "device": lambda x: x.to("meta"),
    "dimensions": lambda x: x[None],
    "gradient": lambda x: x.requires_grad_(),
    "conjugate": lambda x: torch.zeros(4, 8, dtype=torch.complex64).conj(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_with_another_layout_is_not_found(change):
    first, second = tensors()
    repeat.remember("key", (first, second), launch)
    assert repeat.find("key", (CHANGES[change](first.clone()), second)) is None
    assert repeat.find("key", (first, second)) is launch


def test_of_calls_with_one_key_the_last_is_kept():
    def other(pointers):
        """Another launch."""

    wide = torch.zeros(4, 16)[:, :8], tensors()[1]
    repeat.remember("key", tensors(), launch)
    repeat.remember("key", wide, other)
    assert repeat.find("key", wide) is other
    assert repeat.find("key", tensors()) is None


def test_the_oldest_call_goes_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(repeat, "CAPACITY", 3)
    for key in range(4):
        repeat.remember(key, tensors(), launch)
    found = [key for key in range(4) if repeat.find(key, tensors()) is launch]
    assert found == [1, 2, 3]


def test_forget_forgets_all_calls():
    repeat.remember("key", tensors(), launch)
    repeat.forget()
    assert repeat.find("key", tensors()) is None


def test_the_launch_of_a_key_is_found_by_layout_in_another_dispatch_state():
    first, second = tensors()
    with torch.inference_mode():
        repeat.remember("key", (first, second), launch)
        assert repeat.find("key", (first, second)) is launch
    assert repeat.launch_of("key", (first, second)) is launch
    assert repeat.launch_of("key", (first[:2], second)) is None
    assert repeat.launch_of("key", (first.bfloat16(), second)) is None
    assert repeat.launch_of("other", (first, second)) is None


# ---- what can be remembered ----------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def test_plain_tensors_and_parameters_can_be_remembered():
    assert repeat.can_remember(tensors())
    parameter = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    assert repeat.can_remember((*tensors(), parameter))


def test_subclasses_gradients_and_one_tensor_twice_cannot_be_remembered():
    first, second = tensors()
    assert not repeat.can_remember((first.as_subclass(Subclass), second))
    assert not repeat.can_remember((first.clone().requires_grad_(), second))
    assert not repeat.can_remember((first, second, first))


def test_nothing_can_be_remembered_under_a_mode_or_a_function_transform():
    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **kwargs or {})

    with Mode():
        assert not repeat.can_remember(tensors())
    seen = []

    def probe(x):
        seen.append(repeat.can_remember(tensors()))
        return x * 2

    torch.func.vmap(probe)(torch.zeros(2, 2))
    assert seen == [False]
    assert repeat.can_remember(tensors())


def test_disabled_forgets_and_remembers_nothing_until_its_end():
    repeat.remember("key", tensors(), launch)
    with pytest.raises(RuntimeError, match="inside"), repeat.disabled():
        assert repeat.find("key", tensors()) is None
        assert not repeat.can_remember(tensors())
        raise RuntimeError("inside")
    assert repeat.can_remember(tensors())


def test_observers_are_seen():
    assert internals.unobserved()
    with torch.profiler.profile():
        assert not internals.unobserved()

    class Functions(torch.overrides.TorchFunctionMode):
        pass

    with Functions():
        assert not internals.unobserved()
    assert internals.unobserved()
