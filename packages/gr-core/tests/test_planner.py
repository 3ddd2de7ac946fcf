"""The planner: what it chooses, why, and the properties that hold whatever is installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_core import EngineDescriptor, ExporterDescriptor, ModelDescriptor, Task
from gr_core.devices import Device, Machine
from gr_core.errors import ConfigurationError, PlanError
from gr_core.planner import Plan, export_path, load_profile, plan, save_profile
from gr_core.plugins.descriptors import Descriptor
from gr_core.plugins.registry import Registry

CPU = Machine((Device("cpu", "a CPU"),), no_cuda="no CUDA device: no driver")
GPU = Machine((Device("cpu", "a CPU"), Device("cuda:0", "a GPU")))
HSTU = ModelDescriptor(name="hstu", factory="a:b", tasks=(Task.RETRIEVE, Task.RANK))


def engine(name: str = "torch", **changes: Any) -> EngineDescriptor:
    values: dict[str, Any] = {
        "name": name,
        "factory": "a:b",
        "formats": ("torch",),
        "tasks": (Task.RETRIEVE, Task.RANK),
        "devices": ("cpu", "cuda"),
        "dtypes": ("float32", "bfloat16"),
    }
    return EngineDescriptor(**(values | changes))


def exporter(source: str, target: str, **changes: Any) -> ExporterDescriptor:
    values: dict[str, Any] = {
        "name": f"{source}-{target}",
        "factory": "a:b",
        "source": source,
        "target": target,
        "tasks": (Task.RETRIEVE, Task.RANK),
    }
    return ExporterDescriptor(**(values | changes))


TRT = engine("tensorrt", formats=("plan",), devices=("cuda",), priority=10)
ALL = (HSTU, engine(), TRT, exporter("torch", "onnx"), exporter("onnx", "plan"))


def planned(*descriptors: Descriptor, on: Machine = CPU, **asked: Any) -> Plan:
    return plan(Registry.of(*descriptors), "hstu", Task.RANK, on=on, **asked)


def test_a_way_of_exporting_serves_a_task_of_the_model() -> None:
    generates = ModelDescriptor(name="sid", factory="a:b", tasks=(Task.GENERATE,))
    registry = Registry.of(generates, *ALL)
    assert [step.name for step in export_path(registry, "hstu", "plan")[1]] == [
        "torch-onnx",
        "onnx-plan",
    ]
    with pytest.raises(PlanError, match="no exporter makes onnx of sid \\(torch\\) for generate"):
        export_path(registry, "sid", "onnx")


def test_an_engine_computes_in_other_dtypes_on_another_device() -> None:
    here = engine(device_dtypes={"cuda": ("float16",)})
    assert planned(HSTU, here).dtype == "float32"
    on_gpu = planned(HSTU, here, on=GPU)
    assert (on_gpu.device, on_gpu.dtype) == ("cuda", "float16")
    with pytest.raises(PlanError, match="it cannot compute in float16, only in float32, bfloat16"):
        planned(HSTU, here, dtype="float16")


def test_the_only_chain() -> None:
    chosen = planned(HSTU, engine(devices=("cpu",)))
    assert chosen.summary() == ("hstu → torch (cpu, float32): highest priority of 1 feasible chain")


def test_priority_and_exports() -> None:
    chosen = planned(*ALL, on=GPU)
    assert chosen.summary() == (
        "hstu → torch-onnx → onnx-plan → tensorrt (cuda, float32): "
        "highest priority of 3 feasible chains"
    )
    assert [c.verdict for c in chosen.considered[1:]] == ["priority 0 is lower than 10"] * 2


def test_the_fallback_says_why() -> None:
    chosen = planned(*ALL, on=CPU)
    assert (chosen.engine.name, chosen.device) == ("torch", "cpu")
    assert chosen.reason.endswith("not tensorrt: no CUDA device: no driver")
    assert len(chosen.considered) == 3


def test_an_accelerator_comes_before_the_cpu() -> None:
    assert planned(HSTU, engine(), on=GPU).device == "cuda"


def test_an_explicit_choice_is_honoured() -> None:
    chosen = planned(*ALL, on=GPU, strategy="baseline", device="cpu", dtype="bfloat16")
    assert (chosen.engine.name, chosen.device, chosen.dtype) == ("torch", "cpu", "bfloat16")
    assert "asked for (strategy=baseline, device=cpu, dtype=bfloat16)" in chosen.reason
    assert planned(*ALL, on=GPU, device="cuda:0").device == "cuda:0"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (
            {"strategy": "tensorrt"},
            ["tensorrt (cuda, float32): no CUDA device", "Possible instead: torch (cpu, float32)"],
        ),
        ({"strategy": "tensort"}, ["no engine of this name", "Did you mean 'tensorrt'?"]),
        ({"device": "cuda"}, ["no CUDA device", "Possible instead: torch (cpu, float32)"]),
        ({"dtype": "int8"}, ["only in float32, bfloat16"]),
    ],
)
def test_an_explicit_choice_that_cannot_be_had(
    asked: dict[str, str], expected: Sequence[str]
) -> None:
    with pytest.raises(PlanError) as caught:
        planned(*ALL, **asked)
    for part in expected:
        assert part in str(caught.value)


def test_a_device_beyond_those_of_the_machine() -> None:
    with pytest.raises(PlanError, match="there is no cuda:3, only cpu, cuda:0"):
        planned(*ALL, on=GPU, device="cuda:3")


def test_probes_decide() -> None:
    unusable = replace(TRT, probe=lambda: (False, "libnvinfer is missing"))
    assert "libnvinfer is missing" in planned(HSTU, engine(), unusable, *ALL[3:], on=GPU).reason
    cpu_build = engine(device_probe=lambda device: (device == "cpu", "built without CUDA"))
    chosen = planned(HSTU, cpu_build, on=GPU)
    assert chosen.device == "cpu"
    assert "built without CUDA" in chosen.considered[0].verdict
    no_exporter = replace(ALL[3], probe=lambda: (False, "onnx is missing"))
    assert "onnx is missing" in planned(HSTU, engine(), TRT, no_exporter, ALL[4], on=GPU).reason


def test_an_exporter_that_must_be_asked_for() -> None:
    shy = exporter("torch", "plan", automatic=False)
    assert planned(HSTU, engine(), TRT, shy, on=GPU).engine.name == "torch"
    assert planned(HSTU, engine(), TRT, shy, on=GPU, strategy="tensorrt").exporters == (shy,)


def test_an_engine_that_failed_to_load_is_left_out() -> None:
    chosen = planned(*ALL, on=GPU, failed={"tensorrt": "failed to load: out of memory"})
    assert chosen.engine.name == "torch"
    assert "not tensorrt: failed to load: out of memory" in chosen.reason


def test_measured_engines_come_first_and_the_quickest_of_them() -> None:
    chosen = planned(*ALL, on=GPU, profile={"torch": 0.002})
    assert chosen.engine.name == "torch"
    assert "2 ms on this machine" in chosen.reason
    chosen = planned(*ALL, on=GPU, profile={"torch": 0.002, "tensorrt": 0.001})
    assert chosen.engine.name == "tensorrt"
    assert any(c.verdict == "2 ms; tensorrt takes 1 ms" for c in chosen.considered)


def test_an_unknown_architecture_or_task() -> None:
    with pytest.raises(PlanError, match=r"'hstu' cannot be used.*Usable models: hst\."):
        planned(replace(HSTU, name="hst"), engine())
    with pytest.raises(PlanError, match="cannot generate; it can retrieve, rank"):
        plan(Registry.of(HSTU, engine()), "hstu", Task.GENERATE, on=CPU)


def test_no_engine_names_the_plugins_that_failed() -> None:
    registry = Registry(Registry.of(HSTU).offers, {"hstu": "could not be imported: torch"})
    with pytest.raises(PlanError, match="Plugins that failed: hstu: could not be imported: torch"):
        plan(registry, "hstu", Task.RANK, on=CPU)


def test_a_profile_is_kept_and_merged(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "profile.json"
    assert load_profile(file) == {}
    save_profile(file, {"hstu/rank": {"torch": 0.5, "vllm": 0.1}})
    save_profile(file, {"hstu/rank": {"torch": 0.25}, "mtgr/rank": {"torch": 1.0}})
    assert load_profile(file) == {
        "hstu/rank": {"torch": 0.25, "vllm": 0.1},
        "mtgr/rank": {"torch": 1.0},
    }
    file.write_text('{"seconds": {"hstu/rank": {"torch": "fast"}}}')
    with pytest.raises(ConfigurationError, match="is not a measured profile"):
        load_profile(file)


# ── Properties ────────────────────────────────────────────────────────────────────────────────

_formats = st.sampled_from(["torch", "torch", "onnx", "plan"])
_usable = st.sampled_from([None, None, lambda: (True, ""), lambda: (False, "unusable")])
_tasks = st.sampled_from([(Task.RANK,), (Task.RANK,), (Task.RETRIEVE,), (Task.RETRIEVE, Task.RANK)])
_architectures = st.sampled_from([(), (), ("hstu",), ("mtgr",)])


def _subset(*values: str) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(values), min_size=1, unique=True).map(tuple)


_engines = st.lists(
    st.builds(
        engine,
        st.sampled_from(["torch", "e1", "e2", "e3", "e4"]),
        formats=st.lists(_formats, min_size=1, max_size=2, unique=True).map(tuple),
        tasks=_tasks,
        devices=_subset("cpu", "cuda"),
        dtypes=_subset("float32", "bfloat16"),
        priority=st.integers(-1, 2),
        architectures=_architectures,
        probe=_usable,
    ),
    min_size=2,
    max_size=5,
    unique_by=lambda e: e.name,
)
_exporters = st.lists(
    st.builds(
        exporter,
        _formats,
        _formats,
        tasks=_tasks,
        automatic=st.booleans(),
        architectures=_architectures,
        probe=_usable,
    ),
    max_size=5,
    unique_by=lambda e: e.name,
)
_machines = st.sampled_from([CPU, GPU])
_asked = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(["auto", "auto", "auto", "baseline", "e1"]),
        "device": st.sampled_from(["auto", "auto", "auto", "cpu", "cuda"]),
        "dtype": st.sampled_from(["auto", "auto", "auto", "float32", "bfloat16"]),
    }
)
_profiles = st.dictionaries(st.sampled_from(["torch", "e1", "e2"]), st.floats(0.001, 1))


def _choice(descriptors: Sequence[Descriptor], **options: Any) -> Any:
    try:
        chosen = planned(HSTU, *descriptors, **options)
    except PlanError:
        return None
    return chosen.engine, chosen.exporters, chosen.device, chosen.dtype


def _ok(descriptor: Descriptor) -> bool:
    return descriptor.probe is None or descriptor.probe()[0]


@given(_engines, _exporters, _machines, _asked, _profiles)
def test_the_choice_is_feasible_and_what_was_asked_for(engines, exporters, on, asked, profile):  # type: ignore[no-untyped-def]
    chosen = _choice([*engines, *exporters], on=on, profile=profile, **asked)
    if chosen is None:
        return
    engine_, chain, device, dtype = chosen
    format_ = "torch"
    for step in chain:
        assert step.source == format_
        format_ = step.target
        assert step.automatic or asked["strategy"] != "auto"
    assert format_ in engine_.formats
    for step in (*chain, engine_):
        assert _ok(step)
        assert Task.RANK in step.tasks
        assert not step.architectures or "hstu" in step.architectures
    assert device in engine_.devices
    assert dtype in engine_.dtypes
    assert device == "cpu" or on is GPU
    wanted = {"baseline": "torch"}.get(asked["strategy"], asked["strategy"])
    assert wanted in ("auto", engine_.name)
    assert asked["device"] in ("auto", device)
    assert asked["dtype"] in ("auto", dtype)


@given(_engines, _machines)
def test_without_exporters_there_is_a_plan_exactly_if_an_engine_fits(engines, on):  # type: ignore[no-untyped-def]
    fits = [
        e
        for e in engines
        if _ok(e)
        and "torch" in e.formats
        and Task.RANK in e.tasks
        and (not e.architectures or "hstu" in e.architectures)
        and ("cpu" in e.devices or on is GPU)
    ]
    chosen = _choice(engines, on=on)
    assert (chosen is not None) == bool(fits)
    if fits:
        assert chosen[0].priority == max(e.priority for e in fits)


@given(_engines, _exporters, _machines, _asked, _profiles, st.randoms(use_true_random=False))
def test_the_order_of_registration_never_matters(engines, exporters, on, asked, profile, random):  # type: ignore[no-untyped-def]
    descriptors = [*engines, *exporters]
    shuffled = list(descriptors)
    random.shuffle(shuffled)
    assert _choice(descriptors, on=on, profile=profile, **asked) == _choice(
        shuffled, on=on, profile=profile, **asked
    )


@given(_engines, _exporters, _machines, _asked, st.data())
def test_something_unusable_never_changes_the_choice(engines, exporters, on, asked, data):  # type: ignore[no-untyped-def]
    before = _choice([*engines, *exporters], on=on, **asked)
    engine_ = engine(
        "new", priority=99, formats=(data.draw(_formats),), probe=lambda: (False, "unusable")
    )
    exporter_ = exporter(
        data.draw(_formats), data.draw(_formats), name="new", probe=lambda: (False, "unusable")
    )
    assert _choice([*engines, *exporters, engine_, exporter_], on=on, **asked) == before
