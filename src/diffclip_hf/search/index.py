"""Pictures that are embedded once, and searched by texts, pictures or embeddings."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import PreTrainedModel, ProcessorMixin

from ..common.embedding_cache import EmbeddingCache
from ..common.keys import UnknownContentError
from ..common.loading import check_path
from ..common.whole_files import check_output_file
from ..evaluation.encoder import Encoder
from ..zero_shot import (
    IMAGE_SUFFIXES,
    image_sources,
    is_single,
    label_texts,
    mean_label_embeds,
    pixel_values_of,
)
from .files import read_rows, write_rows
from .folders import embed_folder, identity_of
from .nearest import ROWS_AT_ONCE, Nearest, make_nearest, ranked
from .pictures import embed_pictures


FORMAT = "diffclip_hf image index 1"
TEMPLATE = "{}"


class Match(NamedTuple):
    """A picture that was found.

    Args:
        score: The cosine similarity of its embedding and the query's, -1..1.
        name: Its path, or what it was added as.
    """

    score: float
    name: str


class Snapshot(NamedTuple):
    """What an index holds at one moment, which stays as it is.

    Args:
        names: The pictures'.
        embeds: float32, (pictures, width).
        nearest: Finds rows of them.
    """

    names: tuple[str, ...]
    embeds: torch.Tensor
    nearest: Nearest


def _of_length_1(rows: torch.Tensor) -> torch.Tensor:
    """Return rows that aren't zeros, L2-normalised, float32."""
    rows = rows.double()
    # The squares of what is very large or very small would be infinite, or 0, in float64 too.
    return normalize(rows / rows.abs().amax(dim=1, keepdim=True), dim=1).float()


def _as_embeds(value: Any, argument: str) -> torch.Tensor | None:
    """Return embeddings, float32, (rows, width), on the CPU, of length 1; None where the value is something else.

    Args:
        value: Of whatever kind.
        argument: What it was given as, for errors.

    Raises:
        ValueError: One isn't of real numbers, isn't finite, or has no direction.
    """
    if not isinstance(value, (np.ndarray, torch.Tensor)) or value.ndim not in (1, 2):
        return None
    try:
        # torch takes no negative strides, and warns of what can't be written.
        embeds = torch.as_tensor(
            np.require(value, requirements=["C", "W"]) if isinstance(value, np.ndarray) else value
        )
    except TypeError:
        embeds = None
    if embeds is None or embeds.is_complex():
        raise ValueError(f"{argument} is an array of {value.dtype}; embeddings must be of real numbers.")
    embeds = embeds.detach().cpu()
    embeds = embeds[None] if embeds.ndim == 1 else embeds
    if len(wrong := (~embeds.isfinite()).nonzero()):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"{argument} has {embeds[row, column].item()} in its embedding {row}; every number must be finite."
        )
    if len(wrong := (~embeds.bool().any(dim=1)).nonzero()):
        raise ValueError(f"{argument} has an embedding {wrong[0].item()} of all zeros, which has no direction.")
    return torch.cat([_of_length_1(rows) for rows in embeds.split(ROWS_AT_ONCE)]) if len(embeds) else embeds.float()


def _as_names(names: Any) -> list[str]:
    """Return one name, or several, as strings.

    Raises:
        ValueError: It's something else.
    """
    listed = [names] if isinstance(names, (str, os.PathLike)) else names
    if isinstance(listed, bytes) or not isinstance(listed, Iterable):
        raise ValueError(f"names is {names!r:.200}; it must be a string or a path, or several of them.")
    found = [os.fspath(name) if isinstance(name, os.PathLike) else name for name in listed]
    if wrong := [name for name in found if not isinstance(name, str)]:
        raise ValueError(f"names has {wrong[0]!r:.200}; each must be a string or a path.")
    return found


def _as_queries(queries: Any) -> tuple[list[Any], bool]:
    """Return the queries, and whether it's a single one.

    Raises:
        ValueError: It's neither a query nor several.
    """
    one = isinstance(queries, (str, os.PathLike)) or is_single(queries)
    if isinstance(queries, (np.ndarray, torch.Tensor)):
        # Of embeddings there are two dimensions, where a picture's array has three.
        one = queries.ndim in (1, 3)
    if one:
        return [queries], True
    if isinstance(queries, Mapping) or not isinstance(queries, Iterable) or getattr(queries, "ndim", 1) == 0:
        raise ValueError(
            f"queries is {queries!r:.200}; it must be a text, a picture, an embedding, or a list of them."
        )
    return list(queries), False


