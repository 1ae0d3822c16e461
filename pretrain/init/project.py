"""What a new project consists of, and how it gets into a folder without changing anything that is there.

Configurations and job scripts lie at the top of a checkout; setup.py puts them into `files/` beside this module when a
package is built. README.md and .gitignore are those of a project, and lie here alone.
"""

from __future__ import annotations

import os
from pathlib import Path

from pretrain.errors import ConfigError, TacoError

_HERE = Path(__file__).parent
_GITIGNORE = b"# What runs and data programs write.\nruns/\ndata/\nexported/\n.venv/\n*.log\n"
_MOST_NAMES = 5


def project_files() -> dict[str, bytes]:
    """The content of every file of a new project, by its path in the project.

    Raises:
        TacoError: this installation holds no configurations or job scripts, or they cannot be read.
    """
    root = _HERE / "files" if (_HERE / "files").is_dir() else _HERE.parents[1]
    try:
        configurations, scripts = sorted(root.glob("configs/**/*.yaml")), sorted(root.glob("slurm/*.sh"))
        files = {path.relative_to(root).as_posix(): path.read_bytes() for path in (*configurations, *scripts)}
        readme = (_HERE / "project_readme.md").read_bytes()
    except OSError as error:
        raise TacoError(f"{root}: cannot be read: {error}; install taco-pretrain again") from None
    if not configurations or not scripts:
        raise TacoError(f"{root}: holds no configs/*.yaml or no slurm/*.sh; install taco-pretrain again")
    return {"README.md": readme, ".gitignore": _GITIGNORE, **files}


def lay_out(folder: Path) -> list[str]:
    """Write into `folder` what is missing of a project there; the names of the files that were written.

    Raises:
        ConfigError: something else is in the way of a file; nothing was written.
        TacoError: `folder` cannot be read or written.
    """
    files = project_files()
    try:
        obstacles = _find_obstacles(folder, files)
        if obstacles:
            raise ConfigError(_refusal(folder, obstacles))
        missing = [name for name in files if not (folder / name).exists()]
        for name in missing:
            _write_new(folder / name, files[name])
    except OSError as error:
        raise TacoError(
            f"{folder}: cannot hold a project: {error}; name a folder that you may write to, with free space"
        ) from None
    return missing


def _find_obstacles(folder: Path, files: dict[str, bytes]) -> list[Path]:
    """Files with other content, files where folders must be, and folders or broken links where files must be."""
    obstacles = {}
    for name, content in files.items():
        path = folder / name
        for upper in reversed([folder / parent for parent in Path(name).parents]):
            if os.path.lexists(upper) and not upper.is_dir():
                obstacles[upper] = True
        if os.path.lexists(path) and not (path.is_file() and path.read_bytes() == content):
            obstacles[path] = True
    return list(obstacles)


def _refusal(folder: Path, obstacles: list[Path]) -> str:
    names = ", ".join(str(path) for path in obstacles[:_MOST_NAMES])
    more = f" and {len(obstacles) - _MOST_NAMES} more" if len(obstacles) > _MOST_NAMES else ""
    return (
        f"{names}{more}: already there, and not as a new project has it; nothing was written. "
        f"Rename or move what is in the way and run `taco init {folder}` again, or name another folder"
    )


def _write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there; scripts may be executed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = 0o777 if content.startswith(b"#!") else 0o666  # less the user's umask
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
    except OSError:
        path.unlink(missing_ok=True)  # half a file would be in the way of the next try
        raise
