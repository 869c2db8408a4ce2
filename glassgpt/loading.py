"""Models by name: `find`, `load`, `download`. To find one takes no PyTorch; it is imported when a network is made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from glassgpt.config import PRESETS, ModelConfig, UserError, nearest
from glassgpt.config.errors import first_line
from glassgpt.config.folder import ADAPTER_CONFIG_FILE, CONFIG_FILE, HF_CONFIG_FILE, read_config
from glassgpt.config.hub import Download
from glassgpt.text import Tokenizer
from glassgpt.text.tokenizer import VOCABULARY_FILES

if TYPE_CHECKING:
    import torch

    from glassgpt.model import GPT

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
    "adapter_config.json",
    "adapter_model.safetensors",
]
HUB_PICKLES = ["pytorch_model*.bin*"]


class Found(NamedTuple):
    """A model on this machine."""

    folder: Path
    is_hf: bool
    base: Found | None = None
    """The model that an adapter, which is all that its folder holds, stands upon."""

    def stored(self) -> Found:
        """Where the weights are: here, or where the lowest base has them."""
        return self if self.base is None else self.base.stored()

    def config(self) -> ModelConfig:
        there = self.stored()
        if not there.is_hf:
            return read_config(there.folder)
        from glassgpt.model.families import read_hf

        return read_hf(there.folder)[1]

    def model(self, dtype: torch.dtype | None = None, merge: bool = True, plain: bool = False) -> GPT:
        """The network in `dtype` (None: as stored); an adapter is added to the weights, unless `merge` is False.

        A quantised one is dequantised for an adapter, or when it must be `plain`: then None is float32, which loses nothing.
        """
        from glassgpt.model import lora, weights
        from glassgpt.model.quantised import dequantised, recipe_of

        if self.base is None:
            model = (weights.load_hf(self.folder) if self.is_hf else weights.load(self.folder)).to(dtype)
            if plain and dtype is None and recipe_of(model) is not None:
                model = model.float()  # code * scale has more digits than the scale
            return dequantised(model) if plain else model
        model = lora.load_adapter(self.base.model(dtype, plain=True), self.folder)
        return lora.merge(model) if merge else model

    def tokenizer(self) -> Tokenizer:
        """An adapter's is its base's, unless it brings one."""
        names = ("tokenizer.json", *(vocabulary for vocabulary, _ in VOCABULARY_FILES))
        if self.base is not None and not any((self.folder / name).is_file() for name in names):
            return self.base.tokenizer()
        return Tokenizer.load(self.folder)


def load(
    name: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | str | None = "float32",
    merge: bool = True,
    plain: bool = False,
) -> tuple[GPT, Tokenizer]:
    """`model, tokenizer = load(name)`; `model(ids)` gives logits (B, T, V).

    `name` is a bundled model, a run folder (its newest complete checkpoint), a folder of ours or of Hugging Face's, a hub
    id that `glassgpt download` has fetched, or the folder of an adapter, ours or `peft`'s, upon any of these. Nothing is
    downloaded here. Weights are converted to `dtype`, given itself or by name (None keeps the stored one); the model is in
    evaluation mode. An adapter is added to the weights; with `merge=False` it stays beside them (`glassgpt.model.lora`).
    A quantised model keeps its codes (`glassgpt.model.quantised`), or with `plain=True` is the float model that they stand
    for, which can be trained.
    Raises UserError saying what was looked for and where.
    """
    import torch

    number = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if number is not None and not (isinstance(number, torch.dtype) and number.is_floating_point):
        raise UserError(f"dtype must be a floating point number's, such as float32 or bfloat16; got {dtype!r}")
    found = find(name)
    model = found.model(number, merge, plain).to(pick_device(device), number).eval()
    tokenizer = found.tokenizer()
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{found.folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}:"
            " they do not belong together"
        )
    return model, tokenizer


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG_FILE}"))


def find(name: str | Path) -> Found:
    """Where the model called `name` is. Raises UserError when it is nowhere."""
    return _find(name, ())


def _find(name: str | Path, above: tuple[Path, ...]) -> Found:
    """`above` are the adapters that stand upon it, one upon the other."""
    path = Path(os.path.expanduser(name))  # leaves an unknown ~user alone
    if os.path.isdir(path):  # unlike Path.is_dir, no error for a name that no file can have
        return _in_folder(path, above)
    if os.path.exists(path):
        raise UserError(f"{path} is a file; give the folder that holds the model")
    if str(name) in bundled():
        return Found(ASSETS / str(name), is_hf=False)
    return Found(_in_hub_cache(str(name)), is_hf=True)


def lasting_name(name: str) -> str:
    """A name that stays the same model: of a run, the checkpoint that is its newest now; of a folder, from any directory."""
    folder = find(name).folder
    return str(folder.resolve()) if Path(name).expanduser().is_dir() else name


def find_config(name: str | Path) -> tuple[ModelConfig, dict[str, str]]:
    """Configuration of a model, and the dtype of each stored parameter by our names; only headers are read."""
    from glassgpt.model import weights

    found = find(name)
    config, there = found.config(), found.stored()
    return config, weights.stored_dtypes(config, there.folder, there.is_hf)


def _in_folder(path: Path, above: tuple[Path, ...] = ()) -> Found:
    if (path / ADAPTER_CONFIG_FILE).is_file():
        return Found(path, is_hf=False, base=_base(path, above))
    if (path / CONFIG_FILE).is_file():
        return Found(path, is_hf=False)
    if (path / HF_CONFIG_FILE).is_file():
        return Found(path, is_hf=True)
    if (path / "checkpoints").is_dir():
        if checkpoints := complete_checkpoints(path):
            last = checkpoints[-1]
            is_adapter = (last / ADAPTER_CONFIG_FILE).is_file()
            return Found(last, is_hf=False, base=_base(last, above) if is_adapter else None)
        raise UserError(f"{path}: this run has no complete checkpoint yet")
    raise UserError(
        f"{path}: no model in this folder; looked for {CONFIG_FILE} (ours), {HF_CONFIG_FILE}"
        f" (Hugging Face), {ADAPTER_CONFIG_FILE} (an adapter), checkpoints/step-* (a run)"
    )


def _base(adapter: Path, above: tuple[Path, ...]) -> Found:
    """What an adapter stands upon: a folder beside which it lies, or anything that `find` finds."""
    from glassgpt.model import lora

    path, name = adapter / ADAPTER_CONFIG_FILE, lora.read_settings(adapter).base_model_name_or_path
    if not name.strip():
        raise UserError(
            f"{path}: base_model_name_or_path is empty; write there the name or folder of the model below the adapter"
        )
    if adapter.resolve() in above:
        raise UserError(f"{path}: base_model_name_or_path leads back to this adapter; write there the model that it was made for")
    beside = adapter / os.path.expanduser(name)  # an absolute one is itself
    try:
        return _find(beside if os.path.isdir(beside) else name, (*above, adapter.resolve()))
    except UserError as error:
        raise UserError(f"{path} names the base {name!r}: {error}") from error


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
    import torch

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

    from glassgpt.model import lora
    from glassgpt.model.families import read_hf

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
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        lora.read_settings(folder)
    else:
        read_hf(folder)
    print(f"{repo}{'' if config.revision == 'main' else ', which opens by its folder,'} is in {folder}")
    return folder


def _snapshot(repo: str, **options: Any) -> Path:
    """The complete folder of a repository's files that we read."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo, allow_patterns=HUB_FILES, **options))
    if not list(folder.glob("*model*.safetensors")):
        snapshot_download(repo, allow_patterns=HUB_PICKLES, **options)
    return folder
