"""`lit-peft push` and `lit-peft pull`: upload and download adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

from lit_peft.commands.options import Options
from lit_peft.util.errors import LitPeftError, first_line

# The files of an adapter's folder; no others are transferred.
PATTERNS = ["*.json", "*.safetensors", "*.bin", "README.md"]


def push(arguments: list[str]) -> None:
    """Upload an adapter's folder.

    Raises:
        LitPeftError: the folder has no adapter, or the hub refuses the upload.
    """
    parser = Options("lit-peft push", description="Upload an adapter's folder to the hub.")
    parser.add_argument("folder", help="the adapter's folder")
    parser.add_argument("repo_id", help="USER/NAME on the hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    options = parser.parse_args(arguments)

    from huggingface_hub import HfApi

    if not (Path(options.folder) / "adapter_config.json").is_file():
        raise LitPeftError(f"{options.folder} has no adapter_config.json: give the folder of an adapter.")
    api = HfApi()
    try:
        api.create_repo(options.repo_id, private=options.private, exist_ok=True)
        done = api.upload_folder(repo_id=options.repo_id, folder_path=options.folder, allow_patterns=PATTERNS)
    except (OSError, ValueError) as problem:  # huggingface_hub raises these, HTTP errors included
        raise LitPeftError(f"{options.repo_id} could not be uploaded: {first_line(problem)}") from problem
    print(f"pushed: {done}")


def pull(arguments: list[str]) -> None:
    """Download an adapter into a new folder, which appears complete or not at all.

    Raises:
        LitPeftError: the hub has no such adapter, or the folder is not empty.
    """
    parser = Options("lit-peft pull", description="Download an adapter from the hub.")
    parser.add_argument("repo_id", help="USER/NAME on the hub")
    parser.add_argument("folder", help="the new folder")
    parser.add_argument("--revision", default=None, help="branch, tag or commit")
    options = parser.parse_args(arguments)

    from huggingface_hub import HfApi

    from lit_peft.formats.folder import new_folder

    with new_folder(options.folder) as folder:
        try:
            HfApi().snapshot_download(
                options.repo_id, revision=options.revision, local_dir=folder, allow_patterns=PATTERNS
            )
        except (OSError, ValueError) as problem:
            raise LitPeftError(f"{options.repo_id} could not be downloaded: {first_line(problem)}") from problem
        # Records of the client for resuming a download.
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        if not (folder / "adapter_config.json").is_file():
            raise LitPeftError(f"{options.repo_id} has no adapter_config.json: it is not an adapter.")
    print(f"pulled: {options.folder}")
