"""Models by name: `load`, `download`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from glassgpt.config import PRESETS, ModelConfig, UserError, nearest
from glassgpt.config.errors import first_line
from glassgpt.config.hub import Download
from glassgpt.model import GPT, weights
from glassgpt.text import Tokenizer

ASSETS = Path(__file__).parent / "assets"
COMPLETE_FILE = "complete.json"  # written last into a checkpoint, with the size of every other file
HUB_FILES = [
    "model*.safetensors*",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
HUB_PICKLES = ["pytorch_model*.bin*"]


class Found(NamedTuple):
    """A model on this machine."""

    folder: Path
    is_hf: bool

    def config(self) -> ModelConfig:
        return weights.read_hf_config(self.folder) if self.is_hf else weights.read_config(self.folder)

    def model(self) -> GPT:
        return weights.load_hf(self.folder) if self.is_hf else weights.load(self.folder)


def load(name: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = torch.float32) -> tuple[GPT, Tokenizer]:
    """`model, tokenizer = load(name)`; `model(ids)` gives logits (B, T, V).

    `name` is a bundled model, a run folder (its newest complete checkpoint), a folder of ours or of Hugging Face's, or
    a hub id that `glassgpt download` has fetched. Nothing is downloaded here. Weights are converted to `dtype` (None
    keeps the stored one); the model is in evaluation mode. Raises UserError saying what was looked for and where.
    """
    found = find(name)
    model = found.model().to(pick_device(device), dtype).eval()
    tokenizer = Tokenizer.load(found.folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{found.folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}:"
            " they do not belong together"
        )
    return model, tokenizer


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{weights.CONFIG_FILE}"))


def find(name: str | Path) -> Found:
    """Where the model called `name` is. Raises UserError when it is nowhere."""
    path = Path(os.path.expanduser(name))  # leaves an unknown ~user alone
    if os.path.isdir(path):  # unlike Path.is_dir, no error for a name that no file can have
        return _in_folder(path)
    if os.path.exists(path):
        raise UserError(f"{path} is a file; give the folder that holds the model")
    if str(name) in bundled():
        return Found(ASSETS / str(name), is_hf=False)
    return Found(_in_hub_cache(str(name)), is_hf=True)


def find_config(name: str | Path) -> tuple[ModelConfig, dict[str, str]]:
    """Configuration of a model, and the dtype of each stored parameter by our names; only headers are read."""
    found = find(name)
    config = found.config()
    return config, weights.stored_dtypes(config, found.folder, found.is_hf)


def _in_folder(path: Path) -> Found:
    if (path / weights.CONFIG_FILE).is_file():
        return Found(path, is_hf=False)
    if (path / weights.HF_CONFIG_FILE).is_file():
        return Found(path, is_hf=True)
    if (path / "checkpoints").is_dir():
        if checkpoints := complete_checkpoints(path):
            return Found(checkpoints[-1], is_hf=False)
        raise UserError(f"{path}: this run has no complete checkpoint yet")
    raise UserError(
        f"{path}: no model in this folder; looked for {weights.CONFIG_FILE} (ours), {weights.HF_CONFIG_FILE}"
        " (Hugging Face), checkpoints/step-* (a run)"
    )


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. Half-written and half-copied ones are not checkpoints."""

    def is_complete(folder: Path) -> bool:
        try:
            sizes = json.loads((folder / COMPLETE_FILE).read_text())["files"]
            return all((folder / name).stat().st_size == size for name, size in sizes.items())
        except (OSError, ValueError, KeyError):
            return False

    folders = sorted((run / "checkpoints").glob("step-*"), key=lambda folder: (len(folder.name), folder.name))
    return [folder for folder in folders if is_complete(folder)]


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, then Apple's MPS, then the CPU. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} is not one of auto, cpu, cuda, mps{nearest(name, ('auto', 'cpu', 'cuda', 'mps'))}")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not available here ({first_line(error)}); use auto or cpu") from error


# ---------------------------------------------------------------------- the hub


def _in_hub_cache(name: str) -> Path:
    """Folder of a downloaded hub model."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return _snapshot(name, local_files_only=True)
    except HFValidationError as error:
        raise UserError(f"no model {name!r}: not a folder{nearest(name, bundled())}, and not a valid hub id") from error
    except LocalEntryNotFoundError as error:
        shape = f" ({name} is also a preset: a shape without weights, for `glassgpt info`)" if name in PRESETS else ""
        raise UserError(
            f"no model {name!r}{nearest(name, bundled())}. Looked for a folder of that name in {Path.cwd()}, a bundled"
            f" model ({', '.join(bundled()) or 'none'}), and a complete download in"
            f" {huggingface_hub.constants.HF_HUB_CACHE}. To fetch it from the hub: glassgpt download {name}{shape}"
        ) from error


def download(config: Download) -> Path:
    """Fetch a model into the Hugging Face cache; returns its folder.

    HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured. Pickled weights are fetched only when there are no
    safetensors. Raises UserError for an unknown or closed repository and for a network that does not answer.
    """
    from huggingface_hub import constants, errors

    repo, endpoint = config.repo, constants.ENDPOINT
    try:
        folder = _snapshot(repo, revision=config.revision)
    except errors.GatedRepoError as error:
        raise UserError(f"{repo} is gated: accept its terms at {endpoint}/{repo} and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{endpoint} has no repository {repo!r} that you may see (a private one needs HF_TOKEN)") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repo} has no revision {config.revision!r}") from error
    except errors.HFValidationError as error:
        raise UserError(f"{repo!r} is not a valid hub id: {error}") from error
    except Exception as error:  # httpx's, httpx2's or Xet's errors, by version; a full disk; an answer that is no hub's
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"HF_HUB_OFFLINE is set, so {repo} cannot be fetched; unset it") from error
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
            raise UserError(f"{endpoint} does not accept your token ({error.server_message}); correct HF_TOKEN") from error
        raise UserError(f"cannot fetch {repo} from {endpoint}: {first_line(error)}; check the network, then try again") from error
    weights.read_hf_config(folder)
    print(f"{repo}{'' if config.revision == 'main' else ', which opens by its folder,'} is in {folder}")
    return folder


def _snapshot(repo: str, **options: Any) -> Path:
    """The complete folder of a repository's files that we read."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo, allow_patterns=HUB_FILES, **options))
    if not list(folder.glob("model*.safetensors")):
        snapshot_download(repo, allow_patterns=HUB_PICKLES, **options)
    return folder
