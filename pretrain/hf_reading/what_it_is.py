"""What a file is that was taken for another: a pointer, an error page, a link to nowhere; and what to do then."""

from __future__ import annotations

from pathlib import Path

from pretrain.errors import DataError

_BEGINNING_BYTES = 512
_POINTERS = (
    (b"version https://git-lfs", "a pointer of Git LFS", "`git lfs pull` in its repository fetches the file"),
    (b"version http", "a pointer of Git LFS", "`git lfs pull` in its repository fetches the file"),
    (b"# xet version", "a pointer of a Xet store", "`git xet` or a download of the file itself fetches it"),
    (b"/annex/objects/", "a pointer of git-annex", "`git annex get` in its repository fetches the file"),
)
# What a folder may hold instead of weights that can be read, by the end of a file's name.
_OTHER_WEIGHTS = (
    ("adapter_model.safetensors", "an adapter", "merge it into its model and save that with save_pretrained"),
    ("adapter_model.bin", "an adapter", "merge it into its model and save that with save_pretrained"),
    (".h5", "weights of TensorFlow", "load them with transformers 4 (from_tf=True) and save_pretrained"),
    (".msgpack", "weights of Flax", "load them with transformers 4 (from_flax=True) and save_pretrained"),
    (".ckpt.index", "a checkpoint of TensorFlow", "convert it with transformers 4 and save_pretrained"),
    (".onnx", "a model for inference", "take the folder that it was made from"),
    (".gguf", "a quantised model for inference", "take the folder that it was made from"),
    (".ot", "weights of Rust", "take the model's safetensors"),
    (".safetensors", "tensors under another name", "if these are the weights, rename the file to model.safetensors"),
    (".bin", "tensors under another name", "if these are the weights, rename the file to pytorch_model.bin"),
    (".pt", "tensors under another name", "if these are the weights, rename the file to pytorch_model.bin"),
    (".pth", "tensors under another name", "if these are the weights, rename the file to pytorch_model.bin"),
    (".ckpt", "tensors under another name", "if these are the weights, rename the file to pytorch_model.bin"),
)


def check_is_content(path: Path) -> None:
    """Refuse a file that only stands for another, or holds nothing.

    Raises:
        DataError: says what it is and what to do; also if it cannot be read.
    """
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{path}: is a link to {path.readlink()}, which is not there; copy the folder with the files that its "
            "links lead to (cp -rL)"
        )
    try:
        with path.open("rb") as file:
            beginning = file.read(_BEGINNING_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not beginning:
        raise DataError(f"{path}: is empty; fetch the file again")
    for mark, name, remedy in _POINTERS:
        if beginning.startswith(mark):
            raise DataError(f"{path}: is {name}, not the file itself; {remedy}")
    if beginning.lstrip()[:5].lower() in (b"<html", b"<!doc", b"<?xml"):
        raise DataError(f"{path}: is a web page, not the file itself; fetch the file again, with access to it")


def explain_no_weights(folder: Path) -> str:
    """Why nothing in `folder` can be read as weights, and what to do."""
    names = sorted(entry.name for entry in folder.iterdir())
    for end, name, remedy in _OTHER_WEIGHTS:
        found = [entry for entry in names if entry.endswith(end) and entry != "training_args.bin"]
        if found:
            return f"{folder}: has no model.safetensors, but {found[0]}, {name}; {remedy}"
    return (
        f"{folder}: has no model.safetensors, pytorch_model.bin or their shards; give a folder that save_pretrained "
        "wrote"
    )


def explain_no_config(folder: Path) -> str:
    """Why `folder` has no config.json, and what to do."""
    path = folder / "config.json"
    if not folder.exists():
        could_be_a_name = not folder.is_absolute() and len(folder.parts) <= 2
        command = f", for example with `hf download {folder} --local-dir downloads/{folder.name}`,"
        return (
            f"{path}: is missing: there is no folder {folder} here, and nothing is downloaded; fetch the model first"
            f"{command if could_be_a_name else ''} and give its folder"
        )
    if not folder.is_dir():
        return f"{folder}: is a file; give the folder that holds it together with the model's config.json"
    if (folder / "manifest.json").exists() or (folder / "checkpoints").is_dir():
        return f"{folder}: is a checkpoint or a run already; name it in run.init_from as it is"
    inside = sorted(
        {config.parent for pattern in ("*/", "snapshots/*/") for config in folder.glob(f"{pattern}config.json")}
    )
    if inside:
        return f"{path}: is missing, but {inside[-1]} has one; give the folder of the model itself"
    if (folder / "bert_config.json").exists():
        return f"{folder}: is a checkpoint of TensorFlow; convert it with transformers 4 and save_pretrained"
    return f"{path}: is missing; give the folder of a saved Hugging Face model"
