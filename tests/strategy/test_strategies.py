"""One, two, three and four processes, replicated, sharded and hybrid: the same losses, and each other's checkpoints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import run

from sana.checkpoint.run_file import read_run_file
from sana.checkpoint.run_folder import read_state

pytestmark = [pytest.mark.slow, pytest.mark.long]
HERE = Path(__file__).resolve().parent
STEPS = 50
HALF = STEPS // 2


def on_ranks(world: int, folder: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run jobs one after the other in the same processes; the results of rank 0."""
    for k, job in enumerate(jobs):
        job.setdefault("out", str(folder / f"{world}_{k}_{job['strategy']}"))
    plan = folder / f"jobs{world}.json"
    plan.write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "recipes.py"), str(plan)],
            env={**os.environ, **common, "LOCAL_RANK": str(rank), "PYTHONPATH": str(HERE.parents[1])},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(said)
    return [torch.load(Path(job["out"]) / "result.pt", weights_only=True) for job in jobs]


def halfway(folder: Path, job: int, strategy: str) -> str:
    return str(folder / f"2_{job}_{strategy}" / "checkpoints" / f"step_{HALF:08d}.ckpt")


def close(a: Any, b: Any, tolerance: float) -> None:
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, Any]:
    return run(str(folder / "single"), "single", STEPS)


