"""The pure parts of benchmarks.propagation: layer tables, bandwidths, the clock and the rows."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _load(name: str) -> ModuleType:
    """Loads a file by itself: with the checkout on the path, `tf_syncdist` would mean that one."""
    spec = importlib.util.spec_from_file_location(name, _BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = _load("propagation_models")
rows = _load("propagation_rows")
clocks = _load("propagation_clock")


def _tensors(model: object) -> int:
    return sum(len(layer.shapes) for layer in model.layers)


def _shares(model: object) -> dict[str, float]:
    return {layer.name: layer.parameters / model.parameters for layer in model.layers}


def test_vgg19_has_the_parameters_and_the_work_of_the_paper() -> None:
    model = models.vgg19()
    assert model.parameters == 143_667_240
    assert [layer.name[:2] for layer in model.layers] == ["co"] * 16 + ["fc"] * 3
    assert _tensors(model) == 38
    assert _shares(model)["fc1"] == pytest.approx(0.715, abs=0.001)
    assert sum(layer.flops for layer in model.layers) == pytest.approx(19.6e9, rel=0.01)


def test_resnet50_has_the_parameters_and_the_work_of_the_paper() -> None:
    model = models.resnet50()
    assert model.parameters == 25_557_032
    assert len(model.layers) == 54
    assert _tensors(model) == 161
    assert sum(layer.flops for layer in model.layers) == pytest.approx(4.09e9, rel=0.01)


@pytest.mark.parametrize("name", ["vgg19", "resnet50"])
def test_a_scaled_model_keeps_the_shares_of_its_layers(name: str) -> None:
    whole, scaled = getattr(models, name)(), models.MODELS[name]()
    assert 5e6 < scaled.parameters < 15e6
    assert [layer.name for layer in scaled.layers] == [layer.name for layer in whole.layers]
    assert [layer.flops for layer in scaled.layers] == [layer.flops for layer in whole.layers]
    shares = _shares(scaled)
    assert all(shares[n] == pytest.approx(share, abs=0.002) for n, share in _shares(whole).items())


@pytest.mark.parametrize("name", ["vgg19", "resnet50"])
def test_a_step_is_divided_into_a_third_forward_and_two_thirds_backward(name: str) -> None:
    model = models.MODELS[name]()
    seconds = model.compute_seconds(0.9)
    assert len(seconds) == len(model.layers)
    assert sum(forward for forward, _ in seconds) == pytest.approx(0.3)
    assert sum(backward for _, backward in seconds) == pytest.approx(0.6)


def test_a_bandwidth_follows_from_the_ratio_of_exchange_to_computing() -> None:
    model = models.vgg19()
    gbps = model.gbps(0.5, 2.0)
    assert gbps == pytest.approx(143_667_240 * 32 / 1e9)
    assert model.exchange_seconds(gbps) == pytest.approx(1.0)
    assert model.gbps(0.0, 2.0) == 0.0
    assert model.exchange_seconds(0.0) == 0.0


class _Time:
    """A clock on which waking up takes a while."""

    def __init__(self, overhead: float) -> None:
        self.now = 100.0
        self._overhead = overhead

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self._overhead


def test_errors_of_short_sleeps_do_not_add_up() -> None:
    time = _Time(overhead=0.0005)
    clock = clocks.Clock(lambda: time.now, time.sleep)
    for number in range(1000):
        clock.work(0.001, is_first=number == 0, is_last=number == 999)
    ((begin, end),) = clock.spans
    assert end - begin == pytest.approx(1.0005)


def test_a_layer_that_had_to_wait_begins_when_it_can() -> None:
    time = _Time(overhead=0.0)
    clock = clocks.Clock(lambda: time.now, time.sleep)
    clock.work(0.1, is_first=True)
    time.now += 0.05
    clock.work(0.1, is_last=True)
    assert clock.spans == [(100.0, pytest.approx(100.25))]


def test_cases_have_fewer_steps_while_the_run_is_late() -> None:
    time = _Time(overhead=0.0)
    schedule = clocks.Schedule(4, 7, 40.0, lambda: time.now)
    steps = []
    for seconds in (9.0, 12.0, 3.0, 0.0):
        time.sleep(seconds)
        steps.append(schedule.next_steps())
    assert steps == [7, 3, 7, 7]
    assert clocks.Schedule(4, 7, 0.0, lambda: time.now).next_steps() == 7


def test_rows_are_compared_with_those_of_the_same_model_and_bandwidth() -> None:
    def row(model: str, mode: str, gbps: float, step: float) -> dict:
        return {"model": model, "mode": mode, "gbps": gbps, "step_seconds": step}

    measured = [
        row("vgg19", "no_overlap", 0.5, 2.0),
        row("vgg19", "fifo", 0.5, 1.5),
        row("vgg19", "priority", 0.5, 1.0),
        row("vgg19", "priority", 0.0, 1.0),
        row("resnet50", "priority", 0.5, 1.0),
    ]
    found = rows.with_speedups(measured)
    assert [r["speedup_over_fifo"] for r in found] == [0.75, 1.0, 1.5, None, None]
    assert [r["speedup_over_no_overlap"] for r in found] == [
        1.0,
        pytest.approx(4 / 3),
        2.0,
        None,
        None,
    ]
    assert "speedup_over_fifo" not in measured[0]
    head, *lines = rows.table(found).splitlines()
    assert head.split()[:3] == ["model", "mode", "slice"]
    assert "no limit" in lines[3] and "1.333" in lines[1]
    assert len(lines) == len(measured)