class ImageIndex:
    """Pictures' embeddings with their names, to be searched, by several threads at once if need be.

    A search sees the index as it was at one moment, whatever other threads add and remove.

    A score is the cosine similarity of a query's embedding and a picture's, -1..1. The best come first, and equal
    scores by name.

    Args:
        model: Any of Transformers' with `get_image_features` and `get_text_features`: `DiffCLIPModel`, `CLIPModel`,
            `SiglipModel`. It's put into evaluation mode.
        processor: Its processor, with a `tokenizer` and an `image_processor`.
        backend: `"exact"` compares a query with every picture. `"hnswlib"`, `"faiss"` and `"faiss:FACTORY"`, with what
            `faiss.index_factory` takes, are approximate: they miss some of the best. What they find is ranked by the
            exact scores.
        batch_size: Pictures that are embedded at once; by default 8 on a CPU, else 64.
        num_workers: Processes that read pictures from paths, URLs and bytes; by default as many as there are cores, up
            to 32.

    Attributes:
        left_out: The pictures that couldn't be read and haven't been added since, name → why.

    Raises:
        ValueError: As `Encoder` raises, or there is no such backend.
        ImportError: The backend's package isn't installed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        backend: str = "exact",
        batch_size: int | None = None,
        num_workers: int | None = None,
    ):
        self.encoder = Encoder(model, processor, batch_size=batch_size, num_workers=num_workers)
        self.backend = backend
        self.left_out: dict[str, str] = {}
        self._lock = Lock()
        # What the lock guards: name → embedding, in the order of adding; what finds them, of which another takes the
        # place where rows change their places; and both as they are, once something asks for it.
        self._rows: dict[str, torch.Tensor] = {}
        self._nearest = make_nearest(backend)
        self._snapshot: Snapshot | None = None

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        cache_dir: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> "ImageIndex":
        """Return an index of a folder's pictures, its sub-folders' among them, as they are now.

        Those that can't be read are left out; a warning names them.

        Args:
            folder: Its pictures are found as `image_files` finds them.
            model: As in the class.
            processor: Likewise.
            cache_dir: A folder where embeddings are kept, so that the next time only new and changed pictures are
                embedded, as long as the weights, the preprocessing, the versions and the kind of device are the same.
                They're kept while the work goes on, so that it can be interrupted.
            kwargs: As in the class.

        Raises:
            ValueError: It isn't a folder, has no pictures, or none can be read.
            OSError: Nothing can be written in `cache_dir`.
        """
        index = cls(model, processor, **kwargs)
        cache = EmbeddingCache(cache_dir)
        cache.check()
        names, embeds, index.left_out = embed_folder(folder, index.encoder, cache.folder)
        index._fill(names, embeds)
        return index

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def names(self) -> tuple[str, ...]:
        """The pictures' names, in the order of adding."""
        with self._lock:
            return tuple(self._rows)

    @property
    def embeds(self) -> torch.Tensor:
        """Their embeddings, L2-normalised, float32, (pictures, width), on the CPU."""
        return self._as_it_is().embeds

    def add(self, images: Any, names: Iterable[str] | None = None, *, skip_unreadable: bool = False) -> None:
        """Add pictures; one whose name is there already takes its place.

        Args:
            images: Paths, folders, Pillow images and whatever else `read_image` reads, one or several; or embeddings,
                (pictures, width), of this model.
            names: What they are called; by default their paths. Embeddings and pictures in memory need names.
            skip_unreadable: Whether pictures that can't be read are entered in `left_out`, rather than an error.

        Raises:
            ValueError: A name is missing or given twice; embeddings have another width or no direction; or a picture
                can't be read, before anything is added.
        """
        embeds = _as_embeds(images, "images")
        if embeds is not None and names is None:
            raise ValueError("Embeddings need names; pass names.")
        sources = list(image_sources(images)[0]) if embeds is None else embeds.unbind()
        found = _as_names([_name_of(*one) for one in enumerate(sources)] if names is None else names)
        if len(found) != len(sources):
            raise ValueError(f"There are {len(found)} names for {len(sources)} pictures.")
        if len(set(found)) < len(found):
            raise ValueError(f"The name {Counter(found).most_common(1)[0][0]!r} is given twice.")
        if embeds is None:
            rows, left_out = self._embed(sources, [f"{name!r:.200}" for name in found], skip_unreadable)
        else:
            rows, left_out = dict(enumerate(sources)), {}
        self._put(
            {found[index]: rows[index] for index in sorted(rows)},
            {found[index]: reason for index, reason in left_out.items()},
        )

    def remove(self, names: str | os.PathLike | Iterable[str]) -> None:
        """Remove pictures by their names.

        Raises:
            ValueError: There's no such picture.
        """
        gone = set(_as_names(names))
        with self._lock:
            if unknown := gone - self._rows.keys():
                raise ValueError(f"The index has no {min(unknown)!r}.")
            self._rows = {name: row for name, row in self._rows.items() if name not in gone}
            self._nearest, self._snapshot = make_nearest(self.backend), None

    def search(self, queries: Any, top_k: int = 10, templates: str | Sequence[str] = TEMPLATE) -> list[Any]:
        """Return the pictures that are most similar to a query, or a list of them for each of several queries.

        Args:
            queries: One or several: texts; pictures, as paths of `pathlib`, Pillow images, bytes or arrays of three
                dimensions; embeddings, (width,) or (queries, width).
            top_k: How many pictures to return of each, or all if there are fewer.
            templates: Sentences with {} for the text, whose embeddings are averaged, as `ZeroShotClassifier` does.

        Returns:
            `Match`es, the best first; of several queries a list for each.

        Raises:
            ValueError: A query is empty, can't be read, is a string that names a picture's file, isn't finite, or has
                another width than the index; `top_k` is below 1; or a template has no {}.
        """
        if not isinstance(top_k, Integral) or isinstance(top_k, bool) or top_k < 1:
            raise ValueError(f"top_k is {top_k!r}; it must be a whole number of at least 1.")
        listed, one = _as_queries(queries)
        if not listed:
            return []
        vectors = self._embed_queries(listed, templates)
        names, embeds, nearest = self._as_it_is()
        if not names:
            return [] if one else [[] for _ in listed]
        if vectors.shape[1] != embeds.shape[1]:
            raise ValueError(f"A query's embedding has {vectors.shape[1]} numbers; the index has {embeds.shape[1]}.")
        count = min(int(top_k), len(names))
        candidates = nearest.candidates(embeds, vectors, count)
        results = [
            [Match(*pair) for pair in ranked(embeds, names, vector, rows, count)]
            for vector, rows in zip(vectors, candidates, strict=True)
        ]
        return results[0] if one else results

    def save(self, path: str | os.PathLike) -> None:
        """Write the index as one safetensors file, which replaces an older one at once.

        Raises:
            ValueError: It can't be known by its content which model it is of, as where weights are offloaded.
            OSError: It can't be written.
        """
        check_output_file(path)
        try:
            key = {"format": FORMAT, "model": identity_of(self.encoder), "backend": self.backend}
        except UnknownContentError as error:
            raise ValueError(
                f"The index can't be saved, for it can't be known of which model it is: {error}."
            ) from error
        names, embeds, nearest = self._as_it_is()
        write_rows(Path(path), key, list(names), embeds, nearest.to_bytes(embeds) if names else None)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        backend: str | None = None,
        **kwargs: Any,
    ) -> "ImageIndex":
        """Return an index that `save` wrote.

        Args:
            path: The file. FAISS and hnswlib trust what they read, so take one with their part from no stranger.
            model: The model that the pictures were embedded with.
            processor: Its processor.
            backend: As in the class; by default the one that was saved.
            kwargs: As in the class.

        Raises:
            ValueError: There's no such file, it's damaged or another kind of file, or it was made with other weights
                or preprocessing.
            OSError: The file can't be read.
            ImportError: The backend's package isn't installed.
        """
        file = check_path(path, "path")
        if not file.is_file():
            raise ValueError(f"path is {os.fspath(path)!r}, which isn't a file; it must be one that save wrote.")
        key, names, embeds, extra = read_rows(file)
        if key.get("format") != FORMAT:
            raise ValueError(f"{os.fspath(path)!r} isn't an index of this version.")
        index = cls(model, processor, backend=backend or key["backend"], **kwargs)
        here = identity_of(index.encoder)
        if differing := [part for part in here if key["model"].get(part) != here[part]]:
            raise ValueError(
                f"{os.fspath(path)!r} was made with another model: its {' and '.join(differing)} differ"
                f"{'s' if differing == ['preprocessing'] else ''} from this model's. Embed the pictures again."
            )
        index._fill(names, embeds)
        if extra is not None and index.backend == key["backend"]:
            index._nearest.from_bytes(extra, embeds)
        return index

    def _fill(self, names: Sequence[str], embeds: torch.Tensor) -> None:
        """Become an index of these, as one that's new."""
        self._rows = dict(zip(names, embeds.unbind(), strict=True))
        self._snapshot = Snapshot(tuple(names), embeds, self._nearest)

    def _put(self, rows: Mapping[str, torch.Tensor], left_out: dict[str, str]) -> None:
        """Take embeddings, (width,), by their names, all or none, and what was left out of them, name → why."""
        with self._lock:
            width = len(next(iter(self._rows.values()))) if self._rows else None
            if wrong := [len(row) for row in rows.values() if width not in (None, len(row))]:
                raise ValueError(f"The embeddings have {wrong[0]} numbers; the index has {width}.")
            if rows.keys() & self._rows.keys():
                self._nearest = make_nearest(self.backend)
            self._rows |= rows
            self._snapshot = None
            # A new one, for another thread may be going through the old one.
            self.left_out = {name: why for name, why in self.left_out.items() if name not in rows} | left_out

    def _as_it_is(self) -> Snapshot:
        """Return what the index holds now, put together once."""
        with self._lock:
            if self._snapshot is None:
                embeds = torch.stack(list(self._rows.values())) if self._rows else torch.empty(0, 0)
                self._snapshot = Snapshot(tuple(self._rows), embeds, self._nearest)
            return self._snapshot

    def _embed(
        self, sources: Sequence[Any], called: Sequence[str], skip_unreadable: bool
    ) -> tuple[dict[int, torch.Tensor], dict[int, str]]:
        """Return the embedding of each picture, by its index, or why it can't be read.

        Args:
            sources: The pictures.
            called: What errors call them.
            skip_unreadable: Whether one that can't be read is no error.
        """
        image_processor = self.encoder.processor.image_processor

        def read(source: Any) -> tuple[str | None, torch.Tensor | None]:
            try:
                return None, pixel_values_of(image_processor, source)
            except ValueError as error:
                return str(error), None

        sendable = all(isinstance(source, (str, os.PathLike, bytes)) for source in sources)
        found: dict[int, torch.Tensor] = {}
        left_out: dict[int, str] = {}
        for index, reason, embed in embed_pictures(self.encoder, sources, read, sendable=sendable):
            if embed is not None:
                found[index] = embed
            elif skip_unreadable:
                left_out[index] = str(reason)
            else:
                raise ValueError(f"{called[index]} can't be read: {reason}")
        return found, left_out

    def _embed_queries(self, queries: Sequence[Any], templates: str | Sequence[str]) -> torch.Tensor:
        """Return the queries' embeddings, L2-normalised, float32, (queries, width), on the CPU."""
        found: dict[int, torch.Tensor] = {}
        texts = {index: query for index, query in enumerate(queries) if isinstance(query, str)}
        for text in texts.values():
            _check_query(text)
        if texts:
            _, filled, owners = label_texts(list(texts.values()), templates)
            embeds = mean_label_embeds(self.encoder.text_embeds(filled), owners, len(texts))
            found |= dict(zip(texts, embeds.unbind(), strict=True))
        pictures = []
        for index, query in enumerate(queries):
            if index not in texts:
                given = _as_embeds(query, f"queries[{index}]")
                if given is None:
                    pictures.append(index)
                elif len(given) != 1:
                    raise ValueError(f"A query is an array of shape {tuple(query.shape)}; it must be (width,).")
                else:
                    found[index] = given[0]
        called = [_query_name(index, queries[index]) for index in pictures]
        embedded, _ = self._embed([queries[index] for index in pictures], called, False) if pictures else ({}, {})
        found |= {pictures[place]: embed for place, embed in embedded.items()}
        widths = {len(embed) for embed in found.values()}
        if len(widths) > 1:
            raise ValueError(f"The queries' embeddings have different widths: {', '.join(map(str, sorted(widths)))}.")
        return torch.stack([found[index] for index in range(len(queries))])


def _name_of(index: int, source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, Mapping) and source.get("path"):
        return source["path"]
    raise ValueError(f"Picture {index} is of type {type(source).__name__}, which has no path; pass names.")


def _query_name(index: int, query: Any) -> str:
    return f"{os.fspath(query)!r:.200}" if isinstance(query, os.PathLike) else f"queries[{index}]"


def _check_query(text: str) -> None:
    """Raise a ValueError for a text that is empty, or names a picture's file, which is meant as a picture."""
    if not text.strip():
        raise ValueError("A query is empty.")
    if os.path.splitext(text)[1].lower() in IMAGE_SUFFIXES and os.path.isfile(text):
        raise ValueError(f"The query {text!r} is a text, and there is a file of that name; pass Path({text!r}).")


__all__ = ["ImageIndex", "Match"]