@pytest.fixture(scope="module")
def two(folder: Path, single: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What two processes make of everything."""
    checkpoint = str(folder / "single" / "checkpoints" / f"step_{STEPS:08d}.ckpt")
    jobs = {
        "ddp": {"strategy": "ddp", "steps": STEPS, "every": HALF},
        "fsdp": {"strategy": "fsdp", "steps": STEPS, "every": HALF},
        "ddp again": {"strategy": "ddp", "steps": STEPS, "resume": halfway(folder, 0, "ddp")},
        "fsdp again": {"strategy": "fsdp", "steps": STEPS, "resume": halfway(folder, 1, "fsdp")},
        "micro": {"strategy": "fsdp", "steps": 4, "micro": 2},
        "offload": {"strategy": "offload", "steps": 4},
        "low": {"strategy": "low", "steps": 4, "precision": "bf16-mixed"},
        "mixed": {"strategy": "ddp", "steps": 4, "precision": "bf16-mixed"},
        "from one": {"strategy": "fsdp", "steps": STEPS + 2, "resume": checkpoint},
        "two optimizers, ddp": {"strategy": "ddp", "steps": 10, "kind": "adversarial"},
        "two optimizers, fsdp": {"strategy": "fsdp", "steps": 10, "kind": "adversarial"},
        "rates": {"strategy": "fsdp", "steps": 12, "rate": 4.0, "every": 6},
        "poison": {"strategy": "ddp", "steps": 5, "poison": 31},
        "poison, fsdp": {"strategy": "fsdp", "steps": 5, "poison": 31},
        "poison skipped": {"strategy": "fsdp", "steps": 5, "poison": 31, "non_finite": "skip"},
    }
    return dict(zip(jobs, on_ranks(2, folder, list(jobs.values())), strict=True))


def test_the_same_losses_under_every_strategy(single: dict[str, Any], two: dict[str, dict[str, Any]]) -> None:
    assert len(single["losses"]) == STEPS
    assert single["losses"][-1] != single["losses"][0]
    for name in ("ddp", "fsdp"):
        close(two[name]["losses"], single["losses"], 1e-5)
        assert two[name]["samples_seen"] == single["samples_seen"]
        for key, value in single["average"].items():
            torch.testing.assert_close(two[name]["average"][key], value, rtol=0, atol=1e-4)
    for name in ("micro", "offload"):
        close(two[name]["losses"], single["losses"][:4], 1e-5)
    close(two["low"]["losses"], two["mixed"]["losses"], 2e-2)


def test_a_resumed_run_is_the_straight_one_bit_for_bit(two: dict[str, dict[str, Any]]) -> None:
    for name in ("ddp", "fsdp"):
        straight, again = two[name], two[f"{name} again"]
        assert again["losses"] == straight["losses"][HALF:]
        for part in ("whole", "average"):
            for key, value in straight[part].items():
                assert torch.equal(again[part][key], value), (name, part, key)


def test_groups_of_other_rates_are_sharded_and_resumed(
    folder: Path, single: dict[str, Any], two: dict[str, dict[str, Any]]
) -> None:
    one = run(str(folder / "rates"), "single", 12, rate=4.0)
    close(two["rates"]["losses"], one["losses"], 1e-5)
    assert one["losses"][0] == single["losses"][0]
    assert abs(one["losses"][-1] - single["losses"][11]) > 1e-4
    halfway = folder / "2_11_fsdp" / "checkpoints" / "step_00000006.ckpt"
    again = on_ranks(2, folder / "rates", [{"strategy": "fsdp", "steps": 12, "rate": 4.0, "resume": str(halfway)}])[0]
    assert again["losses"] == two["rates"]["losses"][6:]
    for key, value in two["rates"]["whole"].items():
        assert torch.equal(again["whole"][key], value), key


def test_every_public_method_gathers_what_it_needs(single: dict[str, Any], two: dict[str, dict[str, Any]]) -> None:
    for name in ("ddp", "fsdp"):
        for output in two[name]["outputs"]:
            torch.testing.assert_close(output, single["outputs"][0], rtol=0, atol=1e-4)


def test_any_checkpoint_goes_into_any_number_of_processes(
    folder: Path, single: dict[str, Any], two: dict[str, dict[str, Any]]
) -> None:
    place = folder / "2_1_fsdp" / "checkpoints" / f"step_{STEPS:08d}.ckpt"
    assert read_state(place)["world_size"] == 2
    jobs = [
        {"strategy": "fsdp", "steps": STEPS, "resume": str(place)},
        {"strategy": "ddp", "steps": STEPS + 2, "resume": str(place)},
    ]
    three = on_ranks(3, folder, jobs)
    one = run(str(folder / "one"), "single", STEPS + 2, resume=str(place))
    for key, value in two["fsdp"]["whole"].items():
        assert torch.equal(three[0]["whole"][key], value), key
    for key, value in two["fsdp"]["average"].items():
        assert torch.equal(three[0]["average"][key], value), key
    torch.testing.assert_close(three[0]["outputs"][0], two["fsdp"]["outputs"][0], rtol=0, atol=1e-6)
    close(three[1]["losses"], one["losses"], 1e-5)
    close(two["from one"]["losses"], one["losses"], 1e-5)
    # ... and into one file, with no process group
    tensors, used, updates = read_run_file(place)
    assert (used, updates) == ("ema", STEPS)
    for key, value in two["fsdp"]["average"].items():
        assert torch.equal(tensors[key], value), key


def test_two_optimizers_under_each(folder: Path, two: dict[str, dict[str, Any]]) -> None:
    alone = run(str(folder / "alone"), "single", 10, "adversarial")
    for name in ("two optimizers, ddp", "two optimizers, fsdp"):
        assert two[name]["updates"] == {"generator": 10, "discriminator": 10}
        close(two[name]["losses"], alone["losses"], 1e-5)
        for key, value in alone["whole"].items():
            torch.testing.assert_close(two[name]["whole"][key], value, rtol=0, atol=1e-4)


def test_all_ranks_stop_or_skip_together(single: dict[str, Any], two: dict[str, dict[str, Any]]) -> None:
    """Sample 31 is of update 2 and of the second rank of two."""
    for name in ("poison", "poison, fsdp"):
        error = two[name]["error"]
        assert "NonFiniteError: loss is not finite at update 2 of network; samples s31; t 0." in error
        assert "first bad layer network.patch_embed" in error
        assert "by its input" in error
        assert "_rank1.pt" in error
        close(two[name]["losses"], single["losses"][:2], 1e-5)
    skipped = two["poison skipped"]
    assert skipped["updates"] == {"network": 5}
    assert skipped["skipped"] == {"network": 1}
    assert skipped["samples_seen"] == 72
    assert not skipped["error"]


def test_hybrid_over_two_times_two(folder: Path, single: dict[str, Any]) -> None:
    hybrid, resumed = on_ranks(
        4, folder,
        [{"strategy": "hsdp", "steps": 4},
         {"strategy": "hsdp", "steps": STEPS + 2,
          "resume": str(folder / "single" / "checkpoints" / f"step_{STEPS:08d}.ckpt")}],
    )  # fmt: skip
    close(hybrid["losses"], single["losses"][:4], 1e-5)
    assert len(resumed["losses"]) == 2
    names = {p.name for p in (folder / "4_0_hsdp" / "checkpoints" / "step_00000004.ckpt").glob("model.*")}
    assert names == {"model.00000.safetensors", "model.00001.safetensors"}  # the first replica alone


def test_a_few_step_student_under_each(folder: Path) -> None:
    """Forward derivatives through sharded weights, two updates in turns, and going on in the middle of a turn."""
    alone = run(str(folder / "sprint"), "single", 6, "sprint")
    place = "checkpoints/step_00000003.ckpt"
    jobs = [
        {"strategy": "ddp", "steps": 6, "kind": "sprint", "out": str(folder / "sprint_ddp"), "every": 3},
        {"strategy": "fsdp", "steps": 6, "kind": "sprint", "out": str(folder / "sprint_fsdp"), "every": 3},
        {"strategy": "fsdp", "steps": 6, "kind": "sprint", "resume": str(folder / "sprint_fsdp" / place)},
    ]
    *both, again = on_ranks(2, folder, jobs)
    assert len(alone["losses"]) == 11
    for found in both:
        assert found["updates"] == {"network": 6, "uncertainty": 6, "discriminator": 5}
        assert found["samples_seen"] == alone["samples_seen"]
        close(found["losses"], alone["losses"], 1e-4)
        for part in ("whole", "average"):
            for key, value in alone[part].items():
                torch.testing.assert_close(found[part][key], value, rtol=0, atol=1e-4)
    assert again["losses"] == both[1]["losses"][5:]
    for key, value in both[1]["whole"].items():
        assert torch.equal(again["whole"][key], value), key
