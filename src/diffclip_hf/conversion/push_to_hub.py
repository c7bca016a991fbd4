"""Upload a model's folder to the Hugging Face Hub, with a model card, in one commit.

  python conversion/push_to_hub.py diffclip-vitb16 ORG/NAME --dataset cc12m
  python -m diffclip_hf.conversion.push_to_hub diffclip-vitb16 ORG/NAME --dataset cc12m

The first form is for a clone of the repository, the second for an installed package.
"""

import argparse
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from diffclip_hf import DiffCLIPConfig, DiffCLIPModel, DiffCLIPProcessor, add_remote_code

from ..common.commands import CommandParser, run_command, started_as
from ..common.json_files import json_text, read_json_object
from ..common.loading import load_config, load_processor
from ..common.remote_code import CODE_FILES, WEIGHTS, files_to_share
from ..model.hub_cache_diffclip import sha256_of
from ..model.image_fetching_diffclip import one_line
from .convert_to_original import check_layers
from .model_card import Card, render_card
from .parity_gate import MAX_ERROR
from .report import REPORT_FILE


logger = logging.getLogger("push_to_hub")

PICKLES = {".bin", ".ckpt", ".h5", ".joblib", ".msgpack", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
DTYPES = ("F32", "F16", "BF16", "F64")
CARD_FILE = "README.md"
REQUIRED = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")


class PushError(ValueError):
    """The folder or an option doesn't fit, or the Hub refused; the message says which, and what is expected."""


def check_folder(folder: Path) -> list[Path]:
    """Return the files of a folder that are to be uploaded, weights first.

    Raises:
        PushError: The folder isn't one of a whole DiffCLIP model with its processor, or holds pickles.
    """
    if not folder.is_dir():
        raise PushError(f"DIR {folder} is not a folder.")
    pickles = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in PICKLES)
    if pickles:
        raise PushError(
            f"DIR {folder} holds {', '.join(pickles)}; only safetensors are uploaded, since a pickle can run code."
        )
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        raise PushError(f"DIR {folder} has no {', '.join(missing)}; save model, image processor and tokenizer there.")
    config = read_json_object(folder / "config.json")
    if config.get("model_type") != "diffclip" or config.get("architectures") != ["DiffCLIPModel"]:
        raise PushError(
            f"DIR {folder} holds a {config.get('model_type')!r} of class {config.get('architectures')}; it must be a "
            "'diffclip' of class ['DiffCLIPModel']."
        )
    try:
        files = files_to_share(folder, also=[REPORT_FILE, CARD_FILE])
    except ValueError as error:
        raise PushError(f"DIR {error}") from error
    check_weights([path for path in files if path.suffix == ".safetensors"], folder)
    try:
        load_processor(folder, load_config(folder, DiffCLIPConfig), DiffCLIPProcessor)
    except ValueError as error:
        raise PushError(f"DIR {folder}: {error}") from error
    return files


