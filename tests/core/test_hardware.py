"""Known devices by the names that drivers report, and none guessed."""

import pytest

from franca.core.hardware import TABLE, find


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 120GB", "GH200 120GB"),
        ("nvidia geforce rtx 4090", "RTX 4090"),
        ("Tesla V100-SXM2-32GB", "V100-SXM2-32GB"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_known_device_is_found_by_the_name_its_driver_reports(reported, name):
    assert find(reported).name == name


@pytest.mark.parametrize("reported", ["", "cpu", "NVIDIA A100", "NVIDIA H100", "NVIDIA GeForce GTX 1080"])
def test_an_unknown_device_stays_unknown(reported):
    assert find(reported) is None


def test_the_longest_name_wins():
    longer = [(one, other) for one in TABLE for other in TABLE if one is not other and other.name in one.name]
    assert all(find(f"NVIDIA {one.name}") is one for one, _ in longer)
    assert all(find(device.name) is device for device in TABLE)


def test_the_figures_agree_with_each_other():
    for device in TABLE:
        assert 16e9 <= device.memory_bytes <= 300e9
        assert 0.5e12 <= device.bandwidth_bytes_s <= 10e12
        assert 200 <= device.power_w <= 1500
        assert device.bf16_flops is None or 100e12 <= device.bf16_flops <= 3000e12
        if device.fp8_flops is not None:
            assert device.fp8_flops == pytest.approx(2 * device.bf16_flops, rel=0.03)
    assert len({device.name for device in TABLE}) == len(TABLE)
