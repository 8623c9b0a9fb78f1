"""Which devices are taken: what torch sees here, and nothing that it does not."""

import pytest
import torch

from fp8pack.errors import DeviceError
from fp8pack.gemm.device import find_device


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says where there is one GPU; nothing is run on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.parametrize("name", ["cpu", "cpu:0", "meta", torch.device("cpu", 1)])
def test_a_device_without_an_index_is_itself(name: str | torch.device) -> None:
    assert find_device(name) == torch.device(torch.device(name).type)


@pytest.mark.usefixtures("one_gpu")
def test_cuda_is_the_current_one() -> None:
    assert find_device("cuda") == find_device("cuda:0") == torch.device("cuda", 0)


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("name", ["cuda:1", "cuda:7", torch.device("cuda", 7)])
def test_an_index_beyond_the_last_is_said(name: str | torch.device) -> None:
    with pytest.raises(DeviceError, match=rf"^torch finds no device {name}; the last CUDA device is cuda:0$"):
        find_device(name)


@pytest.mark.parametrize("name", ["mps", "xpu", "xpu:3", "hpu", "xla", "mtia", "ipu", "privateuseone"])
def test_a_kind_that_is_not_here_is_said(name: str) -> None:
    kind = name.partition(":")[0]
    if kind in ("mps", "xpu") and getattr(torch, kind).is_available():
        pytest.skip(f"there is a device {kind}")
    with pytest.raises(DeviceError, match=f"^torch finds no {kind.upper()} device$") as raised:
        find_device(name)
    assert (raised.value.exit_code, raised.value.hint) == (1, "use device='cpu'")


@pytest.mark.parametrize("name", ["", "tpu", "CUDA", "cuda:", "cuda:-1", "cpu:x", "0", "cuda:0:1", "\n"])
def test_what_is_no_device_is_said(name: str) -> None:
    with pytest.raises(DeviceError, match="unknown device") as raised:
        find_device(name)
    assert "\n" not in str(raised.value)
