"""Where a model looks: relevance of patches and tokens for a score, attention maps, and pictures of both.

How the signed map of differential attention enters relevance. The method of Chefer et al. takes from a layer the
matrix A by which values are mixed, A·v, and its gradient. In differential attention that matrix is M = A1 − λ·A2 of
each pair: the layer's output is M·v, and what comes after, the pair's RMSNorm among it, is part of the function whose
gradient is taken, as the output projection is for A. So a layer's relevance is the mean over pairs of (∂S/∂M)⁺ ⊙ M⁺,
with ∂S/∂M = ∂S/∂A1, since A1 enters M as it is. A is never negative, so for A this is the method's (∂S/∂A ⊙ A)⁺; of M
it counts the places that the layer looks at, M > 0, where looking raises the score. An entry below 0 is a place whose
content is taken away. That can raise a score too, where its gradient is negative, but for being the opposite of what
is asked for: it's the other object of a picture that is subtracted. Taking the two softmax maps as heads of their own
would count what both share, the noise that the subtraction removes. Where both maps are equal, and λ < 1, the
relevance is what the method gives for that one map.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize, one_hot
from transformers import PreTrainedModel

from .common.commands import require_extra
from .model.attention_diffclip import differential_attention_map
from .model.inputs_diffclip import check_input_ids, check_pixel_values, check_text_companion
from .model.modeling_diffclip import DiffCLIPPreTrainedModel
from .model.offloading_diffclip import check_has_weights, check_passes_gradients, execution_device, logit_scale_factor


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("first", "second", "difference")
# Tower → the names of its module and of its projection, in DiffCLIPModel and in CLIPModel.
TOWERS = {"image": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}
# Of matplotlib; the signed one is white in the middle. Strong colours are dark, so pictures under them are faded.
POSITIVE_COLOURS, SIGNED_COLOURS = "YlOrRd", "RdBu_r"
FADING = 0.4
# How much of the picture the strongest colour of an overlay covers.
OPACITY = 0.85


def image_relevance(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    first_layer: int = 0,
    interpolate_pos_encoding: bool = False,
) -> np.ndarray:
    """Return how much each patch of an image adds to its score with a text: the class token's relevance.

    For every image and text, S = exp(logit_scale) · cosine similarity; from R = 1, each layer of the image tower adds
    Ā·R to R, with Ā the mean over heads of (∂S/∂A)⁺ ⊙ A, or over pairs of (∂S/∂M)⁺ ⊙ M⁺ with M = A1 − λ·A2 (see
    the module). The result is the class token's row of R, without its own column.

    Args:
        model: A `DiffCLIPModel`, or Transformers' `CLIPModel` with `attn_implementation="eager"`, in evaluation mode.
            Its parameters and their gradients stay as they are.
        pixel_values: (images, channels, height, width).
        input_ids, attention_mask: (texts, tokens).
        first_layer: The first layer that counts; -1 takes the last alone, as the authors' CLIP notebook does.
        interpolate_pos_encoding: As in the model.

    Returns:
        (images, texts, height / patch_size, width / patch_size), float32, not negative. Its scale depends on the
        model, so compare places in one map rather than two models' values.

    Raises:
        ValueError: The model is in training mode, under an implementation without maps, on the meta device or lacks a
            tower, or there's no such layer; and as the model raises.

    Source: Chefer et al. 2021, arXiv 2103.15679, equations 5 and 6; the authors' CLIP notebook.
    """
    images, texts = (pixel_values, interpolate_pos_encoding), (input_ids, attention_mask)
    rows = _pooled_relevance(model, "image", images, texts, first_layer)
    return rows[:, :, 1:].unflatten(-1, _grid(model, pixel_values)).cpu().numpy()


def text_relevance(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    first_layer: int = 0,
    interpolate_pos_encoding: bool = False,
) -> np.ndarray:
    """Return how much each token of a text adds to its score with an image: the end-of-text token's relevance.

    The method, arguments and errors are those of `image_relevance`, with the layers of the text tower.

    Returns:
        (images, texts, tokens), float32, not negative; 0 at the end-of-text token itself, whose own relevance isn't
        asked, as the class token's isn't, and after it, where it doesn't look. The start token, on which attention
        rests that goes nowhere else, often has much; `word_relevance` leaves it out.
    """
    images, texts = (pixel_values, interpolate_pos_encoding), (input_ids, attention_mask)
    return _pooled_relevance(model, "text", images, texts, first_layer).transpose(0, 1).cpu().numpy()


def attention_maps(
    model: PreTrainedModel,
    *,
    pixel_values: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    layer: int = -1,
    kind: str = "difference",
    pair: int | None = None,
    interpolate_pos_encoding: bool = False,
) -> np.ndarray:
    """Return a layer's attention maps of images or of texts.

    Args:
        model, interpolate_pos_encoding: As in `image_relevance`.
        pixel_values: Images, (batch, channels, height, width); either these or texts.
        input_ids, attention_mask: Texts, (batch, tokens).
        layer: Which layer; negative counts from the last.
        kind: "first" for A1, "second" for A2, "difference" for A1 − λ·A2. In standard attention a pair is one head,
            and "first" and "difference" are its map.
        pair: Which pair of heads, or None for the mean over all.

    Returns:
        (batch, query tokens, key tokens), float32. Rows of A1 and A2 sum to 1, those of the difference to 1 − λ.

    Raises:
        ValueError: Both images and texts are given or neither; there's no such layer, kind or pair; "second" is asked
            of a standard tower; and as `image_relevance` raises.
    """
    check_model(model)
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, KINDS))}.")
    if pixel_values is not None and input_ids is None:
        tower, inputs = "image", _image_inputs(model, pixel_values, interpolate_pos_encoding)
    elif input_ids is not None and pixel_values is None:
        tower, inputs = "text", _text_inputs(model, input_ids, attention_mask)
    else:
        raise ValueError("Either pixel_values or input_ids must be given, and not both.")
    differential = _is_differential(model, tower)
    if kind == "second" and not differential:
        raise ValueError(f"kind is 'second', but attention of the {tower} tower is standard; it must be 'first'.")
    with torch.no_grad():
        _, outputs = _encode(model, tower, inputs)
    maps = outputs.attentions[_layer_index(layer, "layer", len(outputs.attentions))].float()
    if differential and kind == "difference":
        maps = differential_attention_map(maps, _lambdas(model, tower)[layer])
    elif differential:
        maps = maps[:, KINDS.index(kind) :: 2]
    if pair is None:
        return maps.mean(1).cpu().numpy()
    if not isinstance(pair, int) or not 0 <= pair < maps.shape[1]:
        raise ValueError(f"pair is {pair!r}; it must be from 0 to {maps.shape[1] - 1}, or None for the mean.")
    return maps[:, pair].cpu().numpy()


def class_attention(model: PreTrainedModel, pixel_values: torch.Tensor, **options: Any) -> np.ndarray:
    """Return how much the class token attends to each patch, whatever the text.

    Args:
        model, pixel_values: As in `image_relevance`.
        options: `layer`, `kind`, `pair` and `interpolate_pos_encoding` of `attention_maps`, whose errors these are.

    Returns:
        (images, height / patch_size, width / patch_size), float32; a difference may be negative.
    """
    maps = attention_maps(model, pixel_values=pixel_values, **options)
    return maps[:, 0, 1:].reshape(-1, *_grid(model, pixel_values))


def lambda_values(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Return λ of each layer of each differential tower, {"image": (layers,), "text": (layers,)}, float32.

    Args:
        model: One with both towers or one of them as `vision_model` and `text_model`; a standard tower has no λ.

    Raises:
        ValueError: It has neither, or is on the meta device.
    """
    towers = [tower for tower, (module, _) in TOWERS.items() if hasattr(model, module)]
    if not towers:
        raise ValueError(f"model is a {type(model).__name__}, which has no vision_model and no text_model.")
    check_has_weights(model)
    found = {tower: _lambdas(model, tower) for tower in towers}
    return {tower: torch.stack(values).cpu().numpy() for tower, values in found.items() if values}


