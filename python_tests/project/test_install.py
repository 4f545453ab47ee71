"""Installation: each fault ends in one sentence that says what to do, before anything is compiled."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import fusedkv_ext
from fusedkv_ext.cli.main import main
from fusedkv_ext.ops import native

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "build_support"
VERSION = fusedkv_ext.__version__
DEFAULT = ("80-real", "90a-real", "100-real", "120-real", "90-virtual")
CUDA_TORCH = ("/torch", "2.13.0+cu128", "12.8")
VARIABLES = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "FUSEDKV_CUDA", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH")
CLEAN = {name: value for name, value in os.environ.items() if name not in VARIABLES}


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """build_support/native_config.py, on a machine without /usr/local/cuda."""
    spec = importlib.util.spec_from_file_location("native_config", SUPPORT / "native_config.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "native_config", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEFAULT_TOOLKIT", str(tmp_path / "default"))
    return module


def toolkit(folder: Path, release: str = "12.8") -> Path:
    """A folder with a bin/nvcc that answers what a build asks."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    archs = "compute_80 compute_90" + (" compute_100 compute_120" if release >= "12.8" else "")
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Cuda tools, release {release}, V{release}.93"\n'
        f'[ "$1" = --list-gpu-arch ] && printf "%s\\n" {archs}\nexit 0\n'
    )
    nvcc.chmod(0o755)
    return folder


def sentence(text: str) -> str:
    """The text, which must be one line and one sentence."""
    text = text.strip()
    assert "\n" not in text and text.endswith("."), text
    return text


# TORCH_CUDA_ARCH_LIST


@pytest.mark.parametrize(
    ("text", "architectures"),
    [
        ("", DEFAULT),
        (" ; ", DEFAULT),
        ("8.0", ("80-real",)),
        ("8.0;9.0a+PTX", ("80-real", "90a")),
        ("8.0 8.6, 9.0 ;10.0f;", ("80-real", "86-real", "90-real", "100f-real")),
        ("80;90a", ("80-real", "90a-real")),
        ("Hopper", ("90",)),
        ("Ampere+Tegra", ("87-real",)),
        ("Ampere;8.0;Ada", ("80-real", "86", "89")),
    ],
)
def test_architectures_are_read_as_torch_writes_them(
    config: ModuleType, text: str, architectures: tuple[str, ...]
) -> None:
    assert config.parse_architectures(text) == architectures


def test_every_name_of_torch_means_what_it_means_there(
    config: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setattr(config, "MIN_MAJOR", 0)
    source = inspect.getsource(cpp_extension._get_cuda_arch_flags)
    names = re.findall(r"\('([A-Z][a-z]+(?:\+[A-Z][a-z]+)?)', '\d", source)
    assert names == list(config.NAMED_ARCHITECTURES)
    for name in names:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", name)
        flags = {flag.rsplit("code=", 1)[1] for flag in cpp_extension._get_cuda_arch_flags()}
        assert set(config.code_names(config.parse_architectures(name))) == flags


@pytest.mark.parametrize("text", ["7.5", "8.0;7.0+PTX", "Turing", "Volta+Tegra", "Kepler", "75"])
def test_architectures_below_8_are_refused(config: ModuleType, text: str) -> None:
    with pytest.raises(config.ConfigError, match=r"TORCH_CUDA_ARCH_LIST .* 8\.0 .*leave it out") as error:
        config.parse_architectures(text)
    sentence(str(error.value))


@pytest.mark.parametrize("text", ["hoper", "9", "9.0b", "sm_90", "9.0+ptx", "-9.0", "9.0;native9"])
def test_unreadable_architectures_are_refused(config: ModuleType, text: str) -> None:
    with pytest.raises(config.ConfigError, match="TORCH_CUDA_ARCH_LIST must hold .*native.*Hopper.*got"):
        config.parse_architectures(text)


def gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])


