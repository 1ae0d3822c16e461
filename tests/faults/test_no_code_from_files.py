"""A look at all of the program's source: nothing in it can run code that came in a file, or a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from project import ROOT

# What runs code of a file, unpacks an archive wherever that says, or is a race for a file's name.
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.tempnam", "tempfile.mktemp",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "joblib.load",
    "dill.load", "dill.loads", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
    "runpy.run_path", "util.spec_from_file_location", "machinery.SourceFileLoader",
    "tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive", "torch.jit.load", "jit.load", "pandas.read_pickle",
}  # fmt: skip
FORBIDDEN_KEYWORDS = {"shell": True, "trust_remote_code": True, "allow_pickle": True}
ALLOWED = {
    # Messages between a process and its own children, over a pair of sockets that has no name.
    ("data_tools/encoding/worker_process.py", "pickle.loads"),
    # A benchmark that loads the megatron-core which is installed.
    ("pretrain/bench/index_contenders.py", "util.spec_from_file_location"),
}


def dangers(source: str) -> Iterator[str]:
    """Every call in a module that could run what a file says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield from _dangers_of(node)
        elif isinstance(node, ast.ImportFrom):  # so that a call always shows where it comes from
            names = {f"{(node.module or '').rsplit('.')[-1]}.{name.name}" for name in node.names}
            yield from names & FORBIDDEN_CALLS


def _dangers_of(node: ast.Call) -> Iterator[str]:
    name = _name(node.func)
    if name in FORBIDDEN_CALLS:
        yield name
    values = {keyword.arg: keyword.value for keyword in node.keywords}
    for key, forbidden in FORBIDDEN_KEYWORDS.items():
        value = values.get(key)
        if value is not None and (not isinstance(value, ast.Constant) or value.value is forbidden):
            yield f"{name}({key}=...)"
    if name == "torch.load" and not _is_true(values.get("weights_only")):
        yield "torch.load without weights_only=True"


def _is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Name):
        return function.id
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name | ast.Attribute):
        owner = function.value.id if isinstance(function.value, ast.Name) else function.value.attr
        return f"{owner}.{function.attr}"
    return ""


@pytest.mark.fault("malicious")
def test_no_module_can_run_what_a_file_says() -> None:
    modules = [*(path for folder in ("pretrain", "data_tools") for path in (ROOT / folder).rglob("*.py"))]
    modules.append(ROOT / "setup.py")
    assert len(modules) > 100
    found = {
        (str(path.relative_to(ROOT)), name) for path in modules for name in dangers(path.read_text(encoding="utf-8"))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "import pickle; pickle.load(file)",
        "from pickle import loads",
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import torch; torch.load(path, weights_only=flag)",
        "import yaml; yaml.load(text)",
        "import subprocess; subprocess.run(text, shell=True)",
        "eval(text)",
        "import os; os.system(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "import numpy as np; np.load(path, allow_pickle=True)",
    ],
)
def test_the_look_sees_what_it_is_for(source: str) -> None:
    assert list(dangers(source))


def test_the_look_lets_harmless_calls_pass() -> None:
    assert list(dangers("model.eval(); yaml.safe_load(text); re.compile(x); torch.load(p, weights_only=True)")) == []