def word_relevance(tokenizer: Any, input_ids: torch.Tensor, relevance: np.ndarray) -> list[tuple[str, float]]:
    """Return a text's tokens as written, each with its relevance, without special tokens.

    Args:
        tokenizer: The model's, as `processor.tokenizer`.
        input_ids: Of one text, (tokens,).
        relevance: Its row of `text_relevance`, (tokens,).

    Raises:
        ValueError: They aren't of one text, or there isn't one value for each token.
    """
    input_ids, relevance = torch.as_tensor(input_ids), _array(relevance)
    if input_ids.ndim != 1 or relevance.ndim != 1:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} and relevance {relevance.shape}; both must be of one text, "
            "(tokens,)."
        )
    if len(input_ids) != len(relevance):
        raise ValueError(f"relevance has {len(relevance)} values for {len(input_ids)} tokens; it must have as many.")
    special = set(tokenizer.all_special_ids)
    return [
        (tokenizer.decode([token]).strip(), float(value))
        for token, value in zip(input_ids.tolist(), relevance, strict=True)
        if token not in special
    ]


def shown_images(pixel_values: torch.Tensor, image_processor: Any) -> np.ndarray:
    """Return what the model sees as pictures, by undoing the image processor's normalisation.

    Args:
        pixel_values: (images, 3, height, width).
        image_processor: The model's, as `processor.image_processor`, with `image_mean` and `image_std`.

    Returns:
        (images, height, width, 3), uint8.

    Raises:
        TypeError, ValueError: `pixel_values` isn't such a tensor, or `image_processor` none with these.
    """
    check_pixel_values(pixel_values, 3)
    if not hasattr(image_processor, "image_mean") or not hasattr(image_processor, "image_std"):
        raise ValueError(
            f"image_processor is a {type(image_processor).__name__}, which has no image_mean and image_std; give the "
            "model's image processor, processor.image_processor."
        )
    mean = torch.tensor(image_processor.image_mean)[:, None, None]
    std = torch.tensor(image_processor.image_std)[:, None, None]
    pictures = (pixel_values.detach().cpu().float() * std + mean).clamp(0, 1) * 255
    return pictures.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def overlay(image: np.ndarray, values: np.ndarray, *, signed: bool = False) -> np.ndarray:
    """Lay a map of patches as colours, the stronger the larger, over a picture, in grey and faded.

    Args:
        image: (height, width, 3), uint8.
        values: (rows, columns), any range; enlarged bilinearly to the image. The largest magnitude has the strongest
            colour.
        signed: Whether 0 stays clear and negative values are blue and positive ones red; otherwise negative values
            stay clear.

    Returns:
        (height, width, 3), uint8.

    Raises:
        ValueError: An argument has another shape, or a value isn't finite.
        ImportError: matplotlib, of the extra `plotting`, is missing.
    """
    require_extra("plotting", "matplotlib")
    import matplotlib

    image, values = _array(image), _array(values)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} of shape {image.shape}; it must be uint8, (height, width, 3).")
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"values is of shape {values.shape}; it must be (rows, columns), all finite.")
    size = (image.shape[1], image.shape[0])
    large = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    limit = np.abs(values).max() if signed else values.max()
    scaled = np.clip(large / limit, -1 if signed else 0, 1) if limit > 0 else np.zeros_like(large)
    colours = matplotlib.colormaps[SIGNED_COLOURS if signed else POSITIVE_COLOURS]
    heat = colours(0.5 + scaled / 2 if signed else scaled)[..., :3]
    opacity = OPACITY * np.abs(scaled)[..., None]
    grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float32)[..., None] / 255
    faded = FADING + (1 - FADING) * grey
    return np.round(255 * (opacity * heat + (1 - opacity) * faded)).astype(np.uint8)


