"""The Hugging Face Hub: requests that are repeated when they fail, and what a dataset says of itself."""

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from support.cli import UserError, one_line


def ask_hub(function: Callable, dataset: str, *args, tries: int = 3, fix: str = "", **kwargs):
    """function(dataset, ...) of huggingface_hub, tried so many times; UserError, which ends in `fix`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    for left in reversed(range(tries)):
        try:
            return function(dataset, *args, **kwargs)
        except GatedRepoError:
            page = f"{constants.ENDPOINT}/datasets/{dataset}"
            fix = f"ask for access at {page}, then run `hf auth login`, or set HF_TOKEN"
            raise UserError(f"{dataset} is gated: {fix}") from None
        except RepositoryNotFoundError:
            fix = "check the name; if it is private, run `hf auth login`, or set HF_TOKEN"
            raise UserError(f"there is no folder {dataset}, and no such dataset on the Hub: {fix}") from None
        except Exception as error:  # the client's, the network library's and hf_xet's own
            if isinstance(error, OSError) and error.errno:  # of the disk
                raise
            status = getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)
            if not left or status in (401, 403, 404):
                fix = fix or "check the network, --dataset, --subset and --revision; the same command again resumes"
                raise UserError(f"the Hub: {one_line(error)}: {fix}") from None
            time.sleep(1)


def read_configs(dataset: str, commit: str) -> dict[str, list[tuple[str, str]]]:
    """The configurations in a dataset's README.md: splits ("" if it names none) and patterns of paths."""
    from huggingface_hub import hf_hub_download, metadata_load
    from huggingface_hub.errors import RemoteEntryNotFoundError

    configs: dict[str, list[tuple[str, str]]] = {}
    with tempfile.TemporaryDirectory() as folder, suppress(RemoteEntryNotFoundError):  # but no other refusal
        path = hf_hub_download(dataset, "README.md", repo_type="dataset", revision=commit, local_dir=folder)
        for entry in (metadata_load(path) or {}).get("configs") or []:
            files = entry.get("data_files") or "**"
            for file in files if isinstance(files, list) else [files]:
                split, paths = (str(file["split"]), file["path"]) if isinstance(file, dict) else ("", file)
                for path in paths if isinstance(paths, list) else [paths]:
                    pattern = os.path.normpath(Path(entry.get("data_dir", ""), path)).replace("**/", "**")
                    configs.setdefault(str(entry["config_name"]), []).append((split, pattern))
    return configs