def test_native_is_the_gpus_of_this_machine(config: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, (9, 0), (8, 6), (9, 0))
    assert config.parse_architectures("native") == ("86-real", "90")
    gpus(monkeypatch, (7, 5))
    with pytest.raises(config.ConfigError, match=r"got 7\.5\+PTX in 'native'"):
        config.parse_architectures("native")
    gpus(monkeypatch)
    with pytest.raises(config.ConfigError, match="native needs a GPU here.*name architectures"):
        config.parse_architectures("native")


# nvcc


def test_nvcc_is_looked_for_in_the_documented_order(config: ModuleType, tmp_path: Path) -> None:
    names = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", "default")
    nvccs = {name: toolkit(tmp_path / name) / "bin" / "nvcc" for name in names}
    environ = {name: str(tmp_path / name) for name in names[1:3]}
    environ |= {"CUDACXX": str(nvccs["CUDACXX"]), "PATH": str(nvccs["PATH"].parent)}
    assert config.find_nvcc({**environ, "CUDACXX": "nvcc"}) == str(nvccs["PATH"])
    for name in names:
        assert config.find_nvcc(environ) == str(nvccs[name])
        environ[name] = ""
    nvccs["default"].unlink()
    assert config.find_nvcc(environ) is None


@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH"])
def test_variable_that_leads_nowhere_is_an_error(config: ModuleType, tmp_path: Path, variable: str) -> None:
    toolkit(tmp_path / "default")
    with pytest.raises(config.ConfigError, match=f"{variable} must be .*got '/nowhere'.*unset it") as error:
        config.find_nvcc({variable: "/nowhere", "PATH": "/usr/bin:/bin"})
    sentence(str(error.value))


def test_cuda_torch_without_nvcc_warns_and_records_why(
    config: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "read_torch", lambda: CUDA_TORCH)
    built = config.configure("AUTO", {"PATH": "/nowhere"})
    assert built.label == "cpu" and built.nvcc == "" and "no nvcc was found" in built.cuda_reason
    warning = sentence(built.build_warning)
    assert "2.13.0+cu128" in warning and "set CUDA_HOME to a CUDA 12 toolkit" in warning
    with pytest.raises(config.ConfigError, match=r"FUSEDKV_CUDA=1.*no nvcc.*a CUDA 12 toolkit") as error:
        config.configure("ON", {"PATH": "/nowhere"})
    sentence(str(error.value))
    chosen = config.configure("OFF", {"CUDA_HOME": "/nowhere", "TORCH_CUDA_ARCH_LIST": "5.0"})
    assert chosen.build_warning == "" and chosen.cuda_reason == "it was built with FUSEDKV_CUDA=0"


def test_torch_without_cuda_needs_no_nvcc(config: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "read_torch", lambda: ("/torch", "2.13.0+cpu", ""))
    built = config.configure("AUTO", {"CUDA_HOME": "/nowhere", "TORCH_CUDA_ARCH_LIST": "5.0"})
    assert (built.label, built.nvcc, built.build_warning) == ("cpu", "", "")
    assert built.cuda_reason == "it was built with torch 2.13.0+cpu, which has no CUDA"


@pytest.mark.parametrize(
    ("release", "warns"), [("12.6", False), ("12.8", False), ("11.8", True), ("13.0", True)]
)
def test_nvcc_of_another_cuda_major_warns_with_both_versions(
    config: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, warns: bool
) -> None:
    monkeypatch.setattr(config, "read_torch", lambda: CUDA_TORCH)
    home = toolkit(tmp_path / "cuda", release)
    built = config.configure("AUTO", {"CUDA_HOME": str(home)})
    # By default those that nvcc knows, and PTX for later GPUs.
    blackwell = ("sm_100", "sm_120") if release >= "12.8" else ()
    assert built.cuda_reason == "" and built.cuda_code == ("sm_80", "sm_90a", *blackwell, "compute_90")
    assert built.label == "cu" + release.replace(".", "")
    assert bool(built.build_warning) is warns
    if warns:
        warning = sentence(built.build_warning)
        assert release in warning and "12.8" in warning and "set CUDA_HOME to a CUDA 12 toolkit" in warning


