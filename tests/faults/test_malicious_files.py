"""Files from strangers: nothing in them is executed, and nothing that contradicts itself is believed."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_programs import looks_finished, preprocess, write_vocab
from hf_folders import random_bert
from small_runs import write_cyclic_dataset, write_small_run
from state_ranges import write

from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint, find_problems
from pretrain.checkpoint.state_files import STATE_FOLDER, WEIGHT, Range, StateReader, read_counters, state_file
from pretrain.checkpoint.weights import read_weights
from pretrain.config.load import load_config
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.index_cache import cached
from pretrain.data.tokenizer.load import load_tokenizer
from pretrain.durable import record_of
from pretrain.errors import CheckpointError, ConfigError, DataError
from pretrain.evaluate.fill_mask import predict
from pretrain.export import export_checkpoint
from pretrain.import_hf import import_folder
from pretrain.model.parameter_shape import ParameterShape
from pretrain.run_folder import RunFolder

SHAPES = {"w": ParameterShape((4, 3))}


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A checkpoint folder with one state file of one parameter."""
    write(tmp_path, 0, [(Range(WEIGHT, "w", 0, 1, 0, 12), torch.arange(12.0))], SHAPES)
    return tmp_path / STATE_FOLDER / state_file(0)


@pytest.mark.fault("malicious")
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_in_the_place_of_state_is_refused_and_not_run(good: Path, tmp_path: Path, writer: str) -> None:
    canary = tmp_path / "canary"
    if writer == "torch":
        torch.save({"module": Canary(canary)}, good)
    else:
        good.write_bytes(pickle.dumps({"module": Canary(canary)}))
    good.with_name("counters.json").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(CheckpointError, match="cannot be read as state"):
        StateReader(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_counters(tmp_path)
    assert not canary.exists()


@pytest.mark.fault("damaged-checkpoint")
@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_truncated_state_is_a_typed_error(good: Path, tmp_path: Path, keep: int) -> None:
    good.write_bytes(good.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: cannot be read as state"):
        StateReader(tmp_path)


def _forge(path: Path, header: object, values: bytes = b"\0" * 48) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)


def _entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


METADATA = {"parameters": json.dumps({"w": [[4, 3], None]})}


@pytest.mark.fault("malicious")
@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"__metadata__": METADATA, "weight|w|0/1|0": _entry([11], 0, 44)}, "cannot be read"),
        ({"__metadata__": METADATA, "weight|w|0/1|1": _entry([12], 0, 48)}, "missing or there twice"),
        ({"__metadata__": METADATA, "weight|w|0/2|0": _entry([12], 0, 48)}, "lacks elements"),
        ({"__metadata__": METADATA, "weight|w|1/1|0": _entry([12], 0, 48)}, "out of range"),
        ({"__metadata__": METADATA, "code|w|0/1|0": _entry([12], 0, 48)}, "out of range"),
        ({"__metadata__": METADATA, "weight|v|0/1|0": _entry([12], 0, 48)}, "no parameter that the header describes"),
        ({"__metadata__": METADATA, "weight|w|0/1|0": _entry([3, 4], 0, 48)}, "cannot be read as state"),
        ({"__metadata__": METADATA, "weight|w|0/1|0": _entry([12], 0, 48, "I32")}, "is I32"),
        ({"__metadata__": METADATA, "weight": _entry([12], 0, 48)}, "cannot be read as state"),
        ({"__metadata__": METADATA, "weight|w|0/1|0": _entry([2**62], 0, 48)}, "cannot be read as state"),
        ({"weight|w|0/1|0": _entry([12], 0, 48)}, "cannot be read as state"),
        ({"__metadata__": {"parameters": "[1, 2]"}, "weight|w|0/1|0": _entry([12], 0, 48)}, "cannot be read as state"),
        ({"__metadata__": {"parameters": '{"w": [[-4, -3], 0]}'}, "weight|w|0/1|0": _entry([12], 0, 48)}, "shape"),
        ({"__metadata__": {"parameters": '{"w": [[4, 3], 7]}'}, "weight|w|0/1|0": _entry([12], 0, 48)}, "shape"),
        ({"__metadata__": {"parameters": '{"w": [[4, 3.5], 0]}'}, "weight|w|0/1|0": _entry([12], 0, 48)}, "shape"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(good: Path, tmp_path: Path, header: object, words: str) -> None:
    _forge(good, header)
    with pytest.raises(CheckpointError, match=words):
        StateReader(tmp_path)


def test_files_that_contradict_each_other_are_refused(good: Path, tmp_path: Path) -> None:
    write(tmp_path, 1, [(Range("exp_avg", "w", 0, 1, 0, 12), torch.zeros(12))], {"w": ParameterShape((3, 4))})
    with pytest.raises(CheckpointError, match="and .* in another file"):
        StateReader(tmp_path)
    write(tmp_path, 1, [(Range(WEIGHT, "w", 0, 1, 0, 12), torch.zeros(12))], SHAPES)
    with pytest.raises(CheckpointError, match="missing or there twice"):
        StateReader(tmp_path)


def test_no_state_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no state of a run"):
        StateReader(tmp_path)


# -- other files from strangers ----------------------------------------------------------------------------------------


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """What the poison of this test would make; it must not be there afterwards."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def write_pickle(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": Canary(canary)}))


def write_torch(path: Path, canary: Path) -> None:
    torch.save({"weight": Canary(canary)}, path)


def write_old_torch(path: Path, canary: Path) -> None:
    torch.save({"weight": Canary(canary)}, path, _use_new_zipfile_serialization=False)


WRITERS = [write_pickle, write_torch, write_old_torch]


def poison_weights(checkpoint: Path, write: Callable[[Path, Path], None], canary: Path) -> None:
    """Put a pickle in the place of the weights, with a manifest that vouches for it."""
    path = checkpoint / "weights.safetensors"
    write(path, canary)
    manifest = CheckpointManifest.load(checkpoint)
    files = [record for record in manifest.files if record.name != path.name]
    forged = replace(manifest, files=(*files, record_of(path, checkpoint)))
    (checkpoint / "manifest.json").write_text(forged.to_json())


@pytest.mark.fault("malicious")
@pytest.mark.parametrize("write", WRITERS)
def test_weights_to_start_from_and_to_export(write: Callable[[Path, Path], None], tmp_path: Path, canary: Path) -> None:
    import_folder(random_bert(tmp_path / "hf"), tmp_path / "start")
    checkpoint = find_checkpoint(tmp_path / "start")
    poison_weights(checkpoint, write, canary)
    assert find_problems(checkpoint) == []
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: cannot be read as weights"):
        read_weights(checkpoint)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: cannot be read as weights"):
        export_checkpoint(checkpoint, tmp_path / "out")
    (tmp_path / "model.pt").write_bytes((checkpoint / "weights.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        find_checkpoint(tmp_path / "model.pt")


@pytest.mark.fault("malicious")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("write", WRITERS)
def test_folders_to_import(write: Callable[[Path, Path], None], name: str, tmp_path: Path, canary: Path) -> None:
    source = random_bert(tmp_path / "hf")
    (source / "model.safetensors").unlink()
    write(source / name, canary)
    with pytest.raises(DataError, match=rf"{name}: cannot be read as tensors"):
        import_folder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def add_own_code(folder: Path, canary: Path) -> None:
    """Name code of the folder's own in its configurations, as models of unusual kinds do."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        fields = json.loads(path.read_text()) if path.exists() else {}
        classes = {"AutoConfig": "evil.Evil", "AutoModelForMaskedLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
        path.write_text(json.dumps({**fields, "auto_map": classes}))


@pytest.mark.fault("malicious")
def test_models_with_code_of_their_own(tmp_path: Path, canary: Path) -> None:
    tokenizer = load_tokenizer(write_vocab(tmp_path))
    folder = random_bert(tmp_path / "hf", vocab_size=tokenizer.vocab_size)
    tokenizer.save_pretrained(folder)
    add_own_code(folder, canary)
    assert predict(folder, ["a [MASK]"], 1)  # read as the BERT that it is
    import_folder(folder, tmp_path / "imported")
    export_checkpoint(find_checkpoint(tmp_path / "imported"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    with pytest.raises(DataError):
        predict(folder, ["a [MASK]"], 1)
    with pytest.raises(DataError, match="evil"):
        import_folder(folder, tmp_path / "again")


@pytest.mark.fault("malicious")
def test_a_model_to_look_into_that_is_a_pickle(tmp_path: Path, canary: Path) -> None:
    folder = random_bert(tmp_path / "hf")
    load_tokenizer(write_vocab(tmp_path)).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    write_torch(folder / "pytorch_model.bin", canary)
    with pytest.raises(DataError, match="cannot be loaded"):
        predict(folder, ["a [MASK]"], 1)


@pytest.mark.fault("malicious")
@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "tokenizer.json"])
def test_tokenizers(name: str, tmp_path: Path, canary: Path) -> None:
    write_pickle(tmp_path / name, canary)
    with pytest.raises(DataError, match=name):
        load_tokenizer(tmp_path / name)


@pytest.mark.fault("malicious")
def test_a_tokenizer_with_code_of_its_own(tmp_path: Path, canary: Path) -> None:
    tokenizer, folder = load_tokenizer(write_vocab(tmp_path)), tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    add_own_code(folder, canary)
    assert load_tokenizer(folder).info == tokenizer.info
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["pre_tokenizer"] = {"type": "Custom", "module": "evil", "class": "Evil"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"tokenizer\.json: is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (folder / "taco_tokenizer.json").write_text(json.dumps({"source": "../../secret", "name": "x", "cased": False}))
    with pytest.raises(DataError, match="is damaged"):
        load_tokenizer(folder)


@pytest.mark.fault("malicious")
def test_index_tables(tmp_path: Path, canary: Path) -> None:
    def make() -> dict[str, np.ndarray]:
        return {"starts": np.arange(5, dtype=np.uint32)}

    cached("pack", {"content": 1}, make, [tmp_path / "index"])
    (path,) = (tmp_path / "index").glob("*.index")
    write_pickle(path, canary)
    assert np.array_equal(cached("pack", {"content": 1}, make, [tmp_path / "index"])["starts"], np.arange(5))


@pytest.mark.fault("malicious")
@pytest.mark.parametrize("suffix", [".idx", ".bin", ".json"])
def test_datasets(suffix: str, tmp_path: Path, canary: Path) -> None:
    write_cyclic_dataset(tmp_path / "a")
    write_pickle(tmp_path / f"a{suffix}", canary)
    with pytest.raises(DataError, match=rf"a{suffix}"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.fault("malicious")
def test_configurations(tmp_path: Path, canary: Path) -> None:
    tag = f"!!python/object/apply:os.mkdir ['{canary}']"
    path = write_small_run(tmp_path)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path, [f"run.seed={tag}"])
    run = RunFolder(tmp_path / "run")
    run.claim()
    (tmp_path / "run" / "config.yaml").write_text(f"run: {tag}\n")
    with pytest.raises(ConfigError, match="is no configuration of a run"):
        run.check_config(load_config(path))


@pytest.mark.fault("malicious")
def test_links_in_a_checkpoint_lead_nowhere(tmp_path: Path) -> None:
    """Neither a file that the manifest vouches for nor one beside it brings what lies outside into an export."""
    (tmp_path / "secret").write_text("secret")
    import_folder(random_bert(tmp_path / "hf"), tmp_path / "start")
    checkpoint = find_checkpoint(tmp_path / "start")
    (checkpoint / "tokenizer").mkdir(exist_ok=True)
    (checkpoint / "tokenizer" / "vocab.txt").symlink_to(tmp_path / "secret")
    export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out" / "vocab.txt").exists()
    manifest = CheckpointManifest.load(checkpoint)
    linked = replace(record_of(tmp_path / "secret", tmp_path), name="tokenizer/vocab.txt")
    (checkpoint / "manifest.json").write_text(replace(manifest, files=(*manifest.files, linked)).to_json())
    with pytest.raises(CheckpointError, match="names a file outside the checkpoint"):
        export_checkpoint(checkpoint, tmp_path / "again")


@pytest.mark.slow
@pytest.mark.fault("malicious")
def test_corpora_with_a_loading_script(tmp_path: Path, canary: Path) -> None:
    """A folder as the Hugging Face hub once had them, whose script would make the dataset."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "corpus.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    for source in (folder, f"hf://{folder}"):
        preprocess(tmp_path, "--input", source).check_error(str(folder))
    assert looks_finished(tmp_path) == []
