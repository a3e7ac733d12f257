"""The doctor finds what is wrong with a machine, says what to do, and never shows a token."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sana import doctor
from sana.doctor import Finding, examine, main

ROOT = Path(__file__).resolve().parents[2]


def levels(findings: list[Finding], subject: str) -> list[str]:
    return [f.level for f in findings if f.subject == subject]


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: versions.get(name, real(name)))


def test_this_machine_can_run_the_tests() -> None:
    found = examine()
    assert not [f for f in found if f.level == "FAIL"]
    named = {f.subject for f in found}
    assert {"python", "torch", "lightning", "hydra-core", "torchvision", "gpu", "processor", "memory", "disk"} <= named
    assert {"compiler", "gemma", "triton", "torchao"} <= named


def test_every_dependency_is_looked_at() -> None:
    wanted = {r.name for r in doctor.requirements() if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert {"torch", "lightning", "transformers", "webdataset"} <= wanted
    assert wanted <= {f.subject for f in doctor.check_packages()}


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_the_compromised_versions_of_lightning(version: str, monkeypatch, capsys) -> None:
    pretend(monkeypatch, lightning=version)
    (finding,) = [f for f in doctor.check_packages() if f.subject == "lightning"]
    assert finding.level == "FAIL"
    assert "malicious" in finding.text
    assert main([]) == 1
    assert "FAIL  lightning" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["2.10.0", "1.13.1+cu117"])
def test_a_package_out_of_range(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch=version)
    (finding,) = [f for f in doctor.check_packages() if f.subject == "torch"]
    assert finding.level == "FAIL"
    assert "make setup" in finding.text


def test_newer_and_local_versions_are_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="2.99.0+cu140")
    assert levels(list(doctor.check_packages()), "torch") == ["OK"]


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "webdataset" else real(name))
    assert levels(list(doctor.check_packages()), "webdataset") == ["FAIL"]


def test_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["numpy", "torch==2.14.0"])
    pretend(monkeypatch, torch="2.15.0", torchvision="0.29.0")
    (finding,) = doctor.check_torchvision()
    assert finding.level == "FAIL"
    assert "torch==2.14.0" in finding.text
    pretend(monkeypatch, torch="2.14.0", torchvision="0.29.0")
    assert levels(list(doctor.check_torchvision()), "torchvision") == ["OK"]
    pretend(monkeypatch, torch="2.14.0+cu130", torchvision="0.29.0+cpu")
    assert levels(list(doctor.check_torchvision()), "torchvision") == ["FAIL"]


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    card = {"name": "T4", "memory.total": "15360 MiB", "driver_version": "535.1", "compute_cap": "7.5"}
    monkeypatch.setattr(doctor, "gpus", lambda: [card])
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = doctor.check_gpu()
    assert finding.level == "FAIL"
    assert "without CUDA" in finding.text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = doctor.check_gpu()
    assert finding.level == "FAIL"
    assert "driver" in finding.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert levels(list(doctor.check_gpu()), "gpu") == ["OK", "WARN"], "no bf16 before compute capability 8"
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    assert levels(list(doctor.check_triton()), "triton") == ["WARN"]


def test_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory_gib", lambda: 3.9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**29})())
    found = list(doctor.check_room())
    assert levels(found, "memory") == ["WARN"]
    assert levels(found, "disk") == ["FAIL"]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (finding,) = doctor.check_compiler()
    assert finding.level == "WARN"
    assert "model.compile" in finding.text


def test_gemma_and_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (finding,) = doctor.check_weights()
    assert finding.level == "WARN"
    assert "set HF_TOKEN" in finding.text
    monkeypatch.setenv("HF_TOKEN", "hf_hunter2")
    main([])
    output = capsys.readouterr().out
    assert "fetched at first use with HF_TOKEN" in output
    assert "hunter2" not in output
    snapshot = tmp_path / "hub" / "models--google--gemma-2-2b-it" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model-00001-of-00002.safetensors").write_text("")
    assert levels(list(doctor.check_weights()), "gemma") == ["OK"]


def test_a_check_that_breaks_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_something():
        raise OSError("no\nsuch thing")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (check_something,))
    assert examine() == [Finding("WARN", "something", "OSError: no such thing")]


def test_the_command_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom sana.doctor import main\ncode = main(['--quiet'])\n"
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)\nsys.exit(code)"
    )
    environment = {**os.environ, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    if "gpu" not in done.stdout:
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith("0 failures")
