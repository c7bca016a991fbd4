"""Fetch a checkpoint of the original code from the Hub."""

import argparse
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..common.commands import first_line
from ..model.hub_cache_diffclip import check_cached_file
from .original_checkpoint import ConversionError


# The authors' repositories that hold a checkpoint → the paper's model in it, which also says its λ_init.
KNOWN_REPOSITORIES = {
    "hammh0a/DiffCLIP_ViTB16_CC12M": "diffclip",
    "hammh0a/DiffCLIP_ViTB16_CC3M": "diffclip",
    "hammh0a/ViTB16_CC12M": "clip",
    "hammh0a/ViTB16_CC3M": "clip",
    # Of SynthCLIP, by the same authors and code.
    "hammh0a/ViTB16-CC12M": "clip",
    "hammh0a/SynthCLIP_ViTB16_10M": "clip",
    "hammh0a/SynthCLIP_ViTB16_20M": "clip",
    "hammh0a/SynthCLIP_ViTB16_30M": "clip",
}


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is read of the Hub, and as whom."""
    parser.add_argument(
        "--revision", metavar="REV", help="The repository's branch, tag or commit. (default: its main branch)"
    )
    parser.add_argument(
        "--token", metavar="TOKEN", help="A token of the Hub. (default: HF_TOKEN, or that of `hf auth login`)"
    )


def download_checkpoint(repo_id: str, filename: str, revision: str | None, token: str | None) -> tuple[Path, str]:
    """Return the path of a repository's file in the Hub's cache, fetched if it isn't there, and its commit.

    Args:
        repo_id: `owner/name` of a model repository.
        filename: The file's path in it.
        revision: A branch, tag or commit; the default branch where None.
        token: An access token; the one of `hf auth login` or `HF_TOKEN` where None.

    Raises:
        ConversionError: There is no such repository, revision or file, access is refused, the Hub can't be reached, or
            the file isn't the one that the Hub announced; the message names the option to change.
    """
    try:
        path = Path(hf_hub_download(repo_id, filename, revision=revision, token=token))
    except HFValidationError as error:
        raise ConversionError(f"--repo-id {repo_id} is no repository id, which is owner/name: {error}") from error
    except GatedRepoError as error:
        raise ConversionError(
            f"--repo-id {repo_id} asks its readers to accept conditions: accept them on its page, then pass --token "
            "or log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ConversionError(
            f"--repo-id {repo_id} doesn't exist, or is private and the token has no access to it: check the spelling, "
            "and pass --token or log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ConversionError(f"--revision {revision} is no branch, tag or commit of {repo_id}.") from error
    except LocalEntryNotFoundError as error:
        # What the client makes of every other failure before the first byte, where its cache hasn't the file.
        if isinstance(error.__cause__, HfHubHTTPError):
            raise ConversionError(f"--repo-id {repo_id}: {_refusal(error.__cause__)}") from error
        raise ConversionError(
            f"--repo-id {repo_id}: {filename} isn't in the cache and the Hub can't be reached ({_cause(error)}). "
            "Check the connection and HF_HUB_OFFLINE, or pass --checkpoint with a file fetched in another way."
        ) from error
    except EntryNotFoundError as error:
        raise ConversionError(f"--filename {filename} is no file of {repo_id} at {revision or 'its main'}.") from error
    except HfHubHTTPError as error:
        raise ConversionError(f"--repo-id {repo_id}: {_refusal(error)}") from error
    except Exception as error:
        # A full disk, a file of another size than announced, a connection lost for good: the client's HTTP library,
        # and so the error's type, is another one in each of its major versions. It leaves no such file in its cache.
        raise ConversionError(
            f"--repo-id {repo_id}: {filename} could not be fetched whole ({_cause(error)}); the next try resumes it."
        ) from error
    try:
        check_cached_file(path)
    except OSError as error:
        raise ConversionError(f"--repo-id {repo_id}: {error}") from error
    # The cache keeps a file at .../snapshots/COMMIT/FILENAME.
    return path, path.parts[len(path.parts) - 1 - len(Path(filename).parts)]


def _cause(error: BaseException) -> str:
    """Return what the client met first, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _refusal(error: HfHubHTTPError) -> str:
    """Return what a status of the Hub means for the person, and what to do."""
    status = getattr(error.response, "status_code", None)
    if status == 401:
        return "the Hub doesn't accept the token (401); pass another with --token, or log in with `hf auth login`."
    if status == 403:
        return "the token has no access to this repository (403); pass another with --token."
    if status == 429:
        return "the Hub asks to slow down (429); try again in some minutes, or pass --token, which allows more."
    return f"the Hub answered {status}: {_cause(error)}"