def check_weights(weights: Iterable[Path], folder: Path) -> None:
    """Raise a PushError unless files are whole and hold the tensors of the folder's configuration, and no others."""
    found: dict[str, list[int]] = {}
    for path in weights:
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise PushError(f"{path} can't be read as safetensors: {error}") from error
        for name, tensor in slices.items():
            if name in found:
                raise PushError(f"{path} gives {name!r} anew, which another shard has.")
            if tensor.get_dtype() not in DTYPES:
                raise PushError(f"{path}: {name!r} is of {tensor.get_dtype()}; it must be of {', '.join(DTYPES)}.")
            found[name] = tensor.get_shape()
    try:
        config = DiffCLIPConfig.from_pretrained(folder)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise PushError(f"{folder / 'config.json'} is not valid: {error}") from error
    check_layers(found, config)
    with torch.device("meta"):
        model = DiffCLIPModel(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if found != expected:
        names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise PushError(
            f"DIR {folder}: the weights aren't those of config.json, which differ in {', '.join(names[:3])}"
            f"{' and others' if len(names) > 3 else ''}: {names[0]} has shape {found.get(names[0])}; it must have "
            f"{expected.get(names[0])}."
        )


def check_report(folder: Path) -> dict[str, Any] | None:
    """Return the conversion's report, None where there is none.

    Raises:
        PushError: The report isn't the conversion's, its errors are beyond the limit, or the folder's files aren't
            those that it speaks of.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        logger.warning("%s has no %s, so its numbers weren't checked against the original's.", folder, REPORT_FILE)
        return None
    report = read_json_object(path)
    try:
        largest, limit = float(report["gate"]["largest_error"]), float(report["gate"]["limit"])
        hashes = {str(name): str(about["sha256"]) for name, about in report["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PushError(
            f"{path} is no report of the conversion ({type(error).__name__}: {error}); it must have "
            "gate.largest_error, gate.limit and the sha256 of files."
        ) from error
    # NaN is not within the limit.
    if not largest <= min(limit, MAX_ERROR):
        raise PushError(
            f"{path} says that the model departs from the original by {largest:.1e} of the largest magnitude; at most "
            f"{min(limit, MAX_ERROR):.0e} is uploaded."
        )
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise PushError(f"{path} speaks of {name}, which {folder} hasn't.")
        if name not in CODE_FILES and sha256_of(folder / name) != expected:
            raise PushError(
                f"{folder / name} has changed since the conversion that {path} reports; convert again, or remove the "
                "report."
            )
    return report


def without_auto_map(content: Any) -> Any:
    """Return a JSON value without the key `auto_map`, at any depth."""
    if isinstance(content, dict):
        return {key: without_auto_map(value) for key, value in content.items() if key != "auto_map"}
    return [without_auto_map(value) for value in content] if isinstance(content, list) else content


def assemble(files: Iterable[Path], remote_code: bool, card: Card, folder: Path) -> dict[str, Path]:
    """Put what differs from DIR into `folder`, and return every file of the repository.

    Args:
        files: Of DIR; none is changed, and weights aren't copied.
        remote_code: Whether the code travels along.
        card: What the model card says, where the files have none.
        folder: An empty folder.

    Returns:
        Name in the repository → path.
    """
    repository: dict[str, Path] = {}
    for path in files:
        repository[path.name] = path
        if not WEIGHTS.fullmatch(path.name):
            repository[path.name] = folder / path.name
            shutil.copyfile(path, folder / path.name)
    if remote_code:
        add_remote_code(folder)
        repository |= {name: folder / name for name in CODE_FILES}
    else:
        for path in folder.glob("*.json"):
            content = read_json_object(path)
            if content != (kept := without_auto_map(content)):
                path.write_text(json_text(kept), encoding="utf-8")
    if CARD_FILE in repository:
        logger.warning("DIR has a %s of its own, which becomes the model card. Remove it to get ours.", CARD_FILE)
    else:
        repository[CARD_FILE] = folder / CARD_FILE
        repository[CARD_FILE].write_text(render_card(card), encoding="utf-8")
    return repository


def upload(repository: dict[str, Path], args: argparse.Namespace) -> bool:
    """Bring the Hub's repository to these files in one commit, the last thing that is sent.

    Weights and code files that an earlier upload left and that aren't among these are deleted in the same commit.

    Args:
        repository: Name in the repository → path.
        args: The command line's.

    Returns:
        Whether a commit was made; False where the Hub had all of it.

    Raises:
        PushError: `--private` is given for a repository that is public.
        Exception: The Hub refused, or failed for longer than the client tries; of the types of the client's library.
    """
    api = HfApi(token=args.token)
    api.create_repo(args.repo_id, private=args.private or None, exist_ok=True)
    if args.private and not api.repo_info(args.repo_id).private:
        raise PushError(f"--private is given, and {args.repo_id} exists and is public; change that in its settings.")
    if args.revision is not None:
        api.create_branch(args.repo_id, branch=args.revision, exist_ok=True)
    before = api.repo_info(args.repo_id, revision=args.revision).sha
    there = api.list_repo_files(args.repo_id, revision=before)
    stale = [name for name in there if name not in repository and (name in CODE_FILES or WEIGHTS.fullmatch(name))]
    commit = api.create_commit(
        args.repo_id,
        [
            *(CommitOperationAdd(name, path) for name, path in sorted(repository.items())),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message="Upload DiffCLIP",
        revision=args.revision,
        # Somebody else's commit since the listing is an error, not overwritten.
        parent_commit=before,
    )
    return commit.oid != before


def push(args: argparse.Namespace) -> None:
    """Upload as the command line says."""
    folder = Path(args.folder).expanduser()
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        raise PushError(f"ORG/NAME is {args.repo_id!r}: {error}") from error
    if args.repo_id.count("/") != 1:
        raise PushError(f"ORG/NAME is {args.repo_id!r}; it must be an owner and a name with a slash between.")
    files = check_folder(folder)
    report = check_report(folder)
    with tempfile.TemporaryDirectory(prefix="push-to-hub-") as beside:
        card = Card(
            args.repo_id, args.revision, folder, report, args.remote_code, args.dataset, args.source_repo, args.license
        )
        repository = assemble(files, args.remote_code, card, Path(beside))
        if args.dry_run:
            for name, path in sorted(repository.items()):
                sys.stdout.write(f"{path.stat().st_size:>12,}  {name}\n")
            logger.info("--dry-run: nothing was sent; %s has not been asked.", args.repo_id)
            return
        try:
            new = upload(repository, args)
        except PushError:
            raise
        except Exception as error:
            # The client's HTTP library, and so the error's type, is another one in each of its major versions.
            raise PushError(
                f"Pushing to {args.repo_id} failed: {reason_of(error)} A repository changes by its one last commit or "
                "not at all; running the command again sends only what the Hub hasn't got."
            ) from error
    if new:
        logger.info("Pushed %d files to %s.", len(repository), args.repo_id)
    else:
        logger.info("%s has all of it already: no commit was made.", args.repo_id)


def reason_of(error: BaseException) -> str:
    """Return, in one line, what went wrong and what that came from."""
    reasons: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        text = one_line(cause)
        if not any(text in reason for reason in reasons):
            reasons.append(text)
        cause = cause.__cause__
    return "; ".join(reasons).rstrip(".") + "."


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = CommandParser(
        prog=started_as("diffclip_hf.conversion.push_to_hub"),
        usage="%(prog)s DIR ORG/NAME [OPTIONS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="A folder that the conversion or save_pretrained wrote.")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="The repository. It is made if it isn't there.")
    parser.add_argument("--private", action="store_true", help="If the repository is new, make it private.")
    parser.add_argument(
        "--revision", metavar="BRANCH", help="The branch. It is made if it isn't there. (default: main)"
    )
    parser.add_argument(
        "--remote-code",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Upload the model's code too, for trust_remote_code=True. (default: yes)",
    )
    parser.add_argument(
        "--token", metavar="TOKEN", help="A token that may write. (default: HF_TOKEN, or that of `hf auth login`)"
    )
    parser.add_argument(
        "--dataset",
        choices=["cc3m", "cc12m"],
        help="What the model was trained on. (default: known by the original's repository)",
    )
    parser.add_argument(
        "--source-repo", metavar="ID", help="The original's repository. (default: what the conversion's report says)"
    )
    parser.add_argument(
        "--license",
        default="unknown",
        metavar="ID",
        help="The weights' licence, by its name on the Hub. (default: unknown)",
    )
    parser.add_argument("--dry-run", action="store_true", help="List the files and their sizes, and send nothing.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1, with the reason on the log, where the folder doesn't fit or the Hub refuses."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    args = parse_args(argv)
    return run_command(lambda: push(args), logger)


if __name__ == "__main__":
    sys.exit(main())