def draw_grid(
    images: Sequence[np.ndarray],
    values: np.ndarray,
    queries: Sequence[str],
    models: Sequence[str],
    *,
    signed: bool = False,
) -> "Figure":
    """Draw queries × models: each row an image and where each model looks in it for the row's text.

    Args:
        images: Each row's picture, (height, width, 3), uint8.
        values: (rows, models, grid rows, grid columns); each map has colours of its own scale, as in `overlay`.
        queries: Each row's text.
        models: Each column's title.
        signed: As in `overlay`.

    Raises:
        ValueError: The numbers of images, queries and models aren't those of `values`; and as `overlay` raises.

    Source: the layout of paper arXiv 2503.06626, figure 2.
    """
    images, values = [_array(image) for image in images], _array(values)
    if (
        not images
        or values.ndim != 4
        or values.shape[:2] != (len(queries), len(models))
        or len(images) != len(queries)
    ):
        raise ValueError(
            f"values is of shape {values.shape}, with {len(images)} images, {len(queries)} queries and {len(models)} "
            "models; it must be (queries, models, rows, columns), with an image for each query."
        )
    aspect = images[0].shape[1] / images[0].shape[0]
    figure = _figure((0.3 + 2.3 * aspect * (len(models) + 1), 0.3 + 2.35 * len(queries)))
    axes = figure.subplots(len(queries), len(models) + 1, squeeze=False)
    for title, axis in zip(("image", *models), axes[0], strict=True):
        axis.set_title(title, fontsize=11)
    for image, row, query, line in zip(images, values, queries, axes, strict=True):
        line[0].set_ylabel(query, fontsize=11)
        line[0].imshow(image)
        for axis, relevance in zip(line[1:], row, strict=True):
            axis.imshow(overlay(image, relevance, signed=signed))
        for axis in line:
            _without_ticks(axis)
    return figure


