"""A configuration builds what is listed and nothing else; attacks are refused before an import."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from sana.run import allow
from sana.run.allow import check_name, check_nodes, check_object, forbidden_resolver, identity
from sana.run.build import build
from sana.run.compose import compose
from sana.run.error import ConfigError
from sana.run.groups import CONF
from sana.run.launch import launch
from sana.run.saved import load_saved
from sana.run.schema import check
from sana.run.signature import UnknownTargetError, library_table

ATTACKS = [
    # loads that run code
    "torch.load", "torch.serialization.load", "torch.serialization._load", "torch.jit.load", "torch.hub.load",
    "torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file", "torch.export.load",
    "torch.package.PackageImporter", "torch.utils.cpp_extension.load_inline", "torch.utils.cpp_extension.load",
    "torch.ops.load_library", "torch.classes.load_library", "torch.distributed.checkpoint.load", "numpy.load",
    "numpy.lib.format.read_array", "numpy.f2py.compile", "scipy.io.loadmat", "joblib.load", "pandas.read_pickle",
    "pickle.load", "pickle.loads", "_pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open", "yaml.load",
    "yaml.unsafe_load", "dill.loads", "cloudpickle.loads", "cloudpickle.load",
    "lightning.fabric.utilities.cloud_io._load", "lightning.LightningModule.load_from_checkpoint",
    "transformers.AutoModel.from_pretrained", "transformers.pipeline",
    "diffusers.DiffusionPipeline.from_pretrained", "safetensors.torch.load_file",
    # text that is run
    "builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__", "builtins.open",
    "builtins.getattr", "builtins.setattr", "builtins.globals", "eval", "exec", "code.interact", "timeit.timeit",
    "runpy.run_path", "runpy.run_module", "importlib.import_module", "importlib.reload",
    "importlib.util.spec_from_file_location", "imp.load_source", "pydoc.locate", "pkgutil.resolve_name",
    "hydra.utils.instantiate", "hydra.utils.get_method", "hydra.utils.get_object", "hydra._internal.utils._locate",
    "functools.partial", "functools.reduce", "operator.attrgetter", "operator.methodcaller", "types.FunctionType",
    "ctypes.CDLL", "cffi.FFI", "triton.compile", "sympy.sympify",
    # processes and files
    "os.system", "os.popen", "os.execv", "os.spawnl", "os.fork", "os.kill", "os.remove", "os.environ.get",
    "os.putenv", "posix.system", "nt.system", "subprocess.run", "subprocess.Popen", "subprocess.check_output",
    "subprocess.call", "multiprocessing.Process", "torch.multiprocessing.spawn", "pty.spawn", "commands.getoutput",
    "asyncio.create_subprocess_shell", "shutil.rmtree", "shutil.copyfile", "shutil.os.system",
    "pathlib.Path.write_text", "pathlib.Path.unlink", "tempfile.mktemp", "tarfile.open", "zipfile.ZipFile",
    "webbrowser.open", "logging.config.dictConfig", "logging.FileHandler", "urllib.request.urlopen",
    "urllib.request.urlretrieve", "http.server.test", "socket.socket", "requests.get", "smtplib.SMTP", "ftplib.FTP",
    "xmlrpc.server.SimpleXMLRPCServer", "webdataset.gopen.gopen", "webdataset.WebDataset", "fsspec.open",
    "wandb.init", "submitit.AutoExecutor",
    # what the listed modules re-export, and detours through them
    "lightning.os.system", "lightning.pytorch.trainer.trainer.os.system", "torch.os.system", "torch.sys.exit",
    "torch.nn.Linear.__init__.__globals__", "torch.nn.Linear.__class__", "torch.nn.modules.linear.Linear",
    "torch.optim.adamw.AdamW", "torch.optim.AdamW.__mro__", "torch.nn.Module.load_state_dict",
    "lightning.Trainer.fit", "lightning.pytorch.Trainer", "lightning.Trainer.save_checkpoint", "Torch.nn.Linear",
    "torch.nn.linear",
    "torch.nn. Linear", "torch.nn.Linear ", " torch.nn.Linear", "torch.nn..Linear", "torch.nn.Linear\n",
    "torch/nn/Linear",
    "torch.nn.Lіnear",  # a Cyrillic letter
    # the project's own, where it is not for configurations
    "sana.run.job.run_job", "sana.run.records.write_atomically", "sana.run.records.MetricsLog",
    "sana.run.launch.launch", "sana.run.build.build", "sana.run.job.subprocess.run", "sana.run.sweep.os.system",
    "sana.run.environment.subprocess.run", "sana.data.write_shards.os.remove", "sana.checkpoint.pickled.load",
    "sana.checkpoint.hub.fetch", "sana.doctor.main", "sana.bench.__main__.main", "sana.data.storage.open",
    "sana.network.sana.torch.load", "sana.network.sana.checkpoint", "sana.network.sana.Sana.load_state_dict",
    "sana.model.load.load_weights", "sana.encoder.text.gemma.os.system", "sana.optimizer.came._stack",
    "sana..network.sana.Sana", "sana", "sana.network", "sana.network.sana", "",
]  # fmt: skip


@pytest.fixture
def no_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, package: str | None = None) -> None:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(allow, "_import", refuse)


def test_the_table_is_long_enough() -> None:
    assert len(set(ATTACKS)) == len(ATTACKS) >= 40


@pytest.mark.parametrize("target", ATTACKS)
def test_attacks_are_refused_before_an_import(target: str, no_import: None) -> None:
    before = set(sys.modules)
    with pytest.raises(UnknownTargetError):
        check_name(target)
    with pytest.raises(ConfigError, match=r"^part: "):
        build(OmegaConf.create({"_target_": target, "x": 1}), "part")
    for nested in ({"a": [{"_target_": target}]}, {"_target_": "torch.nn.SiLU", "inplace": {"_target_": target}}):
        with pytest.raises(UnknownTargetError):
            check_nodes(nested)
    assert set(sys.modules) <= before, "nothing was imported"


COMPOSED = compose("train")
PLACES = ["network", "block.mixer", "callback.extra", "data.caption", "logger.extra", "trainer.precision", "strategy"]


@pytest.mark.parametrize("target", ["torch.load", "torch.hub.load", "os.system", "builtins.open", "numpy.load"])
def test_the_check_finds_them_wherever_they_stand(target: str, no_import: None) -> None:
    for place in PLACES:
        config = COMPOSED.config.copy()
        OmegaConf.set_struct(config, False)
        OmegaConf.update(config, place, {"_target_": target}, force_add=True)
        with pytest.raises(ConfigError, match=target):
            check(type(COMPOSED)("train", config, ()))


@pytest.mark.parametrize("value", [3, None, True, ["os.system"], {"a": 1}])
def test_a_target_is_a_text(value: object, no_import: None) -> None:
    with pytest.raises(UnknownTargetError):
        check_name(value)


@pytest.mark.parametrize(
    "text",
    ["${oc.decode:'{_target_: torch.load, f: x}'}", "${oc.create:{_target_:torch.load}}", "${oc.dict.values:run}",
     "x${oc.decode:1}", "${ oc.create : {a:1}}", "${oc.deprecated:seed}", "${oc.env:${oc.decode:HOME}}"],
)  # fmt: skip
def test_no_node_is_made_out_of_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert forbidden_resolver(text) is not None
    config = COMPOSED.config.copy()
    OmegaConf.set_struct(config, False)
    for key in ("seed", "block.mixer", "network.width"):
        changed = config.copy()
        OmegaConf.update(changed, key, text)
        with pytest.raises(ConfigError, match="may not be used"):
            check(type(COMPOSED)("train", changed, ()))


def test_what_an_interpolation_hides_is_found_when_it_is_built(no_import: None) -> None:
    config = OmegaConf.create(
        {"evil": {"_target_": "torch.load"}, "node": {"_target_": "torch.nn.SiLU", "a": "${evil}"}}
    )
    with pytest.raises(ConfigError, match=r"torch\.load"):
        build(config.node, "node")


@pytest.mark.parametrize("text", ["${seed}", "a ${oc.env:HOME} b", "${oc.select:a.b,null}", "plain: text", "${a}:${b}"])
def test_references_are_free(text: str) -> None:
    assert forbidden_resolver(text) is None


def test_what_recipes_name_is_allowed_and_is_what_it_says() -> None:
    names = {
        line.split("_target_:")[1].split("#")[0].split(",")[0].strip(" {}")
        for path in CONF.rglob("*.yaml")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "_target_:" in line
    }
    assert len(names) > 50
    for name in sorted(names | {"sana.data.bucket.by_area"} - {"sana.run.ray_launcher.RayLauncher"}):
        check_object(name)


def test_library_names_are_the_listed_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in library_table():
        if importlib.util.find_spec(name.split(".", 1)[0]) is not None:
            assert callable(check_object(name))
    import torch

    monkeypatch.setattr(torch.nn, "SiLU", torch.load)
    with pytest.raises(UnknownTargetError, match=r"torch.nn.SiLU is torch.serialization.load here, not torch"):
        check_object("torch.nn.SiLU")
    with pytest.raises(ConfigError, match=r"torch.serialization.load here"):
        build(OmegaConf.create({"_target_": "torch.nn.SiLU"}), "part")
    from sana.network import sana

    monkeypatch.setattr(sana, "Sana", eval)
    with pytest.raises(UnknownTargetError, match=r"builtins.eval here"):
        check_object("sana.network.sana.Sana")


def test_identities() -> None:
    import functools
    import os

    assert identity(eval) == "builtins.eval"
    assert identity(functools.partial(eval)) == "functools.partial"
    assert identity(Path) == "pathlib.Path"
    assert identity(os.system) == "posix.system"


def test_a_configuration_found_beside_a_checkpoint_builds_nothing_else(tmp_path: Path, no_import: None) -> None:
    values = COMPOSED.resolved
    for key, target in (("network", "torch.hub.load"), ("sampler", "sana.run.job.run_job"), ("objective", "os.system")):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**values, key: {"_target_": target}}), encoding="utf-8")
        with pytest.raises(ConfigError, match=target):
            load_saved(tmp_path)


def test_secrets_are_not_in_messages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")

    def task(composed: object) -> None:
        raise ConfigError("cannot log in with hunter2hunter2 at the hub")

    assert launch("train", task, []) == 2
    assert launch("train", task, ["trainer.max_steps=${oc.env:HF_TOKEN}x", "seed=${oc.env:HF_TOKEN}", "sede=1"]) == 2
    said = capsys.readouterr().err
    assert "hunter2" not in said
    assert "cannot log in with *** at the hub" in said