def test_architectures_that_nvcc_lacks_are_refused(
    config: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(config, "read_torch", lambda: CUDA_TORCH)
    environ = {"CUDA_HOME": str(toolkit(tmp_path / "cuda", "12.4")), "TORCH_CUDA_ARCH_LIST": "9.0;10.0"}
    with pytest.raises(config.ConfigError, match=r"nvcc 12\.4 .* cannot .* sm_100; set TORCH_CUDA_ARCH_LIST"):
        config.configure("AUTO", environ)


def test_nvcc_that_does_not_work_is_an_error(
    config: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(config, "read_torch", lambda: CUDA_TORCH)
    nvcc = toolkit(tmp_path / "cuda") / "bin" / "nvcc"
    for script in ("exit 3", "echo gcc 12"):
        nvcc.write_text(f"#!/bin/sh\n{script}\n")
        with pytest.raises(config.ConfigError, match=r"bin/nvcc must be .*set CUDA_HOME"):
            config.configure("AUTO", {"CUDA_HOME": str(tmp_path / "cuda")})


def test_gpu_check_finds_the_nvcc_that_the_build_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    gpu_check = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", gpu_check)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    spec.loader.exec_module(gpu_check)
    monkeypatch.setenv("CUDACXX", "")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    gpu_check.name_nvcc()
    assert os.environ["CUDACXX"] == str(tmp_path / "cuda" / "bin" / "nvcc")


def test_facts_of_torch_are_read_without_importing_it(config: ModuleType) -> None:
    program = "import native_config as n, sys; print(n.read_torch()); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**CLEAN, "PYTHONPATH": str(SUPPORT)},
    )
    folder = str(Path(torch.__file__).parent)
    assert done.stdout.strip() == str((folder, str(torch.__version__), torch.version.cuda or "")), done.stderr


# The build backend

HOOKS = [
    "get_requires_for_build_wheel()",
    "get_requires_for_build_editable()",
    "prepare_metadata_for_build_wheel('OUT')",
    "prepare_metadata_for_build_editable('OUT')",
    "build_wheel('OUT')",
    "build_editable('OUT')",
]


def call_hook(call: str, folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a frontend does, in an interpreter of its own; ``-S`` hides all packages, as isolation does."""
    program = f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import backend; print(backend.{call})"
    return subprocess.run(
        [sys.executable, *options, "-c", program.replace("OUT", str(folder))],
        cwd=folder,
        env={**CLEAN, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("hook", HOOKS)
def test_isolated_build_is_refused_with_the_right_command(hook: str, tmp_path: Path) -> None:
    done = call_hook(hook, tmp_path, "-S")
    assert done.returncode == 1 and done.stdout == "" and not list(tmp_path.iterdir())
    assert "`pip install --no-build-isolation .`" in sentence(done.stderr)


def test_pip_shows_the_refusal_and_fetches_nothing(tmp_path: Path) -> None:
    """No index and no local packages: pip would fail otherwise if the build required any."""
    options = ["--no-deps", "--no-index", "-w", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)]
    env = {name: value for name, value in CLEAN.items() if not name.startswith("PIP_")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert "--no-build-isolation" in said and "Traceback" not in said and "from versions" not in said


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FUSEDKV_CUDA": "yes"}, "FUSEDKV_CUDA must be 0 .* or 1 .*, got 'yes'; unset it"),
        pytest.param(
            {"FUSEDKV_CUDA": "1"},
            r"FUSEDKV_CUDA=1.*torch .* has no CUDA; install a torch with CUDA",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA"),
        ),
        ({"FUSEDKV_CUDA": "1", "CUDA_HOME": "/nowhere"}, "CUDA_HOME must be .*got '/nowhere'"),
        ({"FUSEDKV_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "7.5"}, "TORCH_CUDA_ARCH_LIST must hold .*got 7.5"),
    ],
)
def test_wrong_settings_end_the_build_in_one_sentence(
    environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = call_hook("prepare_metadata_for_build_wheel('OUT')", tmp_path, **environment)
    assert done.returncode == 1
    assert re.match("error: .*" + message, sentence(done.stderr)), done.stderr


def test_missing_build_tools_are_all_named(config: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SUPPORT))
    backend = importlib.import_module("backend")
    monkeypatch.delitem(sys.modules, "backend")
    monkeypatch.setattr(backend, "find_tool", lambda name: None)
    monkeypatch.setattr(backend.metadata, "version", lambda name: "65.5.0")
    with pytest.raises(config.ConfigError, match=r"pip install 'setuptools>=77' cmake ninja` there") as error:
        backend.check_environment()
    sentence(str(error.value))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a source distribution is made from, without the compiled libraries."""
    tree = tmp_path / "tree"
    for folder in ("build_support", "csrc", "fusedkv_ext"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for name in ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    return tree


def test_version_says_for_what_the_package_was_built(source: Path) -> None:
    for hook in ("prepare_metadata_for_build_wheel", "prepare_metadata_for_build_editable"):
        done = call_hook(f"{hook}('OUT')", source, FUSEDKV_CUDA="0")
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1] == f"fusedkv_ext-{VERSION}+cpu.dist-info"


def test_source_distribution_can_be_built_from(source: Path) -> None:
    done = call_hook("build_sdist('OUT')", source)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == f"fusedkv_ext-{VERSION}.tar.gz"
    with tarfile.open(source / f"fusedkv_ext-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"build_support/backend.py", "build_support/native_config.py", "CMakeLists.txt"} <= names
    assert {"pyproject.toml", "setup.py", "csrc/bindings.cpp"} <= names
    requires = call_hook("get_requires_for_build_sdist()", source, "-S")
    assert requires.stdout.strip() == "['setuptools>=77']"


# CMake


def run_cmake(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        pytest.skip("no cmake here")
    command = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}", *options]
    return subprocess.run(command, env={**CLEAN, **environment}, capture_output=True, text=True, timeout=120)


def test_cmake_records_torch_and_the_reason(tmp_path: Path) -> None:
    done = run_cmake(tmp_path, "-DFUSEDKV_CUDA=OFF", TORCH_CUDA_ARCH_LIST="")
    assert done.returncode == 0, done.stderr
    facts = (tmp_path / "generated" / "build_facts.h").read_text()
    assert f'FUSEDKV_BUILD_TORCH R"fact({torch.__version__})fact"' in facts
    assert 'FUSEDKV_BUILD_CUDA_CODE R"fact()fact"' in facts
    assert 'FUSEDKV_BUILD_CUDA_REASON R"fact(it was built with ' in facts


def test_cmake_ends_with_the_same_sentence(tmp_path: Path) -> None:
    done = run_cmake(tmp_path, "-DFUSEDKV_CUDA=ON", TORCH_CUDA_ARCH_LIST="Turing")
    assert done.returncode == 1
    assert "TORCH_CUDA_ARCH_LIST must hold architectures of 8.0" in " ".join(done.stderr.split())


# What users see of a package without CUDA ops


def loaded_with(
    monkeypatch: pytest.MonkeyPatch, folder: Path, cuda: str | None, reason: str, warning: str = ""
) -> str | None:
    """What native says with a torch of this CUDA and a build of that kind."""
    facts = {"cuda_reason": reason, "warning": warning}
    fake = SimpleNamespace(build_info=lambda: facts, __file__=str(folder / "_C.so"))
    monkeypatch.setattr(native, "_C", fake)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    return native._load_cuda_ops()


def test_reason_and_remedy_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rebuild = "rebuild with `FUSEDKV_CUDA=1 pip install --no-build-isolation .` in the source tree"
    said = loaded_with(monkeypatch, tmp_path, "12.8", "no nvcc was found when it was built")
    assert said == f"fusedkv_ext was built without CUDA ops: no nvcc was found when it was built; {rebuild}"
    (tmp_path / "_C_cuda.so").write_bytes(b"not a library")
    said = loaded_with(monkeypatch, tmp_path, "12.8", "")
    assert said.startswith("fusedkv_ext's CUDA ops do not load with torch ") and said.endswith(rebuild)
    assert "_C_cuda.so: " in said and "\n" not in said
    said = loaded_with(monkeypatch, tmp_path, None, "it was built with torch 2.13.0+cpu, which has no CUDA")
    assert said.startswith(f"torch {torch.__version__} has no CUDA; install a torch with CUDA, then rebuild")


@pytest.mark.parametrize(
    ("reason", "warning", "count", "warns"),
    [
        ("no nvcc was found", "torch has CUDA, and no nvcc was found", 1, True),
        ("no nvcc was found", "torch has CUDA, and no nvcc was found", 0, False),
        ("it was built with FUSEDKV_CUDA=0", "", 1, False),
        ("", "", 1, True),  # does not load
    ],
)
def test_import_warns_beside_a_gpu_of_ops_that_were_not_meant_to_be_missing(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    reason: str,
    warning: str,
    count: int,
    warns: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    error = loaded_with(monkeypatch, tmp_path, "12.8", reason, warning)
    monkeypatch.setattr(native, "_cuda_error", error)
    native._warn_without_cuda_ops()
    assert [str(w.message) for w in recwarn] == ([error] if warns else [])


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch loads the real library")
def test_every_op_refuses_cuda_tensors_with_the_reason(tmp_path: Path) -> None:
    """The dispatcher is asked for what it would call for CUDA tensors, which this torch cannot make. In a
    process of its own, where torch says that it has CUDA."""
    program = """
import torch
torch.version.cuda, torch.backends.cuda.is_built = "12.8", lambda: True
import fusedkv_ext as fkv
from fusedkv_ext.ops import native
from fusedkv_ext.ops import autograd
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusedkv::")]
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
assert len(names) == 10 and all(has_kernel(name, "CUDA") for name in names)
x, weights = torch.ones(1, 2, 1, 16), torch.ones(2, 1, 16)
assert torch.equal(fkv.fuse_kv([x, x], weights), 2 * x)
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
lengths = torch.zeros(1, dtype=torch.int32)
calls = [
    (torch.ops.fusedkv.fuse_kv.default, ([x, x], weights)),
    (torch.ops.fusedkv.attn_schedule.default, (lengths, 1, 1, 1, 8, -1, False)),
]
for op, arguments in calls:
    try:
        op.redispatch(cuda, *arguments)
    except NotImplementedError as error:
        assert str(error) == native.cuda_error(), error
        assert str(error).startswith("fusedkv_ext was built without CUDA ops: "), error
    else:
        raise AssertionError(op)
"""
    env = {**CLEAN, "PYTHONPATH": str(Path(native.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_info_prints_the_reason_and_no_architectures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = {**native.build_info(), "torch": "2.13.0+cpu", "cuda_code": "", "cuda_ops": False}
    built["cuda_error"] = "fusedkv_ext was built without CUDA ops: it was built with FUSEDKV_CUDA=0; rebuild"
    monkeypatch.setattr(native, "build_info", lambda: dict(built))
    assert main(["info"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["CUDA ops"] == "none: " + built["cuda_error"]
    assert rows["build: torch"] == "2.13.0+cpu" and rows["build: cuda code"] == "none"


def test_real_build_lists_code_only_if_it_has_the_ops() -> None:
    info = native.build_info()
    assert bool(info["cuda_code"]) is not bool(info["cuda_reason"]), json.dumps(info)