def draw_maps(maps: Sequence[np.ndarray], titles: Sequence[str]) -> "Figure":
    """Draw maps side by side in signed colours, all on one scale centred on zero.

    Args:
        maps: Each (rows, columns): a map of all tokens, or the class token's over the patches.
        titles: Each map's.

    Raises:
        ValueError: There's no map, one has another shape, or there isn't a title for each.
    """
    maps = [_array(one) for one in maps]
    if not maps or len(maps) != len(titles):
        raise ValueError(f"maps has {len(maps)} and titles {len(titles)}; both must have one for each map.")
    if wrong := [one.shape for one in maps if one.ndim != 2 or not one.size]:
        raise ValueError(f"maps has one of shape {wrong[0]}; each must be (rows, columns).")
    # With every value 0, any scale shows it.
    limit = max(float(np.abs(one).max()) for one in maps) or 1.0
    tallest = max(len(one) / one.shape[1] for one in maps)
    figure = _figure((0.9 + 2.7 * len(maps), 0.4 + 2.6 * tallest))
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axis, one, title in zip(axes, maps, titles, strict=True):
        drawn = axis.imshow(one, cmap=SIGNED_COLOURS, vmin=-limit, vmax=limit)
        axis.set_title(title, fontsize=11)
        _without_ticks(axis)
    figure.colorbar(drawn, ax=list(axes), shrink=0.85)
    return figure


def draw_words(texts: Sequence[Sequence[tuple[str, float]]], titles: Sequence[str]) -> "Figure":
    """Draw texts with each token on a colour as strong as its share of the text's largest value.

    Args:
        texts: Each text's tokens and values, as `word_relevance` gives them; values aren't negative.
        titles: Each text's, written before it.

    Raises:
        ValueError: There's no text, one has no token, or there isn't a title for each.
    """
    if not texts or len(texts) != len(titles) or not all(texts):
        raise ValueError(
            f"texts has {len(texts)} texts of {[len(text) for text in texts]} tokens and titles {len(titles)}; each "
            "text must have tokens and a title."
        )
    from matplotlib.patches import Rectangle

    # In a monospaced font, so that a token's width is known; all is in its characters.
    margin = max(len(title) for title in titles) + 2
    width = margin + max(sum(len(token) + 2 for token, _ in text) for text in texts)
    figure = _figure((0.098 * width + 0.2, 0.36 * len(texts) + 0.2))
    axis = figure.subplots()
    axis.set(xlim=(0, width), ylim=(len(texts), 0))
    axis.axis("off")
    font: dict[str, Any] = {"family": "monospace", "fontsize": 11, "va": "center"}
    for line, (text, title) in enumerate(zip(texts, titles, strict=True)):
        axis.text(0, line + 0.5, title, color="0.35", **font)
        largest = max(value for _, value in text) or 1.0
        left = margin
        for token, value in text:
            colour = (0.84, 0.15, 0.16, OPACITY * value / largest)
            axis.add_patch(Rectangle((left, line + 0.12), len(token) + 1.6, 0.76, facecolor=colour, edgecolor="none"))
            axis.text(left + 0.8 + len(token) / 2, line + 0.5, token, ha="center", **font)
            left += len(token) + 2
    return figure


