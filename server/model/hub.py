"""Models of the Hugging Face hub, in the hub's own cache."""

from __future__ import annotations

from pathlib import Path

from trtserve.server.model.errors import ModelError
from trtserve.server.model.progress import Progress

_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "LICENSE*", "NOTICE*"]
# The same weights once more, in other layouts, as some repositories have them.
_NOT_WANTED = ["original/*", "consolidated*", "onnx/*", "metal/*"]


def download(repository: str, progress: Progress) -> Path:
    """Fetch what serving needs of a repository, or find it in the cache; blocks. The library draws its own bars.

    Raises ModelError if the hub cannot be reached or does not hand the repository out.
    """
    # Imported here: it costs 0.3 s, and a server of a local folder needs nothing of it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    progress(f"fetching {repository}", 0, 0)
    try:
        return Path(snapshot_download(repository, allow_patterns=_PATTERNS, ignore_patterns=_NOT_WANTED))
    except GatedRepoError as error:
        raise ModelError(f"{repository} is gated: accept its licence on its page and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no {repository}, or only for those with an HF_TOKEN that may see it") from error
    except Exception as error:  # the library lets errors of its HTTP client through
        raise ModelError(
            f"{repository} cannot be fetched from the Hugging Face hub ({type(error).__name__}: {error}). "
            "Without access to it, copy the model's folder here from a machine that has it and give its path as MODEL"
        ) from error