def draw_lambdas(models: Mapping[str, Mapping[str, np.ndarray]]) -> "Figure":
    """Draw λ over depth, a line for each model and a plot for each tower.

    Args:
        models: Name → what `lambda_values` gives of it.

    Raises:
        ValueError: No model has a differential tower.
    """
    towers = [tower for tower in TOWERS if any(tower in values for values in models.values())]
    if not towers:
        raise ValueError(f"models has {list(models)}, none with a differential tower; at least one must have one.")
    figure = _figure((0.6 + 3.6 * len(towers), 3))
    axes = figure.subplots(1, len(towers), squeeze=False, sharey=True)[0]
    for axis, tower in zip(axes, towers, strict=True):
        for number, (name, values) in enumerate(models.items()):
            if tower in values:
                depth = range(1, len(values[tower]) + 1)
                axis.plot(depth, values[tower], "o-", color=f"C{number}", label=name, markersize=4)
        axis.set(xlabel="layer", title=f"{tower} tower")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[0].set_ylabel("λ")
    return figure


def check_model(model: PreTrainedModel) -> None:
    """Raise the ValueError of `image_relevance` where a model can't be looked into as it is."""
    needed = [*(name for names in TOWERS.values() for name in names), "logit_scale"]
    if missing := [name for name in needed if not hasattr(model, name)]:
        raise ValueError(f"model is a {type(model).__name__}, which has no {' and no '.join(missing)}.")
    if model.training:
        raise ValueError("model is in training mode; it must be in evaluation mode: call model.eval().")
    check_has_weights(model)
    if isinstance(model, DiffCLIPPreTrainedModel):
        return
    for module, _ in TOWERS.values():
        implementation = getattr(model, module).config._attn_implementation
        if implementation != "eager":
            raise ValueError(
                f"attn_implementation of {module} is {implementation!r}, which computes no maps; it must be 'eager': "
                "load with attn_implementation='eager', or call model.set_attn_implementation('eager')."
            )


def _image_inputs(model: Any, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> dict[str, Any]:
    check_pixel_values(pixel_values, model.config.vision_config.num_channels)
    _check_batch("pixel_values", pixel_values, "image")
    # A copy, since a tensor that was made in inference mode can't be in a graph.
    copy = pixel_values.detach().to(execution_device(model), model.dtype, copy=True)
    return {"pixel_values": copy, "interpolate_pos_encoding": interpolate_pos_encoding}


def _text_inputs(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> dict[str, Any]:
    check_input_ids(input_ids, model.config.text_config.max_position_embeddings)
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; it must be (texts, tokens): give one as input_ids[None]."
        )
    check_text_companion("attention_mask", attention_mask, input_ids)
    _check_batch("input_ids", input_ids, "text")
    mask = None if attention_mask is None else attention_mask.to(execution_device(model), copy=True)
    return {"input_ids": input_ids.to(execution_device(model), copy=True), "attention_mask": mask}


def _check_batch(name: str, given: torch.Tensor, what: str) -> None:
    if not len(given):
        raise ValueError(f"{name} has shape {tuple(given.shape)}; there must be at least one {what}.")


def _encode(model: Any, tower: str, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, Any]:
    """Return a tower's L2-normalised embeddings, float32, (batch, projection_dim), and its output with the maps."""
    module, projection = (getattr(model, name) for name in TOWERS[tower])
    outputs = module(**inputs, output_attentions=True, return_dict=True)
    return normalize(projection(outputs.pooler_output).float(), dim=-1), outputs


@contextmanager
def _with_maps_in_graph(model: Any, tower: str) -> Iterator[None]:
    """Ask for the gradient of what a tower embeds, so that its maps are in a graph where its parameters are frozen."""
    embedding = getattr(model, TOWERS[tower][0]).get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        hook.remove()


def _pooled_relevance(
    model: Any,
    tower: str,
    images: tuple[torch.Tensor, bool],
    texts: tuple[torch.Tensor, torch.Tensor | None],
    first_layer: int,
) -> torch.Tensor:
    """Return the relevance of one tower's tokens for the token that it pools, 0 at that token itself.

    Args:
        model: Any that `check_model` takes.
        tower: Whose tokens.
        images: As `_image_inputs` takes them.
        texts: As `_text_inputs` takes them.
        first_layer: The first layer that counts.

    Returns:
        (batch of this tower, batch of the other, tokens), float32.
    """
    check_model(model)
    check_passes_gradients(model)
    with torch.inference_mode(False):
        inputs = {"image": _image_inputs(model, *images), "text": _text_inputs(model, *texts)}
        other = "text" if tower == "image" else "image"
        with torch.no_grad():
            others, _ = _encode(model, other, inputs[other])
        with _with_maps_in_graph(model, tower):
            embeds, outputs = _encode(model, tower, inputs[tower])
        if tower == "image":
            pooled = torch.zeros(len(embeds), dtype=torch.long, device=embeds.device)
        else:
            # By its state, so that the rule for which token is pooled stays the model's.
            is_end = (outputs.last_hidden_state == outputs.pooler_output[:, None]).all(-1)
            pooled = is_end.int().argmax(-1)
        rows = _roll_out(model, tower, embeds, others, outputs.attentions, pooled, first_layer)
        return rows.masked_fill(one_hot(pooled, rows.shape[-1]).bool()[:, None], 0)


def _roll_out(
    model: Any,
    tower: str,
    embeds: torch.Tensor,
    others: torch.Tensor,
    maps: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    first_layer: int,
) -> torch.Tensor:
    """Return the rows of R that belong to one token of each example, (batch, others, tokens), float32.

    Args:
        embeds: The examples' embeddings, (batch, projection_dim), with the maps in their graph.
        others: The other tower's, (others, projection_dim).
        maps: Each layer's, (batch, num_heads, tokens, tokens).
        tokens: Which token of each example, (batch,).
    """
    first = _layer_index(first_layer, "first_layer", len(maps))
    chosen = tuple(maps[first:])
    differential = _is_differential(model, tower)
    weights = list(chosen)
    if differential:
        lambdas = _lambdas(model, tower)[first:]
        weights = [differential_attention_map(both, value) for both, value in zip(chosen, lambdas, strict=True)]
    scale = logit_scale_factor(model).to(embeds.device)
    found = []
    for other in others.to(embeds.device):
        # A score depends on its own example's maps alone, so the sum's gradient is every score's.
        score = (scale * embeds @ other).sum()
        gradients: Any = [None]
        if score.requires_grad:
            gradients = torch.autograd.grad(score, chosen, retain_graph=True, allow_unused=True)
        if any(gradient is None for gradient in gradients):
            raise ValueError(
                "The model's layers pass no gradient on, as those with quantised activations don't; relevance needs a "
                "model that isn't quantised, or whose weights alone are."
            )
        # Only some rows of the product (1 + Ā_last)···(1 + Ā_first) are asked, so it is taken from its left end.
        row = one_hot(tokens, maps[0].shape[-1]).float()
        for weight, gradient in zip(reversed(weights), reversed(gradients), strict=True):
            if differential:
                # ∂S/∂M is ∂S/∂A1, of each pair's first head.
                gradient = gradient[:, 0::2]
            mean = (gradient.float().clamp(min=0) * weight.detach().float().clamp(min=0)).mean(1).to(row.device)
            row = row + torch.matmul(row[:, None], mean)[:, 0]
        found.append(row)
    return torch.stack(found, dim=1)


def _is_differential(model: Any, tower: str) -> bool:
    return getattr(getattr(model, TOWERS[tower][0]).config, "attention_type", "standard") == "differential"


def _lambdas(model: Any, tower: str) -> list[torch.Tensor]:
    """Return λ of each layer, the first first; none in a standard tower."""
    modules: Iterable[Any] = getattr(model, TOWERS[tower][0]).modules()
    return [module.get_lambda().detach() for module in modules if hasattr(module, "get_lambda")]


def _array(given: Any) -> np.ndarray:
    """Return what a picture, a tensor or nested lists hold."""
    return given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)


def _layer_index(layer: int, name: str, layers: int) -> int:
    if not isinstance(layer, int) or isinstance(layer, bool) or not -layers <= layer < layers:
        raise ValueError(f"{name} is {layer!r}; it must be from {-layers} to {layers - 1}.")
    return layer % layers


def _grid(model: Any, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Return how many patches an image has down and across."""
    patch_size = model.config.vision_config.patch_size
    return pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size


def _figure(size: tuple[float, float]) -> "Figure":
    """Return a figure that belongs to no global state, as pyplot's do."""
    require_extra("plotting", "matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _without_ticks(axis: "Axes") -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


__all__ = [
    "attention_maps",
    "check_model",
    "class_attention",
    "draw_grid",
    "draw_lambdas",
    "draw_maps",
    "draw_words",
    "image_relevance",
    "lambda_values",
    "overlay",
    "shown_images",
    "text_relevance",
    "word_relevance",
]
